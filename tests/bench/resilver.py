"""`resilver`: a resilver of the index, from the log to the swap, against Xapian alone with the same documents.

Ours is what the command does: it counts, reads what is live, builds, catches up, compares every document with the log,
swaps the lanes and drains them. Xapian alone means what it means in `index`: the documents lie ready in memory, with
the same terms and data, in commits as large as those of a resilver, each followed by the same fsync of the directory.
Nothing is checked there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from outbox import generation, operation
from outbox.database import connect
from outbox.document import key_term
from outbox.intent import Intent
from outbox.settings import Settings
from tests.bench import index as bare
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import Rig, rig
from tests.bench.site import Site
from workers.cli.course import Pace
from workers.index import ready
from workers.resilver import index
from workers.resilver.draft import BATCH
from workers.shard import xapian

DOCUMENTS = 100_000
QUICK = 10_000


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Documents a second."""
    count = QUICK if quick else DOCUMENTS
    with rig(site, "index", "postgres") as made:
        documents = list(bare.documents(count))
        bare.emit(made, documents)
        made.tick()
        live = site.folder()
        _passed(made)
        plain = [
            bare.Plain(key_term(key), payload["title"], payload["text"], put.record)
            for key, payload in documents
            if (put := ready(Intent.make("index", "put", key, payload))) is not None
        ]

        def ours() -> float:
            return count / _resilver(made, live, count)

        def theirs() -> float:
            folder = site.folder()
            took = bare.build(folder, plain, BATCH)
            shutil.rmtree(folder)
            return count / took

        # Once: each side takes a minute and a half, which evens out what else the machine does.
        pair = compare(ours, theirs, pairs=2 if quick else 1, warm=False)
    yield Figure("resilver.ratio", pair.ratio, "ratio of documents/s", Bar(">=", 0.8))
    yield Figure("resilver.index", pair.ours, "documents/s")
    yield Figure("resilver.xapian", pair.theirs, "documents/s")


def _passed(made: Rig) -> None:
    """The lane is past all of it. What the index of before holds is not looked at, so it may as well be nothing."""
    made.admin.execute(
        "insert into outbox.position (target, lane, epoch, tick) select 'index', 0, epoch, (select max(id) from "
        "outbox.tick) from outbox.lane where target = 'index'"
    )


def _resilver(made: Rig, directory: Path, count: int) -> float:
    settings = replace(Settings.load(env={"OUTBOX_DATABASE": made.url, "OUTBOX_STATE": "none"}), index=directory)
    with connect(made.url, name="bench") as conn:
        start = time.perf_counter()
        course = index.begin(conn, index.plan(conn, directory, 1))
        result = index.run(conn, settings, course, lambda _what, _count: None, Pace(None))
        course.end(conn, result=result)
        took = time.perf_counter() - start
        assert operation.find(conn, number=course.id)[0]["state"] == "done"
    [number] = generation.folders(directory)
    written = xapian.Database(str(generation.folder(directory, number) / "00"))
    found = written.get_doccount()
    written.close()
    if found != count:
        raise RuntimeError(f"the index has {found:,} documents of {count:,}: see the messages above")
    return took
