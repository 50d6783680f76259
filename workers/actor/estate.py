"""The estate: the lanes that this process owns, and the messages that it has in hand.

    share → claim … give back, or lose

Used by the delivery's thread alone, but for `lanes`, `get` and `doubt`. What interrupts it:

* another owner has a lane: what was in hand of it is forgotten, and its acknowledgements do nothing.
* a lane is given back: what is running of it gets rows of its own (`workers.actor.ledger`), and goes on here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from uuid import UUID

from outbox import era
from outbox.actor import queue
from outbox.actor.delivered import Delivered, Hold
from outbox.database import Connection
from outbox.errors import Fenced, OutboxError, WentBack
from outbox.lane import Lane, now
from workers.actor import line, retries, share
from workers.actor.channel import Channel
from workers.actor.consumer import Said
from workers.actor.holding import Holding
from workers.actor.keeper import Keeper
from workers.actor.ledger import Ledger, Settled
from workers.actor.share import Seat
from workers.tenure import STOPPED_EVERY

logger = logging.getLogger("outbox.actor")

NEVER = -60.0


class Estate:
    """All lanes of one process, of all its queues."""

    def __init__(
        self,
        owner: UUID,
        ttl: float,
        new_lanes: int,
        *,
        state: Path | None,
        channels: Mapping[str, Channel],
        keeper: Keeper,
        ledger: Ledger,
    ) -> None:
        """`new_lanes`: of a queue that the database doesn't know yet. `state`: this machine's state directory."""
        self._owner = owner
        self._ttl = ttl
        self._new_lanes = new_lanes
        self._state = state
        self._channels = channels
        self._keeper = keeper
        self._ledger = ledger
        self._holdings: dict[tuple[str, int], Holding] = {}
        #: Lanes that can't go on, and until when they are left alone.
        self._stopped: dict[tuple[str, int], float] = {}
        #: Claimed with the next write, and handed out after it.
        self.claimed: list[Delivered] = []
        #: Everything that is claimed and not settled.
        self.out: dict[int, Delivered] = {}
        self._declared: set[str] = set()
        self._shared_at = NEVER
        #: Where the look around goes on, by queue.
        self._looked: dict[str, str] = {}

    @property
    def holdings(self) -> list[Holding]:
        return list(self._holdings.values())

    @property
    def lanes(self) -> list[Lane]:
        return [holding.lane for holding in self.holdings]

    def of(self, target: str) -> list[Holding]:
        """Those of one queue."""
        return [holding for holding in self.holdings if holding.lane.target == target]

    def source(self, message: Delivered) -> Holding | None:
        """The lane that a message came from, if that is still ours; None for one that has a row of its own."""
        hold = message.hold
        holding = None if hold.holder is not None else self._holdings.get((hold.target, hold.lane))
        return holding if holding is not None and holding.lane.epoch == hold.epoch else None

    def in_turn(self) -> list[Holding]:
        """The lanes, each time from another one on: a full one must not starve the others."""
        holdings = list(self._holdings.items())
        if holdings:
            key, first = holdings[0]
            del self._holdings[key]
            self._holdings[key] = first
        return [holding for _, holding in holdings]

    # -------------------------------------------------------------------------------------- messages

    def take(self, target: str, messages: list[Delivered]) -> None:
        """Hand out messages of a queue that are ours, durably."""
        self.out.update((message.id, message) for message in messages)
        self._channels[target].put(messages)

    def hand_out(self) -> None:
        """Hand out what is claimed, durably by now."""
        claimed, self.claimed = self.claimed, []
        for target, messages in groupby(claimed, lambda message: message.hold.target):
            self.take(target, list(messages))

    # ----------------------------------------------------------------------------------------- lanes

    def look_again(self) -> None:
        """Something has changed: share anew at the next step. Any thread."""
        self._shared_at = NEVER

    def doubt(self, target: str) -> None:
        """Begin nothing of a queue before it is known that its lanes are still ours. Any thread."""
        for holding in self.of(target):
            holding.lane.deadline = 0.0
        self.look_again()

    def share(self, conn: Connection) -> bool:
        """Take part, and have the lanes that are ours, if it is time. → whether there was a look."""
        if time.monotonic() - self._shared_at < share.EVERY:
            return False
        self._shared_at = time.monotonic()
        channels = dict(self._channels)
        for target in sorted(channels.keys() - self._declared):
            queue.declare(conn, target, self._new_lanes)
            self._declared.add(target)
        # Before we are known again: what others have taken over meanwhile isn't begun here.
        self.recover(conn)
        sent = now()
        busy = {target: channel.busy() or not channel.is_open for target, channel in channels.items()}
        attendants = share.attend(conn, self._owner, busy, self._ttl)
        self._keeper.attended(sent)
        self._check(conn)
        seats = share.seats(conn, sorted(channels))
        for target, channel in channels.items():
            lanes = [seat for seat in seats if seat.target == target]
            ours = self.of(target)
            us = [one for one in attendants if one.target == target]
            due = share.fair(len(lanes), self._owner, us) if channel.is_open else 0
            for holding in ours[due:]:
                self.give_back(conn, holding)
            for seat in lanes:
                if len(ours) < due and (seat.target, seat.lane) not in self._holdings:
                    ours += self._claim(conn, seat, channel)
            if not channel.is_open:
                self.return_parked(channel)
        if self._holdings:
            retries.orphans(conn, self.holdings)
        return True

    def return_parked(self, channel: Channel) -> None:
        """What nobody has begun, and has rows of its own, goes back with the next write."""
        for message in channel.withdraw():
            self.out.pop(message.id, None)
            self._ledger.settle(Settled(message, Said.BACK), self.source(message))

    def recover(self, conn: Connection) -> None:
        """Agree with the database about messages with rows of their own: the answer to a statement may never have come.

        Those that it has as ours, and we don't, go back to it; those that we have and it doesn't are dropped, if nobody
        has begun them: another consumer has them.
        """
        own = [m for m in self.out.values() if m.hold.holder is not None]
        ours = retries.recover(conn, self._owner, sorted(self._channels), self.out.keys() | self._ledger.rows)
        self._set_aside([m for m in self.out.values() if m.hold.holder is None and m.id in ours])
        for message in own:
            if message.id not in ours:
                message.mine = _never
        if gone := {m.id for m in own} - ours:
            for channel in self._channels.values():
                for message in channel.drop(gone):
                    self.out.pop(message.id, None)

    def _set_aside(self, messages: Sequence[Delivered]) -> None:
        """They have rows of their own now, and are ours whoever has their lane."""
        for message in messages:
            message.hold = Hold(message.hold.target, message.hold.lane, 0, self._owner)
            message.attempts = message.deaths = 1
            message.mine = self._keeper.attends

    def look_around(self, conn: Connection) -> bool:
        """Give those their turn who wait behind nothing any more. → whether there was one."""
        targets = {holding.lane.target for holding in self.holdings}
        found = line.recall(conn, sorted(targets)) if targets else 0
        for target in targets:
            lanes = [(holding.lane.slots, holding.line) for holding in self.of(target)]
            turned, self._looked[target] = line.around(conn, target, lanes, self._looked.get(target, ""))
            found += turned
        return found > 0

    def _check(self, conn: Connection) -> None:
        for holding in self.holdings:
            try:
                holding.lane.check(conn)
            except Fenced as error:
                logger.warning("%s", error)
                self.lose(holding)

    def _claim(self, conn: Connection, seat: Seat, channel: Channel) -> list[Holding]:
        key = seat.target, seat.lane
        if time.monotonic() < self._stopped.get(key, NEVER):
            return []
        lane = share.take(conn, seat, self._owner, self._ttl)
        if lane is None:
            return []
        holding = Holding(lane, channel, self._state)
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
            self._stopped[key] = time.monotonic() + STOPPED_EVERY
            return []
        self._holdings[key] = holding
        logger.info("%s: claimed, epoch %d", lane, lane.epoch)
        return [holding]

    def give_back(self, conn: Connection, holding: Holding) -> None:
        """Release a lane. What is running gets rows of its own, and the rest is left open for the next owner."""
        for lost_one in self._ledger.write(conn, self.holdings):
            self.lose(lost_one)
        if holding.lost:
            return
        unbegun = holding.channel.withdraw(holding.lane.lane)
        waiting = {message.id for message in unbegun}
        running = [m for m in self.out.values() if m.mine == holding.mine and m.id not in waiting]
        try:
            self._set_aside(self._ledger.release(conn, holding, running))
        except Fenced as error:
            logger.warning("%s", error)
        except BaseException:
            # It is ours as before, perhaps for long.
            holding.channel.put(unbegun)
            raise
        for number in waiting:
            self.out.pop(number, None)
        self.lose(holding)
        logger.info("%s: given back", holding.lane)

    def lose(self, holding: Holding) -> None:
        """The lane is another's, or nobody's: its messages are not ours any more."""
        holding.lost = True
        self._holdings.pop((holding.lane.target, holding.lane.lane), None)
        self._withdraw(holding)
        self.look_again()

    def forget(self) -> None:
        """Begin anew with all lanes, from what is written down."""
        for holding in self.holdings:
            self.lose(holding)
        self.claimed.clear()

    def _withdraw(self, holding: Holding) -> None:
        """Take back what nobody has begun of it."""
        for message in holding.channel.withdraw(holding.lane.lane):
            self.out.pop(message.id, None)
        self.claimed = [m for m in self.claimed if m.mine != holding.mine]


def _never() -> bool:
    return False
