"""Fixtures live by family in tests/fixtures/."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# dramatiq's own tests, which `make conformance` runs from its source distribution, under rules of their own.
collect_ignore = ["conformance"]

pytest_plugins = [  # in the order in which they import each other
    "tests.fixtures.lanes",
    "tests.fixtures.mail",
    "tests.fixtures.postgres",
    "tests.fixtures.elsewhere",
    "tests.fixtures.sagas",
    "tests.fixtures.proxy",
    "tests.fixtures.scrub",
    "tests.fixtures.site",
    "tests.fixtures.retention",
    "tests.fixtures.s3",
    "tests.fixtures.tls",
    "tests.fixtures.failpoints",
    "tests.fixtures.postfix",
    "tests.fixtures.post",
    "tests.fixtures.receipts",
    "tests.fixtures.hostile",
    "tests.fixtures.pgbouncer",
    "tests.fixtures.zombie",
    "tests.fixtures.rebuild",
    "tests.fixtures.actors",
    "tests.fixtures.cron",
    "tests.fixtures.brokers",
    "tests.fixtures.farside",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--postgres", type=Path, metavar="DIR", help="programs of another Postgres than the embedded one")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, where everything is installed, a test that is skipped is a test that nobody runs."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and CI must run it: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mounts file systems or makes users can't run as anybody else; CI runs as root."""
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root; runs in CI"))
