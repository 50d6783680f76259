"""Every order of events of small plans: answers early, late, twice and never known, timers, cancel, operators.

The world around the machine is a model: what is in flight, which timers are set, what has happened at the
participants. All of its states are visited, and the promise (I7) is checked in each.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest

from outbox.saga import machine as m
from outbox.saga import states as s
from outbox.saga.plan import Act, Kind, Node, Plan, Retry, lint
from outbox.saga.states import Decision, SagaState, StepState, Verdict
from tests.docs.pages import DOCS, sections

TWICE = Retry(attempts=2)


def node(name: str, *after: int, act: Act = Act.INTENT, kind: Kind = Kind.COMPENSATABLE, **more: object) -> Node:
    undo = act if kind is Kind.COMPENSATABLE and act not in (Act.SIGNAL, Act.DELAY) else None
    return Node(name, act, kind, after, undo, TWICE, **more)  # type: ignore[arg-type]


def retriable(name: str, *after: int) -> Node:
    return Node(name, Act.INTENT, Kind.RETRIABLE, after, None, TWICE)


PLANS = {
    "two in a row": (node("a"), node("b", 0)),
    "pivot": (node("a"), node("p", 0, kind=Kind.PIVOT), retriable("r", 1)),
    "parallel": (node("a"), node("b"), node("c", 0, 1, kind=Kind.PIVOT)),
    "diamond": (node("a"), node("b", 0, timeout=1.0), node("c", 0), node("d", 1, 2)),
    "functions": (node("a", act=Act.FUNCTION), node("b", 0), node("c", 1, act=Act.FUNCTION)),
    "pivot with a timeout": (node("a"), node("p", 0, kind=Kind.PIVOT, timeout=1.0), retriable("r", 1)),
    "approval": (node("a"), node("ok", 0, act=Act.SIGNAL, timeout=1.0), node("p", 1, kind=Kind.PIVOT)),
    "function as the pivot": (node("a"), node("p", 0, act=Act.FUNCTION, kind=Kind.PIVOT, timeout=9.0)),
    "delay": (node("a", timeout=1.0), node("wait", 0, act=Act.DELAY, timeout=1.0), node("b", 1)),
}


class Flight(NamedTuple):
    """A try under way at a participant."""

    step: int
    undo: bool
    round: int
    tries: int
    recalled: bool = False


class World(NamedTuple):
    """A saga, and everything around it."""

    saga: s.Saga
    flights: frozenset[Flight]
    timers: frozenset[tuple[int, str, int, int]]
    #: Per step: 0 not happened, 1 happened, 2 happened and undone.
    effects: tuple[int, ...]
    cancelled: bool = False
    #: The name of the signal that came, with a minus before it if it refused.
    signalled: str = ""
    helped: bool = False


def begin(plan: Plan) -> World:
    world = World(m.begin(plan), frozenset(), frozenset(), (0,) * len(plan.nodes))
    return after(plan, world, s.Started())


def after(plan: Plan, world: World, event: s.Event) -> World:
    saga, commands = m.step(plan, world.saga, event)
    flights, timers = set(world.flights), set(world.timers)
    for command in commands:
        match command:
            case s.Do(n) | s.Undo(n):
                one = saga.steps[n]
                undo = isinstance(command, s.Undo)
                same = [f for f in flights if f.step == n]
                assert not same, f"two tries of one step at a time: {same}"
                if undo:
                    check_undo(plan, saga, world, n)
                if not isinstance(event, s.Rang):
                    # A try has a name of its own, or its answer could be taken for that of another one.
                    assert one[1:] > world.saga.steps[n][1:], "a try is named like an earlier one"
                flights.add(Flight(n, undo, one.round, one.tries))
            case s.Recall(n):
                flights = {f._replace(recalled=True) if f.step == n else f for f in flights}
            case s.Ring(n, what):
                timers.add((n, what, saga.steps[n].round, saga.steps[n].tries))
    return world._replace(saga=saga, flights=frozenset(flights), timers=frozenset(timers))


def check_undo(plan: Plan, saga: s.Saga, world: World, n: int) -> None:
    """A compensation begins only when everything after the step is undone or has never happened."""
    assert saga.decision is Decision.ABORT
    for later, before in enumerate(plan.before):
        if n in before:
            assert saga.steps[later].state in m._SETTLED, (plan.nodes[n].name, saga)
            # Left out by an operator: then it is for people to know.
            if saga.steps[later].state is not StepState.SKIPPED:
                assert world.effects[later] != 1


def moves(plan: Plan, world: World) -> Iterator[World]:
    """Every world that may come next."""
    inline = [f for f in world.flights if plan.nodes[f.step].act is Act.FUNCTION]
    for flight in inline or world.flights:
        yield from answers(plan, world, flight)
    if inline:
        return
    for timer in world.timers:
        rung = world._replace(timers=world.timers - {timer})
        yield after(plan, rung, s.Rang(*timer))
    if not world.cancelled:
        yield after(plan, world._replace(cancelled=True), s.Cancelled("why"))
    if not world.signalled:
        for name, accepted in product([one.name for one in plan.nodes if one.act is Act.SIGNAL], (True, False)):
            came = world._replace(signalled=name if accepted else f"-{name}")
            yield after(plan, came, s.Signalled(name, accepted))
    if not world.helped:
        for n in range(len(plan.nodes)):
            yield from decisions(plan, world._replace(helped=True), n)


def decisions(plan: Plan, world: World, n: int) -> Iterator[World]:
    """What an operator may do about a step."""
    state = world.saga.steps[n].state
    if state is StepState.STUCK:
        yield from help_(plan, world, n)
    elif state in m._FLYING and plan.nodes[n].act is Act.INTENT:
        yield from resolve(plan, world, n)
        yield from left_out(plan, world, n)


def help_(plan: Plan, world: World, n: int) -> Iterator[World]:
    """What an operator may do about a stuck step; what one says about it is the truth."""
    yield after(plan, world, s.Retried(n))
    yield after(plan, world, s.Skipped(n))
    for happened in (True, False):
        truth = 2 if world.saga.decision is Decision.ABORT and happened else int(happened)
        yield after(plan, world._replace(effects=put(world.effects, n, truth)), s.Resolved(n, happened))


def resolve(plan: Plan, world: World, n: int) -> Iterator[World]:
    """What an operator may say about a step that is under way: then what is in flight must not happen any more."""
    rest = world._replace(flights=frozenset(f for f in world.flights if f.step != n))
    undo = world.saga.steps[n].state is StepState.UNDOING
    for happened in (True, False):
        event = s.Resolved(n, happened)
        assert s.Recall(n) in m.step(plan, world.saga, event)[1], "it may still happen"
        effect = (2 if undo else 1) if happened else int(undo)
        yield after(plan, rest._replace(effects=put(rest.effects, n, effect)), event)


def left_out(plan: Plan, world: World, n: int) -> Iterator[World]:
    """An operator skips the parked intent of a step that can't fail: whatever it has done, it is left out."""
    flight = next((f for f in world.flights if f.step == n), None)
    if flight is not None and (flight.undo or plan.nodes[n].kind is Kind.RETRIABLE):
        rest = world._replace(flights=world.flights - {flight})
        yield after(plan, rest, s.Outcome(n, flight.round, flight.tries, Verdict.SKIPPED, "skipped by an operator"))


