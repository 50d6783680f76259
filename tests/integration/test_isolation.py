"""A database whose transactions are REPEATABLE READ or SERIALIZABLE by default, because its applications want that."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outbox import horizon, lane, retention, tick
from outbox.database import connect
from outbox.errors import NotReady
from outbox.position import Position
from tests.fixtures.lanes import TARGET, Bench
from tests.fixtures.retention import AGE, fill, grow_old, names
from tests.fixtures.site import LIMIT, until


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_retention_i2_sees_who_has_begun_anew_while_it_waited_whatever_the_databases_isolation_is(
    bench: Bench, worker_url: str, tmp_path: Path, level: str
) -> None:
    # Given an old partition that everybody has passed, in such a database
    reader = bench.reader()
    bench.emit("a", 1)
    bench.drain(reader)
    fill(bench)
    bench.drain(reader)
    reader.close()
    grow_old(bench.admin)
    oldest = names(bench.admin)[0]
    bench.give_up(TARGET)
    bench.admin.execute(f"alter database {bench.admin.info.dbname} set default_transaction_isolation = '{level}'")
    with (
        connect(worker_url, name="owner") as owner,
        connect(worker_url, name="dropping") as dropping,
        ThreadPoolExecutor(1) as pool,
    ):
        (each,) = retention.plan(dropping, AGE).ready
        mine = lane.claim(owner, TARGET, 0, owner=uuid.uuid4(), ttl=3600)
        assert mine is not None
        # When a lane is just writing down that it begins anew, and retention waits for that
        with owner.transaction():
            horizon.hold(owner)
            first = tick.first(owner)
            mine.advance(owner, Position(mine.stand(owner).log, first.id, first.nonce))
            drops = pool.submit(retention.drop, dropping, each, tmp_path / "shelf", age=AGE)
            waits = "select count(*) from pg_locks where not granted and locktype = 'advisory'"
            until(lambda: bench.admin.execute(waits).fetchone() != (0,), "it waits")
        # Then it sees who needs the partition now, and that stays
        with pytest.raises(NotReady, match=f"held by lane {TARGET}/0"):
            drops.result(LIMIT)
    assert names(bench.admin)[0] == oldest
