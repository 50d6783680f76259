"""A log that goes on in another server: what lanes refuse, and what `adopt` makes of it."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, adoption, era, lane, live, tick
from outbox.blob import BlobStore
from outbox.errors import NotThisLog, WaitTimeout, WentBack
from outbox.participant import Doubt, Evidence, Outcome, Verdict
from outbox.position import Token
from outbox.retry import Backoff
from outbox.watermark import Watermark
from tests.fixtures.elsewhere import dump, restore
from tests.fixtures.lanes import TARGET, Bench, Sink
from workers.clock import Clock
from workers.postgres import Postgres
from workers.sweeper import sweep

Conn = psycopg.Connection[Any]
NOWHERE = Watermark(None)


def adopt(server: Postgres, database: str) -> adoption.Adopted:
    with psycopg.connect(server.url("outbox_operator", database), autocommit=True) as conn:
        return adoption.adopt(conn, adoption.plan(conn, NOWHERE))


def claims_elsewhere(conn: Conn) -> None:
    """The owners that a dump brings along are of another server: their leases need not run out."""
    conn.execute("update outbox.lane set owner = null, place = null, lease_until = null")


@pytest.fixture
def moved(elsewhere: Postgres) -> Iterator[list[str]]:
    """Databases of `elsewhere` that are dropped in the end."""
    names: list[str] = []
    yield names
    with psycopg.connect(elsewhere.url(), autocommit=True) as conn:
        for name in names:
            conn.execute(f"drop database if exists {name} with (force)")


class Writers:
    """Transactions that overlap: open across ticks, with savepoints, rolled back. Each has a key to itself while it is
    open, as the application's row locks would see to."""

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._random = url, random.Random(seed)
        self._open: list[tuple[Conn, str]] = []
        self._free = [f"k{n}" for n in range(12)]
        self._n = seed * 1000

    def write(self, *, count: int) -> None:
        for _ in range(count):
            choice = self._random.random()
            if self._open and (choice < 0.45 or not self._free):
                self._end(*self._open.pop(self._random.randrange(len(self._open))))
                continue
            conn, key = psycopg.connect(self._url), self._free.pop(0)
            if choice > 0.9:
                # An xid long before the first id.
                conn.execute("select pg_current_xact_id()")
            self._emit(conn, key)
            if choice > 0.7:
                self._open.append((conn, key))
            else:
                self._end(conn, key)

    def _emit(self, conn: Conn, key: str) -> None:
        for _ in range(self._random.randint(1, 3)):
            self._n += 1
            statement, values = "select outbox.emit(%s, 'put', %s, %s)", (TARGET, key, json.dumps(self._n))
            if self._random.random() < 0.3:
                with conn.transaction():
                    conn.execute(statement, values)
            else:
                conn.execute(statement, values)

    def _end(self, conn: Conn, key: str) -> None:
        self._emit(conn, key)
        if self._random.random() < 0.15:
            conn.rollback()
        else:
            conn.commit()
        conn.close()
        self._free.append(key)

    def end(self) -> None:
        while self._open:
            self._end(*self._open.pop())

    def close(self) -> None:
        for conn, _ in self._open:
            conn.close()


def burn(conn: Conn, beyond: int) -> None:
    """Use up xids until the next one is above."""
    conn.execute(
        f"do $$ begin while pg_current_xact_id()::text::bigint < {beyond} loop commit; end loop; end $$".encode()
    )


def go_beyond(conn: Conn, other: Postgres) -> None:
    """Use up xids until they are above all that the other server draws in a test."""
    with psycopg.connect(other.url(), autocommit=True) as there:
        row = there.execute("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint").fetchone()
    assert row is not None
    burn(conn, row[0] + 10_000)


