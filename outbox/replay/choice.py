"""The choice: which intents a replay is about.

Everything that is given must be true of an intent. A choice is what the operation's row keeps as its request, so that
the same words are recognised when they are given again; ticks are looked up once, when it begins (`resolve`).

Errors: `NotReady` for a participant that isn't registered or isn't repeated, and for a tick that is not in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import psycopg

from outbox import tick
from outbox.errors import NotReady

NEVER = ("clock", "saga", "actor")
"""What is never repeated: sagas and actors have acted on their intents, and would act again."""

Parked = Literal["skipped", "poison"]
"""What was parked for good. The rest is tried again by itself, or waits for an operator's word."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which intents are meant. By default everything that participants hold."""

    targets: tuple[str, ...] = ()
    key: str | None = None
    key_prefix: str | None = None
    saga: UUID | None = None
    #: Written at this time or later; with a time zone.
    begin: datetime | None = None
    #: Written before this time.
    end: datetime | None = None
    #: Those that this tick doesn't show yet.
    after_tick: int | None = None
    #: Those that this tick shows.
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
        for name in ("saga", "begin", "end"):
            if name in given:
                given[name] = str(given[name]) if name == "saga" else given[name].isoformat()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    def read(cls, request: dict[str, Any]) -> Choice:
        """The choice of an operation."""
        given: dict[str, Any] = dict(request)
        for name, kind in (("saga", UUID), ("begin", datetime.fromisoformat), ("end", datetime.fromisoformat)):
            if name in given:
                given[name] = kind(given[name])
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**given)

    def participants(self, conn: psycopg.Connection[Any]) -> list[str]:
        """The participants that it is about, in order of their names."""
        known = [row[0] for row in conn.execute("select target from outbox.participant order by target")]
        for target in self.targets:
            if target in NEVER:
                raise NotReady(f"intents of {target!r} are never repeated: leave it out")
            if target not in known:
                raise NotReady(f"no participant {target!r} is registered; there are: {', '.join(known)}")
        return [target for target in known if target not in NEVER and target in (self.targets or known)]

    def resolve(self, conn: psycopg.Connection[Any]) -> dict[str, Any]:
        """The choice as parameters of SQL, and as JSON that means the same whenever it is used: what was written
        after this moment doesn't belong to it."""
        latest = tick.latest(conn) if self.upto_tick is None else tick.get(conn, self.upto_tick)
        return {
            "key": self.key,
            "key_prefix": self.key_prefix,
            "saga": None if self.saga is None else str(self.saga),
            "begin": None if self.begin is None else self.begin.isoformat(),
            "end": None if self.end is None else self.end.isoformat(),
            **_shown("seen", None if self.after_tick is None else tick.get(conn, self.after_tick)),
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
