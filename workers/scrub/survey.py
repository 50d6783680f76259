"""The survey: one participant compared from end to end, as an operation that can be resumed.

    expected (base and log, at a tick)  ─┐
                                         ├─ in order of key → suspicions → a second look → findings
    held (the participant's inventory)  ─┘

Both sides are read once and put on disk in order of key (`workers.scrub.spill`), so that memory doesn't grow with the
participant, and no transaction of the database is held open meanwhile.

What is durable: each `save` of the operation, with the key up to which everything was looked at twice and what was
found there. Killed, it goes on from the last one, with a new tick and a new inventory.

Raises `Fenced` when somebody else has resumed the operation; what a subject raises; `NotReady` when the participant has
no lane.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import psycopg

from outbox import lane, live, log, tick
from outbox.errors import NotReady
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.log import Slots
from outbox.operation import Operation
from outbox.position import Position
from outbox.span import seconds
from outbox.tick import Tick
from workers.scrub.comparison import confirm, judge, paired
from workers.scrub.finding import Finding
from workers.scrub.pace import Pace, Rate
from workers.scrub.spill import Spill
from workers.scrub.subject import Held, Subject

LISTED = 1000
"""Findings that are written down one by one, unless told otherwise; of more, only the number is."""

SUSPICIONS = 5000
"""Keys that are looked at again together: for each such chunk the log is read once."""

SAVE_EVERY = 10.0
"""Seconds between saves: what a kill costs; also the lease's renewal."""

OLD = 3600.0
"""Seconds: a lane that is behind by more is worth a note."""

CONFIRM_EVERY = 60.0
"""Seconds after which suspicions are looked into however few they are: nothing behind them can be saved before."""


@dataclass(slots=True)
class Progress:
    """How far a survey is; JSON in `outbox.operation`."""

    #: Every key up to here was looked at.
    after: str = ""
    #: Whether the end was reached.
    surveyed: bool = False
    #: The tick that it was compared as of, the last one if it was resumed.
    tick: int = 0
    items: int = 0
    bytes: int = 0
    #: Of how many, as far as is known.
    total: int = 0
    total_bytes: int = 0
    #: Keys that were in motion, and not compared.
    moving: int = 0
    #: Kind → how many.
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    #: Findings whose repair was emitted, or found to be impossible.
    repaired: int = 0
    #: Intents that were written to repair them.
    emitted: int = 0
    #: Findings that were there no more when they were to be repaired.
    gone: int = 0
    #: What a reader of the numbers should know.
    note: str = ""

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Progress:
        """From the operation's row."""
        return cls(**stored | {"findings": [Finding.read(each) for each in stored.get("findings", [])]})

    def json(self) -> dict[str, Any]:
        """For the operation's row."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add(self, findings: list[Finding], listed: int = LISTED) -> None:
        """Count them all, list the first."""
        self.counts = dict(Counter(self.counts) + Counter(finding.kind for finding in findings))
        self.findings += findings[: max(0, listed - len(self.findings))]

    @property
    def mended(self) -> int:
        """Findings that need nobody any more."""
        return self.emitted + self.gone

    @property
    def found(self) -> int:
        """How many findings there are, listed or not."""
        return sum(self.counts.values())


class Survey:
    """One participant's survey, under an operation of ours."""

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        operation: Operation,
        subject: Subject,
        *,
        rate: Rate | None = None,
        listed: int = LISTED,
        tell: Callable[[Progress], None] = lambda _progress: None,
    ) -> None:
        """`tell` is called about once a second, for whoever shows it. `listed`: findings to write down."""
        self._listed = listed
        self._conn = conn
        self._operation = operation
        self._subject = subject
        self._tell = tell
        self.progress = Progress.read(operation.progress)
        self._pace = Pace(rate, self._beat)
        self._pace.resume(self.progress.items, self.progress.bytes)
        self._saved = time.monotonic()

    def run(self) -> Progress:
        """To the end, or from where an earlier process was. Saves as it goes."""
        if self.progress.surveyed:
            return self.progress
        subject, progress = self._subject, self.progress
        at = passed(self._conn, subject)
        with (
            # Its transaction ends with it, also when there is no room for what it yields.
            closing(self._expected(at)) as live_ones,
            Spill(live_ones, in_order=True) as expected,
            Spill(self._held()) as held,
        ):
            hit("scrub.spilled")
            progress.tick, progress.total = at.id, progress.items + expected.count
            progress.note = self._note(at)
            self._save()
            self._compare(at, (Intent._make(row) for row in expected), (Held(*row) for row in held))
        progress.surveyed = True
        self._save()
        return progress

    def _note(self, at: Tick) -> str:
        row = self._conn.execute("select extract(epoch from outbox.now() - %s)::float8", (at.at,)).fetchone()
        age = row[0] if row else 0.0
        if age < OLD or not self._behind(at):
            return ""
        return f"a lane stands where it was {seconds(age)} ago: nothing that was written since was compared"

    def _behind(self, at: Tick) -> bool:
        """Whether the tick is old because a lane is behind, and not because nothing happened."""
        return tick.latest(self._conn).high > at.high

    def _expected(self, at: Tick) -> Generator[Intent]:
        progress = self.progress
        progress.total_bytes = progress.bytes
        with closing(live.puts(self._conn, self._subject.target, at, after=progress.after)) as found:
            for intent in found:
                progress.total_bytes += self._subject.size(intent)
                self._pace.spend()
                yield intent

    def _held(self) -> Iterator[Held]:
        for held in self._subject.held():
            self._pace.spend()
            if not held.key or held.key > self.progress.after:
                yield held

    def _compare(self, at: Tick, expected: Iterator[Intent], held: Iterator[Held]) -> None:
        suspicions: dict[str, list[Held]] = {}
        strays: list[Finding] = []
        key, looked = self.progress.after, time.monotonic()
        for key, group in paired(expected, held):
            if not key:
                # Sorted first, and there again in a resumed survey.
                strays = self._strays(group[1])
                continue
            self._pace.spend(1 if group[0] else 0)
            if judge(self._subject, key, group, self._pace) is not None:
                suspicions[key] = group[1]
            now = time.monotonic()
            if len(suspicions) >= SUSPICIONS or (suspicions and now - looked >= CONFIRM_EVERY):
                suspicions, looked = self._look_again(at, suspicions, key), now
            elif not suspicions:
                looked = now
                if now - self._saved >= SAVE_EVERY:
                    self._mark(key)
        self._look_again(at, suspicions, key)
        self.progress.add(strays, self._listed)

    def _strays(self, found: list[Held]) -> list[Finding]:
        return [
            Finding("orphaned", stray.place, stray.id, stray.fault, "", self._subject.stray_advice)
            for stray in found
            if self._subject.still(stray)
        ]

    def _look_again(self, at: Tick, suspicions: dict[str, list[Held]], key: str) -> dict[str, list[Held]]:
        confirmed = confirm(self._conn, self._subject, at, suspicions, self._pace)
        self.progress.add(confirmed.findings, self._listed)
        self.progress.moving += confirmed.moving
        hit("scrub.confirmed")
        self._mark(key)
        return {}

    def _mark(self, key: str) -> None:
        progress = self.progress
        progress.after, progress.items, progress.bytes = key, self._pace.items, self._pace.bytes
        self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        self._operation.save(self._conn, self.progress.json())
        hit("scrub.saved")

    def _beat(self) -> None:
        shown = Progress.read(self.progress.json() | {"items": self._pace.items, "bytes": self._pace.bytes})
        self._tell(shown)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            # As it was at the last mark; the lease is what counts.
            self._save()


