"""In doubt with a real Postfix, decided from its queue and its log, and compared with what was delivered."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from outbox.participant import Evidence
from tests.fixtures.dot import Proxy
from tests.fixtures.mail import DOMAIN, mail_intent
from tests.fixtures.post import Post
from tests.fixtures.postfix import Postfix, Sink
from tests.fixtures.site import until
from workers.evidence import PostfixEvidence
from workers.relay import Relay
from workers.smtp import SmtpSession

pytestmark = pytest.mark.root

SUBMIT = """
import sys
from workers.relay import Relay
from workers.smtp import SmtpSession
session = SmtpSession(Relay.read(sys.argv[1]), "killed.outbox.test")
session.connect()
session.submit(sys.argv[2], ["ann@sink.test"], sys.stdin.buffer.read())
"""


@pytest.fixture
def proxy(relay: Postfix) -> Iterator[Proxy]:
    proxy = Proxy(relay.port)
    try:
        yield proxy
    finally:
        proxy.close()


def sessions(relay: Postfix, event: str) -> int:
    return relay.log.read_text(encoding="utf-8").count(f": {event} from ")


def test_evidence_i3_decides_every_doubt_right_when_measured_against_what_was_delivered(
    relay: Postfix, sink: Sink, proxy: Proxy
) -> None:
    # Given: forty clients that die, or lose their connection, just before or just after the dot was passed on
    sink.messages.clear()
    chance = random.Random(23)
    begun = datetime.now(UTC)
    tokens = []
    for number in range(40):
        intent = mail_intent(number, "ann@sink.test")
        token = intent.payload["token"]
        client = subprocess.Popen(
            [sys.executable, "-c", SUBMIT, proxy.url, f"b+{token}@{DOMAIN}"],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        proxy.keep_dot = number % 2 == 0
        proxy.cut_after = chance.choice([0.0, 0.002, 0.01, 0.1])
        proxy.on_dot = client.kill if chance.random() < 0.5 else lambda: None
        client.communicate(intent.payload["message"].encode())
        assert client.returncode != 0, "nobody got an answer"
        tokens.append(token)
    # When: Postfix is asked, after the old sessions are over and with a new one
    until(lambda: sessions(relay, "connect") == sessions(relay, "disconnect"), "the old sessions are over")
    session = SmtpSession(Relay.read(relay.url), "next.outbox.test")
    session.connect()
    session.close()
    found = PostfixEvidence(relay.etc).look(dict.fromkeys(tokens, begun))
    # Then: what it says is what was delivered, in every case
    until(lambda: relay.queue() == [], "nothing is left in Postfix's queue")
    delivered = [token in sink.arrived() for token in tokens]
    assert [found[token].evidence is Evidence.APPLIED for token in tokens] == delivered
    assert all(found[token].evidence is not Evidence.UNKNOWN for token in tokens)
    assert 5 <= sum(delivered) <= 35, "there were some of both kinds"


def test_evidence_i2_i3_each_mail_arrives_once_when_the_worker_is_killed(post: Post) -> None:
    # Given: mail that goes out at once, by a port that doesn't hold it
    post.site.environment |= {"OUTBOX_SMTP": post.relay.url, "OUTBOX_MAIL_EVIDENCE": post.relay.evidence}

    # When: the worker is killed at random points, and Postfix is stopped in between, as in an upgrade
    def upgrade() -> None:
        post.relay.stop()
        post.relay.start()

    post.storm(waves=8, size=15, seed=29, every=4, nemesis=upgrade)
    post.worker()
    # Then
    post.drained()
    assert post.arrived() == [1] * 120
