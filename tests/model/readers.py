"""Ways to read the log: the real ones, and two that are known to be wrong (I12: teeth)."""

from __future__ import annotations

import uuid
from typing import Any, Protocol

import psycopg

from outbox import lane, log, tick
from outbox.log import Slots
from outbox.position import Position
from workers.clock import Clock

TARGET = "index"


class LogReader(Protocol):
    """Something that can be asked, again and again, what is new in the log."""

    def read(self) -> list[tuple[int, str, int]]:
        """→ (id, key, number) of what is new, in the order in which it would be applied."""


class TwoSnapshots:
    """The real one: a clock's ticks, and batches between them, in small pages."""

    def __init__(self, conn: psycopg.Connection[Any], limit: int = 7) -> None:
        self.conn = conn
        self.limit = limit
        claimed = lane.claim(conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
        assert claimed is not None
        first = tick.latest(conn)
        self.clock = Clock(conn, claimed)
        self.position = Position("0" * 16, first.id, first.nonce)

    def read(self) -> list[tuple[int, str, int]]:
        self.clock.step()
        end = tick.latest(self.conn)
        found: list[tuple[int, str, int]] = []
        while self.position.tick != end.id:
            upto = tick.get(self.conn, self.position.upto or end.id)
            page = log.page(
                self.conn, tick.get(self.conn, self.position.tick), upto,
                target=TARGET, slots=Slots(), after=self.position.after, limit=self.limit,
            )  # fmt: skip
            found += [(intent.id, intent.key, intent.payload["n"]) for intent in page]
            full = len(page) == self.limit
            self.position = log.step(self.position, upto, page[-1].id if full else None)
        return found


class Glances(TwoSnapshots):
    """A glance at all lanes first, as workers of actors do; pages only where there is more than that shows."""

    def read(self) -> list[tuple[int, str, int]]:
        self.clock.step()
        start, end = tick.get(self.conn, self.position.tick), tick.latest(self.conn)
        if start.id == end.id or start.shows_nothing:
            return super().read()
        seen = log.glance(self.conn, start, end, targets=["blob", TARGET], limit=self.limit)
        if len(seen) == self.limit:
            return super().read()
        self.position = log.step(self.position, end, None)
        return [(intent.id, intent.key, intent.payload["n"]) for intent, _ in seen]


class OrderByXid(TwoSnapshots):
    """Whole batches, but ordered by (xid, id): a transaction that began early may write late."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        super().__init__(conn, limit=10**6)

    def read(self) -> list[tuple[int, str, int]]:
        found = super().read()
        xids = dict(self.conn.execute("select id, xid::text::bigint from outbox.log").fetchall())
        return sorted(found, key=lambda seen: (xids[seen[0]], seen[0]))


class IdGreaterThanLast:
    """The popular one: what commits late with a small id is never seen."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self.conn = conn
        self.last = 0

    def read(self) -> list[tuple[int, str, int]]:
        rows = self.conn.execute(
            "select id, key, (payload->>'n')::int from outbox.log where id > %s order by id", (self.last,)
        ).fetchall()
        if rows:
            self.last = rows[-1][0]
        return rows
