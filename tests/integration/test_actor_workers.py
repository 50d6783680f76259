"""Workers of actors that come and go, die, are suspended, or lose the database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import dramatiq
import pytest
import sqlalchemy as sa

from tests.fixtures.actors import ROOT, Company, Stage
from tests.fixtures.site import LIMIT, until


def test_actor_i2_killer_is_parked_after_three_deaths_and_others_go_on(stage: Stage) -> None:
    # Given a message that kills its process, among others
    for n in range(10):
        stage.company.note.send(f"a{n}")
    stage.company.deadly.send("killer")
    for n in range(10):
        stage.company.note.send(f"b{n}")
    # When workers are started again and again, as supervisord does it
    for _ in range(3):
        assert stage.start().wait(LIMIT) == -signal.SIGKILL
    stage.start()
    stage.drained()
    # Then it was run three times and is parked, and everything else is done
    ((reason, _attempts, error),) = stage.parked()
    assert (reason, stage.runs("killer")) == ("poison", 3)
    assert "worker died" in error
    assert stage.one("select count(distinct name) from effect where name <> 'killer'") == 20


def test_actor_i6_zombies_acknowledgement_does_nothing_when_another_worker_has_the_message(stage: Stage) -> None:
    # Given a worker that runs a message, and is suspended beyond its lease
    stage.company.waits.send("x", "gate")
    zombie = stage.start()
    until(lambda: stage.runs("x") == 1, "it runs")
    until(lambda: stage.one("select count(*) from outbox.position where cardinality(open) > 0"), "it is claimed")
    zombie.send_signal(signal.SIGSTOP)
    # When another one takes over, and an operator's look finds it there, failed for good
    stage.start(OUTBOX_TTL="15")
    until(lambda: stage.runs("x") == 2, "the other one runs it")
    until(lambda: stage.one("select reason from outbox.parked") == "running", "as its own")
    holder = stage.one("select holder from outbox.parked")
    # And the zombie wakes up, and has its thread through
    zombie.send_signal(signal.SIGCONT)
    stage.open_gate(f"gate/{zombie.pid}")
    zombie.send_signal(signal.SIGTERM)
    assert zombie.wait(LIMIT) == 0
    # Then its acknowledgement was for nothing: the message is still the other one's
    assert stage.one("select holder from outbox.parked where reason = 'running'") == holder
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("x"), stage.parked()) == (2, [])


def test_actor_i2_sigterm_hands_over_what_is_not_begun_and_finishes_what_is(stage: Stage) -> None:
    # Given a worker whose threads are all taken, with more behind
    for n in range(4):
        stage.company.waits.send(f"w{n}", "gate")
    first = stage.start(OUTBOX_TTL="15")
    until(lambda: all(stage.runs(f"w{n}") == 1 for n in range(4)), "all threads are taken")
    for n in range(30):
        stage.company.note.send(f"n{n}")
    # When it is told to end, and another one is there
    first.send_signal(signal.SIGTERM)
    stage.start(OUTBOX_TTL="15")
    # Then the other one has what was not handed out, while the first one still runs
    done = "select count(distinct name) from effect where name like 'n%'"
    until(lambda: stage.one(done) >= 30 - 8, "the others are done elsewhere")
    assert first.poll() is None
    # And what is running is finished where it is, once
    stage.open_gate("gate")
    assert first.wait(LIMIT) == 0
    stage.drained()
    assert stage.one(done) == 30
    assert [stage.runs(f"w{n}") for n in range(4)] == [1] * 4
    assert stage.one("select count(*) from effect") == 34
    assert (stage.parked(), stage.one("select count(*) from outbox.consumer where lease_until < now()")) == ([], 0)


def test_actor_i10_lanes_are_shared_when_a_second_worker_comes(stage: Stage) -> None:
    # Given a worker that has all lanes, and runs something long in one of them
    stage.company.waits.send("long", "gate")
    stage.work()
    until(lambda: stage.runs("long") == 1, "it runs")

    def lanes(company: Company) -> int:
        delivery = company.broker._delivery
        query = "select count(*) from outbox.lane where target = 'actor.default' and owner = %s"
        return 0 if delivery is None else int(stage.one(query, delivery.owner))

    until(lambda: lanes(stage.company) == 4, "it has all lanes")
    # When a second one comes
    second = stage.another()
    stage.work(second)
    # Then each has half of them, the long message goes on where it is, and is run once
    until(lambda: (lanes(stage.company), lanes(second)) == (2, 2), "each has two")
    stage.open_gate("gate")
    stage.drained()
    assert (stage.runs("long"), stage.parked()) == (1, [])


def test_actor_i10_busy_worker_leaves_its_lanes_to_the_others(stage: Stage) -> None:
    # Given two workers, and as many long messages as the first one has hands
    first = stage.work(threads=1)
    for n in range(2):
        stage.company.waits.send(f"w{n}", "gate")
    until(lambda: first.work_queue.qsize() == 1, "both are in its hands")
    second = stage.another()
    stage.work(second)
    # When messages come for all lanes
    for n in range(40):
        stage.company.note.send(f"n{n}")
    # Then the free one does them all, though half of the lanes would be the other's
    done = "select count(*) from effect where name like 'n%'"
    until(lambda: stage.one(done) == 40, "the free one does them")
    stage.open_gate("gate")
    stage.drained()
    # And nothing is left in the hands of the first one, which counts there when a suspect is to be alone
    until(lambda: not stage.company.broker._delivery._estate.out, "nothing is left in its hands")


def test_actor_i2_i3_everything_is_done_once_when_connections_are_lost(stage: Stage) -> None:
    # Given a worker in the middle of many messages
    stage.work()
    for n in range(200):
        stage.company.note.send(f"n{n}")
        if n % 20 == 0:
            # When the database ends its connections, the one that keeps the leases too
            stage.admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'outbox actor%'"
            )
    stage.drained()
    # Then the same process went on with what it had: each message ran once
    assert stage.one("select count(*) from effect") == 200
    assert stage.one("select count(distinct name) from effect") == 200


def test_actor_i3_i6_payment_is_made_once_when_its_worker_was_taken_over(stage: Stage) -> None:
    # Given an actor that has written in its transaction, and is suspended before it can commit
    first = stage.start(OUTBOX_FAILPOINT="actor.claimed:stop")
    stage.company.pay.send("invoice")
    until(lambda: _stopped(first), "it is suspended with the message claimed")
    # When another one takes over and pays
    stage.start(OUTBOX_TTL="15")
    until(lambda: stage.payments() == ["invoice"], "it is paid")
    # And the first one goes on
    first.send_signal(signal.SIGCONT)
    stage.drained()
    first.send_signal(signal.SIGTERM)
    assert first.wait(LIMIT) == 0
    # Then it is paid once
    assert (stage.payments(), stage.parked()) == (["invoice"], [])
    assert stage.one("select count(*) from outbox.receipt") == 0


def test_actor_i3_transaction_is_rolled_back_when_the_message_is_in_other_hands(stage: Stage) -> None:
    # Given an actor in the middle of its transaction
    company, outcome = stage.company, []

    def slow(name: str) -> None:
        try:
            with company.broker.transaction() as session:
                company.ran(name)
                session.execute(sa.text("insert into payment values (:name)"), {"name": name})
                until(lambda: stage.one("select count(*) from gate"), "the gate is open")
        except Exception as error:
            outcome.append(type(error).__name__)
            raise

    dramatiq.actor(broker=company.broker, actor_name="slow", max_retries=0)(slow).send("x")
    stage.work()
    until(lambda: stage.runs("x") == 1, "it runs")
    # When its lanes are taken away from it
    stage.admin.execute(
        "update outbox.lane set epoch = epoch + 1, owner = null, lease_until = null where target like 'actor%'"
    )
    stage.open_gate("gate")
    # Then nothing of the first try is written, and the second one pays
    until(lambda: outcome == ["Fenced"], "the first try is refused")
    stage.drained()
    assert (stage.runs("x"), stage.payments()) == (2, ["x"])


def test_actor_i2_dramatiqs_own_command_line_runs_the_workers(stage: Stage, tmp_path: Path) -> None:
    # Given a module as an application has it
    (tmp_path / "shop.py").write_text(
        "import dramatiq, psycopg, os\n"
        "from outbox.actor import OutboxBroker\n"
        "dramatiq.set_broker(OutboxBroker())\n"
        "@dramatiq.actor\n"
        "def note(name):\n"
        "    with psycopg.connect(os.environ['OUTBOX_DATABASE'], autocommit=True) as conn:\n"
        "        conn.execute('insert into effect values (%s, %s)', (name, os.getpid()))\n"
    )
    for n in range(20):
        stage.company.note.send(f"n{n}")
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": stage.urls["app"],
        "OUTBOX_ACTOR_DATABASE": stage.urls["actor"],
        "OUTBOX_STATE": str(tmp_path / "none"),
        "PYTHONPATH": str(ROOT),
    }
    # When dramatiq runs it, with two processes
    command = [sys.executable, "-m", "dramatiq", "shop", "-p", "2", "-t", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        stage.drained()
        assert stage.one("select count(distinct name) from effect") == 20
        # Then it ends when it is told to, and gives everything back
        process.terminate()
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
    assert stage.one("select count(*) from outbox.lane where target like 'actor%' and owner is not null") == 0
    assert stage.one("select count(*) from outbox.consumer") == 0


def _stopped(process: subprocess.Popen[bytes]) -> bool:
    stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii", errors="replace")
    return stat.rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("name", ["actor.claimed", "actor.recorded"])
def test_actor_i2_i3_i11_everything_comes_true_when_killed_at(stage: Stage, name: str) -> None:
    stage.traffic()
    stage.survive(name)
