"""`saga`, `saga-kept`: sagas of three steps, driven by one engine.

`saga` holds the engine against DBOS, in turns and on the same server: each does sagas, or workflows, of three steps
that do nothing, in one process, and what it did is durable at the end. DBOS is given its best way of those that are
tried first (`tests.bench.rival`). `saga.writing` is what remains when each step inserts a row: a savepoint for each
step, and the application's own statements.

`saga-kept` holds the engine against itself, with a million finished sagas in the tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from uuid import UUID, uuid4

import psycopg

from outbox import Saga
from outbox.saga.definition import new_id
from outbox.saga.registry import Definitions, register
from outbox.settings import Settings
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import Rig, drain, rig
from tests.bench.rival import NotInstalled, workflows
from tests.bench.sagas import three, writing
from tests.bench.site import Site
from workers.engine import Engine

COUNT = 4000
"""Sagas of a turn."""

KEPT = 1_000_000

BAR = Bar(">=", 20)

_START = """
insert into outbox.log (target, action, key, payload)
select 'saga', 'start', id, %(payload)s::jsonb from unnest(%(ids)s::text[]) as id
"""

_DONE = "select count(*) from outbox.saga where name = %s and state = 'completed'"

# As the engine leaves them behind, but for the checks of foreign keys, which would only take their time.
_KEEP = """
set local session_replication_role = replica;
create temporary table kept on commit drop as
select n, (lpad(to_hex((extract(epoch from now()) * 1000)::bigint - n), 12, '0') || '7'
           || substr(digits, 1, 3) || '8' || substr(digits, 4, 15))::uuid as id
  from generate_series(1, {count}) as n, md5(n::text) as digits
 order by n desc;
insert into outbox.saga (id, name, version, shape, key, state, decision, revision, input, started_at, ended_at)
select id, 'three', 1, '0123456789abcdef', 'kept/' || n, 'completed', 'commit', 1, '{{"a": 1}}',
       now() - n * interval '1 second', now() - n * interval '1 second' from kept;
insert into outbox.saga_step (saga, step, place, state, round, began_at, ended_at)
select id, step, place, 'done', 1, now(), now()
  from kept, unnest(array['one', 'two', 'three']) with ordinality as t (step, place)
"""


class Sagas:
    """An engine that is driven by hand, in a database of its own."""

    def __init__(self, made: Rig) -> None:
        self.rig = made
        definitions: Definitions = {}
        for saga in (three, writing):
            register(definitions, saga)
        self.engine = Engine(Settings(made.url, None, None, "smtp://127.0.0.1:1"), definitions)

    def rate(self, saga: Saga[Any], count: int, made: Callable[[], UUID] = new_id) -> float:
        """Start so many, and work them off. → sagas per second of the engine."""
        admin = self.rig.admin
        ids = [str(made()) for _ in range(count)]
        before = self._done(saga)
        admin.execute(_START, {"payload": json.dumps(saga.payload({"a": 1})), "ids": ids})
        self.rig.tick()
        with self.rig.reader(self.engine) as reader:
            reader.open()
            took = drain(reader)
        if (done := self._done(saga) - before) != count:
            raise RuntimeError(f"{done:,} sagas completed of {count:,}")
        return count / took

    def _done(self, saga: Saga[Any]) -> int:
        row = self.rig.admin.execute(_DONE, (saga.name,)).fetchone()
        return int(row[0]) if row else 0


@contextmanager
def _sagas(site: Site) -> Iterator[Sagas]:
    with rig(site, "saga", role="saga") as made:
        made.admin.execute("create table effect (saga uuid); grant insert on effect to app")
        yield Sagas(made)


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Sagas per second, and against DBOS."""
    pairs = 3 if quick else 9
    with _sagas(site) as sagas:
        try:
            with workflows(site) as theirs:
                pair = compare(lambda: sagas.rate(three, COUNT), theirs.rate, pairs=pairs)
        except NotInstalled as error:
            print(error, file=sys.stderr)
            # Not measured is not met.
            yield Figure("saga.ratio", 0.0, "not measured: DBOS is not there", BAR)
            yield Figure("saga.engine", median(sagas.rate(three, COUNT) for _ in range(pairs)), "sagas/s")
        else:
            yield Figure("saga.ratio", pair.ratio, "ratio of sagas/s", BAR)
            yield Figure("saga.engine", pair.ours, "sagas/s")
            yield Figure("saga.dbos", pair.theirs, "workflows/s")
        yield Figure("saga.writing", median(sagas.rate(writing, COUNT // 10) for _ in range(pairs)), "sagas/s")


def kept(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Among a million finished ones, against hardly any."""
    with _sagas(site) as full, _sagas(site) as empty:
        with psycopg.connect(full.rig.admin.info.dsn) as conn:
            conn.execute(_KEEP.format(count=KEPT))
        for sagas in (full, empty):
            sagas.rig.admin.execute("vacuum (analyze) outbox.saga, outbox.saga_step")
        full.rig.admin.execute("checkpoint")
        # Many short turns: the difference is smaller than what a machine's other work does to a single one.
        count, pairs = COUNT // 2, 5 if quick else 15
        pair = compare(lambda: full.rate(three, count), lambda: empty.rate(three, count), pairs=pairs)
        keyed = compare(lambda: full.rate(three, count, uuid4), lambda: empty.rate(three, count, uuid4), pairs=pairs)
    yield Figure("saga-kept.ratio", pair.ratio, "ratio of sagas/s", Bar(">=", 0.9))
    yield Figure("saga-kept.full", pair.ours, "sagas/s")
    yield Figure("saga-kept.empty", pair.theirs, "sagas/s")
    # An id made of a key is as good as random.
    yield Figure("saga-kept.keyed", keyed.ratio, "ratio of sagas/s")
