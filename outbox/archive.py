"""Archives: what a dropped partition of the log held, in a file that needs nothing else to be read.

    outbox-<log>-<first id>-<id after the last>-<digest>.jsonl.gz

A gzip of lines of JSON: a header (format, log, range of ids), one line for each intent in order of id, and an end that
counts them and carries the sha256 of everything before it. An archive is never changed or overwritten: another history
of the same log (restored to an earlier time) has another digest, and so another name. Payloads and headers are JSON
within JSON, as text, so that what Python can't read survives as it was.

`outbox.retention` writes them, and `replay-outbox --from-archive` reads them. The place is a directory or
`s3://BUCKET/PREFIX`. When `write` returns, the archive is complete and durable: the file and its directory are synced,
or S3 has checked and stored it. Killed before, it leaves nothing under that name.

Errors: `ArchiveDamaged` for a file that is torn, changed or of another format, before anything of it is handed out;
`NotReady` for a place that can't be one; `Unavailable` from S3; OSError from the file system.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from outbox.errors import NotReady
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.settings import is_bucket

if TYPE_CHECKING:
    from outbox.bucket import Bucket

FORMAT = "outbox archive 1"

SUFFIX = ".jsonl.gz"

LEVEL = 5
"""Of gzip: a higher one takes twice the time for two percent."""

PART = 16 * 1024**2
"""Bytes of a part of an upload."""

_NAME = re.compile(r"outbox-([0-9a-f]{16})-(\d{19})-(\d{19})-([0-9a-f]{16})\.jsonl\.gz")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ArchiveDamaged(NotReady):
    """An archive is torn, was changed, or is none."""


class Archived(NamedTuple):
    """An intent in an archive."""

    intent: Intent
    created_at: datetime
    xid: int
    #: Its receipt: attempts, evidence, closed_at; None without one.
    receipt: dict[str, Any] | None = None
    #: It was never applied: an operator skipped it, or its saga recalled it.
    void: bool = False


class Archive(NamedTuple):
    """An archive by its name; nothing of it is read yet."""

    place: Path | str
    name: str
    #: Identity of the log that it is from.
    log: str
    #: Its first id, and the first id after it.
    first: int
    until: int


class Written(NamedTuple):
    """What `write` made."""

    name: str
    intents: int
    #: Of the file, as `sha256sum` prints it.
    sha256: str
    bytes: int


# ---------------------------------------------------------------------------------------------- writing


def write(
    rows: Iterable[Archived], place: Path | str, *, log: str, first: int, until: int, endpoint: str | None = None
) -> Written:
    """Archive `rows`, which come in order of id. The same rows make the same file."""
    if is_bucket(place):
        bucket = _bucket(place, endpoint)
        with tempfile.TemporaryFile() as file:
            written = _compress(rows, file, log, first, until)
            file.seek(0)
            _upload(bucket, written.name, file, written.bytes)
        return written
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    with _part(folder, f".outbox-{log}-{first:019d}.part") as (file, part):
        written = _compress(rows, file, log, first, until)
        os.fsync(file.fileno())
        hit("retention.written")
        # Not before: the next one must be able to write a file that was left here.
        part.rename(folder / written.name).chmod(0o440)
    for each in (folder, folder.parent):
        _sync(each)
    return written


def _compress(rows: Iterable[Archived], file: IO[bytes], log: str, first: int, until: int) -> Written:
    content, count = hashlib.sha256(), 0
    with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=LEVEL, mtime=0) as packed:

        def put(line: dict[str, Any]) -> None:
            text = _encode(line).encode() + b"\n"
            content.update(text)
            packed.write(text)

        put({"format": FORMAT, "log": log, "first": first, "until": until})
        for row in rows:
            put(_line(row))
            count += 1
        digest = content.hexdigest()
        put({"end": True, "intents": count, "sha256": digest})
    file.flush()
    size = file.tell()
    file.seek(0)
    return Written(
        f"outbox-{log}-{first:019d}-{until:019d}-{digest[:16]}{SUFFIX}",
        count,
        hashlib.file_digest(file, "sha256").hexdigest(),  # type: ignore[arg-type]  # typeshed wants readinto in IO
        size,
    )


def _line(row: Archived) -> dict[str, Any]:
    """One intent; what is null is left out."""
    intent = row.intent
    found = {
        "id": intent.id,
        "xid": row.xid,
        "target": intent.target,
        "action": intent.action,
        "key": intent.key,
        "payload": intent.body,
        "headers": intent.headers,
        "saga": None if intent.saga is None else str(intent.saga),
        "due": None if intent.due is None else _utc(intent.due),
        "created_at": _utc(row.created_at),
        "receipt": row.receipt,
        "void": row.void or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _utc(at: datetime) -> str:
    # Whatever the session's time zone is: the same rows make the same file.
    return at.astimezone(UTC).isoformat()


@contextmanager
def _part(folder: Path, name: str) -> Iterator[tuple[IO[bytes], Path]]:
    """A file to be renamed when it is complete. One that a killed process left is written anew."""
    path = folder / name
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640), "w+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotReady("another process is archiving the same partition: wait until it has ended") from None
        # Renamed by the one who had the lock, between our open and our lock: not ours to write.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise NotReady("another process has just archived the same partition: look again")
        file.truncate()
        try:
            yield file, path
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _upload(bucket: Bucket, name: str, file: IO[bytes], size: int) -> None:
    if size <= PART:
        bucket.put(name, file.read())
    else:
        bucket.upload(name, iter(lambda: file.read(PART), b""))
    if bucket.size(name) != size:
        raise NotReady("the archive in S3 has another size than what was sent: look at the bucket, and try again")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- reading


def find(place: Path | str, *, log: str | None = None, endpoint: str | None = None) -> list[Archive]:
    """The archives at `place`, in order of ids; those of one log, if it is given. What isn't one is passed over."""
    if is_bucket(place):
        names = [entry.key for entry in _bucket(place, endpoint).list("outbox-")]
    else:
        try:
            names = os.listdir(place)
        except FileNotFoundError:
            raise NotReady(f"there is no directory {place}: say where the archives are") from None
    matches = (_NAME.fullmatch(name) for name in names)
    found = [Archive(place, m[0], m[1], int(m[2]), int(m[3])) for m in matches if m and log in (None, m[1])]
    return sorted(found, key=lambda archive: (archive.log, archive.first, archive.name))


