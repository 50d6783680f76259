"""The teeth: whatever goes wrong is found by the check, and nothing else is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.robustness.check import Found, Row, compare
from tests.robustness.model import Expected, Operation, expected
from tests.robustness.report import Report

OPERATIONS = [
    Operation("a1", "index.put", "doc", 1, amount=5),
    Operation("a2", "index.poison", "doc", 2),
    Operation("a3", "index.put", "doc", 3, amount=7),
    Operation("a4", "index.put", "gone", 1, amount=1),
    Operation("a5", "index.delete", "gone", 2),
    Operation("a6", "index.put", "other", 1, amount=2),
    Operation("a7", "index.put", "other", 2, amount=9),
    Operation("b1", "blob.put", "d1", 1),
    Operation("b2", "blob.delete", "d1", 2),
    Operation("b3", "blob.put", "d2", 3),
    Operation("m1", "mail.send", "mail/1", 1, ref="<1@x>"),
    Operation("w1", "witness.note", "doc", 4),
    Operation("w2", "witness.note", "doc", 5),
    Operation("w3", "witness.note", "doc", 6),
]
#: An operator took it out: its document stays as it was before.
SKIPPED = {"a2", "a7"}


def truth() -> tuple[Expected, Found]:
    """What must be there, and just that."""
    log = [Row(n, o.target, o.action, o.key, None if o.target in ("blob", "mail") else o.id)
           for n, o in enumerate(OPERATIONS, 1)]  # fmt: skip
    found = Found(
        log, [("doc", 3), ("other", 6)], ["d2"], ["<1@x>"], [("doc", "w1"), ("doc", "w2"), ("doc", "w3")], total=9
    )
    found.replayed, found.mails_replayed = list(found.documents), list(found.mails)
    return expected(OPERATIONS, SKIPPED), found


def kinds(change: Callable[[Found], object]) -> set[str]:
    wanted, found = truth()
    change(found)
    return {fault.kind for fault in compare(wanted, found)}


def test_check_finds_nothing_when_all_is_as_it_must_be() -> None:
    assert kinds(lambda _: None) == set()


def test_check_allows_a_witness_to_see_something_again() -> None:
    assert kinds(lambda f: f.notes.__setitem__(slice(2, 2), [("doc", "w1"), ("doc", "w2")])) == set()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda f: f.documents.pop(0), "lost"),
        (lambda f: f.blobs.clear(), "lost"),
        (lambda f: f.mails.clear(), "lost"),
        (lambda f: f.notes.pop(1), "lost"),
        (lambda f: f.log.pop(), "lost"),
        (lambda f: f.documents.append(("gone", 4)), "ghost"),
        (lambda f: f.blobs.append("d1"), "ghost"),
        (lambda f: f.mails.append("<2@x>"), "ghost"),
        (lambda f: f.notes.append(("doc", "w9")), "ghost"),
        (lambda f: f.log.append(Row(99, "mail", "send", "mail/9", None)), "ghost"),
        (lambda f: f.documents.append(f.documents[0]), "twice"),
        (lambda f: f.mails.append("<1@x>"), "twice"),
        (lambda f: f.blobs.append("d2"), "twice"),
        (lambda f: f.notes.reverse(), "order"),
        (lambda f: f.log.__setitem__(slice(0, 3), [Row(1, *f.log[2][1:]), f.log[1], Row(3, *f.log[0][1:])]), "order"),
        (lambda f: f.log.__setitem__(slice(7, 9), [Row(8, *f.log[8][1:]), Row(9, *f.log[7][1:])]), "order"),
        (lambda f: f.documents.__setitem__(0, ("doc", 1)), "stale"),
        (lambda f: f.documents.__setitem__(1, ("other", 7)), "stale"),
        (lambda f: setattr(f, "total", 10), "total"),
        (lambda f: f.replayed and f.replayed.pop(), "replay"),
        (lambda f: f.mails_replayed and f.mails_replayed.append("<1@x>"), "replay"),
    ],
)  # fmt: skip
def test_check_i12_finds_what_is_planted(change: Callable[[Found], object], kind: str) -> None:
    assert kind in kinds(change)


def test_report_i11_is_not_content_when_a_planned_fault_never_happened() -> None:
    report = Report("seed")
    report.injected.update({"kill index": 1, "kill mail": 0})
    assert (report.kept, report.missed) == (False, ["kill mail"])
    assert "NEVER INJECTED: kill mail" in report.text()
    assert dataclasses.replace(report, injected=report.injected + type(report.injected)(["kill mail"])).kept
