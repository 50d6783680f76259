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
from outbox.settings import Settings
from tests.bench import index as bare
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import Rig, drain, rig
from tests.bench.site import Site
from workers.cli.course import Pace
from workers.index import IndexParticipant
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
        with made.reader(IndexParticipant(live)) as reader:
            reader.open()
            drain(reader)
        plain = bare.plain(live / "00", documents)

        def ours() -> float:
            return count / _resilver(made, live, count)

        def theirs() -> float:
            folder = site.folder()
            took = bare.build(folder, plain, BATCH)
            shutil.rmtree(folder)
            return count / took

        pair = compare(ours, theirs, pairs=2, warm=False)
    yield Figure("resilver.ratio", pair.ratio, "ratio of documents/s", Bar(">=", 0.8))
    yield Figure("resilver.index", pair.ours, "documents/s")
    yield Figure("resilver.xapian", pair.theirs, "documents/s")


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
