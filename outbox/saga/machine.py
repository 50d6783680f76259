"""The machine: one pure function, `step(plan, saga, event) → (saga, commands)`.

Called by `workers.engine` for each intent that it reads, and by the tests that explore every order of events.
Nothing here knows a database, a clock or the user's code.

* The *decision* is taken once: `open` → `commit` when the pivot is done (or, without a pivot, when everything is), or
  `open` → `abort` when a step failed, timed out or was cancelled.
* What is in flight at a participant is never undone blindly. It is *recalled*: the participant's worker answers
  whether it was applied or is void now. So no compensation overtakes its action, and no action comes after
  its compensation. A late success is recorded, and undone like any other.
* A pivot that is recalled and turns out to be done decides for commit: cancel and timeout have lost the race.
* Compensations run in the reverse order of the DAG. One that keeps failing is `stuck`, and holds only those that stand
  before it.

Whatever doesn't fit the state (a duplicate, an answer to an earlier round) changes nothing.
"""

from __future__ import annotations

from outbox.saga.plan import Act, Kind, Plan
from outbox.saga.states import (
    ENDED,
    Cancelled,
    Command,
    Decision,
    Do,
    Event,
    Outcome,
    Rang,
    Recall,
    Refused,
    Resolved,
    Retried,
    Ring,
    Saga,
    SagaState,
    Signalled,
    Skipped,
    Started,
    Step,
    StepState,
    Undo,
    Verdict,
)  # fmt: skip

_SETTLED = frozenset({StepState.SKIPPED, StepState.FAILED, StepState.UNDONE, StepState.PENDING})
_FLYING = frozenset({StepState.RUNNING, StepState.RECALLED, StepState.UNDOING})
#: Looked at for each step after each event, where the class's attribute costs more than the rest (Python 3.11).
_PENDING = StepState.PENDING
_PASSED = frozenset({StepState.DONE, StepState.SKIPPED})


def begin(plan: Plan) -> Saga:
    """A saga of this plan before its first event."""
    return Saga(SagaState.WAITING, Decision.OPEN, (Step(),) * len(plan.nodes))


def step(plan: Plan, saga: Saga, event: Event) -> tuple[Saga, list[Command]]:
    """What follows from an event."""
    if saga.state in ENDED:
        refusal = isinstance(event, Cancelled | Retried | Skipped | Resolved)
        return saga, [Refused(f"the saga is {saga.state} already")] if refusal else []
    walk = _Walk(plan, saga)
    walk.take(event)
    return walk.result()


