"""Fixtures live by family in tests/fixtures/."""

pytest_plugins = [
    "tests.fixtures.lanes",
    "tests.fixtures.mail",
    "tests.fixtures.postfix",
    "tests.fixtures.postgres",
    "tests.fixtures.site",
]
