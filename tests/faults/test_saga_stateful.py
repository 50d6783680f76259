"""The model of sagas (tests/model/sagas.py) for longer, from a seed: OUTBOX_SEED=N tries another one."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.sagas import machine
from workers.postgres import Postgres

SEED = int(os.environ.get("OUTBOX_SEED", "4"))


def test_saga_i2_i3_i7_i10_ends_either_or_when_everything_is_interleaved_for_longer(
    server: Postgres, database: str
) -> None:
    with machine(server, database) as made:
        run_state_machine_as_test(
            seed(SEED)(made),
            settings=settings(
                max_examples=40, stateful_step_count=40, deadline=None, database=None, print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
        assert made.site.reached.total() >= 10, made.site.reached
