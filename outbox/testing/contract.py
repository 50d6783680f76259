"""The contract of a participant, case by case.

`participant_contract(Subject)` returns the cases that apply to a subject; each is called with an empty folder, and
raises `Broken` with what the contract says, where that is written, and what was seen instead. A case takes
milliseconds, but for those that kill a process (`outbox.testing.crash`), and needs no database: the suite does what
the reader would do (`outbox.testing.owner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from outbox.errors import Fenced, Unavailable
from outbox.intent import Intent
from outbox.participant import Participant, Verdict
from outbox.testing import crash
from outbox.testing.look import at, compare, need, need_applied
from outbox.testing.owner import Owner
from outbox.testing.subject import Broken, Subject

PAGE = "docs/how-to/write-your-own-participant.md#the-contract"

_SECRET = "hunter2"  # noqa: S105 - of a payload, to be looked for in errors

#: What the protocol has.
_NAMES = [name for name in {**Participant.__annotations__, **vars(Participant)} if not name.startswith("_")]

#: Bodies that Postgres takes for JSON. Python reads some of them, and some are not what a participant expects.
UNREADABLE = (
    "null",
    "[]",
    '"text"',
    '{"text": 1' + "0" * 4300 + "}",
    '{"text": ' + "[" * 1200 + "]" * 1200 + "}",
    '{"text": 1e5000}',
    f'{{"{_SECRET}": "{_SECRET}"}}',
)


@dataclass(frozen=True, slots=True)
class Case:
    """One case of the contract, for one subject."""

    subject: type[Subject]
    name: str
    #: What the contract says, in one sentence.
    says: str
    #: The method whose docstring in `outbox.participant` says so.
    where: str
    run: Callable[[Subject], None]

    def __str__(self) -> str:
        return self.name

    def __call__(self, home: Path) -> None:
        """Run it in `home`, an empty folder. Raises `Broken`."""
        subject = self.subject(home)
        subject.start()
        try:
            self.run(subject)
        except Broken as broken:
            raise Broken(f"{self._contract} But {broken}.") from None
        except Exception as error:
            raise Broken(f"{self._contract} But {type(error).__name__} was raised: {error}") from error
        finally:
            subject.stop()

    @property
    def _contract(self) -> str:
        return f"{self.subject.__qualname__}, {self.name}: {self.says} (Participant.{self.where}; {PAGE})"


def participant_contract(subject: type[Subject]) -> list[Case]:
    """The cases that apply to a subject, in the order in which a participant is best made right."""
    return list(_cases(subject))


def _cases(kind: type[Subject]) -> Iterator[Case]:
    case = partial(Case, kind)
    yield case("is_a_participant", "It has the methods and attributes of the protocol.", "open", _is_a_participant)
    yield case(
        "answers_each_intent_in_order", "There is one outcome for each intent, in the same order.", "apply", _answers
    )
    yield case("does_nothing_when_told_nothing", "An empty batch has no outcomes and no effects.", "apply", _nothing)
    if kind.lists:
        yield case("lists_what_it_holds", "The inventory is everything held.", "inventory", _lists)
    yield case("goes_on_with_the_next_owner", "Effects already made stay when it is closed.", "close", _goes_on)
    yield case(
        "applies_once_when_told_twice",
        "Telling it again makes no other effect, or `probe` knows what not to tell again.",
        "apply",
        _once,
    )
    yield case("keeps_the_order_of_a_key", "The effects of a batch are made in its order.", "apply", _order)
    yield case(
        "holds_back_a_key_that_failed", "Later intents of a key that failed are BLOCKED, untried.", "apply", _blocks
    )
    yield case(
        "sets_unreadable_payloads_aside",
        "What can't be read is POISON with a reason that quotes nothing, and stops nothing else.",
        "apply",
        _unreadable,
    )
    if kind.undo is not Subject.undo:
        yield case(
            "undoes_what_was_never_done", "Taking back what isn't there is APPLIED, and harmless.", "apply", _undoes
        )
    yield case(
        "keeps_its_position_with_its_effects",
        "The position given is stored with the effects if every outcome is APPLIED, and only then; or there is none.",
        "apply",
        _position,
    )
    if kind.fences:
        yield case("refuses_a_stale_owner", "An owner of a lower epoch than it has seen is refused.", "open", _fences)
    if kind.away is not Subject.away:
        yield case(
            "waits_for_its_store", "Without its store it is Unavailable, and goes on when that is back.", "open", _waits
        )
    yield case(
        "is_durable_when_apply_returns",
        "What is reported as APPLIED is durable when `apply` returns.",
        "apply",
        crash.is_durable_when_apply_returns,
    )
    for name in kind.failpoints:
        yield case(
            f"is_right_after_a_kill_at_{name}",
            "After a crash, going on makes each effect once.",
            "apply",
            partial(crash.is_right_after_a_kill, failpoint=name),
        )


def _is_a_participant(subject: Subject) -> None:
    participant = subject.make()
    if missing := [name for name in _NAMES if not hasattr(participant, name)]:
        raise Broken(f"it has no {', '.join(missing)}")
    if participant.batch_limit < 1 or participant.batch_bytes < 1:
        raise Broken("its batches have no room for an intent")
    participant.close()  # as the reader does when `open` was not reached
    owner = Owner(subject, 1)
    if (found := owner.participant.position()) is not None:
        raise Broken(f"its position is {found} before anything was applied")
    owner.close()


def _apply(subject: Subject, epoch: int, *batches: list[Intent]) -> None:
    """Let an owner apply batches that nothing is wrong with, and go."""
    owner = Owner(subject, epoch)
    for number, batch in enumerate(batches, epoch):
        need_applied(owner.apply(batch, at(number)))
    owner.close()


def _answers(subject: Subject) -> None:
    puts = [subject.put(n, name, 1) for n, name in enumerate("abcd", 1)]
    owner = Owner(subject, 1)
    need_applied(owner.apply(puts[:2], at(1)))
    mixed = [puts[2], subject.poison(9, "bad"), puts[3]]
    need(owner.apply(mixed), Verdict.APPLIED, Verdict.POISON, Verdict.APPLIED)
    owner.close()
    compare(subject, puts, "after two batches")


def _nothing(subject: Subject) -> None:
    owner = Owner(subject, 1)
    if outcomes := owner.participant.apply([], None):
        raise Broken(f"it returned {len(outcomes)} outcomes for nothing")
    owner.close()
    compare(subject, [], "after an empty batch")


def _lists(subject: Subject) -> None:
    puts = [subject.put(n, name, 1) for n, name in enumerate("abc", 1)]
    _apply(subject, 1, puts)
    gone = subject.undo(4, puts[0])
    if gone is not None:
        _apply(subject, 2, [gone])
        puts = puts[1:]
    participant = subject.make()
    items = {item.key: item.id for item in participant.inventory()}
    participant.close()
    if items.keys() != {put.key for put in puts}:
        raise Broken(f"it lists {len(items)} keys, and those of {len(puts)} intents are due")
    for put in puts:
        if items[put.key] not in (0, put.id):
            raise Broken(f"it says that intent {items[put.key]} wrote what intent {put.id} did")


def _goes_on(subject: Subject) -> None:
    puts = [subject.put(n, name, 1) for n, name in enumerate("abc", 1)]
    for epoch, put in enumerate(puts, 1):
        _apply(subject, epoch, [put])
    compare(subject, puts, "after three owners in turn")


def _once(subject: Subject) -> None:
    puts = [subject.put(n, name, 1) for n, name in enumerate("abc", 1)]
    _apply(subject, 1, puts)
    owner = Owner(subject, 2, unclean=True)
    if owner.participant.records_attempts:
        never = subject.put(9, "never", 1)
        again, _ = crash.probed(subject, owner, [*puts, never])
        if subject.certain and again != [never]:
            raise Broken(f"probe would have {len(again)} of {len(puts) + 1} intents made again, and one is due")
    else:
        need_applied(owner.apply(puts, at(1)))
        need_applied(owner.apply(puts, at(1)))
    owner.close()
    compare(subject, puts, "after another owner was told again, twice")


def _order(subject: Subject) -> None:
    puts = [subject.put(1, "a", 1), subject.put(2, "b", 1), subject.put(3, "a", 2), subject.put(4, "a", 3)]
    _apply(subject, 1, puts)
    compare(subject, puts, "after a batch with three intents of a key")
    undo = subject.undo(5, puts[3])
    if undo is not None:
        again = [undo, subject.put(6, "a", 4), *filter(None, [subject.undo(7, puts[1])])]
        _apply(subject, 2, again)
        compare(subject, [*puts, *again], "after a batch that takes back and makes anew")


def _blocks(subject: Subject) -> None:
    bad, put, other = subject.poison(1, "a"), subject.put(2, "a", 1), subject.put(3, "b", 1)
    if bad.key != put.key:
        raise Broken("the subject's `poison` has another key than its `put`: give it the same")
    owner = Owner(subject, 1)
    need(owner.apply([bad, put, other], at(1)), Verdict.POISON, Verdict.BLOCKED, Verdict.APPLIED)
    owner.close()
    compare(subject, [other], "after a batch whose first intent failed")


def _unreadable(subject: Subject) -> None:
    owner = Owner(subject, 1)
    for number, body in enumerate(UNREADABLE):
        bad = subject.put(1 + number, f"bad {number}", 1)._replace(body=body)
        good = subject.put(101 + number, f"good {number}", 1)
        first, second = owner.apply([bad, good])
        # To pass on what it can't read is a participant's right.
        if first.verdict is not Verdict.APPLIED:
            need([first], Verdict.POISON)
        need_applied([second])
        if _SECRET in first.error:
            raise Broken("its reason quotes the payload")
    owner.close()


def _undoes(subject: Subject) -> None:
    put = subject.put(2, "a", 1)
    undo = subject.undo(1, put)
    assert undo is not None  # noqa: S101 - or the case would not be there
    _apply(subject, 1, [undo], [undo])
    compare(subject, [], "after taking back what was never done")
    _apply(subject, 3, [put])
    compare(subject, [put], "after taking back, and then making, an effect")


def _position(subject: Subject) -> None:
    owner = Owner(subject, 1)
    need_applied(owner.apply([subject.put(1, "a", 1)], at(1)))
    if not owner.participant.keeps_position:
        if (found := owner.participant.position()) is not None:
            raise Broken(f"it keeps no position, and says that it is {found}")
        owner.close()
        return
    _expect_position(owner, 1, "after a batch")
    need(owner.apply([subject.put(2, "b", 1), subject.poison(3, "c")], at(2)), Verdict.APPLIED, Verdict.POISON)
    _expect_position(owner, 1, "after a batch with poison, which must be parked first")
    owner.apply([], at(3))
    _expect_position(owner, 3, "after an empty batch with a position")
    owner.close()
    owner = Owner(subject, 2)
    _expect_position(owner, 3, "for the next owner")
    owner.close()


def _expect_position(owner: Owner, number: int, when: str) -> None:
    if (found := owner.participant.position()) != at(number):
        raise Broken(f"{when} its position is {found}, and {at(number)} is due")


def _fences(subject: Subject) -> None:
    mine, stale, late = subject.put(1, "a", 1), subject.put(2, "b", 1), subject.put(3, "c", 1)
    older = Owner(subject, 6)
    try:
        newer = Owner(subject, 7)
    except Unavailable:
        # Only one at a time is let in: then there is no late one.
        older.close()
        newer = Owner(subject, 7)
        need_applied(newer.apply([mine], at(1)))
    else:
        need_applied(newer.apply([mine], at(1)))
        with suppress(Fenced, Unavailable):
            older.apply([stale], at(2))
            raise Broken("an owner that another one had replaced was let in")
        older.close()
    newer.close()
    with suppress(Fenced, Unavailable):
        gone = Owner(subject, 6)
        try:
            gone.apply([late], at(2))
        finally:
            gone.close()
        raise Broken("an owner of a lower epoch was let in after the newer one had gone")
    compare(subject, [mine], "after stale owners had tried")


def _waits(subject: Subject) -> None:
    before, during, after = subject.put(1, "a", 1), subject.put(2, "b", 1), subject.put(3, "c", 1)
    owner = Owner(subject, 1)
    need_applied(owner.apply([before], at(1)))
    with subject.away():
        for _ in range(2):
            try:
                outcomes = owner.apply([during], at(2))
            except Unavailable:
                continue
            raise Broken(f"without its store, `apply` returned {[o.verdict.value for o in outcomes]}")
    # The reader goes on with the same object.
    need_applied(owner.apply([during], at(2)))
    owner.close()
    with subject.away(), suppress(Unavailable):
        Owner(subject, 2).close()
    _apply(subject, 3, [after])
    compare(subject, [before, during, after], "after its store was away for a while, twice")
