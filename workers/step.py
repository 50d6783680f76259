"""The engine's small questions: whose an intent is, what a step's looks like, what a change of a step means.

Called by `workers.drive`. Pure functions, of values that it has in hand.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from outbox.intent import Intent, payload_text
from outbox.saga import states
from outbox.saga.plan import Act, Node
from outbox.saga.states import SagaState, StepState
from outbox.saga.store import Record
from workers.reporter import RETRY

_TOLD = frozenset({StepState.RECALLED, StepState.UNDOING, StepState.UNDONE, StepState.STUCK})
"""States that a saga's record tells of: its step's row keeps but one."""


def of_step(intent: Intent, record: Record, node: Node, *, undo: bool) -> Intent:
    """The intent of a step, as it goes into the log: it says how often it is tried, if the step does."""
    headers = intent.headers
    if node.patience is not None and not undo:
        said = {} if headers is None else json.loads(headers)
        headers = json.dumps({**said, RETRY: node.patience.backoff.text})
    return intent._replace(saga=record.id, headers=headers)


def check_signal(payload: dict[str, Any]) -> None:
    """Whether a signal is one. Raises `Permanent`, `KeyError`; what can't be stored would fail the whole batch."""
    _ = payload["name"]
    payload_text(payload.get("payload"))


def waits(record: Record, n: int, name: str) -> bool:
    """Whether a signal is the first that its step gets."""
    came = {name, f"-{name}"} & record.state.signals
    return not came and record.state.steps[n].state in (StepState.PENDING, StepState.RUNNING)


def tells(node: Node, state: StepState) -> bool:
    """Whether people want to know: of a wait that is undone there is nothing to tell."""
    return state in _TOLD and not (state is StepState.UNDONE and node.undo is None)


def stopped(node: Node, was: states.Step, now: states.Step) -> bool:
    """Whether a timeout that was set means nothing any more."""
    timed = node.timeout is not None and node.act is not Act.DELAY
    return timed and was.state is StepState.RUNNING and now.state is not StepState.RUNNING


def saga_id(key: str) -> UUID | None:
    try:
        return UUID(key)
    except ValueError:
        return None


def report(child: Record) -> Intent:
    """What a parent is told when its child has ended."""
    verdict = "applied" if child.state.state is SagaState.COMPLETED else "failed"
    payload = {"intent": child.parent_intent, "verdict": verdict, "error": child.state.reason[:500]}
    return Intent.make("saga", "outcome", str(child.parent), payload)
