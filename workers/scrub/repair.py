"""The repair: findings become repetitions, which the lanes apply.

Nothing is written to a participant behind its lane's back. What is missing, stale or corrupt is put again, what is
orphaned is deleted, each by an intent (`outbox.repetition`) that nothing newer is overwritten by. Before it is
written, each finding is looked at a third time: a person may have thought for an hour about the plan.

A blob's bytes are not in the log. They are taken from what the store has still (`workers.scrub.aside`) and staged anew,
as an application would; only when they are durable is a damaged blob put aside. Where there are none, the finding stays
with the command that fetches them from elsewhere, and the damaged blob stays where it is.

What is durable: with each transaction, the repetitions of a chunk of findings together with how far the repair is.
Killed, it goes on behind them. Raises `Fenced`, `NotReady` without an operator's rights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg

from outbox import repetition, sql
from outbox.errors import BlobRefused, StoreRefused
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.operation import Operation
from outbox.repetition import Again
from outbox.store import Store
from workers.scrub.aside import aside_of
from workers.scrub.comparison import confirm
from workers.scrub.finding import Finding
from workers.scrub.pace import Pace
from workers.scrub.subject import Subject
from workers.scrub.survey import Progress, passed

CHUNK = 500
"""Findings repaired in one transaction."""

_RIGHT = "it was repaired meanwhile, or is in motion"
_DELETE = "{}"


class Repairer:
    """Repairs what a survey has found, under the same operation."""

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        operation: Operation,
        subject: Subject,
        store: Store | None = None,
        *,
        tell: Callable[[Progress], None] = lambda _progress: None,
    ) -> None:
        """`store` is that of the subject, if it is one of blobs."""
        self._conn = conn
        self._operation = operation
        self._subject = subject
        self._store = store
        self._tell = tell
        self.progress = Progress.read(operation.progress)

    def run(self) -> Progress:
        """Repair what can be, from where an earlier process was."""
        # Bytes of a blob may take long; a chunk is one transaction.
        size = 1 if self._store is not None else CHUNK
        while chunk := self.progress.findings[self.progress.repaired :][:size]:
            self._chunk(chunk)
            self._tell(self.progress)
        return self.progress

    def _chunk(self, chunk: list[Finding]) -> None:
        conn, target, progress = self._conn, self._subject.target, self.progress
        # Before looking: what isn't seen now is above it.
        since = repetition.since(conn)
        at = passed(conn, self._subject)
        found = confirm(conn, self._subject, at, {each.key: () for each in chunk if each.repair}, Pace())
        wrong = {finding.key: finding for finding in found.findings}
        unknown = self._never_heard_of([f.key for f in wrong.values() if f.repair == "delete"])
        again, after = list[Again](), list[Finding]()
        with conn.transaction():
            for finding in chunk:
                left = finding
                if finding.repair:
                    now = wrong.get(finding.key)
                    made = now and self._again(now, found.expected.get(finding.key), since, finding.key in unknown)
                    if made:
                        again.append(made)
                    else:
                        left = finding._replace(repair="", advice=self._subject.advice if now else _RIGHT)
                        progress.gone += now is None
                after.append(left)
            if again:
                repetition.append(conn, self._operation, target, again)
            start = progress.repaired
            progress.findings[start : start + len(chunk)] = after
            progress.repaired += len(chunk)
            progress.emitted += len(again)
            self._operation.save(conn, progress.json())
        hit("scrub.emitted")

    def _again(self, finding: Finding, intent: Intent | None, since: int, unknown: bool) -> Again | None:
        """The repetition that repairs it; None if nothing can."""
        if intent is None:
            if self._store is not None and unknown:
                aside_of(self._store).keep(finding.key)
            return Again(0, since, finding.key, "delete", _DELETE)
        if self._store is None:
            return Again(intent.id, since)
        return self._blob(self._store, intent, since)

    def _blob(self, store: Store, intent: Intent, since: int) -> Again | None:
        """Stage the bytes again, in this transaction."""
        payload, digest = intent.payload, intent.key
        if "bytes" in payload:
            self._set_aside(store, digest)
            return Again(intent.id, since)
        row = self._conn.execute("select pg_current_xact_id()::text::bigint, log from outbox.identity").fetchone()
        assert row is not None  # noqa: S101 - the migration made the row
        for copy in aside_of(store).copies(digest, payload.get("stage")):
            try:
                staged = store.stage(copy, xid=row[0], log=row[1])
            except StoreRefused:
                raise
            except BlobRefused:  # it can't be read
                continue
            if staged.digest == digest:
                self._set_aside(store, digest)
                return Again(intent.id, since, digest, "put", json.dumps(payload | staged._asdict()))
            store.remove_stage(staged.stage)
        return None

    @staticmethod
    def _set_aside(store: Store, digest: str) -> None:
        aside_of(store).set_aside(digest)
        hit("scrub.aside")

    def _never_heard_of(self, keys: list[str]) -> set[str]:
        if self._store is None or not keys:
            return set()
        parameters = {"target": self._subject.target, "keys": keys}
        return set(keys) - {row[0] for row in self._conn.execute(sql.load("scrub_known"), parameters)}
