"""Queues in Postgres for comparison: one process that works off jobs which do nothing, eight at a time.

    queues.py procrastinate URL COUNT
    queues.py pgqueuer URL COUNT BATCH

A program, because its packages are not ours: it is run by the interpreter that they are installed in. It sends COUNT
jobs into an empty database, works them off, and prints jobs per second. As in `tests.bench.actors`, the time runs from
the start of job number `WARM` to the start of the last one, and each must have run. Both get what their manuals say is
fast: jobs that are coroutines, uvloop, and for PgQueuer asyncpg. All settings of durability are their defaults.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import uvloop

CONCURRENCY = 8

WARM = 100
"""Jobs that have run before the time begins."""

CHUNK = 1000
"""Jobs that are sent at a time."""


class Tally:
    """Counts what has run."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen: set[int] = set()
        self._began = self._ended = 0.0
        self.done = asyncio.Event()

    def run(self, number: int) -> None:
        """The job."""
        self._seen.add(number)
        if len(self._seen) == WARM:
            self._began = time.perf_counter()
        elif len(self._seen) == self._count:
            self._ended = time.perf_counter()
            self.done.set()

    def rate(self) -> float:
        """Once all are done. → jobs per second."""
        return (self._count - WARM) / (self._ended - self._began)


async def procrastinate(url: str, count: int) -> float:
    """Its worker with `concurrency`, and a connection for each."""
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=url, min_size=CONCURRENCY, max_size=2 * CONCURRENCY))
    tally = Tally(count)

    @app.task
    async def nothing(number: int) -> None:
        tally.run(number)

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for first in range(0, count, CHUNK):
            numbers = range(first, min(count, first + CHUNK))
            await nothing.batch_defer_async(*({"number": number} for number in numbers))
        worker = asyncio.create_task(
            app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False, delete_jobs="always")
        )
        await tally.done.wait()
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    return tally.rate()


async def pgqueuer(url: str, count: int, batch: int) -> float:
    """`batch`: jobs that it takes at a time, which is also how many run at a time."""
    import asyncpg
    from pgqueuer import AsyncpgDriver, Job, PgQueuer, Queries

    conn = await asyncpg.connect(url)
    await Queries(AsyncpgDriver(conn)).install()
    queuer = PgQueuer(AsyncpgDriver(conn))
    tally = Tally(count)

    @queuer.entrypoint("nothing")
    async def nothing(job: Job) -> None:
        tally.run(int(job.payload or b""))

    queries = Queries(AsyncpgDriver(conn))
    for first in range(0, count, CHUNK):
        numbers = range(first, min(count, first + CHUNK))
        size = len(numbers)
        await queries.enqueue(["nothing"] * size, [str(number).encode() for number in numbers], [0] * size)
    worker = asyncio.create_task(queuer.run(batch_size=batch))
    await tally.done.wait()
    queuer.shutdown.set()
    await asyncio.gather(worker, return_exceptions=True)
    await conn.close()
    return tally.rate()


def main(name: str, url: str, *numbers: str) -> None:
    """As the module says."""
    logging.disable(logging.WARNING)
    count, *batch = map(int, numbers)
    work = procrastinate(url, count) if name == "procrastinate" else pgqueuer(url, count, *batch)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(runner.run(work))


if __name__ == "__main__":
    main(*sys.argv[1:])
