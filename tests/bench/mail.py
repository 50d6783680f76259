"""`mail`: from the log into a Postfix, against a bare loop that sends the same mails over one session.

The Postfix is a private one that discards what it has taken. The bare loop is our own client with nothing round it: it
pipelines, waits for the reply to each mail, and has as many sessions as we have: one, for one lane. `mail.ratio` is
plain submission with Postfix's log as the evidence; `mail.hold.ratio` is in two phases, on hold and released, against
the same loop.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from psycopg.types.json import Jsonb

from outbox.message import message_payload
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.rig import Rig, drain, rig
from tests.bench.site import Site
from tests.fixtures.mail import DOMAIN
from tests.fixtures.postfix import Postfix, running
from workers.evidence import evidence_for
from workers.heldmail import HeldMailParticipant
from workers.hold import HoldQueue
from workers.mail import MailParticipant
from workers.relay import Relay
from workers.smtp import SmtpSession

COUNT = 1000
"""Mails of a turn."""

_TO = "somebody@black.hole"
_TEXT = "A line of a mail of a few, as a shop writes it.\n" * 40

_DONE = "select count(*) from outbox.receipt where target = 'mail' and state = 'closed'"


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """Mails per second."""
    bars = {"mail": Bar(">=", 0.8), "mail.hold": Bar(">=", 0.3)}
    if shutil.which("postfix") is None:
        print("Postfix is not there: `make test-packages` installs it, as root on Debian", file=sys.stderr)
        # Not measured is not met.
        for name, bar in bars.items():
            yield Figure(f"{name}.ratio", 0.0, "not measured: Postfix is not there", bar)
        return
    with running() as postfix, rig(site, "mail") as made:
        hold = HoldQueue.named(postfix.hold, "postsuper")
        participants: dict[str, Callable[[], MailParticipant]] = {
            "mail": lambda: MailParticipant(postfix.url, evidence_for(postfix.evidence), DOMAIN),
            "mail.hold": lambda: HeldMailParticipant(postfix.hold_url, hold, DOMAIN),
        }
        for name, participant in participants.items():
            pair = compare(partial(_ours, made, participant), partial(_bare, postfix), pairs=3 if quick else 9)
            yield Figure(f"{name}.ratio", pair.ratio, "ratio of mails/s", bars[name])
            yield Figure(f"{name}.ours", pair.ours, "mails/s")
            yield Figure(f"{name}.bare", pair.theirs, "mails/s")


def _payloads() -> list[dict[str, Any]]:
    mails = (
        message_payload(domain=DOMAIN, sender="shop@outbox.test", to=[_TO], subject=f"Order {n}", text=_TEXT)
        for n in range(COUNT)
    )
    return [dict(mail) for mail in mails]


def _ours(made: Rig, participant: Callable[[], MailParticipant]) -> float:
    with made.admin.transaction(), made.admin.cursor() as cursor:
        rows = [(mail["token"], Jsonb(mail)) for mail in _payloads()]
        cursor.executemany("select outbox.emit('mail', 'send', %s, %s)", rows)
    made.tick()
    before = _done(made)
    with made.reader(participant()) as reader:
        reader.open()
        took = drain(reader)
    if (done := _done(made) - before) != COUNT:
        raise RuntimeError(f"{done:,} mails were sent of {COUNT:,}")
    return COUNT / took


def _done(made: Rig) -> int:
    row = made.admin.execute(_DONE).fetchone()
    return int(row[0]) if row else 0


def _bare(postfix: Postfix) -> float:
    mails = [(f"b+{secrets.token_hex(16)}@{DOMAIN}", mail["message"].encode()) for mail in _payloads()]
    session = SmtpSession(Relay.read(postfix.url), "bench.outbox.test")
    session.connect()
    start = time.perf_counter()
    for sender, message in mails:
        if session.submit(sender, [_TO], message).queue_id is None:
            raise RuntimeError("Postfix did not take a mail")
    took = time.perf_counter() - start
    session.close()
    return COUNT / took
