"""Mail in two phases with a real Postfix: prepared on hold, recorded, released. Counted at the next hop."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from outbox.errors import NotReady, Unavailable
from outbox.participant import Doubt, Evidence, LaneView, Participant, TwoPhase, Verdict
from tests.fixtures.mail import DOMAIN, Peer, mail_intent, participant
from tests.fixtures.post import Post
from tests.fixtures.postfix import Postfix, Sink
from tests.fixtures.site import LIMIT, until
from workers.evidence import NoEvidence
from workers.heldmail import HeldMailParticipant, _cover
from workers.hold import PROBE, HoldQueue
from workers.relay import Relay
from workers.smtp import SmtpSession

pytestmark = pytest.mark.root


def test_hold_i2_i3_each_mail_arrives_once_when_worker_and_postfix_are_killed(post: Post) -> None:
    # Given: a worker killed in each wave of mails, and Postfix in every other one
    def nemesis() -> None:
        post.relay.kill()
        post.relay.start()

    post.storm(waves=4, size=15, seed=3, every=2, nemesis=nemesis)
    # When: a last worker finishes
    post.worker()
    post.drained()
    # Then: each mail came, as one mail
    assert post.arrived() == [1] * 60


@pytest.mark.parametrize("name", ["receipt.opened", "mail.submitted", "receipt.prepared", "mail.released"])
def test_hold_i3_i11_loses_and_repeats_nothing_when_killed_at_a_gap(post: Post, name: str) -> None:
    # Given: three mails in one batch
    post.write(3, to=("ann@sink.test", "bob@sink.test"))
    # When: the worker dies there, and once more while it recovers
    for _ in range(2):
        assert post.worker(OUTBOX_FAILPOINT=name).wait(LIMIT) == -9, f"{name} was not reached"
    # Then: a later one finishes, and each came once
    assert post.worker("--until-idle").wait(LIMIT) == 0
    post.drained()
    assert post.arrived() == [1, 1, 1]


NO_RECORD = """
from outbox import receipt
receipt.prepared = lambda *_: None
from outbox.cli import main
main(["work", "mail"])
"""


def test_hold_i12_sends_twice_when_what_is_prepared_is_not_recorded(post: Post) -> None:
    # Given: a worker that releases without having recorded what
    post.write(3)
    naive = subprocess.Popen(
        [sys.executable, "-c", NO_RECORD], env=post.site.environment | {"OUTBOX_FAILPOINT": "mail.released"}
    )
    post.site.running.append(naive)  # type: ignore[arg-type]
    # When: it is killed after the release
    assert naive.wait(LIMIT) == -9
    post.worker("--until-idle").wait(LIMIT)
    post.drained()
    # Then: the check of all these tests sees it
    until(lambda: post.arrived() == [2, 2, 2], "each mail comes twice")


# ----------------------------------------------------------------------------------------- as intents of their own


def test_hold_keeps_a_prepared_mail_until_it_is_released(post: Post) -> None:
    # Given
    first = post.write(action="prepare")
    worker = post.worker()
    until(lambda: post.receipts("closed") == 1, "the mail is prepared")
    # When: another mail comes and goes
    post.write()
    until(lambda: post.arrived()[1] == 1, "the second mail arrives")
    # Then: the first one is on hold, until it is let go
    assert post.arrived() == [0, 1]
    assert [m["sender"] for m in post.relay.queue("hold")] == [f"b+{first}@{DOMAIN}"]
    post.say("release", {"token": first})
    post.drained()
    assert post.arrived() == [1, 1]
    assert worker.poll() is None


@pytest.mark.parametrize("name", ["receipt.prepared", "mail.released", "reader.applied"])
def test_hold_i3_releases_once_when_killed_while_releasing(post: Post, name: str) -> None:
    # Given: mails on hold
    post.write(2, action="prepare")
    assert post.worker("--until-idle").wait(LIMIT) == 0
    # When
    for token in post.tokens:
        post.say("release", {"token": token})
    assert post.worker(OUTBOX_FAILPOINT=name).wait(LIMIT) == -9, f"{name} was not reached"
    assert post.worker("--until-idle").wait(LIMIT) == 0
    # Then
    post.drained()
    assert post.arrived() == [1, 1]


def test_hold_i1_withdraws_a_prepared_mail_and_says_so_again_when_killed(post: Post) -> None:
    # Given: two mails prepared, in one transaction with the word that withdraws one
    gone, kept = post.write(action="prepare"), post.write(action="prepare")
    post.say("withdraw", {"token": gone})
    # When: the worker dies after the withdrawal
    assert post.worker(OUTBOX_FAILPOINT="reader.applied").wait(LIMIT) == -9
    assert post.worker("--until-idle").wait(LIMIT) == 0
    # Then: one is left, and a release of the other is refused
    assert [m["sender"] for m in post.relay.queue("hold")] == [f"b+{kept}@{DOMAIN}"]
    post.say("release", {"token": gone})
    post.say("release", {"token": kept})
    assert post.worker("--until-idle").wait(LIMIT) == 0
    until(lambda: post.arrived() == [0, 1], "the mail that was kept arrives")
    (parked,) = post.site.admin.execute("select reason, error from outbox.parked").fetchall()
    assert parked[0] == "poison"
    assert parked[1].startswith("no mail is on hold under this token")


def test_hold_i10_waits_and_parks_nothing_while_postfix_is_stopped(post: Post) -> None:
    # Given: a worker at work, and Postfix stopped as in an upgrade
    post.worker()
    post.write()
    until(lambda: post.arrived() == [1], "the first mail arrives")
    post.relay.stop()
    # When
    post.write(3)
    until(lambda: post.site.one("select state from outbox.lane where target = 'mail'") == "waiting", "the lane waits")
    assert post.site.one("select count(*) from outbox.parked") == 0
    # Then: it goes on by itself
    post.relay.start()
    post.drained()
    assert post.arrived() == [1] * 4


# ----------------------------------------------------------------------------------------------- the participant


def held(relay: Postfix, *, postsuper: str = "postsuper", url: str = "") -> HeldMailParticipant:
    mail = HeldMailParticipant(url or relay.hold_url, HoldQueue(relay.etc, postsuper, settle=0.2), DOMAIN)
    try:
        mail.open(LaneView("mail", 0, 1, unclean=False))
    except Unavailable:
        mail.close()
        raise
    return mail


def test_hold_is_a_participant_of_two_phases(relay: Postfix) -> None:
    mail = held(relay)
    assert isinstance(mail, Participant)
    assert isinstance(mail, TwoPhase)
    mail.close()
    assert not [m for m in relay.queue() if PROBE in str(m)], "the probe is withdrawn"


def test_hold_i3_adopts_one_of_several_copies_and_withdraws_the_others(relay: Postfix, sink: Sink) -> None:
    # Given: a mail that is on hold twice, as after a worker that woke up late, and nothing recorded of it
    sink.messages.clear()
    intent = mail_intent(1, "ann@sink.test")
    token = intent.payload["token"]
    session = SmtpSession(Relay.read(relay.hold_url), "late.outbox.test")
    session.connect()
    for _ in range(2):
        session.submit(f"b+{token}@{DOMAIN}", ["ann@sink.test"], intent.payload["message"].encode())
    session.close()
    mail = held(relay)
    # When: the next owner recovers
    evidence, receipt = mail.probe([Doubt(intent, datetime.now(UTC), {})])[0]
    assert evidence is Evidence.NOT_APPLIED, "it is prepared, not sent"
    assert receipt is not None
    mail.known({1: receipt})
    (outcome,) = mail.apply([intent], None)
    assert (outcome.verdict, outcome.prepared, outcome.receipt) == (Verdict.APPLIED, True, receipt)
    mail.release([(intent, receipt)])
    mail.release([(intent, receipt)])  # again does nothing
    mail.close()
    # Then
    until(lambda: relay.queue() == [], "nothing is left in the queue")
    assert sink.arrived() == {token: {receipt["queue_id"]}}


def test_hold_i3_no_recipient_gets_a_mail_twice_when_copies_overlap() -> None:
    assert list(_cover(["", ".0.1"])) == [""]
    assert list(_cover([".0.3", ".1.3", ".0.1"])) == [".0.1", ".1.3"]
    assert list(_cover([".0.5", ".1.1"])) == [".0.5", ".1.1"]


@pytest.mark.parametrize("action", ["prepare", "release", "withdraw"])
def test_hold_actions_are_poison_when_mail_does_not_go_on_hold(peer: Peer, action: str) -> None:
    mail = participant(peer.url, NoEvidence())
    outcomes = mail.apply([mail_intent(1)._replace(action=action), mail_intent(2)], None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.POISON, Verdict.APPLIED]
    assert "OUTBOX_MAIL_EVIDENCE=hold:" in outcomes[0].error
    assert len(peer.messages) == 1


def test_hold_is_unavailable_when_the_port_does_not_hold(relay: Postfix) -> None:
    with pytest.raises(Unavailable, match=r"does not go on hold: .*static:HOLD"):
        held(relay, url=relay.url)


@pytest.mark.parametrize("command", ["false", "no-such-postsuper", "sh -c 'exit 3'"])
def test_hold_is_unavailable_when_postsuper_can_not_be_run(relay: Postfix, command: str) -> None:
    with pytest.raises(Unavailable, match="OUTBOX_POSTSUPER"):
        held(relay, postsuper=command)


def test_hold_is_unavailable_when_queue_ids_are_used_again(relay: Postfix, tmp_path: Path) -> None:
    for name in ("main.cf", "master.cf"):
        text = (relay.etc / name).read_text(encoding="ascii").replace("enable_long_queue_ids = yes", "")
        (tmp_path / name).write_text(text, encoding="ascii")
    with pytest.raises(Unavailable, match="enable_long_queue_ids"):
        HoldQueue(tmp_path).check()


def test_hold_setting_names_a_configuration(relay: Postfix, tmp_path: Path) -> None:
    assert HoldQueue.named(relay.hold, "postsuper").config_directory == relay.etc
    for setting in ("hold:", "hold:relative", f"hold:{tmp_path}"):
        with pytest.raises(NotReady, match=r"main\.cf"):
            HoldQueue.named(setting, "postsuper")


def test_hold_gives_postsuper_nothing_but_queue_ids(relay: Postfix, tmp_path: Path) -> None:
    # Given: a command that writes down how it was called
    command = tmp_path / "postsuper"
    command.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat >{tmp_path}/input\n', encoding="ascii")
    command.chmod(0o755)
    # When
    HoldQueue(relay.etc, str(command)).withdraw(["4jd79X5V7yzJbWf", "ALL", "-", "../x", "4jd79X5V7yzJbWf\nALL"])
    # Then
    assert (tmp_path / "words").read_text(encoding="ascii") == f"-c {relay.etc} -d - hold\n"
    assert (tmp_path / "input").read_text(encoding="ascii") == "4jd79X5V7yzJbWf\n"