def lanes_of(conn: psycopg.Connection[Any], target: str) -> list[Slots]:
    """Which slots each lane of a participant has, in order. Raises `NotReady` when it isn't registered."""
    rows = conn.execute("select slot_low, slot_high from outbox.lane where target = %s order by lane", (target,))
    found = [Slots(*row) for row in rows]
    if not found:
        raise NotReady(f"no participant {target!r} is registered: see outbox status for those that are")
    return found


def lowest(conn: psycopg.Connection[Any], target: str) -> Position:
    """Where the last of a participant's lanes stands, by the log's word. Raises `NotReady`."""
    lanes = range(len(lanes_of(conn, target)))
    return min((lane.stand(conn, target, number) for number in lanes), key=lambda stand: stand.tick)


def passed(conn: psycopg.Connection[Any], subject: Subject) -> Tick:
    """The newest tick that every lane has passed, by the log's word and by the participant's own.

    An index that was restored from a backup is behind its lane until its worker has caught up.
    """
    own, stands = subject.positions(), list[Position]()
    for number, slots in enumerate(lanes_of(conn, subject.target)):
        stand = lane.stand(conn, subject.target, number)
        if number in own:
            stand = _behind(conn, subject.target, slots, stand, own[number])
        stands.append(stand)
    return tick.get(conn, min(stand.tick for stand in stands))


def _behind(
    conn: psycopg.Connection[Any], target: str, slots: Slots, stand: Position, own: Position | None
) -> Position:
    """A lane's position, or the participant's own if that misses something: where nothing happens it isn't moved."""
    first = tick.first(conn)
    where = stand._replace(tick=first.id, nonce=first.nonce) if own is None else tick.match(conn, own)
    if where.tick >= stand.tick:
        return stand
    missed = log.page(conn, tick.get(conn, where.tick), tick.get(conn, stand.tick), target=target, slots=slots, limit=1)
    return where if missed else stand
