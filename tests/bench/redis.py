"""A Redis of the benchmark's own, for comparison: Debian's `redis-server` on a private unix socket."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from tests.bench.rival import NotInstalled
from tests.bench.site import Site

PATIENCE = 30.0
"""Seconds to start."""


@contextmanager
def server(site: Site) -> Iterator[str]:
    """A running server. → its URL. Raises `NotInstalled`.

    It appends to a file and syncs that once a second: more than its default promises, and less than Postgres does.
    """
    if shutil.which("redis-server") is None:
        raise NotInstalled("Redis is not there: `make test-packages` installs it, as root on Debian")
    home = site.folder()
    home.mkdir()
    url = f"unix://{home}/socket"
    with subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", f"{home}/socket", "--dir", str(home), "--save", "",
         "--appendonly", "yes", "--appendfsync", "everysec"],
        stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            client = redis.Redis.from_url(url)
            deadline = time.monotonic() + PATIENCE
            while not _answers(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("Redis doesn't start")
                time.sleep(0.02)
            client.close()
            yield url
        finally:
            process.terminate()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
