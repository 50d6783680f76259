"""The rows of sagas: read and written for a whole batch at a time, in the engine's transaction.

Called by `workers.engine`. What `save` wrote is durable when that transaction commits. Raises `Fenced` when a saga was
changed by somebody else since it was loaded: only the owner of its lane may.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from outbox import sql
from outbox.errors import Fenced
from outbox.saga import machine, states
from outbox.saga.definition import Saga
from outbox.saga.states import Decision, SagaState, StepState
from outbox.sql.array import array, plain


class Note(NamedTuple):
    """Something that happened to a saga beyond the plain way."""

    step: str | None
    what: str
    detail: str = ""
    who: str = ""


class Early(NamedTuple):
    """What came before the start of its saga."""

    #: The intent.
    id: int
    action: str
    #: Its payload, as text.
    body: str


class Timer(NamedTuple):
    """A timer to be set."""

    step: str
    what: str
    round: int
    tries: int
    seconds: float


@dataclass(slots=True, eq=False)
class Record:
    """A saga in the engine's hands: its state, its rows, and what is to be written."""

    id: UUID
    definition: Saga[Any]
    state: states.Saga
    #: The input as JSON text.
    body: str
    key: str | None = None
    parent: UUID | None = None
    parent_intent: int | None = None
    #: Of its row; 0 until it has one.
    revision: int = 0
    #: Per step: its result, its last error, and the intent of its newest try.
    results: list[Any] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    intents: list[int | None] = field(default_factory=list)
    # What is to be written.
    changed: set[int] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)
    quiet: list[str] = field(default_factory=list)
    recalled: list[int] = field(default_factory=list)
    #: Recalled too late: they are done.
    kept: list[int] = field(default_factory=list)
    touched: bool = False
    #: The input as the step functions see it, once they have.
    given: Any = None

    def result(self, name: str) -> Any:
        """What the step of this name left behind."""
        return self.results[self.definition.plan.number[name]]


class Unreadable(NamedTuple):
    """A saga that the deployed code can't continue."""

    name: str
    version: int
    why: str


def blank(definition: Saga[Any], saga: UUID, body: str) -> Record:
    """A saga that begins."""
    count = len(definition.plan.nodes)
    return Record(
        saga, definition, machine.begin(definition.plan), body, results=[None] * count, errors=[""] * count,
        intents=[None] * count, changed=set(range(count)),
    )  # fmt: skip


def load(
    conn: psycopg.Connection[Any], ids: Sequence[UUID], definitions: dict[tuple[str, int], Saga[Any]]
) -> dict[UUID, Record | Unreadable]:
    """The sagas with these ids that exist."""
    found: dict[UUID, Record | Unreadable] = {}
    for row in conn.execute(sql.load("saga_load"), {"ids": list(ids)}):
        saga, name, version, shape, key, state, decision, revision, body, signals, reason, parent, parent_intent = row
        definition = definitions.get((name, version))
        if definition is None:
            found[saga] = Unreadable(name, version, "is not deployed: deploy its definition, see `outbox saga check`")
            continue
        if definition.plan.shape != shape:
            why = "was started with other steps, or another input, than are deployed: see `outbox saga check`"
            found[saga] = Unreadable(name, version, why)
            continue
        begun = states.Saga(SagaState(state), Decision(decision), (), frozenset(signals), reason)
        found[saga] = Record(saga, definition, begun, body, key, parent, parent_intent, revision)
    steps: dict[UUID, list[states.Step]] = {}
    if found:
        for saga, _name, state, number, tries, intent, result, error in conn.execute(
            sql.load("saga_load_steps"), {"ids": list(found)}
        ):
            record = found[saga]
            if isinstance(record, Record):
                steps.setdefault(saga, []).append(states.Step(StepState(state), number, tries))
                record.results.append(None if result is None else json.loads(result))
                record.errors.append(error)
                record.intents.append(intent)
    for saga, several in steps.items():
        record = found[saga]
        assert isinstance(record, Record)  # noqa: S101 - only those have steps here
        record.state = record.state._replace(steps=tuple(several))
    return found


def early(conn: psycopg.Connection[Any], ids: Collection[UUID]) -> dict[UUID, list[Early]]:
    """What has come before the starts of these sagas, in order."""
    found: dict[UUID, list[Early]] = {}
    if ids:
        for number, saga, action, body in conn.execute(sql.load("saga_early"), {"ids": list(ids)}):
            found.setdefault(saga, []).append(Early(number, action, body))
    return found


