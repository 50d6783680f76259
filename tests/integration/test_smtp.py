"""SMTP's client: TLS, login, SMTPUTF8 and SIZE, against servers that do it right and servers that don't."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from outbox.errors import NotReady, Unavailable
from outbox.participant import LaneView, Outcome, Verdict
from tests.fixtures.mail import CUT, DOMAIN, Mailserver, Peer, mail_intent, participant
from tests.fixtures.postfix import Postfix
from tests.fixtures.site import until
from tests.fixtures.tls import Authority, Relaying
from workers.evidence import NoEvidence
from workers.mail import MailParticipant
from workers.relay import Relay
from workers.smtp import SmtpSession

UNICODE = "jörg@outbox.test"


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(Relaying.PASSWORD + "\n", encoding="ascii")
    return file


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Everything that was logged, at any level."""
    caplog.set_level(logging.DEBUG)
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("outbox"))


def relay(scheme: str, port: int, password: Path | None, authority: Authority | None, user: str = "") -> Relay:
    who = f"{quote(user or Relaying.USER, safe='')}@" if password else ""
    ca = authority.ca_file if authority else None
    return Relay.read(f"{scheme}://{who}127.0.0.1:{port}", password_file=password, ca_file=ca)


def opened(where: Relay) -> MailParticipant:
    mail = MailParticipant(where, NoEvidence(), DOMAIN, timeout=90.0)
    try:
        mail.open(LaneView("mail", 0, 1, unclean=False))
    except BaseException:
        mail.close()
        raise
    return mail


# --------------------------------------------------------------------------------------- TLS and login


def test_smtp_sends_through_a_relay_that_wants_tls_and_a_login(
    relaying: Relaying, authority: Authority, password: Path, told: Callable[[], str]
) -> None:
    mail = opened(relay("smtp+starttls", relaying.port, password, authority))
    intents = [mail_intent(1), mail_intent(2)]
    outcomes = mail.apply(intents, None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.APPLIED] * 2
    assert [data for _, _, data in relaying.messages] == [intent.payload["message"].encode() for intent in intents]
    assert len(relaying.logins) == 1
    assert Relaying.PASSWORD not in told()


def test_smtp_waits_when_the_relay_does_not_let_it_in(relaying: Relaying, authority: Authority, password: Path) -> None:
    password.write_text("wrong\n", encoding="ascii")
    where = relay("smtp+starttls", relaying.port, password, authority)
    with pytest.raises(Unavailable, match="OUTBOX_SMTP_PASSWORD_FILE") as caught:
        opened(where)
    assert "wrong" not in str(caught.value)
    assert "@" not in str(caught.value)
    # The file is read for each session: no restart is needed.
    password.write_text(Relaying.PASSWORD, encoding="ascii")
    opened(where).close()
    password.unlink()
    with pytest.raises(Unavailable, match="can't be read"):
        opened(where)


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_smtp_speaks_to_nobody_whose_certificate_is_not_right(authority: Authority, scheme: str) -> None:
    # Given: a server with a certificate for another address, and one of an authority that isn't known
    for tls, known in ((authority.server("127.0.0.2"), authority), (authority.server(), None)):
        peer = Peer(tls, implicit=scheme == "smtps")
        peer.say("EHLO", "250-peer\r\n250 STARTTLS")
        # Then
        with pytest.raises(Unavailable, match="OUTBOX_SMTP_CA_FILE"):
            opened(relay(scheme, peer.port, None, known))
        assert peer.heard == ([] if scheme == "smtps" else peer.heard[:2])
        peer.close()


def test_smtp_speaks_tls_from_the_first_byte(authority: Authority) -> None:
    peer = Peer(authority.server(), implicit=True)
    mail = opened(relay("smtps", peer.port, None, authority))
    # A session that is kept is not mistaken for one that has ended: TLS has traffic of its own.
    assert [o.verdict for n in range(3) for o in mail.apply([mail_intent(n)], None)] == [Verdict.APPLIED] * 3
    assert peer.sessions == 1
    peer.say(".", CUT)
    assert mail.apply([mail_intent(9)], None)[0].error.startswith("the connection was lost before")
    mail.close()
    peer.close()


