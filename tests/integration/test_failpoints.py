"""A few failpoints of many, and that none is forgotten: `tests/faults/test_failpoints.py` sweeps all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from outbox import failpoint
from tests.fixtures.failpoints import ELSEWHERE, WHERE, survive
from tests.fixtures.promises import Promises
from tests.fixtures.site import Site


@pytest.mark.parametrize("name", ["session.appended", "tick.taken", "index.committed", "blob.linked", "mail.submitted"])
def test_failpoint_i1_i2_i3_i11_loses_and_repeats_nothing_when_killed_there(
    site: Site, promises: Promises, app_url: str, name: str
) -> None:
    survive(site, promises, app_url, name)


def test_failpoints_are_each_in_the_code_once_and_in_the_sweep() -> None:
    root = Path(failpoint.__file__).parent.parent
    sources = [*root.glob("outbox/**/*.py"), *root.glob("workers/**/*.py")]
    hits = [name for source in sources for name in re.findall(r'(?<!\.)\bhit\("([^"]+)"\)', source.read_text("utf-8"))]
    assert sorted(hits) == sorted(failpoint.NAMES)
    assert {*WHERE, *ELSEWHERE} == set(failpoint.NAMES)
    for name, sweep in ELSEWHERE.items():
        assert re.search(rf'"{re.escape(name)}[":]', (root / sweep).read_text("utf-8")), name


def test_failpoint_refuses_an_unknown_name(site: Site) -> None:
    command = [sys.executable, "-c", "import outbox.failpoint"]
    done = subprocess.run(
        command, env=site.environment | {"OUTBOX_FAILPOINT": "no.such"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "known: blob.written" in done.stderr
