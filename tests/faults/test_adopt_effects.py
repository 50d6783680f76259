"""`outbox.adopt`, by each of its checks and effects. What it makes of a real dump is in `test_adopt`."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import psycopg
import pytest

from outbox import lane, operation
from outbox.errors import NotReady
from outbox.retry import Backoff
from tests.fixtures.lanes import TARGET, Bench
from tests.fixtures.site import LIMIT, until
from tests.integration.test_adopt import adopt, claims_elsewhere
from tests.integration.test_reader import POISON, RETRY
from workers.clock import Clock
from workers.postgres import Postgres

Conn = psycopg.Connection[Any]


def call(conn: Conn, *, restored: bool = False, closes: int = 1) -> tuple[int, int, int]:
    row = conn.execute("select * from outbox.adopt(%s, %s, 'for the test', 'somebody')", (closes, restored)).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def refusal(conn: Conn, **more: Any) -> tuple[str | None, str | None]:
    with pytest.raises(psycopg.DatabaseError) as refused:
        call(conn, **more)
    return refused.value.sqlstate, refused.value.diag.message_primary


def restored(admin: Conn) -> None:
    """All that is in the log now is what was restored: the triggers are made after the rows."""
    row = admin.execute(
        "select pg_get_triggerdef(oid) from pg_trigger "
        "where tgrelid = 'outbox.log'::regclass and tgname = 'log_append_only'"
    ).fetchone()
    assert row is not None
    with admin.transaction():
        admin.execute("drop trigger log_append_only on outbox.log")
        admin.execute(row[0])


def one(conn: Conn, query: str) -> Any:
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def new_clock(bench: Bench) -> None:
    owned = lane.claim(bench.conn, "clock", 0, owner=uuid.uuid4(), ttl=600)
    assert owned is not None
    bench.clock = Clock(bench.conn, owned)


class Beside(threading.Thread):
    """`outbox.adopt` in a thread of its own, while others do what it has to wait for."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._conn = psycopg.connect(url, autocommit=True)
        self.pid = self._conn.info.backend_pid
        self.error: psycopg.Error | None = None

    def run(self) -> None:
        try:
            call(self._conn)
        except psycopg.Error as error:
            self.error = error
        finally:
            self._conn.close()

    def waits(self, admin: Conn) -> bool:
        return bool(one(admin, f"select exists (select from pg_locks where pid = {self.pid} and not granted)"))


@pytest.fixture
def idle(bench: Bench) -> Bench:
    """Nobody owns a lane."""
    bench.drain(bench.reader())
    claims_elsewhere(bench.admin)
    return bench


# ------------------------------------------------------------------------------------------ what it refuses


def test_adopt_is_refused_when_somebody_else_was_faster(idle: Bench, operator: Conn) -> None:
    call(operator)
    assert refusal(operator) == ("OB011", "somebody else has just adopted this log")
    assert call(operator, closes=2)[0] == 3


def test_adopt_i6_is_refused_when_a_lane_is_claimed_at_the_same_moment(
    idle: Bench, operator_url: str, operator: Conn
) -> None:
    # Given a claim that nobody sees yet
    idle.conn.execute("begin")
    assert idle.claim().epoch > 0
    # When the log is adopted beside it
    beside = Beside(operator_url)
    beside.start()
    until(lambda: beside.waits(idle.admin), "it waits for the claim")
    idle.conn.execute("commit")
    beside.join(LIMIT)
    # Then it sees the owner
    assert beside.error is not None
    assert beside.error.sqlstate == "OB012"
    # ... and a lease that has run out, of one that died, is in nobody's way
    idle.die()
    assert call(operator)[0] == 2