def test_smtp_sends_a_long_message_over_tls_whole(authority: Authority) -> None:
    peer = Peer(authority.server(), implicit=True)
    session = SmtpSession(relay("smtps", peer.port, None, authority), "client.outbox.test", timeout=90.0)
    session.connect()
    data = b"".join(b".%06d\r\n" % number for number in range(50_000))
    assert session.submit("b@outbox.test", ["a@outbox.test"], data).queue_id == "Q1"
    session.close()
    assert peer.messages[0][2] == data
    peer.close()


@pytest.mark.parametrize(
    ("replies", "why"),
    [
        (["250 peer"], "offers no STARTTLS"),
        (["250-peer\r\n250 STARTTLS", "454 4.7.0 not now"], "offers no STARTTLS"),
        # What came before TLS must not be taken for what comes after it (CVE-2011-0411).
        (["250-peer\r\n250 STARTTLS", "220 go\r\n250-peer\r\n250 AUTH PLAIN"], "Garbled"),
        (["250-peer\r\n250 STARTTLS", CUT], "SMTPServerDisconnected"),
    ],
)  # fmt: skip
def test_smtp_says_nothing_more_when_tls_does_not_begin(
    authority: Authority, password: Path, replies: list[str], why: str
) -> None:
    peer = Peer(authority.server())
    for verb, reply in zip(("EHLO", "STARTTLS"), replies, strict=False):
        peer.say(verb, reply)
    with pytest.raises(Unavailable, match=why):
        opened(relay("smtp+starttls", peer.port, password, authority))
    assert set(peer.verbs) <= {"EHLO", "STARTTLS", "QUIT"}
    peer.close()


def test_smtp_forgets_what_was_said_before_tls(authority: Authority, password: Path) -> None:
    # Given: a man in the middle adds what the server doesn't offer
    peer = Peer(authority.server())
    peer.say("EHLO", "250-peer\r\n250-AUTH PLAIN\r\n250 STARTTLS", "250 peer")
    with pytest.raises(Unavailable, match="no way to log in"):
        opened(relay("smtp+starttls", peer.port, password, authority))
    assert "AUTH" not in peer.verbs
    peer.close()


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_smtp_logs_in_without_tls_on_this_machine_only(peer: Peer, password: Path, mechanism: str) -> None:
    peer.say("EHLO", f"250-peer\r\n250 AUTH {mechanism}")
    if mechanism == "LOGIN":
        peer.say("AUTH", "334 UGFzc3dvcmQ6")
    mail = opened(relay("smtp", peer.port, password, None, user="shop"))
    mail.close()
    said = [
        base64.b64decode(line.split()[-1]) for line in peer.heard if line.split()[0] not in ("ehlo", "QUIT", "quit")
    ]
    secret = Relaying.PASSWORD.encode()
    assert said == ([b"\0shop\0" + secret] if mechanism == "PLAIN" else [b"shop", secret])


@pytest.mark.parametrize(
    ("verb", "reply", "why"),
    [
        ("AUTH", "535 5.7.8 no", r"doesn't let this user in \(535\)"),
        ("AUTH", "454 4.7.0 later", r"doesn't let this user in \(454\)"),
        ("AUTH", "421 4.3.2 closing", "421"),
        ("AUTH", CUT, "SMTPServerDisconnected"),
        ("AUTH", "nonsense", "Garbled"),
        ("AUTH", "334 " + base64.b64encode(b"more?").decode(), "535|SMTP|log in"),
    ],
)
def test_smtp_waits_when_the_login_fails(peer: Peer, password: Path, verb: str, reply: str, why: str) -> None:
    peer.say("EHLO", "250-peer\r\n250 AUTH PLAIN")
    peer.say(verb, reply)
    peer.say("334", "535 5.7.8 no")
    with pytest.raises(Unavailable, match=why) as caught:
        opened(relay("smtp", peer.port, password, None))
    assert "@" not in str(caught.value)
    assert "MAIL" not in peer.verbs


