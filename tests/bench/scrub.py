"""`scrub`: how fast blobs are looked through, held against `sha256sum` of the same files.

Both read files that the page cache has: what is measured is what scrub adds to reading and hashing (the log, the
inventory, two sorts, the operation's progress), and not the disk. `sha256sum` as Debian builds it does without the
processor's own instructions for it; so the same is measured against Python's hashlib, which has them, too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator

from outbox import operation
from outbox.blob import BlobStore
from outbox.database import connect
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import drain, rig
from tests.bench.site import Site
from workers.blob import BlobParticipant
from workers.scrub.blob import BlobSubject
from workers.scrub.survey import Survey

SIZE = 5_000_000
COUNT = 100


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Bytes a second."""
    folder = site.folder()
    store = BlobStore(folder)
    with rig(site, "blob") as made, connect(made.url, name="bench scrub") as conn:
        for _ in range(COUNT):
            with made.admin.transaction():
                row = made.admin.execute(
                    "select pg_current_xact_id()::text::bigint, log from outbox.identity"
                ).fetchone()
                if row is None:
                    raise RuntimeError("the log has no identity")
                staged = store.stage(os.urandom(SIZE), xid=row[0], log=row[1])
                made.admin.execute(
                    "insert into outbox.log (target, action, key, payload) values ('blob', 'put', %s, "
                    "jsonb_build_object('digest', %s::text, 'size', %s::int, 'stage', %s::text))",
                    (staged.digest, staged.digest, staged.size, staged.stage),
                )
        made.tick()
        with made.reader(BlobParticipant(store)) as reader:
            reader.open()
            drain(reader)
            reader.idle()
        files = [str(store.path(blob.digest)) for blob in store.inventory()]

        def scrubbed() -> float:
            start = time.perf_counter()
            ours = operation.begin(conn, "scrub", {"target": "blob"})
            progress = Survey(conn, ours, BlobSubject(store)).run()
            ours.end(conn)
            took = time.perf_counter() - start
            if (progress.items, progress.bytes, progress.found) != (COUNT, SIZE * COUNT, 0):
                raise RuntimeError("not everything was looked at")
            return SIZE * COUNT / 1e6 / took

        def bare() -> float:
            start = time.perf_counter()
            subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
            return SIZE * COUNT / 1e6 / (time.perf_counter() - start)

        def hashed() -> float:
            start = time.perf_counter()
            for name in files:
                with open(name, "rb") as file:
                    hashlib.file_digest(file, "sha256")
            return SIZE * COUNT / 1e6 / (time.perf_counter() - start)

        pair = compare(scrubbed, bare, pairs=3 if quick else 9)
        plain = compare(scrubbed, hashed, pairs=3 if quick else 9)
    shutil.rmtree(folder)
    yield Figure("scrub.ratio", pair.ratio, "ratio of MB/s", Bar(">=", 0.8))
    yield Figure("scrub.blobs", pair.ours, "MB/s")
    yield Figure("scrub.sha256sum", pair.theirs, "MB/s")
    yield Figure("scrub.hashlib-ratio", plain.ratio, "ratio of MB/s")
    yield Figure("scrub.hashlib", plain.theirs, "MB/s")