def read(archive: Archive, *, endpoint: str | None = None) -> Iterator[Archived]:
    """The intents of an archive, in order of id. It is verified as a whole before the first one comes, so it is read
    twice; memory is that of one line. Raises `ArchiveDamaged`."""
    verify(archive, endpoint=endpoint)
    for line in _lines(archive, endpoint):
        found = json.loads(line)
        if "id" in found:
            yield _archived(found)


def verify(archive: Archive, *, endpoint: str | None = None) -> int:
    """Read all of an archive. → how many intents it has. Raises `ArchiveDamaged`."""
    content, count, last = hashlib.sha256(), -1, b""
    for line in _lines(archive, endpoint):
        if count == -1:
            _check_header(archive, line)
        if last:
            content.update(last)
        last = line
        count += 1
    try:
        end = json.loads(last) if last else {}
    except ValueError:
        end = {}
    if not isinstance(end, dict) or not end.get("end"):
        raise _damaged(archive, "it ends too early")
    if end.get("sha256") != content.hexdigest() or end.get("intents") != count - 1:
        raise _damaged(archive, "its checksum is not that of its content")
    return count - 1


def _check_header(archive: Archive, line: bytes) -> None:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _damaged(archive, f"its first line doesn't say {FORMAT!r}")
    if (header.get("log"), header.get("first"), header.get("until")) != (archive.log, archive.first, archive.until):
        raise _damaged(archive, "its name says something else than its header")


def _lines(archive: Archive, endpoint: str | None) -> Iterator[bytes]:
    with _open(archive, endpoint) as file, gzip.GzipFile(fileobj=file, mode="rb") as lines:
        try:
            yield from lines
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise _damaged(archive, "it can't be unpacked to its end") from None


def _open(archive: Archive, endpoint: str | None) -> BufferedReader:
    if not is_bucket(archive.place):
        return open(Path(archive.place) / archive.name, "rb")
    from outbox.bucket import Object  # noqa: PLC0415 - boto3 is loaded only where it is used

    bucket = _bucket(archive.place, endpoint)
    size = bucket.size(archive.name)
    if size is None:
        raise NotReady(f"there is no archive {archive.name} in the bucket: look for who removed it")
    return BufferedReader(Object(bucket, archive.name, size), PART)


def _bucket(place: Path | str, endpoint: str | None) -> Bucket:
    from outbox.bucket import Bucket  # noqa: PLC0415 - as above

    return Bucket(str(place), endpoint, setting="OUTBOX_ARCHIVE")


def _archived(found: dict[str, Any]) -> Archived:
    due, saga = found.get("due"), found.get("saga")
    intent = Intent(
        found["id"],
        found["target"],
        found["action"],
        found["key"],
        found["payload"],
        None if due is None else datetime.fromisoformat(due),
        None if saga is None else UUID(saga),
        found.get("headers"),
    )
    return Archived(
        intent, datetime.fromisoformat(found["created_at"]), found["xid"], found.get("receipt"), "void" in found
    )


def _damaged(archive: Archive, why: str) -> ArchiveDamaged:
    return ArchiveDamaged(
        f"the archive {archive.name} is damaged: {why}. Nothing of it was used. Take another copy of it"
    )
