"""The participant `mail` with a real two-phase commit: OUTBOX_MAIL_EVIDENCE=hold:/etc/postfix.

Run by the reader (`workers.reader`). The mail server is a port of Postfix whose mail goes on hold:

1. `apply` hands the mails of a batch over, as ever (`workers.mail`). They are on hold: durable, going nowhere.
2. The reader records their queue ids as `prepared` (`workers.attempt`), in one round trip.
3. `release` lets go of all of them by one `postsuper -H`. Durable when it returns.

After a crash nothing is guessed. Not recorded: the mail is looked for on hold by its envelope sender, and adopted or
handed over again. Recorded: that very message is released, and if it isn't on hold it was. A copy that nobody
recorded never leaves.

Besides `send` there are the two phases as intents of their own, for sagas. All can be repeated:

    prepare     a mail, as in `send`: hand it over, and leave it on hold
    release     {"token": …}: let go of it
    withdraw    {"token": …}: delete it, if it is still on hold

They have one key, so that they come in order. The receipts are those of `workers.mail`, and of a release
`released`, the queue ids that it chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from outbox.errors import Ambiguous, Permanent, Unavailable
from outbox.intent import Intent
from outbox.participant import Doubt, Evidence, LaneView, Outcome, Verdict
from outbox.position import Position
from workers.envelope import TOKEN, WHOLE, Envelope, part_bits
from workers.evidence import Finding
from workers.hold import QUEUE_ID, Copies, HoldQueue
from workers.mail import MailParticipant, Progress
from workers.relay import Relay

_GONE = "no mail is on hold under this token: it was withdrawn, or taken off hold by hand, or never prepared"


class HeldMailParticipant(MailParticipant):
    """See `outbox.participant.Participant` and `TwoPhase`."""

    def __init__(self, relay: Relay | str, hold: HoldQueue, domain: str, *, timeout: float = 30.0) -> None:
        """`relay` is a port whose mail goes on hold in the Postfix of `hold`, or its URL."""
        super().__init__(relay, hold, domain, timeout=timeout)
        self._hold = hold
        #: Tokens of which there may be more copies than one.
        self._copied: set[str] = set()
        #: What is on hold, as last listed in this batch; None: to be listed anew.
        self._listed: dict[str, Copies] | None = None
        #: Tokens that this batch is going to release.
        self._releasing: set[str] = set()

    def open(self, lane: LaneView) -> None:
        """Open the lane's session, and see that its mail goes on hold. Raises `Unavailable`."""
        super().open(lane)
        self._hold.prove(self._session)

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        """Put the mails of `batch` on hold. See `MailParticipant.apply`."""
        self._listed = None
        self._releasing.clear()
        return super().apply(batch, position)

    def release(self, prepared: Sequence[tuple[Intent, dict[str, Any]]]) -> None:
        """Let go of what is recorded, and of nothing else. Raises `Unavailable`."""
        chosen: dict[str, set[str]] = {}
        for intent, receipt in prepared:
            ids = receipt.get("released") or receipt.get("accepted", {}).values()
            chosen.setdefault(intent.payload["token"], set()).update(ids)
        if copied := self._copied & chosen.keys():
            held = self._hold.held()
            self._hold.withdraw(
                [q for token in copied for ids in held.get(token, {}).values() for q in ids if q not in chosen[token]]
            )
        self._hold.release([queue_id for ids in chosen.values() for queue_id in sorted(ids)])
        self._copied -= copied

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        """What is on hold of attempts whose worker died: found is prepared, not sent. Raises `Unavailable`."""
        answers = iter(super().probe([doubt for doubt in doubts if doubt.intent.action in ("send", "prepare")]))
        found: list[tuple[Evidence, dict[str, Any] | None]] = []
        for doubt in doubts:
            match doubt.intent.action:
                case "prepare":
                    found.append(next(answers))
                case "send":
                    found.append((Evidence.NOT_APPLIED, next(answers)[1]))
                case _:
                    # To release or to withdraw can be repeated.
                    found.append((Evidence.NOT_APPLIED, None))
        return found

    # ----------------------------------------------------------------------------------------- one intent

    def _send(self, intent: Intent) -> tuple[Outcome, bool]:
        try:
            match intent.action:
                case "release":
                    return self._release(intent), True
                case "withdraw":
                    return self._withdraw(intent), True
        except Permanent as error:
            return Outcome(Verdict.POISON, error=str(error)), True
        outcome, same = self._mail(intent)
        self._listed = None
        if intent.action == "send" and outcome.receipt and outcome.receipt.get("accepted"):
            outcome = outcome._replace(prepared=True)
        return outcome, same

    def _release(self, intent: Intent) -> Outcome:
        token = _token(intent)
        chosen = self._known.get(intent.id, {}).get("released")
        if not chosen:
            copies = self._copies(token)
            if not copies:
                raise Permanent(f"{_GONE}: see what became of its prepare, then skip this intent")
            chosen = [copies[part][0] for part in _cover(list(copies))]
            self._copied.add(token)
        self._releasing.add(token)
        return Outcome(Verdict.APPLIED, {"released": chosen}, prepared=True)

    def _withdraw(self, intent: Intent) -> Outcome:
        token = _token(intent)
        if token in self._releasing:
            raise Unavailable("a mail is withdrawn in the batch that releases it: the release comes first")
        self._hold.withdraw([queue_id for ids in self._copies(token).values() for queue_id in ids])
        self._listed = None
        return Outcome(Verdict.APPLIED)

    def _copies(self, token: str) -> Copies:
        if self._listed is None:
            self._listed = self._hold.held()
        return self._listed.get(token, {})

    def _deliver(self, envelope: Envelope, progress: Progress) -> None:
        super()._deliver(envelope, progress)
        unnamed = [number for number, queue_id in progress.accepted.items() if not QUEUE_ID.fullmatch(queue_id)]
        if unnamed:
            for number in unnamed:
                del progress.accepted[number]
            raise Ambiguous("the mail server took a mail and didn't name it by a queue id of Postfix's")

    def _resolve(self, envelope: Envelope, progress: Progress) -> Outcome | None:
        self._copied.add(envelope.token)
        return super()._resolve(envelope, progress)

    def _verdict(
        self, envelope: Envelope, progress: Progress, finding: Finding, adopted: bool = False
    ) -> tuple[Evidence, dict[str, Any] | None]:
        """Adopt copies, but none for a recipient that another copy is for: that one is surplus."""
        self._copied.add(envelope.token)
        taken, mine = set(progress.accepted), dict[str, str]()
        for part in sorted(finding.sent, key=lambda part: -len(list(envelope.numbers(part)))):
            numbers = set(envelope.numbers(part))
            if not taken & numbers:
                taken |= numbers
                mine[part] = finding.sent[part]
        return super()._verdict(envelope, progress, finding._replace(sent=mine), adopted)


def _token(intent: Intent) -> str:
    payload = intent.payload
    token = payload.get("token") if isinstance(payload, Mapping) else None
    if not isinstance(token, str) or not TOKEN.fullmatch(token):
        raise Permanent("the payload names no mail by a token of 32 hexadecimal digits: correct what writes the intent")
    return token


def _cover(parts: Sequence[str]) -> Sequence[str]:
    """Of the parts on hold, the fewest that are for everybody and for nobody twice."""
    if WHOLE in parts:
        return [WHOLE]
    everybody = 0
    for part in parts:
        everybody |= part_bits(part)
    for count in range(1, len(parts) + 1):
        for chosen in combinations(sorted(parts), count):
            bits = [part_bits(part) for part in chosen]
            # Disjoint bits add up; those that overlap give more.
            if sum(bits) == everybody and sum(bit.bit_count() for bit in bits) == everybody.bit_count():
                return chosen
    raise Permanent("the copies on hold overlap, so that somebody would get the mail twice: withdraw it")
