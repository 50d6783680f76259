"""The receipt's recipient: what comes back proves that a mail was taken, and what doesn't come back proves little."""

from __future__ import annotations

import re
import smtplib
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.errors import NotReady, Unavailable
from outbox.participant import Doubt, Evidence, Verdict
from tests.fixtures.mail import CUT, DOMAIN, Peer, mail_intent, participant
from tests.fixtures.receipts import ADDRESS, Receipts
from tests.fixtures.site import LIMIT, until
from workers.evidence import Finding, evidence_for
from workers.lmtp import queue_id
from workers.postgres import Postgres
from workers.postmark import Postmark, Postmarks, ReceiptAddress
from workers.relay import Relay, lmtp_target
from workers.witness import Witness


class Lmtp(smtplib.LMTP):
    """A mail server's side."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))

    def bring(self, recipients: list[str], name: str = "QUEUE1") -> list[int]:
        """Bring a message as Postfix does. → the replies for its recipients."""
        self.ehlo_or_helo_if_needed()
        self.docmd("MAIL", "FROM:<b+x@outbox.test>")
        taken = [self.docmd("RCPT", f"TO:<{to}>")[0] for to in recipients]
        self.docmd("DATA")
        self.send(
            f"Received: from id evil (localhost [127.0.0.1])\r\n\tby mta (Postfix) with ESMTP id {name}\r\n"
            "\tfor <x>; Mon, 1 Jan 2026 00:00:00 +0000\r\nReceived: from x by y with SMTP id OLD; Sun\r\n\r\n"
            "text\r\n.\r\n"
        )
        return [code for code in taken if code != 250] + [self.getreply()[0] for code in taken if code == 250]


def rows(admin: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return admin.execute("select token, part, queue_id from outbox.postmark order by 1, 2, 3").fetchall()


# --------------------------------------------------------------------------------------------- the server


def test_receipts_stores_each_before_it_says_so_and_answers_for_each_recipient(
    receipts: Receipts, admin: psycopg.Connection[Any]
) -> None:
    # Given: a recipient, and a message for two parts and a stranger
    receipts.start()
    one, two = uuid.uuid4().hex, uuid.uuid4().hex
    to = [ADDRESS.of(one, ""), ADDRESS.of(two, ".0.5"), "ann@receipts.test", f"receipt+{one}@elsewhere.test"]
    # When: it is brought, and brought again
    with Lmtp(receipts.path) as lmtp:
        for _ in range(2):
            assert lmtp.bring(to) == [550, 550, 250, 250]
        assert lmtp.bring(to[:1], "QUEUE2") == [250]
    # Then: twice is once, a second copy is seen, and nobody is named in the log
    assert rows(admin) == sorted([(one, "", "QUEUE1"), (one, "", "QUEUE2"), (two, ".0.5", "QUEUE1")])
    assert "@" not in receipts.stop()


def test_receipts_i2_says_later_while_the_database_is_away_and_remembers_that(
    receipts: Receipts, admin: psycopg.Connection[Any], server: Postgres, database: str
) -> None:
    # Given: a recipient that has been there for a while
    receipts.start()
    (began,) = admin.execute("select since from outbox.postmark_watch").fetchone() or (None,)
    token = uuid.uuid4().hex
    with Lmtp(receipts.path) as lmtp, psycopg.connect(server.url(), autocommit=True) as elsewhere:
        # When: Postgres lets nobody in
        elsewhere.execute(f"alter database {database} allow_connections false")
        there = "from pg_stat_activity where datname = current_database() and application_name = 'outbox receipts'"
        admin.execute(f"select pg_terminate_backend(pid) {there}")
        until(lambda: admin.execute(f"select {there}").fetchone() is None, "its connection is gone")
        assert lmtp.bring([ADDRESS.of(token, "")]) == [451]
        elsewhere.execute(f"alter database {database} allow_connections true")
        assert rows(admin) == []
        # Then: it takes the next one, but not without having said that there was a gap
        assert until(lambda: lmtp.bring([ADDRESS.of(token, "")]) == [250], "taken again")
    assert rows(admin) == [(token, "", "QUEUE1")]
    (since,) = admin.execute("select since from outbox.postmark_watch").fetchone() or (None,)
    assert began is not None
    assert since is not None
    assert since > began


def test_receipts_i3_i11_is_once_when_killed_between_commit_and_reply(
    receipts: Receipts, admin: psycopg.Connection[Any]
) -> None:
    # Given: a recipient that dies there
    victim, token = receipts.start(OUTBOX_FAILPOINT="receipt.stored"), uuid.uuid4().hex
    with pytest.raises((OSError, smtplib.SMTPException)), Lmtp(receipts.path) as lmtp:
        lmtp.bring([ADDRESS.of(token, "")])
    assert victim.wait(LIMIT) == -9
    victim.communicate()
    # When: the mail server brings the same message again
    assert rows(admin) == [(token, "", "QUEUE1")]
    receipts.start()
    with Lmtp(receipts.path) as lmtp:
        assert lmtp.bring([ADDRESS.of(token, "")]) == [250]
    # Then
    assert rows(admin) == [(token, "", "QUEUE1")]


def test_receipts_socket_is_as_open_as_its_directory(receipts: Receipts) -> None:
    receipts.start()
    assert receipts.path.stat().st_mode & 0o777 == 0o666


def test_receipts_command_says_what_is_missing(receipts: Receipts) -> None:
    for variable, value in (
        ("OUTBOX_MAIL_EVIDENCE", "none"),
        ("OUTBOX_LMTP", "lmtp://0.0.0.0:0"),
        ("OUTBOX_LMTP", "x"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "outbox", "work", "receipts"], env=receipts.environment | {variable: value},
            capture_output=True, text=True, check=False, timeout=LIMIT,
        )  # fmt: skip
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"Received: by mta (Postfix, from userid 0)\r\n\tid 4abC; Mon\r\n\r\n", "4abC"),
        (b"Return-Path: <x>\r\nreceived: by a id 1a-2b.3 for <x>; Mon\r\nReceived: by b id c; x\r\n\r\n", "1a-2b.3"),
        (b"Subject: x\r\n\r\nReceived: by a id 1; Mon\r\n", ""),
        (b"Received: by a; Mon\r\n\r\n", ""),
        (b"", ""),
    ],
)  # fmt: skip
def test_receipts_reads_the_name_of_the_message(content: bytes, found: str) -> None:
    assert queue_id(content) == found


def test_receipts_address_is_matched_as_it_is_made() -> None:
    address, token = ReceiptAddress.read("receipt@Receipts.Test"), uuid.uuid4().hex
    for part in ("", ".0.1", f".9999.{'f' * 16}"):
        made = address.of(token, part)
        assert len(made.partition("@")[0]) <= 64
        assert address.match(made) == Postmark(token, part)
    for other in (f"receipt+{token[1:]}@receipts.test", f"other+{token}@receipts.test", "receipt@receipts.test", ""):
        assert address.match(other) is None
    for bad in ("", "receipt", "mail-receipts@x.org", "a+b@x.org", "r\r\n@x.org", "jörg@x.org"):
        with pytest.raises(NotReady, match="OUTBOX_MAIL_EVIDENCE"):
            ReceiptAddress.read(bad)
    assert lmtp_target("lmtp://127.0.0.1:2424") == ("127.0.0.1", 2424)
    for bad in ("lmtp://127.0.0.1", "smtp://127.0.0.1:1", "http://127.0.0.1:1", "/path"):
        with pytest.raises(NotReady, match="OUTBOX_LMTP"):
            lmtp_target(bad)


# -------------------------------------------------------------------------- the witness, with a scripted server


@pytest.fixture
def postmarks(worker_url: str) -> Iterator[Postmarks]:
    """A recipient's side without its server: a test says what comes back, and when."""
    made = Postmarks(worker_url, "test")
    made.watch()
    yield made
    made.close()


