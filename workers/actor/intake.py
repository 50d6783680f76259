"""The intake: makes intents of the log messages that dramatiq can run, or settles at once what can't be run here.

Called by `workers.actor.delivery`, for pages of a lane and for what was parked. An actor that this process doesn't have
may be one of the next deployment, or of the last: its messages are put back for half an hour before they are rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID

import dramatiq
import psycopg

from outbox.actor.broker import OutboxBroker
from outbox.actor.delivered import Delivered, Hold
from outbox.actor.letter import message_of
from outbox.actor.turn import Turn, turn_in
from outbox.database import Connection
from outbox.errors import Permanent
from outbox.intent import Intent
from outbox.parked import Parking
from outbox.retry import Backoff
from outbox.saga import report
from outbox.saga.report import Report
from workers.actor.consumer import Said
from workers.actor.holding import Holding
from workers.actor.keeper import Keeper
from workers.actor.ledger import Ledger, Settled
from workers.actor.retries import Taken

MISSING = Backoff(first=1.0, limit=60.0)
"""For an actor that this process doesn't have."""


class Intake:
    """Makes messages for one process."""

    def __init__(self, broker: OutboxBroker, holder: UUID, ledger: Ledger, keeper: Keeper) -> None:
        self._broker = broker
        self._holder = holder
        self._ledger = ledger
        self._keeper = keeper

    def page(self, conn: Connection, holding: Holding, page: Sequence[Intent], limit: int) -> list[Delivered]:
        """What is to be run of a page that was just read, at most `limit`; the rest is for the next write, or is read
        again."""
        void = report.void(conn, steps) if (steps := [i.id for i in page if i.saga is not None]) else {}
        lane = holding.lane
        hold = Hold(lane.target, lane.lane, lane.epoch, None)
        holding.line.look(conn, lane.target, page)
        made: list[Delivered] = []
        count = 0
        for intent in page:
            count += 1
            turn = turn_in(intent)
            if intent.id in void:
                if not void[intent.id]:
                    holding.reports.append(Report(intent.id, "void"))
            elif intent.due is not None:
                holding.parkings.append(Parking(intent.id, "due"))
            elif turn is not None and not holding.line.admit(turn, intent.id):
                holding.parkings.append(Parking(intent.id, "blocked"))
            else:
                holding.open.add(intent.id)
                message = self._message(intent, hold, holding, turn, holding.mine)
                if message is not None:
                    made.append(message)
                    if len(made) == limit:
                        break
        holding.passed(page, count, len(made))
        return self._in_time(conn, made, holding)

    def taken(self, conn: Connection, target: str, taken: Sequence[Taken]) -> list[Delivered]:
        """What is to be run of messages that were parked, and are ours now."""
        steps = [one.intent.id for one in taken if one.intent.saga is not None]
        void = report.void(conn, steps) if steps else {}
        hold = Hold(target, 0, 0, self._holder)
        made = []
        for one in taken:
            # One that was begun before may have had its effect: its saga has to know, and to undo it.
            if one.intent.id in void and one.attempts == 1 and one.deaths == 1:
                self._ledger.withdraw(one.intent, told=void[one.intent.id])
            elif message := self._message(
                one.intent, hold, None, turn_in(one.intent), self._keeper.attends,
                attempts=one.attempts, deaths=one.deaths, options=_kept(one),
            ):  # fmt: skip
                made.append(message)
        return self._in_time(conn, made, None)

    def _in_time(self, conn: Connection, messages: list[Delivered], holding: Holding | None) -> list[Delivered]:
        """Those that are not over their rate limits, as far as that can be told before a thread is free. The others are
        put back at once."""
        waits: dict[int, float] = {}
        # What a lane's page has admitted must be handed out, though the database is lost just now: the next statement
        # says so, and a rate is looked at again when a thread is free.
        with suppress(psycopg.Error):
            if self._broker.rates:
                waits = self._broker.rates.waits(conn, messages, self._broker.actors, begins=False)
        for message in messages:
            if (wait := waits.get(message.id)) is not None:
                message.wait = wait
                self._ledger.settle(Settled(message, Said.WAIT), holding)
        return [message for message in messages if message.wait is None]

    def _message(
        self,
        intent: Intent,
        hold: Hold,
        holding: Holding | None,
        turn: Turn | None,
        mine: Callable[[], bool],
        *,
        attempts: int = 0,
        deaths: int = 0,
        options: dict[str, object] | None = None,
    ) -> Delivered | None:
        try:
            message, wrong = message_of(intent, options), ""
        except Permanent as error:
            message, wrong = dramatiq.Message("", "", (), {}, {}), str(error)
        actor = self._broker.actors.get(message.actor_name)
        made = Delivered(
            message,
            id=intent.id,
            hold=hold,
            priority=0 if actor is None else actor.priority,
            saga=intent.saga,
            turn=turn,
            attempts=attempts,
            deaths=deaths,
            kept=options is not None,
            consumer=self._holder,
            mine=mine,
        )
        if wrong:
            self._ledger.settle(Settled(made, Said.DEAD, wrong), holding)
            return None
        if actor is None and attempts < self._broker.missing:
            # Dramatiq would reject it at once, and does when it has been put back often enough.
            why = f"there is no actor {message.actor_name} in the workers of its queue: deploy it, or skip the message"
            made.retry = MISSING.wait(max(1, attempts))
            self._ledger.settle(Settled(made, Said.RETRY, why), holding)
            return None
        return made


def _kept(taken: Taken) -> dict[str, object] | None:
    """The options that earlier tries have left. Once an operator has said so, it begins anew."""
    if taken.options is not None and taken.attempts == 1:
        return {name: value for name, value in taken.options.items() if name not in ("retries", "requeue_timestamp")}
    return taken.options
