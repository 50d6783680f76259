"""Schedules in processes as they are run: dramatiq's own workers, and the command for sites without any."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from tests.fixtures.actors import ROOT, Stage
from tests.fixtures.cron import BEGIN, Town, url_at
from tests.fixtures.site import LIMIT, until


def test_cron_actor_runs_when_its_time_comes_in_dramatiqs_own_workers(stage: Stage, tmp_path: Path) -> None:
    # Given a module as an application has it, with a schedule for each minute
    (tmp_path / "diary.py").write_text(
        "import dramatiq, os, psycopg\n"
        "from dramatiq.middleware import CurrentMessage\n"
        "from outbox.actor import OutboxBroker\n"
        "broker = OutboxBroker()\n"
        "broker.add_middleware(CurrentMessage())\n"
        "dramatiq.set_broker(broker)\n"
        "@dramatiq.actor(cron='* * * * *')\n"
        "def entry():\n"
        "    slot = CurrentMessage.get_current_message().options['cron']['slot']\n"
        "    with psycopg.connect(os.environ['OUTBOX_DATABASE'], autocommit=True) as conn:\n"
        "        conn.execute('insert into effect values (%s, %s)', (slot, os.getpid()))\n"
    )
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": stage.urls["app"],
        "OUTBOX_ACTOR_DATABASE": stage.urls["actor"],
        "OUTBOX_STATE": str(tmp_path / "none"),
        "PYTHONPATH": str(ROOT),
    }
    # When dramatiq runs it, with two processes, and a slot has just passed
    command = [sys.executable, "-m", "dramatiq", "diary", "-p", "2", "-t", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        until(lambda: stage.one("select count(*) from outbox.cron"), "it is declared")
        moved = "slot = slot - interval '1 min', next_at = next_at - interval '1 min'"
        stage.admin.execute(f"update outbox.cron set {moved} where last_id is null".encode())
        # Then its actor runs, and knows for which slot; once for each
        until(lambda: stage.one("select count(*) from effect") >= 1, "it has run")
        process.terminate()
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
    assert stage.one("select count(*) = count(distinct payload #>> '{options,cron,slot}') from outbox.log")
    assert stage.one("select max(name)::timestamptz <= now() from effect")


def test_cron_is_sent_where_no_worker_runs_by_a_command_of_its_own(town: Town, tmp_path: Path) -> None:
    # Given a module as an application has it, and no workers
    (tmp_path / "almanac.py").write_text(
        "import dramatiq\n"
        "from outbox.actor import OutboxBroker\n"
        "dramatiq.set_broker(OutboxBroker())\n"
        "@dramatiq.actor(actor_name='punch', cron='*/5 * * * *')\n"
        "def punch(): pass\n"
    )
    environment = {
        **os.environ,
        "OUTBOX_DATABASE": url_at(town.urls["actor"], BEGIN + timedelta(minutes=12)),
        "OUTBOX_STATE": str(tmp_path / "none"),
        "OUTBOX_ACTORS": "almanac",
        "PYTHONPATH": str(ROOT),
    }
    # When the command runs, for a schedule that was declared some minutes ago
    process = subprocess.Popen([sys.executable, "-m", "outbox", "work", "cron"], cwd=tmp_path, env=environment)
    try:
        until(lambda: town.admin.execute("select 1 from outbox.cron").fetchone(), "it is declared")
        town.admin.execute("update outbox.cron set slot = %s, next_at = %s", (BEGIN, BEGIN + timedelta(minutes=5)))
        until(town.slots, "it is sent")
        # Then it has sent, and ends when it is told to
        process.terminate()
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()
        process.wait()
    assert town.slots() == ["12:10"]
