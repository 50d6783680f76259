"""The timetable: a thread of each worker process that sends the messages of its actors' schedules when they are due.

    declare → due → move on and send, in one transaction

All processes look, each second; the row of the schedule decides which one sends. The database's clock tells the time.
Begun by `OutboxBroker` with a worker, if any of its actors has a schedule, and ended with it. A connection that is
lost is made anew; what was not committed then is sent by the next one that looks.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import datetime
from typing import NamedTuple
from uuid import NAMESPACE_OID, uuid5

import psycopg
from dramatiq.errors import BrokerConnectionError as Lost

from outbox import sql
from outbox.actor.broker import OutboxBroker
from outbox.actor.cron import Due, Schedule, due
from outbox.actor.sender import Sender
from outbox.database import Connection, reason
from outbox.errors import OutboxError
from outbox.failpoint import hit
from outbox.retry import OUTAGE

logger = logging.getLogger("outbox.cron")

EVERY = 1.0
"""Seconds between looks."""

DECLARE_EVERY = 15.0
"""Seconds between declarations."""


class Move(NamedTuple):
    """A schedule moves on: from a slot to another one, and what comes then."""

    slot: datetime
    upto: datetime
    following: datetime


class Timetable:
    """The schedules of one process."""

    def __init__(self, broker: OutboxBroker) -> None:
        self._broker = broker
        self._sender = Sender(lambda: broker.worker_settings.database)
        self._stop = threading.Event()
        self._since: datetime | None = None
        self._declared_at = -DECLARE_EVERY
        self._thread = threading.Thread(target=self._run, name="cron", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is sent any more."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        failures = 0
        while not self._stop.wait(EVERY if not failures else OUTAGE.wait(failures)):
            try:
                self.look()
                failures = 0
            except (psycopg.Error, OutboxError, Lost) as error:
                failures += 1
                logger.warning("cron: %s: trying again", reason(error))
            except Exception:
                # Such as a middleware's: the next look tries again, and the process goes on.
                failures += 1
                logger.exception("cron: a message could not be sent: trying again")
        self._sender.close()

    def look(self) -> int:
        """Send what is due. → how many messages were sent, durably. Raises dramatiq's and psycopg's errors."""
        schedules = {schedule.name: schedule for schedule in self._broker.schedules()}
        if not schedules:
            return 0
        return self._sender.run(lambda conn: self._look(conn, schedules))

    def _look(self, conn: Connection, schedules: dict[str, Schedule]) -> int:
        if time.monotonic() - self._declared_at >= DECLARE_EVERY:
            self._declare(conn, list(schedules.values()))
            self._declared_at = time.monotonic()
        sent = 0
        while not self._stop.is_set():
            versions = {name: schedule.version() for name, schedule in schedules.items()}
            parameters = {"names": list(versions), "versions": list(versions.values())}
            rows = conn.execute(sql.load("cron_due"), parameters).fetchall()
            for name, slot, now, log in rows:
                sent += self._fire(conn, schedules[name], slot, now, log)
            if not rows:
                break
        return sent

    def _declare(self, conn: Connection, schedules: list[Schedule]) -> None:
        row = conn.execute("select outbox.now()").fetchone()
        assert row is not None  # noqa: S101 - a function without FROM has one row
        now = row[0]
        self._since = self._since or now
        conn.execute(
            sql.load("cron_declare"),
            {
                "since": self._since,
                "now": now,
                "names": [one.name for one in schedules],
                "expressions": [one.cron.expression for one in schedules],
                "timezones": [one.cron.timezone for one in schedules],
                "misseds": [one.cron.missed for one in schedules],
                "targets": [self._broker.registered(one.actor.queue_name) for one in schedules],
                "messages": [json.dumps(one.template()) for one in schedules],
                "versions": [one.version() for one in schedules],
                "nexts": [next(one.cron.slots(now)) for one in schedules],
            },
        )
        hit("cron.declared")

    def _fire(self, conn: Connection, schedule: Schedule, slot: datetime, now: datetime, log: str) -> int:
        """Send for the slots after `slot`, each in a transaction of its own. → how many were sent."""
        todo = due(schedule.cron, slot, now)
        if todo.left_out:
            logger.warning("cron: %s: %s: nothing is sent for them", schedule.name, _missed(todo))
        if not todo.slots:
            _move(conn, schedule, Move(slot, todo.upto, todo.following))
            return 0
        moves = map(Move, [slot, *todo.slots], todo.slots, [*todo.slots[1:], todo.following])
        sent = 0
        for move in moves:
            if self._stop.is_set() or not self._send(conn, schedule, move, log):
                break
            sent += 1
        return sent

    def _send(self, conn: Connection, schedule: Schedule, move: Move, log: str) -> bool:
        """One message, with the mark that it is sent. → False: somebody else has sent it."""
        with conn.transaction():
            if not _move(conn, schedule, move):
                return False
            at = move.upto.isoformat()
            message = schedule.message(cron={"name": schedule.name, "slot": at})
            # The same one however often this slot is sent for: after a restore to an earlier point, say.
            message = message.copy(message_id=str(uuid5(NAMESPACE_OID, f"{log}/{schedule.name}/{at}")))
            made, number = self._broker.enqueue_on(conn, message)
            parameters = {"name": schedule.name, "id": number, "message_id": made.message_id, "slot": move.upto}
            conn.execute(sql.load("cron_sent"), parameters)
            hit("cron.sending")
        hit("cron.sent")
        return True


def _move(conn: Connection, schedule: Schedule, move: Move) -> bool:
    """Mark slots as done with. → False: somebody else has."""
    parameters = {"name": schedule.name, "version": schedule.version(), **move._asdict()}
    return conn.execute(sql.load("cron_move"), parameters).fetchone() is not None


def _missed(todo: Due) -> str:
    many = todo.left_out > 1
    return f"{todo.left_out} slots up to {todo.upto.isoformat()} have passed" if many else "a slot has passed"
