"""Rows on disk, in order of their first member: how a scrub of any size needs the memory of a small one.

`Spill` takes rows in any order, and gives them back sorted: runs that fit into memory are sorted and written to
files, then merged (the external merge sort of Knuth, volume 3, 5.4). A row is a JSON array whose first member is text;
texts are in the order of their bytes in UTF-8, as Postgres has them under the collation "C".

The files have no name and vanish with the process, however it ends. They lie where TMPDIR says. OSError when there is
no room.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import islice
from operator import itemgetter
from types import TracebackType
from typing import IO, Any, Self

RUN = 50_000
"""Rows of a run: what is sorted in memory."""

_FIRST = itemgetter(0)


class Spill:
    """Rows, sorted, on disk. Iterated over as often as one likes, by one at a time."""

    def __init__(self, rows: Iterable[tuple[Any, ...]], *, run: int = RUN, in_order: bool = False) -> None:
        """Read all of `rows`; `in_order` when they come sorted already."""
        self._runs: list[IO[bytes]] = []
        #: How many.
        self.count = 0
        iterator = iter(rows)
        try:
            if in_order:
                self._write(iterator)
                return
            while piece := list(islice(iterator, run)):
                piece.sort(key=_FIRST)
                self._write(piece)
        except BaseException:
            self.close()
            raise

    def _write(self, rows: Iterable[tuple[Any, ...]]) -> None:
        file = tempfile.TemporaryFile(prefix="outbox-scrub-")  # noqa: SIM115 - closed by `close`
        self._runs.append(file)
        for row in rows:
            file.write(json.dumps(row).encode())
            file.write(b"\n")
            self.count += 1
        file.flush()

    def __iter__(self) -> Iterator[list[Any]]:
        for file in self._runs:
            file.seek(0)
        return merge(*(map(json.loads, file) for file in self._runs), key=_FIRST)

    def close(self) -> None:
        """Give the room back."""
        for file in self._runs:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
