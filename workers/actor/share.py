"""The share: how the lanes of a queue are divided among the processes that take part in it.

Everybody who takes part has a row with a lease. Of L lanes and n consumers, each has L/n, the first ones by their
numbers one more; a process alone has all. Whoever has more gives lanes back, whoever has less claims free ones. A
consumer whose threads are all taken for longer leaves its share to the others, as long as there are others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple
from uuid import UUID

from outbox import sql
from outbox.database import Connection
from outbox.lane import Lane, claim, is_gone, place

logger = logging.getLogger("outbox.actor")

EVERY = 1.0
"""Seconds between two looks at who takes part."""


class Attendant(NamedTuple):
    """One consumer of a queue."""

    target: str
    owner: UUID
    place: str
    busy: bool


def attend(conn: Connection, owner: UUID, queues: Mapping[str, bool], ttl: float) -> list[Attendant]:
    """Take part in these queues (→ whether busy). → everybody who does, us included; what is dead is struck off."""
    rows = _attend(conn, owner, queues, ttl, [])
    gone = sorted({row.owner for row in rows if row.owner != owner and is_gone(row.place)})
    return _attend(conn, owner, queues, ttl, gone) if gone else rows


def _attend(
    conn: Connection, owner: UUID, queues: Mapping[str, bool], ttl: float, gone: Sequence[UUID]
) -> list[Attendant]:
    rows = conn.execute(
        sql.load("actor_attend"),
        {
            "owner": owner,
            "place": place(),
            "ttl": ttl,
            "targets": list(queues),
            "busy": list(queues.values()),
            "gone": list(gone),
        },
    )
    return [Attendant(*row) for row in rows]


def leave(conn: Connection, owner: UUID, targets: Sequence[str]) -> None:
    """Take part no more."""
    conn.execute(sql.load("actor_leave"), {"owner": owner, "targets": list(targets)})


def fair(lanes: int, owner: UUID, attendants: Sequence[Attendant]) -> int:
    """How many of a queue's lanes are ours."""
    free = sorted(one.owner for one in attendants if not one.busy)
    everybody = free or sorted(one.owner for one in attendants)
    if owner not in everybody:
        return 0
    each, more = divmod(lanes, len(everybody))
    return each + (everybody.index(owner) < more)


class Seat(NamedTuple):
    """One lane of a queue, as the database has it."""

    target: str
    lane: int
    #: Nobody, if its lease has run out.
    owner: UUID | None
    place: str | None


def seats(conn: Connection, targets: Sequence[str]) -> list[Seat]:
    """All lanes of these queues; none of one that is relayed."""
    found = [Seat(*row) for row in conn.execute(sql.load("actor_lanes"), {"targets": list(targets)})]
    for target in set(targets).difference(seat.target for seat in found):
        _relayed(target)
    return found


@cache
def _relayed(target: str) -> None:
    logger.warning("%s is relayed: nothing of it is worked here (`outbox work relay --give-back` changes that)", target)


def take(conn: Connection, seat: Seat, owner: UUID, ttl: float) -> Lane | None:
    """Claim a lane that is free, whose owner is gone, or that we have lost sight of."""
    if seat.owner not in (None, owner) and not is_gone(seat.place or ""):
        return None
    return claim(conn, seat.target, seat.lane, owner=owner, ttl=ttl, mine=owner)
