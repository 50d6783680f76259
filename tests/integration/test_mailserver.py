"""The embedded mail server as a process, with workers and servers that are killed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import smtplib
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from outbox.errors import NotReady, Unavailable
from outbox.intent import Intent
from outbox.participant import Doubt, Evidence, LaneView, Verdict
from tests.fixtures.mail import Mailserver, mail_intent, participant, start_worker
from tests.fixtures.site import LIMIT, until
from workers.evidence import MaildirEvidence, evidence_for
from workers.listener import listening_socket
from workers.maildir import Maildir
from workers.relay import Relay
from workers.smtp import SmtpSession


def _read(server: Mailserver) -> list[bytes]:
    return [path.read_bytes() for path in sorted((server.maildir / "new").iterdir())]


def _raw(server: Mailserver, name: str) -> socket.socket:
    """A session that a test drives by hand."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(server.socket))
    lines = sock.makefile("rb")
    lines.readline()
    sock.sendall(f"HELO {name}\r\n".encode())
    assert lines.readline().startswith(b"250")
    lines.close()
    return sock


def test_mailserver_stores_what_was_sent_with_its_envelope(mailserver: Mailserver) -> None:
    mail = participant(mailserver.url, evidence_for(mailserver.evidence))
    intent = mail_intent(1, "ann@outbox.test", "bob@outbox.test")
    (outcome,) = mail.apply([intent], None)
    mail.close()
    (path,) = (mailserver.maildir / "new").iterdir()
    assert outcome.verdict is Verdict.APPLIED
    assert path.name.split(".")[1] == (outcome.receipt or {})["queue_id"]
    token, text = intent.payload["token"], intent.payload["message"]
    head = f"Return-Path: <b+{token}@outbox.test>\r\nDelivered-To: ann@outbox.test\r\nDelivered-To: bob@outbox.test\r\n"
    assert path.read_bytes() == (head + text).encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list((mailserver.maildir / "tmp").iterdir()) == []


def test_mailserver_keeps_every_message_when_one_comes_twice(mailserver: Mailserver) -> None:
    mail = participant(mailserver.url, evidence_for(mailserver.evidence))
    for _ in range(2):
        mail.apply([mail_intent(1)], None)
    intent = mail_intent(2)
    for _ in range(2):
        mail.apply([intent], None)
    mail.close()
    assert mailserver.tokens()[intent.payload["token"]] == 2
    assert len(_read(mailserver)) == 4


