"""Scrub's look at the blobs: every one is read to its end, and hashed again.

A blob is named by the sha256 of its content, so what it should be follows from its name. Wrong size, flipped bits, a
file cut short and one that the disk can't give back all come out as `corrupt`. What lies among the objects under
another name than a blob's is `orphaned`; nothing reads it, and scrub leaves it to a person.

Errors: `Unavailable` when the endpoint fails, or when this user may not read the store: that is no damage.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence

from outbox.blob import BlobMissing
from outbox.errors import Permanent, Unavailable
from outbox.intent import Intent
from outbox.position import Position
from outbox.source import CHUNK
from outbox.store import Store
from workers.scrub.finding import Kind, Repair
from workers.scrub.pace import Pace
from workers.scrub.subject import Fault, Held

_STRANGE = "it lies among the blobs and is none: nothing reads it"


class BlobSubject:
    """A store of blobs."""

    target = "blob"
    advice = "fetch it from a copy of the store: outbox resilver blob --from"
    stray_advice = "look what it is, and move it away: scrub leaves it alone"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffer = memoryview(bytearray(CHUNK))

    def positions(self) -> dict[int, Position | None]:
        """A store holds no position."""
        return {}

    def held(self) -> Iterator[Held]:
        """Every published blob, and what else lies there."""
        for blob in self._store.inventory():
            yield Held(blob.digest, 0, blob.digest)
        for place in self._store.strays():
            yield Held("", 0, place, _STRANGE)

    def look(self, seen: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        """Those that are published."""
        return {key: [Held(key, 0, key)] for key in seen if self._exists(key)}

    def still(self, stray: Held) -> bool:
        """Look again."""
        return stray.place in self._store.strays()

    def size(self, intent: Intent) -> int:
        """What the intent says."""
        try:
            size = intent.payload.get("size")
        except (Permanent, AttributeError):
            return 0
        return size if type(size) is int else 0

    def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
        """Hash it."""
        try:
            digest, size = self._hash(held.key, pace)
        except BlobMissing:
            return Fault("missing", "the blob is not there")
        except PermissionError:
            raise Unavailable("this user may not read the blobs: scrub as the user of the workers") from None
        except OSError as error:
            return Fault("corrupt", f"the blob can't be read to its end ({os.strerror(error.errno or 5)})")
        if digest == held.key:
            return None
        wanted = self.size(intent)
        if size != wanted:
            return Fault("corrupt", f"the blob has {size:,} bytes, and {wanted:,} were stored")
        return Fault("corrupt", "the blob's bytes are not those that were stored")

    def repair(self, kind: Kind) -> Repair:
        """A put; where its bytes come from is `workers.scrub.repair`'s business."""
        return "delete" if kind == "orphaned" else "put"

    def close(self) -> None:
        """Nothing is open."""

    def _exists(self, digest: str) -> bool:
        try:
            return self._store.exists(digest)
        except Permanent:  # the key of an intent that is no blob's
            return False

    def _hash(self, digest: str, pace: Pace) -> tuple[str, int]:
        """→ sha256 and size of a blob's bytes."""
        sha, size = hashlib.sha256(), 0
        with self._store.open(digest) as file:
            while read := file.readinto(self._buffer):
                sha.update(self._buffer[:read])
                size += read
                pace.spend(0, read)
        return sha.hexdigest(), size
