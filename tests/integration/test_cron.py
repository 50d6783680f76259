"""Schedules: each slot's message is sent once, whoever looks, and whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from typing import Any

import dramatiq
import psycopg
import pytest
from dramatiq import Worker
from dramatiq.middleware import Middleware, MiddlewareError

from outbox.actor import Cron
from outbox.cli import main
from tests.fixtures.actors import ROOT, Stage
from tests.fixtures.cron import BEGIN, Clerk, Town, url_at
from tests.fixtures.site import LIMIT, until


def _run(command: list[str], environment: dict[str, str]) -> int:
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=LIMIT, check=False).returncode


def test_cron_i3_slot_is_sent_once_when_several_processes_look(town: Town) -> None:
    # Given two processes with the same schedule, for every five minutes
    one, two = town.clerk(), town.clerk()
    assert [one.look(0), two.look(1), one.look(4.9)] == [0, 0, 0]
    # When a slot comes, then one of them sends
    assert [one.look(5), two.look(5.1), one.look(6), two.look(10), one.look(10)] == [1, 0, 0, 1, 0]
    assert town.slots() == ["12:05", "12:10"]


def test_cron_i3_each_slot_is_sent_once_when_processes_look_at_the_same_time(town: Town) -> None:
    # Given a schedule for each minute that is to be made up for, and an hour without a worker
    town.clerk(Cron("* * * * *", missed="all")).look(0)
    clerks = [town.clerk(Cron("* * * * *", missed="all")) for _ in range(4)]
    # When several look at once
    barrier, counts = threading.Barrier(len(clerks)), []

    def look(clerk: Clerk) -> None:
        barrier.wait(LIMIT)
        counts.append(clerk.look(60))

    threads = [threading.Thread(target=look, args=(clerk,)) for clerk in clerks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Then each minute is sent once, in order
    assert town.slots() == [f"12:{n:02}" for n in range(1, 60)] + ["13:00"]
    assert sum(counts) == 60


@pytest.mark.parametrize("name", ["cron.sending", "cron.sent"])
def test_cron_i1_i2_i3_i11_each_slot_is_sent_once_when_killed_at(town: Town, name: str) -> None:
    # Given an hour without a worker
    town.clerk(Cron("*/10 * * * *", missed="all")).look(0)
    # When processes die while they send for it
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": town.urls["app"],
        "OUTBOX_ACTOR_DATABASE": url_at(town.urls["actor"], BEGIN + timedelta(hours=1)),
        "OUTBOX_STATE": "/nowhere",
    }
    command = [sys.executable, "-m", "tests.fixtures.cron", "*/10 * * * *", "all"]
    for _ in range(2):
        assert _run(command, {**environment, "OUTBOX_FAILPOINT": name}) == -signal.SIGKILL
    assert len(town.slots()) == (0 if name == "cron.sending" else 2)
    # Then the next one sends for what is left, once
    assert _run(command, environment) == 0
    assert town.slots() == ["12:10", "12:20", "12:30", "12:40", "12:50", "13:00"]


def test_cron_declared_when_a_process_is_killed_right_after(town: Town) -> None:
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": town.urls["app"],
        "OUTBOX_ACTOR_DATABASE": url_at(town.urls["actor"], BEGIN),
        "OUTBOX_STATE": "/nowhere",
        "OUTBOX_FAILPOINT": "cron.declared",
    }
    command = [sys.executable, "-m", "tests.fixtures.cron", "*/5 * * * *", "once"]
    assert _run(command, environment) == -signal.SIGKILL
    assert town.clerk().look(6) == 1
    assert town.slots() == ["12:05"]


@pytest.mark.parametrize(
    ("missed", "expected"), [("once", ["13:00"]), ("skip", []), ("all", [f"12:{n}0" for n in range(1, 6)] + ["13:00"])]
)
def test_cron_missed_slots_are_sent_as_the_schedule_says(town: Town, missed: Any, expected: list[str]) -> None:
    # Given a schedule, and workers that were away for an hour and more
    town.clerk(Cron("*/10 * * * *", missed=missed)).look(0)
    clerk = town.clerk(Cron("*/10 * * * *", missed=missed))
    # When they are back
    clerk.look(65)
    # Then those are sent, and the next one at its time
    assert town.slots() == expected
    assert [clerk.look(65), clerk.look(70)] == [0, 1]
    assert town.slots() == [*expected, "13:10"]


def test_cron_nothing_is_made_up_for_when_a_schedule_is_new_or_its_times_have_changed(town: Town) -> None:
    # Given a schedule that was declared for the first time, and is changed an hour later
    assert town.clerk(Cron("0 3 * * *", missed="all")).look(0) == 0
    clerk = town.clerk(Cron("*/10 * * * *", missed="all"))
    # Then the past is not made up for
    assert clerk.look(65) == 0
    assert clerk.look(70) == 1
    # And what changes the message alone leaves the times as they are
    other = town.clerk(Cron("*/10 * * * *", missed="all", args=(1,)))
    assert other.look(92) == 2
    assert town.slots() == ["13:10", "13:20", "13:30"]


def test_cron_the_newest_process_decides_when_a_deployment_changes_a_schedule(town: Town) -> None:
    # Given a worker of the last deployment, and one of the next, which began later
    old, new = town.clerk("*/5 * * * *"), town.clerk("*/7 * * * *")
    old.look(0)
    new.look(1)
    # When both look, then the old one keeps quiet
    assert [(new.look(n - 0.5), old.look(n))[1] for n in range(2, 13)] == [0] * 11
    new.look(12)
    assert town.slots() == ["12:07"]
    # And when the new one is gone for good, the old one goes on, without the past
    assert old.look(12.9) == 0
    assert old.look(14.1) == 0
    assert old.look(15) == 1
    assert town.slots() == ["12:07", "12:15"]


def test_cron_removed_schedule_is_not_sent_and_shown_as_such(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a schedule that nobody declares any more
    town.clerk().look(0)
    town.clerk(None).look(30)
    assert town.slots() == []
    # Then the list says so, until an operator forgets it
    assert _outbox(town, "list", minutes=30) == 0
    assert "no: not since 2026-06-01 12:00:00" in capsys.readouterr().out
    assert _outbox(town, "forget", "punch", minutes=30) == 0
    assert _outbox(town, "list", minutes=30) == 0
    assert "There is no schedule" in capsys.readouterr().out


def test_cron_message_is_the_same_when_a_slot_is_sent_for_twice_by_a_restored_log(town: Town) -> None:
    # Given a slot that was sent for, and a database that goes back to before that
    clerk = town.clerk()
    clerk.look(0)
    assert clerk.look(5) == 1
    row = "update outbox.cron set slot = %s, next_at = %s"
    town.admin.execute(row, (BEGIN, BEGIN + timedelta(minutes=5)))
    # When it is sent for again
    assert clerk.look(6) == 1
    # Then it is the same message, to whoever has seen the first one
    (first, second) = town.sent()
    assert first == second


def test_cron_run_is_left_out_when_the_one_before_still_runs_and_its_actor_is_unique(town: Town) -> None:
    # Given a unique actor with a schedule, whose first message waits
    clerk = town.clerk(unique_key="one")
    clerk.look(0)
    clerk.look(5)
    # When the next slot comes
    clerk.look(10)
    # Then nothing is sent for it, and the list shows the one that is there
    assert town.slots() == ["12:05"]
    ((_, message),) = town.sent()
    assert town.admin.execute("select last_message, last_slot from outbox.cron").fetchone() == (
        message, BEGIN + timedelta(minutes=10),
    )  # fmt: skip


def test_cron_slot_is_sent_by_the_next_look_and_others_at_once_when_a_middleware_fails(town: Town) -> None:
    # Given two schedules, and a middleware that fails once, before the message of the first is sent
    failing = [True]

    class Fails(Middleware):
        def before_enqueue(self, broker: dramatiq.Broker, message: Any, delay: Any) -> None:
            if failing:
                failing.clear()
                raise MiddlewareError("once")

    clerk = town.clerk([Cron("*/5 * * * *", name="a"), Cron("*/5 * * * *", name="b")])
    clerk.broker.add_middleware(Fails())
    clerk.look(0)
    with pytest.raises(MiddlewareError):
        clerk.look(5)
    # Then that slot isn't done with, and the other schedule doesn't wait for it
    sent = "select payload #>> '{options,cron,name}' from outbox.log order by id"
    assert town.admin.execute(sent.encode()).fetchall() == [("b",)]
    assert clerk.look(6) == 1
    assert town.admin.execute(sent.encode()).fetchall() == [("b",), ("a",)]


# --------------------------------------------------------------------------------------- the command line


def _outbox(town: Town, *words: str, minutes: float = 0) -> int:
    url = url_at(town.urls["outbox_operator"], BEGIN + timedelta(minutes=minutes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTBOX_DATABASE", url)
        patch.setenv("OUTBOX_STATE", "/nowhere")
        return main(["cron", *words])


def test_cron_list_shows_the_next_run_and_the_last(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    # Given schedules: one that has run, and one that is new
    clerk = town.clerk([
        Cron("*/5 * * * *", name="often", args=("a secret",)),
        Cron("0 9 * * mon-fri", name="weekdays", timezone="Europe/Berlin", missed="skip"),
    ])  # fmt: skip
    clerk.look(0)
    clerk.look(5.5)
    # When they are listed
    assert _outbox(town, "list", minutes=6) == 0
    shown = capsys.readouterr().out
    assert _outbox(town, "list", "--json", minutes=6) == 0
    often, weekdays = json.loads(capsys.readouterr().out)
    # Then each says what it is, and when it comes next, by its own clock on the wall
    assert (often["name"], often["next_at"][:16], often["last_slot"][:16]) == (
        "often", "2026-06-01T12:10", "2026-06-01T12:05",
    )  # fmt: skip
    assert often["last_message"] == town.sent()[0][1]
    assert (weekdays["expression"], weekdays["timezone"], weekdays["missed"]) == (
        "0 9 * * mon-fri",
        "Europe/Berlin",
        "skip",
    )
    assert (weekdays["last_id"], weekdays["declared"], weekdays["overdue"]) == (None, True, None)
    assert "2026-06-02 09:00:00 CEST" in shown  # the first of June was a Monday
    assert "secret" not in shown
    # And one whose time has passed although a worker is there is overdue
    town.admin.execute("update outbox.cron set slot = slot - interval '1 h', next_at = next_at - interval '7 min'")
    assert _outbox(town, "list", minutes=6) == 0
    assert "overdue for 3 min: see the log" in capsys.readouterr().out


def test_cron_run_sends_the_message_now(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    # Given a schedule whose actor is unique
    clerk = town.clerk(Cron("0 3 * * *", args=(1, "x")), unique_key=True, ordering_key="line")
    clerk.look(0)
    # When an operator runs it now, twice
    assert _outbox(town, "run", "punch", minutes=1) == 0
    assert "intent 1" in capsys.readouterr().out
    assert _outbox(town, "run", "punch", "--json", minutes=2) == 0
    again = json.loads(capsys.readouterr().out)
    # Then the message is there, once, as the schedule sends it, and says who sent it
    ((payload, headers, *turn),) = town.admin.execute("select payload, headers, action, key from outbox.log").fetchall()
    assert turn == ["send.ordered", "line"]
    assert (payload["actor_name"], payload["args"], payload["options"]["cron"]) == (
        "punch",
        [1, "x"],
        {"name": "punch"},
    )
    assert payload["message_timestamp"] == int((BEGIN + timedelta(minutes=1)).timestamp() * 1000)
    assert headers["who"] == "outbox_operator"
    assert again == {"id": 1, "message_id": payload["message_id"], "sent": False}
    # And its times are what they were
    assert clerk.look(3) == 0
    # And one that isn't there is not run
    assert _outbox(town, "run", "nobody") == 1
    assert "no schedule" in capsys.readouterr().err


def test_cron_is_not_for_everybody_when_the_database_is_asked_directly(town: Town) -> None:
    town.clerk().look(0)
    with psycopg.connect(town.urls["app"], autocommit=True) as app:
        for statement in (
            "select * from outbox.cron",
            "update outbox.cron set slot = now()",
            "select outbox.run_cron('punch')",
            "select * from outbox.unique_message",
            "delete from outbox.unique_message",
            "select outbox.forget_unique()",
        ):
            with pytest.raises(psycopg.Error, match="permission denied"):
                app.execute(statement.encode())
        with pytest.raises(psycopg.Error, match="no message with a unique key"):
            app.execute("select outbox.send_unique('mail', 'send', 'k', '{}', null, null)")


# ------------------------------------------------------------------------------------------------ workers


def test_cron_i10_worker_goes_on_when_it_loses_the_database(stage: Stage) -> None:
    # Given a worker with a schedule
    company = stage.company
    dramatiq.actor(broker=company.broker, actor_name="entry", cron="* * * * *")(lambda: company._note("entry"))
    stage.work()
    until(lambda: stage.one("select count(*) from outbox.cron"), "it is declared")
    # When its connections are lost, before a slot comes
    stage.admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    stage.admin.execute("update outbox.cron set slot = slot - interval '1 min', next_at = next_at - interval '1 min'")
    # Then it is sent for
    until(lambda: stage.runs("entry") >= 1, "it has run")


def test_cron_thread_is_there_only_while_a_worker_runs_that_has_schedules(stage: Stage) -> None:
    # Given a worker without schedules, and one with
    stage.work()
    assert stage.company.broker._timetable is None
    company = stage.another()
    dramatiq.actor(broker=company.broker, actor_name="entry", cron="0 0 * * *")(lambda: None)
    worker = Worker(company.broker, worker_timeout=50, worker_threads=1)
    worker.start()
    timetable = company.broker._timetable
    assert timetable._thread.is_alive()
    # When it stops, then nothing is sent any more
    worker.stop()
    assert company.broker._timetable is None
    until(lambda: not timetable._thread.is_alive(), "the thread ends")