@pytest.mark.parametrize(
    ("url", "has_password", "why"),
    [
        ("smtp://shop@relay.example.org", True, "in the clear"),
        ("smtp://shop@127.0.0.1.example.org", True, "in the clear"),
        ("smtps://shop:secret@relay.example.org", True, "password in it"),
        ("smtps://shop@relay.example.org", False, "set both or neither"),
        ("smtps://relay.example.org", True, "set both or neither"),
        ("smtps://", False, "not understood"),
        ("smtps://host/path", False, "not understood"),
        ("smtps://host?x", False, "not understood"),
        ("smtp+tls://host", False, "not understood"),
        ("smtps://host:99999", False, "not understood"),
    ],
)
def test_relay_refuses_what_is_not_safe_or_not_clear(url: str, has_password: bool, why: str, password: Path) -> None:
    with pytest.raises(NotReady, match=why) as caught:
        Relay.read(url, password_file=password if has_password else None)
    assert "secret" not in str(caught.value)
    assert "relay.example.org" not in str(caught.value)


def test_relay_reads_what_is_understood(password: Path, authority: Authority) -> None:
    found = Relay.read(
        "smtps://shop%40example.org@relay.example.org", password_file=password, ca_file=authority.ca_file
    )
    assert (found.target, found.security, found.user) == (("relay.example.org", 465), "tls", "shop@example.org")
    assert Relay.read("smtp+starttls://relay").target == ("relay", 587)
    assert Relay.read("smtp://[::1]").target == ("::1", 25)
    assert Relay.read("unix:/run/smtp").target == "/run/smtp"
    with pytest.raises(NotReady, match="OUTBOX_SMTP_CA_FILE"):
        Relay.read("smtps://relay", ca_file=password)


# ------------------------------------------------------------------------------ what the server says it can


def test_smtp_poisons_a_mail_that_is_larger_than_the_server_takes_and_sends_nothing(peer: Peer) -> None:
    peer.say("EHLO", "250-peer\r\n250 SIZE 1000")
    mail = participant(peer.url, NoEvidence())
    large, small = mail_intent(1, html="x" * 2000), mail_intent(2)._replace(id=2)
    outcomes = mail.apply([large, small], None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.POISON, Verdict.APPLIED]
    assert f"{len(large.payload['message'])} bytes, the server takes 1000" in outcomes[0].error
    assert peer.verbs.count("MAIL") == 1
    assert len(peer.messages) == 1


@pytest.mark.parametrize("size", ["0", "", "many", "9" * 40])
def test_smtp_sends_when_the_server_names_no_limit(peer: Peer, size: str) -> None:
    peer.say("EHLO", f"250-peer\r\n250 SIZE {size}".rstrip())
    mail = participant(peer.url, NoEvidence())
    assert mail.apply([mail_intent(1)], None)[0].verdict is Verdict.APPLIED
    mail.close()


def test_smtp_i3_refuses_addresses_beyond_ascii_one_by_one_when_the_server_can_not(peer: Peer) -> None:
    # Given: a server without SMTPUTF8, and a mail that names such an address in the envelope only
    mail = participant(peer.url, NoEvidence())
    intent = mail_intent(1, "ann@outbox.test", bcc=[UNICODE])
    (outcome,) = mail.apply([intent], None)
    assert outcome.verdict is Verdict.POISON
    assert "SMTPUTF8" in outcome.error
    assert [recipients for _, recipients, _ in peer.messages] == [["ann@outbox.test"]]
    assert outcome.receipt is not None
    assert outcome.receipt["accepted"] == {"0": "Q1"}
    assert "@" not in json.dumps(outcome.receipt)
    # A header can't be taken apart.
    (outcome,) = mail.apply([mail_intent(2, "ann@outbox.test", UNICODE)], None)
    assert outcome.verdict is Verdict.POISON
    assert len(peer.messages) == 1
    mail.close()


