"""What the cases of the contract look at: outcomes, and the effects at the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from outbox.intent import Intent
from outbox.participant import Outcome, Verdict
from outbox.position import Position
from outbox.testing.subject import Broken, Subject, expected


def at(number: int) -> Position:
    """A position of a log that there is not."""
    return Position("a" * 16, number, "b" * 16)


def verdicts(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(outcome.verdict.value for outcome in outcomes)


def need(outcomes: Sequence[Outcome], *wanted: Verdict) -> None:
    """These verdicts, in this order, each failure with its reason."""
    if tuple(outcome.verdict for outcome in outcomes) != wanted:
        raise Broken(f"the outcomes are {verdicts(outcomes)}; due are {', '.join(v.value for v in wanted)}")
    for outcome in outcomes:
        if outcome.verdict not in (Verdict.APPLIED, Verdict.BLOCKED) and not outcome.error:
            raise Broken(f"an outcome is {outcome.verdict.value} and does not say why")


def need_applied(outcomes: Sequence[Outcome]) -> None:
    need(outcomes, *[Verdict.APPLIED] * len(outcomes))


def compare(subject: Subject, intents: Sequence[Intent], when: str, *, once: bool = True) -> None:
    """What is held must be what these intents make, each applied once, or at least once."""
    held, due = list(subject.held()), expected(subject, intents)
    if missing := _without(due, held):
        raise Broken(f"{when}, {len(missing)} of {len(due)} effects are missing: {missing[:3]}")
    if surplus := _without(held, due) if once else [effect for effect in held if effect not in due]:
        raise Broken(f"{when}, {len(surplus)} effects are there that should not be: {surplus[:3]}")
    if subject.ordered and not subject.replaces and once:
        for key in dict.fromkeys(intent.key for intent in intents):
            wanted = expected(subject, [intent for intent in intents if intent.key == key])
            if (found := [effect for effect in held if effect in wanted]) != wanted:
                raise Broken(f"{when}, the effects of a key are in the order {found}; that of the log is {wanted}")


def _without(these: Sequence[Any], those: Sequence[Any]) -> list[Any]:
    """`these` without `those`, each taken as often as it is there."""
    left = list(those)
    rest = []
    for each in these:
        if each in left:
            left.remove(each)
        else:
            rest.append(each)
    return rest