def test_mailserver_is_for_its_user_only(mailserver: Mailserver) -> None:
    assert stat.S_IMODE(mailserver.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(mailserver.maildir.stat().st_mode) == 0o700
    with pytest.raises(NotReady, match="loopback"):
        listening_socket(("0.0.0.0", 0))


def test_mailserver_replaces_a_dead_socket_and_respects_a_living_one(mailserver: Mailserver) -> None:
    with pytest.raises(NotReady, match="another server"):
        listening_socket(str(mailserver.socket))
    with pytest.raises(NotReady, match="another mail server"):
        Maildir(mailserver.maildir)
    mailserver.kill()
    (mailserver.maildir / "tmp" / "left").touch()
    assert mailserver.socket.exists()
    mailserver.start()
    assert list((mailserver.maildir / "tmp").iterdir()) == []
    precious = mailserver.socket.with_name("file")
    precious.write_text("not a socket", encoding="ascii")
    listening_socket(str(precious.with_name("other"))).close()
    with pytest.raises(NotReady):
        listening_socket(str(precious.parent / "no" / "socket"))


def test_mailserver_says_why_it_can_not_start(mailserver: Mailserver) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.mailserver", "--maildir", mailserver.maildir, "--listen", "unix:/x/y"],
        capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "another mail server" in done.stderr
    assert "Traceback" not in done.stderr


def test_mailserver_listens_on_loopback(tmp_path: Path) -> None:
    with listening_socket(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "workers.mailserver",
            "--maildir",
            tmp_path / "m",
            "--listen",
            f"smtp://127.0.0.1:{port}",
        ],
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(OSError), smtplib.SMTP("127.0.0.1", port, timeout=5) as client:
                client.sendmail("a@outbox.test", ["secret.ann@outbox.test"], "Subject: x\r\n\r\ny\r\n")
                with pytest.raises(smtplib.SMTPRecipientsRefused):
                    client.sendmail("a@outbox.test", ["b\x01c@outbox.test"], "x")
                break
            time.sleep(0.05)
        assert len(list((tmp_path / "m" / "new").iterdir())) == 1
    finally:
        process.terminate()
        log = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0
    assert b"@" not in log


def test_mailserver_stores_nothing_when_the_client_goes_before_the_dot(mailserver: Mailserver) -> None:
    for end in (b"Subject: x\r\n\r\nhalf", b"Subject: x\r\n\r\nall but the dot\r\n", b"x\r\n.", b"x\r\n.\r"):
        sock = _raw(mailserver, "client")
        sock.sendall(b"MAIL FROM:<a@x.org>\r\nRCPT TO:<b@x.org>\r\nDATA\r\n")
        replies = sock.makefile("rb")
        assert any(line.startswith(b"354") for line in replies)
        replies.close()
        sock.sendall(end)
        sock.close()
    mail = participant(mailserver.url, evidence_for(mailserver.evidence))
    mail.close()
    assert mailserver.stop() == 0
    assert _read(mailserver) == []


def test_mailserver_i6_ends_the_older_session_of_a_lane(mailserver: Mailserver) -> None:
    evidence = evidence_for(mailserver.evidence)
    old = participant(mailserver.url, evidence, epoch=4)
    other_lane = participant(mailserver.url, evidence, lane=1, epoch=1)
    new = participant(mailserver.url, evidence, epoch=5)
    with pytest.raises(Unavailable):
        old._session.submit("b+x@outbox.test", ["ann@outbox.test"], b"x\r\n")
    # The stale owner may not come back while the new one is there.
    with pytest.raises(Unavailable, match=r"550 5\.7\.1"):
        old.apply([mail_intent(1)], None)
    assert new.apply([mail_intent(2)], None)[0].verdict is Verdict.APPLIED
    assert other_lane.apply([mail_intent(3)], None)[0].verdict is Verdict.APPLIED
    for mail in (old, new, other_lane):
        mail.close()
    assert len(_read(mailserver)) == 2


def test_mailserver_lets_other_clients_share_a_name(mailserver: Mailserver) -> None:
    sessions = [SmtpSession(Relay(str(mailserver.socket)), "localhost") for _ in range(3)]
    for session in sessions:
        session.connect()
    for session in sessions:
        session.submit("a@x.org", ["b@x.org"], b"x\r\n")
        session.close()
    assert len(_read(mailserver)) == 3


def test_mailserver_answers_a_new_session_when_the_old_one_has_written(mailserver: Mailserver) -> None:
    """The new session sees everything or, for ever, nothing of what the old one had on its way."""
    evidence = MaildirEvidence(mailserver.maildir)
    seen, kept = [], []
    for round_ in range(60):
        intent = mail_intent(round_)
        token, begun = intent.payload["token"], datetime.now(UTC)
        sock = _raw(mailserver, f"mail-7-{round_}.outbox.test")
        data = intent.payload["message"].encode().replace(b"\r\n.", b"\r\n..") * 20
        commands = f"MAIL FROM:<b+{token}@outbox.test>\r\nRCPT TO:<a@x.org>\r\nDATA\r\n".encode()
        sock.sendall(commands + data + b"\r\n.\r\n")
        time.sleep(random.Random(round_).choice([0, 0.0005, 0.001, 0.002, 0.004]))
        sock.close()
        session = SmtpSession(Relay(str(mailserver.socket)), f"mail-7-{round_}.outbox.test")
        session.connect()
        seen.append(evidence.look({token: begun})[token].evidence is Evidence.APPLIED)
        session.close()
        kept.append(token)
    # A server that has ended has nothing on its way any more.
    assert mailserver.stop() == 0
    counts = mailserver.tokens()
    assert [counts[token] == 1 for token in kept] == seen
    assert all(counts[token] <= 1 for token in kept)
    assert any(seen)


def test_mailserver_finishes_the_message_on_its_way_when_it_is_stopped(mailserver: Mailserver) -> None:
    idle = _raw(mailserver, "idle")
    busy = _raw(mailserver, "busy")
    busy.sendall(b"MAIL FROM:<a@x.org>\r\nRCPT TO:<b@x.org>\r\nDATA\r\n")
    lines = busy.makefile("rb")
    while not lines.readline().startswith(b"354"):
        pass
    busy.sendall(b"Subject: x\r\n\r\nhalf")
    assert mailserver.process is not None
    mailserver.process.terminate()
    assert idle.recv(100).startswith(b"421")
    assert mailserver.process.poll() is None
    busy.sendall(b" and half\r\n.\r\n")
    assert lines.readline().startswith(b"250 2.0.0")
    assert mailserver.process.wait(LIMIT) == 0
    for file in (lines, busy, idle):
        file.close()
    assert _read(mailserver)[0].endswith(b"half and half\r\n")


def test_maildir_i5_keeps_nothing_it_could_not_make_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maildir = Maildir(tmp_path / "m")
    real, calls = os.fsync, 0

    for fail_at in (1, 2):
        calls = 0

        def fsync(fd: int, at: int = fail_at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.EIO, "I/O error")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="I/O"):
            maildir.store(b"Return-Path: <a@x.org>\r\n", b"x")
        assert list((tmp_path / "m" / "new").iterdir()) == list((tmp_path / "m" / "tmp").iterdir()) == []
    maildir.close()


