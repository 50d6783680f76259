"""Sagas under every mishap that hypothesis thinks of: each ends completed or compensated (tests/model/sagas.py)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.sagas import machine
from workers.postgres import Postgres


def test_saga_i2_i3_i7_i10_i11_ends_either_or_when_everything_is_interleaved(server: Postgres, database: str) -> None:
    with machine(server, database) as made:
        run_state_machine_as_test(
            made,
            settings=settings(
                max_examples=15, stateful_step_count=30, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
        # I11: several died, of both kinds.
        assert made.site.reached.total() >= 3, made.site.reached
