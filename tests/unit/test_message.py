"""Messages: what is rendered when the intent is written, and what is refused then."""

from __future__ import annotations

import email
import json
import re
from email import policy
from email.message import EmailMessage
from typing import Any

import pytest

from outbox.errors import AddressInvalid, PayloadInvalid, PayloadTooLarge, Permanent
from outbox.intent import Intent
from outbox.message import message_address, message_payload, message_payload_from
from workers.envelope import SENDER, WHOLE, Envelope


def _payload(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "domain": "example.org", "sender": "shop@example.org", "to": "ann@example.net",
        "subject": "Hi", "text": "hello\n",
    }  # fmt: skip
    return message_payload(**(given | changes))


def _parsed(payload: dict[str, Any]) -> EmailMessage:
    parsed = email.message_from_bytes(payload["message"].encode("ascii"), policy=policy.default)
    assert isinstance(parsed, EmailMessage)
    return parsed


def test_message_has_everything_that_sending_needs() -> None:
    payload = _payload(
        to=["Ann Ö. <ann@example.net>", "bob@example.net"], cc="cy@example.net", bcc=["dee@example.net"],
        subject="Grüße", text="naïve\n.\nend", html="<p>naïve</p>", headers={"Reply-To": "desk@example.org"},
        attachments=[("räport.pdf", "application/pdf", b"\x00\xff" * 50)],
    )  # fmt: skip
    assert payload["recipients"] == ["ann@example.net", "bob@example.net", "cy@example.net", "dee@example.net"]
    assert payload["message_id"] == f"<{payload['token']}@example.org>"
    assert payload["sender_domain"] == "example.org"
    assert payload["in_doubt"] == "resend"
    message = _parsed(payload)
    assert message["Subject"] == "Grüße"
    assert message["To"].addresses[0].display_name == "Ann Ö."
    assert message["Message-ID"] == payload["message_id"]
    assert message["Date"].datetime is not None
    assert message["Bcc"] is None
    assert "dee@" not in payload["message"]
    text, html, attached = (message.get_body(("plain",)), message.get_body(("html",)), next(message.iter_attachments()))
    assert text is not None
    assert text.get_content().splitlines() == ["naïve", ".", "end"]
    assert html is not None
    assert html.get_content().strip() == "<p>naïve</p>"
    assert attached.get_filename() == "räport.pdf"
    assert attached.get_content() == b"\x00\xff" * 50


def test_message_is_ascii_with_crlf_and_fixed_boundaries() -> None:
    endings = "é" * 3000 + "\rlone\nbare\r\nboth"
    payload = _payload(text=endings, html="<p>x</p>", attachments=[("a", "image/png", b"1")])
    text = payload["message"]
    assert text.isascii()
    assert not re.search(r"\r(?!\n)|(?<!\r)\n", text)
    assert max(map(len, text.split("\r\n"))) <= 998
    boundaries = set(re.findall(r'boundary="([^"]+)"', text))
    assert boundaries == {f"=_{payload['token']}_{number}" for number in (0, 1)}


def test_message_survives_the_log_unchanged() -> None:
    intent = Intent.make("mail", "send", "order-1", _payload(text="Öffnung"))
    envelope = Envelope.read(intent)
    assert envelope.data.decode() == intent.payload["message"]
    assert Envelope.read(intent).data == envelope.data


def test_message_names_a_recipient_once() -> None:
    assert _payload(to=["a@x.org", "b@x.org"], cc=["a@x.org"])["recipients"] == ["a@x.org", "b@x.org"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ann@x.org\r\nRCPT TO:<eve@x.org>", "line break"),
        ("ann@x.org\n", "line break"),
        ("ann\x00@x.org", "control character"),
        ("ann@x.org\x85", "control character"),
        ("ann", "no domain"),
        ("@x.org", "no domain"),
        ("ann@", "no usable domain"),
        ("ann@x..org", "no usable domain"),
        ("ann@[127.0.0.1]", "no usable domain"),
        ("ann@x.org> SIZE=1", "no usable domain"),
        ("ann@x.org,eve@x.org", "not one plain address"),
        ("ann@x.org eve@x.org", "not one plain address"),
        ('"ann eve"@x.org', "not one plain address"),
        ("<ann@x.org>", "not one plain address"),
        ("a\u202eb@x.org", "not one plain address"),
        ("a\u00a0b@x.org", "not one plain address"),
        ("a\u037eb@x.org", "not one plain address"),  # NFC makes it a semicolon
        ("ä" * 33 + "@x.org", "not one plain address"),
        ("ann@straße.de", "ambiguous"),
        ("a" * 65 + "@x.org", "not one plain address"),
        ("a@" + "x" * 64 + ".org", "no usable domain"),
        (None, "NoneType"),
    ],
)
def test_message_refuses_an_address(address: str, why: str) -> None:
    with pytest.raises(AddressInvalid, match=why) as caught:
        message_address(address, "to[0]")
    assert str(caught.value).startswith("to[0] ")
    assert "x.org" not in str(caught.value)