@pytest.mark.parametrize("seed", range(4))
def test_adopt_i1_i2_i3_i4_loses_and_repeats_nothing_when_a_dump_of_a_busy_log_is_restored_elsewhere(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str], seed: int
) -> None:
    # Given traffic that overlaps the ticks, a lane that is in the middle of a batch, and transactions that are open
    bench.sink.batch_limit = 5
    if not seed % 2:
        go_beyond(bench.admin, elsewhere)
    reader = bench.reader()
    writers = Writers(server.url("app", bench.admin.info.dbname), seed)
    early = psycopg.connect(elsewhere.url(), autocommit=True)
    try:
        for _ in range(12):
            writers.write(count=8)
            bench.clock.step()
            reader.step()
        bench.clock.step()
        # ... and commits that no tick shows
        writers.write(count=6)
        before = list(bench.sink.effects)
        stand = reader.lane.stand(bench.conn)
        # When a dump is restored in a server whose xids are other ones, and applications write to it before anybody
        # has looked
        dumped = dump(server, bench.admin.info.dbname)
        if seed % 2:
            burn(early, 1 + max(int(x) for (x,) in bench.admin.execute("select xid::text from outbox.log")))
    finally:
        writers.close()
        early.close()
    name = restore(dumped, elsewhere)
    moved.append(name)
    with psycopg.connect(elsewhere.url(database=name), autocommit=True) as admin:
        claims_elsewhere(admin)
        restored = [row[0] for row in admin.execute("select id from outbox.log order by id")]
        here = Writers(elsewhere.url("app", name), seed + 100)
        here.write(count=20)
        here.end()
        with psycopg.connect(elsewhere.url("outbox_worker", name), autocommit=True) as worker:
            owned = lane.claim(worker, "clock", 0, owner=uuid.uuid4(), ttl=600)
            assert owned is not None
            with pytest.raises(NotThisLog, match="restored from a dump"):
                Clock(worker, owned)
            owned.release(worker)
        # ... and it is adopted, and more is written, whose xids the restored log has as well
        adopted = adopt(elsewhere, name)
        assert (adopted.era, stand.log) == (2, era.identity(admin))
        go_on = Bench(elsewhere, name)
        after = go_on.reader()
        assert after.position == stand
        for _ in range(5):
            here.write(count=8)
            go_on.drain(after)
        here.end()
        go_on.drain(after)
        # Then what was not done of the restored log is done, and what was written here, all once and each key in order
        effects = before + go_on.sink.effects
        wanted = admin.execute(
            "select key, payload from outbox.log where target = %s order by id", (TARGET,)
        ).fetchall()
        assert Counter(effects) == Counter(wanted)
        assert set(restored) <= {i for (i,) in admin.execute("select id from outbox.log")}
        for key in {key for key, _ in wanted}:
            assert [n for k, n in effects if k == key] == [n for k, n in wanted if k == key]
        go_on.close()


class Recorder(Sink):
    """Makes effects that can't be made twice, and can be asked about them."""

    records_attempts = True

    def __init__(self) -> None:
        super().__init__()
        self.doubts: list[Doubt] = []

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        self.doubts += doubts
        return super().probe(doubts)


def hop(source: Postgres, database: str, to: Postgres, moved: list[str]) -> str:
    """The database restored elsewhere, and nobody there yet. → its name."""
    moved.append(restore(dump(source, database), to))
    with psycopg.connect(to.url(database=moved[-1]), autocommit=True) as admin:
        claims_elsewhere(admin)
    return moved[-1]


def test_adopt_i3_puts_in_doubt_what_may_have_been_done_in_the_lost_time(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str]
) -> None:
    # Given a participant that records its attempts: one done, one to be retried, one of tomorrow, three not read yet
    sink = Recorder()
    sink.fate["later"] = Outcome(Verdict.RETRY, error="not now")
    reader = bench.reader(sink=sink, backoff=Backoff(first=3600.0))
    bench.emit("done")
    ids = {"later": bench.emit("later"), "tomorrow": bench.emit("tomorrow", due="2999-01-01")}
    bench.drain(reader)
    ids |= {key: bench.emit(key) for key in ("was done", "was not done", "nobody knows")}
    bench.clock.step()
    # When the database is restored from a dump of this moment, and adopted
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    assert adopt(elsewhere, name) == (2, 4, 4)
    new = Bench(elsewhere, name)
    again = Recorder()
    again.probed = {
        ids["was done"]: Evidence.APPLIED,
        ids["was not done"]: Evidence.NOT_APPLIED,
        ids["later"]: Evidence.NOT_APPLIED,
    }
    reader = new.reader(sink=again)
    new.emit("new")
    new.admin.execute("update outbox.parked set retry_at = now() where reason = 'retry'")
    new.drain(reader)
    # Then it is asked about everything that is not done and could have been, and told why
    asked = {doubt.intent.key for doubt in again.doubts}
    assert asked == {"later", "was done", "was not done", "nobody knows"}
    assert all(doubt.adopted for doubt in again.doubts)
    # ... what it knows counts, what nobody knows waits for an operator, and what is new is not in doubt
    assert sorted(key for key, _ in again.effects) == ["later", "new", "was not done"]
    assert new.parked() == {"in_doubt": ["nobody knows"], "due": ["tomorrow"]}
    # ... and a later attempt that is cut off is an ordinary doubt again
    new.emit("cut off")
    new.clock.step()
    new.conn.execute(
        "update outbox.receipt set state = 'open', closed_at = null, epoch = 1 where id = %s", (ids["later"],)
    )
    again.doubts.clear()
    new.die()
    new.reader(new.claim(), again)
    assert [(doubt.intent.key, doubt.adopted) for doubt in again.doubts] == [("later", False)]
    new.close()


