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
from itertools import groupby
from uuid import uuid4

import psycopg

from outbox import era, tick
from outbox.actor import queue
from outbox.actor.broker import OutboxBroker
from outbox.actor.delivered import Delivered, Hold
from outbox.database import Connection, connect, reason
from outbox.errors import Fenced, OutboxError, WentBack
from outbox.failpoint import hit
from outbox.lane import now
from outbox.retry import OUTAGE
from workers.actor import retries, share
from workers.actor.channel import Channel
from workers.actor.consumer import Consumer, Said
from workers.actor.holding import Holding
from workers.actor.intake import Intake
from workers.actor.keeper import Keeper
from workers.actor.ledger import Ledger, Settled
from workers.tenure import lost, patience

logger = logging.getLogger("outbox.actor")

POLL = 0.05
"""Seconds between looks where a pooler swallows all notifications."""

WRITE_EVERY = 0.005
"""Seconds between two writes of acknowledgements, while no message waits for being claimed."""

CLOSE_WITHIN = 10.0
"""Seconds to write everything down at the end. After that, the leases run out."""

NEVER = -60.0


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
        self._holdings: dict[tuple[str, int], Holding] = {}
        self._settled: deque[Settled] = deque()
        #: Claimed with the next write, and handed out after it.
        self._claimed: list[Delivered] = []
        #: Everything that is claimed and not settled.
        self._out: dict[int, Delivered] = {}
        self._declared: set[str] = set()
        self._newest: tick.Tick | None = None
        self._stopping = self._woken = False
        self._shared_at = self._retried_at = self._wrote_at = NEVER
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._keeper = Keeper(self._url, self.owner, self._ttl, lambda: [h.lane for h in list(self._holdings.values())])
        self._ledger = Ledger(self.owner)
        self._intake = Intake(self._broker, self.owner, self._ledger, self._keeper)
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------- dramatiq's threads

    def consumer(self, name: str, target: str, prefetch: int, timeout: int) -> Consumer:
        """A consumer of one queue. The first one starts the delivery."""
        with self._lock:
            if self._process != os.getpid() or self._stopping:
                self._reset()
            channel = self._channels.setdefault(target, Channel(name, target))
            channel.begin(prefetch)
            self._shared_at = NEVER
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="actor delivery", daemon=True)
                self._thread.start()
                self._keeper.start()
        self._wake()
        return Consumer(channel, timeout / 1000, self.settle, self._close, self._broker.middleware)

    def settle(self, message: Delivered, said: Said) -> None:
        """What became of a message. It is written down with the next ones."""
        failed = said in (Said.RETRY, Said.DEAD)
        options = dict(message.options) if failed else None
        self._settled.append(Settled(message, said, message.failure if failed else "", options))
        if channel := self._channels.get(message.hold.target):
            channel.finished()
        self._wake()

    def leave(self) -> None:
        """The process is about to end: others have the lanes; what is running is finished here."""
        for channel in list(self._channels.values()):
            channel.shut()
        self._shared_at = NEVER
        self._wake()

    def doubt(self, target: str) -> None:
        """Somebody may have taken a queue's lanes away: nothing of them is begun before that is known."""
        for holding in list(self._holdings.values()):
            if holding.lane.target == target:
                holding.lane.deadline = 0.0
        self._shared_at = NEVER
        self._wake()

    def _close(self, channel: Channel) -> None:
        """A consumer is closed. After the last one, everything is written down and given back; then this returns.

        Not while messages are out: dramatiq makes another consumer after an error, and gives them back to that one.
        """
        channel.shut()
        self._shared_at = NEVER
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
                self._forget()
            failures += 1
            time.sleep(OUTAGE.wait(failures))

    def _forget(self) -> None:
        for holding in list(self._holdings.values()):
            self._lose(holding)
        self._claimed.clear()

    def _serve(self, conn: Connection) -> None:
        while not self._stopping:
            self._woken = False
            with suppress(BlockingIOError):
                os.read(self._pipe[0], 4096)
            self._take_settled()
            self._share(conn)
            hunger = {target: channel.appetite() for target, channel in list(self._channels.items())}
            self._retry(conn, hunger)
            more = self._read(conn, hunger)
            self._write(conn)
            if not more:
                self._wait(conn)
        self._take_settled()
        for holding in list(self._holdings.values()):
            self._give_back(conn, holding)
        for channel in self._channels.values():
            for message in channel.withdraw():
                self._ledger.settle(Settled(message, Said.BACK), None)
        self._write(conn)
        share.leave(conn, self.owner, list(self._channels))

    def _wait(self, conn: Connection) -> None:
        """Until there may be something to do: a tick, something given back, a time."""
        if list(conn.notifies(timeout=0)):
            # Came with the answer to some statement: there is nothing more to wait for.
            self._newest = None
            return
        pause = POLL if conn.pooled else retries.EVERY
        waits_for_write = not self._ledger.nothing(list(self._holdings.values()))
        if waits_for_write or self._settled:
            # Acknowledgements come one by one: a few milliseconds' worth are written together.
            pause = min(pause, self._wrote_at + WRITE_EVERY - time.monotonic())
            if pause > 0:
                _readable(pause, conn.fileno())
        else:
            _readable(pause, conn.fileno(), self._pipe[0])
        notices = list(conn.notifies(timeout=0))
        if notices or conn.pooled or pause == retries.EVERY:
            self._newest = None

    def _take_settled(self) -> None:
        while self._settled:
            one = self._settled.popleft()
            message, hold = one.message, one.message.hold
            self._out.pop(message.id, None)
            holding = None
            if hold.holder is None:
                holding = self._holdings.get((hold.target, hold.lane))
                if holding is not None and holding.lane.epoch != hold.epoch:
                    holding = None
            channel = self._channels[hold.target]
            if one.said is Said.BACK and channel.is_open and (holding or hold.holder):
                # Another consumer of this process has taken the place of the one that gave it back.
                self._out[message.id] = message
                channel.put([message])
                continue
            self._ledger.settle(one, holding)

    # --------------------------------------------------------------------------------------- messages

    def _retry(self, conn: Connection, hunger: dict[str, int]) -> None:
        """Take in hand what is parked and due."""
        if not self._holdings or time.monotonic() - self._retried_at < retries.EVERY:
            return
        self._retried_at = time.monotonic()
        for target, deaths in retries.ready(conn, sorted({t for t, _ in self._holdings})).items():
            if deaths[0] > 0:
                # One that is done must not look as if it had been there when the next one kills this process.
                self._write(conn, at_once=True)
            holdings = [h for h in self._holdings.values() if h.lane.target == target]
            suspects = sum(m.hold.target == target and m.deaths > 1 for m in self._out.values())
            taken = retries.take(
                conn, self.owner, holdings, limit=hunger[target], suspects=suspects, deaths=deaths
            )  # fmt: skip
            messages = self._intake.taken(conn, target, taken)
            self._out.update((message.id, message) for message in messages)
            hunger[target] -= len(messages)
            self._channels[target].put(messages)
            if taken:
                self._retried_at = NEVER

    def _read(self, conn: Connection, hunger: dict[str, int]) -> bool:
        """Read on in the lanes, as far as there are hands. → whether there may be more."""
        if not self._holdings or not any(hunger.values()):
            return False
        if self._newest is None:
            self._newest = tick.latest(conn)
        more = False
        for holding in self._in_turn():
            limit = hunger[holding.lane.target]
            if limit <= 0:
                continue
            page = holding.read(conn, self._newest, limit)
            messages = self._intake.page(conn, holding, page)
            hunger[holding.lane.target] -= len(messages)
            self._claimed += messages
            more = more or bool(page)
        return more

    def _in_turn(self) -> list[Holding]:
        """The lanes, each time from another one on: a full one must not starve the others."""
        holdings = list(self._holdings.items())
        if holdings:
            key, first = holdings[0]
            del self._holdings[key]
            self._holdings[key] = first
        return [holding for _, holding in holdings]

    def _write(self, conn: Connection, *, at_once: bool = False) -> None:
        """Write down what is to be written, if it is time; then hand out what is claimed with it."""
        holdings = list(self._holdings.values())
        if self._ledger.nothing(holdings) and not self._claimed:
            return
        if not self._claimed and not self._stopping and not at_once and time.monotonic() - self._wrote_at < WRITE_EVERY:
            return
        for holding in self._ledger.write(conn, holdings):
            self._lose(holding)
        self._wrote_at = time.monotonic()
        hit("actor.claimed")
        claimed, self._claimed = self._claimed, []
        self._out.update((message.id, message) for message in claimed)
        for target, messages in groupby(claimed, lambda message: message.hold.target):
            self._channels[target].put(messages)

    def _share(self, conn: Connection) -> None:
        """Take part, and have the lanes that are ours."""
        if time.monotonic() - self._shared_at < share.EVERY:
            return
        self._shared_at = time.monotonic()
        channels = dict(self._channels)
        for target in sorted(channels.keys() - self._declared):
            queue.declare(conn, target, self._broker.lanes)
            self._declared.add(target)
        sent = now()
        busy = {target: channel.busy() or not channel.is_open for target, channel in channels.items()}
        attendants = share.attend(conn, self.owner, busy, self._ttl)
        self._keeper.attended(sent)
        self._check(conn)
        seats = share.seats(conn, sorted(channels))
        for target, channel in channels.items():
            lanes = [seat for seat in seats if seat.target == target]
            ours = [h for h in self._holdings.values() if h.lane.target == target]
            us = [one for one in attendants if one.target == target]
            due = share.fair(len(lanes), self.owner, us) if channel.is_open else 0
            for holding in ours[due:]:
                self._give_back(conn, holding)
            for seat in lanes:
                if len(ours) < due and (seat.target, seat.lane) not in self._holdings:
                    ours += self._claim(conn, seat, channel)
        if self._holdings:
            retries.orphans(conn, list(self._holdings.values()))

    def _check(self, conn: Connection) -> None:
        for holding in list(self._holdings.values()):
            try:
                holding.lane.check(conn)
            except Fenced as error:
                logger.warning("%s", error)
                self._lose(holding)

    def _claim(self, conn: Connection, seat: share.Seat, channel: Channel) -> list[Holding]:
        lane = share.take(conn, seat, self.owner, self._ttl)
        if lane is None:
            return []
        holding = Holding(lane, channel, self._broker.worker_settings.state)
        try:
            holding.begin(conn)
        except Fenced:
            return []
        except OutboxError as error:
            logger.error("%s: stopped: %s", lane, error)  # noqa: TRY400 - the sentence is enough
            if isinstance(error, WentBack):
                era.halt(conn, error.says)  # whoever remembers less must not go on either
            lane.show(conn, "stopped", str(error))
            lane.release(conn)
            return []
        self._holdings[seat.target, seat.lane] = holding
        self._newest = None
        logger.info("%s: claimed, epoch %d", lane, lane.epoch)
        return [holding]

    def _give_back(self, conn: Connection, holding: Holding) -> None:
        """Release a lane. What is running gets rows of its own, and the rest is left open for the next owner."""
        lane = holding.lane
        for message in holding.channel.withdraw(lane.lane):
            self._out.pop(message.id, None)
        self._claimed = [m for m in self._claimed if m.mine != holding.mine]
        for lost_one in self._ledger.write(conn, list(self._holdings.values())):
            self._lose(lost_one)
        if holding.lost:
            return
        running = [m for m in self._out.values() if m.mine == holding.mine]
        try:
            aside = self._ledger.release(conn, holding, running)
        except Fenced as error:
            logger.warning("%s", error)
            aside = []
        for message in aside:
            message.hold = Hold(lane.target, lane.lane, 0, self.owner)
            message.attempts = message.deaths = 1
            message.mine = self._keeper.attends
        self._lose(holding)
        logger.info("%s: given back", lane)

    def _lose(self, holding: Holding) -> None:
        """The lane is another's, or nobody's: its messages are not ours any more."""
        holding.lost = True
        self._holdings.pop((holding.lane.target, holding.lane.lane), None)
        for message in holding.channel.withdraw(holding.lane.lane):
            self._out.pop(message.id, None)
        self._claimed = [m for m in self._claimed if m.mine != holding.mine]
        self._shared_at = NEVER


def _readable(seconds: float, *files: int) -> None:
    poll = select.poll()  # select() has no numbers beyond 1023
    for file in files:
        poll.register(file, select.POLLIN)
    poll.poll(math.ceil(seconds * 1000))