def test_message_refuses_an_injected_address_in_any_field() -> None:
    for field in ("to", "cc", "bcc", "sender"):
        bad: Any = "eve@x.org\r\nBcc: all@x.org"
        with pytest.raises(AddressInvalid, match=f"^{field}.*line break"):
            _payload(**{field: bad if field == "sender" else [bad]})
        with pytest.raises(AddressInvalid, match=f"^{field}"):
            _payload(**{field: "a@x.org, Eve <eve@x.org>"})


def test_message_encodes_an_international_domain() -> None:
    assert message_address("ann@bücher.example") == "ann@xn--bcher-kva.example"
    assert _payload(to="Ann <ann@bücher.example>")["recipients"] == ["ann@xn--bcher-kva.example"]


def test_message_takes_an_address_beyond_ascii_in_one_form() -> None:
    # Given: the same letters, composed and not
    composed, apart = "jörg@bücher.example", "jo\u0308rg@bücher.example"
    # Then: one envelope address, and a message that reads the same after its way through the log
    assert message_address(apart) == message_address(composed) == "jörg@xn--bcher-kva.example"
    payload = _payload(to=f"Jörg <{apart}>", cc="bob@example.net", text="naïve", html="<p>é</p>")
    assert payload["recipients"] == ["jörg@xn--bcher-kva.example", "bob@example.net"]
    envelope = Envelope.read(Intent.make("mail", "send", "k", payload))
    parsed = email.message_from_string(envelope.data.decode(), policy=policy.default)
    assert isinstance(parsed, EmailMessage)
    assert parsed["To"].addresses[0].addr_spec == "jörg@xn--bcher-kva.example"
    assert parsed["To"].addresses[0].display_name == "Jörg"
    # Only its headers are UTF-8, and the two go together: everybody's copy needs SMTPUTF8.
    assert envelope.data.partition(b"\r\n\r\n")[2].isascii()
    assert envelope.split(range(2)) == [(0, 1)]


def test_message_from_takes_an_address_beyond_ascii() -> None:
    built = EmailMessage()
    built["From"], built["To"] = "shop@example.org", "jörg@example.net"
    built.set_content("hello")
    payload = message_payload_from(built, domain="example.org")
    assert payload["recipients"] == ["jörg@example.net"]
    assert "To: jörg@example.net\r\n" in payload["message"]


def test_envelope_keeps_recipients_beyond_ascii_apart_when_the_message_does_not_name_them() -> None:
    payload = _payload(to=["ann@x.org", "bob@x.org"], bcc=["jörg@x.org", "zoe@x.org"])
    assert payload["message"].isascii()
    envelope = Envelope.read(Intent.make("mail", "send", "k", payload))
    groups = envelope.split(range(4))
    assert groups == [(0, 1, 3), (2,)]
    assert [tuple(envelope.numbers(envelope.part(group))) for group in groups] == groups
    assert envelope.split([2]) == [(2,)]


def test_message_refuses_to_be_without_a_recipient() -> None:
    with pytest.raises(AddressInvalid, match="no recipient"):
        _payload(to=[])


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": "x\r\nBcc: eve@x.org"},
        {"headers": {"X-A": "1\nX-B: 2"}},
        {"headers": {"X-A:\r\nBcc": "eve@x.org"}},
        {"headers": {"Bcc": "eve@x.org"}},
        {"headers": {"Content-Type": "text/html"}},
        {"attachments": [("a\r\nX: y", "text/plain", b"")]},
        {"attachments": [("a", "text/plain\r\nX: y", b"")]},
        {"attachments": [("a", "multipart/mixed", b"")]},
        {"in_doubt": "perhaps"},
        {"domain": "x.org>\r\n"},
    ],
)
def test_message_refuses_what_would_change_its_headers(changes: dict[str, Any]) -> None:
    with pytest.raises(AddressInvalid):
        _payload(**changes)


