"""The participant `mail` and its evidence against a real Postfix."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from outbox.errors import NotReady, Unavailable
from outbox.participant import Doubt, Evidence, LaneView, Verdict
from tests.fixtures.dot import Proxy
from tests.fixtures.mail import mail_intent, participant
from tests.fixtures.postfix import Postfix
from tests.fixtures.site import until
from workers.evidence import NoEvidence, PostfixEvidence, evidence_for

pytestmark = pytest.mark.root

SETTLE = 5.0
"""Seconds; what the product takes. Shorter, and a busy disk would make it decide wrong."""

AT_ONCE = 0.5
"""Where nothing is on its way that could come later."""


@pytest.fixture
def proxy(postfix: Postfix) -> Iterator[Proxy]:
    proxy = Proxy(postfix.port)
    try:
        yield proxy
    finally:
        proxy.close()


def test_postfix_takes_a_batch(postfix: Postfix) -> None:
    mail = participant(postfix.url, PostfixEvidence(postfix.etc, settle=SETTLE))
    batch = [mail_intent(number) for number in range(1, 31)]
    outcomes = mail.apply(batch, None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.APPLIED] * 30
    ids = {(outcome.receipt or {})["queue_id"] for outcome in outcomes}
    assert len(ids) == 30
    assert all(re.fullmatch(r"[0-9A-Za-z]{12,}", queue_id) for queue_id in ids)
    until(lambda: all(postfix.taken(intent.payload["token"]) == 1 for intent in batch), "Postfix takes it over")


def test_postfix_refuses_one_of_three(postfix: Postfix) -> None:
    evidence = PostfixEvidence(postfix.etc, settle=AT_ONCE)
    mail = participant(postfix.url, evidence)
    intent = mail_intent(1, "ann@outbox.test", "nobody@outbox.test", "cy@outbox.test")
    begun = datetime.now(UTC)
    (outcome,) = mail.apply([intent], None)
    assert outcome.verdict is Verdict.POISON
    assert outcome.receipt is not None
    assert set(outcome.receipt["accepted"]) == {"0", "2"}
    assert outcome.receipt["refused"] == {"1": "554 5.7.1"}
    # A worker that died right after sending learns the same from the log.
    token = intent.payload["token"]
    assert evidence.look({token: begun})[token].sent == {".0.5": outcome.receipt["queue_id"]}
    assert mail.probe([Doubt(intent, begun, {})])[0][1] == {
        "queue_id": outcome.receipt["queue_id"],
        "accepted": outcome.receipt["accepted"],
    }
    mail.close()


@pytest.mark.parametrize("to", ["ann@black.hole", "ann@later.test"])
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_postfix_i3_evidence_decides_when_the_reply_is_lost(
    postfix: Postfix, proxy: Proxy, to: str, after: float
) -> None:
    mail = participant(proxy.url, PostfixEvidence(postfix.etc, settle=SETTLE))
    intent = mail_intent(1, to)
    proxy.cut_after = after
    (outcome,) = mail.apply([intent], None)
    proxy.cut_after = None
    tries = 1
    while outcome.verdict is Verdict.RETRY and tries < 5:
        (outcome,) = mail.apply([intent], None)
        tries += 1
    mail.close()
    assert outcome.verdict is Verdict.APPLIED
    if after:
        assert tries == 1, "Postfix had it, and that was found"
    until(lambda: postfix.taken(intent.payload["token"]) == 1, "Postfix takes it over")
    # Once a later mail is through, a second copy of this one would have been, too.
    later = mail_intent(2)
    last = participant(postfix.url, PostfixEvidence(postfix.etc, settle=SETTLE))
    last.apply([later], None)
    last.close()
    until(lambda: postfix.taken(later.payload["token"]) == 1, "Postfix takes it over")
    assert postfix.taken(intent.payload["token"]) == 1


def test_postfix_is_sent_again_when_the_dot_was_lost(postfix: Postfix, proxy: Proxy) -> None:
    mail = participant(proxy.url, PostfixEvidence(postfix.etc, settle=AT_ONCE))
    intent = mail_intent(1)
    proxy.keep_dot = True
    (outcome,) = mail.apply([intent], None)
    assert outcome.verdict is Verdict.RETRY
    proxy.keep_dot = False
    (outcome,) = mail.apply([intent], None)
    assert outcome.verdict is Verdict.APPLIED
    mail.close()
    until(lambda: postfix.taken(intent.payload["token"]) == 1, "Postfix takes it over")


@pytest.mark.slow
def test_postfix_i3_once_when_replies_are_lost_at_random(postfix: Postfix, proxy: Proxy) -> None:
    seed = random.Random(7)
    mail = participant(proxy.url, PostfixEvidence(postfix.etc, settle=SETTLE))
    intents = [mail_intent(number, seed.choice(["a@black.hole", "a@later.test"])) for number in range(1, 21)]
    for intent in intents:
        verdict, tries = Verdict.RETRY, 0
        while verdict is Verdict.RETRY:
            proxy.cut_after = seed.choice([None, 0.0, 0.002, 0.01]) if tries < 2 else None
            verdict, tries = mail.apply([intent], None)[0].verdict, tries + 1
        assert verdict is Verdict.APPLIED
    mail.close()
    until(lambda: all(postfix.taken(intent.payload["token"]) >= 1 for intent in intents), "Postfix takes it over")
    assert [postfix.taken(intent.payload["token"]) for intent in intents] == [1] * len(intents)


def test_postfix_probe_says_not_applied_when_never_sent(postfix: Postfix) -> None:
    mail = participant(postfix.url, PostfixEvidence(postfix.etc, settle=AT_ONCE))
    sent, unsent = mail_intent(1), mail_intent(2)
    begun = datetime.now(UTC)
    (outcome,) = mail.apply([sent], None)
    before = time.monotonic()
    first, second = mail.probe([Doubt(sent, begun, {}), Doubt(unsent, begun, {})])
    assert time.monotonic() - before >= AT_ONCE
    assert first == (Evidence.APPLIED, outcome.receipt)
    assert second == (Evidence.NOT_APPLIED, None)
    before = time.monotonic()
    assert mail.probe([Doubt(sent, begun, {})])[0][0] is Evidence.APPLIED
    assert time.monotonic() - before < AT_ONCE
    mail.close()


def test_postfix_evidence_is_unknown_when_the_log_does_not_reach_back(postfix: Postfix, tmp_path: Path) -> None:
    token = mail_intent(1).payload["token"]
    now = datetime.now(UTC)

    def look(log: Path, since: datetime = now) -> Evidence:
        return PostfixEvidence(postfix.etc, log=log, settle=0).look({token: since})[token].evidence

    log = tmp_path / "mail.log"
    assert look(log) is Evidence.UNKNOWN
    log.touch()
    assert look(log) is Evidence.UNKNOWN
    shutil.copy(postfix.log, log)
    assert look(log) is Evidence.NOT_APPLIED
    assert look(log, now - timedelta(days=3)) is Evidence.UNKNOWN
    # Rotated just now: the older half is beside it.
    log.rename(tmp_path / "mail.log.1")
    log.touch()
    assert look(log) is Evidence.NOT_APPLIED
    assert PostfixEvidence(tmp_path, log=log, settle=0).look({token: now})[token].evidence is Evidence.UNKNOWN


def test_postfix_evidence_finds_what_was_logged_before_a_rotation(postfix: Postfix, tmp_path: Path) -> None:
    mail = participant(postfix.url, NoEvidence())
    intent, begun = mail_intent(1), datetime.now(UTC)
    (outcome,) = mail.apply([intent], None)
    mail.close()
    token = intent.payload["token"]
    until(lambda: postfix.taken(token) == 1, "Postfix takes it over")
    shutil.copy(postfix.log, tmp_path / "mail.log.1")
    (tmp_path / "mail.log").touch()
    found = PostfixEvidence(postfix.etc, log=tmp_path / "mail.log", settle=0).look({token: begun})[token]
    assert found == (Evidence.APPLIED, {"": (outcome.receipt or {})["queue_id"]})


def test_postfix_stopped_is_unavailable(postfix: Postfix) -> None:
    mail = participant(postfix.url, PostfixEvidence(postfix.etc, settle=0))
    intent = mail_intent(1)
    postfix.stop()
    try:
        with pytest.raises(Unavailable):
            mail.apply([intent], None)
        with pytest.raises(Unavailable):
            mail.open(LaneView("mail", 0, 2, unclean=True))
        with pytest.raises(Unavailable):
            mail.probe([Doubt(intent, datetime.now(UTC), {})])
    finally:
        postfix.start()
    assert mail.apply([intent], None)[0].verdict is Verdict.APPLIED
    mail.close()


def test_evidence_setting_names_postfix(postfix: Postfix, tmp_path: Path) -> None:
    evidence = evidence_for(postfix.evidence)
    assert isinstance(evidence, PostfixEvidence)
    assert evidence.config_directory == postfix.etc
    for setting in (f"postfix:{tmp_path}", "postfix:", "maildir:relative", "", "what:/x"):
        with pytest.raises(NotReady, match="OUTBOX_MAIL_EVIDENCE"):
            evidence_for(setting)
    assert isinstance(evidence_for("none"), NoEvidence)
