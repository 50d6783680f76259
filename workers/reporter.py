"""What a reader does for sagas: recalled intents are not applied, and the engine is told what became of the others.

Called by `workers.reader`, and silent for batches without intents of sagas. A report is durable with the transaction
that records the same for the lane. Intents of sagas are never parked as poison: their saga sees to them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from typing import Any, Literal

import psycopg

from outbox import log, parked, tick
from outbox.intent import Intent
from outbox.lane import Lane
from outbox.parked import Parking
from outbox.participant import Outcome, Participant, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from outbox.saga import report
from outbox.saga.report import Report

PAGE = 1000
"""Intents of a page that is looked through after a crash."""

RETRY = "retry"
"""The header of a step's intent that says how often it is tried, as `Backoff.text`."""

_RECALLED = "recalled after a try that failed, and may have had its effect all the same"

_SAGA = attrgetter("saga")


class Reporter:
    """The reports of one owner of a lane."""

    def __init__(self, conn: psycopg.Connection[Any], lane: Lane, participant: Participant) -> None:
        self._conn = conn
        self._lane = lane
        self._participant = participant

    @staticmethod
    def concerned(batch: Sequence[Intent]) -> bool:
        """Whether there are intents of sagas in a batch."""
        return any(map(_SAGA, batch))

    def void(self, batch: Sequence[Intent], doubtful: Collection[int] | None = ()) -> tuple[set[int], set[int]]:
        """Those of `batch` that must not be applied, and of these those whose saga is to be told.

        `doubtful`: those that an owner before may have applied without saying so; None: all. They are applied (again)
        although they are recalled: only then is it known, and their saga undoes them. Of a participant whose attempts
        are recorded, its receipts tell instead.
        """
        if not self.concerned(batch):
            return set(), set()
        void = report.void(self._conn, [intent.id for intent in batch if intent.saga is not None])
        untold = {number for number, answered in void.items() if not answered}
        if untold and self._participant.records_attempts:
            doubtful = report.tried(self._conn, sorted(untold))
        maybe = untold if doubtful is None else untold.intersection(doubtful)
        return set(void) - maybe, untold - maybe

    @staticmethod
    def backoff(intent: Intent) -> Backoff | None:
        """How often this intent of a saga is tried, if its step says so."""
        if intent.saga is None or intent.headers is None:
            return None
        text = json.loads(intent.headers).get(RETRY)
        return None if text is None else Backoff.read(text)

    def judge(
        self, batch: Sequence[Intent], outcomes: Sequence[Outcome], parkings: Sequence[Parking]
    ) -> tuple[list[Parking], list[Report]]:
        """→ what is to be parked after all, and what is to be reported of a batch that was tried."""
        if not self.concerned(batch):
            return list(parkings), []
        of_sagas = {intent.id for intent in batch if intent.saga is not None}
        poison = {p.id: p for p in parkings if p.reason == "poison" and p.id in of_sagas}
        # Of what failed for good, a try may have had its effect, or a part of it: a mail, for one of its recipients.
        maybe = {number for number, parking in poison.items() if parking.doubtful}
        if poison and self._participant.records_attempts:
            maybe |= report.tried(self._conn, sorted(poison))
        reports = []
        for intent, outcome in zip(batch, outcomes, strict=True):
            if intent.id in poison:
                verdict: Literal["unknown", "failed"] = "unknown" if intent.id in maybe else "failed"
                reports.append(Report(intent.id, verdict, poison[intent.id].error))
            elif intent.id in of_sagas and outcome.verdict is Verdict.APPLIED and not outcome.handed_on:
                reports.append(Report(intent.id, "applied"))
        return [p for p in parkings if p.id not in poison], reports

    def deadly(self, batch: Sequence[Intent], parkings: Sequence[Parking]) -> tuple[list[Parking], list[Report]]:
        """→ the same for what is parked because it kills its worker: nobody knows whether it got through."""
        of_sagas = {intent.id for intent in batch if intent.saga is not None}
        mine = [p for p in parkings if p.reason == "poison" and p.id in of_sagas]
        return [p for p in parkings if p not in mine], [Report(p.id, "unknown", p.error) for p in mine]

    def send(self, reports: Sequence[Report]) -> bool:
        """Write the reports, in the caller's transaction. → whether keys may be free now that were blocked."""
        report.send(self._conn, self._lane, reports)
        freed = any(r.verdict != "applied" for r in reports)
        if freed:
            parked.promote(self._conn, self._lane)
        return freed

    def unblock(self) -> None:
        """Withdraw recalled intents that wait behind another one of their key, in the caller's transaction."""
        if void := report.blocked(self._conn, self._lane):
            parked.remove(self._conn, sorted(void))
            self.send([Report(number, "void") for number in sorted(void)])

    def withdraw(self, void: set[int], told: set[int], doubtful: Collection[int]) -> None:
        """Take recalled intents out of the parking place, and say so: durable when it returns."""
        reports = [Report(n, "unknown", _RECALLED) if n in doubtful else Report(n, "void") for n in sorted(told)]
        with self._conn.transaction():
            self._lane.fence(self._conn)
            parked.remove(self._conn, sorted(void))
            self.send(reports)

    def ahead(self, recorded: Position, own: Position) -> None:
        """Report what the participant holds already and nobody has recorded, because its owner died just before."""
        if (own.tick, own.upto, own.after) <= (recorded.tick, recorded.upto, recorded.after):
            return
        for stretch in _between(recorded, own):
            self._held(*stretch)

    def _held(self, start: int, end: int, after: int, last: int | None) -> None:
        """Report one stretch of the log: what lies between two ticks, after one id and up to another."""
        here, goal = tick.get(self._conn, start), tick.get(self._conn, end)
        while here.id != goal.id:
            reached = tick.reach(self._conn, here, goal)
            if not tick.same_place(here, reached):
                self._told(here, reached, after, last)
            here, after = reached, 0

    def _told(self, start: tick.Tick, end: tick.Tick, after: int, last: int | None) -> None:
        while True:
            page = log.page(
                self._conn, start, end, target=self._lane.target, slots=self._lane.slots, after=after, limit=PAGE
            )
            held = [i.id for i in page if i.saga is not None and (last is None or i.id <= last)]
            if held:
                with self._conn.transaction():
                    self._lane.fence(self._conn)
                    # One that is void and not answered was recalled too late.
                    void = report.void(self._conn, held)
                    known = {number for number in void if void[number]} | parked.which(self._conn, held)
                    self.send([Report(number, "applied") for number in held if number not in known])
            if len(page) < PAGE or (last is not None and page[-1].id >= last):
                return
            after = page[-1].id


def _between(recorded: Position, own: Position) -> Iterator[tuple[int, int, int, int | None]]:
    """What lies between two positions: (tick, tick, after this id, up to this id).

    Batch by batch: ids are in order within a batch only, and a transaction that ended late lies in a later one with
    lower ids. What is told twice is told in vain.
    """
    here, after = recorded.tick, 0
    if recorded.upto and recorded.upto <= own.tick:
        yield here, recorded.upto, recorded.after, None
        here = recorded.upto
    if here < own.tick:
        yield here, own.tick, 0, None
        here = own.tick
    if own.upto:
        if (recorded.tick, recorded.upto) == (here, own.upto):
            after = recorded.after
        yield here, own.upto, after, own.after
