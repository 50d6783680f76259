"""The log's reading under real concurrency: threads write with delays, while a clock ticks and a reader reads.

Traffic: short transactions with random delays, rollbacks and savepoints; one that stays open from the first moment
to the last; one giant. The same traffic turns the check red for the two known-bad ways to read (teeth).
"""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import psycopg
import pytest

from tests.model.check import violations
from tests.model.readers import IdGreaterThanLast, OrderByXid, TwoSnapshots
from workers.postgres import Postgres

KEYS = 6
GIANT = 5_000


class Traffic:
    """Writers, and the list of what they committed."""

    def __init__(self, server: Postgres, database: str, seed: int) -> None:
        self.url = server.url(database=database)
        self.seed = seed
        self.committed: list[tuple[str, int]] = []
        self.lock = threading.Lock()
        with psycopg.connect(self.url) as conn:
            conn.execute("create table counter (key text primary key, n int not null default 0)")
            conn.execute("insert into counter (key) select 'k' || n from generate_series(0, %s) n", (KEYS - 1,))
            conn.execute("insert into counter (key) values ('long'), ('giant')")

    def emit(self, conn: psycopg.Connection[Any], key: str) -> tuple[str, int]:
        """As the session hook does it: the row is locked first, then the intent draws its id."""
        row = conn.execute("update counter set n = n + 1 where key = %s returning n", (key,)).fetchone()
        assert row is not None
        conn.execute("select outbox.emit('index', 'put', %s, %s)", (key, json.dumps({"n": row[0]})))
        return key, row[0]

    def writer(self, number: int, rounds: int) -> None:
        chance = random.Random(f"{self.seed}/{number}")
        with psycopg.connect(self.url) as conn:
            for _ in range(rounds):
                conn.execute("select pg_current_xact_id()")
                time.sleep(chance.random() * 0.004)  # begins early, writes late: what order by xid gets wrong
                key = f"k{chance.randrange(KEYS)}"  # one key a transaction, so that writers can't deadlock
                done = [self.emit(conn, key) for _ in range(chance.randrange(1, 4))]
                if chance.random() < 0.3:
                    try:
                        with conn.transaction():
                            inside = [self.emit(conn, key)]
                            if chance.random() < 0.5:
                                raise psycopg.Rollback
                            done += inside
                    except psycopg.Rollback:
                        pass
                time.sleep(chance.random() * 0.004)  # draws an id early, commits late: what `id > last` loses
                if chance.random() < 0.2:
                    conn.rollback()
                else:
                    conn.commit()
                    with self.lock:
                        self.committed += done

    def giant(self) -> None:
        with psycopg.connect(self.url) as conn:
            conn.execute(
                "insert into outbox.log (target, action, key, payload) "
                "select 'index', 'put', 'giant', jsonb_build_object('n', n) from generate_series(1, %s) n", (GIANT,),
            )  # fmt: skip
            conn.commit()
        with self.lock:
            self.committed += [("giant", n) for n in range(1, GIANT + 1)]

    def run(self, reader: Any, rounds: int = 60) -> list[tuple[int, str, int]]:
        """All traffic, with `reader` reading all the while. → what it saw."""
        seen: list[tuple[int, str, int]] = []
        with psycopg.connect(self.url) as long:
            self.committed.append(self.emit(long, "long"))
            threads = [threading.Thread(target=self.writer, args=(n, rounds)) for n in range(8)]
            threads.append(threading.Thread(target=self.giant))
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                seen += reader.read()
            seen += reader.read()
            during = len(seen)
            long.commit()
        seen += reader.read()
        assert during > 0, "nothing was read while the long transaction was open: the reader is held back"
        return seen


@pytest.fixture
def traffic(server: Postgres, database: str) -> Traffic:
    return Traffic(server, database, seed=20261122)


def test_log_i1_i2_i3_i4_shows_each_commit_once_in_order_under_traffic(traffic: Traffic, worker: Any) -> None:
    seen = traffic.run(TwoSnapshots(worker, limit=500))
    assert len(traffic.committed) > GIANT + 300
    assert violations(traffic.committed, seen) == []


def test_log_i12_loses_intents_when_read_by_id_greater_than_last(traffic: Traffic, worker: Any) -> None:
    seen = traffic.run(IdGreaterThanLast(worker))
    assert any(wrong.startswith("I2") for wrong in violations(traffic.committed, seen))


def test_log_i12_breaks_the_order_of_keys_when_ordered_by_xid(traffic: Traffic, worker: Any) -> None:
    seen = traffic.run(OrderByXid(worker))
    assert any(wrong.startswith("I4") for wrong in violations(traffic.committed, seen))
