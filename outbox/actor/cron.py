"""Schedules: messages that are sent at times of the calendar, once, however many workers there are.

    @dramatiq.actor(cron="*/5 * * * *")                                          # every five minutes, UTC
    def tidy() -> None: …

    @dramatiq.actor(cron=Cron("0 9 * * mon-fri", timezone="Europe/Berlin", missed="skip"))
    def report() -> None: …

A *slot* is a time that an expression names. This module reckons them; `workers.actor.timetable` sends the messages, and
the database decides who does. Expressions are those of Debian's cron, in five fields (cronsim): where the clocks go
forward, what was for the hour that is missing runs at its end; where they go back, what has a fixed hour runs once, and
what runs every hour, or every few minutes, runs in both. No I/O. Raises `ValueError` for what can't be declared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo

import dramatiq
from cronsim import CronSim, CronSimError

from outbox.intent import Intent

OPTIONS = frozenset({"cron"})

LATE = timedelta(minutes=1)
"""A slot that nobody was there for is missed after this time."""

MOST = 100
"""Slots that are made up for, at most: the newest ones."""

NAME_LIMIT = 200
"""Bytes of a name."""

Missed = Literal["skip", "once", "all"]


@dataclass(frozen=True)
class Cron:
    """When an actor's message is sent, and with which arguments."""

    #: Minute, hour, day of the month, month, day of the week.
    expression: str
    timezone: str = "UTC"
    #: Of slots that passed while no worker ran: `once` sends one message for the last of them, `skip` none, `all` one
    #: for each, up to `MOST`.
    missed: Missed = "once"
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    #: Its identity, by default the actor's name. One of several of an actor needs one.
    name: str | None = None

    def __post_init__(self) -> None:
        if self.missed not in get_args(Missed):
            raise ValueError(f"missed={self.missed!r} is not one of skip, once and all")
        if not isinstance(self.expression, str) or len(self.expression.split()) != 5:
            raise ValueError(
                f"{self.expression!r} has not the five fields minute, hour, day of the month, month, day of the week"
            )
        try:
            self.zone  # noqa: B018 - asked for its errors
        except (KeyError, ValueError, OSError, TypeError):
            raise ValueError(
                f"there is no time zone {self.timezone!r}: use a name such as Europe/Berlin (pip install tzdata)"
            ) from None
        try:
            next(self.slots(datetime(2000, 1, 1, tzinfo=UTC)))
        except CronSimError as error:
            raise ValueError(f"{self.expression!r} is not an expression of cron: {error}") from None
        except (StopIteration, OverflowError):
            raise ValueError(f"{self.expression!r} names no time at all") from None

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    def slots(self, after: datetime) -> Iterator[datetime]:
        """The slots after a time, in order, in UTC. Ends where there is none in fifty years."""
        last = after.astimezone(UTC)
        # Where the clocks go back, an hour comes twice, and what was asked for the second may be answered of the first.
        for slot in CronSim(self.expression, last.astimezone(self.zone)):
            found = slot.astimezone(UTC)
            if found > last:
                last = found
                yield found


class Due(NamedTuple):
    """What is to be done about the slots that have come."""

    #: To be sent for, the oldest first.
    slots: list[datetime]
    #: Slots up to here are done with then.
    upto: datetime
    #: The first one that has not come.
    following: datetime
    #: Slots that nothing is sent for.
    left_out: int


def due(cron: Cron, slot: datetime, now: datetime) -> Due:
    """What to do at `now`, when everything up to `slot` is done with."""
    come, more = _come(cron, slot, now)
    upto = come[-1] if come else slot
    following = next(cron.slots(now))
    if cron.missed == "all":
        send = come[-MOST:]
    elif cron.missed == "once" or (come and now - come[-1] <= LATE):
        send = come[-1:]
    else:
        send = []
    return Due(send, upto, following, len(come) + more - len(send))


def _come(cron: Cron, slot: datetime, now: datetime) -> tuple[list[datetime], int]:
    """The slots after `slot` up to `now`, the last ones if they are many. → and 1 if there are more before them."""
    window = timedelta(hours=1)
    while True:
        start = max(slot, now - window)
        found = []
        for one in islice(cron.slots(start), 1_000_000):
            if one > now:
                break
            found.append(one)
        if start == slot:
            return found, 0
        if len(found) > MOST:
            return found, 1
        window *= 2


class Schedule(NamedTuple):
    """A declared schedule: its time, and what is sent."""

    name: str
    cron: Cron
    actor: dramatiq.Actor[Any, Any]

    def message(self, **more: Any) -> dramatiq.Message[Any]:
        """A new message, which says in its options what it is for."""
        return self.actor.message_with_options(
            args=tuple(self.cron.args), kwargs=dict(self.cron.kwargs or {}), cron={"name": self.name, **more}
        )


class Declared(NamedTuple):
    """A schedule as it is declared to the database."""

    schedule: Schedule
    target: str
    action: str
    #: None: each message is its own.
    key: str | None
    #: The message as JSON, but for its id and times.
    message: str
    #: Tells this declaration from another one of the same name.
    version: str


def declared(schedule: Schedule, draft: Intent) -> Declared:
    """`draft`: what its message would become."""
    fields = draft.payload
    key = None if draft.key == fields["message_id"] else draft.key
    text = json.dumps(
        {name: value for name, value in fields.items() if not name.startswith("message_")}, sort_keys=True
    )
    cron = schedule.cron
    what = [cron.expression, cron.timezone, cron.missed, draft.target, draft.action, key, text]
    version = sha256(json.dumps(what).encode()).hexdigest()[:32]
    return Declared(schedule, draft.target, draft.action, key, text, version)


def schedules(actor: dramatiq.Actor[Any, Any]) -> list[Schedule]:
    """The schedules of an actor."""
    option = actor.options.get("cron")
    if option is None:
        return []
    many = option if isinstance(option, list | tuple) else [option]
    made = []
    for one in many:
        if not isinstance(one, str | Cron):
            raise ValueError(  # noqa: TRY004 - as for all else that can't be declared
                f"cron of actor {actor.actor_name} is neither an expression nor a Cron, nor a list of them"
            )
        cron = Cron(one) if isinstance(one, str) else one
        if len(many) > 1 and cron.name is None:
            raise ValueError(f"actor {actor.actor_name} has several schedules: give each a name, Cron(…, name=…)")
        name = cron.name or actor.actor_name
        if not 1 <= len(name.encode()) <= NAME_LIMIT:
            raise ValueError(f"the name of a schedule of actor {actor.actor_name} is over {NAME_LIMIT} bytes")
        made.append(Schedule(name, cron, actor))
    return made


def check(actor: dramatiq.Actor[Any, Any], others: Mapping[str, dramatiq.Actor[Any, Any]]) -> None:
    """An actor's schedules, when it is declared among others."""
    names = [one.name for other in others.values() if other.actor_name != actor.actor_name for one in schedules(other)]
    for one in schedules(actor):
        if one.name in names:
            raise ValueError(f"there are two schedules {one.name}: give each a name of its own, Cron(…, name=…)")
        names.append(one.name)
        one.message().encode()
