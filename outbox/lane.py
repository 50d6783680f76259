"""A lane: a slice of a participant's keys, drained in order by one owner at a time.

Each claim raises the lane's epoch, and every later write of the owner requires that epoch to be
current, so that an owner which was paused, cut off or declared dead can't write. The database's clock
alone decides whether a lease has run out. The owner counts by a clock of its own, from before the claim was
sent, and after 0.7 of the lease it makes no effect any more without asking: if nobody has claimed the lane
since, it renews and goes on, however late. After Gray and Cheriton's leases, with the fencing tokens of Chubby;
`tests/model/lease.py` is the protocol as a model, with every interleaving.

No row lock is held while an owner works. Everything written here is durable when the call returns.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from outbox import sql
from outbox.errors import Fenced, NotReady
from outbox.failpoint import hit
from outbox.log import Slots
from outbox.participant import LaneView
from outbox.position import Position

TTL = 15.0
"""Seconds of a lease. Long enough for a garbage collection or a slow disk; a dead owner's lane moves at once
when its process is seen to be gone, and after this time otherwise."""

SAFE_SHARE = 0.7
"""Share of the lease after which an owner that couldn't renew makes no effect without asking."""

RENEW_SHARE = 1 / 3
"""Share of the lease after which it is renewed: two renewals may fail before anything is lost."""

#: Seconds that go on while the machine is suspended (Linux; elsewhere the lid of a laptop may stop them).
now: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


def place() -> str:
    """This process as text that a process on the same machine can check: host, boot, pid namespace, pid, start.

    The start time tells a process from a later one with the same pid.
    """
    return "/".join((socket.gethostname(), *_machine(), str(os.getpid()), _started(os.getpid())))


def is_gone(where: str) -> bool:
    """Whether the process that wrote `where` is known to have ended. False when it can't be known."""
    parts = where.split("/")
    if len(parts) != 5 or tuple(parts[1:3]) != _machine():
        return False
    return _started(int(parts[3])) != parts[4]


def owner_of(where: str | None) -> str:
    """`where` for people: host:pid."""
    parts = (where or "nobody").split("/")
    return f"{parts[0]}:{parts[3]}" if len(parts) == 5 else parts[0]


def _machine() -> tuple[str, str]:
    boot, namespace = "?", "?"
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid").removeprefix("pid:")
    # Where it can't be read (not Linux), nothing is ever declared gone: the lease decides.
    return (boot, namespace) if "?" not in (boot, namespace) else (str(uuid.uuid4()), "?")


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "gone"
    state, *rest = stat.rpartition(")")[2].split()
    return "gone" if state in "ZX" else rest[18]


class NoLane(NotReady):
    """There is no such lane: it was never registered, or a resilver has made fewer."""


