"""Blobs in a directory, the long tests: a gigabyte, and readers who look while publishers are killed."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from outbox.blob import BlobStore
from outbox.s3 import S3Store
from tests.fixtures.memory import MIB
from tests.fixtures.site import LIMIT, Site, until
from tests.integration.test_blob_memory import check_memory
from tests.integration.test_blob_s3_crash import s3_site

__all__ = ["s3_site"]

GIGABYTE = 1024 * MIB

SIZE = 50_000_000

APPLICATION = """
import os, sys, sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
data = bytearray(os.urandom(int(sys.argv[1])))
for n in range(int(sys.argv[2])):
    data[:8] = n.to_bytes(8, "big")
    with Session.begin() as session:
        blob = outbox.blobs.put(session, data)
    print(blob.digest, flush=True)
"""


def test_blob_of_a_gigabyte_needs_constant_memory(site: Site, app_url: str) -> None:
    check_memory(site, app_url, BlobStore(site.home / "blobs"), GIGABYTE)


@pytest.mark.parametrize("s3_server", ["rclone"], indirect=True)  # it keeps objects in files, moto in memory
def test_s3_blob_of_a_gigabyte_needs_constant_memory(s3_site: Site, s3: S3Store, app_url: str) -> None:
    check_memory(s3_site, app_url, s3, GIGABYTE)


def test_blob_i1_i2_is_never_seen_in_part_while_publishers_are_killed(site: Site, app_url: str) -> None:
    # Given: readers who look at every blob that is there, at once and all the time
    store = BlobStore(site.home / "blobs")
    stop, seen, partial = threading.Event(), set[str](), list[str]()

    def read() -> None:
        while not stop.is_set():
            for path in (site.home / "blobs" / "objects").glob("*/*"):
                if path.name not in seen:
                    if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                        partial.append(path.name)
                    seen.add(path.name)
            time.sleep(0.005)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    # When: an application stages 50 MB blobs, and application and worker are killed at random
    generator = random.Random(7)
    site.start("clock")
    committed: set[str] = set()
    try:
        for _ in range(4):
            application = subprocess.Popen(
                [sys.executable, "-c", APPLICATION, str(SIZE), "3"],
                env=site.environment | {"OUTBOX_DATABASE": app_url}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            worker = site.start("blob")
            assert application.stdout is not None
            committed.add(application.stdout.readline().strip())
            time.sleep(generator.uniform(0, 0.4))  # the moment of the kill, not a wait
            worker.send_signal(signal.SIGKILL)
            application.send_signal(signal.SIGKILL)
            committed |= {
                line.strip() for line in application.communicate()[0].splitlines(keepends=True) if line.endswith("\n")
            }
        assert site.start("blob", "--until-idle").wait(LIMIT) == 0
        until(lambda: committed <= seen, "readers have seen everything")
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    # Then: what anybody saw was whole, and what committed is there
    assert partial == []
    assert len(committed) >= 4
    assert all(store.verify(digest) for digest in committed)
