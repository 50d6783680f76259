"""The reader: lane → intents between ticks → participant → position.

One reader drains one lane that its process owns. It fetches, orders, retries and parks; the participant
makes the effects. What it promises:

* Nothing is passed by the position that is not applied or parked, durably.
* Per key, effects follow the log: after a failure, later intents of that key are parked behind it.
* A failing intent never stops its lane. A participant that is down does (`Unavailable`), and parks nothing.
* An intent that kills the process is found by halving the batch, and parked after three deaths.
* What became of an intent of a saga is reported to the engine with it (`workers.reporter`).

Raises `Fenced` when the lane has another owner, `NotThisLog` when the participant has seen another
history, `psycopg.OperationalError` when the database is lost; the process (`workers.process`) goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import psycopg

from outbox import log, parked, tick
from outbox.errors import Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.lane import Lane
from outbox.parked import Parking
from outbox.participant import APPLIED, Outcome, Participant, Timed, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from outbox.saga import report
from outbox.saga.report import Report
from workers import stand
from workers.attempt import Attempts
from workers.guard import Guard, apart
from workers.reporter import Reporter

logger = logging.getLogger("outbox.reader")

PARKED_EVERY = 0.25
"""Seconds between looks at what is parked and due."""

BLOCKED_EVERY = 5.0
"""Seconds between looks at which keys are still blocked, if no notification says that an operator has decided."""

EMPTY_EVERY = 0.2
"""Seconds between writes of a position that passed nothing of this lane: ticks come far more often."""

DEATHS = 3
"""An intent that was alone in its batch and killed its worker so often is parked."""

_DEADLY = f"killed its worker {DEATHS} times"
_DIED = "its worker died, and nothing tells whether it got through"

# Looked at for each intent, so without a Python frame each.
_DUE = attrgetter("due")


class Reader:
    """Drains one lane. Not thread-safe; use `step` in a loop, between `open` and `close`."""

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        lane: Lane,
        participant: Participant,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self.conn = conn
        self.lane = lane
        self.participant = participant
        self.backoff = backoff or Backoff()
        self._attempts = Attempts(conn, lane, participant)
        self._reporter = Reporter(conn, lane, participant)
        self._guard = Guard(conn, lane)
        self.position: Position
        self._start: tick.Tick
        self._end: tick.Tick | None = None
        self._written: Position
        #: What the participant holds itself, if it keeps a position and has no effects beyond that one.
        self._own: Position | None = None
        self._written_at = 0.0
        self._parked_at = 0.0
        self._blocked_at = 0.0
        self._blocked = parked.Heads()
        self._skipped: set[int] = set()
        #: The newest tick that an owner before can have read.
        self._doubtful: tick.Tick | None = None
        self._applied = 0

    # ------------------------------------------------------------------------------------ open and close

    def open(self) -> None:
        """Find out where to go on: by the participant's own position if it keeps one, else by the lane's."""
        lane = self.lane
        self.participant.open(lane.view(self.conn))
        # What is written is the lane's, and not where the participant is: its owner may have died in between.
        at = self._written = lane.stand(self.conn)
        if self.participant.keeps_position:
            at, self._own = stand.find(self.conn, lane, self.participant, at, self._reporter)
        else:
            self._doubtful = tick.latest(self.conn)
        self._move(at)
        if unknown := self._attempts.resolve():
            self._put([Parking(i.id, "in_doubt", error=_DIED) for i in unknown])
        self._blocked = parked.heads(self.conn, lane)
        self._skipped = parked.skipped(self.conn, lane)

    def _move(self, position: Position) -> None:
        if not hasattr(self, "position") or position.tick != self.position.tick:
            self._start = tick.get(self.conn, position.tick)
        self.position = position

    def close(self) -> None:
        """Write down the position reached, and let go of the participant."""
        try:
            self._note_empty(at_once=True)
        finally:
            self.participant.close()

    # ----------------------------------------------------------------------------------------- the loop

    def step(self) -> bool:
        """Do a piece of work. → whether there was any. Raises `Unavailable` when the lane has to wait."""
        self.lane.check(self.conn)
        worked = self._retry_parked()
        if isinstance(self.participant, Timed):
            worked = self.participant.wake() or worked
        return self._drain() or worked

    def decided(self) -> None:
        """Told that an operator has decided something: the next step looks at what is parked."""
        self._parked_at = self._blocked_at = -BLOCKED_EVERY

    def idle(self) -> bool:
        """Whether everything committed so far is applied, or parked for an operator or a later day."""
        newest = tick.latest(self.conn)
        if self.position.tick != newest.id or log.beyond(self.conn, newest):
            return False
        self._note_empty(at_once=True)
        return not parked.waiting(self.conn, self.lane)

    def _limit(self) -> int:
        return max(1, self.participant.batch_limit >> self.lane.deaths)

    def _drain(self) -> bool:
        """One page of the current batch."""
        position = self.position
        if not position.upto:
            if self._doubtful is not None and position.tick >= self._doubtful.id:
                self._doubtful = None
            self._end = tick.reach(self.conn, self._start, self._doubtful or tick.latest(self.conn))
        elif self._end is None or self._end.id != position.upto:
            self._end = tick.get(self.conn, position.upto)
        end = self._end
        if end.id == position.tick:
            self._note_empty()
            return False
        if tick.same_place(self._start, end):
            # The end of an era is the beginning of the next one.
            self._move(log.step(position, end, None))
            self._note_empty(at_once=True)
            return True
        limit = self._limit()
        page = log.page(
            self.conn, self._start, end,
            target=self.lane.target, slots=self.lane.slots, after=position.after, limit=limit,
        )  # fmt: skip
        ended = len(page) < limit
        for batch, last in apart(log.cut(page, self.participant.batch_bytes)):
            after = log.step(position, end, None if ended and last else batch[-1].id)
            self._work(batch, after, end)
            self._applied += len(batch)
            if self.lane.deaths and self._applied >= self.participant.batch_limit:
                self.lane.show(self.conn, "draining", clear_deaths=True)
        if not page:
            # Nothing of this lane between the ticks: written down now and then only.
            self._move(log.step(position, end, None))
            self._note_empty()
        return True

    def note(self) -> None:
        """Write the position down: where nothing is written for an hour, the tick that it stands at may be thinned."""
        if self.position != self._written:
            self._advance(self.position)

    def _note_empty(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._written_at > EMPTY_EVERY:
            self.note()
        if self.lane.deaths and not self.position.upto:
            self.lane.show(self.conn, "draining", clear_deaths=True)

    def _advance(self, position: Position) -> None:
        self.lane.advance(self.conn, position, self._own)
        self._written, self._written_at = position, time.monotonic()

    def _work(self, batch: Sequence[Intent], after: Position, end: tick.Tick) -> None:
        """Apply a batch and move behind it."""
        ready, aside, reports = self._sort(batch, end)
        if aside or reports:
            # Parked first: no position, wherever it is kept, may pass an intent that is neither done nor parked.
            with self.conn.transaction():
                self.lane.fence(self.conn)
                if aside:
                    parked.put(self.conn, aside)
                self._reporter.send(reports)
                if self.lane.deaths and (reports or aside[0].reason == "poison"):
                    self.lane.show(self.conn, "draining", clear_deaths=True)
            hit("reader.aside")
        if self.lane.deaths and ready:
            self.lane.suspect(self.conn, ready[0].id)
        outcomes = self._attempts.make(ready, after) if ready else []
        missing = len(ready) - len(outcomes)
        if missing:
            done = ready[: len(outcomes)]
            if not done:
                raise Unavailable(f"{self.lane.target} went down before anything was done")
            ready, after = done, log.step(self.position, end, done[-1].id)
        hit("reader.applied")
        if ready and self.participant.keeps_position:
            whole = not missing and not self._attempts.halved and outcomes.count(APPLIED) == len(outcomes)
            self._own = after if whole else None
        self._record(ready, outcomes, after)
        hit("reader.recorded")
        self._move(after)
        self.participant.settle(ready)
        hit("reader.settled")
        if missing:
            raise Unavailable(f"{self.lane.target} went down in the middle of a batch")

    def _sort(self, batch: Sequence[Intent], end: tick.Tick) -> tuple[Sequence[Intent], list[Parking], list[Report]]:
        """→ what to apply, what to set aside untried, and what the engine is to be told of that."""
        suspect = 0
        alone = self.lane.deaths - self.participant.batch_limit.bit_length() + 1
        if self._applied == 0 and alone >= DEATHS:
            suspect = batch[0].id
        void, untold = self._reporter.void(batch, None if self._doubtful else ())
        out = self._skipped | void | self._guard.overtaken(batch, self._start, end)
        if scheduled := any(map(_DUE, batch)):
            # What is parked since an earlier reading has its turn there.
            out |= parked.which(self.conn, [intent.id for intent in batch if intent.due is not None])
        if not suspect and not self._blocked and not out and not scheduled:
            return batch, [], []
        ready, aside = [], []
        for intent in batch:
            if intent.id in out:
                continue
            if self._blocked.hold(intent):
                aside.append(Parking(intent.id, "blocked"))
            elif intent.id == suspect:
                aside.append(Parking(intent.id, "poison", error=_DEADLY))
                if intent.saga is None:
                    self._blocked.add(intent)
                logger.error("%s: intent %d killed its worker %d times: parked", self.lane, intent.id, DEATHS)
            elif intent.due is not None and intent.due > end.at:  # else it has its place, as when it is read again
                aside.append(Parking(intent.id, "due"))
            else:
                ready.append(intent)
        aside, reports = self._reporter.deadly(batch, aside)
        return ready, aside, reports + [Report(number, "void") for number in sorted(untold)]

    def _record(self, batch: Sequence[Intent], outcomes: Sequence[Outcome], after: Position) -> None:
        """Store what became of a batch, and the position behind it, in one transaction."""
        parkings = []
        if outcomes.count(APPLIED) < len(outcomes):
            pairs = zip(batch, outcomes, strict=True)
            # An owner that died may have applied it.
            before = self._doubtful is not None and self.lane.unclean
            parkings = [self._parking(i, o, 1, before=before) for i, o in pairs if o.verdict is not Verdict.APPLIED]
        failed = bool(parkings)
        if not failed and not self.participant.records_attempts and not self._reporter.concerned(batch):
            self._advance(after)
            return
        with self.conn.transaction():
            self.lane.fence(self.conn)
            self._attempts.record(batch, outcomes)
            parkings, reports = self._reporter.judge(batch, outcomes, parkings)
            if parkings:
                parked.put(self.conn, parkings)
            freed = self._reporter.send(reports)
            self._advance(after)
        if freed:
            self._blocked = parked.heads(self.conn, self.lane)
        if failed and self.participant.keeps_position:
            hit("reader.parked")
            # They are parked or reported now, so its own position may pass them too.
            self.participant.apply([], after)
            self._own = after

    def _parking(self, intent: Intent, outcome: Outcome, attempts: int, *, before: bool = False) -> Parking:
        """`before`: whether a try before may have had its effect."""
        self._blocked.add(intent)
        # Where attempts are recorded, their receipts tell.
        doubtful = before and not self.participant.records_attempts
        match outcome.verdict:
            case Verdict.RETRY:
                doubtful = doubtful or not (outcome.untouched or self.participant.records_attempts)
                backoff = self._reporter.backoff(intent) or self.backoff
                if attempts < backoff.attempts:
                    wait = backoff.wait(attempts, outcome.retry_after)
                    return Parking(intent.id, "retry", attempts, wait, outcome.error, doubtful)
                text = f"tried {attempts} times: {outcome.error}"
                return Parking(intent.id, "poison", attempts, error=text, doubtful=doubtful)
            case Verdict.BLOCKED:
                return Parking(intent.id, "blocked")
            case Verdict.IN_DOUBT:
                return Parking(intent.id, "in_doubt", attempts, error=outcome.error)
            case _:
                return Parking(intent.id, "poison", attempts, error=outcome.error, doubtful=doubtful)

    # ----------------------------------------------------------------------------------- what is parked

    def _retry_parked(self) -> bool:
        """Try what is parked and due, outside the log's order but one key at a time in it."""
        if time.monotonic() - self._parked_at < PARKED_EVERY:
            return False
        self._parked_at = time.monotonic()
        if self._blocked and self._parked_at - self._blocked_at > BLOCKED_EVERY:
            self._look_again()
        end = self._end or self._start
        place, wait = (self._start, end, self.position.after), self.backoff.wait(4)
        taken = parked.take(self.conn, self.lane, place, limit=self._limit(), wait=wait)
        if not taken:
            return False
        hit("parked.taken")
        batch = log.fetch(self.conn, list(taken))
        # Taken before, and no outcome: its owner may have died of success.
        void, untold = self._reporter.void(batch, [i.id for i in batch if taken[i.id].deaths > 1])
        overtaken = self._guard.overtaken(batch, self._start, end)
        if out := void | overtaken:
            self._reporter.withdraw(out, untold, {i.id for i in batch if taken[i.id].doubtful})
            self._blocked = parked.heads(self.conn, self.lane)
            batch = [intent for intent in batch if intent.id not in out]
        if deadly := [
            Parking(i.id, "poison", taken[i.id].attempts, error=_DEADLY) for i in batch if taken[i.id].deaths > DEATHS
        ]:
            self._put(*self._reporter.deadly(batch, deadly))
            self._blocked = parked.heads(self.conn, self.lane)
            return True
        if not batch:
            return True
        try:
            outcomes = self._attempts.make(batch, None)
        except Unavailable:
            # Not tried: give the attempt back.
            self._put(parked.untried(batch, taken))
            hit("parked.returned")
            raise
        hit("parked.applied")
        batch, untried = batch[: len(outcomes)], batch[len(outcomes) :]
        with self.conn.transaction():
            self.lane.fence(self.conn)
            self._attempts.record(batch, outcomes)
            pairs = list(zip(batch, outcomes, strict=True))
            failed = [self._again(i, o, taken[i.id]) for i, o in pairs if o.verdict is not Verdict.APPLIED]
            failed, reports = self._reporter.judge(batch, outcomes, failed)
            if failed or untried:
                parked.put(self.conn, failed + parked.untried(untried, taken))
            still = {parking.id for parking in failed}
            freed = parked.remove(self.conn, [i.id for i in batch if i.id not in still])
            self._reporter.send(reports)
        hit("parked.recorded")
        self._blocked.replace(freed)
        self.participant.settle([i for i, o in pairs if o.verdict is Verdict.APPLIED])
        if freed:
            self._parked_at = 0.0  # the next one of each key may have its turn at once
        return True

    def _look_again(self) -> None:
        """An operator may have taken intents out: whatever they held back has its turn."""
        self._blocked_at = self._parked_at
        with self.conn.transaction():
            self.lane.fence(self.conn)
            parked.promote(self.conn, self.lane)
            report.hurry(self.conn, self.lane)
            self._reporter.unblock()
        hit("parked.promoted")
        self._blocked = parked.heads(self.conn, self.lane)
        self._skipped = parked.skipped(self.conn, self.lane)

    def _put(self, parkings: Sequence[Parking], reports: Sequence[Report] = ()) -> None:
        with self.conn.transaction():
            self.lane.fence(self.conn)
            if parkings:
                parked.put(self.conn, parkings)
            if reports:
                parked.remove(self.conn, [r.id for r in reports])
                self._reporter.send(reports)

    def _again(self, intent: Intent, outcome: Outcome, taken: parked.Taken) -> Parking:
        if outcome.verdict is Verdict.BLOCKED:
            self._blocked.add(intent)
            return Parking(intent.id, "retry", taken.attempts - 1, self.backoff.first, outcome.error)
        return self._parking(intent, outcome, taken.attempts, before=taken.doubtful or taken.deaths > 1)
