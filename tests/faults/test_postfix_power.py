"""A power cut of Postfix's spool while mail is prepared and released: none is missing, and none is sent anew."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fixtures.post import Post
from tests.fixtures.postfix import Postfix, Sink, running
from tests.fixtures.site import until

pytestmark = pytest.mark.root

CUTS = 6

_SHUTDOWN, _WITHOUT_LOG = 0x8004587D, 2
"""FS_IOC_SHUTDOWN: nothing more reaches the disk, not even what is in the journal's buffer."""


class Disk:
    """An ext4 in a file, mounted; its power can be cut."""

    def __init__(self, image: Path, place: Path) -> None:
        self._image, self.place = image, place
        with image.open("wb") as file:
            file.truncate(512 << 20)  # Postfix takes no mail without room for the largest that it may take
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
        place.mkdir()
        self.mount()

    def mount(self) -> None:
        # The journal is written when a program asks for it, and not after five seconds anyway.
        options = "loop,commit=600"
        subprocess.run(["mount", "-o", options, self._image, self.place], check=True, capture_output=True)

    def cut(self) -> None:
        folder = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(folder, _SHUTDOWN, ctypes.c_uint32(_WITHOUT_LOG))
        os.close(folder)

    def unmount(self) -> None:
        def gone() -> bool:
            return subprocess.run(["umount", self.place], check=False, capture_output=True).returncode == 0

        until(gone, "the disk is unmounted")


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    home = Path(tempfile.mkdtemp(prefix="obp-"))
    home.chmod(0o755)
    disk = Disk(home / "image", home / "spool")
    try:
        yield disk
    finally:
        disk.unmount()
        (home / "image").unlink()
        (home / "spool").rmdir()
        home.rmdir()


@pytest.fixture(scope="module")
def relay(sink: Sink, disk: Disk) -> Iterator[Postfix]:
    with running(sink=sink.port, impatient=True, spool=disk.place) as server:
        yield server


def closed(post: Post, wanted: int) -> bool:
    return post.receipts("closed") >= wanted


def outage(post: Post, disk: Disk, worker: subprocess.Popen[str]) -> None:
    """The power is cut; then all that ran on that machine is gone, the worker too. It comes back without a worker."""
    disk.cut()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    post.relay.kill()
    disk.unmount()
    disk.mount()
    post.relay.start()


def test_hold_i2_i3_i5_none_is_missing_and_none_sent_anew_when_the_power_of_the_spool_is_cut(
    post: Post, disk: Disk
) -> None:
    chance = random.Random(5)
    for cut in range(CUTS):
        # Given: mails on their way, in both phases
        worker = post.worker()
        before = post.receipts("closed")
        post.write(60)
        # In the middle of it, or right after all is reported: then nothing that Postfix writes later helps.
        wanted = before + chance.choice([chance.randint(1, 59), 60])
        until(partial(closed, post, wanted), f"wave {cut} is under way")
        # When
        outage(post, disk, worker)
    # Then
    post.worker()
    post.drained()
    assert post.arrived() == [1] * (60 * CUTS)
    print(f"delivered a second time by Postfix itself: {len(post.sink.messages) - 60 * CUTS}")


NO_SYNC = """
from workers.hold import HoldQueue
HoldQueue._sync = lambda _: None
from outbox.cli import main
main(["work", "mail"])
"""


def test_hold_i12_strands_released_mail_when_the_release_is_not_synced(post: Post, disk: Disk) -> None:
    # Given: a worker that reports a release without making it durable, and one batch of mails
    post.write(20)
    naive = subprocess.Popen([sys.executable, "-c", NO_SYNC], env=post.site.environment, text=True)
    post.site.running.append(naive)
    until(lambda: post.receipts("closed") == 20, "all are reported as done")
    # When
    outage(post, disk, naive)
    # Then: what is done for good is on hold again, and nobody will ever release it
    assert len(post.relay.queue("hold")) > 0
