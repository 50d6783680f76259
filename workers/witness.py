"""The witness: evidence about a mail by what came back to the receipt's recipient, from any mail server anywhere.

Used by `workers.mail` with OUTBOX_MAIL_EVIDENCE=receipt:ADDRESS. It makes no effect but mails to that address.

A postmark proves that the mail was taken. That there is none proves nothing by itself: the copy may be on its way.
It counts as *not taken* when all of this holds, each of which can be seen from here:

1. The session in which it was sent is over (the caller has opened another one).
2. A *marker*, a mail to the receipt's recipient alone, was sent after that, and has come back: the mail server
   takes mail, delivers it, and its route to us works.
3. A settle time later there is still no postmark.
4. Since before the attempt, all that was brought to the receipt's recipient was taken (`outbox.postmark_watch`):
   no copy is waiting in the mail server's queue because of us.

What can't be seen from here is assumed: that the mail server finishes or forgets, within the settle time, what a dead
session had handed over; and that it had no reason of its own to keep the copy longer than the marker. Mail servers
promise no order. If one breaks that, a mail is sent twice; it is never lost, because only a postmark counts as taken.

If 4 doesn't hold, or the attempt is older than postmarks are kept, nothing is known and the mail's policy decides.
If the marker doesn't come back, nothing can be decided now: `Unavailable`, and the lane waits.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from outbox.errors import Ambiguous, NotReady, Unavailable
from outbox.message import message_payload
from outbox.participant import Evidence
from workers.envelope import WHOLE
from workers.evidence import Finding
from workers.postmark import LOST, Postmarks, ReceiptAddress
from workers.relay import Relay
from workers.smtp import SmtpSession

KEPT = timedelta(days=30)
"""How long postmarks are kept (`outbox.forget_postmarks`)."""

QUIET = timedelta(seconds=60)
"""Without a sign of life for so long, nobody takes receipts."""


class Witness:
    """Evidence by postmarks. See `workers.evidence.MailEvidence`."""

    #: The postmarks are in the database, too.
    lasting = False

    def __init__(
        self,
        address: ReceiptAddress,
        relay: Relay,
        database: str,
        domain: str,
        *,
        settle: float = 5.0,
        patience: float = 60.0,
        timeout: float = 30.0,
    ) -> None:
        self._address, self._relay, self._domain, self._timeout = address, relay, domain, timeout
        self._postmarks = Postmarks(database, "mail evidence")
        #: Seconds between a marker's return and the last look.
        self.settle = settle
        #: Seconds in which a marker has to come back.
        self.patience = patience

    def recipient(self, token: str, part: str) -> str | None:
        """The receipt's recipient of this part."""
        return self._address.of(token, part)

    def check(self) -> None:
        """Raise `Unavailable` unless somebody takes receipts and the way to them works, tried with a marker."""
        try:
            watch = self._postmarks.watched()
            if watch.seen_at is None or watch.now - watch.seen_at > QUIET:
                raise Unavailable("nobody takes the receipts of mails: start `outbox work receipts`")
            self._wait(set(), time.monotonic() + self.patience, 0.0)
        except LOST as error:
            raise _away(error) from None
        finally:
            self._postmarks.close()

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """Takes `settle` seconds, and as long as a marker needs, if there is a token that isn't found."""
        if not tokens:
            return {}
        try:
            self._wait(set(tokens), time.monotonic() + self.patience, self.settle)
            watch = self._postmarks.watched()
            sent = self._found(set(tokens))
        except LOST as error:
            raise _away(error) from None
        finally:
            self._postmarks.close()
        # Times of attempts are by the clock of Postgres or of this machine.
        slack = abs(watch.now - datetime.now(UTC)) + timedelta(seconds=1)
        findings = {}
        for token, since in tokens.items():
            complete = watch.since is not None and max(watch.since, watch.now - KEPT) <= since - slack
            if not complete and WHOLE not in sent[token]:
                findings[token] = Finding(Evidence.UNKNOWN, sent[token])
            else:
                evidence = Evidence.APPLIED if sent[token] else Evidence.NOT_APPLIED
                findings[token] = Finding(evidence, sent[token])
        return findings

    def _found(self, tokens: set[str]) -> dict[str, dict[str, str]]:
        sent: dict[str, dict[str, str]] = {token: {} for token in tokens}
        for token, part, queue_id in self._postmarks.find(sorted(tokens)):
            sent[token].setdefault(part, queue_id)
        return sent

    def _wait(self, tokens: set[str], deadline: float, settle: float) -> None:
        """Return when all `tokens` are found whole, or `settle` seconds after a marker sent now has come back."""
        if tokens and all(WHOLE in parts for parts in self._found(tokens).values()):
            return
        marker = uuid.uuid4().hex
        self._send(marker)
        back = False
        while True:
            sent = self._found({*tokens, marker})
            if not back and sent[marker]:
                back, deadline = True, time.monotonic() + settle
            if (back and time.monotonic() >= deadline) or (tokens and all(WHOLE in sent[token] for token in tokens)):
                return
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"a mail to the receipt's recipient did not come back within {self.patience:.0f} s: see the mail "
                    "server's queue and its transport map, and that `outbox work receipts` runs"
                )
            time.sleep(0.05)

    def _send(self, marker: str) -> None:
        address = self._address.of(marker, WHOLE)
        payload = message_payload(
            domain=self._domain, sender=f"{self._address.local}@{self._address.domain}", to=address, subject="marker",
            text="Sent to see whether receipts come back.\n",
        )  # fmt: skip
        session = SmtpSession(self._relay, f"receipts.{self._domain}", timeout=self._timeout)
        try:
            session.connect()
            taken = session.submit(f"b+{marker}@{self._domain}", [address], payload["message"].encode())
        except Ambiguous:
            return  # if it was taken, it comes back
        finally:
            session.close()
        if taken.queue_id is None:
            (reply,) = (taken.refused | taken.deferred).values()
            raise Unavailable(f"the mail server doesn't take a mail for the receipt's recipient ({reply}): see its log")


def _away(error: Exception) -> Unavailable | NotReady:
    if isinstance(error, NotReady):
        return Unavailable(str(error))
    return Unavailable(f"the database with the receipts is away ({type(error).__name__}): the lane waits for it")
