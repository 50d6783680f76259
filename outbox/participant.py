"""The participant protocol: what intents are applied to.

A participant is small on purpose. The reader (`workers.reader`) fetches, orders, retries, parks and
keeps the position; a participant turns a batch of intents into effects and says what became of each.

What it may raise from any method:

* `Unavailable`: the participant as a whole is down; nothing of the batch is to be counted as tried. The
  lane waits with backoff and tries the same batch again.
* any other exception: the batch's outcome is unknown. The reader halves the batch until the intent
  that raises is alone, and parks that one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from outbox.intent import Intent
from outbox.position import Position


class Verdict(Enum):
    """What became of one intent."""

    #: The effect is durable (or was already).
    APPLIED = "applied"
    #: It failed and can succeed later. It may have had its effect all the same, unless the outcome says `untouched`.
    RETRY = "retry"
    #: It can't succeed, and this try has had no effect: an operator decides.
    POISON = "poison"
    #: It may have happened.
    IN_DOUBT = "in_doubt"
    #: Not tried, because an earlier intent of its key in this batch failed.
    BLOCKED = "blocked"


class Outcome(NamedTuple):
    """What became of one intent, and what to remember of it."""

    verdict: Verdict
    #: Proof or partial progress that can't be looked up later; stored in `outbox.receipt`.
    receipt: dict[str, Any] | None = None
    #: Why not, in one sentence without payload or address.
    error: str = ""
    #: Seconds that the participant asked to wait before the next try.
    retry_after: float | None = None
    #: Two-phase participants: what the receipt names is prepared, and takes effect by `TwoPhase.release`.
    prepared: bool = False
    #: RETRY: nothing has happened, for sure. A participant whose attempts are recorded needn't say: its receipts tell.
    untouched: bool = False
    #: APPLIED, for a step of a saga: it is handed on, durably, and its saga is told by another way what became of it.
    handed_on: bool = False


APPLIED = Outcome(Verdict.APPLIED)


class Evidence(Enum):
    """What a probe found about an effect that may have happened."""

    APPLIED = "applied"
    NOT_APPLIED = "not_applied"
    UNKNOWN = "unknown"


class Doubt(NamedTuple):
    """An intent whose attempt was recorded and whose outcome was not."""

    intent: Intent
    #: When the attempt was recorded (database time).
    opened_at: datetime
    #: What earlier attempts left behind (for mail: the recipients already accepted).
    receipt: dict[str, Any]
    #: True: the database was restored, and has lost what it knew of this intent. There may have been an attempt and
    #: a success at any time since `opened_at`. NOT_APPLIED only if nothing of it could have vanished since.
    adopted: bool = False


class Item(NamedTuple):
    """One thing that a participant holds, for scrub."""

    key: str
    #: Digest of the content, in the participant's own form.
    digest: str
    #: The intent that wrote it; 0 if the participant doesn't know.
    id: int


class LaneView(NamedTuple):
    """What a participant is told about the lane that it is opened for."""

    target: str
    #: 0 … number of lanes - 1. For `index` it is the shard.
    lane: int
    #: Rises with each owner. A participant that can store it refuses a lower one than it has seen.
    epoch: int
    #: Whether the owner before went away without a word.
    unclean: bool
    #: The first and the last slot of the lane's keys, of 0 … 16383. A participant that keeps its position
    #: refuses data that were written under others: its position says nothing about the keys of these.
    slots: tuple[int, int] = (0, 16383)
    #: Raises `Fenced` when the lane has another owner by now. The reader asks before each `apply`; a participant
    #: whose effects can't be fenced where they are made asks before each of them, and lets the exception through.
    check: Callable[[], None] = lambda: None
    #: Which of the participant's data the lanes write; rises with each resilver (`outbox.generation`).
    generation: int = 0


@runtime_checkable
class Participant(Protocol):
    """What intents are applied to. One object serves one lane, from one thread.

    A class that says it is one (`class Webhook(Participant)`) has to write `apply`; everything else here is
    what a participant does that keeps nothing open, has no position of its own and can be told things again. A
    class that has all of this without saying so is one too.
    """

    #: Intents in one `apply`, at most.
    batch_limit: int = 100
    #: Bytes of payload in one `apply`, about; a single intent may be larger.
    batch_bytes: int = 1_000_000
    #: True: an effect can't be made twice harmlessly, so each attempt is recorded in `outbox.receipt` before
    #: it is made, and what a dead owner left open is probed.
    records_attempts: bool = False
    #: True: `position` is what counts, and None from it means "empty: start from the beginning".
    keeps_position: bool = False

    def open(self, lane: LaneView) -> None:
        """Get ready to apply. Raises `Unavailable` when the participant can't be reached."""
        return

    def position(self) -> Position | None:
        """What the participant durably holds itself, or None."""
        return None

    @abstractmethod
    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        """Make the effects of `batch`, in order; one outcome for each intent, in the same order.

        Every effect reported as APPLIED is durable when this returns: it survives a power cut. A participant
        that keeps its own position stores `position` together with the effects, atomically, if one is given
        and every outcome is APPLIED. Otherwise it stores the effects alone: what is to be parked must be
        parked in Postgres before any position passes it.

        An empty batch with a position stores just that.

        After an intent that failed, later ones of its key are not tried (BLOCKED). If the participant goes down
        in the middle, fewer outcomes than intents may come back: the rest was not tried.
        """

    def known(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Told before each `apply` if `records_attempts`: intent id → what earlier attempts left behind."""
        return

    def settle(self, batch: Sequence[Intent]) -> None:
        """Tidy up after `batch`: called once its position is durable. May be skipped by a crash."""
        return

    def probe(self, doubts: Sequence[Doubt]) -> Sequence[tuple[Evidence, dict[str, Any] | None]]:
        """For each doubt: did the effect happen, and its receipt if so. Makes no effects.

        A participant whose policy is to make such an effect again answers NOT_APPLIED where it can't know.
        """
        return [(Evidence.UNKNOWN, None) for _ in doubts]

    def inventory(self) -> Iterator[Item]:
        """Everything held, in no particular order. Nothing, if what was done can't be listed."""
        return iter(())

    def close(self) -> None:
        """Let go of files and connections. Called once; effects already made stay."""
        return


@runtime_checkable
class Timed(Protocol):
    """A participant that also has work to do at certain times: the saga engine."""

    def wake(self) -> bool:
        """Do what is due by the database's clock. → whether there was any. Called about as often as `apply`."""


@runtime_checkable
class Digested(Protocol):
    """What a participant has beside `Participant` if scrub is to compare contents, and not keys alone."""

    def digest(self, intent: Intent) -> str:
        """What `Item.digest` is when the content of this put is held. Makes no effect; no lane is open."""


@runtime_checkable
class TwoPhase(Protocol):
    """What a participant has beside `Participant` if its effects can be prepared before they are made.

    `records_attempts` must be set. `apply` prepares: durable, invisible, and to be found again by `probe` or by a
    later `apply`. Its outcomes say `prepared`, and their receipts are stored, durably and for the whole batch in one
    round trip, before `release` is called. So nothing is ever guessed after a crash:

    * prepared, and not recorded: `probe` finds it (and answers NOT_APPLIED with the receipt), or it is prepared again.
    * recorded: `apply` is told its receipt by `known`, prepares nothing, and says `prepared` once more.
    """

    def release(self, prepared: Sequence[tuple[Intent, dict[str, Any]]]) -> None:
        """Make what was prepared take effect, in order: intents with their receipts. Durable when it returns.

        Called again for the same intents after a crash or `Unavailable`: what is released already stays so.
        Raises `Unavailable` and nothing else.
        """
