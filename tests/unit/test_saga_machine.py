"""Every order of events of small plans: answers early, late, twice and never known, timers, cancel, operators.

The world around the machine is a model: what is in flight, which timers are set, what has happened at the
participants. All of its states are visited, and the promise (I7) is checked in each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest

from outbox.saga import machine as m
from outbox.saga import states as s
from outbox.saga.plan import Act, Kind, Node, Plan, Retry
from outbox.saga.states import Decision, SagaState, StepState, Verdict

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
    signalled: bool = False
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
            yield after(plan, world._replace(signalled=True), s.Signalled(name, accepted))
    if not world.helped:
        for n, step in enumerate(world.saga.steps):
            if step.state is StepState.STUCK:
                yield from help_(plan, world._replace(helped=True), n)


def help_(plan: Plan, world: World, n: int) -> Iterator[World]:
    """What an operator may do about a stuck step; what one says about it is the truth."""
    yield after(plan, world, s.Retried(n))
    yield after(plan, world, s.Skipped(n))
    for happened in (True, False):
        truth = 2 if world.saga.decision is Decision.ABORT and happened else int(happened)
        yield after(plan, world._replace(effects=put(world.effects, n, truth)), s.Resolved(n, happened))


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
    check_duplicates(plan, world.saga)


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
        assert any(one.state is StepState.STUCK for one in saga.steps)


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


@pytest.mark.parametrize("name", PLANS)
def test_machine_i7_ends_either_or_in_every_order_of_events(name: str) -> None:
    # Given: a plan that the linter accepts
    plan = Plan(name, 1, PLANS[name])
    # When: every world that can follow is visited
    first = begin(plan)
    seen, todo = {first}, deque([first])
    ends: set[SagaState] = set()
    while todo:
        world = todo.popleft()
        check(plan, world)
        ends.add(world.saga.state)
        for found in moves(plan, world):
            if found not in seen:
                seen.add(found)
                todo.append(found)
    # Then: the promise held in each of them, and all ends were reached
    assert {SagaState.COMPLETED, SagaState.COMPENSATED, SagaState.STUCK} <= ends
    assert len(seen) > 50
