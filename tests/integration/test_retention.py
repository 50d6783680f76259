"""Retention: what goes, what stays and why, and what is left of what went."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from outbox import archive, follower, live, log, retention, tick, whereabouts
from outbox.errors import NotReady
from outbox.participant import Outcome, Verdict
from tests.fixtures.lanes import TARGET, Bench, Sink
from tests.fixtures.retention import AGE, SIZE, base, drop_all, fill, grow_old, names, show
from workers.postgres import Postgres


def _put(bench: Bench, key: str, payload: Any = 0, action: str = "put") -> int:
    row = bench.admin.execute(
        "insert into outbox.log (target, action, key, payload) values (%s, %s, %s, to_jsonb(%s)) returning id",
        (TARGET, action, key, payload),
    ).fetchone()
    assert row is not None
    return int(row[0])


def _kept_by(bench: Bench) -> list[tuple[str, str]]:
    plan = retention.plan(bench.conn, AGE)
    assert not plan.ready
    return [(hold.kind, hold.name) for hold in plan.holds]


def _live(bench: Bench) -> dict[str, Any]:
    return {intent.key: intent.payload for intent in live.puts(bench.conn, TARGET, tick.latest(bench.conn))}


# --------------------------------------------------------------------------------------------- what goes


def test_retention_i8_carries_the_last_put_of_each_live_key_when_a_partition_is_dropped(
    bench: Bench, shelf: Path
) -> None:
    # Given a partition with keys that were changed, deleted and put again, and an event
    reader = bench.reader()
    for action, key, n in [("put", "a", 1), ("put", "b", 2), ("put", "a", 3), ("delete", "b", 0), ("put", "c", 4),
                           ("delete", "c", 0), ("put", "c", 5), ("touch", "d", 6)]:  # fmt: skip
        _put(bench, key, n, action)
    until = fill(bench)
    bench.drain(reader)
    before = _live(bench)
    # When it is old enough
    assert retention.plan(bench.conn, AGE).ready == []
    grow_old(bench.admin)
    (gone,) = drop_all(bench.conn, shelf)
    # Then it is gone as a whole, what was live is in the base, and the log begins behind it
    assert (gone.first, gone.until) == (1, until)
    assert names(bench.admin)[0] == "log_000001"
    assert base(bench.admin) == {"a": 3, "c": 5} == before == _live(bench)
    assert bench.admin.execute("select id from outbox.horizon").fetchone() == (until,)
    # And later changes of what is in the base go into it with their own partition
    _put(bench, "a", 0, "delete")
    _put(bench, "c", 7)
    assert _live_after(bench, reader) == {"c": 7}
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    assert len(drop_all(bench.conn, shelf)) == 1
    assert base(bench.admin) == {"c": 7} == _live(bench)


def _live_after(bench: Bench, reader: Any) -> dict[str, Any]:
    bench.drain(reader)
    return _live(bench)


def test_retention_drops_several_at_once_and_never_the_one_that_is_written_to(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    for n in range(3):
        _put(bench, f"k{n}", n)
        fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    assert [each.name for each in drop_all(bench.conn, shelf)] == ["log_000000", "log_000001", "log_000002"]
    assert base(bench.admin) == {"k0": 0, "k1": 1, "k2": 2}
    assert retention.plan(bench.conn, 0.0) == retention.Plan([], None, [])
    # And writers go on
    assert bench.emit("k4") > 3 * SIZE


def test_retention_leaves_out_of_the_base_what_was_never_applied(bench: Bench, shelf: Path) -> None:
    # Given a put that an operator skipped, and one that a saga recalled
    bench.sink.fate = {"bad": Outcome(Verdict.POISON, error="no")}
    reader = bench.reader()
    skipped, fine = _put(bench, "bad", 1), _put(bench, "good", 2)
    void = _put(bench, "good", 3)
    bench.admin.execute("insert into outbox.saga_void (id, answered) values (%s, true)", (void,))
    fill(bench)
    bench.drain(reader)
    bench.admin.execute("select outbox.decide('skip', array[%s::bigint])", (skipped,))
    grow_old(bench.admin)
    # When it goes
    drop_all(bench.conn, shelf)
    # Then the base is without them, their traces are gone, and the archive says that they were never applied
    assert base(bench.admin) == {"good": 2}
    assert bench.admin.execute("select count(*) from outbox.parked").fetchone() == (0,)
    assert bench.admin.execute("select count(*) from outbox.saga_void").fetchone() == (0,)
    assert bench.admin.execute("select count(*) from outbox.audit").fetchone() == (1,)
    (found,) = archive.find(shelf)
    assert [(a.intent.id, a.void) for a in archive.read(found)] == [(skipped, True), (fine, False), (void, True)]


def test_retention_forgets_closed_receipts_of_what_is_dropped_when_they_are_in_the_archive(
    bench: Bench, shelf: Path
) -> None:
    # Given receipts of two intents that were sent, and of one that is live
    old, alive = _put(bench, "old", action="send"), _put(bench, "alive")
    fill(bench)
    new = _put(bench, "new", action="send")
    for number in (old, alive, new):
        bench.admin.execute(
            "insert into outbox.receipt (id, target, slot, state, epoch, evidence, closed_at) "
            "values (%s, %s, 0, 'closed', 1, '{\"queue\": \"Q1\"}', now())",
            (number, TARGET),
        )
    bench.drain(bench.reader())
    grow_old(bench.admin)
    # When the first two are dropped
    drop_all(bench.conn, shelf)
    # Then one receipt is in the archive only; that of what is live stays, as the base has its intent
    assert bench.admin.execute("select id from outbox.receipt order by id").fetchall() == [(alive,), (new,)]
    row = next(archive.read(archive.find(shelf)[0]))
    assert row.receipt is not None
    assert (row.receipt["evidence"], row.receipt["attempts"]) == ({"queue": "Q1"}, 1)


def test_retention_removes_sagas_that_ended_long_ago_and_no_child_before_its_parent(bench: Bench) -> None:
    # Given sagas that ended long ago, one of them the child of one that runs; one that ended now, and one that runs
    rows = [(1, "completed", 60, None), (2, "running", None, None), (3, "compensated", 60, 2)]
    rows.append((4, "completed", 0, None))
    for n, state, days, parent in rows:
        decision = {"completed": "commit", "compensated": "abort"}.get(state, "open")
        bench.admin.execute(
            "insert into outbox.saga (id, name, version, shape, input, state, decision, parent, parent_intent, "
            "ended_at) values (%s, 'x', 1, '', '{}', %s, %s, %s, %s, now() - make_interval(days => %s))",
            (_uuid(n), state, decision, parent and _uuid(parent), parent, days),
        )
        bench.admin.execute("insert into outbox.saga_event (saga, what) values (%s, 'started')", (_uuid(n),))
    # When it is tidied up
    assert retention.forget(bench.conn, AGE) == 1
    # Then only the one is gone, with what happened to it
    left = [2, 3, 4]
    assert bench.admin.execute("select id from outbox.saga order by id").fetchall() == [(_uuid(n),) for n in left]
    assert bench.admin.execute("select count(*) from outbox.saga_event").fetchone() == (3,)


def _uuid(n: int) -> UUID:
    return UUID(int=n)


# --------------------------------------------------------------------------------------------- what stays


def test_retention_i2_waits_for_a_lane_that_has_not_passed(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    _put(bench, "a", 1)
    fill(bench)
    grow_old(bench.admin)
    # Given a lane that has done nothing; then one in the middle of the batch
    assert _kept_by(bench) == [("lane", f"{TARGET}/0")]
    assert "run its worker" in str(retention.plan(bench.conn, AGE).holds[0])
    bench.drain(reader)
    assert len(drop_all(bench.conn, shelf)) == 1


def test_retention_is_not_held_by_a_lane_that_nothing_there_was_for(bench: Bench, shelf: Path) -> None:
    # Given lanes of other participants, which nobody drains: `mail` and its like have no worker here
    reader = bench.reader()
    _put(bench, "a", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    assert len(drop_all(bench.conn, shelf)) == 1
    # When something comes for one of them, it is read from where the lane is
    bench.admin.execute("select outbox.emit('mail', 'send', 'm')")
    bench.clock.step()
    start = tick.get(bench.conn, 1)
    page = log.page(bench.conn, start, tick.latest(bench.conn), target="mail", slots=log.Slots())
    assert [intent.key for intent in page] == ["m"]


def test_retention_i2_waits_for_a_transaction_that_is_open(bench: Bench, shelf: Path, server: Postgres) -> None:
    reader = bench.reader()
    with psycopg.connect(bench.admin.info.dsn) as held:
        # Given a transaction that has written to the partition and not committed
        held.execute("select outbox.emit(%s, 'put', 'late', '1')", (TARGET,))
        fill(bench)
        bench.drain(reader)
        grow_old(bench.admin)
        assert _kept_by(bench) == [("transaction", "")]
        with pytest.raises(psycopg.Error) as refused:
            bench.conn.execute("select outbox.drop_partition(%s, '1 day')", (SIZE,))
        assert refused.value.sqlstate == "OB060"
        held.commit()
    # When it has committed: a tick shows it, and the lane has not passed it
    show(bench, SIZE)
    grow_old(bench.admin)
    assert _kept_by(bench) == [("lane", f"{TARGET}/0")]
    bench.drain(reader)
    assert len(drop_all(bench.conn, shelf)) == 1
    # Then it was applied, and carried
    assert bench.sink.effects == [("late", 1)]
    assert base(bench.admin) == {"late": 1}


def test_retention_i2_waits_for_what_is_parked_due_in_doubt_or_half_done(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    bench.sink.fate = {"bad": Outcome(Verdict.POISON, error="no")}
    poison = _put(bench, "bad", 1)
    due = bench.emit("later", due=datetime.now(UTC) + timedelta(days=365))
    half = bench.emit("half")
    fill(bench)
    bench.drain(reader)
    bench.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch) values (%s, %s, 0, 'partial', 1)", (half, TARGET)
    )
    grow_old(bench.admin)
    # Then each holds the partition, and it is said which
    assert _kept_by(bench) == [("parked", str(poison)), ("receipt", str(half))]
    assert f"outbox why {poison}" in str(retention.plan(bench.conn, AGE).holds[0])
    bench.admin.execute("select outbox.decide('skip', array[%s::bigint])", (poison,))
    assert _kept_by(bench) == [("parked", str(due)), ("receipt", str(half))]
    bench.admin.execute("update outbox.receipt set state = 'closed', closed_at = now()")
    assert _kept_by(bench) == [("parked", str(due))]
    # When the last one is done
    bench.admin.execute("update outbox.parked set retry_at = now() where id = %s", (due,))
    bench.drain(reader)
    assert len(drop_all(bench.conn, shelf)) == 1
    assert base(bench.admin) == {"half": None, "later": None}


def test_retention_i7_waits_for_a_saga_that_has_not_ended(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    number = _uuid(7)
    bench.admin.execute(
        "insert into outbox.saga (id, name, version, shape, state, decision, input) "
        "values (%s, 'x', 1, '', 'running', 'open', '{}')",
        (number,),
    )
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload, saga) values (%s, 'put', 'a', '1', %s)", (TARGET, number)
    )
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    assert _kept_by(bench) == [("saga", str(number))]
    bench.admin.execute("update outbox.saga set state = 'completed', decision = 'commit', ended_at = now()")
    assert len(drop_all(bench.conn, shelf)) == 1


def test_retention_waits_for_a_follower_until_it_has_moved_or_is_removed(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    first = tick.latest(bench.conn).id
    follower.register(bench.conn, "site/b", first, note="the second site")
    for n in range(2):
        _put(bench, f"k{n}", n)
        fill(bench)
        bench.drain(reader)
    newest = tick.latest(bench.conn).id
    grow_old(bench.admin)
    assert _kept_by(bench) == [("follower", "site/b")]
    # When it has passed the first partition, but not the second
    middle = retention.plan(bench.conn, 0.0)
    assert middle.kept is not None
    assert middle.kept.cut is not None
    follower.move(bench.conn, "site/b", middle.kept.cut)
    assert [each.name for each in drop_all(bench.conn, shelf)] == ["log_000000"]
    # Then it can't go back, nor can another begin there
    with pytest.raises(NotReady, match="goes back to tick"):
        follower.register(bench.conn, "site/c", middle.kept.cut - 1)
    follower.move(bench.conn, "site/b", middle.kept.cut - 1)
    assert [f.tick for f in follower.find(bench.conn)] == [middle.kept.cut]
    # And its tick isn't thinned, while it stands there
    assert middle.kept.cut < newest
    assert follower.remove(bench.conn, "site/b")
    assert not follower.remove(bench.conn, "site/b")
    assert len(drop_all(bench.conn, shelf)) == 1
    with pytest.raises(NotReady, match="begin anew"):
        follower.move(bench.conn, "site/b", newest)


def test_retention_keeps_what_is_not_archived_or_not_carried_and_what_is_not_the_oldest(
    bench: Bench, shelf: Path
) -> None:
    reader = bench.reader()
    _put(bench, "a", 1)
    fill(bench)
    _put(bench, "b", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    for statement, says in [
        ("select outbox.carry(1000000)", "not archived"),
        ("select outbox.carry(2000000)", "not the oldest"),
        ("select outbox.drop_partition(1000000, '1 day')", "not archived and carried"),
        ("select outbox.drop_partition(2000000, '1 day')", "not the oldest"),
    ]:
        with pytest.raises(psycopg.Error, match=says) as refused:
            bench.conn.execute(statement)
        assert refused.value.sqlstate == "OB060"
    # Nor what is younger than is asked for, when all of that is done
    (first, _) = retention.plan(bench.conn, AGE).ready
    with pytest.raises(NotReady, match="not old enough"):
        retention.drop(bench.conn, first, shelf, age=3 * AGE)
    assert len(drop_all(bench.conn, shelf)) == 2
    # And again is nothing
    assert bench.conn.execute("select outbox.drop_partition(2000000, '1 day')").fetchone() == (False,)


def test_retention_i8_base_keeps_the_newer_word_when_an_older_one_was_repeated_later(bench: Bench, shelf: Path) -> None:
    # Given a key that was put twice, both dropped; and then the first one was repeated
    reader = bench.reader()
    old = _put(bench, "k", 1)
    _put(bench, "k", 2)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    drop_all(bench.conn, shelf)
    newer = base(bench.admin)
    bench.admin.execute(
        "insert into outbox.log (target, action, key, payload, headers) values (%s, 'put', 'k', '{}', "
        "jsonb_build_object('replay', jsonb_build_object('of', %s::bigint, 'since', %s::bigint)))",
        (TARGET, old, old),
    )
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    # When what it is in is dropped, too, then the base says what the second one said
    assert len(drop_all(bench.conn, shelf)) == 1
    assert base(bench.admin) == newer


def test_retention_i8_drops_nothing_that_is_not_carried_or_that_somebody_needs_by_now(
    bench: Bench, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a partition that is archived, by somebody who was killed then
    reader = bench.reader()
    start = tick.latest(bench.conn).id
    _put(bench, "a", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    (each,) = retention.plan(bench.conn, AGE).ready

    def dies(name: str) -> None:
        if name == "retention.noted":
            raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(retention, "hit", dies)
        retention.drop(bench.conn, each, shelf, age=AGE)
    # When it is dropped, then what is live in it has to be carried first
    with pytest.raises(psycopg.Error, match="not archived and carried"):
        bench.conn.execute("select outbox.drop_partition(%s, '1 day')", (each.until,))
    # And when somebody needs it, who came after the plan was made, it stays
    follower.register(bench.conn, "site", start)
    with pytest.raises(NotReady, match="held by follower site"):
        retention.drop(bench.conn, each, shelf, age=AGE)
    follower.remove(bench.conn, "site")
    retention.drop(bench.conn, each, shelf, age=AGE)


# ------------------------------------------------------------------------------------------------ the lock


def test_retention_gives_way_when_transactions_that_use_the_log_are_open(
    bench: Bench, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a transaction that has written to a later partition, and stays open
    reader = bench.reader()
    _put(bench, "a", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    (each,) = retention.plan(bench.conn, AGE).ready
    with psycopg.connect(bench.admin.info.dsn) as held:
        held.execute("select outbox.emit(%s, 'put', 'new')", (TARGET,))
        # When the partition is to be dropped
        with monkeypatch.context() as impatient, pytest.raises(NotReady, match="stays for now"):
            impatient.setattr(retention, "TRIES", 2)
            impatient.setattr(retention, "PAUSE", 0.01)
            retention.drop(bench.conn, each, shelf, age=AGE)
        # Then it has given up, and others write
        bench.emit("other")
    # And it can be done when that is over
    retention.drop(bench.conn, each, shelf, age=AGE)
    assert base(bench.admin) == {"a": 1}


def test_retention_i8_archives_nothing_of_a_partition_that_another_has_dropped(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    _put(bench, "a", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    # Given two who have made the same plan, and one who has carried it out
    (each,) = retention.plan(bench.conn, AGE).ready
    retention.drop(bench.conn, each, shelf, age=AGE)
    # Then the other one is told so, and leaves no archive that says that there was nothing
    with pytest.raises(NotReady, match="has just dropped"):
        retention.drop(bench.conn, each, shelf, age=AGE)
    assert [archive.verify(found) for found in archive.find(shelf)] == [1]
    assert [entry for entry in shelf.iterdir() if entry.name.startswith(".")] == []


def test_retention_i2_carries_and_drops_nothing_twice_when_two_do_it_at_once(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    for n in range(150):
        _put(bench, f"k{n}", n)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    (each,) = retention.plan(bench.conn, AGE).ready
    failures: list[BaseException] = []

    def run() -> None:
        with psycopg.connect(bench.conn.info.dsn, autocommit=True) as conn:
            try:
                retention.drop(conn, each, shelf, age=AGE)
            except (NotReady, psycopg.errors.DeadlockDetected) as error:
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Then somebody has done it, and whoever was too late was told so, or found it done
    assert len(failures) < len(threads), failures
    assert names(bench.admin)[0] == "log_000001"
    assert base(bench.admin) == {f"k{n}": n for n in range(150)}
    assert [archive.verify(found) for found in archive.find(shelf)] == [150]


# ---------------------------------------------------------------------------------------------- for people


def test_why_says_in_which_archive_an_intent_is_when_it_was_dropped(bench: Bench, shelf: Path) -> None:
    reader = bench.reader()
    number = _put(bench, "a", 1)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    drop_all(bench.conn, shelf)
    found = whereabouts.find(bench.conn, number)
    assert found.state == "dropped"
    assert archive.find(shelf)[0].name in found.says
    assert str(shelf) in found.says


def test_retention_i8_gives_a_base_row_that_fails_its_turn_again_when_a_participant_is_rebuilt(
    bench: Bench, shelf: Path
) -> None:
    # Given a base of two keys
    reader = bench.reader()
    _put(bench, "a", 1)
    _put(bench, "b", 2)
    fill(bench)
    bench.drain(reader)
    grow_old(bench.admin)
    drop_all(bench.conn, shelf)
    _put(bench, "a", 3)
    # When a participant begins from nothing, and one of them fails at first
    new = Sink()
    new.keeps_position = True
    new.fate = {"a": Outcome(Verdict.RETRY, error="not now")}
    bench.give_up(TARGET)
    reader = bench.reader(sink=new)
    bench.drain_once(reader)
    # Then it is parked, and what comes after it waits behind it
    assert new.effects == [("b", 2)]
    assert bench.parked() == {"retry": ["a"], "blocked": ["a"]}
    row = bench.admin.execute("select min(id) from outbox.parked").fetchone()
    assert row is not None
    waits = whereabouts.find(bench.conn, row[0])
    assert (waits.state, waits.command) == ("retry", f"outbox parked retry {row[0]}")
    assert archive.find(shelf)[0].name in waits.says
    new.fate = {}
    bench.drain(reader)
    assert new.effects == [("b", 2), ("a", 1), ("a", 3)]
