"""A real process is killed at each named gap between two durable writes; then everything must come out right."""

from __future__ import annotations

import re
import subprocess
import sys
from email.parser import BytesHeaderParser
from pathlib import Path

import pytest

from outbox import failpoint
from outbox.blob import BlobStore
from tests.fixtures.site import LIMIT, Site
from tests.integration import test_blob_s3_crash

#: failpoint → the process that it is in.
WHERE = {
    "blob.staged": "app",
    "session.appended": "app",
    "tick.taken": "clock",
    "receipt.opened": "mail",
    "index.documents": "index",
    "index.committed": "index",
    "blob.linked": "blob",
    "blob.published": "blob",
    "mail.submitted": "mail",
    "reader.applied": "index",
    "lane.advanced": "blob",
    "reader.settled": "blob",
}

APPLICATION = """
import sys, sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
for n in range(int(sys.argv[1]), int(sys.argv[2])):
    with Session.begin() as session:
        outbox.blobs.put(session, f"content {n}".encode())
        outbox.index.put(session, f"k{n}", text=f"text {n}")
        outbox.mail.send(session, sender="a@example.org", to="b@example.org", subject=str(n), text="text")
"""


def application(site: Site, url: str, first: int, last: int, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION, str(first), str(last)],
        env=site.environment | {"OUTBOX_DATABASE": url} | environment, check=False, timeout=LIMIT,
    )  # fmt: skip
    return done.returncode


#: Points that the recovery passes again. After the others, what was done is done.
AGAIN = ("tick.taken", "receipt.opened", "index.documents", "blob.linked", "blob.published")


@pytest.mark.parametrize(("name", "again"), [(n, False) for n in WHERE] + [(n, True) for n in AGAIN])
def test_failpoint_i1_i2_i3_i11_loses_and_repeats_nothing_when_killed_there(
    site: Site, app_url: str, smtp: str, name: str, again: bool
) -> None:
    # Given: the promise, and where it is to be broken off
    where = WHERE[name]
    killed_app = application(site, app_url, 0, 3, **({"OUTBOX_FAILPOINT": f"{name}:2"} if where == "app" else {}))
    assert (killed_app == -9) == (where == "app")
    if where == "app":
        assert application(site, app_url, 1, 3) == 0  # the application does again what did not commit

    # When: the process dies there, once or once more while it recovers
    if where != "app":
        if where != "clock":
            site.start("clock")
        for _ in range(1 + again):
            victim = site.start(where, OUTBOX_FAILPOINT=name, OUTBOX_SMTP=smtp)
            assert victim.wait(LIMIT) == -9, f"{name} was not reached"
        for process in site.running:
            if "clock" in process.args:  # type: ignore[operator]
                process.terminate()

    # Then: after a restart everything is there, once
    assert site.start("all", "--until-idle", OUTBOX_SMTP=smtp).wait(LIMIT) == 0
    assert site.documents() == ["k0", "k1", "k2"]
    store = BlobStore(site.home / "blobs")
    assert len(list(store.inventory())) == 3
    assert all(store.verify(blob.digest) for blob in store.inventory())
    assert sorted(subjects(site.home / "mail")) == ["0", "1", "2"]
    assert site.one("select count(*) from outbox.parked") == 0


def subjects(maildir: Path) -> list[str]:
    parser = BytesHeaderParser()
    found = []
    for file in (maildir / "new").iterdir():
        with file.open("rb") as message:
            found.append(str(parser.parse(message)["Subject"]))
    return found


def test_failpoints_are_each_in_the_code_once_and_in_the_sweep() -> None:
    root = Path(failpoint.__file__).parent.parent
    sources = [*root.glob("outbox/**/*.py"), *root.glob("workers/**/*.py")]
    hits = [name for source in sources for name in re.findall(r'\bhit\("([^"]+)"\)', source.read_text("utf-8"))]
    assert sorted(hits) == sorted(failpoint.NAMES)
    assert WHERE.keys() | test_blob_s3_crash.WHERE.keys() == set(failpoint.NAMES)


def test_failpoint_refuses_an_unknown_name(site: Site) -> None:
    command = [sys.executable, "-c", "import outbox.failpoint"]
    done = subprocess.run(
        command, env=site.environment | {"OUTBOX_FAILPOINT": "no.such"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "known: blob.staged" in done.stderr
