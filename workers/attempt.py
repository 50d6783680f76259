"""Attempts: one batch at one participant, and what became of each intent of it.

Called by the reader. Three things are seen to here, so that the reader needn't know about them:

* A participant may raise anything for one intent: the batch is halved until that one is alone.
* For a participant whose effects can't be made twice harmlessly (`records_attempts`), each attempt is recorded,
  durably, before it is made; what is closed is never made again; what a dead owner left open is probed.
* What a participant of two phases has prepared is recorded, durably, before it is released.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

import psycopg

from outbox import receipt
from outbox.errors import Ambiguous, Fenced, NotThisLog, Permanent, Transient, Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.lane import Lane
from outbox.participant import APPLIED, Evidence, Outcome, Participant, TwoPhase, Verdict
from outbox.position import Position
from outbox.receipt import Record

logger = logging.getLogger("outbox.attempt")

_BLOCKED = Outcome(Verdict.BLOCKED)


class Attempts:
    """The attempts of one owner of a lane."""

    def __init__(self, conn: psycopg.Connection[Any], lane: Lane, participant: Participant) -> None:
        self._conn = conn
        self._lane = lane
        self._participant = participant
        #: Of the last batch: intent → what earlier attempts left behind. Those closed already are not in it.
        self._known: dict[int, dict[str, Any]] = {}
        #: Whether the last batch reached the participant in pieces: then none of them brought the position.
        self.halved = False

    def make(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
        """The outcomes of `batch`; fewer if the participant went down in the middle.

        Raises `Unavailable` if it was down from the start, or before what it had prepared was released; then nothing
        counts as tried, and what is known already is recorded.
        """
        self.halved = False
        if not self._participant.records_attempts:
            return self._isolate(batch, position)
        self._known = receipt.opened(self._conn, self._lane, [intent.id for intent in batch])
        hit("receipt.opened")
        self._participant.known(self._known)
        todo = [intent for intent in batch if intent.id in self._known]
        try:
            made = self._isolate(todo, position)
        except Unavailable:
            self._untried(todo)
            raise
        if len(made) < len(todo):
            self._untried(todo[len(made) :])
        self._release(todo, made)
        outcome = dict(zip((intent.id for intent in todo), made, strict=False))
        outcomes: list[Outcome] = []
        for intent in batch:
            # What is not open is closed: an earlier owner did it.
            if intent.id in self._known and intent.id not in outcome:
                break
            outcomes.append(outcome.get(intent.id, APPLIED))
        return outcomes

    def record(self, batch: Sequence[Intent], outcomes: Sequence[Outcome]) -> None:
        """Store the receipts, in the caller's transaction."""
        if not self._participant.records_attempts:
            return
        records = self._records(batch, outcomes)
        without_effect = {intent.id for intent in batch}.difference(record.id for record in records)
        receipt.record(self._conn, records, sorted(without_effect))

    def _records(self, batch: Sequence[Intent], outcomes: Sequence[Outcome]) -> list[Record]:
        """What is known of a batch; nothing of those that are known to have had no effect."""
        records = []
        for intent, outcome in zip(batch, outcomes, strict=True):
            proof = outcome.receipt or {}
            if outcome.verdict is Verdict.APPLIED:
                records.append(Record(intent.id, "closed", proof))
            elif outcome.verdict is Verdict.IN_DOUBT:
                records.append(Record(intent.id, "open", proof))
            elif proof or self._known.get(intent.id):
                records.append(Record(intent.id, "partial", proof))
        return records

    def _release(self, batch: Sequence[Intent], outcomes: Sequence[Outcome]) -> None:
        """The second phase of a batch, if there is one. Raises `Unavailable`, `Fenced`."""
        batch = batch[: len(outcomes)]
        prepared = {i.id: (i, o.receipt or {}) for i, o in zip(batch, outcomes, strict=True) if o.prepared}
        if not prepared or not isinstance(self._participant, TwoPhase):
            return
        # All that is known, not only the prepared: if the release fails, all of it comes again.
        records = self._records(batch, outcomes)
        receipt.prepared(
            self._conn,
            self._lane,
            [record._replace(state="prepared") if record.id in prepared else record for record in records],
        )
        hit("receipt.prepared")
        self._participant.release(list(prepared.values()))

    def _untried(self, intents: Sequence[Intent]) -> None:
        """Take the records of attempts back that were not made after all."""
        partial = [Record(intent.id, "partial", {}) for intent in intents if self._known.get(intent.id)]
        with self._conn.transaction():
            self._lane.fence(self._conn)
            receipt.record(self._conn, partial, [i.id for i in intents if not self._known.get(i.id)])
        hit("receipt.returned")

    def resolve(self) -> list[Intent]:
        """Ask the participant what became of what earlier owners left open. → what nothing can tell about.

        The receipts are stored when this returns. Raises `Unavailable`.
        """
        if not self._participant.records_attempts:
            return []
        doubts = receipt.doubts(self._conn, self._lane)
        if not doubts:
            return []
        records, without_effect, unknown = [], [], []
        for doubt, (evidence, proof) in zip(doubts, self._participant.probe(doubts), strict=True):
            if evidence is Evidence.APPLIED:
                records.append(Record(doubt.intent.id, "closed", proof or {}))
            elif evidence is Evidence.UNKNOWN:
                unknown.append(doubt.intent)
                if proof:
                    records.append(Record(doubt.intent.id, "open", proof))
            elif doubt.receipt or proof:
                records.append(Record(doubt.intent.id, "partial", proof or {}))
            else:
                without_effect.append(doubt.intent.id)
        with self._conn.transaction():
            self._lane.fence(self._conn)
            receipt.record(self._conn, records, without_effect)
        hit("receipt.resolved")
        logger.info("%s: of %d attempts in doubt, %d are still", self._lane, len(doubts), len(unknown))
        return unknown

    def _isolate(self, batch: Sequence[Intent], position: Position | None) -> list[Outcome]:
        """Apply; if that raises, halve until the intent that raises is alone, and let the others through."""
        if not batch:
            return []
        self._lane.check(self._conn)
        try:
            return list(self._participant.apply(batch, position))
        except (Fenced, Unavailable, NotThisLog, psycopg.OperationalError):
            raise
        except Exception as error:  # noqa: BLE001 - a participant of a user's own may raise anything
            if len(batch) == 1:
                return [_judge(error)]
            logger.warning("%s: %s in a batch of %d: halved", self._lane, type(error).__name__, len(batch))
        self.halved = True
        half = len(batch) // 2
        outcomes = self._isolate(batch[:half], None)
        if len(outcomes) < half:
            return outcomes
        failed = {i.key for i, o in zip(batch, outcomes, strict=False) if o.verdict is not Verdict.APPLIED}
        try:
            made = iter(self._isolate([intent for intent in batch[half:] if intent.key not in failed], None))
        except Unavailable:
            # The first half is done, and must be recorded: as if the participant had gone down in the middle.
            return outcomes
        for intent in batch[half:]:
            outcome = _BLOCKED if intent.key in failed else next(made, None)
            if outcome is None:
                break
            outcomes.append(outcome)
        return outcomes


def _judge(error: Exception) -> Outcome:
    """What an exception that one intent raised means for it."""
    ours = isinstance(error, (Transient, Permanent, Ambiguous))
    text = str(error) if ours else f"the participant raised {type(error).__name__}: see the worker's log"
    if isinstance(error, Permanent):
        return Outcome(Verdict.POISON, error=text)
    if isinstance(error, Ambiguous):
        return Outcome(Verdict.IN_DOUBT, error=text)
    if not ours:
        # Where, but not the message: it may quote the payload.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        logger.error("an intent raised %s at %s:%s", type(error).__name__, frame.filename, frame.lineno)
    wish, untouched = getattr(error, "retry_after", None), getattr(error, "untouched", False)
    return Outcome(Verdict.RETRY, error=text, retry_after=wish, untouched=untouched)
