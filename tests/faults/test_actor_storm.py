"""Workers of actors in a storm of faults: each message is accounted for."""

from __future__ import annotations

import random

import pytest

from tests.fixtures.actors import Stage
from tests.fixtures.storm import Storm

SECONDS = 25.0


@pytest.mark.slow
def test_actor_storm_i2_i3_i10_every_message_is_done_or_parked_with_a_reason(stage: Stage) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    storm = Storm(stage, seed)
    storm.blow(SECONDS)
    storm.calm()
    print(storm.done)
    found = storm.missing()
    print(*found, sep="\n")
    assert not found
