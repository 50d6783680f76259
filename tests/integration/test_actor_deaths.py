"""Messages that were in hand when their worker died: who did it is found out, and nobody else is given up."""

from __future__ import annotations

import pytest

from tests.fixtures.actors import Stage
from tests.fixtures.site import until
from workers.actor import quarantine
from workers.actor.quarantine import ALONE_MOST, QUIET_AGAIN, QUIET_WITHIN, Quarantine, Step

DEADLY = "its worker died while it was in hand"


_ALONE = "select count(*) from outbox.parked where id = %s and reason = 'running' and alone"
_BEGUN = "select count(*) from effect where name = 'innocent' and pid = %s"


def test_actor_i2_innocent_is_done_when_a_different_message_kills_its_worker_each_time(stage: Stage) -> None:
    # Given a message that takes long, and workers that are started again when they have died, as by supervisord
    stage.company.waits.send("innocent", "gate")
    number = stage.one("select max(id) from outbox.log")
    workers, killers = [stage.start()], 0

    def supervise() -> bool:
        if workers[-1].poll() is not None:
            workers.append(stage.start())
        return False

    # When another killer comes as soon as it runs, each time, until it is tried alone
    met: set[int] = set()

    def alone() -> bool:
        nonlocal killers
        supervise()
        if stage.one(_ALONE, number):
            return True
        pid = workers[-1].pid
        if pid not in met and stage.one(_BEGUN, pid):
            met.add(pid)
            killers += 1
            stage.company.deadly.send(f"killer {killers}")
        return False

    until(alone, "it is tried alone")
    until(lambda: stage.one(_BEGUN, workers[-1].pid), "it runs")
    # And yet another one
    killers += 1
    stage.company.deadly.send(f"killer {killers}")
    last = stage.one("select max(id) from outbox.log")
    until(lambda: stage.one("select count(*) from outbox.tick where high >= %s", last), "workers could see it")
    assert workers[-1].poll() is None
    # Then that one waits until the first is done
    stage.open_gate("gate")
    poison = "select count(*) from outbox.parked where reason = 'poison'"
    until(lambda: supervise() or stage.one(poison) == killers, "the killers are given up")
    stage.drained()
    assert stage.one("select count(*) from outbox.parked where id = %s", number) == 0
    # And each of them was tried three times, the last time alone
    assert [stage.runs(f"killer {n + 1}") <= 3 for n in range(killers)] == [True] * killers
    assert stage.one("select min(deaths) from outbox.parked where alone") == 3


def test_actor_i10_others_go_on_when_a_suspect_runs_for_long(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a message that was in hand twice when its worker died, and takes long
    monkeypatch.setattr(quarantine, "ALONE_MOST", 0.5)
    _suspect(stage, "suspect", deaths=2)
    stage.work()
    until(lambda: stage.runs("suspect") == 1, "it runs")
    assert stage.one("select alone from outbox.parked where reason = 'running'") in (True, False)
    # When another one comes
    stage.company.note.send("other")
    # Then it is done meanwhile, and if the worker died now, that would not be held against the first
    until(lambda: stage.runs("other") == 1, "the other one runs")
    assert stage.admin.execute("select reason, deaths, alone from outbox.parked").fetchall() == [("running", 3, False)]
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("suspect"), stage.parked()) == (1, [])