def returning(peer: Peer, postmarks: Postmarks, *, only: Callable[[Postmark], bool] = lambda _: True) -> None:
    """From now on, copies of what the peer takes come back at once."""

    def bring(_sender: str, recipients: list[str], _data: bytes) -> None:
        found = [mark for to in recipients if (mark := ADDRESS.match(to)) is not None and only(mark)]
        if found:
            postmarks.put(found, f"Q{len(peer.messages)}")

    peer.took = bring


def witness(peer: Peer, database: str, *, settle: float = 0.2, patience: float = LIMIT) -> Witness:
    return Witness(ADDRESS, Relay.read(peer.url), database, DOMAIN, settle=settle, patience=patience, timeout=LIMIT)


def real(intent: Any) -> str:
    return str(intent.payload["token"])


def test_witness_i3_finds_what_came_back_when_the_reply_was_lost(
    peer: Peer, postmarks: Postmarks, worker_url: str
) -> None:
    # Given: a server that cuts after the dot, and brings the receipt
    returning(peer, postmarks)
    mail = participant(peer.url, witness(peer, worker_url))
    intent = mail_intent(1)
    peer.say(".", CUT)
    # When
    (outcome,) = mail.apply([intent], None)
    mail.close()
    # Then: it was sent once, to its recipient and for the receipt
    assert outcome.verdict is Verdict.APPLIED
    mine = [message for message in peer.messages if real(intent) in message[0]]
    assert [message[1] for message in mine] == [[ADDRESS.of(real(intent), ""), "ann@outbox.test"]]
    assert b"receipts.test" not in mine[0][2]


