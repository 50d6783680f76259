"""What `outbox status` shows: the log, the clock, each lane, what is parked, scrubs, and what holds rows back.

Reads only. Works with the rights of `outbox_reader`; details of other users' connections need `pg_monitor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

from outbox import follower, retention, sql
from outbox.errors import NotReady
from outbox.plural import counted
from outbox.span import seconds

COUNT_LIMIT = 10_000
"""Intents behind a lane are counted up to here: the question is how bad, not how many exactly."""

TICK_AGE_WARN = 10.0
"""Seconds without a tick although something was written: the clock stands still."""

OVERDUE = 2.0
"""Times the interval of the schedule, without a complete scrub."""


@dataclass(frozen=True, slots=True)
class Status:
    """A picture of the system; every value is JSON."""

    #: log, last_id, tick, high, tick_seconds, clock_runs, clock_epoch, clock_stopped, partitions, room_until, first_id
    #: and first_tick (where it begins: what was before is dropped)
    log: dict[str, Any]
    #: target, lane, epoch, owned, place, lease_seconds, position, behind, lag_seconds, state, reason, state_seconds
    lanes: list[dict[str, Any]]
    #: target, reason, count, oldest_seconds
    parked: list[dict[str, Any]]
    #: pid, prepared, seconds, state, application_name
    holders: list[dict[str, Any]]
    #: state, count, oldest_seconds (of sagas that have not ended)
    sagas: list[dict[str, Any]]
    #: name, tick, note, seen_seconds (of those who read the log too, and hold retention back)
    followers: list[dict[str, Any]]
    #: What holds back the oldest partition, if it is old enough to go (sentences).
    held: list[str]
    #: target, operation, found, mended, moving, every, seconds (of the last complete scrub of each participant)
    scrubs: list[dict[str, Any]]

    def warnings(self) -> list[str]:
        """What a person should look at, each with what to do."""
        found = []
        if self.log["clock_stopped"]:
            found.append(f"the clock is stopped: {self.log['clock_stopped']}")
        elif not self.log["clock_runs"]:
            found.append("no clock is running, so nothing makes progress: run `outbox work clock`")
        elif self.log["last_id"] > self.log["high"] and self.log["tick_seconds"] > TICK_AGE_WARN:
            found.append("the clock runs but takes no ticks: see its log")
        found += self._lane_warnings()
        found += [
            f"{counted(saga['count'], 'saga', then=(' is', ' are'))} stuck: see `outbox saga list --in stuck`"
            for saga in self.sagas
            if saga["state"] == "stuck"
        ]
        found += [
            f"follower {each['name']} was not seen for {seconds(each['seen_seconds'])}, and the log is kept for it "
            f"from tick {each['tick']} on: let it run again, or delete its row in outbox.follower"
            for each in self.followers
            if each["seen_seconds"] > follower.STALE
        ]
        found += [f"the log can't be dropped any further: {reason}" for reason in self.held]
        found += self._scrub_warnings()
        if self.log["room_until"] - self.log["last_id"] < 2_000_000:
            found.append("the log is running out of partitions: run `outbox work clock`, which makes them")
        return found

    def _lane_warnings(self) -> Iterator[str]:
        for lane in self.lanes:
            name = f"{lane['target']}/{lane['lane']}"
            if lane["state"] == "stopped":
                yield f"lane {name} is stopped: {lane['reason']}"
            elif lane["state"] == "waiting" and lane["owned"]:
                yield f"lane {name} waits: {lane['reason']}"
            elif lane["behind"] and not lane["owned"]:
                yield f"lane {name} is behind and nobody drains it: run its worker (`outbox work`)"

    def _scrub_warnings(self) -> Iterator[str]:
        for scrub in self.scrubs:
            if left := scrub["found"] - scrub["mended"]:
                yield (
                    f"the last scrub of {scrub['target']} left {counted(left, 'finding')}: see "
                    f"`outbox operations show "
                    f"{scrub['operation']}`, and `outbox scrub {scrub['target']} --repair`"
                )
            if scrub["every"] is not None and scrub["seconds"] > OVERDUE * scrub["every"]:
                yield f"a scrub of {scrub['target']} is overdue: run `outbox scrub --scheduled`, or see its log"


def read(conn: psycopg.Connection[Any], *, retention_age: float | None = None) -> Status:
    """The picture now. With the age (seconds) at which partitions go, also why the oldest one doesn't."""
    try:
        return _read(conn, retention_age)
    except psycopg.errors.InsufficientPrivilege:
        user = conn.info.user
        raise NotReady(
            f"the database user {user} may not see the status: use one that is a member of outbox_reader, "
            f"outbox_operator or outbox_worker (GRANT outbox_reader TO {user})"
        ) from None


def _read(conn: psycopg.Connection[Any], retention_age: float | None) -> Status:
    plan = None if retention_age is None else retention.plan(conn, retention_age)
    with conn.cursor(row_factory=dict_row) as cursor:
        log = cursor.execute(sql.load("status_log")).fetchone()
        assert log is not None  # noqa: S101 - the migration made the row
        return Status(
            log=log,
            lanes=cursor.execute(sql.load("status_lanes"), {"limit": COUNT_LIMIT}).fetchall(),
            parked=cursor.execute(sql.load("status_parked")).fetchall(),
            holders=cursor.execute(sql.load("status_holders")).fetchall(),
            sagas=cursor.execute(sql.load("status_sagas")).fetchall(),
            followers=[
                {"name": f.name, "tick": f.tick, "note": f.note, "seen_seconds": f.seen_seconds}
                for f in follower.find(conn)
            ],
            held=[] if plan is None or plan.ready else list(map(str, plan.holds)),
            scrubs=cursor.execute(sql.load("scrub_last")).fetchall(),
        )
