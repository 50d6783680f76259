"""Scrub's look at mail: receipts against what the mail server has written down (`workers.scrub.trace`).

A mail that is out can't be listed or taken back, so there is nothing to compare with base and log but the proofs:

    missing     a receipt says that it was sent, and the server has no trace of it
    orphaned    a trace of a mail that no intent of this log has, or that has no receipt
    duplicate   the server took the same mail twice, under two queue ids
    open        an attempt whose outcome nobody knows: for over an hour, or parked as in doubt

Nothing is repaired: sending a mail again is for a person to decide. What is missing counts only where the server's log
reaches back to the attempt, with all that logrotate has kept of it.

Everything is read twice, and only what both readings show is a finding. Memory is constant; a kill costs the reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg

from outbox import sql, tick
from outbox.operation import Operation
from outbox.settings import Settings
from outbox.tick import Tick
from workers.scrub.finding import Finding, Kind
from workers.scrub.spill import Spill
from workers.scrub.survey import LISTED, Progress, lowest
from workers.scrub.trace import Trace, traces

SETTLE = 60.0
"""Seconds that the log may lag behind a receipt, and clocks may differ."""

OPEN = 3600.0
"""Seconds after which an attempt without an outcome is told."""

_NONE = "nothing repairs it: what was sent can't be taken back"
_AGAIN = "see the mail server's log; to send it once more: outbox replay --resend-mail"
_RESOLVE = "say what became of it: outbox parked resolve"
_WAITS = "its lane's worker finds out when it runs: outbox status"


class _Mail(NamedTuple):
    """A row of `scrub_mails.sql`."""

    token: str
    id: int
    action: str
    passed: bool
    parked: str | None
    state: str | None
    #: Seconds since 1970; 0: never.
    opened: float
    closed: float
    accepted: list[str]
    assumed: int

    @property
    def sent(self) -> bool:
        """Whether the receipt says that the mail server took it, and nobody merely assumes so."""
        return self.action == "send" and self.state == "closed" and bool(self.accepted) and not self.assumed


#: Kind, why, advice.
_Wrong = tuple[Kind, str, str]


class MailSurvey:
    """Receipts against traces, under an operation of ours."""

    def __init__(
        self, settings: Settings, conn: psycopg.Connection[Any], operation: Operation, *, listed: int = LISTED
    ) -> None:
        """`listed`: findings to write down."""
        self._settings = settings
        self._conn = conn
        self._operation = operation
        self._listed = listed

    def run(self) -> Progress:
        """Read everything twice. Raises `Unavailable`, `NotReady`."""
        done = Progress.read(self._operation.progress)
        if done.surveyed:
            return done
        first = self._read(Progress())
        again = {(each.kind, each.key) for each in first.findings}
        progress = self._read(Progress()) if again else first
        findings = [each for each in progress.findings if (each.kind, each.key) in again]
        if first.found == len(first.findings):
            progress.counts = dict(Counter(each.kind for each in findings))
        progress.findings, progress.surveyed = findings, True
        self._operation.save(self._conn, progress.json())
        return progress

    def _read(self, progress: Progress) -> Progress:
        at = tick.get(self._conn, lowest(self._conn, "mail").tick)
        progress.tick = at.id
        begun = self._now()
        there = traces(self._settings, self._conn)
        with Spill(there.all) as taken, Spill(self._mails(at)) as mails:
            self._operation.save(self._conn, self._operation.progress)
            reach = inf if there.since is None else there.since.timestamp() + SETTLE
            for token, (rows, seen) in _paired(mails, taken):
                progress.items += len(rows)
                wrong = self._judge(rows, seen, begun, reach)
                progress.moving += any(not row.passed for row in rows)
                number = rows[0].id if rows else 0
                found = [Finding(kind, token, number, why, "", advice) for kind, why, advice in wrong]
                progress.add(found, self._listed)
        if there.since is None:
            progress.note = "what the mail server no longer has is not missed: its mails may be deleted"
        return progress

    def _judge(self, rows: list[_Mail], seen: list[Trace], begun: float, reach: float) -> Iterator[_Wrong]:
        """What is wrong with one mail."""
        logged = [trace for trace in seen if trace.queue_id]
        if not rows:
            if logged and logged[0].domain == self._settings.mail_domain:
                yield "orphaned", "the mail server took it, and no intent of this log is it", _NONE
            return
        if logged and all(row.passed and row.state is None for row in rows):
            yield "orphaned", "the mail server took it, and there is no receipt of it", _NONE
        copies = Counter(part for part, _ in {(trace.part, trace.queue_id) for trace in logged})
        most = max(copies.values(), default=0)
        if most > len(rows):
            yield "duplicate", f"the mail server took it {most} times", _NONE
        for row in rows:
            if row.parked == "in_doubt":
                yield "open", "whether it was sent is not known", _RESOLVE
            elif row.state == "open" and row.parked is None and row.opened < begun - OPEN:
                yield "open", "whether it was sent is not known", _WAITS
            elif not seen and row.sent and reach < row.opened and row.closed < begun - SETTLE:
                yield "missing", "it is recorded as sent, and the mail server has no trace of it", _AGAIN

    def _mails(self, at: Tick) -> Iterator[tuple[Any, ...]]:
        with self._conn.transaction():
            self._conn.execute("set local enable_seqscan = on")
            with self._conn.cursor(name="outbox_scrub") as cursor:
                cursor.itersize = 1000
                cursor.execute(sql.load("scrub_mails"), {"first": at.first, "high": at.high, "snapshot": at.snapshot})
                yield from cursor

    def _now(self) -> float:
        row = self._conn.execute("select extract(epoch from outbox.now())::float8").fetchone()
        return float(row[0]) if row else 0.0


def _paired(mails: Spill, taken: Spill) -> Iterator[tuple[str, tuple[list[_Mail], list[Trace]]]]:
    """Merge both by token."""
    left = ((token, [_Mail(*row) for row in rows]) for token, rows in groupby(mails, itemgetter(0)))
    right = ((token, [Trace(*row) for row in rows]) for token, rows in groupby(taken, itemgetter(0)))
    rows, seen = next(left, None), next(right, None)
    while rows or seen:
        token = min(each[0] for each in (rows, seen) if each)
        mine = rows[1] if rows and rows[0] == token else []
        theirs = seen[1] if seen and seen[0] == token else []
        rows = next(left, None) if mine else rows
        seen = next(right, None) if theirs else seen
        yield token, (mine, theirs)