def test_witness_says_no_only_after_a_marker_came_back_and_then_some_time(
    peer: Peer, postmarks: Postmarks, worker_url: str, admin: psycopg.Connection[Any]
) -> None:
    returning(peer, postmarks)
    admin.execute("update outbox.postmark_watch set since = since - interval '1 hour'")
    asked, token = witness(peer, worker_url, settle=1.0), uuid.uuid4().hex
    begun = time.monotonic()
    assert asked.look({token: datetime.now(UTC)}) == {token: Finding(Evidence.NOT_APPLIED, {})}
    assert time.monotonic() - begun >= 1.0
    assert len(peer.messages) == 1, "the marker"

    # What arrives in that time counts.
    def later(_sender: str, recipients: list[str], _data: bytes) -> None:
        mark = ADDRESS.match(recipients[0])
        assert mark is not None
        postmarks.put([mark, Postmark(token, ".0.1")], "QX")

    peer.took = later
    assert asked.look({token: datetime.now(UTC)}) == {token: Finding(Evidence.APPLIED, {".0.1": "QX"})}


def test_witness_i2_does_not_know_when_the_receipt_may_be_waiting_because_of_us(
    peer: Peer, postmarks: Postmarks, worker_url: str
) -> None:
    # Given: an attempt, and a recipient of receipts that was not there at the time
    returning(peer, postmarks)
    begun, token, found = datetime.now(UTC) - timedelta(minutes=1), uuid.uuid4().hex, uuid.uuid4().hex
    postmarks.put([Postmark(found, "")], "Q9")
    # When
    findings = witness(peer, worker_url).look({token: begun, found: begun})
    # Then: what came back proves something even so
    assert findings[token] == Finding(Evidence.UNKNOWN, {})
    assert findings[found] == Finding(Evidence.APPLIED, {"": "Q9"})