def put(effects: tuple[int, ...], n: int, value: int) -> tuple[int, ...]:
    return (*effects[:n], value, *effects[n + 1 :])


def answers(plan: Plan, world: World, flight: Flight) -> Iterator[World]:
    n = flight.step
    function = plan.nodes[n].act is Act.FUNCTION
    rest = world._replace(flights=world.flights - {flight})
    happened = 2 if flight.undo else 1
    verdicts: list[tuple[Verdict, int]] = [(Verdict.APPLIED, happened), (Verdict.FAILED, world.effects[n])]
    if function:
        verdicts.append((Verdict.AGAIN, world.effects[n]))
    else:
        verdicts += [(Verdict.UNKNOWN, world.effects[n]), (Verdict.UNKNOWN, happened)]
    if flight.recalled:
        verdicts.append((Verdict.VOID, world.effects[n]))
    if not function and not world.helped and (flight.undo or plan.nodes[n].kind is Kind.RETRIABLE):
        # An operator leaves it out, at its participant: then it is for people to know.
        skipped = s.Outcome(n, flight.round, flight.tries, Verdict.SKIPPED, "error")
        yield after(plan, rest._replace(helped=True), skipped)
    for verdict, effect in verdicts:
        event = s.Outcome(n, flight.round, flight.tries, verdict, "error")
        yield after(plan, rest._replace(effects=put(rest.effects, n, effect)), event)


