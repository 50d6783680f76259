"""The demonstration itself, with real kills, and that its check can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.blob import BlobStore
from outbox.intent import Intent
from outbox.participant import LaneView
from outbox.settings import Settings
from workers.demo.check import check
from workers.demo.publish import HEADER, Listing, publish, refused
from workers.demo.report import Report
from workers.demo.traffic import Expected, files
from workers.index import IndexParticipant
from workers.publication import Publication

REFUSED = next(name for name in "cdefghijklmnopqrstuvwxyz" if refused(f"b/{name}"))
"""A folder that fails on purpose below `b`."""


def demo(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox", "demo", *words]
    environment = os.environ | more
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=540, env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are awkward: empty, binary, large, the same twice, odd names, unreadable text, a link, a folder."""
    root = tmp_path / "files"
    for name in ("a", f"b/{REFUSED}", "b/é"):
        (root / name).mkdir(parents=True)
        for n in range(25):
            (root / name / f"file {n}.txt").write_text(f"the {n}th file of {name}\n" * n, encoding="utf-8")
    (root / "empty").touch()
    (root / "a" / "binary").write_bytes(bytes(range(256)) * 300)
    (root / "a" / "large").write_bytes(os.urandom(3_000_000))
    (root / "a" / "twin").write_bytes((root / "a" / "binary").read_bytes())
    (Path(os.fsdecode(bytes(root / "a") + b"/latin-\xe9"))).write_bytes(b"caf\xe9 \x00 au lait")
    (root / "a" / "link").symlink_to(root / "empty")
    return root


def test_demo_i1_i2_i3_i7_keeps_the_promise_while_workers_and_postgres_are_killed(folder: Path, tmp_path: Path) -> None:
    # Given: a shell whose applications, workers and engine work elsewhere
    nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
    elsewhere = {
        "OUTBOX_DATABASE": nowhere, "OUTBOX_SAGA_DATABASE": nowhere, "OUTBOX_SMTP": "smtp://127.0.0.1:1",
        "OUTBOX_INDEX": str(tmp_path / "index"), "OUTBOX_BLOBS": str(tmp_path / "blobs"), "OUTBOX_SAGAS": "not.there",
    }  # fmt: skip
    # When
    done = demo(str(folder), "--kill-every", "0.5", "--json", **elsewhere)
    # Then: it has used its own servers, and everything is right
    assert not (tmp_path / "index").exists()
    assert not (tmp_path / "blobs").exists()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == [
        "committed", "rolled_back", "indexed", "blobs", "bytes", "mails", "folders_published", "folders_withdrawn",
        "lost", "duplicated", "ghosts", "half_done", "kills", "seconds",
    ]  # fmt: skip
    assert result["lost"] == result["duplicated"] == result["ghosts"] == result["half_done"] == 0
    # 80 files and 4 folders; every 20th transaction, always a file's, is rolled back; two files have the same content.
    assert result["committed"] + result["rolled_back"] == 84
    assert result["rolled_back"] == 4
    # Each folder that is not refused has a document and a mail.
    withdrawn = sum(map(refused, (".", "a", f"b/{REFUSED}", "b/é")))
    assert 1 <= withdrawn < 4
    assert result["folders_withdrawn"] == withdrawn
    assert result["folders_published"] == result["mails"] == 4 - withdrawn
    assert result["indexed"] == 76 + 4 - withdrawn
    assert result["kills"] >= 2
    assert result["bytes"] > 3_000_000


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["/not/there"], 1, "is not a folder"),
        (["--count", "none"], 2, "use 1 or more"),
        (["--kill-every", "-1"], 2, "use 0 (never)"),
    ],
)
def test_demo_says_what_is_wrong_with_its_arguments(words: list[str], status: int, says: str) -> None:
    done = demo(*words)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_refuses_a_folder_without_files(tmp_path: Path) -> None:
    done = demo(str(tmp_path))
    assert done.returncode == 1
    assert "no files" in done.stderr


def test_demo_files_are_regular_ones_folder_by_folder(folder: Path) -> None:
    found = files(folder, None)
    assert len(found) == 80
    assert not any(file.is_symlink() for file in found)
    assert len(files(folder, 7)) == 7


# --------------------------------------------------------------------------------------------- teeth


@dataclass
class Place:
    """Two files, two folders that are published and one that is withdrawn, made by hand, and the list of them."""

    settings: Settings
    mail: Path
    expected: Expected
    admin: psycopg.Connection[Any]

    def found(self) -> Report:
        report = Report()
        check(self.settings, self.mail, self.expected, report)
        return report

    def index(self, action: str, key: str) -> None:
        """As the index's worker would."""
        assert self.settings.index is not None
        index = IndexParticipant(self.settings.index)
        index.open(LaneView("index", 0, 1, unclean=False))
        index.apply([Intent(0, "index", action, key, '{"text": "word"}')], None)
        index.close()

    def publish(self, *contents: bytes) -> list[str]:
        """As the blob worker would. → the digests."""
        assert isinstance(self.settings.blobs, Path)
        store = BlobStore(self.settings.blobs)
        staged = [store.stage(content, xid=1, log="0" * 16) for content in contents]
        with Publication(store) as publication:
            for stage in staged:
                publication.put(stage)
            publication.sync()
        return [stage.digest for stage in staged]

    def unpublish(self, digest: str) -> None:
        assert isinstance(self.settings.blobs, Path)
        BlobStore(self.settings.blobs).path(digest).unlink()

    def deliver(self, folder: Listing, name: str = "m") -> None:
        file = self.mail / "new" / f"{name}-{folder.digest}"
        file.write_text(f"Message-ID: <{name}@x>\n{HEADER}: {folder.digest}\n\nbody\n", encoding="ascii")

    def end(self, folder: Listing, state: str) -> None:
        """As the engine would."""
        decision = "commit" if state == "completed" else "abort"
        ended = None if state == "stuck" else datetime.now(UTC)
        self.admin.execute(
            "insert into outbox.saga (id, name, version, shape, key, state, decision, input, ended_at) "
            "values (%s, 'demo-publish', 1, 'x', %s, %s, %s, '{}', %s) "
            "on conflict (id) do update set state = excluded.state, ended_at = excluded.ended_at",
            (publish.id_of(folder.path), folder.path, state, decision, ended),
        )


