"""The protocol of lease, epoch, apply and position as a model that can be explored completely.

Workers claim one lane of a participant, apply its intents 1, 2, … and write the position behind each. What may happen
between any two steps: time passes (for one worker's clock more slowly, up to the margin), a worker stands still for
as long as it likes, dies, or is delayed; what it has sent to the participant or to Postgres arrives later, also
after its death. `explore` goes through every state that can be reached, breadth first, and stops at the first that
breaks a promise, with the shortest way there:

    I1  an effect of an intent that isn't committed
    I2  the position has passed an intent that has no effect
    I3  a second effect of an intent, at a participant that keeps its own position
    I4  an effect that arrives after one of a later owner
    I6  a worker believes that the lane is its own, and another has it; a position that goes back
    I10 a state from which the lane can't be drained any more

`Rules` switch single parts of the protocol off; each then has to be found (tests/model/test_lease.py). Run as a program
(`python -m tests.model.lease`) this prints what is found. The product's side of it is `outbox/lane.py`,
`workers/reader.py` and the participants.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

LEASE = 2
"""Units of time that a lease lasts. An owner trusts it for one less: the margin, within which clocks may differ."""


@dataclass(frozen=True)
class Rules:
    """The protocol, and the participant that it is played with."""

    #: epoch: refuses owners before the one that opened it last. own: that, and it stores the position with the effect.
    #: neither: takes whatever arrives.
    participant: Literal["epoch", "own", "neither"] = "epoch"
    workers: int = 2
    intents: int = 2
    #: A position is written only under the current epoch.
    epoch_at_position: bool = True
    #: The participant refuses an epoch lower than it has seen.
    epoch_at_participant: bool = True
    #: An owner stops trusting its lease before the database does.
    margin: bool = True
    #: An owner whose trust is over asks before it goes on.
    asks: bool = True
    #: The position is written when the effect is there, not before.
    apply_first: bool = True
    #: An owner that finds the participant's own position ahead of the lane's writes that down.
    catches_up: bool = True
    #: Messages of dead workers that are on the way at once, at most.
    orphans: int = 1


class Worker(NamedTuple):
    """A process: what it does next, and what it believes."""

    #: out, open, ready, waits (for the answer to its message)
    does: str = "out"
    epoch: int = 0
    #: How far it thinks that the lane is.
    at: int = 0
    #: Units of time that it still trusts its lease.
    trust: int = 0
    #: Whether its clock has fallen behind since the lease was renewed.
    slow: bool = False


class Message(NamedTuple):
    """What a worker has sent and what hasn't arrived."""

    to: str
    epoch: int
    number: int
    #: Who waits for the answer; -1 if it has died.
    sender: int


class State(NamedTuple):
    """Everything. Epochs are ranks: only their order matters, and so the states are finitely many."""

    workers: tuple[Worker, ...]
    flight: tuple[Message, ...] = ()
    committed: int = 0
    #: The lane's row: epoch, owner (-1: none), units of time left of the lease, position.
    epoch: int = 0
    owner: int = -1
    left: int = 0
    position: int = 0
    #: The participant: the highest epoch that opened it, its own position, which intents have an effect, the highest
    #: epoch that made one.
    opened: int = 0
    own: int = 0
    effects: frozenset[int] = frozenset()
    made_by: int = 0


class Step(NamedTuple):
    """What can happen next; `broken` names the promise that it breaks."""

    says: str
    state: State
    broken: str = ""


class Found(NamedTuple):
    """How an exploration ended."""

    states: int
    broken: str
    #: The shortest way to it.
    way: tuple[str, ...]

    def __str__(self) -> str:
        steps = "".join(f"\n  {number}. {says}" for number, says in enumerate(self.way, 1))
        return f"{self.broken or 'nothing is broken'} ({self.states} states){steps}"


def steps(state: State, rules: Rules) -> Iterator[Step]:
    """Everything that can happen in a state."""
    if state.committed < rules.intents:
        yield Step("an intent commits", state._replace(committed=state.committed + 1))
    yield from _time(state, rules)
    for number in range(len(state.workers)):
        yield from _worker(state, number, rules)
    for message in dict.fromkeys(state.flight):
        yield _arrives(state, message, rules)


def _time(state: State, rules: Rules) -> Iterator[Step]:
    """A unit of time passes, for all or for all but one, whose clock is slow by less than the margin."""
    trusting = [n for n, worker in enumerate(state.workers) if worker.trust and not worker.slow]
    if state.left == 0 and not any(worker.trust for worker in state.workers):
        return
    for slow in (-1, *trusting):
        workers = tuple(
            worker._replace(slow=True) if n == slow else worker._replace(trust=max(0, worker.trust - 1))
            for n, worker in enumerate(state.workers)
        )
        says = "time passes" + (f", not for {_name(slow)}'s clock" if slow >= 0 else "")
        yield Step(says, state._replace(workers=workers, left=max(0, state.left - 1)))


