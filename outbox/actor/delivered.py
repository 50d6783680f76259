"""Delivered: a message in the hands of a worker, and what is decided about it.

Made by `workers.actor`, given to dramatiq, and given back by `ack`, `nack` or `requeue`. It doesn't matter through
which consumer: what counts is the lane that it came from, with its epoch, or the row of its own that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import dramatiq
from dramatiq.broker import MessageProxy

from outbox.actor.turn import Turn

if TYPE_CHECKING:
    from outbox.actor.results import Result

#: The message whose actor has just ended in this thread, while middleware hears of it.
FINISHING: ContextVar[Delivered | None] = ContextVar("outbox_finishing", default=None)


class Hold(NamedTuple):
    """By what right a message is run: as `outbox.actor_done` is told."""

    target: str
    lane: int
    #: Of the lane's owner; 0 if the message has a row of its own.
    epoch: int
    #: The consumer whose row in outbox.parked it is; None if it came straight from its lane.
    holder: UUID | None


def _always() -> bool:
    return True


class Delivered(MessageProxy):
    """A message that is to be run, or was."""

    #: Seconds until it is to be tried again, once that was asked for.
    retry: float | None = None
    #: Whether its actor has begun a transaction that acknowledges it.
    in_transaction = False
    #: Whether that is known to have committed.
    done = False
    #: Whether it was never begun, because it is in other hands by now.
    stale = False
    #: Seconds until it may begin, if it was never begun because it is over its rate limit.
    wait: float | None = None
    #: Whose worker has it, once it is run.
    broker: dramatiq.Broker | None = None
    #: What is to be stored with its acknowledgement.
    result: Result | None = None
    #: Whether its actor's own transaction has done that.
    result_stored = False

    def __init__(
        self,
        message: dramatiq.Message[Any],
        *,
        id: int,  # noqa: A002 - the intent's, as everywhere
        hold: Hold,
        priority: int = 0,
        saga: UUID | None = None,
        turn: Turn | None = None,
        attempts: int = 0,
        deaths: int = 0,
        kept: bool = False,
        consumer: UUID | None = None,
        mine: Callable[[], bool] = _always,
    ) -> None:
        super().__init__(message)
        # Its fields are asked for a dozen times: not through dramatiq's `__getattr__`.
        self.__dict__.update(vars(message))
        self.id = id
        self.hold = hold
        self.priority = priority
        self.of_saga = saga is not None
        #: Whose place another message of its key takes when it is done.
        self.turn = turn
        #: How often it was tried, this time included; 0 for one that comes from its lane.
        self.attempts = attempts
        #: How often it was in hand when its worker died, if it dies this time.
        self.deaths = deaths
        #: Whether something of an earlier try is kept (`actor_keep`).
        self.kept = kept
        #: The consumer that has it in hand.
        self.consumer = consumer or hold.holder
        #: What the worker asks before it begins.
        self.mine = mine

    @property
    def begun(self) -> bool:
        """Whether its actor was to run here. If not, middleware isn't told of it: to it, the message was never here.
        (`Results` would store that it was skipped.)"""
        return not self.stale and self.wait is None

    @property
    def plain(self) -> bool:
        """Whether nothing is to be said of it but that it is done."""
        return not (self.in_transaction or self.done or self.of_saga) and self.turn is None and self.result is None

    @property
    def failure(self) -> str:
        """What went wrong, by kind and place; never the text, which may quote arguments."""
        return failure_of(self._message.actor_name, self._exception)


def failure_of(actor: str, error: BaseException | None) -> str:
    """What went wrong in an actor, by kind and place."""
    if error is None:
        return "it was rejected"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{actor} raised {type(error).__name__}{where}"
