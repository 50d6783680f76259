"""The receipt's recipient at the end of a real Postfix's route."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psycopg
import pytest

from outbox.participant import Doubt, Evidence, Verdict
from tests.fixtures.dot import Proxy
from tests.fixtures.mail import DOMAIN, mail_intent, participant
from tests.fixtures.postfix import Postfix
from tests.fixtures.receipts import ADDRESS, Receipts
from tests.fixtures.site import LIMIT, Site, until
from workers.evidence import NoEvidence
from workers.witness import Witness

pytestmark = pytest.mark.root


@pytest.fixture
def cutting(postfix: Postfix) -> Iterator[Proxy]:
    """Between the worker and Postfix."""
    proxy = Proxy(postfix.port)
    yield proxy
    proxy.close()


def postmarks(admin: psycopg.Connection[Any], token: str) -> list[tuple[str, str]]:
    return admin.execute("select part, queue_id from outbox.postmark where token = %s", (token,)).fetchall()


def flush(postfix: Postfix) -> None:
    subprocess.run(["postqueue", "-c", postfix.etc, "-f"], check=True)


def test_receipts_come_back_with_postfix_own_name_of_the_message(
    postfix: Postfix, returned: Receipts, admin: psycopg.Connection[Any]
) -> None:
    mail = participant(postfix.url, returned.witness(postfix.url))
    intents = [mail_intent(1), mail_intent(2, "ann@outbox.test", "nobody@outbox.test")]
    outcomes = mail.apply(intents, None)
    mail.close()
    assert [outcome.verdict for outcome in outcomes] == [Verdict.APPLIED, Verdict.POISON]
    for intent, outcome, part in zip(intents, outcomes, ("", ".0.1"), strict=True):
        assert outcome.receipt is not None
        expected = [(part, outcome.receipt["queue_id"])]
        until(partial(postmarks, admin, intent.payload["token"]), "it comes back")
        assert postmarks(admin, intent.payload["token"]) == expected


@pytest.mark.parametrize("keep_dot", [False, True])
def test_receipts_i3_decide_what_became_of_a_mail_whose_reply_was_lost(
    postfix: Postfix, returned: Receipts, cutting: Proxy, admin: psycopg.Connection[Any], keep_dot: bool
) -> None:
    # Given: a reply that is lost, after Postfix had the whole message or before
    evidence = returned.witness(postfix.url, settle=1.0 if keep_dot else 30.0)
    admin.execute("update outbox.postmark_watch set since = since - interval '1 hour'")
    mail = participant(cutting.url, evidence)
    intent = mail_intent(1)
    cutting.keep_dot, cutting.cut_after = keep_dot, 0.5
    # When
    (outcome,) = mail.apply([intent], None)
    cutting.keep_dot, cutting.cut_after = False, None
    # Then: it is known, and sent again only if Postfix didn't have it
    assert outcome.verdict is (Verdict.RETRY if keep_dot else Verdict.APPLIED)
    if keep_dot:
        (outcome,) = mail.apply([intent], None)
        assert outcome.verdict is Verdict.APPLIED
    mail.close()
    token = intent.payload["token"]
    until(lambda: postfix.taken(token), "the queue manager has it")
    assert postfix.taken(token) == 1
    assert len(until(lambda: postmarks(admin, token), "it comes back")) == 1


def test_receipts_i2_i3_wait_when_nobody_takes_them_and_then_prove(
    postfix: Postfix, returned: Receipts, admin: psycopg.Connection[Any]
) -> None:
    # Given: a mail that Postfix took while nobody took receipts
    assert returned.process is not None
    returned.process.kill()
    returned.process.communicate()
    sender = participant(postfix.url, _Silent(returned.witness(postfix.url)))
    intent, begun = mail_intent(1), datetime.now(UTC)
    (outcome,) = sender.apply([intent], None)
    sender.close()
    assert outcome.verdict is Verdict.APPLIED
    token = intent.payload["token"]
    until(lambda: f"to=<{ADDRESS.of(token, '')}>" in postfix.log.read_text("utf-8"), "Postfix tried to bring it")
    # When: somebody does again, and the worker that sent it is gone
    returned.start()
    flush(postfix)
    until(lambda: postmarks(admin, token), "Postfix brings it after all")
    mail = participant(postfix.url, returned.witness(postfix.url))
    evidence, receipt = mail.probe([Doubt(intent, begun, {})])[0]
    # Then: what came back proves, and what didn't proves nothing, because nobody was there
    assert (evidence, (receipt or {})["queue_id"]) == (Evidence.APPLIED, (outcome.receipt or {})["queue_id"])
    never = mail_intent(2, in_doubt="hold")
    assert mail.probe([Doubt(never, begun, {})])[0][0] is Evidence.UNKNOWN
    mail.close()


class _Silent(NoEvidence):
    """Names the receipt's recipient, and checks nothing: a worker that began while all was well."""

    def __init__(self, witness: Witness) -> None:
        self.recipient = witness.recipient  # type: ignore[method-assign]


