"""A short run with a seed of its own each time; the seed is in the failure, and repeats faults and operations."""

from __future__ import annotations

import secrets

import pytest

from tests.robustness.run import run

SECONDS = 30.0


@pytest.mark.slow
def test_robustness_i1_i2_i3_i4_i8_i9_i10_i11_keeps_every_promise_under_all_faults_together() -> None:
    seed = secrets.token_hex(4)
    print(f"python -m tests.robustness --seed {seed} --seconds {SECONDS:.0f}")
    report = run(seed, SECONDS)
    print(report.text())
    assert report.kept, f"seed {seed}:\n{report.text()}"
