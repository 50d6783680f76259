"""The participant `mail` against a peer that does exactly what a test says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from outbox.errors import Ambiguous, NotReady, Permanent, Unavailable
from outbox.intent import Intent
from outbox.participant import Doubt, Evidence, LaneView, Outcome, Participant, Verdict
from tests.fixtures.mail import CUT, DOMAIN, KnownEvidence, Peer, mail_intent, participant
from workers.evidence import Finding, MaildirEvidence, NoEvidence, log_time
from workers.mail import MailParticipant
from workers.relay import Relay, smtp_target
from workers.smtp import SmtpSession

TOKEN_LOST = Finding(Evidence.NOT_APPLIED, {})
THREE = ("ann@outbox.test", "bob@outbox.test", "cy@outbox.test")


def _token(intent: Intent) -> str:
    token = intent.payload["token"]
    assert isinstance(token, str)
    return token


def _one(outcomes: object) -> Outcome:
    assert isinstance(outcomes, list)
    assert len(outcomes) == 1
    outcome = outcomes[0]
    assert isinstance(outcome, Outcome)
    assert "@" not in outcome.error
    return outcome


def test_mail_is_a_participant() -> None:
    mail = MailParticipant("smtp://127.0.0.1:25", NoEvidence(), DOMAIN)
    assert isinstance(mail, Participant)
    assert mail.records_attempts
    assert not mail.keeps_position
    assert mail.position() is None
    assert list(mail.inventory()) == []


def test_mail_sends_a_batch_over_one_session(peer: Peer) -> None:
    mail = participant(peer.url, NoEvidence())
    batch = [mail_intent(1), mail_intent(2, *THREE)]
    first, second = mail.apply(batch, None)
    mail.settle(batch)
    mail.close()
    assert first == Outcome(Verdict.APPLIED, {"queue_id": "Q1", "accepted": {"0": "Q1"}})
    assert second == Outcome(Verdict.APPLIED, {"queue_id": "Q2", "accepted": {"0": "Q2", "1": "Q2", "2": "Q2"}})
    assert peer.sessions == 1
    sender, recipients, data = peer.messages[1]
    assert sender == f"b+{_token(batch[1])}@{DOMAIN}"
    assert recipients == list(THREE)
    assert data.decode() == batch[1].payload["message"]
    assert b"\r\n.\r\n" in data
    assert peer.verbs[-1] == "QUIT"


@pytest.mark.parametrize(
    ("verb", "reply", "verdict"),
    [
        ("MAIL", "451 4.7.1 later", Verdict.RETRY),
        ("MAIL", "550 5.7.1 <b@x>: no", Verdict.POISON),
        ("RCPT", "450 4.2.0 <ann@outbox.test>: greylisted", Verdict.RETRY),
        ("RCPT", "550 5.1.1 <ann@outbox.test>: unknown", Verdict.POISON),
        ("DATA", "451 4.3.0 later", Verdict.RETRY),
        ("DATA", "554 5.5.1 no", Verdict.POISON),
        (".", "451 4.3.0 <ann@outbox.test>: queue file write error", Verdict.RETRY),
        (".", "552-5.3.4 too\r\n552 5.3.4 big", Verdict.POISON),
    ],
)
def test_mail_goes_on_with_the_next_when_one_is_not_taken(peer: Peer, verb: str, reply: str, verdict: Verdict) -> None:
    peer.say(verb, reply)
    mail = participant(peer.url, NoEvidence())
    first, second, third = mail.apply([mail_intent(1, key="a"), mail_intent(2, key="a"), mail_intent(3)], None)
    mail.close()
    assert first.verdict is verdict
    assert reply[:3] in first.error
    assert "@" not in first.error
    assert "@" not in json.dumps(first.receipt)
    assert second.verdict is Verdict.BLOCKED
    assert third.verdict is Verdict.APPLIED
    assert peer.sessions == 1


def test_mail_sends_to_those_that_the_server_takes_and_names_them(peer: Peer) -> None:
    peer.say("RCPT", None, "450 4.2.0 later", "550 5.1.1 unknown")
    mail = participant(peer.url, NoEvidence())
    intent = mail_intent(1, *THREE)
    outcome = _one(mail.apply([intent], None))
    assert outcome.verdict is Verdict.RETRY
    assert outcome.receipt == {"queue_id": "Q1", "accepted": {"0": "Q1"}, "refused": {"2": "550 5.1.1"}}
    assert peer.messages[0][:2] == (f"b+{_token(intent)}.0.1@{DOMAIN}", ["ann@outbox.test"])

    mail.known({1: outcome.receipt})
    outcome = _one(mail.apply([intent], None))
    mail.close()
    assert [recipients for _, recipients, _ in peer.messages] == [["ann@outbox.test"], ["bob@outbox.test"]]
    assert peer.messages[1][0] == f"b+{_token(intent)}.1.1@{DOMAIN}"
    assert peer.messages[0][2] == peer.messages[1][2]
    # One recipient will never have it: an operator is told, and what was reached is on record.
    assert outcome.verdict is Verdict.POISON
    assert outcome.receipt == {
        "queue_id": "Q2", "accepted": {"0": "Q1", "1": "Q2"}, "refused": {"2": "550 5.1.1"}
    }  # fmt: skip


def test_mail_sends_the_same_bytes_again_when_deferred(peer: Peer) -> None:
    peer.say(".", "451 4.3.0 later", "451 4.3.0 later")
    mail = participant(peer.url, NoEvidence())
    intent = mail_intent(1, html="<p>é</p>", attachments=[("a.bin", "application/octet-stream", b"\0" * 99)])
    verdicts = [_one(mail.apply([intent], None)).verdict for _ in range(3)]
    mail.close()
    assert verdicts == [Verdict.RETRY, Verdict.RETRY, Verdict.APPLIED]
    assert len({data for _, _, data in peer.messages}) == 1


@pytest.mark.parametrize(
    ("verb", "reply"),
    # A connection that is cut after the dot leaves a doubt: see below.
    [(verb, "421 4.3.2 closing") for verb in ("MAIL", "RCPT", "DATA", ".")]
    + [(verb, CUT) for verb in ("MAIL", "RCPT", "DATA")],
)
def test_mail_is_unavailable_when_the_server_closes(peer: Peer, verb: str, reply: str) -> None:
    peer.say(verb, None, reply)
    mail = participant(peer.url, NoEvidence())
    batch = [mail_intent(1), mail_intent(2), mail_intent(3)]
    # What was done is reported; what was not tried is not.
    assert [outcome.verdict for outcome in mail.apply(batch, None)] == [Verdict.APPLIED]
    peer.say(verb, reply)
    with pytest.raises(Unavailable):
        mail.apply(batch[1:], None)
    assert [outcome.verdict for outcome in mail.apply(batch[1:], None)] == [Verdict.APPLIED] * 2
    mail.close()


def test_mail_is_unavailable_when_nobody_listens(peer: Peer) -> None:
    mail = participant(peer.url, NoEvidence())
    peer.close()
    with pytest.raises(Unavailable, match="can't be reached"):
        mail.apply([mail_intent(1)], None)
    with pytest.raises(Unavailable):
        mail.open(LaneView("mail", 0, 1, unclean=False))
    with pytest.raises(Unavailable):
        mail.probe([Doubt(mail_intent(1), datetime.now(UTC), {})])


@pytest.mark.parametrize("reply", ["554 no", "421 4.3.2 busy", CUT, "nonsense"])
@pytest.mark.parametrize("verb", ["CONNECT", "EHLO"])
def test_mail_is_unavailable_when_the_server_takes_no_session(peer: Peer, verb: str, reply: str) -> None:
    peer.say(verb, reply)
    with pytest.raises(Unavailable):
        participant(peer.url, NoEvidence())


def test_mail_waits_when_the_server_is_full(peer: Peer) -> None:
    peer.say("MAIL", "452 4.3.1 Insufficient system storage")
    mail = participant(peer.url, NoEvidence())
    with pytest.raises(Unavailable, match=r"452 4\.3\.1"):
        mail.apply([mail_intent(1)], None)
    mail.close()


def test_mail_connects_again_when_the_server_has_closed_an_idle_session(peer: Peer) -> None:
    mail = participant(peer.url, NoEvidence())
    peer.cut()
    assert _one(mail.apply([mail_intent(1)], None)).verdict is Verdict.APPLIED
    mail.close()
    assert peer.sessions == 2


def test_mail_i10_does_not_stop_its_lane_when_the_server_hangs_up_on_one_message(peer: Peer) -> None:
    peer.say("DATA", CUT, CUT, CUT)
    mail = participant(peer.url, NoEvidence())
    batch = [mail_intent(1), mail_intent(2)]
    for _ in range(2):
        with pytest.raises(Unavailable):
            mail.apply(batch, None)
    assert [outcome.verdict for outcome in mail.apply(batch, None)] == [Verdict.RETRY]
    assert [outcome.verdict for outcome in mail.apply(batch[1:], None)] == [Verdict.APPLIED]
    mail.close()


def test_mail_ends_the_batch_when_the_session_is_lost_after_a_refusal(peer: Peer) -> None:
    peer.say("RCPT", "450 later")
    peer.say("RSET", CUT)
    mail = participant(peer.url, NoEvidence())
    batch = [mail_intent(1), mail_intent(2)]
    assert [outcome.verdict for outcome in mail.apply(batch, None)] == [Verdict.RETRY]
    assert [outcome.verdict for outcome in mail.apply(batch[1:], None)] == [Verdict.APPLIED]
    mail.close()


def test_mail_poisons_what_is_no_mail(peer: Peer) -> None:
    mail = participant(peer.url, NoEvidence())
    good = mail_intent(4)
    bad = [
        good._replace(id=1, key="a", action="put"),
        good._replace(id=2, key="b", body='{"token": 1e5000}'),
        good._replace(id=3, key="c", body=good.body.replace("ann@outbox.test", "ann@outbox.test\\r\\nRCPT TO:<eve@x>")),
    ]
    outcomes = mail.apply([*bad, good], None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.POISON] * 3 + [Verdict.APPLIED]
    assert not any("@" in outcome.error for outcome in outcomes)
    assert len(peer.messages) == 1


# ------------------------------------------------------------------------------------------------- in doubt


def test_mail_i3_is_not_sent_again_when_evidence_says_that_the_server_stored_it(peer: Peer) -> None:
    peer.say(".", CUT)
    evidence = KnownEvidence(Finding(Evidence.APPLIED, {"": "QX"}))
    mail = participant(peer.url, evidence)
    batch = [mail_intent(1), mail_intent(2)]
    # The batch ends with a lost connection, so that the reader looks at its lease before it goes on.
    outcome = _one(mail.apply(batch, None))
    assert outcome == Outcome(Verdict.APPLIED, {"queue_id": "QX", "accepted": {"0": "QX"}})
    assert list(evidence.asked[0]) == [_token(batch[0])]
    assert peer.sessions == 2, "the evidence is looked at after a new session was opened"
    mail.close()


def test_mail_i3_is_sent_again_when_evidence_says_that_the_server_lost_it(peer: Peer) -> None:
    peer.say(".", CUT)
    mail = participant(peer.url, KnownEvidence(TOKEN_LOST))
    outcome = _one(mail.apply([mail_intent(1)], None))
    assert outcome.verdict is Verdict.RETRY
    assert outcome.receipt is None
    assert outcome.retry_after is not None
    mail.close()


@pytest.mark.parametrize(
    ("policy", "verdict", "receipt"),
    [
        ("resend", Verdict.RETRY, None),
        ("hold", Verdict.IN_DOUBT, None),
        ("drop", Verdict.APPLIED, {"queue_id": "", "accepted": {"0": ""}, "assumed": [0]}),
    ],
)
def test_mail_does_what_its_policy_says_when_nothing_can_tell(
    peer: Peer, policy: str, verdict: Verdict, receipt: object
) -> None:
    peer.say(".", CUT)
    mail = participant(peer.url, NoEvidence())
    intent = mail_intent(1, in_doubt=policy)
    outcome = _one(mail.apply([intent], None))
    assert (outcome.verdict, outcome.receipt) == (verdict, receipt)
    doubted = {
        "resend": (Evidence.NOT_APPLIED, None), "hold": (Evidence.UNKNOWN, None), "drop": (Evidence.APPLIED, receipt)
    }  # fmt: skip
    assert mail.probe([Doubt(intent, datetime.now(UTC), {})]) == [doubted[policy]]
    mail.close()


def test_mail_i3_asks_later_when_the_server_does_not_come_back_at_once(peer: Peer) -> None:
    peer.say(".", CUT)
    peer.say("CONNECT", None, CUT, CUT)
    evidence = KnownEvidence(Finding(Evidence.APPLIED, {"": "QX"}))
    mail = participant(peer.url, evidence)
    intent = mail_intent(1)
    begun = datetime.now(UTC)
    outcome = _one(mail.apply([intent], None))
    assert outcome.verdict is Verdict.RETRY
    assert outcome.receipt is not None
    assert timedelta(0) <= datetime.fromisoformat(outcome.receipt["doubt"]) - begun < timedelta(seconds=5)
    # Neither a retry nor a new owner sends it before the server was asked.
    mail.known({1: outcome.receipt})
    with pytest.raises(Unavailable):
        mail.apply([intent], None)
    assert evidence.asked == []
    outcome = _one(mail.apply([intent], None))
    assert outcome.verdict is Verdict.APPLIED
    assert outcome.receipt == {"queue_id": "QX", "accepted": {"0": "QX"}, "doubt": None}
    assert len(peer.messages) == 1
    mail.close()


def test_mail_i3_is_sent_to_the_rest_when_a_part_was_found(peer: Peer) -> None:
    mail = participant(peer.url, KnownEvidence(Finding(Evidence.APPLIED, {".0.5": "QX"})))
    intent = mail_intent(1, *THREE)
    evidence, receipt = mail.probe([Doubt(intent, datetime.now(UTC), {})])[0]
    assert evidence is Evidence.NOT_APPLIED
    assert receipt == {"queue_id": "QX", "accepted": {"0": "QX", "2": "QX"}}
    mail.known({1: receipt})
    assert _one(mail.apply([intent], None)).verdict is Verdict.APPLIED
    assert [recipients for _, recipients, _ in peer.messages] == [["bob@outbox.test"]]
    mail.close()


def test_mail_probes_from_the_earliest_attempt_in_doubt(peer: Peer) -> None:
    evidence = KnownEvidence(TOKEN_LOST)
    mail = participant(peer.url, evidence)
    now = datetime.now(UTC)
    earlier = now - timedelta(minutes=9)
    intents = [mail_intent(1), mail_intent(2), mail_intent(3)._replace(body="[]")]
    doubts = [Doubt(intents[0], now, {"doubt": earlier.isoformat()}), *(Doubt(i, now, {}) for i in intents[1:])]
    found = mail.probe(doubts)
    assert [answer for answer, _ in found] == [Evidence.NOT_APPLIED] * 3
    assert found[0][1] == {"doubt": None}
    assert evidence.asked == [{_token(intents[0]): earlier, _token(intents[1]): now}]
    mail.close()


# ---------------------------------------------------------------------------------------------- the client


def test_smtp_pipelines_when_the_server_offers_it(peer: Peer) -> None:
    peer.say("EHLO", "250-peer\r\n250 PIPELINING")
    mail = participant(peer.url, NoEvidence())
    peer.say("RCPT", *["250 ok"] * 150, "450 later")
    outcome = _one(mail.apply([mail_intent(1, *(f"u{number}@outbox.test" for number in range(250)))], None))
    mail.close()
    assert outcome.verdict is Verdict.RETRY
    assert [len(recipients) for _, recipients, _ in peer.messages] == [64, 64, 63, 58]


def test_smtp_session_knows_whether_the_dot_was_sent(peer: Peer) -> None:
    session = SmtpSession(Relay.read(peer.url), "mail-0-1.outbox.test", timeout=5.0)
    with pytest.raises(Unavailable, match="no session"):
        session.submit("b@x.org", ["a@x.org"], b"x\r\n")
    session.connect()
    peer.say(".", CUT)
    with pytest.raises(Ambiguous):
        session.submit("b@x.org", ["a@x.org"], b"x\r\n.y")
    assert peer.messages == [("b@x.org", ["a@x.org"], b"x\r\n.y\r\n")]
    session.connect()
    peer.say(".", "what")
    with pytest.raises(Ambiguous):
        session.submit("b@x.org", ["a@x.org"], b"x\r\n")
    session.connect()
    with pytest.raises(Permanent):
        session.submit("b@x.org", ["a@x.org>\r\nRCPT TO:<eve@x.org"], b"x\r\n")
    assert len(peer.messages) == 2


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:25", "smtp://", "http://x", "smtp://h:port", "unix:relative", "smtp://h/p"]
)
def test_smtp_target_refuses_what_it_does_not_understand(url: str) -> None:
    with pytest.raises(NotReady, match="smtp://HOST:PORT"):
        smtp_target(url)


def test_smtp_target_reads_both_kinds() -> None:
    assert smtp_target("smtp://[::1]:2525") == ("::1", 2525)
    assert smtp_target("smtp://relay.example.org") == ("relay.example.org", 25)
    assert smtp_target("unix:/run/smtp") == "/run/smtp"


def test_evidence_reads_the_time_of_a_log_line() -> None:
    now = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
    assert log_time(b"2026-01-01T10:00:00.5+00:00 host postfix/qmgr[1]: x", now) == datetime(
        2026, 1, 1, 10, 0, 0, 500_000, tzinfo=UTC
    )
    old = log_time(b"Dec 31 23:00:00 host postfix/qmgr[1]: x", now)
    assert old is not None
    assert (old.astimezone().year, old.astimezone().month, old.astimezone().day) == (2025, 12, 31)
    assert log_time(b"Jan  2 09:00:00 host x", now) == datetime(2026, 1, 2, 9).astimezone()
    for line in (b"", b"\n", b"\xff\xfe", b"Foo 99 00:00:00 host", b"Feb 31 00:00:00 host x"):
        assert log_time(line, now) is None


@pytest.mark.parametrize(
    ("evidence", "policy", "said"),
    [
        (KnownEvidence(TOKEN_LOST), "resend", Evidence.UNKNOWN),
        (KnownEvidence(TOKEN_LOST), "drop", Evidence.APPLIED),
        (KnownEvidence(Finding(Evidence.APPLIED, {"": "QX"})), "resend", Evidence.APPLIED),
        (NoEvidence(), "resend", Evidence.UNKNOWN),
        (NoEvidence(), "hold", Evidence.UNKNOWN),
    ],
)
def test_mail_i3_absence_is_no_proof_when_the_database_was_restored(
    peer: Peer, evidence: KnownEvidence | NoEvidence, policy: str, said: Evidence
) -> None:
    mail = participant(peer.url, evidence)
    doubt = Doubt(mail_intent(1, in_doubt=policy), datetime.now(UTC), {}, adopted=True)
    assert [answer for answer, _ in mail.probe([doubt])] == [said]
    mail.close()


def test_mail_i3_absence_is_proof_when_the_database_was_restored_and_the_evidence_lasts(
    peer: Peer, tmp_path: Path
) -> None:
    for folder in ("new", "cur"):
        (tmp_path / folder).mkdir()
    mail = participant(peer.url, MaildirEvidence(tmp_path))
    doubt = Doubt(mail_intent(1), datetime.now(UTC), {}, adopted=True)
    assert [answer for answer, _ in mail.probe([doubt])] == [Evidence.NOT_APPLIED]
    mail.close()