def test_receipts_i3_i11_are_once_when_killed_before_the_reply_to_postfix(
    postfix: Postfix, returned: Receipts, admin: psycopg.Connection[Any]
) -> None:
    # Given: a recipient that dies between storing and saying so
    assert returned.process is not None
    returned.stop()
    victim = returned.start(OUTBOX_FAILPOINT="receipt.stored")
    flush(postfix)
    sender = participant(postfix.url, _Silent(returned.witness(postfix.url)))
    intent = mail_intent(1)
    (outcome,) = sender.apply([intent], None)
    sender.close()
    token = intent.payload["token"]
    assert victim.wait(LIMIT) == -9
    victim.communicate()
    expected = [("", (outcome.receipt or {})["queue_id"])]
    assert postmarks(admin, token) == expected
    # When: it is back, and Postfix brings the copy again
    returned.start()
    flush(postfix)
    again = f"to=<{ADDRESS.of(token, '')}>"
    until(
        lambda: any(again in line and "status=sent" in line for line in postfix.log.read_text("utf-8").splitlines()),
        "Postfix is rid of it",
    )
    # Then
    assert postmarks(admin, token) == expected


def test_work_all_takes_receipts_where_they_are_the_evidence(
    postfix: Postfix, site: Site, admin: psycopg.Connection[Any]
) -> None:
    # Given: a committed mail
    intent = mail_intent(1)
    token = intent.payload["token"]
    admin.execute("select outbox.emit('mail', 'send', 'k', %s)", (intent.body,))
    flush(postfix)
    # When: everything runs until there is nothing left to do
    route = {"OUTBOX_SMTP": postfix.url, "OUTBOX_LMTP": f"unix:{postfix.home / 'lmtp'}"}
    evidence = {"OUTBOX_MAIL_EVIDENCE": "receipt:receipt@receipts.test", "OUTBOX_MAIL_DOMAIN": DOMAIN}
    worker = site.start("all", **route, **evidence)
    # Then: it is sent, and its receipt comes back
    until(lambda: postmarks(admin, token), "its receipt comes back")
    until(lambda: site.one("select count(*) from outbox.receipt where state = 'closed'"), "it is recorded")
    worker.terminate()
    assert worker.wait(LIMIT) == 0
    assert site.one("select evidence->>'queue_id' from outbox.receipt") == postmarks(admin, token)[0][1]
    assert postfix.taken(token) == 1


@pytest.mark.slow
def test_receipts_i3_once_when_replies_are_lost_at_random(
    postfix: Postfix, returned: Receipts, cutting: Proxy, admin: psycopg.Connection[Any]
) -> None:
    seed = random.Random(11)
    admin.execute("update outbox.postmark_watch set since = since - interval '1 hour'")
    mail = participant(cutting.url, returned.witness(postfix.url, settle=5.0))
    intents = [mail_intent(number) for number in range(1, 13)]
    for intent in intents:
        verdict, tries = Verdict.RETRY, 0
        while verdict is Verdict.RETRY:
            cutting.cut_after = seed.choice([None, 0.0, 0.002, 0.01]) if tries < 2 else None
            verdict, tries = mail.apply([intent], None)[0].verdict, tries + 1
        assert verdict is Verdict.APPLIED
    mail.close()
    until(lambda: all(postfix.taken(intent.payload["token"]) for intent in intents), "all are taken")
    assert [postfix.taken(intent.payload["token"]) for intent in intents] == [1] * len(intents)
