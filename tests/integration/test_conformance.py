"""The conformance suite: our participants keep the contract, and it finds those that don't."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.testing import Broken, Case, Subject, participant_contract
from tests.fixtures.broken import BROKEN
from tests.fixtures.reference import Couriers, Ledgers, Notebooks
from tests.fixtures.site import LIMIT
from tests.fixtures.subjects import Blob, Index, Mail

ROOT = Path(__file__).resolve().parents[2]

KEEPING = [case for kind in (Index, Blob, Mail, Notebooks, Ledgers, Couriers) for case in participant_contract(kind)]


@pytest.mark.parametrize("case", KEEPING, ids=lambda case: f"{case.subject.__name__}-{case}")
def test_participant_i2_i3_i4_i5_i6_keeps_the_contract(case: Case, tmp_path: Path) -> None:
    case(tmp_path)


def broken_cases(kind: type[Subject], home: Path) -> dict[str, str]:
    """The cases that a participant breaks, with what is said of them."""
    found = {}
    for case in participant_contract(kind):
        folder = home / case.name
        folder.mkdir()
        try:
            case(folder)
        except Broken as broken:
            found[case.name] = str(broken)
    return found


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_contract_i12_finds_the_fault_and_no_other_when_a_participant_is_known_bad(
    kind: type[Subject], tmp_path: Path
) -> None:
    found = broken_cases(kind, tmp_path)
    assert set(found) == BROKEN[kind]
    for name, text in found.items():
        # What the contract says, where that is written, and what was seen.
        assert re.fullmatch(rf"\w+, {re.escape(name)}: .*\. \(Participant\.\w+; docs/\S+\) But .*", text, re.DOTALL)


def test_contract_i12_has_no_case_that_nothing_breaks() -> None:
    kinds = (Notebooks, Ledgers, Couriers)
    cases = {case.name for kind in kinds for case in participant_contract(kind)}
    assert cases - set().union(*BROKEN.values()) == set()


def test_contract_names_what_is_written_in_the_documentation() -> None:
    for case in KEEPING:
        page, _, anchor = re.findall(r"(docs/\S+?\.md)(#)([\w-]+)", case._contract)[0]
        assert f"## {anchor.replace('-', ' ').capitalize()}" in (ROOT / page).read_text(encoding="utf-8")


def test_contract_refuses_a_subject_that_no_other_process_can_import(tmp_path: Path) -> None:
    class Local(Notebooks):
        pass

    assert all("can't be imported" in text for text in broken_cases(Local, tmp_path).values())


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outbox.testing", *words],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=LIMIT,
    )  # fmt: skip


def test_contract_needs_no_pytest_when_it_is_run_by_name() -> None:
    kept = suite("tests.fixtures.reference:Couriers")
    assert kept.returncode == 0, kept.stderr
    assert kept.stdout.count("kept ") == len(participant_contract(Couriers))
    broken = suite("tests.fixtures.broken:SaysYess")
    assert broken.returncode == 1
    assert broken.stdout.count("BROKEN  SaysYess, is_right_after_a_kill_at_own.written: ") == 1
    wrong = suite("tests.fixtures.reference:Courier")
    assert wrong.returncode == 2
    assert "no subclass of outbox.testing.Subject" in wrong.stderr


def test_testing_loads_neither_pytest_nor_a_database_when_it_is_imported() -> None:
    code = "import sys, outbox.testing; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"pytest", "psycopg", "sqlalchemy", "workers", "xapian", "boto3"})
