"""Scrub of mail: receipts against a real Postfix's log, a Maildir, and what came back by mail."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from outbox import operation
from outbox.errors import NotReady, Unavailable
from outbox.settings import Settings
from tests.fixtures.mail import DOMAIN, mail_intent, participant
from tests.fixtures.postfix import Postfix, running
from tests.fixtures.scrub import Yard
from tests.fixtures.site import until
from workers.evidence import PostfixEvidence
from workers.scrub import mail
from workers.scrub.mail import MailSurvey
from workers.scrub.survey import Progress
from workers.scrub.trace import traces


def _settings(evidence: str) -> Settings:
    return Settings("", None, None, "", mail_evidence=evidence, mail_domain=DOMAIN)


def _survey(yard: Yard, evidence: str) -> Progress:
    return MailSurvey(_settings(evidence), yard.operator, operation.begin(yard.operator, "scrub", {})).run()


def _later(yard: Yard, hours: float) -> None:
    """The scrubber's clock."""
    then = datetime.now(UTC) + timedelta(hours=hours)
    yard.operator.execute("select set_config('outbox.fake_now', %s, false)", (then.isoformat(),))


def _found(progress: Progress) -> dict[str, str]:
    return {each.key: each.kind for each in progress.findings}


@pytest.fixture(name="postfix")
def postfix_fixture() -> Iterator[Postfix]:
    """One of the test's own: of other tests' mails this log has no intents."""
    with running() as server:
        yield server


@pytest.mark.root
def test_scrub_i3_compares_receipts_with_the_log_of_postfix(yard: Yard, postfix: Postfix) -> None:
    # Given mails that went out through the log, to a Postfix whose log reaches far back
    postfix.log.write_text("Jan  1 00:00:00 mta postfix/postfix-script[1]: starting\n" + postfix.log.read_text())
    mails = {}
    for name in ("well", "deferred", "lost", "unproven", "twice"):
        intent = mail_intent(1, "ann@later.test" if name == "deferred" else "ann@black.hole", key=name)
        yard._emit("mail", "send", name, json.loads(intent.body))
        mails[name] = intent
    tokens = {name: intent.payload["token"] for name, intent in mails.items()}
    yard.bench.clock.step()
    yard.drain_one("mail", lambda: participant(postfix.url, PostfixEvidence(postfix.etc)))
    until(lambda: all(postfix.taken(token) for token in tokens.values()), "Postfix takes them over")
    # Then nothing is wrong, now and two hours later
    assert (_survey(yard, postfix.evidence).found, _survey(yard, postfix.evidence).items) == (0, 5)
    _later(yard, 2)
    assert _survey(yard, postfix.evidence).findings == []
    # Given one that the server has no trace of, one without a receipt, one that was sent twice, one that this log
    # has no intent of, and an attempt that nobody has ended
    direct = participant(postfix.url, PostfixEvidence(postfix.etc))
    foreign = mail_intent(7)
    direct.apply([mails["twice"], foreign], None)
    direct.close()
    until(
        lambda: postfix.taken(tokens["twice"]) > 1 and postfix.taken(foreign.payload["token"]),
        "Postfix takes them over",
    )
    lines = postfix.log.read_text().splitlines(keepends=True)
    postfix.log.write_text("".join(line for line in lines if tokens["lost"] not in line))
    yard.admin.execute("delete from outbox.receipt r using outbox.log l where l.id = r.id and l.key = 'unproven'")
    attempt = mail_intent(8)
    number = yard._emit("mail", "send", "open", json.loads(attempt.body))
    yard.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch) values (%s, 'mail', 0, 'open', 1)", (number,)
    )
    # When it is scrubbed, each is found
    expected = {
        tokens["lost"]: "missing", tokens["unproven"]: "orphaned", tokens["twice"]: "duplicate",
        foreign.payload["token"]: "orphaned", attempt.payload["token"]: "open",
    }  # fmt: skip
    progress = _survey(yard, postfix.evidence)
    assert _found(progress) == expected
    assert all(each.repair == "" and each.advice for each in progress.findings)
    # ... and what is only waiting in Postfix's queue is no loss: its log may be behind
    lines = postfix.log.read_text().splitlines(keepends=True)
    postfix.log.write_text("".join(line for line in lines if tokens["deferred"] not in line))
    assert _found(_survey(yard, postfix.evidence)) == expected
    # ... also when the log was rotated away and compressed since, in either way of naming
    content = postfix.log.read_bytes()
    postfix.log.write_bytes(b"")
    rotated = [postfix.log.with_name(f"{postfix.log.name}{ending}") for ending in (".1", ".2.gz", "-20260101.xz")]
    rotated[0].write_bytes(b"")
    rotated[1].write_bytes(gzip.compress(content))
    assert _found(_survey(yard, postfix.evidence)) == expected
    rotated[1].unlink()
    rotated[2].write_bytes(lzma.compress(content))
    assert _found(_survey(yard, postfix.evidence)) == expected
    # ... while a file that can't be read to its end is no proof of anything
    rotated[2].write_bytes(lzma.compress(content)[:-20])
    with pytest.raises(Unavailable, match="can't be read"):
        _survey(yard, postfix.evidence)


