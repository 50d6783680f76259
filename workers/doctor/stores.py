"""What `outbox doctor` asks of the directory of the index, and of the directory or the bucket of the blob store."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from outbox import generation
from outbox.errors import NotReady
from outbox.search import shards
from outbox.settings import Settings, is_bucket, required
from workers.doctor import Findings

_ROOM = 1 << 30
"""Bytes free that are called room enough to start with."""


def index(settings: Settings) -> Findings:
    """Xapian, and a directory that keeps what is written."""
    found = find_spec("xapian") is not None
    advice = "pip install 'postgres-outbox[workers]', or use the distribution's python3-xapian"
    yield "xapian", found, "installed" if found else "not installed", advice
    directory = required(settings.index, "OUTBOX_INDEX")
    yield from _directory(directory)
    if found:
        yield from _generations(directory)


def _generations(directory: Path) -> Findings:
    """What a resilver would bring up to date, or has left behind."""
    from workers.index import format_of_documents  # noqa: PLC0415 - Xapian may not be there
    from workers.shard import format_of  # noqa: PLC0415

    current = generation.current(directory)
    with suppress(NotReady):
        old = [shard.name for shard in shards(directory) if format_of(shard) not in (None, format_of_documents())]
        said = f"shard {', '.join(old)} made by another version" if old else "documents are made as this version does"
        advice = "they go on; `outbox resilver index` makes all of them anew, so that searches treat them alike"
        yield "format", not old, said, advice
    left = [f"g{number}" for number in generation.folders(directory) if number != current]
    said = f"{', '.join(left)} beside the one in use" if left else "one"
    advice = "a resilver is under way, or was given up (`outbox operations list`): the next one removes what is left"
    yield "generations", not left, said, advice


def blobs(settings: Settings) -> Findings:
    """A directory that keeps what is written, on one file system with hard links; or a bucket."""
    place = required(settings.blobs, "OUTBOX_BLOBS")
    if is_bucket(place):
        yield from _bucket(settings)
        return
    store = Path(place)
    yield from _directory(store)
    parts = [store / name for name in ("staging", "objects", "trash")]
    one = len({part.stat().st_dev for part in parts if part.exists()}) <= 1
    yield "file system", one, "one" if one else "several", "have staging, objects and trash on one file system"
    there = next((part for part in (store, *store.parents) if part.is_dir()), store)
    file, second = there / _name(), there / _name()
    try:
        file.touch()
        os.link(file, second)
        yield "hard links", True, "supported", ""
    except OSError as error:
        yield (
            "hard links",
            False,
            error.strerror or "refused",
            "use a file system that has them (ext4, XFS, ZFS)",
        )
    finally:
        for path in (file, second):
            path.unlink(missing_ok=True)


def _bucket(settings: Settings) -> Findings:
    """What an S3 server really honours, by trying."""
    from outbox.s3 import S3Store  # noqa: PLC0415 - boto3 is loaded only where it is used

    endpoint = S3Store(str(settings.blobs), settings.s3_endpoint).endpoint()
    for sentence in endpoint.lacks:
        yield "S3", False, sentence, "use another server"
    if not endpoint.lacks:
        yield "S3", True, "; but ".join(["the bucket keeps blobs", *endpoint.warnings]), ""


def _directory(path: Path) -> Findings:
    """Whether what is written below `path` (or where it will be made) can be written and synced."""
    there = next(part for part in (path, *path.parents) if part.is_dir())
    where = "there" if there == path else f"to be made in {there}"
    file = there / _name()
    try:
        with file.open("xb") as opened:
            opened.write(b"x")
            opened.flush()
            os.fsync(opened.fileno())
        folder = os.open(there, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        yield "writable", True, f"{path}, {where}; fsync works", ""
    except OSError as error:
        advice = "let this user write there, on a disk that is sound"
        yield "writable", False, f"{path}: {error.strerror}", advice
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    stat = os.statvfs(there)
    free = stat.f_bavail * stat.f_frsize
    yield "room", free >= _ROOM, f"{free / (1 << 30):.1f} GiB free", "make room, or use another file system"


def _name() -> str:
    return f".doctor-{secrets.token_hex(8)}"
