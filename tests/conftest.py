"""Fixtures live by family in tests/fixtures/."""

pytest_plugins = ["tests.fixtures.postgres", "tests.fixtures.lanes"]