def test_maildir_evidence_is_unknown_when_there_is_no_maildir(tmp_path: Path) -> None:
    token, now = "0" * 32, datetime.now(UTC)
    assert MaildirEvidence(tmp_path).look({token: now})[token].evidence is Evidence.UNKNOWN
    assert MaildirEvidence(tmp_path).look({}) == {}


def test_maildir_evidence_finds_mail_that_was_read_and_skips_older_mail(mailserver: Mailserver) -> None:
    mail, evidence = participant(mailserver.url, evidence_for(mailserver.evidence)), MaildirEvidence(mailserver.maildir)
    intent = mail_intent(1)
    mail.apply([intent], None)
    mail.close()
    token, now = intent.payload["token"], datetime.now(UTC)
    (path,) = (mailserver.maildir / "new").iterdir()
    path = path.rename(mailserver.maildir / "cur" / f"{path.name}:2,S")
    assert set(evidence.look({token: now})[token].sent) == {""}
    old = (now - timedelta(hours=1)).timestamp()
    os.utime(path, (old, old))
    assert evidence.look({token: now})[token].evidence is Evidence.NOT_APPLIED


# ------------------------------------------------------------------------------------------------ kill -9


def _prepare(home: Path, count: int) -> list[Intent]:
    intents = [mail_intent(number) for number in range(1, count + 1)]
    (home / "intents.json").write_text(json.dumps([list(i[:5]) for i in intents]), encoding="utf-8")
    return intents


def _once(server: Mailserver, intents: list[Intent]) -> None:
    assert server.tokens() == {intent.payload["token"]: 1 for intent in intents}


def test_mail_i3_sends_once_when_worker_killed_after_the_dot(mailserver: Mailserver, tmp_path: Path) -> None:
    intents = _prepare(tmp_path, 12)
    for epoch, nth in enumerate((1, 3, 2, 5), start=1):
        process = start_worker(
            tmp_path, mailserver.url, mailserver.evidence, epoch, OUTBOX_FAILPOINT=f"mail.submitted:{nth}"
        )
        assert process.wait(LIMIT) == -signal.SIGKILL
        assert mailserver.tokens().total() == sum((1, 3, 2, 5)[:epoch])
    assert start_worker(tmp_path, mailserver.url, mailserver.evidence, 9).wait(LIMIT) == 0
    _once(mailserver, intents)