def keep(conn: psycopg.Connection[Any], kept: Mapping[UUID, Sequence[Early]], taken: Collection[UUID]) -> None:
    """Keep what came too early, and forget what the sagas `taken` have taken along."""
    rows = [(saga, one) for saga, several in kept.items() for one in several]
    if rows:
        conn.execute(
            sql.load("saga_early_put"),
            {
                "id": plain(one.id for _, one in rows),
                "saga": plain(saga for saga, _ in rows),
                "action": array(one.action for _, one in rows),
                "payload": array(one.body for _, one in rows),
            },
        )
    if taken:
        conn.execute(sql.load("saga_early_drop"), {"ids": list(taken)})


def save(conn: psycopg.Connection[Any], records: Iterable[Record]) -> None:
    """Write everything that has changed, in a handful of statements for any number of sagas."""
    touched = [r for r in records if r.touched or r.revision == 0]
    _save_sagas(conn, [r for r in touched if r.revision == 0], [r for r in touched if r.revision])
    # What happened comes before what followed from it, in the order of their times too.
    notes = [(r.id, note) for r in touched for note in r.notes]
    if notes:
        conn.execute(
            sql.load("saga_event_put"),
            {"saga": array(s for s, _ in notes)}
            | {name: array(getattr(n, name) for _, n in notes) for name in Note._fields},
        )
    steps = [(r, n) for r in touched for n in sorted(r.changed)]
    if steps:
        conn.execute(
            sql.load("saga_step_put"),
            {
                "saga": plain(r.id for r, _ in steps),
                "step": array(r.definition.plan.nodes[n].name for r, n in steps),
                "place": plain(n for _, n in steps),
                "state": plain(r.state.steps[n].state.value for r, n in steps),
                "round": plain(r.state.steps[n].round for r, n in steps),
                "tries": plain(r.state.steps[n].tries for r, n in steps),
                "intent": plain(r.intents[n] for r, n in steps),
                "result": array(None if r.results[n] is None else json.dumps(r.results[n]) for r, n in steps),
                "error": array(r.errors[n][:500] for r, n in steps),
            },
        )
    quiet = [(r.id, name) for r in touched for name in r.quiet]
    if quiet:
        conn.execute(
            sql.load("saga_timer_drop"), {"saga": array(s for s, _ in quiet), "step": array(n for _, n in quiet)}
        )
    timers = [(r.id, t) for r in touched for t in r.timers]
    if timers:
        conn.execute(
            sql.load("saga_timer_set"),
            {"saga": array(s for s, _ in timers)}
            | {name: array(getattr(t, name) for _, t in timers) for name in Timer._fields},
        )
    recalled = [intent for r in touched for intent in r.recalled]
    if recalled:
        conn.execute(sql.load("saga_recall"), {"ids": recalled})
    kept = [intent for r in touched for intent in r.kept]
    if kept:
        conn.execute(sql.load("saga_keep"), {"ids": kept})


def _save_sagas(conn: psycopg.Connection[Any], new: Sequence[Record], old: Sequence[Record]) -> None:
    if new:
        conn.execute(
            sql.load("saga_insert"),
            {
                **_common(new),
                "name": array(r.definition.name for r in new),
                "version": plain(r.definition.version for r in new),
                "shape": array(r.definition.plan.shape for r in new),
                "key": array(r.key for r in new),
                "input": array(r.body for r in new),
                "parent": plain(r.parent for r in new),
                "parent_intent": plain(r.parent_intent for r in new),
            },
        )
    if old:
        done = conn.execute(sql.load("saga_update"), {**_common(old), "revision": plain(r.revision for r in old)})
        if done.rowcount != len(old):
            raise Fenced("another engine has changed a saga of this lane: this one stops")


def _common(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "id": plain(r.id for r in records),
        "state": plain(r.state.state.value for r in records),
        "decision": plain(r.state.decision.value for r in records),
        "signals": array(json.dumps(sorted(r.state.signals)) if r.state.signals else "[]" for r in records),
        "reason": array(r.state.reason[:500] for r in records),
        "ended": plain(r.state.state in states.ENDED for r in records),
    }


def publish(conn: psycopg.Connection[Any], definitions: dict[tuple[str, int], Saga[Any]]) -> None:
    """Make the steps of the deployed definitions known to people and to `outbox saga check`."""
    for (name, version), saga in definitions.items():
        plan = saga.plan
        nodes = [
            {
                "step": node.name,
                "act": node.act.value,
                "kind": node.kind.value,
                "after": [plan.nodes[n].name for n in node.after],
                "undo": node.undo is not None,
                "timeout": node.timeout,
            }
            for node in plan.nodes
        ]
        conn.execute(
            sql.load("saga_plan_put"),
            {"name": name, "version": version, "shape": plan.shape, "nodes": json.dumps(nodes)},
        )
