"""The demonstration itself, with real kills, and that its check can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.blob import BlobStore
from outbox.participant import LaneView
from outbox.settings import Settings
from workers.demo.check import check
from workers.demo.report import Report
from workers.demo.traffic import Expected, files
from workers.index import IndexParticipant
from workers.publication import Publication


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox", "demo", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are awkward: empty, binary, large, the same twice, odd names, unreadable text, a link, a folder."""
    root = tmp_path / "files"
    for name in ("a", "b/c", "b/é"):
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


def test_demo_keeps_the_promise_while_workers_and_postgres_are_killed(folder: Path) -> None:
    done = demo(str(folder), "--kill-every", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == [
        "committed", "rolled_back", "indexed", "blobs", "bytes", "mails", "lost", "duplicated", "ghosts", "kills",
        "seconds",
    ]  # fmt: skip
    assert result["lost"] == result["duplicated"] == result["ghosts"] == 0
    # 80 files and 4 folders; every 20th transaction is rolled back; two files have the same content.
    assert result["committed"] + result["rolled_back"] == 84
    assert result["rolled_back"] == 4
    assert result["indexed"] + result["mails"] == result["committed"]
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


@pytest.fixture
def site(tmp_path: Path) -> tuple[Settings, Path, Expected]:
    """Two documents, two blobs and two mails, made by hand, and the list of them."""
    settings = Settings("postgresql://", tmp_path / "index", tmp_path / "blobs", "")
    index = IndexParticipant(tmp_path / "index")
    index.open(LaneView("index", 0, 1, unclean=False))
    from outbox.intent import Intent

    index.apply([Intent(n, "index", "put", f"k{n}", '{"text": "word"}') for n in (1, 2)], None)
    index.close()
    store = BlobStore(tmp_path / "blobs")
    staged = [store.stage(content, xid=1, log="0" * 16) for content in (b"one", b"two")]
    digests = {stage.digest for stage in staged}
    with Publication(store) as publication:
        for stage in staged:
            publication.put(stage)
        publication.sync()
    mail = tmp_path / "mail"
    (mail / "new").mkdir(parents=True)
    for n in (1, 2):
        (mail / "new" / f"m{n}").write_text(f"Message-ID: <{n}@x>\n\nbody\n", encoding="ascii")
    return settings, mail, Expected({"k1", "k2"}, digests, {"<1@x>", "<2@x>"})


def _found(site: tuple[Settings, Path, Expected]) -> tuple[int, int, int]:
    report = Report()
    check(*site, report)
    return report.lost, report.duplicated, report.ghosts


def test_demo_check_is_content_when_all_is_there(site: tuple[Settings, Path, Expected]) -> None:
    assert _found(site) == (0, 0, 0)


def test_demo_check_i12_sees_what_is_lost(site: tuple[Settings, Path, Expected], tmp_path: Path) -> None:
    _, mail, expected = site
    expected.documents.add("k3")
    (mail / "new" / "m1").unlink()
    digest = next(iter(expected.blobs))
    path = BlobStore(tmp_path / "blobs").path(digest)
    path.chmod(0o600)
    path.write_bytes(b"not what its name says")
    assert _found(site) == (3, 0, 0)


def test_demo_check_i12_sees_ghosts(site: tuple[Settings, Path, Expected]) -> None:
    _, _, expected = site
    expected.documents.remove("k1")
    expected.blobs.pop()
    expected.mails.remove("<1@x>")
    assert _found(site) == (0, 0, 3)


def test_demo_check_i12_sees_duplicates(site: tuple[Settings, Path, Expected]) -> None:
    _, mail, _ = site
    shutil.copy(mail / "new" / "m1", mail / "new" / "again")
    assert _found(site) == (0, 1, 0)