def test_witness_does_not_know_when_receipts_of_that_time_are_not_kept(
    peer: Peer, postmarks: Postmarks, worker_url: str, admin: psycopg.Connection[Any]
) -> None:
    returning(peer, postmarks)
    admin.execute("update outbox.postmark_watch set since = since - interval '90 days'")
    postmarks.put([Postmark(uuid.uuid4().hex, "")], "Q1")
    admin.execute("update outbox.postmark set received_at = received_at - interval '31 days'")
    postmarks.forget()
    assert rows(admin) == []
    token, ago = uuid.uuid4().hex, datetime.now(UTC) - timedelta(days=31)
    asked = witness(peer, worker_url)
    assert asked.look({token: ago})[token].evidence is Evidence.UNKNOWN
    assert asked.look({token: ago + timedelta(days=2)})[token].evidence is Evidence.NOT_APPLIED


def test_witness_makes_the_lane_wait_when_no_receipts_come_back(
    peer: Peer, postmarks: Postmarks, worker_url: str, admin: psycopg.Connection[Any]
) -> None:
    asked = witness(peer, worker_url, patience=0.3)
    with pytest.raises(Unavailable, match="did not come back"):
        asked.check()
    with pytest.raises(Unavailable, match="did not come back"):
        asked.look({uuid.uuid4().hex: datetime.now(UTC)})
    peer.say("RCPT", "550 5.1.1 <receipt@receipts.test> unknown")
    with pytest.raises(Unavailable, match=r"550 5\.1\.1") as caught:
        asked.check()
    assert "@" not in str(caught.value)
    returning(peer, postmarks)
    witness(peer, worker_url).check()
    admin.execute(
        "update outbox.postmark_watch set since = since - interval '2 days', seen_at = since - interval '1 day'"
    )
    with pytest.raises(Unavailable, match="outbox work receipts"):
        asked.check()
    with pytest.raises(Unavailable, match="database"):
        witness(peer, worker_url.replace("outbox_worker@", "nobody@")).check()


def test_witness_sends_nothing_when_the_receipt_is_refused(peer: Peer, postmarks: Postmarks, worker_url: str) -> None:
    returning(peer, postmarks)
    mail = participant(peer.url, witness(peer, worker_url))
    before = len(peer.messages)
    peer.say("RCPT", "451 4.3.0 later")
    with pytest.raises(Unavailable, match="the receipt's recipient"):
        mail.apply([mail_intent(1)], None)
    assert len(peer.messages) == before
    mail.close()


def test_witness_i3_names_each_part_of_a_mail(peer: Peer, postmarks: Postmarks, worker_url: str) -> None:
    # Given: a server that takes one of two recipients, and cuts after the dot
    returning(peer, postmarks)
    mail = participant(peer.url, witness(peer, worker_url))
    intent = mail_intent(1, "ann@outbox.test", "bob@outbox.test")
    peer.say("RCPT", None, None, "450 4.2.0 later")
    peer.say(".", CUT)
    # When: the attempt's worker is gone, and another one asks
    (outcome,) = mail.apply([intent], None)
    evidence, receipt = mail.probe([Doubt(intent, datetime.now(UTC), {})])[0]
    mail.close()
    # Then: one has it, and only the other gets it again
    assert outcome.verdict is Verdict.RETRY
    assert evidence is Evidence.NOT_APPLIED
    assert receipt is not None
    assert list(receipt["accepted"]) == ["0"]
    assert outcome.receipt is not None
    assert list(outcome.receipt["accepted"]) == ["0"]


def test_witness_is_what_the_setting_names(worker_url: str) -> None:
    from outbox.settings import Settings

    settings = Settings(worker_url, None, None, "smtp://127.0.0.1:25", mail_evidence="receipt:receipt@receipts.test")
    assert isinstance(evidence_for(settings.mail_evidence, settings), Witness)
    with pytest.raises(NotReady, match="receipt:receipt@example"):
        evidence_for("receipt:receipt@receipts.test")
    assert re.fullmatch(r"receipt\+[0-9a-f]{32}@receipts\.test", ADDRESS.of(uuid.uuid4().hex, ""))
