"""A large blob needs no more memory than a small one: neither where it is staged nor where it is published."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from outbox.blob import BlobStore
from outbox.s3 import S3Store
from outbox.store import Store
from tests.fixtures.memory import MIB, peak
from tests.fixtures.site import Site, until
from tests.integration.test_blob_s3_crash import s3_site

__all__ = ["s3_site"]

ALLOWED = 64 * MIB
"""Bytes above what a process has that has staged or published a small blob."""

APPLICATION = """
import sys, sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
from tests.fixtures.memory import peak
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
for source in sys.argv[1:]:
    with Session.begin() as session:
        outbox.blobs.put(session, source)
    print(peak(), flush=True)
"""


def check_memory(site: Site, app_url: str, store: Store, size: int) -> None:
    # Given: a worker that has published a small blob, and a file of a size that is far over what is allowed
    small, large = site.home / "small", site.home / "large"
    small.write_bytes(b"small")
    with large.open("wb") as file:
        file.truncate(size)  # a hole: it is read as zeros, and takes no time to make
    site.start("clock")
    worker = site.start("blob")
    application(site, app_url, small)
    until(lambda: list(store.inventory()), "the small one is published")
    before = peak(worker.pid)
    # When: an application stages both, and the worker publishes the large one
    first, second = application(site, app_url, small, large)
    until(lambda: {blob.size for blob in store.inventory()} == {5, size}, "the large one is published")
    # Then: both processes have grown by some buffers
    assert second - first < ALLOWED
    assert 0 < before <= peak(worker.pid) < before + ALLOWED
    assert site.one("select count(*) from outbox.parked") == 0


def application(site: Site, app_url: str, *sources: Path) -> list[int]:
    """Stage files, a transaction each. → the process's peak of memory after each."""
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION, *map(str, sources)],
        env=site.environment | {"OUTBOX_DATABASE": app_url}, check=True, stdout=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    return list(map(int, done.stdout.split()))


def test_blob_needs_constant_memory_from_stage_to_publication(site: Site, app_url: str) -> None:
    check_memory(site, app_url, BlobStore(site.home / "blobs"), 192 * MIB)


def test_s3_needs_constant_memory_from_stage_to_publication(s3_site: Site, s3: S3Store, app_url: str) -> None:
    check_memory(s3_site, app_url, s3, 128 * MIB)
