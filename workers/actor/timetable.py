"""The timetable: a thread of each worker process that sends the messages of its actors' schedules when they are due.

    declare → due → move on and send, in one transaction

All processes look, each second; the row of the schedule decides which one sends. The database's clock tells the time.
Begun by `OutboxBroker` with a worker, if any of its actors has a schedule, and ended with it. A connection that is
lost is made anew; what was not committed then is sent by the next one that looks.
"""

from __future__ import annotations

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
from outbox.actor.cron import Declared, Due, declared, due
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
        self._declared: dict[str, Declared] = {}
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
        if time.monotonic() - self._declared_at >= DECLARE_EVERY:
            found = [declared(one, self._broker.draft(one.message())) for one in self._broker.schedules()]
            for one in found:
                self._broker.registered(one.schedule.actor.queue_name)
            self._declared = {one.schedule.name: one for one in found}
            if found:
                self._sender.run(self._declare)
            self._declared_at = time.monotonic()
        return self._sender.run(self._look) if self._declared else 0

    def _declare(self, conn: Connection) -> None:
        row = conn.execute("select outbox.now()").fetchone()
        assert row is not None  # noqa: S101 - a function without FROM has one row
        now = row[0]
        self._since = self._since or now
        ours = list(self._declared.values())
        crons = [one.schedule.cron for one in ours]
        conn.execute(
            sql.load("cron_declare"),
            {
                "since": self._since,
                "now": now,
                "names": list(self._declared),
                "expressions": [cron.expression for cron in crons],
                "timezones": [cron.timezone for cron in crons],
                "misseds": [cron.missed for cron in crons],
                "targets": [one.target for one in ours],
                "actions": [one.action for one in ours],
                "keys": [one.key for one in ours],
                "messages": [one.message for one in ours],
                "versions": [one.version for one in ours],
                "nexts": [next(cron.slots(now)) for cron in crons],
            },
        )
        hit("cron.declared")

    def _look(self, conn: Connection) -> int:
        sent, wrong = 0, None
        ours = dict(self._declared)
        while ours and not self._stop.is_set():
            parameters = {"names": list(ours), "versions": [one.version for one in ours.values()]}
            rows = conn.execute(sql.load("cron_due"), parameters).fetchall()
            for name, slot, now, log in rows:
                try:
                    sent += self._fire(conn, ours[name], slot, now, log)
                except (psycopg.Error, Lost):
                    raise
                except Exception as error:  # noqa: BLE001 - raised below: the others must not wait for it
                    wrong = wrong or error
                    del ours[name]
            if not rows:
                break
        if wrong is not None:
            raise wrong
        return sent

    def _fire(self, conn: Connection, ours: Declared, slot: datetime, now: datetime, log: str) -> int:
        """Send for the slots after `slot`, each in a transaction of its own. → how many were sent."""
        todo = due(ours.schedule.cron, slot, now)
        if todo.left_out:
            logger.warning("cron: %s: %s: nothing is sent for them", ours.schedule.name, _missed(todo))
        if not todo.slots:
            _move(conn, ours, Move(slot, todo.upto, todo.following))
            return 0
        moves = map(Move, [slot, *todo.slots], todo.slots, [*todo.slots[1:], todo.following])
        sent = 0
        for move in moves:
            if self._stop.is_set() or not self._send(conn, ours, move, log):
                break
            sent += 1
        return sent

    def _send(self, conn: Connection, ours: Declared, move: Move, log: str) -> bool:
        """One message, with the mark that it is sent. → False: somebody else has sent it."""
        with conn.transaction():
            if not _move(conn, ours, move):
                return False
            name, at = ours.schedule.name, move.upto.isoformat()
            message = ours.schedule.message(slot=at)
            # The same one however often this slot is sent for: after a restore to an earlier point, say.
            message = message.copy(message_id=str(uuid5(NAMESPACE_OID, f"{log}/{name}/{at}")))
            made, number = self._broker.enqueue_on(conn, message)
            parameters = {"name": name, "id": number, "message_id": made.message_id, "slot": move.upto}
            conn.execute(sql.load("cron_sent"), parameters)
            hit("cron.sending")
        hit("cron.sent")
        return True


def _move(conn: Connection, ours: Declared, move: Move) -> bool:
    """Mark slots as done with. → False: somebody else has."""
    parameters = {"name": ours.schedule.name, "version": ours.version, **move._asdict()}
    return conn.execute(sql.load("cron_move"), parameters).fetchone() is not None


def _missed(todo: Due) -> str:
    many = todo.left_out > 1
    return f"{todo.left_out} slots up to {todo.upto.isoformat()} have passed" if many else "a slot has passed"
