"""The course of a replay: the chosen intents are appended again, chunk by chunk.

A chunk and the progress of the operation commit together: whatever kills the process, nothing is appended twice, and
the next one goes on behind it. Progress, in the operation's row:

    chosen    the choice as it was resolved when the replay began
    parts     [[participant, words | parked | events | archived], …]; `part` is the one at hand, `after` the key or id
              done in it
    planned   how many intents the plan promised
    again     how many were appended; `left_out` how many were not, by reason
    xids      participant → the transaction that appended last, for whoever waits for it

What is chosen is never held in memory. A reading of last words is a snapshot that is kept for `LEG` seconds at most;
what is said about a key meanwhile is noticed, and its word left out. The replay doesn't run ahead of the lanes by
more than `AHEAD` intents: the log isn't flooded, and the application's intents don't queue up behind it.

Errors: `Fenced` when somebody else has resumed the operation; `NotReady`; psycopg's.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import psycopg

from outbox import decision, operation, repetition
from outbox.errors import Permanent
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.operation import Operation
from outbox.repetition import Again, Word
from outbox.replay import archived
from outbox.replay.choice import Choice
from outbox.replay.plan import absent, meant
from outbox.replay.resent import resent
from outbox.store import Store

KIND = "replay"

CHUNK = 500
"""Intents in one transaction: it is short, and little is repeated by hand if it fails."""

AHEAD = 5000
"""Intents that a participant may be behind the replay."""

LEG = 300.0
"""Seconds that one snapshot is read: Postgres keeps dead rows for as long as it is open."""

LOOK_EVERY = 0.05
"""Seconds between looks at a lane that is waited for."""

KEEP_EVERY = 5.0
"""Seconds between renewals of the operation's lease while waiting."""


class Step(NamedTuple):
    """What a replay has just done."""

    target: str
    #: Intents appended, and left out.
    again: int = 0
    left_out: int = 0
    #: It waits until the participant has applied more.
    waits: bool = False


def begin(conn: psycopg.Connection[Any], choice: Choice, chosen: dict[str, Any], planned: int) -> Operation:
    """Begin the operation; durable when it returns."""
    repetition.check(conn)
    parts = choice.parts(choice.participants(conn))
    progress = {"chosen": chosen, "parts": parts, "part": 0, "after": "", "planned": planned, "again": 0}
    begun = operation.begin(conn, KIND, choice.request(), progress | {"left_out": {}, "xids": {}})
    hit("replay.begun")
    return begun


