"""Fixtures live by family in tests/fixtures/."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

pytest_plugins = [
    "tests.fixtures.lanes",
    "tests.fixtures.mail",
    "tests.fixtures.postfix",
    "tests.fixtures.postgres",
    "tests.fixtures.sagas",
    "tests.fixtures.site",
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
