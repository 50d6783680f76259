"""The choice: which intents a replay is about.

Everything that is given must be true of an intent. A choice is what the operation's row keeps as its request, so that
the same words are recognised when they are given again; ticks and times are looked up once, when it begins
(`resolve`).

Errors: `NotReady` for a participant that isn't registered or isn't repeated, for a tick that the log doesn't go back
to, and for a time that ends before it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import psycopg

from outbox import horizon, tick
from outbox.errors import NotReady

NEVER = ("clock", "saga", "actor")
"""What is never repeated: sagas and actors have acted on their intents, and would act again. The same list stands in
outbox.repeat."""

_FORM = "%Y-%m-%d %H:%M:%S%z"

Parked = Literal["skipped", "poison"]
"""What was parked for good. The rest is tried again by itself, or waits for an operator's word."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which intents are meant. By default everything that participants hold."""

    targets: tuple[str, ...] = ()
    key: str | None = None
    key_prefix: str | None = None
    #: About this mapped class, by its name (`Outbox.about`), or of keys `NAME/…`.
    model: str | None = None
    saga: UUID | None = None
    #: Written at this time (with a time zone) or later; or not longer ago than this, by the database's clock.
    begin: datetime | timedelta | None = None
    #: Written before this time.
    end: datetime | timedelta | None = None
    #: Those that this tick doesn't show yet. Of a tick that was thinned, the nearest one before it.
    after_tick: int | None = None
    #: Those that this tick shows. Of a tick that was thinned, the nearest one after it.
    upto_tick: int | None = None
    #: Instead of what was applied: what was set aside for good.
    parked: tuple[Parked, ...] = ()
    #: Instead of what the log has: what was archived in this directory, or in `s3://BUCKET/PREFIX`.
    archive: str | None = None
    #: Mails too, under new Message-IDs.
    resend_mail: bool = False
    #: Of users' own participants, also what is neither put nor delete.
    events: bool = False

    def request(self) -> dict[str, Any]:
        """The choice as JSON, without what is not given."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, (), False)}
        if self.saga is not None:
            given["saga"] = str(self.saga)
        for name in ("begin", "end"):
            if name in given:
                at = given[name]
                given[name] = at.total_seconds() if isinstance(at, timedelta) else at.isoformat()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    def read(cls, request: dict[str, Any]) -> Choice:
        """The choice of an operation."""
        given: dict[str, Any] = dict(request)
        if "saga" in given:
            given["saga"] = UUID(given["saga"])
        for name in ("begin", "end"):
            if name in given:
                at = given[name]
                given[name] = datetime.fromisoformat(at) if isinstance(at, str) else timedelta(seconds=at)
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**given)

    def participants(self, conn: psycopg.Connection[Any]) -> list[str]:
        """The participants that it is about, in order of their names."""
        rows = conn.execute("select target from outbox.participant order by target")
        known = [row[0] for row in rows if not _never(row[0])]
        for target in self.targets:
            if _never(target):
                raise NotReady(f"intents of {target!r} are never repeated: leave it out")
            if target not in known:
                raise NotReady(
                    f"no participant {target!r} is registered: choose among those that are ({', '.join(known)})"
                )
        return [target for target in known if target in (self.targets or known)]

    def resolve(self, conn: psycopg.Connection[Any]) -> dict[str, Any]:
        """The choice as parameters of SQL, and as JSON that means the same whenever it is used: what was written
        after this moment doesn't belong to it."""
        begin, end = _moment(conn, self.begin), _moment(conn, self.end)
        if begin and end and begin >= end:
            raise NotReady(f"nothing is from {begin:{_FORM}} on and before {end:{_FORM}}: exchange the two")
        if self.after_tick and self.upto_tick and self.after_tick >= self.upto_tick:
            raise NotReady(f"nothing lies between ticks {self.after_tick} and {self.upto_tick}: exchange them")
        seen = None if self.after_tick is None else _tick(conn, self.after_tick)[0]
        latest = tick.latest(conn) if self.upto_tick is None else _tick(conn, self.upto_tick)[1]
        return {
            "key": self.key,
            "key_prefix": self.key_prefix,
            "model": self.model,
            "saga": None if self.saga is None else str(self.saga),
            "begin": None if begin is None else begin.isoformat(),
            "end": None if end is None else end.isoformat(),
            **_shown("seen", seen),
            **_shown("upto", latest),
            "reasons": list(self.parked) or None,
        }

    def parts(self, targets: Sequence[str]) -> list[tuple[str, str]]:
        """What is to be done, in order: (participant, `words` | `parked` | `events` | `archived`)."""
        parts = []
        for target in targets:
            if self.archive is not None:
                parts.append((target, "archived"))
            elif self.parked:
                parts.append((target, "parked"))
            elif target == "mail":
                parts += [(target, "events")] if self.resend_mail else []
            else:
                parts.append((target, "words"))
                if self.events and target not in ("index", "blob"):
                    parts.append((target, "events"))
        return parts


def _shown(name: str, at: tick.Tick | None) -> dict[str, Any]:
    """What a tick shows, as parameters: by value, because a tick may be thinned before they are used again."""
    snapshot, first, high = (None, None, None) if at is None else (at.snapshot, at.first, at.high)
    return {name: snapshot, f"{name}_first": first, f"{name}_high": high}


def _never(target: str) -> bool:
    # The participants of actors are their queues: `actor.QUEUE`.
    return target in NEVER or target.startswith("actor.")


def _moment(conn: psycopg.Connection[Any], at: datetime | timedelta | None) -> datetime | None:
    if not isinstance(at, timedelta):
        return at
    row = conn.execute("select outbox.now() - %s", (at,)).fetchone()
    assert row is not None  # noqa: S101 - a select without FROM has one row
    made: datetime = row[0]
    return made


def _tick(conn: psycopg.Connection[Any], number: int) -> tuple[tick.Tick, tick.Tick]:
    """The tick; or the nearest ones that were not thinned, before and after it."""
    begins, newest = horizon.read(conn).tick, tick.latest(conn)
    if number > newest.id:
        raise NotReady(f"tick {number} was not taken yet, the newest is {newest.id}: look for it in outbox status")
    if number < begins:
        raise NotReady(
            f"tick {number} is older than the log goes back (tick {begins}): choose by time (--from, --to), or from an "
            "archive"
        )
    before, after = tick.around(conn, number)
    assert before is not None  # noqa: S101 - the horizon's tick is never thinned
    return before, before if before.id == number or after is None else after