def test_adopt_refuses_what_was_restored_behind_what_was_written_here(idle: Bench, operator: Conn) -> None:
    restored(idle.admin)
    # Given an intent that was written here, and one behind it with a transaction's number of another server
    idle.emit("here")
    idle.admin.execute(
        "insert into outbox.log (target, action, key, payload, xid) values (%s, 'put', 'k', '1', '5')", (TARGET,)
    )
    # Then it can't tell them apart, and changes nothing
    assert refusal(operator, restored=True)[1] == "restored intents and intents that were written here are mixed"
    assert one(idle.admin, "select count(*) from outbox.era") == 1


@pytest.mark.parametrize(
    ("xmin", "xid", "here"),
    [
        pytest.param(1010, 1010, True, id="here"),
        pytest.param(1012, 1010, True, id="here, in a savepoint"),
        pytest.param(990, 990, False, id="restored"),
        pytest.param(990, 1005, False, id="restored, with a number of here"),
        pytest.param(1010, 990, False, id="restored later"),
        pytest.param(1010, 1020, False, id="restored later, with a number of the future"),
    ],
)
def test_adopt_knows_an_intent_that_was_written_here(admin: Conn, xmin: int, xid: int, here: bool) -> None:
    """The restore ended in transaction 1000."""
    assert one(admin, f"select outbox.written_here('{xmin}', '{xid}', '1000')") is here


@pytest.mark.parametrize("role", ["outbox_worker", "outbox_app", "outbox_reader", "public"])
def test_adopt_is_for_operators_only(admin: Conn, role: str) -> None:
    for function in ("adopt(int, boolean, text, text)", "unapplied()"):
        assert one(admin, f"select has_function_privilege('outbox_operator', 'outbox.{function}', 'execute')")
        assert not one(admin, f"select has_function_privilege('{role}', 'outbox.{function}', 'execute')")