def test_actor_i10_suspect_is_tried_among_others_when_something_long_is_running(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that runs something long
    monkeypatch.setattr(quarantine, "QUIET_WITHIN", 0.5)
    stage.work()
    stage.company.waits.send("long", "gate")
    until(lambda: stage.runs("long") == 1, "it runs")
    # When there is a message that was in hand twice when its worker died
    _suspect(stage, "suspect", deaths=2)
    # Then it is tried all the same, and others after it; a death would not be held against it
    until(lambda: stage.runs("suspect") == 1, "it is tried")
    stage.company.note.send("other")
    until(lambda: stage.runs("other") == 1, "others go on")
    found = stage.admin.execute("select reason, deaths, alone from outbox.parked").fetchall()
    assert found == [("running", 3, False)]
    stage.open_gate("gate")
    stage.drained()
    assert stage.parked() == []


@pytest.mark.parametrize(
    ("deaths", "alone", "given_up"), [(3, True, True), (3, False, False), (9, False, False), (10, False, True)]
)
def test_actor_i2_message_is_given_up_when_it_died_alone_or_very_often(
    stage: Stage, deaths: int, alone: bool, given_up: bool
) -> None:
    # Given a message that was in hand so often when its worker died
    stage.open_gate("gate")
    _suspect(stage, "suspect", deaths=deaths, alone=alone)
    # When a worker looks at it
    stage.work()
    stage.drained()
    # Then it is parked for good, with the reason; or tried again, and done
    assert stage.runs("suspect") == (0 if given_up else 1)
    assert [(reason, "worker died" in error) for reason, _, error in stage.parked()] == [("poison", True)] * given_up


def _suspect(stage: Stage, name: str, *, deaths: int, alone: bool = False) -> None:
    """A message that is parked as one that was in hand when its worker died."""
    stage.company.waits.send_with_options(args=(name, "gate"), delay=24 * 3600 * 1000)
    if not stage.working:
        worker = stage.work()
        until(stage.parked, "it is parked")
        stage.forget(worker)
        worker.stop()
    until(lambda: stage.one("select count(*) from outbox.parked where reason = 'due'") == 1, "it is parked")
    stage.admin.execute(
        "update outbox.parked set reason = 'retry', deaths = %s, alone = %s, error = %s, retry_at = now()"
        " where reason = 'due'",
        (deaths, alone, DEADLY),
    )


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def closed(room: Quarantine) -> bool:
    return room.closed


def test_actor_quarantine_waits_until_nothing_is_in_hand_and_not_for_ever() -> None:
    # Given a suspect that waits, and others that are in hand
    clock = Clock()
    room = Quarantine(clock)
    assert room.step(wanted=True, in_hand=3, suspects=0) is Step.WAIT
    assert closed(room)
    # When they are done, it is tried alone
    assert room.step(wanted=True, in_hand=0, suspects=0) is Step.ALONE
    # When they aren't for too long, everything goes on, and it is tried among them, one at a time
    clock.now += QUIET_WITHIN + 1
    assert room.step(wanted=True, in_hand=3, suspects=0) is Step.OPEN
    assert not closed(room)
    assert room.step(wanted=True, in_hand=3, suspects=0) is Step.AMONG
    assert room.step(wanted=True, in_hand=3, suspects=1) is Step.OPEN
    # And a quiet moment is waited for again after a while
    clock.now += QUIET_AGAIN
    assert room.step(wanted=True, in_hand=3, suspects=0) is Step.WAIT
    # And no longer than it is wanted
    assert room.step(wanted=False, in_hand=3, suspects=0) is Step.OPEN
    assert not closed(room)


def test_actor_quarantine_keeps_a_suspect_alone_until_it_is_done_and_not_for_ever() -> None:
    # Given a suspect that is tried alone
    clock = Clock()
    room = Quarantine(clock)
    room.begin(object())  # type: ignore[arg-type]
    # When it runs, nothing else is taken, for a while
    assert room.step(wanted=True, in_hand=1, suspects=1) is Step.WAIT
    clock.now += ALONE_MOST + 1
    assert room.step(wanted=True, in_hand=1, suspects=1) is Step.JOIN
    room.end()
    assert room.message is None
    # When it is done, the next one is tried
    room.begin(object())  # type: ignore[arg-type]
    assert room.step(wanted=True, in_hand=0, suspects=0) is Step.ALONE
    assert room.step(wanted=False, in_hand=0, suspects=0) is Step.OPEN