@dataclass(slots=True)
class Lane:
    """A lane that this process owns."""

    target: str
    lane: int
    epoch: int
    slots: Slots
    #: Seconds of the lease.
    ttl: float
    #: How often owners died here without getting anywhere.
    deaths: int
    #: Whether the owner before went away without releasing.
    unclean: bool
    #: `now()` after which this owner must ask before it makes an effect.
    deadline: float
    #: What the lane's row says it is doing.
    state: str = field(default="draining")
    #: How many lanes its participant has, and which generation of its data they write.
    lanes: int = 1
    generation: int = 0

    def __str__(self) -> str:
        return f"{self.target}/{self.lane}"

    @property
    def _me(self) -> dict[str, Any]:
        return {"target": self.target, "lane": self.lane, "epoch": self.epoch}

    def view(self, conn: psycopg.Connection[Any]) -> LaneView:
        """What the participant is told about it."""
        check = partial(self.check, conn)
        return LaneView(self.target, self.lane, self.epoch, self.unclean, self.slots, check, self.generation)

    def check(self, conn: psycopg.Connection[Any]) -> None:
        """Before an effect: make sure that the lane is still ours. Raises `Fenced`.

        Costs nothing while the lease is fresh. When it may have run out, because the process was suspended, the
        machine is slow or renewals don't get through, the database is asked.
        """
        if now() >= self.deadline:
            self.renew(conn)

    @property
    def renewal(self) -> float:
        """`now()` when the lease is to be renewed: a third of it is over."""
        return self.deadline - (SAFE_SHARE - RENEW_SHARE) * self.ttl

    def _must(self, row: object | None) -> None:
        if row is None:
            raise Fenced(f"lane {self} has a new owner (this one's epoch was {self.epoch}): it stops")

    def renew(self, conn: psycopg.Connection[Any]) -> None:
        """Extend the lease by its full length, also one that has run out if nobody claimed it. Raises `Fenced`."""
        sent = now()
        self._must(conn.execute(sql.load("lane_renew"), {**self._me, "ttl": self.ttl}).fetchone())
        hit("lane.renewed")
        self.deadline = sent + SAFE_SHARE * self.ttl

    def fence(self, conn: psycopg.Connection[Any]) -> None:
        """Inside a transaction: hold the lane against a new owner until it ends. Raises `Fenced`."""
        self._must(conn.execute(sql.load("lane_fence"), self._me).fetchone())

    def advance(self, conn: psycopg.Connection[Any], position: Position, own: Position | None = None) -> None:
        """Append the lane's new position, and the one that its participant holds itself, if that is known.

        Raises `Fenced`.
        """
        row = conn.execute(
            sql.load("lane_advance"),
            {
                **self._me,
                "tick": position.tick,
                "upto": position.upto,
                "after": position.after,
                "own": None if own is None else str(own),
            },
        ).fetchone()
        self._must(row)
        hit("lane.advanced")

    def stand(self, conn: psycopg.Connection[Any]) -> Position:
        """The lane's newest position in the database."""
        return stand(conn, self.target, self.lane)

    def own(self, conn: psycopg.Connection[Any]) -> Position | None:
        """What the participant held itself when that was written; None if it isn't known."""
        row = conn.execute(sql.load("lane_own"), {"target": self.target, "lane": self.lane}).fetchone()
        return None if row is None or row[0] is None else Position.parse(row[0])

    def show(
        self, conn: psycopg.Connection[Any], state: str, reason: str | None = None, *, clear_deaths: bool = False
    ) -> None:
        """Record what the lane is doing (`draining`, `waiting`, `stopped`) and why. Raises `Fenced`."""
        self._must(
            conn.execute(
                sql.load("lane_state"),
                {**self._me, "state": state, "reason": reason, "clear_deaths": clear_deaths},
            ).fetchone()
        )
        hit("lane.shown")
        self.state = state
        if clear_deaths:
            self.deaths = 0

    def suspect(self, conn: psycopg.Connection[Any], number: int) -> None:
        """After deaths: note the intent that the next batch begins with. Raises `Fenced`."""
        self._must(conn.execute(sql.load("lane_suspect"), {**self._me, "id": number}).fetchone())
        hit("lane.suspected")

    def release(self, conn: psycopg.Connection[Any]) -> None:
        """Give the lane back. No error if it is gone already."""
        conn.execute(sql.load("lane_release"), self._me)
        hit("lane.released")


def stand(conn: psycopg.Connection[Any], target: str, lane: int) -> Position:
    """A lane's newest position in the database; the first tick if it never moved."""
    row = conn.execute(sql.load("lane_stand"), {"target": target, "lane": lane}).fetchone()
    if row is None or row[1] is None:
        raise NotReady(f"lane {target}/{lane} stands at a tick that is not in the log: run `outbox status`")
    return Position(*row)


def claim(
    conn: psycopg.Connection[Any],
    target: str,
    lane: int,
    *,
    owner: uuid.UUID,
    ttl: float = TTL,
    mine: uuid.UUID | None = None,
) -> Lane | None:
    """Become the owner of a lane, or None while somebody else is.

    Takes a lane at once whose owner ran on this machine and is gone, or was this process itself (`mine`: the
    owner that it was before it lost the database). Never waits: an owner that is just writing is alive.
    """
    row = conn.execute(sql.load("lane_owner"), {"target": target, "lane": lane}).fetchone()
    if row is None:
        raise NoLane(f"there is no lane {target}/{lane}: register it with select outbox.register('{target}')")
    back = mine is not None and row[0] == mine
    dead = row[0] if back or (row[0] is not None and is_gone(row[1])) else None
    sent = now()
    taken = conn.execute(
        sql.load("lane_claim"),
        {
            "target": target,
            "lane": lane,
            "owner": owner,
            "place": place(),
            "ttl": ttl,
            "dead": dead,
            "count_death": not back,
        },
    ).fetchone()
    if taken is None:
        return None
    hit("lane.claimed")
    epoch, low, high, deaths, unclean, lanes, generation = taken
    deadline = sent + SAFE_SHARE * ttl
    slots = Slots(low, high)
    return Lane(target, lane, epoch, slots, ttl, deaths, unclean, deadline, lanes=lanes, generation=generation)
