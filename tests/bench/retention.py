"""`retention`: how long writers have to wait while a partition of 10⁶ intents is archived, carried and dropped.

Two processes write all the time, one intent a transaction. The figure that counts is the longest that one of their
transactions took meanwhile: whatever lock retention takes on the log, they stand behind it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outbox import retention
from outbox.database import connect
from tests.bench.figure import Bar, Figure
from tests.bench.noop import TARGET, Noop
from tests.bench.rig import Rig, drain, rig
from tests.bench.site import Site

COUNT = 1_000_000
"""A partition's ids, of which the first one is 1."""

KEYS = 400_000
"""Different keys: what is carried into the base."""

CHUNK = 100_000

WRITERS = 2

_ROWS = """
insert into outbox.log (target, action, key, payload)
select %(target)s, 'put', 'note/' || n * 7919 %% %(keys)s,
       jsonb_build_object('title', 'Note ' || n, 'text', repeat(md5(n::text), 5))
  from generate_series(%(first)s::bigint, %(last)s) as n
"""

_OLD = "update outbox.tick set at = at - interval '60 days'"

# url, file: writes until the file is there, and prints the longest transaction in seconds, and how many there were.
_WRITER = """
import pathlib, sys, time
import psycopg
url, stop = sys.argv[1], pathlib.Path(sys.argv[2])
longest, count = 0.0, 0
with psycopg.connect(url, autocommit=True) as conn:
    print("writing", flush=True)
    while not stop.exists():
        start = time.perf_counter()
        conn.execute("select outbox.emit('bench', 'put', %s, '{}')", (f"new/{count % 100}",))
        longest, count = max(longest, time.perf_counter() - start), count + 1
        time.sleep(0.001)
print(longest, count)
"""


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """One partition."""
    folder = site.folder()
    folder.mkdir()
    with rig(site, TARGET) as made:
        made.admin.execute("select outbox.register('bench')")
        _fill(made, COUNT // 10 if quick else COUNT)
        with _writing(site, made, folder / "before") as before:
            time.sleep(2 if quick else 10)
        with connect(made.url, name="bench retention") as conn:
            (old,) = retention.plan(conn, 86_400.0).ready
            took = time.perf_counter()
            with _writing(site, made, folder / "during") as during:
                written = retention.drop(conn, old, folder / "archive", age=86_400.0)
                took = time.perf_counter() - took
        row = made.admin.execute("select count(*) from outbox.base").fetchone()
    if written.intents < (COUNT // 10 if quick else COUNT) - 1 or row is None or not row[0]:
        raise RuntimeError(f"{written.intents:,} intents were archived, and {row} carried")
    yield Figure("retention.stall", max(during), "s", Bar("<", 1.0))
    yield Figure("retention.stall-before", max(before), "s")
    yield Figure("retention.rate", written.intents / took, "intents/s")


def _fill(made: Rig, count: int) -> None:
    for first in range(1, count, CHUNK):
        last = min(first + CHUNK, count) - 1
        made.admin.execute(_ROWS, {"target": TARGET, "keys": KEYS, "first": first, "last": last})
    made.admin.execute("select setval('outbox.log_id', %s)", (COUNT - 1,))
    made.admin.execute("vacuum (analyze) outbox.log")
    made.tick()
    with made.reader(Noop()) as reader:
        reader.open()
        while True:
            made.admin.execute("select nextval('outbox.log_id')")
            made.tick()
            drain(reader)
            reader.idle()
            made.admin.execute(_OLD)
            row = made.admin.execute("select outbox.cut(%s) is not null", (COUNT,)).fetchone()
            if row is not None and row[0] and retention.plan(made.admin, 86_400.0).ready:
                return


@contextmanager
def _writing(site: Site, made: Rig, stop: Path) -> Iterator[list[float]]:
    """Writers at work; in the list, once they have stopped, how long the longest transaction of each took."""
    url = site.server.url("app", made.admin.info.dbname)
    command = [sys.executable, "-c", _WRITER, url, str(stop)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(WRITERS)]
    longest: list[float] = []
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        yield longest
        stop.touch()
        longest += [float(writer.communicate()[0].split()[0]) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
