"""The plan of a saga: its steps and what comes after what, without any of the user's code.

Made by `outbox.saga.definition`, checked by `lint`, walked by `outbox.saga.machine`. Pure values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from outbox.errors import SagaRefused
from outbox.retry import Backoff

LONGEST = 3e9
"""Seconds of the longest timeout, about a century: a later time is none that a database can store."""


class Kind(StrEnum):
    """What a step means for the whole."""

    #: It can be undone. Stands before the pivot.
    COMPENSATABLE = "compensatable"
    #: The point of no return: once it is done, the saga goes forward only.
    PIVOT = "pivot"
    #: It is repeated until it succeeds. Stands after the pivot.
    RETRIABLE = "retriable"


class Act(StrEnum):
    """What a step does."""

    #: An intent for a participant.
    INTENT = "intent"
    #: A function that writes in the engine's transaction.
    FUNCTION = "function"
    #: Waits for `outbox.signal`.
    SIGNAL = "signal"
    #: Waits for a time.
    DELAY = "delay"
    #: Another saga.
    CHILD = "child"


#: Steps that only wait: there is nothing of them to undo or to recall.
WAITS = frozenset({Act.SIGNAL, Act.DELAY})


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a step is tried, and how long it waits in between.

    A function is tried by the engine. An intent before or at the pivot is tried by its participant's worker, which goes
    by the step's `retry` if it has one: the same intent each time, so that a participant that knows it by its id makes
    its effect once. A compensation, and an intent after the pivot, is tried by its worker for as long as workers do,
    and when that has given up, again by the engine as `retry` says, with a new intent each time.
    """

    #: Tries in all; None: for ever.
    attempts: int | None = 5
    #: Seconds before the second try, doubled for each further one, with full jitter.
    first: float = 1.0
    #: Seconds between tries, at most.
    limit: float = 300.0

    def __post_init__(self) -> None:
        if self.attempts is not None and (type(self.attempts) is not int or self.attempts < 1):
            raise SagaRefused(f"Retry(attempts={self.attempts!r}): give it a number of tries in all, or None")
        for name in ("first", "limit"):
            if not 0 <= getattr(self, name) <= LONGEST:
                raise SagaRefused(f"Retry({name}={getattr(self, name)!r}): give it seconds, {LONGEST:g} at most")

    def wait(self, tries: int) -> float:
        """Seconds to wait after `tries` failed tries."""
        return self.backoff.wait(max(1, tries))

    @property
    def backoff(self) -> Backoff:
        """What a worker goes by."""
        return Backoff(self.first, self.limit, ENDLESS if self.attempts is None else self.attempts)

    @property
    def span(self) -> float:
        """Seconds that all tries may take, without the work itself; infinity if there is no end of them."""
        if self.attempts is None:
            return float("inf")
        return sum(min(self.limit, self.first * 2.0 ** min(n, 32)) for n in range(self.attempts - 1))


ENDLESS = 2**31 - 1
"""Tries that nobody ever makes."""

FOR_EVER = Retry(attempts=None)
"""What a step after the pivot does by default: the saga can't go back, so it goes on trying."""


@dataclass(frozen=True, slots=True)
class Node:
    """One step of a plan."""

    name: str
    act: Act
    kind: Kind = Kind.COMPENSATABLE
    #: Numbers of the steps that must be done before.
    after: tuple[int, ...] = ()
    #: How it is undone, or None.
    undo: Act | None = None
    retry: Retry = field(default_factory=Retry)
    #: What the worker of an intent goes by instead of its own rules, before the pivot and at it; None: by those.
    patience: Retry | None = None
    #: Seconds from its begin after which it has failed; None: no limit. For a delay: how long it is.
    timeout: float | None = None
    #: Can't be undone, by the nature of its participant.
    irreversible: bool = False

    @property
    def has_effect(self) -> bool:
        return self.act not in WAITS


ANY = "dict[any]"
"""The form of an input that is any JSON object."""


