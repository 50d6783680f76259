"""Registering participants and their lanes: the function in the schema, and the command."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from outbox import lane as lanes
from outbox.cli import main
from outbox.participant import LaneView
from tests.fixtures.lanes import Bench
from workers.index import IndexParticipant


def layout(admin: psycopg.Connection[Any], target: str) -> list[tuple[int, int, int]]:
    rows = admin.execute("select lane, slot_low, slot_high from outbox.lane where target = %s order by lane", (target,))
    return rows.fetchall()


def register(admin: psycopg.Connection[Any], target: str, lanes: int | None) -> bool:
    row = admin.execute("select outbox.register(%s, %s)", (target, lanes)).fetchone()
    assert row is not None
    return bool(row[0])


@pytest.mark.parametrize("count", [1, 2, 3, 256])
def test_register_i2_gives_each_slot_to_one_lane(admin: psycopg.Connection[Any], count: int) -> None:
    assert register(admin, "mine", count)
    found = layout(admin, "mine")
    assert [number for number, _, _ in found] == list(range(count))
    assert [slot for _, low, high in found for slot in range(low, high + 1)] == list(range(16384))


def test_register_changes_nothing_when_it_is_said_again(admin: psycopg.Connection[Any]) -> None:
    assert register(admin, "mine", None)
    assert register(admin, "other", 4)
    before = layout(admin, "other")
    assert not register(admin, "mine", None)
    assert not register(admin, "other", None)
    assert not register(admin, "other", 4)
    assert layout(admin, "other") == before


def test_register_changes_the_lanes_as_long_as_nothing_was_applied(bench: Bench) -> None:
    # Given: intents of a target that no lane has read
    bench.emit("k")
    assert register(bench.admin, "sink", 3)
    assert len(layout(bench.admin, "sink")) == 3
    # Or: a lane that has passed ticks, of which none had an intent of its target
    passed = lanes.claim(bench.conn, "blob", 0, owner=uuid.uuid4())
    assert passed is not None
    passed.advance(bench.conn, passed.stand(bench.conn))
    passed.release(bench.conn)
    # When, then: it can have another number of lanes
    assert register(bench.admin, "blob", 2)
    assert len(layout(bench.admin, "blob")) == 2
    # Epochs go on, because stores remember them.
    row = bench.admin.execute("select min(epoch) from outbox.lane where target = 'blob'").fetchone()
    assert row == (1,)


def test_register_i6_refuses_while_a_worker_has_a_lane(bench: Bench) -> None:
    lane = bench.claim()
    with pytest.raises(psycopg.DatabaseError, match="a worker has one of them") as refused:
        register(bench.admin, "sink", 2)
    assert refused.value.sqlstate == "OB010"
    lane.release(bench.conn)
    assert register(bench.admin, "sink", 2)


def test_register_i2_i3_refuses_when_intents_may_be_applied(bench: Bench) -> None:
    bench.emit("k")
    lane = bench.claim()
    reader = bench.reader(lane)
    bench.drain(reader)
    reader.close()
    lane.release(bench.conn)
    with pytest.raises(psycopg.DatabaseError, match="may be applied already") as refused:
        register(bench.admin, "sink", 2)
    assert "resilver" in str(refused.value.diag.message_hint)
    assert len(layout(bench.admin, "sink")) == 1


def test_register_i2_i3_refuses_when_what_was_applied_is_only_in_the_base_by_now(bench: Bench) -> None:
    lane = bench.claim()
    lane.advance(bench.conn, lane.stand(bench.conn))
    lane.release(bench.conn)
    bench.admin.execute(
        "insert into outbox.base (target, key, id, payload, created_at) values ('sink', 'k', 1, '1', now())"
    )
    with pytest.raises(psycopg.DatabaseError, match="may be applied already"):
        register(bench.admin, "sink", 2)


@pytest.mark.parametrize(
    "row",
    [
        "outbox.parked (id, target, slot, key, reason) values (%s, 'sink', 1, 'k', 'poison')",
        "outbox.receipt (id, target, slot, state, epoch) values (%s, 'sink', 1, 'open', 1)",
    ],
    ids=["parked", "tried"],
)
def test_register_i2_i3_refuses_when_intents_are_parked_or_were_tried(bench: Bench, row: LiteralString) -> None:
    number = bench.emit("k")
    bench.admin.execute(f"insert into {row}", (number,))
    with pytest.raises(psycopg.DatabaseError, match="parked or were tried"):
        register(bench.admin, "sink", 2)


def test_register_refuses_a_second_clock(admin: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.DatabaseError, match="of which there is one"):
        register(admin, "clock", 2)


def test_register_is_for_operators_only(admin: psycopg.Connection[Any]) -> None:
    for role, may in (("outbox_operator", True), ("outbox_worker", False), ("outbox_app", False)):
        row = admin.execute("select has_function_privilege(%s, 'outbox.register(text, int)', 'execute')", (role,))
        assert row.fetchone() == (may,)


# ------------------------------------------------------------------------------------------------ command


@pytest.fixture
def configured(admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command connects as an operator."""
    monkeypatch.setenv("OUTBOX_DATABASE", f"postgresql:///?{admin.info.dsn.replace(' ', '&')}")
    monkeypatch.setenv("PGOPTIONS", "-c role=outbox_operator")


def test_command_registers_and_says_what_to_do(configured: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register", "webhook"]) == 0
    assert capsys.readouterr().out.startswith("webhook is registered, with 1 lane. Start its workers")
    assert main(["register", "index", "--lanes", "2"]) == 0
    assert capsys.readouterr().out.startswith("index is registered, with 2 lanes.")
    assert main(["register", "index"]) == 0
    assert capsys.readouterr().out == "index was registered, with 2 lanes.\n"


def test_command_says_what_is_in_the_way(
    configured: None, admin: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    admin.execute("insert into outbox.parked (id, target, slot, key, reason) values (1, 'index', 1, 'k', 'poison')")
    assert main(["register", "index", "--lanes", "2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("outbox register: the number of lanes of 'index' stays 1: some of its intents are parked")
    assert "resilver" in said
    assert said.count("\n") == 1
    assert main(["register", "No Name"]) == 1
    assert "lower-case" in capsys.readouterr().err


@pytest.mark.parametrize("lanes", ["0", "257", "-1", "two"])
def test_command_exits_with_2_when_the_number_is_none(configured: None, lanes: str) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["register", "index", "--lanes", lanes])
    assert wrong.value.code == 2


def test_index_lanes_can_change_when_its_worker_has_run_and_nothing_was_indexed(
    tmp_path: Path, admin: psycopg.Connection[Any]
) -> None:
    # Given: a shard that was opened for all keys, and stayed empty
    first = IndexParticipant(tmp_path)
    first.open(LaneView("index", 0, 1, unclean=False))
    first.close()
    # When: the lanes change
    assert register(admin, "index", 2)
    # Then: it takes its new share
    again = IndexParticipant(tmp_path)
    again.open(LaneView("index", 0, 2, unclean=False, slots=(0, 8191)))
    assert again.position() is None
    again.close()
