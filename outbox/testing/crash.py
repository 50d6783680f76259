"""The cases of the contract in which the participant's process is killed.

A case kills a real process with SIGKILL, and then does what the next owner of the lane does: looks at the position
that the participant keeps, or probes what is in doubt, or tells everything again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from outbox.intent import Intent
from outbox.participant import Doubt, Evidence
from outbox.position import Position
from outbox.testing.look import at, compare, need_applied
from outbox.testing.owner import Owner, kill
from outbox.testing.subject import Broken, Subject, expected


def is_durable_when_apply_returns(subject: Subject) -> None:
    first, second = _batches(subject)
    kill(subject, 2, second, at(2))
    _look_at_position(subject, at(2))
    compare(subject, [*first, *second], "right after `apply` had returned and its process was killed")
    _go_on(subject, first, second)


def is_right_after_a_kill(subject: Subject, failpoint: str) -> None:
    first, second = _batches(subject)
    kill(subject, 2, second, at(2), failpoint)
    _go_on(subject, first, second)


def _batches(subject: Subject) -> tuple[list[Intent], list[Intent]]:
    """A batch that is applied in peace, and one that is not."""
    first = [subject.put(1, "a", 1), subject.put(2, "b", 1)]
    second = [subject.put(3, "a", 2), subject.put(4, "c", 1), subject.put(5, "d", 1)]
    owner = Owner(subject, 1)
    need_applied(owner.apply(first, at(1)))
    owner.close()
    return first, second


def _look_at_position(subject: Subject, wanted: Position) -> None:
    participant = subject.make()
    if participant.keeps_position:
        participant.open(subject.view(3, unclean=True))
        if (found := participant.position()) != wanted:
            raise Broken(f"its position after the kill is {found}, and the batch's is {wanted}")
    participant.close()


def _go_on(subject: Subject, first: Sequence[Intent], second: Sequence[Intent]) -> None:
    """What the next owner does, and what must be there then."""
    owner = Owner(subject, 4, unclean=True)
    try:
        again: Sequence[Intent] = second
        receipts: dict[int, dict[str, Any]] = {}
        if owner.participant.keeps_position:
            found = owner.participant.position()
            if found not in (at(1), at(2)):
                raise Broken(
                    f"its position after the kill, {found}, is neither that before the batch nor that behind it"
                )
            again = second if found == at(1) else []
        elif owner.participant.records_attempts:
            again, receipts = probed(subject, owner, second)
        need_applied(owner.apply(again, at(2), receipts=receipts))
    finally:
        owner.close()
    compare(subject, [*first, *second], "after the kill, when the next owner had gone on", once=subject.certain)


def probed(subject: Subject, owner: Owner, batch: Sequence[Intent]) -> tuple[list[Intent], dict[int, dict[str, Any]]]:
    """What the participant says was not applied, which must be true."""
    opened = datetime.now(UTC) - timedelta(minutes=5)
    evidence = list(owner.participant.probe([Doubt(intent, opened, {}) for intent in batch]))
    if len(evidence) != len(batch):
        raise Broken(f"probe was asked about {len(batch)} attempts and answered {len(evidence)}")
    held = list(subject.held())
    again, receipts = [], {}
    for intent, (found, receipt) in zip(batch, evidence, strict=True):
        there = expected(subject, [intent])[0] in held
        if subject.certain and found is not (Evidence.APPLIED if there else Evidence.NOT_APPLIED):
            raise Broken(
                f"probe says {found.value} of intent {intent.id}, and its effect is {'there' if there else 'not there'}"
            )
        # Where it can't tell, an operator looks.
        if found is Evidence.NOT_APPLIED or (found is Evidence.UNKNOWN and not there):
            again.append(intent)
            receipts[intent.id] = receipt or {}
    return again, receipts
