"""Workers of actors are killed at every failpoint of theirs, and their successors at every other one."""

from __future__ import annotations

import pytest

from tests.fixtures.actors import Stage

POINTS = [
    "actor.adopted",
    "actor.taken",
    "actor.placed",
    "actor.counted",
    "actor.recording",
    "actor.recorded",
    "actor.claimed",
    "actor.released",
]


@pytest.mark.parametrize("name", POINTS)
def test_actor_kills_i1_i2_i3_i11_everything_comes_true_when_killed_at(stage: Stage, name: str) -> None:
    stage.traffic()
    stage.survive(name)


@pytest.mark.parametrize("first", POINTS)
def test_actor_kills_i2_i3_i11_everything_comes_true_when_successors_are_killed_too(stage: Stage, first: str) -> None:
    later = POINTS[POINTS.index(first) :]
    stage.survive(*(name for second in later for name in (first, second)))