def check(plan: Plan, world: World) -> None:
    check_progress(plan, world)
    check_promise(plan, world)
    check_signals(plan, world)


def check_progress(plan: Plan, world: World) -> None:
    """It never hangs: with nothing under way, it has ended, or says what it is stuck at."""
    saga = world.saga
    running = {n for n, one in enumerate(saga.steps) if one.state is StepState.RUNNING}
    timed = any(what == "retry" or n in running for n, what, *_ in world.timers)
    waits = any(plan.nodes[n].act is Act.SIGNAL for n in running)
    if not (world.flights or timed or waits):
        assert saga.state in (*s.ENDED, SagaState.STUCK), saga
    if saga.state is SagaState.STUCK:
        assert saga.reason
        assert not any(one.state in m._FLYING for one in saga.steps), "stuck, and something goes on by itself"
        assert any(one.state is StepState.STUCK for one in saga.steps)


def check_signals(plan: Plan, world: World) -> None:
    """A signal counts, whether it came before its step or after."""
    for node, one in zip(plan.nodes, world.saga.steps, strict=True):
        if node.act is Act.SIGNAL:
            if one.state is StepState.RUNNING:
                assert not world.signalled, "it waits for what has come"
            if one.state is StepState.DONE:
                assert world.signalled == node.name


def check_promise(plan: Plan, world: World) -> None:
    """Completed or compensated, never both; what an operator left out is for people to know."""
    saga = world.saga
    by_hand = {n for n, one in enumerate(saga.steps) if world.helped and one.state is StepState.SKIPPED}
    effects = {n: world.effects[n] for n, one in enumerate(plan.nodes) if one.has_effect and n not in by_hand}
    if saga.state is SagaState.COMPLETED:
        assert saga.decision is Decision.COMMIT
        assert set(effects.values()) <= {1}, world
    if saga.state is SagaState.COMPENSATED:
        assert saga.decision is Decision.ABORT
        assert 1 not in effects.values(), world
    if saga.decision is Decision.COMMIT:
        assert 2 not in world.effects, "undone after the decision to go forward"


def check_duplicates(plan: Plan, saga: s.Saga) -> None:
    """Whatever was answered already changes nothing when it comes again, however late."""
    for n, one in enumerate(saga.steps):
        for number, tries, verdict in product(range(1, one.round + 1), range(2), Verdict):
            if one.state not in m._FLYING or (number, tries) != (one.round, one.tries):
                assert m.step(plan, saga, s.Outcome(n, number, tries, verdict)) == (saga, []), (n, number, tries)
        for number, tries in product(range(1, one.round + 1), range(3)):
            if number < one.round or tries != one.tries:
                assert m.step(plan, saga, s.Rang(n, "retry", number, tries)) == (saga, []), (n, number, tries)
            if number < one.round:
                assert m.step(plan, saga, s.Rang(n, "timeout", number)) == (saga, []), (n, number)


def explore(plan: Plan) -> Iterator[World]:
    """Every world that can follow, once."""
    first = begin(plan)
    seen, todo = {first}, deque([first])
    while todo:
        world = todo.popleft()
        yield world
        for found in moves(plan, world):
            if found not in seen:
                seen.add(found)
                todo.append(found)