class _Walk:
    """One transition in progress."""

    def __init__(self, plan: Plan, saga: Saga) -> None:
        self.plan = plan
        self.state = saga.state
        self.decision = saga.decision
        self.steps = list(saga.steps)
        self.signals = saga.signals
        self.reason = saga.reason
        self.commands: list[Command] = []

    def result(self) -> tuple[Saga, list[Command]]:
        saga = Saga(self.state, self.decision, tuple(self.steps), self.signals, self.reason)
        return saga, self.commands

    # ---------------------------------------------------------------------------------------- the events

    def take(self, event: Event) -> None:  # noqa: C901 - one branch for each event
        match event:
            case Started():
                if self.state is not SagaState.WAITING:
                    return
                self.state = SagaState.RUNNING
            case Cancelled(reason):
                self._cancel(reason)
            case Signalled(name, accepted):
                self._signal(name, accepted)
            case Outcome(n, number, tries, verdict, error):
                if self.steps[n][1:] != (number, tries) or self.steps[n].state not in _FLYING:
                    return
                self._outcome(n, verdict, error)
            case Rang(n, what, number, tries):
                self._rang(n, what, number, tries)
            case Retried(n):
                self._helped(n, skip=False)
            case Skipped(n):
                self._helped(n, skip=True)
            case Resolved(n, happened):
                self._resolved(n, happened=happened)
        if self.state is not SagaState.WAITING:
            self._advance()

    def _cancel(self, reason: str) -> None:
        if self.decision is Decision.COMMIT:
            self.commands.append(Refused("the pivot is done: a saga goes forward from there"))
        elif self.decision is Decision.ABORT:
            self.commands.append(Refused("the saga is compensated already, or on its way there"))
        else:
            if self.state is SagaState.WAITING:
                self.state = SagaState.COMPENSATING
            self._abort(f"cancelled: {reason}")

    def _signal(self, name: str, accepted: bool) -> None:
        n = self.plan.number.get(name)
        if n is None or self.plan.nodes[n].act is not Act.SIGNAL:
            self.commands.append(Refused(f"no step waits for {name!r}"))
        elif self.steps[n].state is StepState.RUNNING:
            if accepted:
                self._set(n, StepState.DONE)
            else:
                self._failed(n, "refused")
        elif self.steps[n].state is StepState.PENDING and not {name, f"-{name}"} & self.signals:
            self.signals |= {name if accepted else f"-{name}"}

    def _outcome(self, n: int, verdict: Verdict, error: str) -> None:
        node, now = self.plan.nodes[n], self.steps[n].state
        if verdict is Verdict.APPLIED:
            self._set(n, StepState.UNDONE if now is StepState.UNDOING else StepState.DONE)
        elif verdict is Verdict.SKIPPED and (now is StepState.UNDOING or node.kind is Kind.RETRIABLE):
            self._set(n, StepState.SKIPPED)
        elif now is StepState.UNDOING:
            self._again(n, error)
        elif now is StepState.RECALLED:
            if verdict is Verdict.UNKNOWN and n == self.plan.pivot:
                self._stuck(n, error)
            else:
                # What may have happened is undone like what has.
                self._set(n, StepState.DONE if verdict is Verdict.UNKNOWN else StepState.FAILED)
                self._lost(error or self.reason)
        elif node.kind is Kind.RETRIABLE or verdict is Verdict.AGAIN:
            self._again(n, error)
        elif verdict is Verdict.UNKNOWN and n == self.plan.pivot:
            self._stuck(n, error)
        elif verdict is Verdict.UNKNOWN:
            self._set(n, StepState.DONE)
            self._abort(f"step {node.name!r} may have happened: {error}")
        else:
            self._failed(n, error)

    def _rang(self, n: int, what: str, number: int, tries: int) -> None:
        node, now = self.plan.nodes[n], self.steps[n]
        if now.round != number:
            return
        if what == "retry" and now.tries == tries and tries:
            if now.state is StepState.RUNNING:
                self.commands.append(Do(n))
            elif now.state is StepState.UNDOING:
                self.commands.append(Undo(n))
        elif what == "timeout" and now.state is StepState.RUNNING:
            if node.act is Act.DELAY:
                self._set(n, StepState.DONE)
            elif node.kind is not Kind.RETRIABLE:
                self._give_up(n, f"step {node.name!r} timed out")

    def _resolved(self, n: int, *, happened: bool) -> None:
        now = self.steps[n].state
        if now is not StepState.STUCK and now not in _FLYING:
            self.commands.append(Refused(f"the step is {now}: only what is under way or stuck can be resolved"))
            return
        if now is not StepState.STUCK:
            # Whatever is still in flight must not happen after somebody said how it was.
            self.commands.append(Recall(n))
        undo = now is StepState.UNDOING or (now is StepState.STUCK and self.decision is Decision.ABORT)
        if happened:
            self._set(n, StepState.UNDONE if undo else StepState.DONE)
        elif undo:
            self._begin(n, StepState.UNDOING)
        elif self.plan.nodes[n].kind is Kind.RETRIABLE:
            self._begin(n, StepState.RUNNING)
        else:
            self._failed(n, "resolved by an operator: it did not happen")

    def _helped(self, n: int, *, skip: bool) -> None:
        now = self.steps[n].state
        if now is not StepState.STUCK:
            self.commands.append(Refused(f"the step is {now}: only a stuck one can be retried or skipped"))
        elif self.decision is Decision.OPEN:
            self.commands.append(Refused("nobody knows whether the pivot is done: resolve it"))
        elif skip:
            self._set(n, StepState.SKIPPED)
        else:
            self._begin(n, StepState.UNDOING if self.decision is Decision.ABORT else StepState.RUNNING)

    # ---------------------------------------------------------------------------------------- what follows

    def _set(self, n: int, state: StepState) -> None:
        self.steps[n] = self.steps[n]._replace(state=state)

    def _begin(self, n: int, state: StepState) -> None:
        node = self.plan.nodes[n]
        self.steps[n] = Step(state, self.steps[n].round + 1)
        if state is StepState.UNDOING:
            self.commands.append(Undo(n))
            return
        if node.timeout is not None:
            self.commands.append(Ring(n, "timeout"))
        if node.has_effect:
            self.commands.append(Do(n))
        elif node.act is Act.SIGNAL and node.name in self.signals:
            self._set(n, StepState.DONE)
        elif node.act is Act.SIGNAL and f"-{node.name}" in self.signals:
            self._failed(n, "refused")

    def _again(self, n: int, error: str) -> None:
        node, tries = self.plan.nodes[n], self.steps[n].tries + 1
        self.steps[n] = self.steps[n]._replace(tries=tries)
        limit = node.retry.attempts
        if limit is None or tries < limit:
            self.commands.append(Ring(n, "retry"))
        elif self.steps[n].state is StepState.RUNNING and node.kind is not Kind.RETRIABLE:
            self._failed(n, f"{error} ({tries} tries)")
        else:
            self._stuck(n, error)

    def _stuck(self, n: int, error: str) -> None:
        self._set(n, StepState.STUCK)
        self.reason = f"step {self.plan.nodes[n].name!r} is stuck: {error}"

    def _failed(self, n: int, error: str) -> None:
        self._set(n, StepState.FAILED)
        self._lost(f"step {self.plan.nodes[n].name!r} failed: {error}")

    def _give_up(self, n: int, reason: str) -> None:
        """A running step has run out of time, or the saga of it."""
        if self.plan.nodes[n].act in (Act.INTENT, Act.CHILD):
            self._set(n, StepState.RECALLED)
            self.commands.append(Recall(n))
            self.reason = reason
        else:
            # A function between two tries, or a wait: nothing is in flight.
            self._set(n, StepState.FAILED)
        if n != self.plan.pivot or self.steps[n].state is StepState.FAILED:
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        if self.decision is Decision.OPEN:
            self._abort(reason)

    def _abort(self, reason: str) -> None:
        pivot = self.plan.pivot
        if pivot is not None and self.steps[pivot].state in (StepState.RUNNING, StepState.RECALLED, StepState.STUCK):
            # The pivot itself decides: everything before it is done, and waits for its answer.
            if self.steps[pivot].state is StepState.RUNNING:
                self._give_up(pivot, reason)
            elif self.steps[pivot].state is StepState.STUCK:
                self.commands.append(Refused("nobody knows whether the pivot is done: resolve it"))
            return
        self.decision = Decision.ABORT
        self.reason = reason
        for n, one in enumerate(self.steps):
            if one.state is StepState.RUNNING:
                self._give_up(n, reason)

    def _advance(self) -> None:
        if self.decision is not Decision.ABORT:
            self._forward()
        if self.decision is Decision.ABORT:
            self._back()

    def _forward(self) -> None:
        pivot = self.plan.pivot
        for n, node in enumerate(self.plan.nodes):
            if n == pivot and self.decision is Decision.OPEN and self.steps[n].state is StepState.DONE:
                self.decision = Decision.COMMIT
                self.reason = ""
            if self.steps[n].state is not _PENDING:
                continue
            if pivot is not None and pivot in self.plan.before[n] and self.decision is Decision.OPEN:
                continue
            for m in node.after:
                if self.steps[m].state not in _PASSED:
                    break
            else:
                self._begin(n, StepState.RUNNING)
                if self.decision is Decision.ABORT:
                    return
        states = {one.state for one in self.steps}
        if states <= _PASSED:
            self.decision, self.state = Decision.COMMIT, SagaState.COMPLETED
        elif StepState.STUCK in states and not states & _FLYING:
            self.state = SagaState.STUCK
        else:
            self.state = SagaState.COMPLETING if self.decision is Decision.COMMIT else SagaState.RUNNING

    def _back(self) -> None:
        for n in reversed(range(len(self.steps))):
            node, one = self.plan.nodes[n], self.steps[n]
            if one.state is StepState.PENDING:
                self._set(n, StepState.SKIPPED)
            elif one.state is StepState.DONE and all(self.steps[m].state in _SETTLED for m in self.plan.next[n]):
                if node.undo is None:
                    self._set(n, StepState.UNDONE)
                else:
                    self._begin(n, StepState.UNDOING)
        states = {one.state for one in self.steps}
        if states <= _SETTLED:
            self.state = SagaState.COMPENSATED
        elif StepState.STUCK in states and not states & _FLYING:
            self.state = SagaState.STUCK
        else:
            self.state = SagaState.COMPENSATING
