"""An archive is what is left of a part of the log: it survives a power cut as soon as `write` has returned.

The second test shows that the first one would see it: without the folders' syncs, the archive is gone.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from outbox import archive
from outbox.archive import Archived, ArchiveDamaged
from outbox.intent import Intent
from tests.fixtures.power import Disk

pytestmark = pytest.mark.root

LOG = "0123456789abcdef"
ROWS = [Archived(Intent(n, "index", "put", f"k{n}", "{}"), datetime(2026, 3, 1, tzinfo=UTC), n) for n in range(1, 2000)]


@pytest.fixture
def disk() -> Iterator[Disk]:
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    made = Disk(home, 32)
    try:
        os.sync()
        yield made
    finally:
        made.destroy()
        shutil.rmtree(home, ignore_errors=True)


def _left(disk: Disk) -> list[Archived] | None:
    """Write an archive, cut the power, and look what is there when it is back. None: nothing, or a torn file."""
    shelf = disk.path / "a" / "archive"
    archive.write(ROWS, shelf, log=LOG, first=1, until=1_000_000)
    disk.cut()
    disk.unmount()
    disk.mount()
    if not shelf.exists():
        return None
    found = archive.find(shelf)
    try:
        return list(archive.read(found[0])) if found else None
    except ArchiveDamaged:
        return None


def test_archive_i5_is_there_after_a_power_cut_when_write_has_returned(disk: Disk) -> None:
    assert _left(disk) == ROWS


def test_archive_i12_is_gone_when_its_folders_are_not_synced(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_sync", lambda _folder: None)
    # The sync of a new file brings its first name along, but not the one that it is given then.
    assert _left(disk) is None
