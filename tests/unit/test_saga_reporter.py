"""Which stretches of the log lie between two positions of one lane."""

from __future__ import annotations

import pytest

from outbox.position import Position
from workers.reporter import _between


def at(tick: int, upto: int = 0, after: int = 0) -> Position:
    return Position("log", tick, "0" * 16, upto, after)


@pytest.mark.parametrize(
    ("recorded", "own", "stretches"),
    [
        (at(1), at(2), [(1, 2, 0, None)]),
        (at(1), at(1, 2, 7), [(1, 2, 0, 7)]),
        (at(1, 2, 5), at(1, 2, 7), [(1, 2, 5, 7)]),
        # Beyond a batch that is recorded in part: ids start over.
        (at(1, 2, 5), at(2), [(1, 2, 5, None)]),
        (at(1, 2, 5), at(3), [(1, 2, 5, None), (2, 3, 0, None)]),
        (at(1, 2, 5), at(2, 3, 4), [(1, 2, 5, None), (2, 3, 0, 4)]),
        (at(1, 2, 5), at(3, 4, 6), [(1, 2, 5, None), (2, 3, 0, None), (3, 4, 0, 6)]),
        (at(1), at(2, 3, 4), [(1, 2, 0, None), (2, 3, 0, 4)]),
        # Batches that were cut differently.
        (at(1, 4, 5), at(2, 4, 6), [(1, 2, 0, None), (2, 4, 0, 6)]),
        (at(1, 2, 5), at(1, 3, 4), [(1, 3, 0, 4)]),
    ],
)
def test_reporter_looks_at_every_batch_between_two_positions_and_at_ids_within_one_only(
    recorded: Position, own: Position, stretches: list[tuple[int, int, int, int | None]]
) -> None:
    assert list(_between(recorded, own)) == stretches
