"""Real processes are killed at each gap between two durable writes of a saga; every saga comes out either/or (I7)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from email.parser import BytesHeaderParser

import pytest

from tests.fixtures.site import LIMIT, Site, until

#: failpoint → the process that is killed there. Those of the engine are its own; the others are where a worker has made
#: an effect of a step and not reported it, or reported it and not gone on.
WHERE = {
    "session.appended": "app",
    "saga.written": "saga",
    "saga.committed": "saga",
    "tick.taken": "clock",
    "index.documents": "index",
    "index.committed": "index",
    "reader.applied": "index",
    "lane.advanced": "index",
    "receipt.opened": "mail",
    "mail.submitted": "mail",
    "reader.settled": "mail",
}

APPLICATION = """
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
from tests.fixtures.shop import Folder, publish
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
for n in range(4):
    with Session.begin() as session:
        publish.start(session, Folder(f"folder-{n}", bad=n % 2 == 1), key=str(n))
"""


#: The engine has several transactions for each saga, and an application several sagas.
AGAIN = ("session.appended", "saga.written", "saga.committed")


@pytest.mark.parametrize(("name", "nth"), [*((name, 1) for name in WHERE), *((name, 2) for name in AGAIN)])
def test_saga_i3_i7_i11_ends_either_or_when_a_process_is_killed(
    site: Site, app_url: str, smtp: str, name: str, nth: int
) -> None:
    # Given: an application whose sagas are started, and where it is to be broken off
    where = WHERE[name]
    site.admin.execute("create table folder (name text primary key); grant all on folder to app")
    site.environment |= {"OUTBOX_SAGAS": "tests.fixtures.shop", "OUTBOX_SMTP": smtp}

    def application(**more: str) -> int:
        environment = site.environment | {"OUTBOX_DATABASE": app_url} | more
        return subprocess.run(
            [sys.executable, "-c", APPLICATION], env=environment, check=False, timeout=LIMIT
        ).returncode

    if where == "app":
        assert application(OUTBOX_FAILPOINT=f"{name}:{nth}") == -9
    assert application() == 0  # again, or for the first time: a key makes it the same

    # When: everything runs, and one process dies there and comes back
    if where != "app":
        others = [site.start(target) for target in ("clock", "index", "mail", "saga") if target != where]
        victim = site.start(where, OUTBOX_FAILPOINT=f"{name}:{nth}")
        assert victim.wait(LIMIT) == -9, f"{name} was not reached"
        site.start(where)
        assert others
    else:
        for target in ("clock", "index", "mail", "saga"):
            site.start(target)

    # Then: each folder is published and mailed once, or nothing of it is left
    until(lambda: site.one("select count(*) from outbox.saga where ended_at is not null") == 4, "all sagas have ended")
    states = dict(site.admin.execute("select key, state from outbox.saga").fetchall())
    assert states == {"0": "completed", "1": "compensated", "2": "completed", "3": "compensated"}
    assert site.admin.execute("select name from folder order by name").fetchall() == [("folder-0",), ("folder-2",)]
    until(lambda: site.documents() == ["folder-0", "folder-2"], "the index has what is published")
    assert subjects(site) == {"folder-0": 1, "folder-2": 1}
    assert site.one("select count(*) from outbox.parked") == 0


def subjects(site: Site) -> Counter[str]:
    parser = BytesHeaderParser()
    found: Counter[str] = Counter()
    for file in (site.home / "mail" / "new").iterdir():
        with file.open("rb") as message:
            found[str(parser.parse(message)["Subject"])] += 1
    return found