def test_scrub_finds_mail_without_a_receipt_in_a_maildir_and_misses_none(yard: Yard, tmp_path: Path) -> None:
    # Given a Maildir with one mail that the log has a receipt of, one that it has none of, and one of somebody else's
    known, ghost = mail_intent(1), mail_intent(2)
    gone = mail_intent(3)
    for name in ("new", "cur", "tmp"):
        (tmp_path / "mail" / name).mkdir(parents=True)
    for n, intent in enumerate((known, ghost)):
        sender = f"b+{intent.payload['token']}@{DOMAIN}"
        (tmp_path / "mail" / "new" / f"1.{n}.host").write_text(f"Return-Path: <{sender}>\n\ntext\n")
    (tmp_path / "mail" / "new" / "1.9.host").write_text(f"Return-Path: <b+{'0' * 32}@other.test>\n\ntext\n")
    for intent in (known, ghost, gone):
        number = yard._emit("mail", "send", intent.key, json.loads(intent.body))
        if intent is not ghost:
            yard.admin.execute(
                "insert into outbox.receipt (id, target, slot, state, epoch, evidence, closed_at) "
                "values (%s, 'mail', 0, 'closed', 1, %s, now())",
                (number, json.dumps({"accepted": {"0": "q"}})),
            )
    _pass(yard)
    _later(yard, 2)
    progress = _survey(yard, f"maildir:{tmp_path / 'mail'}")
    # Then only that one is found: mails may be deleted from a Maildir
    assert _found(progress) == {ghost.payload["token"]: "orphaned"}
    assert "not missed" in progress.note


def test_scrub_compares_receipts_with_what_came_back_by_mail(yard: Yard) -> None:
    known, lost = mail_intent(1), mail_intent(2)
    for intent in (known, lost):
        number = yard._emit("mail", "send", intent.key, json.loads(intent.body))
        yard.admin.execute(
            "insert into outbox.receipt (id, target, slot, state, epoch, evidence, closed_at) "
            "values (%s, 'mail', 0, 'closed', 1, %s, now())",
            (number, json.dumps({"accepted": {"0": "q"}})),
        )
    yard.admin.execute("insert into outbox.postmark_watch (since, seen_at) values (now() - interval '1 day', now())")
    yard.admin.execute(
        "insert into outbox.postmark (token, part, queue_id) values (%s, '', 'q1')", (known.payload["token"],)
    )
    _pass(yard)
    assert _survey(yard, "receipt:receipt@outbox.test").findings == []
    _later(yard, 1)
    assert _found(_survey(yard, "receipt:receipt@outbox.test")) == {lost.payload["token"]: "missing"}


def test_scrub_i2_calls_no_mail_lost_or_foreign_that_may_be_neither(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a mail that an operator has only assumed to be sent, one that is proven while the scrub reads, and one that
    # is out before its lane has written a receipt
    assumed, late, ahead = mail_intent(1), mail_intent(2), mail_intent(3)
    for intent, more in ((assumed, {"assumed": ["0"]}), (late, {})):
        number = yard._emit("mail", "send", intent.key, json.loads(intent.body))
        yard.admin.execute(
            "insert into outbox.receipt (id, target, slot, state, epoch, evidence, closed_at) "
            "values (%s, 'mail', 0, 'closed', 1, %s, now())",
            (number, json.dumps({"accepted": {"0": "q"}} | more)),
        )
    _pass(yard)
    yard._emit("mail", "send", ahead.key, json.loads(ahead.body))
    yard.admin.execute("insert into outbox.postmark_watch (since, seen_at) values (now() - interval '1 day', now())")
    proven = "insert into outbox.postmark (token, part, queue_id) values (%s, '', 'q')"
    yard.admin.execute(proven, (ahead.payload["token"],))
    _later(yard, 1)
    assert _found(_survey(yard, "receipt:receipt@outbox.test")) == {late.payload["token"]: "missing"}
    # When it is scrubbed, and the proof comes between its two looks, then nothing is found
    real, reads = traces, iter((True, False))

    def meanwhile(*words: Any) -> Any:
        if not next(reads):
            yard.admin.execute(proven, (late.payload["token"],))
        return real(*words)

    monkeypatch.setattr(mail, "traces", meanwhile)
    assert _survey(yard, "receipt:receipt@outbox.test").findings == []


def test_scrub_says_so_when_mail_leaves_no_evidence(yard: Yard) -> None:
    with pytest.raises(NotReady, match="nothing to compare"):
        _survey(yard, "none")


def _pass(yard: Yard) -> None:
    """The lane of mail is past everything."""
    yard.bench.clock.step()
    yard.admin.execute(
        "insert into outbox.position (target, lane, epoch, tick) select 'mail', 0, epoch, (select max(id) from "
        "outbox.tick) from outbox.lane where target = 'mail'"
    )
