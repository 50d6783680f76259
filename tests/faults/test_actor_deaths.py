"""Workers of actors that are killed by their messages, again and again: only those are given up that did it."""

from __future__ import annotations

import pytest

from tests.fixtures.actors import Stage
from tests.fixtures.site import until

_ALONE = "select count(*) from outbox.parked where id = %s and reason = 'running' and alone"
_BEGUN = "select count(*) from effect where name = 'innocent' and pid = %s"


@pytest.mark.slow
def test_actor_deaths_i2_innocent_is_done_when_a_different_message_kills_its_worker_each_time(stage: Stage) -> None:
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
