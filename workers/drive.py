"""One batch of the engine's lane, in one transaction: load the sagas, let the machine decide, carry it out, save.

Called by `workers.engine`, inside its transaction. Nothing is durable before that commits.

Function steps run at once, and their outcomes are events of the same batch: a saga of functions alone is done in one
transaction. Intents are appended together at the end, before the steps that name them are written: the compensation
of a step is armed with its action, or neither is.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import psycopg

from outbox import sql
from outbox.errors import Permanent, SagaRefused
from outbox.intent import Intent, payload_text
from outbox.log import append_parameters
from outbox.participant import APPLIED, Outcome, Verdict
from outbox.saga import locks, machine, states, store
from outbox.saga.plan import Act, Kind
from outbox.saga.registry import Definitions
from outbox.saga.states import ENDED, SagaState, StepState
from outbox.saga.store import Early, Note, Record, Timer, Unreadable
from workers.step import check_signal, of_step, report, saga_id, stopped, tells, waits
from workers.stepwork import Came, Stepwork

logger = logging.getLogger("outbox.saga")

_BLOCKED = Outcome(Verdict.BLOCKED)


DEADLINE = "*"
"""Where a timer names its step, that of the whole saga: no step is called so."""


class _Append(NamedTuple):
    """An intent to be appended, and the try of a step that it is, if it is one."""

    intent: Intent
    record: Record | None = None
    step: int = 0


class Drive:
    """The sagas of one batch."""

    def __init__(self, conn: psycopg.Connection[Any], definitions: Definitions, work: Stepwork) -> None:
        self._conn = conn
        self._definitions = definitions
        self._work = work
        self._sagas: dict[UUID, Record | Unreadable] = {}
        self._appends: list[_Append] = []
        #: What came before the start of its saga.
        self._early: dict[UUID, list[Early]] = {}
        #: Sagas that have taken it along.
        self._taken: list[UUID] = []

    def run(self, batch: Sequence[Intent]) -> list[Outcome]:
        """Carry out a batch. → what became of each of its intents."""
        ids = {key: saga_id(key) for key in {intent.key for intent in batch}}
        self._sagas = store.load(self._conn, [saga for saga in ids.values() if saga is not None], self._definitions)
        begun = {ids[intent.key] for intent in batch if intent.action == "start"}
        self._early = store.early(self._conn, [saga for saga in begun if saga is not None and saga not in self._sagas])
        failed: set[str] = set()
        outcomes = []
        for intent in batch:
            outcome = _BLOCKED if intent.key in failed else self._take(intent, ids[intent.key])
            if outcome is not APPLIED:
                failed.add(intent.key)
            outcomes.append(outcome)
        self._save()
        return outcomes

    def _save(self) -> None:
        records = [one for one in self._sagas.values() if isinstance(one, Record)]
        freed = [r for r in records if r.definition.locks is not None and r.touched and r.state.state in ENDED]
        for record in records:
            if not record.touched or record.state.state not in ENDED:
                continue
            if record.definition.deadline is not None:
                record.timers = [timer for timer in record.timers if timer.step != DEADLINE]
                record.quiet.append(DEADLINE)
            if record.parent is not None:
                self._appends.append(_Append(report(record)))
        if self._appends:
            rows = self._conn.execute(sql.load("log_append"), append_parameters([a.intent for a in self._appends]))
            for append, (_xid, number) in zip(self._appends, rows.fetchall(), strict=True):
                if append.record is not None:
                    append.record.intents[append.step] = number
        store.save(self._conn, records)
        store.keep(self._conn, self._early, self._taken)
        if freed:
            locks.release(self._conn, [record.id for record in freed])

    # ------------------------------------------------------------------------------------- one intent

    def _take(self, intent: Intent, saga: UUID | None) -> Outcome:
        found = None if saga is None else self._sagas.get(saga)
        if isinstance(found, Unreadable):
            # Another engine may know it, or the next deployment: it waits like anything that fails.
            return Outcome(Verdict.RETRY, error=f"saga {found.name!r} version {found.version} {found.why}")
        try:
            if saga is None:
                raise Permanent("the key is not a saga's id: use the one that start() returned")  # noqa: TRY301
            if intent.action == "start":
                return (
                    self._start(saga, intent, intent.payload) if found is None else self._again(found, intent.payload)
                )
            if found is not None:
                self._event(found, intent.action, intent.payload)
            elif intent.action in ("signal", "cancel"):
                self._keep(saga, intent)
            elif intent.action not in ("outcome", "timer", "granted", "decided"):
                raise Permanent("there is no saga of this id: it was never started, or is removed")  # noqa: TRY301
        except Permanent as error:
            return Outcome(Verdict.POISON, error=str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return Outcome(Verdict.POISON, error=f"the intent is not one for the engine ({type(error).__name__})")
        return APPLIED

    def _start(self, saga: UUID, intent: Intent, payload: dict[str, Any]) -> Outcome:
        name, version = payload["name"], payload["version"]
        definition = self._definitions.get((name, version))
        if definition is None:
            return Outcome(
                Verdict.RETRY,
                error=f"saga {name!r} version {version} is not deployed here: name its module in OUTBOX_SAGAS",
            )
        record = store.blank(definition, saga, payload_text(payload["input"]))
        try:
            record.given = definition.read(payload["input"])
        except SagaRefused as error:
            # The application may be ahead of the engine: the next deployment can read it.
            return Outcome(Verdict.RETRY, error=str(error))
        record.key = payload.get("key")
        if payload.get("parent"):
            record.parent, record.parent_intent = UUID(payload["parent"]), intent.id
        self._sagas[saga] = record
        record.touched = True
        if kept := self._early.pop(saga, None):
            self._taken.append(saga)
            for early in kept:
                self._event(record, early.action, json.loads(early.body))
        if record.state.state is not SagaState.WAITING:
            return APPLIED  # it was cancelled before it began
        event: states.Event | None = states.Started()
        if definition.locks is not None:
            event = self._lock(record)
        if definition.deadline is not None:
            record.timers.append(Timer(DEADLINE, "timeout", 0, 0, definition.deadline))
        if event is not None:
            self._pump(record, event)
        return APPLIED

    def _keep(self, saga: UUID, intent: Intent) -> None:
        """Keep what came before the start of its saga: its transaction may have committed first, or said it first."""
        payload = intent.payload
        if intent.action == "signal":
            check_signal(payload)
        _ = payload.get("who")
        self._early.setdefault(saga, []).append(Early(intent.id, intent.action, payload_text(payload)))
        logger.warning("a %s came for saga %s, which has not started: kept until it does", intent.action, saga)

    @staticmethod
    def _again(record: Record, payload: dict[str, Any]) -> Outcome:
        """A start with the key of a saga that is there already, or a start that is read again."""
        if json.loads(record.body) != payload["input"]:
            record.notes.append(Note(None, "started again", "with another input, which does not count"))
            record.touched = True
        return APPLIED

    def _lock(self, record: Record) -> states.Event | None:
        """Ask for the saga's locks. → what follows at once; None: it waits."""
        definition = record.definition
        assert definition.locks is not None  # noqa: S101 - the caller looked
        try:
            names = self._work.locks(record)
        except Permanent as error:
            return states.Cancelled(str(error))
        except Exception as error:  # noqa: BLE001 - the application's function
            return states.Cancelled(f"its locks could not be named ({type(error).__name__})")
        # Its row comes first: locks refer to it.
        store.save(self._conn, [record])
        record.revision, record.changed, record.touched = 1, set(), True
        match locks.take(self._conn, record.id, names, record.parent):
            case "held":
                return states.Started()
            case "deadlock":
                return states.Cancelled("its lock is held by what waits for it, so it would wait for itself")
        record.timers.append(Timer("", "timeout", 0, 0, definition.lock_timeout))
        record.notes.append(Note(None, "waits for its locks"))
        return None

    def _event(self, record: Record, action: str, payload: dict[str, Any]) -> None:
        match action:
            case "outcome":
                self._outcome(record, payload)
            case "timer":
                self._timer(record, payload)
            case "granted":
                self._pump(record, states.Started())
            case "signal":
                self._signal(record, payload)
            case "cancel":
                reason = str(payload.get("reason") or "")
                record.notes.append(Note(None, "cancel", reason, str(payload.get("who") or "")))
                self._pump(record, states.Cancelled(reason))
            case "retry" | "skip" | "resolve":
                self._asked(record, action, payload)
            case "decided":
                self._decided(record, payload)
            case _:
                raise Permanent(f"the engine knows no action {action!r}: skip this intent")

    def _outcome(self, record: Record, payload: dict[str, Any]) -> None:
        if payload["intent"] not in record.intents:
            return  # of an earlier round
        n = record.intents.index(payload["intent"])
        node, one = record.definition.plan.nodes[n], record.state.steps[n]
        verdict, error = states.Verdict(payload["verdict"]), str(payload.get("error") or "")
        if verdict is not states.Verdict.APPLIED:
            record.notes.append(Note(node.name, verdict.value, error))
        elif one.state is StepState.RECALLED:
            record.notes.append(Note(node.name, "late success"))
            record.kept.append(payload["intent"])
        self._pump(record, states.Outcome(n, one.round, one.tries, verdict, error))

    def _decided(self, record: Record, payload: dict[str, Any]) -> None:
        """An operator has decided about a parked intent: what became of it, or only that it is tried again."""
        if payload["intent"] not in record.intents:
            return  # of an earlier round
        n, decision = record.intents.index(payload["intent"]), str(payload["decision"])
        node, one = record.definition.plan.nodes[n], record.state.steps[n]
        text, who = str(payload.get("reason") or ""), str(payload.get("who") or "")
        record.notes.append(Note(node.name, f"parked: {decision.replace('_', ' ')}", text, who))
        record.touched = True
        if decision == "applied":
            if one.state is StepState.RECALLED:
                record.kept.append(payload["intent"])
            self._pump(record, states.Outcome(n, one.round, one.tries, states.Verdict.APPLIED))
        elif decision == "skip":
            verdict = states.Verdict.UNKNOWN if payload.get("doubtful") else states.Verdict.FAILED
            if one.state is StepState.UNDOING or node.kind is Kind.RETRIABLE:
                verdict = states.Verdict.SKIPPED
            self._pump(record, states.Outcome(n, one.round, one.tries, verdict, "skipped by an operator"))

    def _timer(self, record: Record, payload: dict[str, Any]) -> None:
        if not payload["step"]:
            if record.state.state is SagaState.WAITING:
                self._pump(record, states.Cancelled("its locks were not free in time"))
            return
        if payload["step"] == DEADLINE:
            if record.state.state not in ENDED:
                self._pump(record, states.Cancelled("its deadline has passed"))
            return
        n = record.definition.plan.number[payload["step"]]
        if payload["what"] == "retry" and record.intents[n] is not None:
            return  # read again: its try is under way, and another one would be a second effect
        if payload["what"] == "timeout" and record.definition.plan.nodes[n].act is not Act.DELAY:
            record.notes.append(Note(payload["step"], "timeout"))
        self._pump(record, states.Rang(n, payload["what"], payload["round"], payload["tries"]))

    def _signal(self, record: Record, payload: dict[str, Any]) -> None:
        check_signal(payload)
        plan, name = record.definition.plan, str(payload["name"])
        accepted = payload.get("accepted", True) is True
        record.notes.append(Note(name, "signal" if accepted else "refusal", who=str(payload.get("who") or "")))
        n = plan.number.get(name, -1)
        if n >= 0 and plan.nodes[n].act is Act.SIGNAL and waits(record, n, name):
            record.results[n] = payload.get("payload")
            record.changed.add(n)
        self._pump(record, states.Signalled(name, accepted))

    def _asked(self, record: Record, action: str, payload: dict[str, Any]) -> None:
        n = record.definition.plan.number[payload["step"]]
        happened = payload.get("happened") is True
        event: states.Event = states.Resolved(n, happened)
        what = f"resolve: {'done' if happened else 'not done'}"
        if action != "resolve":
            event, what = (states.Retried(n) if action == "retry" else states.Skipped(n)), action
        note = Note(payload["step"], what, str(payload.get("reason") or ""), str(payload.get("who") or ""))
        record.notes.append(note)
        self._pump(record, event)

    # ------------------------------------------------------------------------------------- what follows

    def _pump(self, record: Record, first: states.Event) -> None:
        """Let the machine decide, until nothing follows at once any more."""
        plan = record.definition.plan
        events = deque([first])
        while events:
            before = record.state
            record.state, commands = machine.step(plan, before, events.popleft())
            if record.state != before:
                record.touched = True
                changes = list(enumerate(zip(before.steps, record.state.steps, strict=True)))
                # Told in the order in which it happens: back, what is undone comes before what is to be undone next.
                for n, (was, now) in changes[:: -1 if record.state.decision is states.Decision.ABORT else 1]:
                    if was is not now:
                        record.changed.add(n)
                        if stopped(plan.nodes[n], was, now):
                            record.quiet.append(plan.nodes[n].name)
                        if now.state is not was.state and tells(plan.nodes[n], now.state):
                            record.notes.append(Note(plan.nodes[n].name, now.state.value))
            for command in commands:
                event = self._carry_out(record, command)
                if event is not None:
                    events.append(event)
        if record.notes or record.timers:
            record.touched = True

    def _carry_out(self, record: Record, command: states.Command) -> states.Event | None:
        plan = record.definition.plan
        match command:
            case states.Do(n):
                return self._try(record, n, undo=False)
            case states.Undo(n):
                return self._try(record, n, undo=True)
            case states.Recall(n):
                return self._recall(record, n)
            case states.Ring(n, what):
                node, one = plan.nodes[n], record.state.steps[n]
                seconds = node.timeout if what == "timeout" else node.retry.wait(one.tries)
                assert seconds is not None  # noqa: S101 - a timeout is asked for where there is one
                record.timers.append(Timer(node.name, what, one.round, one.tries, seconds))
                if what == "retry":
                    record.intents[n] = None  # it has failed: from now on there is none, until the timer rings
                    record.changed.add(n)
            case states.Refused(reason):
                record.notes.append(Note(None, "refused", reason))
        return None

    def _try(self, record: Record, n: int, *, undo: bool) -> states.Event | None:
        """Try a step's action or compensation. → its outcome if it is known at once."""
        node, step = record.definition.plan.nodes[n], record.definition.steps[n]
        record.touched = True
        record.changed.add(n)
        record.intents[n] = None
        act = node.undo if undo else node.act
        if act is Act.FUNCTION:
            came = self._work.function(record, step, undo=undo)
            if came.verdict is states.Verdict.APPLIED and not undo:
                record.results[n] = came.result
            return self._came(record, n, came)
        came = self._work.payload(record, step) if act is Act.CHILD else self._work.intent(record, step, undo=undo)
        if came.verdict is not states.Verdict.APPLIED:
            return self._came(record, n, came)
        if act is Act.CHILD:
            child = self._child(record, n)
            try:
                intent = Intent.make("saga", "start", str(child), {**came.result, "parent": str(record.id)})
            except Permanent as error:
                return self._came(record, n, Came(states.Verdict.FAILED, error=str(error)))
            record.results[n] = {"saga": str(child)}
        else:
            intent = of_step(came.result.intent, record, node, undo=undo)
            if not undo:
                record.results[n] = came.result.result
        self._appends.append(_Append(intent, record, n))
        return None

    def _came(self, record: Record, n: int, came: Came) -> states.Event:
        one = record.state.steps[n]
        if came.verdict is not states.Verdict.APPLIED:
            name = record.definition.plan.nodes[n].name
            record.errors[n] = came.error
            record.notes.append(Note(name, came.verdict.value, came.error))
        return states.Outcome(n, one.round, one.tries, came.verdict, came.error)

    def _child(self, record: Record, n: int) -> UUID:
        one = record.state.steps[n]
        return uuid5(record.id, f"{n}:{one.round}:{one.tries}")

    def _recall(self, record: Record, n: int) -> states.Event | None:
        """Call back what is in flight. What was not even appended yet is void at once."""
        mine = [a for a in self._appends if a.record is record and a.step == n]
        if mine:
            self._appends.remove(mine[0])
        intent = record.intents[n]
        if mine or intent is None:
            # Not appended yet, or between two tries of the function that makes it.
            one = record.state.steps[n]
            void = states.Outcome(n, one.round, one.tries, states.Verdict.VOID)
            return void if one.state is StepState.RECALLED else None
        if record.definition.plan.nodes[n].act is Act.CHILD:
            child = record.results[n]["saga"]
            asked = {"reason": record.state.reason or "its parent goes back", "who": "its parent"}
            self._appends.append(_Append(Intent.make("saga", "cancel", child, asked)))
        else:
            record.recalled.append(intent)
        return None