@dataclass(frozen=True)
class Plan:
    """The steps of a saga, each after those that it depends on."""

    name: str
    version: int
    nodes: tuple[Node, ...]
    #: What its input looks like as JSON (`outbox.saga.form`).
    form: str = ANY
    #: Seconds from the start after which it goes back, if it can still; None: no limit.
    deadline: float | None = None

    @cached_property
    def before(self) -> tuple[frozenset[int], ...]:
        """For each step: all steps that come before it, near and far."""
        found: list[frozenset[int]] = []
        for node in self.nodes:
            found.append(frozenset(node.after).union(*(found[n] for n in node.after)))
        return tuple(found)

    @cached_property
    def next(self) -> tuple[tuple[int, ...], ...]:
        """For each step: those that come directly after it."""
        return tuple(tuple(m for m, node in enumerate(self.nodes) if n in node.after) for n in range(len(self.nodes)))

    @cached_property
    def pivot(self) -> int | None:
        return next((n for n, node in enumerate(self.nodes) if node.kind is Kind.PIVOT), None)

    @cached_property
    def number(self) -> dict[str, int]:
        """Name of a step → its number."""
        return {node.name: n for n, node in enumerate(self.nodes)}

    @cached_property
    def shape(self) -> str:
        """Digest of what a running saga depends on: 16 hex digits. Timeouts and retries may change under it."""
        text = repr([(n.name, n.act.value, n.kind.value, n.after, n.undo and n.undo.value) for n in self.nodes])
        if self.form != ANY:
            text += self.form
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def lint(plan: Plan) -> list[str]:
    """Why this plan can't keep the promise "completed or compensated", one sentence each; empty if it can."""
    found: list[str] = []
    pivots = [node.name for node in plan.nodes if node.kind is Kind.PIVOT]
    if not plan.nodes:
        found.append("it has no steps: add one")
    if len(pivots) > 1:
        found.append(f"it has {len(pivots)} pivots ({', '.join(pivots)}): only one step can decide, keep one")
    for n, node in enumerate(plan.nodes):
        if any(m not in range(n) for m in node.after):
            return [f"step {node.name!r} comes after what is not before it, so it is unreachable: correct its after="]
    for n, node in enumerate(plan.nodes):
        found += (f"step {node.name!r} {why}" for why in _wrong(plan, n, node))
    if plan.deadline is not None and plan.deadline <= (least := _least(plan)):
        found.append(
            f"its deadline of {plan.deadline:g} s is over before its delays are ({least:g} s), so the steps after them "
            "are unreachable: raise the deadline, or put the delays after the pivot"
        )
    return found


def _least(plan: Plan) -> float:
    """Seconds that it takes until it is decided, if nothing takes time but its delays."""
    counted = range(len(plan.nodes)) if plan.pivot is None else plan.before[plan.pivot]
    ends: dict[int, float] = {}
    for n in sorted(counted):
        node = plan.nodes[n]
        own = node.timeout if node.act is Act.DELAY and node.timeout else 0.0
        ends[n] = own + max((ends[m] for m in node.after), default=0.0)
    return max(ends.values(), default=0.0)


def _wrong(plan: Plan, n: int, node: Node) -> list[str]:
    wrong = [*_wrong_time(node)]
    match node.kind:
        case Kind.COMPENSATABLE:
            wrong += _wrong_before(plan, n, node)
        case Kind.PIVOT if node.undo is not None:
            wrong.append("is the pivot and has a compensation, which would never run: remove one of them")
        case Kind.RETRIABLE:
            if plan.pivot is None or plan.pivot not in plan.before[n]:
                wrong.append(
                    "is retriable, and nothing before it is the pivot: name the pivot, and put this step after it"
                )
            if node.undo is not None:
                wrong.append(
                    "has a compensation that would never run, because it stands after the pivot: remove one of them"
                )
            if node.timeout is not None:
                wrong.append("stands after the pivot and must succeed, so it can't time out: remove the timeout")
    return wrong


def _wrong_before(plan: Plan, n: int, node: Node) -> list[str]:
    wrong = []
    if node.irreversible:
        wrong.append("can't be undone and stands before the pivot: make it the pivot or put it after it")
    elif node.has_effect and node.undo is None:
        wrong.append("has no compensation: give it one with .undo, or make it the pivot or retriable")
    if plan.pivot is not None and n not in plan.before[plan.pivot]:
        if node.act is Act.SIGNAL:
            wrong.append("waits for a signal after the pivot, where nothing can fail any more: put it before the pivot")
        elif node.act is not Act.DELAY:
            wrong.append("is not before the pivot, which would decide without it: name it in the pivot's after=")
    return wrong


def _wrong_time(node: Node) -> list[str]:
    wrong = []
    if node.act is Act.SIGNAL and node.timeout is None:
        wrong.append("may wait for ever: give it a timeout")
    tried = node.act in (Act.FUNCTION, Act.INTENT) and node.kind is not Kind.RETRIABLE
    if tried and node.timeout is None and node.retry.attempts is None:
        wrong.append("may be tried for ever before the saga is decided: give it a timeout, or a number of tries")
    if node.timeout is not None and node.timeout <= 0:
        wrong.append("has a timeout that is over at once: give it seconds")
    elif node.timeout is not None and not node.timeout <= LONGEST:
        wrong.append(f"has a timeout that never comes: give it {LONGEST:g} s at most")
    elif (
        (node.act is Act.FUNCTION or node.patience is not None)
        and node.timeout is not None
        and node.retry.attempts is not None  # without an end of tries, the timeout is what ends them
        and node.timeout < node.retry.span
    ):
        wrong.append(
            f"times out after {node.timeout:g} s, before its {node.retry.attempts} tries are over "
            f"(up to {node.retry.span:g} s): raise the timeout or lower the tries"
        )
    return wrong