def _worker(state: State, number: int, rules: Rules) -> Iterator[Step]:
    """What one worker can do next, or suffer."""
    me, name = state.workers[number], _name(number)
    if me.does == "out":
        if state.owner < 0 or state.left == 0:
            epoch = state.epoch + 1
            lane = state._replace(epoch=epoch, owner=number, left=LEASE)
            yield Step(f"{name} claims the lane", _with(lane, number, Worker("open", epoch, 0, _trust(rules))))
        return
    yield from _dies(state, number, rules)
    if me.trust < _trust(rules) and state.epoch == me.epoch:
        yield Step(f"{name} renews", _renewed(state, number, rules))
    if me.does == "open":
        yield _opens(state, number, rules)
    elif me.does == "ready" and me.at < state.committed:
        yield from _checks(state, number, rules)


def _dies(state: State, number: int, rules: Rules) -> Iterator[Step]:
    """What it has sent last arrives, sooner or later, or was never sent."""
    name = _name(number)
    others = tuple(message for message in state.flight if message.sender != number)
    yield Step(f"{name} dies", _with(state._replace(flight=others), number, Worker()))
    mine = [message._replace(sender=-1) for message in state.flight if message.sender == number]
    if mine and sum(message.sender < 0 for message in others) < rules.orphans:
        flight = tuple(sorted((*others, *mine)))
        yield Step(f"{name} dies, its last message on the way", _with(state._replace(flight=flight), number, Worker()))


def _opens(state: State, number: int, rules: Rules) -> Step:
    me, name = state.workers[number], _name(number)
    if rules.participant != "neither" and rules.epoch_at_participant:
        if me.epoch < state.opened:
            return Step(f"{name} is refused by the participant", _with(state, number, Worker()))
        state = state._replace(opened=me.epoch)
    if rules.participant == "own" and state.own != state.position and rules.catches_up:
        # The owner before has died between the two.
        says = f"{name} opens at {state.own}, and writes that down"
        return _sends(says, _with(state, number, me._replace(at=state.own)), "position", number, state.own)
    at = state.own if rules.participant == "own" else state.position
    return Step(f"{name} opens, and goes on from {at}", _with(state, number, me._replace(does="ready", at=at)))


def _checks(state: State, number: int, rules: Rules) -> Iterator[Step]:
    """Before an effect: is the lane still mine?"""
    me, name = state.workers[number], _name(number)
    to = "participant" if rules.apply_first else "position"
    doing = f"applies {me.at + 1}" if rules.apply_first else f"writes the position {me.at + 1}"
    if me.trust or not rules.asks:
        broken = "" if state.epoch == me.epoch else "I6"
        says = f"{name} trusts its lease, and {doing}"
        yield _sends(says, state, to, number, me.at + 1)._replace(broken=broken)
    elif state.epoch == me.epoch:
        says = f"{name} asks, the lane is still its own, and it {doing}"
        yield _sends(says, _renewed(state, number, rules), to, number, me.at + 1)
    else:
        yield Step(f"{name} asks, and is fenced", _with(state, number, Worker()))


def _arrives(state: State, message: Message, rules: Rules) -> Step:
    flight = list(state.flight)
    flight.remove(message)
    state = state._replace(flight=tuple(flight))
    whose = f"{_name(message.sender)}'s" if message.sender >= 0 else "a dead worker's"
    says = f"{whose} {message.to.replace('participant', 'effect')} {message.number} arrives"
    return (_effect if message.to == "participant" else _position)(state, message, rules, says)


def _effect(state: State, message: Message, rules: Rules, says: str) -> Step:
    fenced = rules.participant != "neither"
    if fenced and rules.epoch_at_participant and message.epoch < state.opened:
        return _refused(state, message, says)
    broken = ""
    if message.number > state.committed:
        broken = "I1"
    elif rules.participant == "own" and message.number in state.effects:
        broken = "I3"
    elif fenced and message.epoch < state.made_by:
        broken = "I4"
    state = state._replace(
        effects=state.effects | {message.number},
        made_by=max(state.made_by, message.epoch),
        own=message.number if rules.participant == "own" else 0,
    )
    if message.sender < 0 or not rules.apply_first:
        return Step(says, _done(state, message), broken)
    # Whatever comes between the answer and the write is as if the write took longer.
    return _sends(says, state, "position", message.sender, message.number)._replace(broken=broken)


def _position(state: State, message: Message, rules: Rules, says: str) -> Step:
    if rules.epoch_at_position and message.epoch != state.epoch:
        return _refused(state, message, says)
    broken = "I6" if message.number < state.position else ""
    state = state._replace(position=message.number)
    if message.sender < 0 or rules.apply_first:
        return Step(says, _done(state, message), broken)
    return _sends(says, state, "participant", message.sender, message.number)._replace(broken=broken)


def lost(state: State) -> bool:
    """Whether the position has passed an intent that has no effect, and none is on its way."""
    coming = {message.number for message in state.flight if message.to == "participant"}
    return bool(set(range(1, state.position + 1)) - state.effects - coming)