def test_adopt_i2_i4_goes_on_twice_when_the_restored_log_is_restored_once_more(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str]
) -> None:
    """A lane that stands two eras back, of which the first one had the larger xids."""
    go_beyond(bench.admin, elsewhere)
    reader = bench.reader()
    bench.emit("a", 1)
    bench.drain(reader)
    bench.emit("a", 2)
    bench.emit("b", 1)
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    adopt(elsewhere, name)
    with psycopg.connect(elsewhere.url(database=name), autocommit=True) as admin:
        admin.execute("select outbox.emit(%s, 'put', 'a', '3')", (TARGET,))
        second = hop(elsewhere, name, elsewhere, moved)
        admin.execute("select outbox.emit(%s, 'put', 'lost', '1')", (TARGET,))
    with psycopg.connect(elsewhere.url(database=second), autocommit=True) as admin:
        admin.execute("select outbox.emit(%s, 'put', 'a', '4')", (TARGET,))
        assert adopt(elsewhere, second).era == 3
        admin.execute("select outbox.emit(%s, 'put', 'a', '5')", (TARGET,))
    new = Bench(elsewhere, second)
    new.drain(new.reader())
    assert new.sink.effects == [("a", 2), ("b", 1), ("a", 3), ("a", 4), ("a", 5)]
    # ... and what is live is what was written last
    assert [(i.key, i.payload) for i in live.puts(new.conn, TARGET, tick.latest(new.conn))] == [("a", 5), ("b", 1)]
    new.close()


def test_adopt_tokens_and_staged_files_of_before_are_what_they_were(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str], tmp_path: Path
) -> None:
    # Given a token of what is applied, of what is not, of a transaction that was rolled back, and staged files
    reader = bench.reader()
    app = bench.admin
    log = era.identity(app)
    store = BlobStore(tmp_path / "blobs")
    tokens: dict[str, Token] = {}
    for name in ("applied", "committed", "rolled back"):
        app.execute("begin")
        (xid,) = app.execute("select pg_current_xact_id()::text::bigint").fetchone()  # type: ignore[misc]
        staged = store.stage(name.encode(), xid=xid, log=log)
        row = app.execute(
            "select outbox.emit(%s, 'put', %s, %s)", (TARGET, name, json.dumps({"stage": staged.stage}))
        ).fetchone()
        tokens[name] = Token(xid, row[0])  # type: ignore[index]
        app.execute("rollback" if name == "rolled back" else "commit")
        if name == "applied":
            bench.drain(reader)
    name = hop(server, app.info.dbname, elsewhere, moved)
    with psycopg.connect(elsewhere.url(database=name), autocommit=True) as admin:
        # ... in a server where the same xids were rolled back
        while int(admin.execute("select pg_snapshot_xmax(pg_current_snapshot())::text").fetchone()[0]) <= max(  # type: ignore[index]
            token.xid for token in tokens.values()
        ):
            admin.execute("begin")
            admin.execute("select pg_current_xact_id()")
            admin.execute("rollback")
    adopt(elsewhere, name)
    new = Bench(elsewhere, name)

    def said(token: Token) -> tuple[bool | None, bool]:
        with Session(engine) as session:
            try:
                outbox.wait(session, token, TARGET, timeout=0)
            except WaitTimeout:
                return outbox.committed(session, token), False
            return outbox.committed(session, token), True

    engine = create_engine(f"postgresql+psycopg://{elsewhere.url('app', name).split('://')[1]}")
    outbox = Outbox(sessionmaker(engine))
    try:
        # When they are asked about: then it is as it was
        assert said(tokens["applied"]) == (True, True)
        assert said(tokens["committed"]) == (True, False)
        assert said(tokens["rolled back"])[0] is False
        swept = sweep(new.conn, store, log=log, trash_age=0)
        assert (swept.done, swept.pending) == (1, 1)
        # ... and when it is drained
        new.drain(new.reader())
        assert said(tokens["committed"]) == (True, True)
        assert [key for key, _ in new.sink.effects] == ["committed"]
        # ... and a new one is not taken for an old one
        (fresh,) = new.admin.execute(
            "select xid::text::bigint from outbox.log where id = %s", (new.emit("n"),)
        ).fetchone()  # type: ignore[misc]
        newest = new.admin.execute("select max(id) from outbox.log").fetchone()[0]  # type: ignore[index]
        assert said(Token(fresh, newest)) == (True, False)
    finally:
        engine.dispose()
        new.close()


