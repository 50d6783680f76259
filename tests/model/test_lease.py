"""The model of lease, epoch, apply and position, explored completely; and what it finds when a part is missing."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.model.lease import FAULTS, Rules, explore


@pytest.mark.parametrize("participant", ["epoch", "own", "neither"])
def test_lease_model_i1_i2_i3_i4_i6_i10_holds_in_every_state(participant: Literal["epoch", "own", "neither"]) -> None:
    found = explore(Rules(participant))
    assert not found.broken, str(found)
    # Complete, and not empty: pauses, expiry, deaths and late messages multiply.
    assert found.states > 10_000


@pytest.mark.parametrize("fault", FAULTS)
def test_lease_model_i12_finds_a_counterexample_when_a_part_is_missing(fault: str) -> None:
    rules, broken = FAULTS[fault]
    found = explore(rules)
    print(f"{fault}: {found}")
    assert found.broken == broken
    assert found.way
