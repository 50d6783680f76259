"""The delivery: one thread that brings the messages of all queues of a process from the log to dramatiq, and back.

    share → retries → read → claim → hand out … settle → write, in a loop

Made by `OutboxBroker.consume` for the first queue, and ended when the last consumer is closed and nothing is out. It
has two connections, whatever the number of queues. What interrupts it, and what follows:

* the database is lost: the connection is made anew with backoff, and everything goes on where it was. What was
  acknowledged meanwhile is written then; dramatiq notices nothing.
* another owner has a lane: what was in hand of it is forgotten, and its acknowledgements do nothing.
* SIGTERM (dramatiq's `worker_shutdown`): the lanes go to the other consumers at once, with all that nobody has begun.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections import deque
from contextlib import suppress
from uuid import uuid4

import psycopg

from outbox import log, tick
from outbox.actor.broker import OutboxBroker
from outbox.actor.delivered import Delivered
from outbox.database import Connection, connect, reason
from outbox.errors import OutboxError
from outbox.failpoint import hit
from outbox.retry import OUTAGE
from workers.actor import ending, glance, retries, share
from workers.actor.channel import Channel
from workers.actor.consumer import Consumer, Said
from workers.actor.estate import NEVER, Estate
from workers.actor.intake import Intake
from workers.actor.keeper import Keeper
from workers.actor.ledger import Ledger, Settled
from workers.actor.quarantine import Quarantine, Step
from workers.tenure import lost, patience

logger = logging.getLogger("outbox.actor")

POLL = 0.05
"""Seconds between looks where a pooler swallows all notifications."""

WRITE_EVERY = 0.005
"""Seconds between two writes of acknowledgements, while no message waits for being claimed."""

CLOSE_WITHIN = 10.0
"""Seconds to write everything down at the end. After that, the leases run out."""


class Delivery:
    """All queues of one process."""

    def __init__(self, broker: OutboxBroker) -> None:
        self._broker = broker
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        settings = self._broker.worker_settings
        self._url, self._ttl, self._patience = settings.database, settings.ttl, patience(settings)
        self.owner = uuid4()
        self._process = os.getpid()
        self._channels: dict[str, Channel] = {}
        self._settled: deque[Settled] = deque()
        self._newest: tick.Tick | None = None
        self._stopping = self._woken = False
        self._retried_at = self._wrote_at = NEVER
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._keeper = Keeper(self._url, self.owner, self._ttl, lambda: self._estate.lanes)
        self._ledger = Ledger(self.owner)
        self._intake = Intake(self._broker, self.owner, self._ledger, self._keeper)
        self._estate = Estate(
            self.owner, self._ttl, self._broker.lanes,
            state=self._broker.worker_settings.state, channels=self._channels, keeper=self._keeper, ledger=self._ledger,
        )  # fmt: skip
        self._quarantine = Quarantine()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------- dramatiq's threads

    def consumer(self, name: str, target: str, prefetch: int, timeout: int) -> Consumer:
        """A consumer of one queue. The first one starts the delivery."""
        with self._lock:
            if self._process != os.getpid() or self._stopping:
                self._reset()
            channel = self._channels.setdefault(target, Channel(name, target))
            channel.begin(prefetch)
            self._estate.look_again()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="actor delivery", daemon=True)
                self._thread.start()
                self._keeper.start()
        self._wake()
        return Consumer(channel, timeout / 1000, self.settle, self._close, self._broker.middleware)

    def settle(self, message: Delivered, said: Said) -> None:
        """What became of a message. It is written down with the next ones."""
        if said is Said.RETRY or said is Said.DEAD:
            self._settled.append(Settled(message, said, message.failure, dict(message.options)))
        else:
            self._settled.append(Settled(message, said))
        if channel := self._channels.get(message.hold.target):
            channel.finished()
        self._wake()

    def leave(self) -> None:
        """The process is about to end: others have the lanes; what is running is finished here."""
        for channel in list(self._channels.values()):
            channel.shut()
        self._estate.look_again()
        self._wake()

    def doubt(self, target: str) -> None:
        """Somebody may have taken a queue's lanes away: nothing of them is begun before that is known."""
        self._estate.doubt(target)
        self._wake()

    def _close(self, channel: Channel) -> None:
        """A consumer is closed. After the last one, everything is written down and given back; then this returns.

        Not while messages are out: dramatiq makes another consumer after an error, and gives them back to that one.
        """
        channel.shut()
        self._estate.look_again()
        with self._lock:
            channels = list(self._channels.values())
            if self._thread is None or any(one.is_open or one.out for one in channels):
                return
            self._stopping = True
            self._wake()
            self._thread.join(CLOSE_WITHIN)
            self._keeper.stop()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            with suppress(BlockingIOError):
                os.write(self._pipe[1], b".")

    def _run(self) -> None:
        failures = 0
        while not self._stopping or failures < 3:
            conn = None
            try:
                with connect(self._url, name="actors", patience=self._patience) as conn:
                    if not conn.pooled:
                        conn.execute(f"listen {tick.CHANNEL}")
                    failures = 0
                    self._serve(conn)
                    return
            except (psycopg.Error, OutboxError) as error:
                known = lost(error, conn) or isinstance(error, OutboxError)
                logger.warning("actors: %s: trying again", reason(error) if known else type(error).__name__)
            except Exception:
                # Nobody else brings messages: begin anew, from what is written down.
                logger.exception("actors: the delivery failed, and begins anew")
                self._estate.forget()
            failures += 1
            time.sleep(OUTAGE.wait(failures))

    def _serve(self, conn: Connection) -> None:
        self._newest = None
        self._estate.recover(conn)
        # What was to be written when the connection was lost, before anything else is read or taken.
        self._write(conn, at_once=True)
        while not self._stopping:
            self._woken = False
            with suppress(BlockingIOError):
                os.read(self._pipe[0], 4096)
            self._take_settled()
            if self._estate.share(conn):
                # A lane that was just claimed may be further than the tick that we know.
                self._newest = None
                if self._estate.look_around(conn):
                    self._retried_at = NEVER
            hunger = {target: channel.appetite() for target, channel in list(self._channels.items())}
            self._retry(conn, hunger)
            if self._quarantine.closed:
                hunger = {}
            more = self._read(conn, hunger)
            self._write(conn)
            if not more and not (self._retried_at == NEVER and self._estate.holdings):
                self._wait(conn)
        self._take_settled()
        for holding in self._estate.holdings:
            self._estate.give_back(conn, holding)
        for channel in self._channels.values():
            self._estate.return_parked(channel)
        self._write(conn)
        share.leave(conn, self.owner, list(self._channels))

    def _wait(self, conn: Connection) -> None:
        """Until there may be something to do: a tick, something given back, a time."""
        if self._heard(conn):
            # Came with the answer to some statement: there is nothing more to wait for.
            self._newest = None
            return
        pause = POLL if conn.pooled else retries.EVERY
        waits_for_write = not self._ledger.nothing(self._estate.holdings)
        if waits_for_write or self._settled:
            # Acknowledgements come one by one: a few milliseconds' worth are written together.
            pause = min(pause, self._wrote_at + WRITE_EVERY - time.monotonic())
            if pause > 0:
                _readable(pause, conn.fileno())
        else:
            _readable(pause, conn.fileno(), self._pipe[0])
        if self._heard(conn) or conn.pooled or pause == retries.EVERY:
            self._newest = None

    def _heard(self, conn: Connection) -> bool:
        """Whether anything was notified: a tick, or that an operator has decided about something parked."""
        notices = list(conn.notifies(timeout=0))
        if any(notice.payload == "decided" for notice in notices):
            self._estate.look_again()
        return bool(notices)

    def _take_settled(self) -> None:
        while self._settled:
            one = self._settled.popleft()
            message = one.message
            if self._estate.out.get(message.id) is message:
                del self._estate.out[message.id]
            holding = self._estate.source(message)
            if message.stale:
                # It looked as if it was in other hands, and nobody has begun it: that may have been wrong.
                message.stale, one = False, Settled(message, Said.BACK)
            if one.said is Said.BACK and holding is not None:
                # For another consumer of this process; or it goes with its lane.
                self._estate.take(message.hold.target, [message])
            else:
                self._ledger.settle(one, holding)

    # --------------------------------------------------------------------------------------- messages

    def _retry(self, conn: Connection, hunger: dict[str, int]) -> None:
        """Take in hand what is parked and due."""
        if not self._estate.holdings or time.monotonic() - self._retried_at < retries.EVERY:
            return
        self._retried_at = time.monotonic()
        due = retries.ready(conn, self._estate.holdings)
        if any(one.once or one.often for one in due):
            # One that is done must not look as if it had been there when the next one kills this process.
            self._write(conn, at_once=True)
        for target in [one.target for one in due if one.hopeless]:
            ending.give_up(conn, self._broker, self._estate.of(target))
        for target in [one.target for one in due if one.untold]:
            ending.tell_skipped(conn, self._broker, self._estate.of(target))
        if self._isolate(conn, next((one.target for one in due if one.often), None), hunger):
            return
        for target in [one.target for one in due if one.once]:
            room = retries.SUSPECTS - self._suspects(target)
            self._take(conn, target, hunger, min(room, hunger[target]), deaths=(1, 1))
        for target in [one.target for one in due if one.plain]:
            self._take(conn, target, hunger, hunger[target])

    def _isolate(self, conn: Connection, target: str | None, hunger: dict[str, int]) -> bool:
        """See to one of a queue that was in hand twice when its worker died. → whether nothing else is to be taken."""
        estate, quarantine = self._estate, self._quarantine
        in_hand = len(estate.out) + len(estate.claimed)
        step = quarantine.step(wanted=target is not None, in_hand=in_hand, suspects=self._suspects(target))
        if step is Step.JOIN and quarantine.message is not None:
            retries.accompany(conn, self.owner, quarantine.message.id)
            quarantine.end()
        elif step in (Step.ALONE, Step.AMONG) and target is not None:
            deaths = (retries.DEATHS - 1, retries.DEATHS_MOST - 1)
            limit = min(1, hunger[target])
            taken = self._take(conn, target, hunger, limit, deaths=deaths, alone=step is Step.ALONE)
            # It may have to wait for its turn, or for its actor: then the others go on.
            quarantine.end()
            if taken and step is Step.ALONE:
                quarantine.begin(taken[0])
        return quarantine.closed

    def _suspects(self, target: str | None) -> int:
        """How many are in hand of a queue that were there when a worker died."""
        return sum(m.hold.target == target and m.deaths > 1 for m in self._estate.out.values())

    def _take(
        self,
        conn: Connection,
        target: str,
        hunger: dict[str, int],
        limit: int,
        *,
        deaths: tuple[int, int] = (0, 0),
        alone: bool = False,
    ) -> list[Delivered]:
        """Take up to so many in hand that are due."""
        holdings = self._estate.of(target)
        look = retries.take(conn, self.owner, holdings, limit=limit, deaths=deaths, alone=alone)
        messages = self._intake.taken(conn, target, look.taken)
        hunger[target] -= len(messages)
        self._estate.take(target, messages)
        if look.more:
            self._retried_at = NEVER
        return messages

    def _read(self, conn: Connection, hunger: dict[str, int]) -> bool:
        """Read on in the lanes, as far as there are hands. → whether there may be more."""
        if not self._estate.holdings or not any(hunger.values()):
            return False
        if self._newest is None:
            self._newest = tick.latest(conn)
        holdings = [holding for holding in self._estate.in_turn() if hunger.get(holding.lane.target, 0) > 0]
        seen = glance.look(conn, holdings, self._newest, hunger)
        more = False
        # Those first: `hunger` has room for them.
        for holding in [*seen, *(holding for holding in holdings if holding not in seen)]:
            limit = hunger[holding.lane.target]
            if holding not in seen and limit <= 0:
                continue
            page = seen[holding] if holding in seen else holding.read(conn, self._newest, limit)
            with log.no_collection():
                messages = self._intake.page(conn, holding, page, limit) if page else []
            hunger[holding.lane.target] -= len(messages)
            self._estate.claimed += messages
            more = more or bool(page)
        return more

    def _write(self, conn: Connection, *, at_once: bool = False) -> None:
        """Write down what is to be written, if it is time; then hand out what is claimed with it."""
        holdings, claimed = self._estate.holdings, bool(self._estate.claimed)
        if self._ledger.nothing(holdings) and not claimed:
            return
        if not claimed and not self._stopping and not at_once and time.monotonic() - self._wrote_at < WRITE_EVERY:
            return
        for holding in self._ledger.write(conn, holdings):
            self._estate.lose(holding)
        if self._ledger.turned:
            self._retried_at = NEVER
        self._wrote_at = time.monotonic()
        hit("actor.claimed")
        self._estate.hand_out()


def _readable(seconds: float, *files: int) -> None:
    poll = select.poll()  # select() has no numbers beyond 1023
    for file in files:
        poll.register(file, select.POLLIN)
    poll.poll(math.ceil(seconds * 1000))