def drained(state: State, rules: Rules) -> bool:
    """Whether everything is done and recorded."""
    return state.position == rules.intents and len(state.effects) == rules.intents


def explore(rules: Rules) -> Found:
    """Every state, until a promise is broken. Of states that differ only in who is who, one is looked at."""
    start = State(tuple(Worker() for _ in range(rules.workers)))
    came: dict[object, tuple[object, str]] = {_key(start): (None, "")}
    before: dict[object, list[object]] = {}
    goals: list[object] = []
    queue = deque([start])
    while queue:
        state = queue.popleft()
        key = _key(state)
        if drained(state, rules):
            goals.append(key)
        for step in steps(state, rules):
            after = _ranked(step.state)
            if broken := step.broken or ("I2" if lost(after) else ""):
                return Found(len(came), broken, (*_way(came, key), step.says))
            reached = _key(after)
            before.setdefault(reached, []).append(key)
            if reached not in came:
                came[reached] = (key, step.says)
                queue.append(after)
    stuck = came.keys() - _can_reach(goals, before)
    if stuck:
        return Found(len(came), "I10", _way(came, next(key for key in came if key in stuck)))
    return Found(len(came), "", ())


def _key(state: State) -> object:
    """The state without the names of its workers."""
    each = sorted(
        (worker, number == state.owner, tuple(m[:3] for m in state.flight if m.sender == number))
        for number, worker in enumerate(state.workers)
    )
    return (tuple(each), tuple(m for m in state.flight if m.sender < 0), state.owner < 0, state[2:4], state[5:])


def _can_reach(goals: list[object], before: dict[object, list[object]]) -> set[object]:
    reached, queue = set(goals), deque(goals)
    while queue:
        for key in before.get(queue.popleft(), ()):
            if key not in reached:
                reached.add(key)
                queue.append(key)
    return reached


def _way(came: dict[object, tuple[object, str]], key: object) -> tuple[str, ...]:
    says: list[str] = []
    while (last := came[key])[1]:
        says.append(last[1])
        key = last[0]
    return tuple(reversed(says))


def _name(number: int) -> str:
    return "ABC"[number]


def _trust(rules: Rules) -> int:
    return LEASE - 1 if rules.margin else LEASE


def _with(state: State, number: int, worker: Worker) -> State:
    workers = state.workers
    return state._replace(workers=(*workers[:number], worker, *workers[number + 1 :]))


def _renewed(state: State, number: int, rules: Rules) -> State:
    me = state.workers[number]._replace(trust=_trust(rules), slow=False)
    return _with(state._replace(left=LEASE, owner=number), number, me)


def _sends(says: str, state: State, to: str, sender: int, number: int) -> Step:
    me = state.workers[sender]
    message = Message(to, me.epoch, number, sender)
    sent = state._replace(flight=tuple(sorted((*state.flight, message))))
    return Step(says, _with(sent, sender, me._replace(does="waits")))


def _done(state: State, message: Message) -> State:
    """Whoever has sent it goes on behind it, if it is there."""
    if message.sender < 0:
        return state
    me = state.workers[message.sender]
    return _with(state, message.sender, me._replace(does="ready", at=message.number))


def _refused(state: State, message: Message, says: str) -> Step:
    """Whoever has sent it gives up."""
    after = state if message.sender < 0 else _with(state, message.sender, Worker())
    return Step(f"{says} and is refused", after)


def _ranked(state: State) -> State:
    """The same with its epochs as small as their order allows."""
    used = {state.epoch, state.opened, state.made_by}
    used |= {worker.epoch for worker in state.workers} | {message.epoch for message in state.flight}
    rank = {epoch: n for n, epoch in enumerate(sorted(used | {0}))}
    if rank[max(used)] == max(used):
        return state
    return state._replace(
        epoch=rank[state.epoch],
        opened=rank[state.opened],
        made_by=rank[state.made_by],
        workers=tuple(worker._replace(epoch=rank[worker.epoch]) for worker in state.workers),
        flight=tuple(sorted(message._replace(epoch=rank[message.epoch]) for message in state.flight)),
    )


#: What the protocol is taken apart into, each with the promise that breaks without it.
FAULTS: dict[str, tuple[Rules, str]] = {
    "no epoch in position writes": (Rules(epoch_at_position=False), "I6"),
    "no epoch at the participant": (Rules(epoch_at_participant=False), "I4"),
    "no epoch at a participant with its own position": (Rules("own", epoch_at_participant=False), "I3"),
    "no margin between the clocks": (Rules(margin=False), "I6"),
    "an owner that doesn't ask": (Rules(asks=False), "I6"),
    "position before effect": (Rules(apply_first=False), "I2"),
    "nobody writes down where the participant is": (Rules("own", catches_up=False), "I10"),
}


if __name__ == "__main__":
    for name, (rules, _) in FAULTS.items():
        print(f"{name}: {explore(rules)}\n")
    for participant in ("epoch", "own", "neither"):
        print(f"the protocol, with a participant of the kind {participant}: {explore(Rules(participant))}")