@pytest.fixture
def place(tmp_path: Path, app_url: str, admin: psycopg.Connection[Any]) -> Place:
    admin.execute("create table demo_published (path text primary key, digest text not null)")
    admin.execute("grant all on demo_published to app")
    (tmp_path / "mail" / "new").mkdir(parents=True)
    settings = Settings(app_url, tmp_path / "index", tmp_path / "blobs", "")
    place = Place(settings, tmp_path / "mail", Expected({"k1", "k2"}), admin)
    place.expected.blobs = set(place.publish(b"one", b"two"))
    place.index("put", "k1")
    place.index("put", "k2")
    fine = [name for name in "abcdefghij" if not refused(name)][:2]
    for path in fine:
        (digest,) = place.publish(path.encode())
        folder = Listing(path, 1, {"digest": digest})
        place.index("put", folder.key)
        place.deliver(folder)
        admin.execute("insert into demo_published values (%s, %s)", (path, digest))
        place.end(folder, "completed")
        place.expected.folders.append(folder)
    withdrawn = Listing(f"b/{REFUSED}", 1, {"digest": "0" * 64})
    place.end(withdrawn, "compensated")
    place.expected.folders.append(withdrawn)
    return place


def wrong(report: Report) -> tuple[int, int, int, int]:
    return report.lost, report.duplicated, report.ghosts, report.half_done


def test_demo_check_is_content_when_all_is_there(place: Place) -> None:
    report = place.found()
    assert wrong(report) == (0, 0, 0, 0)
    assert report.kept
    assert (report.folders_published, report.folders_withdrawn, report.mails) == (2, 1, 2)


def test_demo_check_i12_sees_what_is_lost(place: Place, tmp_path: Path) -> None:
    place.expected.documents.add("k3")
    path = BlobStore(tmp_path / "blobs").path(next(iter(place.expected.blobs)))
    path.chmod(0o600)
    path.write_bytes(b"not what its name says")
    assert wrong(place.found()) == (2, 0, 0, 0)


def test_demo_check_i12_sees_ghosts(place: Place) -> None:
    place.expected.documents.remove("k1")
    place.expected.blobs.pop()
    folder = place.expected.folders.pop(0)  # its transaction was rolled back: row, manifest, document and mail
    assert folder.path
    assert wrong(place.found()) == (0, 0, 6, 0)


def test_demo_check_i12_sees_duplicates(place: Place) -> None:
    place.deliver(place.expected.folders[0], "again")
    assert wrong(place.found()) == (0, 1, 0, 1)


@pytest.mark.parametrize("part", ["row", "document", "manifest", "mail"])
def test_demo_check_i7_i12_sees_a_half_done_folder_when_one_part_is_missing(place: Place, part: str) -> None:
    # Given: a folder whose saga has completed
    folder = place.expected.folders[0]
    # When: a part of it is not there
    match part:
        case "row":
            place.admin.execute("delete from demo_published where path = %s", (folder.path,))
        case "document":
            place.index("delete", folder.key)
        case "manifest":
            place.unpublish(folder.digest)
        case "mail":
            (place.mail / "new" / f"m-{folder.digest}").unlink()
    # Then
    report = place.found()
    assert wrong(report) == (1, 0, 0, 1)
    assert not report.kept
    assert report.folders_published == 1


@pytest.mark.parametrize("part", ["row", "document", "manifest", "mail"])
def test_demo_check_i7_i12_sees_a_half_done_folder_when_one_part_was_left_behind(place: Place, part: str) -> None:
    # Given: a folder whose saga was compensated
    withdrawn = place.expected.folders.pop()
    (digest,) = place.publish(b"a manifest")
    if part != "manifest":
        place.unpublish(digest)
    folder = Listing(withdrawn.path, 1, {"digest": digest})
    place.expected.folders.append(folder)
    # When: a part of it is still there
    match part:
        case "row":
            place.admin.execute("insert into demo_published values (%s, %s)", (folder.path, digest))
        case "document":
            place.index("put", folder.key)
        case "mail":
            place.deliver(folder)
    # Then
    report = place.found()
    assert wrong(report) == (0, 0, 1, 1)
    assert not report.kept
    assert report.folders_withdrawn == 0


def test_demo_check_i7_i12_sees_a_saga_that_is_stuck(place: Place) -> None:
    place.end(place.expected.folders[-1], "stuck")
    assert wrong(place.found()) == (0, 0, 0, 1)


def test_demo_check_i2_i12_sees_a_folder_that_was_withdrawn_for_no_reason(place: Place) -> None:
    # Given: a folder that is not refused, of which nothing is there
    path = next(name for name in "klmnopqrst" if not refused(name))
    folder = Listing(path, 1, {"digest": "1" * 64})
    place.end(folder, "compensated")
    # When
    place.expected.folders.append(folder)
    # Then: it is not half done, and its four parts are lost
    assert wrong(place.found()) == (4, 0, 0, 0)