def test_adopt_records_why_it_was_refused(
    server: Postgres, bench: Bench, operator: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.admin.execute("update outbox.era set halted = 'for the test'")
    monkeypatch.setattr("outbox.adoption.PATIENCE", 0.0)
    with pytest.raises(NotReady, match="a worker owns a lane"):
        adopt(server, bench.admin.info.dbname)
    [found] = operation.find(operator, kind="adopt")
    assert (found["state"], found["error"].split(". ")[0]) == ("failed", "a worker owns a lane")


# -------------------------------------------------------------------------------------------- what it leaves


def test_adopt_i2_waits_for_who_is_writing_and_loses_nothing(server: Postgres, idle: Bench, operator_url: str) -> None:
    # Given a transaction that has written, and is open
    with psycopg.connect(server.url("app", idle.admin.info.dbname)) as app:
        app.execute("select outbox.emit(%s, 'put', 'k', '1')", (TARGET,))
        # When the log is adopted beside it
        beside = Beside(operator_url)
        beside.start()
        until(lambda: beside.waits(idle.admin), "it waits for the transaction")
    beside.join(LIMIT)
    # Then what that wrote is of the era that is closed, and is applied
    assert beside.error is None
    assert one(idle.admin, "select first > (select max(id) from outbox.log) from outbox.era where number = 2")
    new_clock(idle)
    idle.drain(idle.reader())
    assert idle.sink.effects == [("k", 1)]


@pytest.mark.parametrize("committed", [True, False], ids=["in the log", "rolled back, and seen by a tick"])
def test_adopt_i6_draws_no_id_again_when_the_sequence_was_restored_to_an_earlier_one(
    idle: Bench, operator: Conn, committed: bool
) -> None:
    # Given ids that were drawn, and a sequence that knows nothing of them
    if committed:
        drawn = idle.emit("k")
    else:
        with pytest.raises(ZeroDivisionError), idle.admin.transaction():
            drawn = idle.emit("k")
            raise ZeroDivisionError
        idle.clock.step()
        idle.clock.step()
        assert one(idle.admin, "select high from outbox.tick order by id desc limit 1") >= drawn
    idle.admin.execute("select setval('outbox.log_id', 1, false)")
    # When it is adopted
    call(operator)
    # Then they are of the closed era, and the next one is far above
    assert one(idle.admin, "select first from outbox.era where number = 2") > drawn
    assert idle.emit("new") > drawn + 1000


def test_adopt_i2_i3_reads_on_from_a_lane_far_behind_when_a_dump_is_restored(bench: Bench, operator: Conn) -> None:
    # Given a lane that has done something and has something to do, and ticks after that which show nothing more
    idle = bench
    idle.emit("k", "done")
    idle.drain(idle.reader())
    claims_elsewhere(idle.admin)
    new_clock(idle)
    numbers = [idle.emit("k", n) for n in range(3)]
    for _ in range(3):
        idle.clock.step()
        with pytest.raises(ZeroDivisionError), idle.admin.transaction():
            idle.emit("never")
            raise ZeroDivisionError
        idle.clock.step()
    assert one(idle.admin, "select floor from outbox.tick order by id desc limit 1") >= numbers[-1]
    # When all that was restored, and is adopted
    restored(idle.admin)
    claims_elsewhere(idle.admin)
    assert call(operator, restored=True)[1] == 3
    # Then it is read
    new_clock(idle)
    idle.drain(idle.reader())
    assert idle.sink.effects == [("k", "done"), ("k", 0), ("k", 1), ("k", 2)]


def test_adopt_leaves_lanes_that_anybody_may_claim_and_that_know_nothing_of_before(idle: Bench, operator: Conn) -> None:
    # Given a lane that was stopped, whose owner died at an intent, and another one's with many epochs
    idle.admin.execute("update outbox.lane set epoch = 7, suspect = 3, state = 'stopped', reason = 'for the test'")
    idle.admin.execute("update outbox.lane set epoch = 1000003 where target = 'clock'")
    idle.claim()
    idle.die()
    call(operator)
    # Then all of them begin with an epoch that nobody has had
    rows = idle.admin.execute(
        "select distinct epoch, owner, place, lease_until, suspect, state, reason from outbox.lane"
    ).fetchall()
    assert rows == [(2000000, None, None, None, None, "draining", None)]


def test_adopt_tells_where_and_by_whom_the_era_was_opened(idle: Bench, operator: Conn) -> None:
    call(operator)
    assert one(idle.admin, "select reason, who, client from outbox.era where number = 2") == (
        "for the test", operator.info.user, "somebody",
    )  # fmt: skip
    assert one(
        idle.admin,
        "select (e.server, e.relation, e.database, e.timeline) is not distinct from "
        "(h.server, h.relation, h.database, h.timeline) from outbox.era e, outbox.here() h where e.number = 2",
    )


# ----------------------------------------------------------------------------------------------- what is in doubt


def test_adopt_i3_asks_only_about_what_can_not_be_done_twice(idle: Bench, operator: Conn) -> None:
    # Given one intent for each kind of participant, and one that was written here after the restore
    targets = (TARGET, "mail", "index", "blob", "saga", "actor.default")
    for target in targets:
        idle.admin.execute("select outbox.register(%s)", (target,))
        idle.admin.execute(
            "insert into outbox.log (target, action, key, payload) values (%s, 'put', 'k', '{}')", (target,)
        )
    restored(idle.admin)
    idle.emit("written here")
    claims_elsewhere(idle.admin)
    # When it is adopted
    assert call(operator, restored=True) == (2, len(targets), 2)
    # Then it is in doubt whether what makes its effects once was done in the lost time
    rows = idle.admin.execute("select target, state, epoch, adopted from outbox.receipt order by target").fetchall()
    assert rows == [("mail", "open", 0, True), (TARGET, "open", 0, True)]


@pytest.mark.parametrize(
    ("had", "has"),
    [("partial", ("open", 0, True)), ("open", ("open", 0, True)), ("closed", ("closed", 5, False))],
)
def test_adopt_i3_puts_attempts_of_before_in_doubt_but_not_those_that_are_known_to_be_done(
    idle: Bench, operator: Conn, had: str, has: tuple[str, int, bool]
) -> None:
    number = idle.emit("k")
    idle.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch, opened_at, closed_at) "
        "select id, target, slot, %s, 5, created_at - interval '1 h', case when %s = 'closed' then created_at end "
        "from outbox.log where id = %s", (had, had, number),
    )  # fmt: skip
    assert call(operator)[1:] == (1, 0 if had == "closed" else 1)
    assert one(idle.admin, "select state, epoch, adopted from outbox.receipt") == has
    # ... and evidence of the earliest one is looked for
    assert one(
        idle.admin,
        "select r.opened_at = l.created_at - interval '1 h' from outbox.receipt r join outbox.log l using (id)",
    )


