"""The log's reading, model-based: hypothesis interleaves real transactions, step by step.

A writer locks the row of a key before it emits for it, as the session hook does. The model knows what committed.
The same machine, with a reader that is known to be wrong, must find a violation (teeth).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from outbox import tick
from tests.model.check import violations
from tests.model.readers import Glances, IdGreaterThanLast, LogReader, OrderByXid, TwoSnapshots
from workers.postgres import Postgres

WRITERS = 4
KEYS = ("a", "b", "c")


class Writer:
    """A connection with a transaction, and what the model knows of it."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self.conn = conn
        self.open = False
        #: Written so far: one list for the transaction, one more for each savepoint.
        self.levels: list[list[tuple[str, int]]] = []

    def locks(self) -> set[str]:
        return {key for level in self.levels for key, _ in level}


class Interleavings(RuleBasedStateMachine):
    """Writers begin, write, set and release savepoints, commit and roll back; ticks and reads come in between."""

    #: One to clean up, one to read, the others to write; opened once for all runs.
    connections: list[psycopg.Connection[Any]]
    reader_class: Callable[[psycopg.Connection[Any]], LogReader]

    def __init__(self) -> None:
        super().__init__()
        self.conn, reading, *writing = self.connections
        self.conn.execute("set session_replication_role = replica")  # a test may clean up what nobody else may
        self.conn.execute("delete from outbox.log; delete from outbox.position; delete from outbox.tick where id > 1")
        self.conn.execute("update outbox.lane set owner = null, lease_until = null")
        low = tick.poll(self.conn).low
        self.conn.execute(
            "update outbox.tick set snapshot = pg_current_snapshot(), low = %s, high = %s, floor = %s", [low] * 3
        )
        self.writers = [Writer(conn) for conn in writing]
        self.reader = self.reader_class(reading)
        self.numbers = dict.fromkeys(KEYS, 0)
        self.committed: list[tuple[str, int]] = []
        self.seen: list[tuple[int, str, int]] = []

    def _free(self, key: str, writer: Writer) -> bool:
        return not any(key in other.locks() for other in self.writers if other is not writer)

    @rule(who=st.integers(0, WRITERS - 1))
    def begin(self, who: int) -> None:
        writer = self.writers[who]
        if not writer.open:
            # An xid without an intent: a transaction that begins early and writes late.
            writer.conn.execute("select pg_current_xact_id()")
            writer.open, writer.levels = True, [[]]

    @rule(who=st.integers(0, WRITERS - 1), key=st.sampled_from(KEYS), count=st.integers(1, 12))
    def write(self, who: int, key: str, count: int) -> None:
        writer = self.writers[who]
        if not self._free(key, writer):
            return  # it would wait for the row lock
        if not writer.open:
            writer.open, writer.levels = True, [[]]
        for _ in range(count):
            self.numbers[key] += 1
            number = self.numbers[key]
            writer.conn.execute("select outbox.emit('index', 'put', %s, %s)", (key, json.dumps({"n": number})))
            writer.levels[-1].append((key, number))

    @rule(who=st.integers(0, WRITERS - 1))
    def savepoint(self, who: int) -> None:
        writer = self.writers[who]
        if writer.open and len(writer.levels) < 4:
            writer.conn.execute(f"savepoint s{len(writer.levels)}")
            writer.levels.append([])

    @rule(who=st.integers(0, WRITERS - 1), keep=st.booleans())
    def end_savepoint(self, who: int, keep: bool) -> None:
        writer = self.writers[who]
        if writer.open and len(writer.levels) > 1:
            level = writer.levels.pop()
            name = f"s{len(writer.levels)}"
            if keep:
                writer.conn.execute(f"release savepoint {name}")
                writer.levels[-1] += level
            else:
                writer.conn.execute(f"rollback to savepoint {name}")

    @rule(who=st.integers(0, WRITERS - 1), keep=st.sampled_from((True, True, False)))
    def end(self, who: int, keep: bool) -> None:
        writer = self.writers[who]
        if writer.open:
            if keep:
                writer.conn.commit()
                self.committed += [pair for level in writer.levels for pair in level]
            else:
                writer.conn.rollback()
            writer.open, writer.levels = False, []

    @rule()
    def read(self) -> None:
        self.seen += self.reader.read()

    @precondition(lambda self: self.seen)
    @rule()
    def read_again(self) -> None:
        before = len(self.seen)
        self.read()
        ids = [seen[0] for seen in self.seen[before:]]
        assert not set(ids) & {seen[0] for seen in self.seen[:before]}, "an intent came twice"

    def teardown(self) -> None:
        for who in range(WRITERS):
            self.end(who, True)
        self.read()
        assert not violations(self.committed, self.seen)


@contextmanager
def machine(server: Postgres, database: str, reader: Any) -> Iterator[type[Interleavings]]:
    """The machine for one database and one way to read."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(psycopg.connect(server.url(database=database), autocommit=number < 2))
            for number in range(WRITERS + 2)
        ]
        yield type("Machine", (Interleavings,), {"connections": connections, "reader_class": reader})
        for conn in connections:
            conn.rollback()


@pytest.mark.parametrize(("reader", "examples"), [(TwoSnapshots, 60), (Glances, 40)])
def test_log_i1_i2_i3_i4_reads_whole_transactions_in_order_when_interleaved(
    server: Postgres, database: str, reader: Any, examples: int
) -> None:
    with machine(server, database, reader) as made:
        run_state_machine_as_test(
            made,
            settings=settings(
                max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )


@pytest.mark.parametrize("wrong", [IdGreaterThanLast, OrderByXid])
def test_log_i12_machine_finds_the_fault_when_reading_is_wrong(server: Postgres, database: str, wrong: Any) -> None:
    with machine(server, database, wrong) as made, pytest.raises(AssertionError):
        run_state_machine_as_test(
            made,
            settings=settings(
                max_examples=400, stateful_step_count=40, deadline=None, derandomize=True, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
