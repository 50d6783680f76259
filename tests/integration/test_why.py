"""`outbox why`: every place where an intent can be, in a real database, with a reader's rights."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from outbox import decision, operation, repetition, whereabouts
from outbox.cli import main
from outbox.errors import NotReady
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.whereabouts import Whereabouts
from tests.fixtures.lanes import Bench
from tests.integration.test_reader import POISON, RETRY, Ambivalent, KillerDied

LATER = Backoff(first=3600, limit=3600)


@pytest.fixture
def reader(bench: Bench, operator_url: str) -> Iterator[psycopg.Connection[Any]]:
    """With the rights of outbox_reader and no others."""
    with psycopg.connect(operator_url.replace("outbox_operator", "postgres"), autocommit=True) as conn:
        conn.execute("set role outbox_reader")
        yield conn


def why(conn: psycopg.Connection[Any], number: int) -> Whereabouts:
    found = whereabouts.find(conn, number)
    assert found.id == number
    return found


def emit(bench: Bench, conn: psycopg.Connection[Any]) -> int:
    row = conn.execute("select outbox.emit('sink', 'put', 'k', '{}')").fetchone()
    assert row is not None
    return int(row[0])


# -------------------------------------------------------------------------------- not (yet) in the log


def test_why_undrawn_when_no_intent_has_that_id(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    number = bench.emit("k")
    found = why(reader, number + 1)
    assert (found.state, found.intent) == ("undrawn", None)
    assert f"the last one drawn is {number}" in found.says


def test_why_open_while_its_transaction_runs_and_rolled_back_after_it(
    bench: Bench, reader: psycopg.Connection[Any], app_url: str
) -> None:
    with psycopg.connect(app_url, application_name="shop") as app:
        number = emit(bench, app)
        found = why(reader, number)
        assert found.state == "open"
        assert f"pid {app.info.backend_pid}" in found.says
        app.rollback()
    assert why(reader, number).state == "rolled_back"


def test_why_open_when_its_transaction_was_prepared_and_forgotten(
    bench: Bench, reader: psycopg.Connection[Any], app_url: str
) -> None:
    with psycopg.connect(app_url) as app:
        app.tpc_begin(app.xid(1, "forgotten", "x"))
        number = emit(bench, app)
        app.tpc_prepare()
        try:
            found = why(reader, number)
            assert found.state == "open"
            assert "forgotten" in found.says or "Zm9yZ290dGVu" in found.says  # psycopg writes it in base 64
        finally:
            app.tpc_rollback()


def test_why_dropped_when_retention_has_passed_it(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    number = bench.emit("k")
    bench.admin.execute("select setval('outbox.log_id', 1000000)")
    bench.admin.execute("drop table outbox.log_000000")
    found = why(reader, number)
    assert (found.state, found.command) == ("dropped", None)
    assert "begins with id 1000000" in found.says


# ---------------------------------------------------------------------------------------- on its way


def test_why_committed_when_no_tick_shows_it(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    number = bench.emit("k")
    found = why(reader, number)
    assert (found.state, found.command) == ("committed", None)
    assert "the clock runs" in found.says
    # The clock is gone.
    bench.admin.execute("update outbox.lane set owner = null, lease_until = null where target = 'clock'")
    found = why(reader, number)
    assert (found.state, found.command) == ("committed", "outbox work clock")
    # The clock refuses to go on.
    bench.admin.execute("update outbox.lane set state = 'stopped', reason = 'odd' where target = 'clock'")
    assert "the clock is stopped: odd" in why(reader, number).says


def test_why_behind_says_how_far_and_who_drains(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    ids = [bench.emit(f"k{n}") for n in range(5)]
    bench.clock.step()
    found = why(reader, ids[3])
    assert found.state == "behind"
    assert "3 intents are before it" in found.says
    assert "Nobody drains lane sink/0" in found.says
    # Half of a batch is done.
    bench.sink.batch_limit = 2
    worker = bench.reader()
    worker.step()
    found = why(reader, ids[3])
    assert found.state == "behind"
    assert "1 intent is before it" in found.says
    assert "drains it (epoch 1)" in found.says
    assert why(reader, ids[1]).state == "applied"
    worker.lane.show(bench.conn, "waiting", "the disk is full")
    assert "The lane waits: the disk is full" in why(reader, ids[3]).says
    worker.lane.show(bench.conn, "stopped", "another history")
    assert "The lane is stopped: another history" in why(reader, ids[3]).says


def test_why_behind_names_the_worker_to_run(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    row = bench.admin.execute("select outbox.emit('index', 'put', 'k')").fetchone()
    bench.clock.step()
    assert row is not None
    assert why(reader, row[0]).command == "outbox work index"


def test_why_unregistered_when_nobody_reads_it(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    row = bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) values ('nobody', 'put', 'k', '{}') returning id"
    ).fetchone()
    assert row is not None
    found = why(reader, row[0])
    assert found.state == "unregistered"
    assert found.command is not None
    assert "select outbox.register('nobody')" in found.command


# --------------------------------------------------------------------------------------------- done


def test_why_applied_says_when_and_with_which_receipt(bench: Bench, reader: psycopg.Connection[Any]) -> None:
    sink = Ambivalent()
    number = bench.emit("k")
    bench.drain(bench.reader(sink=sink))
    found = why(reader, number)
    assert (found.state, found.command) == ("applied", None)
    assert "lane sink/0 has passed it" in found.says
    assert "Its receipt is closed, after 1 attempt." in found.says
    assert found.lane is not None
    assert found.lane["passed_at"] is not None


# ------------------------------------------------------------------------------------------- parked


def test_why_parked_with_each_reason(
    bench: Bench, reader: psycopg.Connection[Any], operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate |= {"slow": RETRY, "bad": POISON, "odd": Outcome(Verdict.IN_DOUBT, error="perhaps")}
    slow, bad, behind, odd, behind_odd = (bench.emit(key) for key in ("slow", "bad", "bad", "odd", "odd"))
    due = bench.emit("due", due=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    worker = bench.reader(backoff=LATER)
    bench.drain(worker)

    found = {name: why(reader, number) for name, number in locals().items() if name in NAMES}

    assert {name: each.state for name, each in found.items()} == NAMES
    assert {name: each.command for name, each in found.items()} == {
        "slow": f"outbox parked retry {slow}",
        "bad": f"outbox parked retry {bad}",
        "behind": f"outbox parked retry {bad}",
        "odd": f"outbox parked resolve {odd} --sent",
        "behind_odd": f"outbox parked resolve {odd} --sent",
        "due": f"outbox parked retry {due}",
    }
    assert "not now" in found["slow"].says
    assert "never" in found["bad"].says
    assert f"behind intent {bad} of its key, which is parked: poison" in found["behind"].says
    assert "perhaps" in found["odd"].says
    assert "scheduled for" in found["due"].says

    # The commands do what they are given for.
    decision.decide(operator, "skip", [bad], note="a reason")
    decision.decide(operator, "applied", [odd])
    decision.decide(operator, "retry", [slow, due])
    bench.sink.fate.clear()
    worker.decided()
    bench.drain(worker)
    skipped = why(reader, bad)
    assert skipped.state == "skipped"
    assert "outbox_operator" in skipped.says
    assert "what an operator decided" in why(reader, odd).says
    assert {why(reader, number).state for number in (slow, behind, odd, behind_odd, due)} == {"applied"}


NAMES = {
    "slow": "retry", "bad": "poison", "behind": "blocked", "odd": "in_doubt", "behind_odd": "blocked", "due": "due",
}  # fmt: skip


def test_why_parked_says_that_it_is_being_tried_or_that_nobody_tries_it(
    bench: Bench, reader: psycopg.Connection[Any]
) -> None:
    # Given: one that is tried again, and its worker dies of it
    sink = Ambivalent()
    sink.fate["k"] = RETRY
    number = bench.emit("k")
    bench.drain(bench.reader(sink=sink, backoff=LATER))
    bench.admin.execute("update outbox.parked set retry_at = outbox.now() - interval '1 h'")
    assert "Its time came 60 min ago" in why(reader, number).says
    sink.fate.clear()
    sink.die_after_effect = True
    bench.die()
    worker = bench.reader(sink=sink)
    with pytest.raises(KillerDied):
        bench.drain(worker)
    # Then: as far as anybody can know it is being tried, until its lane has another owner
    assert "being tried now" in why(reader, number).says
    bench.admin.execute("update outbox.lane set owner = null, lease_until = null where target = 'sink'")
    bench.admin.execute("update outbox.parked set retry_at = outbox.now() - interval '1 h'")
    assert "Nobody drains lane sink/0" in why(reader, number).says


# -------------------------------------------------------------------------------------- the command


def test_why_prints_text_and_json_without_the_payload(
    bench: Bench, operator_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    bench.sink.fate["k"] = POISON
    number = str(bench.emit("k", "SECRET"))
    bench.drain(bench.reader())
    assert main(["why", number]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"intent {number} (put k at sink): poison\n")
    assert printed.endswith(f"\n  outbox parked retry {number}\n")
    assert main(["why", number, "--json"]) == 0
    printed += (text := capsys.readouterr().out)
    shown = json.loads(text)
    assert (shown["state"], shown["parked"]["reason"], shown["intent"]["key"]) == ("poison", "poison", "k")
    assert "SECRET" not in printed
    assert main(["why", "999999"]) == 0
    assert "undrawn" in capsys.readouterr().out


def test_why_tells_of_repetitions(bench: Bench, reader: psycopg.Connection[Any], operator_url: str) -> None:
    # Given an intent that was repeated twice, and another one of its key
    number, other = bench.emit("k", 1), bench.emit("k", 2)
    with psycopg.connect(operator_url, autocommit=True) as conn:
        begun = operation.begin(conn, "replay", {})
        _, [first] = repetition.append(conn, begun, "sink", [repetition.Again(number, 0)])
        _, [second] = repetition.append(conn, begun, "sink", [repetition.Again(number, 0)])
        begun.end(conn)
    bench.drain(bench.reader())
    # Then each says so
    found = why(reader, number)
    assert f"It was repeated 2 times, last by intent {second} for operation {begun.id}." in found.says
    assert [row["id"] for row in found.repeated] == [second, first]
    assert f"It repeats intent {number} for operation {begun.id}" in why(reader, first).says
    assert "repeat" not in why(reader, other).says
    # ... and headers that only look like it harm nothing
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload, headers) values ('sink', 'put', 'k', '{}', %s)",
        (json.dumps({"replay": {"of": number, "operation": "x"}}),),
    )
    assert "It was repeated 3 times" in why(reader, number).says


def test_why_says_which_role_is_missing(bench: Bench, app_url: str) -> None:
    with psycopg.connect(app_url, autocommit=True) as conn, pytest.raises(NotReady, match="GRANT outbox_reader TO app"):
        whereabouts.find(conn, 1)
