"""The words of the machine: the states of sagas and steps, what can happen, and what is to be done.

Used by `outbox.saga.machine`. The names of states are CHECKs of the schema and a picture in the docs; a test compares
the three.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class SagaState(StrEnum):
    """Where a saga is."""

    #: Waits for its locks; nothing was done.
    WAITING = "waiting"
    #: Goes forward, and can still go back.
    RUNNING = "running"
    #: The pivot is done: forward only.
    COMPLETING = "completing"
    #: Goes back.
    COMPENSATING = "compensating"
    #: Nothing goes on by itself: an operator decides.
    STUCK = "stuck"
    COMPLETED = "completed"
    COMPENSATED = "compensated"


ENDED = frozenset({SagaState.COMPLETED, SagaState.COMPENSATED})


class StepState(StrEnum):
    """Where a step is."""

    PENDING = "pending"
    #: Its action is armed: it may have happened from now on.
    RUNNING = "running"
    #: To be given up, if it is not done yet: the participant answers.
    RECALLED = "recalled"
    DONE = "done"
    #: It did not happen.
    FAILED = "failed"
    UNDOING = "undoing"
    UNDONE = "undone"
    #: It keeps failing: an operator decides.
    STUCK = "stuck"
    #: Never begun, or left out by an operator.
    SKIPPED = "skipped"


class Decision(StrEnum):
    """Which way the saga goes. Taken once, and never changed."""

    OPEN = "open"
    COMMIT = "commit"
    ABORT = "abort"


class Verdict(StrEnum):
    """What became of a try."""

    APPLIED = "applied"
    #: It did not happen, and another try can't help.
    FAILED = "failed"
    #: It did not happen, and another try may help (functions; participants try again by themselves).
    AGAIN = "again"
    #: Recalled before it was tried.
    VOID = "void"
    #: It may have happened, and nobody will ever know.
    UNKNOWN = "unknown"
    #: Left out by an operator, where a step must succeed.
    SKIPPED = "skipped"


class Step(NamedTuple):
    """A step's state. (round, tries) names one try: each do and each undo begins a new round."""

    state: StepState = StepState.PENDING
    round: int = 0
    #: Failed tries of this round.
    tries: int = 0


class Saga(NamedTuple):
    """A saga's state; what the plan doesn't say."""

    state: SagaState
    decision: Decision
    steps: tuple[Step, ...]
    #: Signals that came before their step.
    signals: frozenset[str] = frozenset()
    #: Why it goes back, or what it is stuck at.
    reason: str = ""


# ------------------------------------------------------------------------------------------------- events


class Started(NamedTuple):
    """The saga begins (its locks, if any, are held)."""


class Outcome(NamedTuple):
    """What became of a try of a step."""

    step: int
    round: int
    tries: int
    verdict: Verdict
    error: str = ""


class Rang(NamedTuple):
    """A timer of a step: `timeout` (of a round), `retry` (of a try)."""

    step: int
    what: str
    round: int
    tries: int = 0


class Signalled(NamedTuple):
    """A signal came; a refused approval is not accepted."""

    name: str
    accepted: bool = True


class Cancelled(NamedTuple):
    """Somebody wants the saga to go back."""

    reason: str


class Retried(NamedTuple):
    """An operator wants a stuck step to be tried again."""

    step: int


class Skipped(NamedTuple):
    """An operator wants a stuck step to be left out."""

    step: int


class Resolved(NamedTuple):
    """An operator says whether a step has happened (a heuristic outcome)."""

    step: int
    happened: bool


Event = Started | Outcome | Rang | Signalled | Cancelled | Retried | Skipped | Resolved

# ----------------------------------------------------------------------------------------------- commands


class Do(NamedTuple):
    """Try the action of a step."""

    step: int


class Undo(NamedTuple):
    """Try the compensation of a step."""

    step: int


class Recall(NamedTuple):
    """Make what is in flight of a step void, unless it is done already; an outcome follows."""

    step: int


class Ring(NamedTuple):
    """Set a timer: `timeout` of the round that begins, `retry` after the failed tries so far."""

    step: int
    what: str


class Refused(NamedTuple):
    """What was asked for can't be done."""

    reason: str


Command = Do | Undo | Recall | Ring | Refused