def test_adopt_i3_looks_for_a_first_attempt_from_when_its_intent_was_written(idle: Bench, operator: Conn) -> None:
    """Though a later receipt says less: its time is that of the attempt that is known."""
    number = idle.emit("k")
    idle.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch, opened_at) "
        "select id, target, slot, 'partial', 5, created_at + interval '1 h' from outbox.log where id = %s", (number,),
    )  # fmt: skip
    call(operator)
    assert one(idle.admin, "select r.opened_at = l.created_at from outbox.receipt r join outbox.log l using (id)")


# --------------------------------------------------------------------------------------------- what is not done


def test_adopt_i2_counts_what_no_lane_has_done_wherever_it_is(bench: Bench, operator: Conn) -> None:
    # Given a lane in the middle of a batch, with an intent of a transaction that ran while it read on
    bench.sink.batch_limit = 2
    reader = bench.reader(backoff=Backoff(first=3600.0))
    with psycopg.connect(bench.admin.info.dsn) as straggler:
        straggler.execute("select outbox.emit(%s, 'put', 'straggler', '1')", (TARGET,))
        bench.sink.fate |= {"retry": RETRY, "poison": POISON}
        for key in ("done", "retry", "retry", "poison", "poison"):
            bench.emit(key)
        bench.emit("parked until tomorrow", due="2999-01-01")
        bench.drain(reader)
        for n in range(5):
            bench.emit(f"batch {n}")
        bench.emit("of tomorrow", due="2999-01-01")
        bench.clock.step()
        assert reader.step()
    bench.clock.step()
    assert [key for key, _ in bench.sink.effects] == ["done", "batch 0", "batch 1"]
    # Then what it has done, and what waits for an operator or for its time, doesn't count; what is behind such does
    rows = bench.admin.execute("select key from outbox.unapplied() order by id").fetchall()
    assert [key for (key,) in rows] == ["straggler", "retry", "retry", "poison", "batch 2", "batch 3", "batch 4"]
    # ... until that has come
    bench.admin.execute("set outbox.fake_now = '2999-01-02'")
    rows = bench.admin.execute("select key from outbox.unapplied() order by id").fetchall()
    assert [key for (key,) in rows][-2:] == ["batch 4", "of tomorrow"]
    assert "parked until tomorrow" in {key for (key,) in rows}


def test_adopt_i2_counts_each_intent_once_and_one_that_committed_late(bench: Bench) -> None:
    # Given a transaction that was open while a lane read on, past ticks that have forgotten its id
    reader = bench.reader()
    with psycopg.connect(bench.admin.info.dsn) as straggler:
        straggler.execute("select outbox.emit(%s, 'put', 'straggler', '1')", (TARGET,))
        for n in range(4):
            bench.emit(f"done {n}")
            bench.drain(reader)
        reader._note_empty(at_once=True)
        count = "select coalesce(string_agg(key, ' '), '') from outbox.unapplied()"
        assert one(bench.admin, count) == ""
    # Then it counts, and once, though a worker has parked it and died before it wrote its position
    assert one(bench.admin, count) == "straggler"
    bench.admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason, retry_at) "
        "select id, target, slot, key, 'retry', now() from outbox.log where key = 'straggler'"
    )
    assert one(bench.admin, count) == "straggler"
