"""The model of the lease with more workers and more intents than `make test` has time for."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.model.lease import Rules, explore


@pytest.mark.parametrize(("workers", "intents"), [(3, 1), (2, 3)])
@pytest.mark.parametrize("participant", ["epoch", "own", "neither"])
def test_lease_model_i1_i2_i3_i4_i6_i10_holds_with_more_of_everything(
    participant: Literal["epoch", "own", "neither"], workers: int, intents: int
) -> None:
    found = explore(Rules(participant, workers=workers, intents=intents))
    assert not found.broken, str(found)
    assert found.states > 40_000
