"""The participant `mail`: hands messages to a mail server, each once as far as the server lets one know.

Run by the reader (`workers.reader`), which records each attempt in `outbox.receipt` before `apply` and what
became of it after. What is durable when `apply` returns is the server's: it has said 250.

A mail is recorded per recipient, by index. What travels between attempts, as the receipt's evidence:

    accepted    {index: queue id}   has it; never sent again
    refused     {index: "550 5.1.1"}
    doubt       time since which an attempt's outcome is not known; looked into before the next one
    assumed     the indexes that nobody can tell about, and that the policy `drop` counts as sent
    queue_id    the last queue id

A reply that was lost after the dot is looked into at once (`workers.evidence`). Where nothing can tell, the
message's own policy decides: `resend` it, `hold` it for an operator, `drop` it. After any lost connection the
batch ends early, before another mail is sent: the reader checks its lease before it goes on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from outbox.errors import Ambiguous, Permanent, Unavailable
from outbox.failpoint import hit
from outbox.intent import Intent
from outbox.message import message_domain
from outbox.participant import Doubt, Evidence, Item, LaneView, Outcome, Verdict
from outbox.position import Position
from workers.envelope import Envelope
from workers.evidence import Finding, MailEvidence
from workers.relay import Relay
from workers.smtp import SmtpSession, Submission

logger = logging.getLogger("outbox.mail")

_SOON = 1.0
"""Seconds until a message is sent again that the server turned out not to have."""

_DROPS = 3
"""A message at which the server hangs up so often is retried by itself: it must not stop its lane for ever."""

_TWO_PHASES = ("prepare", "release", "withdraw")
_NO_HOLD = (
    "a mail can be prepared, released and withdrawn only where it goes on hold: "
    "set OUTBOX_MAIL_EVIDENCE=hold:, or use the action send"
)


@dataclass(slots=True)
class Progress:
    """How far one mail is, over all its attempts."""

    accepted: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    #: Of this attempt only.
    deferred: dict[int, str] = field(default_factory=dict)
    doubt: datetime | None = None
    assumed: list[int] = field(default_factory=list)
    _stored: frozenset[str] = frozenset()

    @classmethod
    def read(cls, receipt: Mapping[str, Any]) -> Progress:
        """From the evidence of earlier attempts. Raises `Permanent` if that isn't of mail's making."""
        try:
            doubt = receipt.get("doubt")
            return cls(
                {int(number): queue_id for number, queue_id in receipt.get("accepted", {}).items()},
                {int(number): reply for number, reply in receipt.get("refused", {}).items()},
                doubt=datetime.fromisoformat(doubt) if doubt else None,
                _stored=frozenset(receipt),
            )
        except (AttributeError, TypeError, ValueError):
            raise Permanent("the receipt of an earlier attempt can't be read: correct it in outbox.receipt") from None

    def left(self, envelope: Envelope) -> list[int]:
        """Recipients that are neither done nor beyond help."""
        return [n for n in range(len(envelope.recipients)) if n not in self.accepted and n not in self.refused]

    def found(self, envelope: Envelope, finding: Finding) -> None:
        for part, queue_id in finding.sent.items():
            for number in envelope.numbers(part):
                self.accepted.setdefault(number, queue_id)

    def add(self, numbers: Sequence[int], submission: Submission) -> list[int]:
        """Note a submission. → the recipients that it was given up for, and that the server would take."""
        self.deferred |= {numbers[index]: str(reply) for index, reply in submission.deferred.items()}
        self.refused |= {numbers[index]: str(reply) for index, reply in submission.refused.items()}
        if submission.queue_id is not None:
            self.accepted |= dict.fromkeys(numbers, submission.queue_id)
        return [n for n in numbers if n not in self.accepted and n not in self.deferred and n not in self.refused]

    def receipt(self) -> dict[str, Any] | None:
        """The evidence to store; receipts are merged name by name, so that a doubt must be taken back by name."""
        known: dict[str, Any] = {}
        if self.accepted:
            known |= {"queue_id": next(reversed(self.accepted.values())), "accepted": _keyed(self.accepted)}
        if self.refused:
            known["refused"] = _keyed(self.refused)
        if self.assumed:
            known["assumed"] = self.assumed
        if self.doubt is not None or "doubt" in self._stored:
            known["doubt"] = None if self.doubt is None else self.doubt.isoformat()
        return known or None


def _keyed(values: Mapping[int, str]) -> dict[str, str]:
    return {str(number): values[number] for number in sorted(values)}


class MailParticipant:
    """Sends the mails of one lane over one connection. See `outbox.participant.Participant`."""

    batch_limit = 50
    batch_bytes = 1_000_000
    records_attempts = True
    keeps_position = False

    def __init__(self, relay: Relay | str, evidence: MailEvidence, domain: str, *, timeout: float = 30.0) -> None:
        """`relay` is the server, or its URL; `domain` is what the sessions are named under."""
        self._relay = Relay.read(relay) if isinstance(relay, str) else relay
        self._domain = message_domain(domain)
        self._timeout = timeout
        self._evidence = evidence
        self._session = SmtpSession(self._relay, f"mail-0-0.{self._domain}", timeout=timeout)
        self._known: Mapping[int, Mapping[str, Any]] = {}
        self._drops: Counter[int] = Counter()
        self._check: Callable[[], None] = lambda: None

    def open(self, lane: LaneView) -> None:
        """Open the lane's session. Raises `Unavailable`."""
        self._session.close()
        self._check = lane.check
        # By this name the embedded server ends the session of the lane's owner before, and refuses a stale one.
        name = f"mail-{lane.lane}-{lane.epoch}.{self._domain}"
        self._session = SmtpSession(self._relay, name, timeout=self._timeout)
        self._session.connect()
        self._evidence.check()

    def position(self) -> Position | None:
        """A mail server holds no position."""
        return None

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """What earlier attempts of the next batch left behind, by intent."""
        self._known = receipts

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:  # noqa: ARG002 - the protocol's
        """Send the mails of `batch`; fewer outcomes than intents if the connection is lost on the way.

        Raises `Unavailable` if nothing was tried, `Fenced`. Never anything else, because the reader would try the
        whole batch again, and some of it may have been sent.
        """
        self._session.connect()
        outcomes: list[Outcome] = []
        failed: set[str] = set()
        for intent in batch:
            if intent.key in failed:
                outcomes.append(Outcome(Verdict.BLOCKED))
                continue
            # A mail server knows no epochs: whoever was suspended finishes the message in hand, and no other.
            self._check()
            try:
                outcome, same = self._send(intent)
            except Unavailable:
                if outcomes:
                    break
                raise
            except Exception as error:  # noqa: BLE001 - raised on, it would make the reader send the batch again
                self._log("looking into an earlier attempt", error)
                outcome, same = Outcome(Verdict.RETRY, error=type(error).__name__), False
            outcomes.append(outcome)
            if outcome.verdict is not Verdict.APPLIED:
                failed.add(intent.key)
            if not same or not self._session.connected:
                break
        return outcomes

    def settle(self, batch: Sequence[Intent]) -> None:
        """Nothing is left over: receipts are the reader's."""

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        """What became of attempts whose worker died. Raises `Unavailable` while the server can't be asked.

        With NOT_APPLIED a receipt may come along: the recipients that have the mail already. Where nothing can
        tell, the message's policy answers: NOT_APPLIED for `resend`, UNKNOWN for `hold`, APPLIED for `drop`. After the
        database was restored it is UNKNOWN for `resend` too: that policy is about one attempt, and not about all that
        may have been sent in the time that was lost.
        """
        asked: list[tuple[Envelope, Progress, bool] | None] = []
        since: dict[str, datetime] = {}
        for doubt in doubts:
            try:
                envelope, progress = Envelope.read(doubt.intent), Progress.read(doubt.receipt)
            except Permanent:
                asked.append(None)  # it can't have been sent; `apply` says what is wrong with it
                continue
            progress.doubt = min(progress.doubt or doubt.opened_at, doubt.opened_at)
            since[envelope.token] = min(since.get(envelope.token, progress.doubt), progress.doubt)
            asked.append((envelope, progress, doubt.adopted))
        self._session.reconnect()
        findings = self._evidence.look(since)
        return [
            (Evidence.NOT_APPLIED, None) if one is None else self._verdict(*one[:2], findings[one[0].token], one[2])
            for one in asked
        ]

    def inventory(self) -> Iterator[Item]:
        """Nothing: what was mailed can't be listed, let alone repaired."""
        return iter(())

    def close(self) -> None:
        """End the session."""
        self._session.close()

    # ----------------------------------------------------------------------------------------- one mail

    def _send(self, intent: Intent) -> tuple[Outcome, bool]:
        """→ what became of one intent, and whether the connection is still the one that the batch began with."""
        if intent.action in _TWO_PHASES:
            return Outcome(Verdict.POISON, error=_NO_HOLD), True
        return self._mail(intent)

    def _mail(self, intent: Intent) -> tuple[Outcome, bool]:
        try:
            envelope = Envelope.read(intent)
            progress = Progress.read(self._known.get(intent.id, {}))
        except Permanent as error:
            return Outcome(Verdict.POISON, error=str(error)), True
        before, same = len(progress.accepted), progress.doubt is None
        if not same and (held := self._resolve(envelope, progress)) is not None:
            return held, same
        begun = datetime.now(UTC)
        try:
            self._deliver(envelope, progress)
        except Unavailable as error:
            self._drops[intent.id] += 1
            if len(progress.accepted) == before and self._drops[intent.id] < _DROPS:
                raise
            outcome, same = Outcome(Verdict.RETRY, progress.receipt(), str(error)), False
        except Exception as error:  # noqa: BLE001 - whatever it is, the message may be out
            outcome, same = self._look_into(envelope, progress, begun, error), False
        else:
            outcome = _outcome(envelope, progress)
        self._drops.pop(intent.id, None)
        return outcome, same

    def _deliver(self, envelope: Envelope, progress: Progress) -> None:
        todo = envelope.split(progress.left(envelope))
        while todo:
            numbers = todo.pop(0)
            part = envelope.part(numbers)
            taken = self._session.submit(
                envelope.sender(part),
                [envelope.recipients[n] for n in numbers],
                envelope.data,
                receipt=self._evidence.recipient(envelope.token, part),
            )
            if taken.queue_id is not None:
                hit("mail.submitted")
            if willing := progress.add(numbers, taken):
                # Only some can have it: they get it under a sender that names them.
                todo = envelope.split(willing) + todo

    # ---------------------------------------------------------------------------------------- in doubt

    def _look_into(self, envelope: Envelope, progress: Progress, begun: datetime, error: Exception) -> Outcome:
        """An attempt that may have had its effect: find out now, or before the next attempt."""
        self._log("sending a mail", error)
        progress.doubt = begun
        try:
            if (held := self._resolve(envelope, progress)) is not None:
                return held
        except Exception as later:  # noqa: BLE001 - the doubt must be stored, whatever it is
            self._log("looking into a mail", later)
            progress.doubt = begun
            text = "the connection was lost before the mail server's answer: it is asked about the mail once it is back"
            return Outcome(Verdict.RETRY, progress.receipt(), text, _SOON)
        outcome = _outcome(envelope, progress)
        if outcome.verdict is Verdict.RETRY:
            text = "the connection was lost before the mail server's answer: the mail is sent again"
            return outcome._replace(error=text, retry_after=_SOON)
        return outcome

    @staticmethod
    def _log(doing: str, error: Exception) -> None:
        if not isinstance(error, Ambiguous | Unavailable):
            # A fault of this program's. Without the traceback, whose last line may quote a payload.
            logger.error("%s raised %s", doing, type(error).__name__)

    def _resolve(self, envelope: Envelope, progress: Progress) -> Outcome | None:
        """Ask the evidence. → an outcome if an operator must decide. Raises `Unavailable`."""
        since = progress.doubt or datetime.now(UTC)
        # Also what makes the evidence exact: the server is up, and done with the session before.
        self._session.reconnect()
        finding = self._evidence.look({envelope.token: since})[envelope.token]
        verdict, receipt = self._verdict(envelope, progress, finding)
        if verdict is not Evidence.UNKNOWN:
            return None
        text = "the mail may have been sent, and nothing can tell: decide whether to send it again"
        return Outcome(Verdict.IN_DOUBT, receipt, text)

    def _verdict(
        self, envelope: Envelope, progress: Progress, finding: Finding, adopted: bool = False
    ) -> tuple[Evidence, dict[str, Any] | None]:
        """What a finding and the message's policy mean for all recipients together."""
        if adopted and finding.evidence is Evidence.NOT_APPLIED and not self._evidence.lasting:
            finding = finding._replace(evidence=Evidence.UNKNOWN)
        progress.found(envelope, finding)
        # Settled either way: an operator's decision to send it again must not be asked about once more.
        progress.doubt = None
        if finding.evidence is Evidence.UNKNOWN and (left := progress.left(envelope)):
            if envelope.in_doubt == "hold" or (adopted and envelope.in_doubt == "resend"):
                return Evidence.UNKNOWN, progress.receipt()
            if envelope.in_doubt == "drop":
                progress.assumed = left
                progress.accepted |= dict.fromkeys(left, "")
        done = len(progress.accepted) == len(envelope.recipients)
        return (Evidence.APPLIED if done else Evidence.NOT_APPLIED), progress.receipt()


def _outcome(envelope: Envelope, progress: Progress) -> Outcome:
    receipt, count = progress.receipt(), len(envelope.recipients)
    if left := progress.left(envelope):
        text = f"the mail server defers {len(left)} of {count} recipients ({_codes(progress.deferred)}): retried"
        return Outcome(Verdict.RETRY, receipt, text)
    if progress.refused:
        refused = len(progress.refused)
        text = f"the mail server refuses {refused} of {count} recipients ({_codes(progress.refused)}): see its log"
        return Outcome(Verdict.POISON, receipt, text)
    return Outcome(Verdict.APPLIED, receipt)


def _codes(replies: Mapping[int, str]) -> str:
    return ", ".join(sorted(set(replies.values())))
