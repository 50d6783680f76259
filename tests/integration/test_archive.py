"""Archives: in a directory and in S3, complete or refused, never overwritten."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import pytest

from outbox import archive
from outbox.archive import Archived, ArchiveDamaged
from outbox.errors import NotReady
from outbox.intent import Intent
from tests.fixtures.s3 import BUCKET, Server

LOG = "0123456789abcdef"
NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
ROWS = [
    Archived(Intent(3, "index", "put", "note/1", '{"text": "Grüße"}'), NOW, 900),
    # What Python's JSON can't read comes back as it was.
    Archived(Intent(4, "index", "put", "note/2", '{"n": 1e5000}', headers='{"trace": "x"}'), NOW, 901, void=True),
    Archived(
        Intent(7, "mail", "send", "m/1", "{}", NOW + timedelta(days=1), UUID(int=5)),
        NOW.astimezone(timezone(timedelta(hours=2))),
        902,
        {"attempts": 2, "evidence": {"queue": "Q1"}},
    ),
]


def _write(place: Path | str, rows: list[Archived] = ROWS, endpoint: str | None = None) -> archive.Written:
    return archive.write(rows, place, log=LOG, first=1, until=1_000_000, endpoint=endpoint)


def test_archive_gives_back_what_was_written_to_a_directory(shelf: Path) -> None:
    written = _write(shelf)
    (found,) = archive.find(shelf)
    assert (found.log, found.first, found.until, found.name) == (LOG, 1, 1_000_000, written.name)
    assert list(archive.read(found)) == ROWS
    assert (written.intents, written.bytes) == (3, (shelf / written.name).stat().st_size)
    # And any tool reads it
    header, *_, end = gzip.decompress((shelf / written.name).read_bytes()).decode().splitlines()
    assert json.loads(header) == {"format": "outbox archive 1", "log": LOG, "first": 1, "until": 1_000_000}
    assert json.loads(end)["intents"] == 3


def test_archive_gives_back_what_was_written_to_s3(s3_server: Server, s3_url: str) -> None:
    assert s3_url.startswith(f"s3://{BUCKET}/")
    written = _write(s3_url, endpoint=s3_server.endpoint)
    (found,) = archive.find(s3_url, endpoint=s3_server.endpoint)
    assert found.name == written.name
    assert list(archive.read(found, endpoint=s3_server.endpoint)) == ROWS


def test_archive_goes_to_s3_in_parts_when_it_is_large(
    s3_server: Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PART", 5 * 1024**2)
    noise = "".join(f"{n * 2654435761 % 2**32:08x}" for n in range(6000))
    rows = [
        Archived(Intent(n, "index", "put", f"k{n}", json.dumps(noise[n * 7 :] + noise[: n * 5])), NOW, n)
        for n in range(1, 260)
    ]
    written = _write(s3_url, rows, s3_server.endpoint)
    assert written.bytes > archive.PART
    (found,) = archive.find(s3_url, endpoint=s3_server.endpoint)
    assert list(archive.read(found, endpoint=s3_server.endpoint)) == rows


def test_archive_of_the_same_is_the_same_file_and_of_another_history_another_one(shelf: Path) -> None:
    first = _write(shelf)
    before = (shelf / first.name).read_bytes()
    assert _write(shelf) == first
    assert (shelf / first.name).read_bytes() == before
    # When the log was restored to an earlier time, the same ids mean something else
    other = _write(shelf, ROWS[:1])
    assert other.name != first.name
    assert len(archive.find(shelf)) == 2
    assert list(archive.read(archive.find(shelf)[0])) in (ROWS, ROWS[:1])
    assert archive.find(shelf, log="f" * 16) == []


def _shorter(content: bytes) -> bytes:
    return content[:-1]


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def _line_changed(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content).replace(b"note/2", b"note/3"))


def _line_lost(content: bytes) -> bytes:
    lines = gzip.decompress(content).splitlines(keepends=True)
    return gzip.compress(b"".join(lines[:2] + lines[3:]))


def _end_lost(content: bytes) -> bytes:
    return gzip.compress(b"".join(gzip.decompress(content).splitlines(keepends=True)[:-1]))


def _header_lost(content: bytes) -> bytes:
    return gzip.compress(b"".join(gzip.decompress(content).splitlines(keepends=True)[1:]))


def _nothing(_content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage", [_shorter, _half, _flipped, _line_changed, _line_lost, _end_lost, _header_lost, _nothing]
)
def test_archive_i5_that_is_torn_or_changed_is_refused_before_anything_of_it_is_used(
    shelf: Path, damage: Callable[[bytes], bytes]
) -> None:
    written = _write(shelf)
    file = shelf / written.name
    file.chmod(0o640)
    file.write_bytes(damage(file.read_bytes()))
    (found,) = archive.find(shelf)
    used: list[Archived] = []
    with pytest.raises(ArchiveDamaged, match="another copy"):
        used.extend(archive.read(found))
    assert used == []


def test_archive_says_what_to_do_when_the_place_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="say where the archives are"):
        archive.find(tmp_path / "nowhere")
    with pytest.raises(NotReady, match="OUTBOX_ARCHIVE is not a bucket"):
        archive.find("s3://")


def test_archive_leaves_nothing_under_its_name_when_writing_fails(shelf: Path) -> None:
    def rows() -> list[Archived]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        archive.write((row for _ in [0] for row in rows()), shelf, log=LOG, first=1, until=1_000_000)
    assert archive.find(shelf) == []
    # And what is left of it is written anew
    _write(shelf)
    assert [path.name.startswith("outbox-") for path in shelf.iterdir()] == [True]
