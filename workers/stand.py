"""Where a reader goes on: what the participant holds itself, against what the lane has written down.

Called by `workers.reader` when it opens a participant that keeps its own position. The participant counts:

* it is as its last owner left it: go on from the lane's position, which may be further over ticks with nothing for it;
* it is ahead, because its owner died before it could write that down: what it holds is reported, then go on from there;
* it is behind (restored from a backup), or holds nothing: read again from where it is. That is written down first, so
  that retention drops nothing of it meanwhile.

Raises `NotThisLog` when the participant has seen another history, or is older than this log goes back.
"""

from __future__ import annotations

from typing import Any

import psycopg

from outbox import horizon, tick
from outbox.errors import NotThisLog
from outbox.lane import Lane
from outbox.participant import Participant
from outbox.position import Position
from workers.reporter import Reporter


def find(
    conn: psycopg.Connection[Any], lane: Lane, participant: Participant, recorded: Position, reporter: Reporter
) -> tuple[Position, Position | None]:
    """→ where to go on, and what the participant holds. It is durable when it returns that the lane is there."""
    own = participant.position()
    if own is not None and own.log == recorded.log and own in (recorded, lane.own(conn)):
        return recorded, own
    remedy = getattr(participant, "remedy", tick.REMEDY)
    stand = _beginning(conn, recorded.log) if own is None else tick.match(conn, own, remedy)
    if _place(stand) < _place(recorded):
        with conn.transaction():
            horizon.hold(conn)
            lane.advance(conn, stand, own)
            if own is not None:
                # The horizon may have moved before it was held.
                tick.match(conn, own, remedy)
    else:
        reporter.ahead(recorded, stand)
    return stand, own


def _place(position: Position) -> tuple[int, int, int]:
    return position.tick, position.upto, position.after


def _beginning(conn: psycopg.Connection[Any], identity: str) -> Position:
    row = conn.execute("select id, nonce from outbox.tick order by id limit 1").fetchone()
    if row is None:
        raise NotThisLog("the log has no tick at all: restore outbox.tick from the backup that outbox.log is from")
    return Position(identity, row[0], row[1])
