"""A mail that is sent once more: another one for servers and readers, and the same for people."""

from __future__ import annotations

import json
from email import message_from_string, policy
from email.message import EmailMessage

import pytest

from outbox.errors import Permanent
from outbox.intent import Intent
from outbox.message import message_payload, message_payload_from
from outbox.replay.resent import NAMES, resent
from workers.envelope import Envelope

TO = ("ann@example.org", "bob@example.org")


def parts(**more: object) -> dict[str, object]:
    return message_payload(
        domain="outbox.test",
        sender="shop@outbox.test",
        to=TO,
        subject="Grüße",
        text="text\n\nMessage-ID: <no@t>\n",
        **more,  # type: ignore[arg-type]
    )


def test_resent_is_a_mail_of_its_own_that_names_the_first() -> None:
    payload = parts(html="<p>text", attachments=[("a.bin", "application/x", b"\0\1")])
    text = resent(payload, set(), "replay 3")
    assert text is not None
    again = json.loads(text)
    first, second = (message_from_string(str(p["message"]), policy=policy.default) for p in (payload, again))
    # Then only the Message-ID is another one, and says what it is
    assert second["Message-ID"] == again["message_id"] == f"<replay.{again['token']}@outbox.test>"
    assert second[NAMES] == payload["message_id"]
    assert again["token"] != payload["token"]
    for name in ("Date", "Subject", "From", "To"):
        assert second[name] == first[name]
    assert [part.get_content() for part in second.walk() if not part.is_multipart()] == [
        part.get_content() for part in first.walk() if not part.is_multipart()
    ]
    # ... and the worker takes it
    assert Envelope.read(Intent(1, "mail", "send", "k", text)).recipients == TO
    assert resent(payload, set(), "replay 3") == text
    assert resent(payload, set(), "replay 4") != text


def test_resent_keeps_a_message_id_that_is_folded_apart() -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@example.org", "b@example.org", "s"
    message["Message-ID"] = f"<{'x' * 90}@example.org>"
    message.set_content("text")
    text = resent(message_payload_from(message, domain="outbox.test"), set(), "seed")
    assert text is not None
    found = message_from_string(json.loads(text)["message"], policy=policy.default)
    assert found.get_all("Message-ID") == [json.loads(text)["message_id"]]
    assert "x" * 90 in found[NAMES]


def test_resent_leaves_out_whom_it_was_refused_for() -> None:
    text = resent(parts(), {0}, "seed")
    assert text is not None
    assert json.loads(text)["recipients"] == [TO[1]]
    assert resent(parts(), {0, 1}, "seed") is None


@pytest.mark.parametrize("payload", [None, 5, [], {}, {"message": 1}, parts() | {"message": "no header\r\n\r\ntext"}])
def test_resent_refuses_what_is_no_mail(payload: object) -> None:
    with pytest.raises(Permanent, match="skip this intent"):
        resent(payload, set(), "seed")
