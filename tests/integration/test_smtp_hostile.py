"""Mail servers that don't behave, a part of `tests/faults/test_smtp.py`; and mails that nobody can tell about."""

from __future__ import annotations

import pytest

from outbox.cli import main
from tests.fixtures.hostile import BROKEN, LYING, MIXED, REFUSING, SLOW, MailLane, Script, play
from tests.fixtures.mail import CUT
from workers.evidence import NoEvidence

SOME = [*REFUSING[1::5], *MIXED[::2], *BROKEN[::6], SLOW[-1], *LYING[1:5]]


@pytest.mark.parametrize("script", SOME, ids=lambda script: script.name)
def test_smtp_i2_i3_i10_everybody_has_it_once_and_the_lane_goes_on(mail_lane: MailLane, script: Script) -> None:
    play(mail_lane, script)


# ------------------------------------------------------- plain: a server that nobody can ask, cut after the dot


def test_smtp_i3_resend_sends_at_most_one_more_with_the_same_bytes(mail_lane: MailLane) -> None:
    mail_lane.peer.say(".", CUT)
    number, token = mail_lane.write("k", "ann@outbox.test", in_doubt="resend")
    mail_lane.drain(NoEvidence())
    assert len(mail_lane.peer.messages) == 2
    assert mail_lane.peer.messages[0] == mail_lane.peer.messages[1]
    assert f"<{token}@".encode() in mail_lane.peer.messages[0][2]
    assert mail_lane.parked() == {}
    assert (mail_lane.receipt(number) or ("",))[0] == "closed"


def test_smtp_i3_drop_sends_it_once_and_says_that_it_assumes_so(mail_lane: MailLane) -> None:
    mail_lane.peer.say(".", CUT)
    number, _ = mail_lane.write("k", "ann@outbox.test", "bob@outbox.test", in_doubt="drop")
    mail_lane.drain(NoEvidence())
    assert len(mail_lane.peer.messages) == 1
    assert mail_lane.parked() == {}
    state, known = mail_lane.receipt(number) or ("", {})
    assert (state, known["assumed"]) == ("closed", [0, 1])


@pytest.mark.parametrize(("answer", "copies"), [("--sent", 1), ("--not-sent", 2)])
def test_smtp_i3_hold_asks_an_operator_and_does_what_he_says(
    mail_lane: MailLane, operator_url: str, monkeypatch: pytest.MonkeyPatch, answer: str, copies: int
) -> None:
    # Given: a mail in doubt, and one of the same key behind it
    mail_lane.peer.say(".", CUT)
    number, token = mail_lane.write("k", "ann@outbox.test", in_doubt="hold")
    behind, later = mail_lane.write("k", "ann@outbox.test")
    _, other = mail_lane.write("l", "ann@outbox.test")
    mail_lane.drain(NoEvidence())
    # Then: it is parked with an open receipt, and the lane went on with other keys
    assert {n: reason for n, (reason, _) in mail_lane.parked().items()} == {number: "in_doubt", behind: "blocked"}
    assert (mail_lane.receipt(number) or ("",))[0] == "open"
    assert [sender[2:34] for sender, _, _ in mail_lane.peer.messages] == [token, other]
    # A worker that comes later asks nobody, and sends nothing.
    mail_lane.drain(NoEvidence())
    assert len(mail_lane.peer.messages) == 2
    # When: the operator answers
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    assert main(["parked", "resolve", answer, str(number)]) == 0
    mail_lane.drain(NoEvidence())
    # Then
    assert [sender[2:34] for sender, _, _ in mail_lane.peer.messages] == [token, other, *[token] * (copies - 1), later]
    assert mail_lane.parked() == {}
    assert (mail_lane.receipt(number) or ("",))[0] == "closed"
    same = {data for sender, _, data in mail_lane.peer.messages if token in sender}
    assert len(same) == 1