@pytest.mark.slow
def test_mail_i3_sends_once_when_worker_killed_at_random(mailserver: Mailserver, tmp_path: Path) -> None:
    seed = random.Random(11)
    intents = _prepare(tmp_path, 400)
    kills = 0
    for epoch in range(1, 13):
        before = mailserver.tokens().total()
        process = start_worker(tmp_path, mailserver.url, mailserver.evidence, epoch)
        deadline = time.monotonic() + 20
        while mailserver.tokens().total() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seed.uniform(0, 0.04))
        process.kill()
        kills += process.wait(LIMIT) == -signal.SIGKILL
    assert kills >= 6
    assert start_worker(tmp_path, mailserver.url, mailserver.evidence, 99).wait(LIMIT) == 0
    _once(mailserver, intents)


@pytest.mark.slow
def test_mail_i3_sends_once_when_the_server_is_killed_at_random(mailserver: Mailserver, tmp_path: Path) -> None:
    seed = random.Random(13)
    intents = _prepare(tmp_path, 400)
    process = start_worker(tmp_path, mailserver.url, mailserver.evidence, 1)
    kills = 0
    while process.poll() is None and kills < 8:
        before, deadline = mailserver.tokens().total(), time.monotonic() + 20
        while mailserver.tokens().total() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(seed.uniform(0, 0.04))
        mailserver.kill()
        kills += 1
        mailserver.start()
    assert process.wait(LIMIT) == 0
    assert kills >= 4
    _once(mailserver, intents)


def test_mail_i6_a_paused_worker_sends_nothing_after_the_takeover(mailserver: Mailserver, tmp_path: Path) -> None:
    intents = _prepare(tmp_path, 400)
    process = start_worker(tmp_path, mailserver.url, mailserver.evidence, 1)
    while not mailserver.tokens():
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        new = participant(mailserver.url, evidence_for(mailserver.evidence), epoch=2)
        begun = datetime.now(UTC) - timedelta(seconds=30)
        found = new.probe([Doubt(intent, begun, {}) for intent in intents])
        sent = mailserver.tokens()
        tokens = [intent.payload["token"] for intent in intents]
        assert [evidence is Evidence.APPLIED for evidence, _ in found] == [sent[token] == 1 for token in tokens]
        assert 0 < sent.total() < 400
        noted = (tmp_path / "attempts").stat().st_size
        process.send_signal(signal.SIGCONT)
        until(lambda: (tmp_path / "attempts").stat().st_size > noted, "the paused worker went on, and noted how")
        assert mailserver.tokens() == sent
        new.close()
    finally:
        process.kill()
        process.wait()


def test_mailserver_takes_mail_from_many_sessions(mailserver: Mailserver) -> None:
    done: list[int] = []

    def work(lane: int) -> None:
        mail = participant(mailserver.url, evidence_for(mailserver.evidence), lane=lane)
        batch = [mail_intent(lane * 100 + number) for number in range(20)]
        done.append(sum(outcome.verdict is Verdict.APPLIED for outcome in mail.apply(batch, None)))
        mail.close()

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert done == [20] * 4
    assert mailserver.tokens().total() == 80


def test_mail_open_is_unavailable_when_the_server_is_down(mailserver: Mailserver) -> None:
    mail = participant(mailserver.url, evidence_for(mailserver.evidence))
    mailserver.kill()
    with pytest.raises(Unavailable):
        mail.apply([mail_intent(1)], None)
    mailserver.start()
    mail.open(LaneView("mail", 0, 1, unclean=False))
    assert mail.apply([mail_intent(1)], None)[0].verdict is Verdict.APPLIED
    mail.close()
