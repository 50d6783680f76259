"""Application, worker and sweeper with blobs in a bucket, all real processes, killed at each of their gaps."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from outbox.s3 import PART, S3Store
from tests.fixtures.s3 import ENVIRONMENT, Server
from tests.fixtures.site import LIMIT, Site, until
from workers.sweeper import sweep

#: failpoint → the process that it is in.
WHERE = {
    "blob.uploaded": "app",
    "blob.staged": "app",
    "blob.copied": "blob",
    "blob.marked": "blob",
    "blob.published": "blob",
    "lane.advanced": "blob",
}

LARGE, KEPT, DELETED = b"large" * (PART // 4), b"kept", b"deleted"

APPLICATION = """
import sys, sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
from tests.integration.test_blob_s3_crash import DELETED, KEPT, LARGE
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
with Session.begin() as session:
    outbox.blobs.put(session, LARGE)
    gone = outbox.blobs.put(session, DELETED)
with Session.begin() as session:
    outbox.blobs.put(session, KEPT)
    outbox.blobs.delete(session, gone.digest)
"""


@pytest.fixture
def s3_site(site: Site, s3_server: Server, s3_url: str) -> Site:
    """A site whose blobs are in a bucket."""
    site.environment |= ENVIRONMENT | {"OUTBOX_BLOBS": s3_url, "OUTBOX_S3_ENDPOINT": s3_server.endpoint}
    return site


def application(site: Site, url: str, failpoint: str = "") -> int:
    environment = site.environment | {"OUTBOX_DATABASE": url, "OUTBOX_FAILPOINT": failpoint}
    done = subprocess.run([sys.executable, "-c", APPLICATION], env=environment, check=False, timeout=LIMIT)
    return done.returncode


def check_killed(site: Site, app_url: str, worker: psycopg.Connection[Any], s3: S3Store, name: str, times: int) -> None:
    # Given: a large blob, a small one, and one that is deleted again; the process dies at the gap, once or more
    for _ in range(times if WHERE[name] == "app" else 0):
        assert application(site, app_url, name) == -9, f"{name} was not reached"
    assert application(site, app_url) == 0  # it does again what did not commit
    clock = site.start("clock")
    for _ in range(times if WHERE[name] == "blob" else 0):
        assert site.start("blob", OUTBOX_FAILPOINT=name).wait(LIMIT) == -9, f"{name} was not reached"
    # When: everything is started again, and has drained
    assert site.start("blob", "--until-idle").wait(LIMIT) == 0
    clock.terminate()
    assert clock.wait(LIMIT) == 0
    # Then: what committed is there, whole
    assert {blob.digest for blob in s3.inventory()} == {hashlib.sha256(c).hexdigest() for c in (LARGE, KEPT)}
    assert all(s3.verify(blob.digest) for blob in s3.inventory())
    assert site.one("select count(*) from outbox.parked") == 0
    # And nothing is left of what was begun: neither objects nor parts
    log = str(site.one("select log from outbox.identity"))

    def swept() -> bool:
        sweep(worker, s3, log=log, trash_age=-5)
        return not [*s3.bucket.list("staging/"), *s3.bucket.uploads("")]

    until(swept, "the sweeper removes what was staged")
    found = sorted(entry.key.split("/")[0] for entry in s3.bucket.list(""))
    assert found == ["lanes", "objects", "objects"]


# Those that only a bucket has; the fault tier goes through all of them.
@pytest.mark.parametrize("name", ["blob.uploaded", "blob.copied", "blob.marked"])
def test_s3_i2_i3_i11_loses_and_leaves_nothing_when_killed_there(
    s3_site: Site, app_url: str, worker: psycopg.Connection[Any], s3: S3Store, name: str
) -> None:
    check_killed(s3_site, app_url, worker, s3, name, times=1)


def test_s3_doctor_says_what_the_endpoint_honours(s3_site: Site) -> None:
    def ask(**environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "outbox", "doctor", "--json", "blobs"],
            env=s3_site.environment | environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        [check] = json.loads(done.stdout)["checks"]
        return dict(check)

    found = ask()
    assert found["ok"]
    assert "accepts a wrong checksum" in found["found"]
    absent = ask(OUTBOX_BLOBS="s3://nobody-has-this/x")
    assert not absent["ok"]
    assert "NoSuchBucket" in absent["found"]


def test_s3_worker_says_what_its_endpoint_lacks_and_waits(s3_site: Site, app_url: str) -> None:
    # Given: a bucket that isn't there
    assert application(s3_site, app_url) == 0
    good = s3_site.environment["OUTBOX_BLOBS"]
    s3_site.environment["OUTBOX_BLOBS"] = "s3://nobody-has-this/x"
    s3_site.start("clock")
    # When: the worker starts
    s3_site.start("blob")
    # Then: the lane waits, tells why, and parks nothing
    reason = until(
        lambda: s3_site.one("select reason from outbox.lane where target = 'blob' and state = 'waiting'"), "it waits"
    )
    assert "NoSuchBucket" in reason
    assert s3_site.one("select count(*) from outbox.parked") == 0
    s3_site.running[-1].terminate()
    assert s3_site.running[-1].wait(LIMIT) == 0
    # And with the right bucket it goes on
    assert s3_site.start("blob", "--until-idle", OUTBOX_BLOBS=good).wait(LIMIT) == 0
    assert s3_site.one("select count(*) from outbox.parked") == 0