def test_message_refuses_text_that_is_not_unicode() -> None:
    with pytest.raises(PayloadInvalid, match="surrogate"):
        _payload(text="\ud800")


def test_message_too_large_is_refused_when_the_intent_is_made() -> None:
    payload = _payload(attachments=[("a.bin", "application/octet-stream", bytes(60_000))])
    with pytest.raises(PayloadTooLarge, match="blob"):
        Intent.make("mail", "send", "k", payload)


def test_message_from_takes_a_built_message_and_leaves_it_alone() -> None:
    built = EmailMessage()
    built["From"], built["To"], built["Bcc"] = "shop@example.org", "Ann <ann@x.org>, bob@x.org", "dee@x.org"
    built["Subject"], built["Message-ID"] = "Hi", "<own.1@example.org>"
    built.set_content("Gruß", cte="8bit")
    payload = message_payload_from(built, domain="example.org", sender="Desk <desk@example.org>")
    assert payload["recipients"] == ["ann@x.org", "bob@x.org", "dee@x.org"]
    assert payload["message_id"] == "<own.1@example.org>"
    assert _parsed(payload)["From"] == "Desk <desk@example.org>"
    assert _parsed(payload).get_content() == "Gruß\n"
    assert _parsed(payload)["Bcc"] is None
    assert built["Bcc"] == "dee@x.org"
    assert built["From"] == "shop@example.org"
    assert message_payload_from(built, domain="x.org", recipients=["zoe@x.org"])["recipients"] == ["zoe@x.org"]


def test_message_from_refuses_what_can_not_be_sent() -> None:
    built = EmailMessage()
    built["To"] = "ann@x.org"
    with pytest.raises(AddressInvalid, match="no sender"):
        message_payload_from(built, domain="x.org")
    built["From"] = "a@x.org"
    with pytest.raises(AddressInvalid, match=r"recipients\[1\]"):
        message_payload_from(built, domain="x.org", recipients=["b@x.org", "b@x.org\r\nDATA"])
    built["Message-ID"] = "<no at sign>"
    with pytest.raises(AddressInvalid, match="Message-ID"):
        message_payload_from(built, domain="x.org")
    del built["Message-ID"]
    built.set_payload("x" * 2000)
    with pytest.raises(PayloadInvalid, match="line"):
        message_payload_from(built, domain="x.org")


@pytest.mark.parametrize(
    "change",
    [
        {"token": "A" * 32},
        {"token": 5},
        {"recipients": []},
        {"recipients": "ann@x.org"},
        {"recipients": ["ann@x.org\r\nDATA"]},
        {"recipients": [7]},
        {"sender_domain": "x.org> SIZE=1"},
        {"sender_domain": None},
        {"message": "a\nb"},
        {"message": "a\r\r\n.\r\n"},
        {"message": "\ud800"},
        {"message": None},
        {"in_doubt": "later"},
    ],
)
def test_envelope_refuses_a_payload_that_another_client_wrote_badly(change: dict[str, Any]) -> None:
    with pytest.raises(Permanent) as caught:
        Envelope.read(Intent.make("mail", "send", "k", _payload() | change))
    assert "x.org" not in str(caught.value)


@pytest.mark.parametrize("payload", [None, [], "text", {}, 5])
def test_envelope_refuses_a_payload_that_is_no_mail(payload: Any) -> None:
    with pytest.raises(Permanent):
        Envelope.read(Intent.make("mail", "send", "k", payload))


def test_envelope_names_each_part_in_its_sender() -> None:
    payload = _payload(to=[f"u{number}@x.org" for number in range(1500)])
    envelope = Envelope.read(Intent(1, "mail", "send", "k", json.dumps(payload)))
    every = envelope.split(range(1500))
    assert [envelope.part(group) for group in every] == [WHOLE]
    assert list(envelope.numbers(WHOLE)) == list(range(1500))
    some = [number for number in range(1500) if number % 7 and number != 1]
    groups = envelope.split(some)
    assert [number for group in groups for number in group] == some
    for group in groups:
        sender = envelope.sender(envelope.part(group))
        assert len(sender.partition("@")[0]) <= 64
        assert message_address(sender) == sender
        found = SENDER.match(sender)
        assert found is not None
        assert tuple(envelope.numbers(found["part"])) == group