@pytest.mark.parametrize("name", PLANS)
def test_machine_i7_ends_either_or_in_every_order_of_events(name: str) -> None:
    # Given: a plan that the linter accepts
    plan = Plan(name, 1, PLANS[name])
    assert lint(plan) == []
    # When: every world that can follow is visited
    count = 0
    ends: set[SagaState] = set()
    sagas: set[s.Saga] = set()
    for world in explore(plan):
        check(plan, world)
        if world.saga not in sagas:
            sagas.add(world.saga)
            check_duplicates(plan, world.saga)
        ends.add(world.saga.state)
        count += 1
    # Then: the promise held in each of them, and all ends were reached
    assert {SagaState.COMPLETED, SagaState.COMPENSATED, SagaState.STUCK} <= ends
    assert count > 50


@pytest.mark.parametrize("name", PLANS)
def test_machine_i7_does_nothing_while_a_saga_waits_for_its_locks(name: str) -> None:
    plan = Plan(name, 1, PLANS[name])
    waits = m.begin(plan)
    events: list[s.Event] = [s.Signalled("ok"), s.Signalled("ok", accepted=False)]
    for n in range(len(plan.nodes)):
        events += [s.Outcome(n, 0, 0, Verdict.APPLIED), s.Rang(n, "timeout", 0), s.Rang(n, "retry", 0, 1)]
        events += [s.Retried(n), s.Skipped(n), s.Resolved(n, happened=True)]
    for event in events:
        saga, commands = m.step(plan, waits, event)
        assert saga._replace(signals=frozenset()) == waits, event
        assert all(isinstance(command, s.Refused) for command in commands), event


# ------------------------------------------------------------------------------------------------ pictures


class Watched(list[s.Step]):
    """The steps of a transition, which note each change of a state."""

    def __init__(self, steps: list[s.Step], arrows: set[tuple[str, str]]) -> None:
        super().__init__(steps)
        self._arrows = arrows

    def __setitem__(self, n: Any, step: Any) -> None:
        if self[n].state is not step.state:
            self._arrows.add((self[n].state.value, step.state.value))
        super().__setitem__(n, step)


def arrows_of_the_page(heading: str) -> set[tuple[str, str]]:
    (picture,) = re.findall(r"```mermaid\n(.*?)```", sections(DOCS / "explanation/states.md", 2)[heading], re.DOTALL)
    return set(re.findall(r"^ *(\S+) --> ([^\s:]+)", picture, re.MULTILINE))


def test_states_machine_goes_every_way_in_the_pictures_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given: a machine that notes every change of a state, of a saga and of its steps
    of_sagas: set[tuple[str, str]] = {("[*]", "waiting"), ("[*]", "running")}
    of_steps: set[tuple[str, str]] = {("[*]", "pending")}

    class Watching(m._Walk):
        def __init__(self, plan: Plan, saga: s.Saga) -> None:
            super().__init__(plan, saga)
            self.steps = Watched(self.steps, of_steps)
            self.was = saga.state

        def result(self) -> tuple[s.Saga, list[s.Command]]:
            saga, commands = super().result()
            if saga.state is not self.was:
                of_sagas.add((self.was.value, saga.state.value))
            return saga, commands

    monkeypatch.setattr(m, "_Walk", Watching)
    # When: every order of events is gone through, and one in which it is cancelled while it waits for its locks
    for name, nodes in PLANS.items():
        plan = Plan(name, 1, nodes)
        m.step(plan, m.begin(plan), s.Cancelled("why"))
        for world in explore(plan):
            if world.saga.state in s.ENDED:
                of_sagas.add((world.saga.state.value, "[*]"))
                of_steps |= {(step.state.value, "[*]") for step in world.saga.steps}
    # Then: those are the arrows of the pictures
    assert arrows_of_the_page("A saga") == of_sagas
    assert arrows_of_the_page("A step") == of_steps
