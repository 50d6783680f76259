"""The relay's participant: a batch of messages is handed to the broker, and applied once that has confirmed them.

Made for each lane of a relayed queue; `workers.reader` does the rest, as for any participant: order, retries,
parking, the position. A batch that is handed on again after a crash has the same message ids. Steps of sagas are
noted in `outbox.relayed` before they are handed on; their sagas hear from the far side
(`workers.actor.relay.returns`).

Raises `Unavailable` when the broker is away, or full: the lane waits, and nothing counts as tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outbox.actor.letter import message_of
from outbox.actor.outcomes import OPTION
from outbox.database import Connection, connect
from outbox.errors import NotReady, Permanent, Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.participant import APPLIED, LaneView, Outcome, Participant, Verdict
from outbox.position import Position
from outbox.settings import Settings
from workers.actor.relay import book
from workers.actor.relay.link import Fate, Letter, Link

_HANDED_ON = Outcome(Verdict.APPLIED, handed_on=True)
_BLOCKED = Outcome(Verdict.BLOCKED)
_FATES = {
    Fate.FULL: Outcome(Verdict.RETRY, error="the broker takes no message of its queue now", untouched=True),
    Fate.REFUSED: Outcome(
        Verdict.POISON, error="the broker refuses it, most likely as too large: raise its limit, or skip this intent"
    ),
}


class RelayParticipant(Participant):
    """One lane of a relayed queue."""

    batch_limit = 500

    def __init__(self, settings: Settings, link: Link, returns: str) -> None:
        """`returns`: the queue where the far side says what became of a message."""
        self._settings = settings
        self._link = link
        self._returns = returns
        self._lane: LaneView
        self._conn: Connection | None = None

    def open(self, lane: LaneView) -> None:
        self._lane = lane

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002
        outcomes: list[Outcome | None] = [None] * len(batch)
        steps = self._note([intent.id for intent in batch if intent.saga is not None])
        letters: list[Letter] = []
        places: list[int] = []
        for place, intent in enumerate(batch):
            if intent.saga is not None and intent.id not in steps:
                outcomes[place] = _HANDED_ON  # the far side has told of it
                continue
            try:
                letters.append(self._letter(intent))
                places.append(place)
            except Permanent as error:
                outcomes[place] = Outcome(Verdict.POISON, error=str(error))
        fates = self._link.send(letters) if letters else []
        hit("relay.confirmed")
        for place, fate in zip(places, fates, strict=False):
            done = APPLIED if batch[place].saga is None else _HANDED_ON
            outcomes[place] = done if fate is Fate.TAKEN else _FATES[fate]
        return _until_missing(batch, outcomes)

    def _note(self, ids: Sequence[int]) -> set[int]:
        if not ids:
            return set()
        if self._conn is None or self._conn.closed:
            try:
                self._conn = connect(self._settings.database, name=f"relay {self._lane.target}/{self._lane.lane}")
            except NotReady as error:
                raise Unavailable(str(error)) from None
        noted = book.note(self._conn, self._lane, ids)
        hit("relay.noted")
        return noted

    def _letter(self, intent: Intent) -> Letter:
        message = message_of(intent)
        told: dict[str, Any] = {"intent": intent.id, "returns": self._returns, "step": intent.saga is not None}
        message = message.copy(options={OPTION: told})
        priority = message.options.get("broker_priority")
        valid = isinstance(priority, int) and not isinstance(priority, bool) and 0 <= priority <= 255
        return Letter(intent.id, message.message_id, message.queue_name, message.encode(), priority if valid else None)

    def close(self) -> None:
        self._link.close()
        if self._conn is not None:
            self._conn.close()


def _until_missing(batch: Sequence[Intent], outcomes: Sequence[Outcome | None]) -> list[Outcome]:
    """What became of a batch, up to the first message of which the broker said nothing. What follows a failure of its
    key is blocked: perhaps it was handed on, and it comes again."""
    known: list[Outcome] = []
    failed: set[str] = set()
    for intent, outcome in zip(batch, outcomes, strict=True):
        if outcome is None:
            break
        if intent.key in failed:
            known.append(_BLOCKED)
            continue
        if outcome.verdict is not Verdict.APPLIED:
            failed.add(intent.key)
        known.append(outcome)
    return known
