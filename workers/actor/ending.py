"""The ending: messages that end without their actor, because they have killed their workers, or an operator skips them.

Whoever waits for such a message's result gets a failure (`MessageAbandoned`), as if its actor had raised it. It is
stored in the transaction that gives the message up, or that takes the mark away which the operator's decision has left.
Called by `workers.actor.delivery`; durable when it returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from outbox import parked, sql
from outbox.actor import results
from outbox.actor.broker import OutboxBroker
from outbox.actor.delivered import Delivered, Hold
from outbox.actor.letter import message_of
from outbox.actor.results import Result
from outbox.database import Connection
from outbox.errors import MessageAbandoned, Permanent
from outbox.intent import Intent
from outbox.saga import report
from outbox.saga.report import Report
from workers.actor.holding import Holding
from workers.actor.retries import DEATHS, DEATHS_MOST, lanes_of

PAGE = 500
"""Skipped messages in one transaction."""

_DEADLY = f"was in hand when its worker died: {DEATHS} times, and alone at last, or {DEATHS_MOST} times"

_SKIPPED = "was skipped by an operator"


def give_up(conn: Connection, broker: OutboxBroker, holdings: Sequence[Holding]) -> None:
    """Park those for good that have killed their workers, as far as anybody can know."""
    with conn.transaction():
        rows = conn.execute(
            sql.load("actor_deadly"),
            {**lanes_of(holdings), "most": DEATHS_MOST, "alone": DEATHS, "error": _DEADLY},
        )
        ended = [Intent._make(row) for row in rows]
        # Nobody knows whether they got through: their sagas see to it.
        steps = [intent.id for intent in ended if intent.saga is not None]
        if steps:
            parked.remove(conn, steps)
            report.send_of_actors(conn, [Report(number, "unknown", _DEADLY) for number in steps])
        _tell(conn, broker, ended, _DEADLY)


def tell_skipped(conn: Connection, broker: OutboxBroker, holdings: Sequence[Holding]) -> None:
    """Tell those who wait for messages that were skipped: of a page."""
    with conn.transaction():
        rows = conn.execute(sql.load("actor_untold"), {**lanes_of(holdings), "limit": PAGE})
        _tell(conn, broker, [Intent._make(row) for row in rows], _SKIPPED)


def _tell(conn: Connection, broker: OutboxBroker, ended: Sequence[Intent], why: str) -> None:
    found = [result for intent in ended if (result := _failure(broker, intent, why)) is not None]
    if found:
        results.store(conn, found)


def _failure(broker: OutboxBroker, intent: Intent, why: str) -> Result | None:
    """The result of a message that ended so; None if nobody is to have one."""
    try:
        message = Delivered(message_of(intent), id=intent.id, hold=Hold(intent.target, 0, 0, None))
    except Permanent:
        return None
    message.broker = broker
    message.fail()
    message.stuff_exception(MessageAbandoned(f"intent {intent.id} {why}"))
    results.fail(broker, message)
    return message.result
