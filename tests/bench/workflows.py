"""DBOS's side of `saga`: one process with workflows of three steps, run by the interpreter that `dbos` is installed in.

A program that `tests.bench.rival` talks to, because its packages are not ours. Argument: the database's URL. Each line
of stdin is an order, `start COUNT THREADS` or `queue COUNT WORKERS`; each line of stdout is the seconds that it took.

* `start`: that many threads start workflows and run them, as an application does in its requests.
* `queue`: the workflows are enqueued beforehand and not counted; the time begins when the queue is opened.

The settings are its own, but for a larger pool (a connection for every thread) and no telemetry. Workflows that are
coroutines were tried too, and are as fast.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS, DBOSConfig

POOL = 40
"""Connections: more than any number of threads that is tried."""


@DBOS.step()
def one() -> None:
    """Do nothing."""


@DBOS.step()
def two() -> None:
    """Do nothing."""


@DBOS.step()
def three() -> None:
    """Do nothing."""


@DBOS.workflow()
def flow(_number: int) -> None:
    """Three steps, one after another."""
    one()
    two()
    three()


def start(count: int, threads: int) -> float:
    """Start and run workflows. → seconds."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        # Called and not started in the background: the caller's thread runs it, which is the cheapest way there is.
        for _ in pool.map(flow, range(count)):
            pass
        return time.perf_counter() - began


def queue(count: int, concurrency: int) -> float:
    """Work off a queue. → seconds."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    # Closed until the last one is in it.
    opened = DBOS.register_queue(name, polling_interval_sec=0.05, worker_concurrency=0)
    handles = [DBOS.enqueue_workflow(name, flow, number) for number in range(count)]
    began = time.perf_counter()
    opened.set_worker_concurrency(concurrency)
    for handle in handles:
        handle.get_result(polling_interval_sec=0.05)
    return time.perf_counter() - began


def main() -> None:
    """Carry out orders until stdin ends."""
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": sys.argv[1],
        "sys_db_pool_size": POOL,
        "log_level": "WARNING",
        "enable_otlp": False,
    }
    logging.getLogger("dbos").setLevel(logging.WARNING)
    DBOS(config=config)
    DBOS.launch()
    ways = {"start": start, "queue": queue}
    print("ready", flush=True)
    for line in sys.stdin:
        order, *numbers = line.split()
        count, workers = map(int, numbers)
        print(ways[order](count, workers), flush=True)
    DBOS.destroy()


if __name__ == "__main__":
    main()