def test_smtp_sends_addresses_beyond_ascii_when_the_server_can(peer: Peer) -> None:
    peer.say("EHLO", "250-peer\r\n250-8BITMIME\r\n250 SMTPUTF8")
    mail = participant(peer.url, NoEvidence())
    named, hidden = mail_intent(1, UNICODE, "ann@outbox.test"), mail_intent(2, "ann@outbox.test", bcc=[UNICODE])
    # The same bytes again on a retry.
    peer.say(".", "451 4.3.0 later")
    outcomes = [mail.apply([intent], None)[0] for intent in (named, named, hidden)]
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.RETRY, Verdict.APPLIED, Verdict.APPLIED]
    assert peer.messages[0] == peer.messages[1]
    assert peer.messages[1][2].decode() == named.payload["message"]
    assert [recipients for _, recipients, _ in peer.messages[1:]] == [
        [UNICODE, "ann@outbox.test"], ["ann@outbox.test"], [UNICODE]
    ]  # fmt: skip
    senders = [line for line in peer.heard if line.startswith("MAIL")]
    assert [line.rstrip().endswith(" SMTPUTF8") for line in senders] == [True, True, False, True]


@pytest.mark.parametrize("relaying", [True, False], ids=["smtputf8", "ascii"], indirect=True)
def test_smtp_agrees_with_a_real_relay_about_size_and_smtputf8(
    relaying: Relaying, authority: Authority, password: Path, request: pytest.FixtureRequest
) -> None:
    mail = opened(relay("smtp+starttls", relaying.port, password, authority))
    large, unicode = mail_intent(1, html="x" * 2 * Relaying.SIZE), mail_intent(2, UNICODE)
    outcomes: list[Outcome] = list(mail.apply([large, unicode, mail_intent(3)], None))
    mail.close()
    offered = "[smtputf8]" in request.node.name
    taken = Verdict.APPLIED if offered else Verdict.POISON
    assert [outcome.verdict for outcome in outcomes] == [Verdict.POISON, taken, Verdict.APPLIED]
    assert [to for _, to, _ in relaying.messages] == [*([[UNICODE]] if offered else []), ["ann@outbox.test"]]


def test_mailserver_takes_addresses_beyond_ascii(mailserver: Mailserver) -> None:
    mail = participant(mailserver.url, NoEvidence())
    assert mail.apply([mail_intent(1, UNICODE, "ann@outbox.test")], None)[0].verdict is Verdict.APPLIED
    mail.close()
    (file,) = (mailserver.maildir / "new").iterdir()
    assert f"\nDelivered-To: {UNICODE}\n" in file.read_text(encoding="utf-8").replace("\r", "")


@pytest.mark.root
def test_postfix_takes_addresses_beyond_ascii(postfix: Postfix) -> None:
    mail = participant(postfix.url, NoEvidence())
    intents = [mail_intent(1, UNICODE), mail_intent(2, "ann@outbox.test", bcc=[UNICODE])]
    outcomes = mail.apply(intents, None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.APPLIED] * 2
    assert len(set((outcomes[1].receipt or {})["accepted"].values())) == 2
    until(lambda: all(postfix.taken(intent.payload["token"]) for intent in intents), "the queue manager has them")


# ---------------------------------------------------------------------------------------- a stolen address


def test_smtp_never_logs_in_where_localhost_is_somebody_else(
    monkeypatch: pytest.MonkeyPatch, peer: Peer, password: Path
) -> None:
    # Given: a name that was loopback when the setting was read, and turns out not to be
    peer.say("EHLO", "250-peer\r\n250 AUTH PLAIN")
    where = Relay.read(f"smtp://shop@localhost:{peer.port}", password_file=password)
    monkeypatch.setattr("workers.dialogue.is_loopback", lambda _host: False)
    with pytest.raises(Unavailable, match="TLS is off"):
        opened(where)
    assert "AUTH" not in peer.verbs