class Course:
    """A replay that is under way in this process. `store` is where blobs are looked for; None: nowhere."""

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        stream: psycopg.Connection[Any],
        course: Operation,
        *,
        store: Store | None = None,
        rate: float | None = None,
        endpoint: str | None = None,
    ) -> None:
        """`conn` writes, `stream` reads; neither may be in a transaction. `rate` is what the caller keeps to, in
        intents a second: what takes a second is a chunk. `endpoint` is the S3 server's, of archives in a bucket."""
        self._conn = conn
        self._stream = stream
        self._operation = course
        self._store = store
        self._endpoint = endpoint
        self._chunk = CHUNK if rate is None else max(1, min(CHUNK, int(rate)))
        self._stages: set[str] | None = None
        self._kept = time.monotonic()
        #: Appended and perhaps not applied yet: (participant, xid, how many).
        self._ahead: deque[tuple[str, int, int]] = deque()

    @property
    def progress(self) -> dict[str, Any]:
        """How far it is."""
        return self._operation.progress

    def steps(self) -> Iterator[Step]:
        """Do it, from where it stands. What a step tells is durable. Leave it when it is not to go on."""
        ways = {"words": self._words, "parked": self._parked, "events": self._events, "archived": self._archived}
        for number, (target, kind) in enumerate(self.progress["parts"]):
            if number < self.progress["part"]:
                continue
            if number > self.progress["part"]:
                self._save(part=number, after="")
            yield from ways[kind](target)

    def applied(self) -> Iterator[Step]:
        """Wait until the participants have passed everything that was appended."""
        for target, xid in self.progress["xids"].items():
            while not self._reached(target, xid):
                yield self._pause(target)

    def end(self) -> dict[str, Any]:
        """End the operation. → what came of it; durable when it returns."""
        result = {"again": self.progress["again"], "left_out": self.progress["left_out"]}
        self._operation.end(self._conn, "done", result=result)
        hit("replay.ended")
        return result

    # -------------------------------------------------------------------------------------------- parts

    def _words(self, target: str) -> Iterator[Step]:
        over = False
        while not over:
            begun = time.monotonic()
            changed, floor = dict[str, int](), repetition.since(self._conn)
            chosen = meant(self.progress["chosen"])
            with closing(repetition.words(self._stream, target, chosen, after=self.progress["after"])) as words:
                over = True
                while chunk := list(islice(words, self._chunk)):
                    yield from self._room(target)
                    # First up to where is looked, then the look: what it doesn't see is above.
                    before, floor = floor, repetition.since(self._conn)
                    changed |= repetition.changed(self._conn, target, before)
                    again, left = self._sorted(target, chunk, changed, floor)
                    yield self._append(target, again, left, after=chunk[-1].key)
                    if time.monotonic() - begun > LEG:
                        over = False
                        break

    def _sorted(
        self, target: str, chunk: Sequence[Word], changed: dict[str, int], floor: int
    ) -> tuple[list[Again], Counter[str]]:
        """→ what to repeat of a chunk, and why the rest is left out."""
        nowhere = set[str]()
        if target == "blob" and self._store is not None:
            nowhere = {word.key for word in absent(self._store, self._staged(self._store), iter(chunk))}
        left: Counter[str] = Counter()
        again = []
        for word in chunk:
            if changed.get(word.key, 0) > word.rank:
                left["superseded"] += 1
            elif word.held:
                left["behind"] += 1
            elif word.key in nowhere:
                left["nowhere"] += 1
            else:
                again.append(word.again(floor))
        return again, left

    def _parked(self, target: str) -> Iterator[Step]:
        while True:
            yield from self._room(target)
            floor = repetition.since(self._conn)
            rows = self._page("replay_parked", target)
            if not rows:
                return
            again = [Again(row[0], floor) for row in rows]
            poison = [row[0] for row in rows if row[3] == "poison"]
            yield self._append(target, again, Counter(), after=rows[-1][0], anew=True, skip=poison)

    def _events(self, target: str) -> Iterator[Step]:
        while True:
            yield from self._room(target)
            rows = self._page("replay_events", target)
            if not rows:
                return
            left: Counter[str] = Counter()
            again = []
            for number, key, action, body, closed, evidence in rows:
                if target != "mail":
                    again.append(Again(number, None))
                    continue
                text, why = None, "held" if action != "send" else "unsent"
                if action == "send" and closed:
                    text, why = self._mail(Intent(number, target, action, key, body), evidence)
                if text is None:
                    left[why] += 1
                else:
                    again.append(Again(number, None, key, action, text))
            yield self._append(target, again, left, after=rows[-1][0])

    def _archived(self, target: str) -> Iterator[Step]:
        choice = Choice.read(self._operation.request)
        after = self.progress["after"] or 0
        found = archived.rows(self._conn, choice, self.progress["chosen"], target, after=after, endpoint=self._endpoint)
        for some in archived.chunks(found, self._chunk):
            yield from self._room(target)
            floor = repetition.since(self._conn)
            last = archived.last_words(self._stream, target, some)
            left: Counter[str] = Counter()
            again, words = list[Again](), list[Word]()
            for row in some:
                intent, why = row.intent, archived.fate(row, last)
                if why == "again" and intent.key in last:
                    words.append(last[intent.key])
                elif why == "again":
                    again.append(Again(0, floor, intent.key, "delete", intent.body))
                elif why == "mail" and choice.resend_mail and row.receipt is not None:
                    text, why = self._mail(intent, row.receipt.get("evidence") or {})
                    if text is not None:
                        again.append(Again(intent.id, None, intent.key, "send", text))
                    else:
                        left[why] += 1
                elif why == "event" and choice.events:
                    again.append(Again(intent.id, None, intent.key, intent.action, intent.body))
                else:
                    left[why] += 1
            more, less = self._sorted(target, words, {}, floor)
            yield self._append(target, again + more, left + less, after=some[-1].intent.id)

    def _mail(self, intent: Intent, evidence: dict[str, Any]) -> tuple[str | None, str]:
        try:
            refused = {int(number) for number in evidence.get("refused", {})}
            return resent(intent.payload, refused, f"replay {self._operation.id}"), "refused"
        except (Permanent, AttributeError, TypeError, ValueError):
            return None, "unreadable"

    # ----------------------------------------------------------------------------------------- in small

    def _page(self, name: Any, target: str) -> Sequence[Any]:
        after = self.progress["after"] or 0
        with self._conn.transaction():
            self._conn.execute("set local enable_seqscan = on")
            parameters = {**repetition.EVERYTHING, **self.progress["chosen"], "target": target}
            return self._conn.execute(
                repetition.statement(name), parameters | {"after": after, "limit": self._chunk}
            ).fetchall()

    def _append(
        self,
        target: str,
        again: Sequence[Again],
        left: Counter[str],
        *,
        after: str | int,
        anew: bool = False,
        skip: Sequence[int] = (),
    ) -> Step:
        """Append a chunk and save the progress, in one transaction; what is in `skip` is skipped with it."""
        with self._conn.transaction():
            if skip:
                note = f"replay {self._operation.id} repeats it"
                decided = decision.decide(self._conn, "skip", skip, note=note)
                refused = {one.id for one in decided if one.refused}
                again = [one for one in again if one.of not in refused]
                left = left + Counter(refused=len(refused))
            xids = self.progress["xids"]
            if again:
                xid, _ = repetition.append(self._conn, self._operation, target, again, anew=anew)
                hit("replay.appended")
                self._ahead.append((target, xid, len(again)))
                xids = {**xids, target: xid}
            left_out = Counter(self.progress["left_out"]) + left
            self._save(after=after, again=self.progress["again"] + len(again), left_out=left_out, xids=xids)
        hit("replay.saved")
        return Step(target, len(again), left.total())

    def _save(self, **more: Any) -> None:
        self._operation.save(self._conn, self.progress | more)
        self._kept = time.monotonic()

    def _room(self, target: str) -> Iterator[Step]:
        """Wait until a chunk more is not too far ahead of the lanes."""
        while sum(count for _, _, count in self._ahead) + self._chunk > AHEAD:
            if self._reached(*self._ahead[0][:2]):
                self._ahead.popleft()
            else:
                yield self._pause(target)

    def _pause(self, target: str) -> Step:
        time.sleep(LOOK_EVERY)
        if time.monotonic() - self._kept > KEEP_EVERY:
            self._save()
        return Step(target, waits=True)

    def _reached(self, target: str, xid: int) -> bool:
        row = self._conn.execute("select outbox.reached(%s::text::xid8, %s)", (str(xid), target)).fetchone()
        return bool(row and row[0])

    def _staged(self, store: Store) -> set[str]:
        if self._stages is None:
            self._stages = {stage.name for stage in store.stages()}
        return self._stages