def test_adopt_i6_draws_nothing_again_that_was_drawn_in_the_lost_time(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str]
) -> None:
    # Given a lost time in which ids, ticks and epochs were drawn
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    for _ in range(3):
        claims_elsewhere(bench.admin)
        late = bench.claim()
        number = bench.emit("lost")
        bench.clock.step()
    # When the dump is adopted
    adopt(elsewhere, name)
    new = Bench(elsewhere, name)
    # Then a store that knows the last owner's epoch lets the new one in, and no number comes again
    assert new.claim().epoch > late.epoch
    assert new.emit("new") > number
    assert new.clock.position.tick > bench.clock.position.tick
    new.close()


class Keeper(Sink):
    """Keeps its own position, like an index."""

    keeps_position = True


def test_adopt_i1_stops_a_participant_that_is_ahead_and_lets_one_go_on_that_is_not(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str]
) -> None:
    # Given a participant before the dump, and after it: between two batches, and in the middle of one
    keeper = Keeper()
    keeper.batch_limit = 2
    bench.emit("done")
    reader = bench.reader(sink=keeper)
    bench.drain(reader)
    behind = keeper.own
    assert behind is not None
    for n in range(5):
        bench.emit(f"lost {n}")
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    bench.emit("lost")
    bench.clock.step()
    reader.step()
    within = keeper.own
    bench.drain(reader)
    ahead = keeper.own
    assert within is not None
    assert ahead is not None
    assert within.upto
    adopt(elsewhere, name)
    new = Bench(elsewhere, name)
    # When they are opened in the log that was adopted
    for position in (within, ahead):
        keeper.own = position
        claims_elsewhere(new.admin)
        with pytest.raises(NotThisLog, match="of a time that this log has lost") as refused:
            new.reader(new.claim(), keeper)
        # Then only this lane stops
        assert not isinstance(refused.value, WentBack)
    # ... and the one that was not ahead goes on
    keeper.own, keeper.effects = behind, []
    claims_elsewhere(new.admin)
    new.drain(new.reader(new.claim(), keeper))
    assert [key for key, _ in keeper.effects] == [f"lost {n}" for n in range(5)]
    new.close()


def test_adopt_i7_tells_a_saga_of_effects_in_two_eras_when_their_owner_died_before_he_could(
    server: Postgres, bench: Bench, elsewhere: Postgres, moved: list[str]
) -> None:
    # Given two intents of a saga, one of before and one of after, that a participant holds and nobody has recorded
    saga = uuid.uuid4()
    append = "insert into outbox.log (target, action, key, payload, saga) values (%s, 'put', %s, '{}', %s) returning id"
    reader = bench.reader(sink=Keeper())
    bench.drain(reader)
    bench.admin.execute(append, (TARGET, "old", saga))
    name = hop(server, bench.admin.info.dbname, elsewhere, moved)
    adopt(elsewhere, name)
    new = Bench(elsewhere, name)
    new.admin.execute(append, (TARGET, "new", saga))
    new.clock.step()
    victim, keeper = new.reader(sink=Keeper()), Keeper()
    victim.participant = victim._attempts._participant = keeper
    victim._record = lambda *_: None  # type: ignore[method-assign]
    victim._note_empty = lambda **_: None  # type: ignore[method-assign]
    while victim.step():
        pass
    assert [key for key, _ in keeper.effects] == ["old", "new"]
    # When the next owner opens it
    new.die()
    new.reader(new.claim(), keeper)
    # Then the engine is told of both, once
    told = new.admin.execute(
        "select l.key from outbox.log o join outbox.log l on l.id = (o.payload ->> 'intent')::bigint "
        "where o.target = 'saga' and o.action = 'outcome' and o.payload ->> 'verdict' = 'applied' order by o.id"
    ).fetchall()
    assert told == [("old",), ("new",)]
    new.close()
