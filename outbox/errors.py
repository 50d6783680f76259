"""The errors of the product; a few more stand where they belong (`BlobMissing`, `QueryInvalid`, `Unreachable`).

One root, three branches that say what happens to an intent when a participant raises them:

* `Transient`: try again later (exponential backoff with full jitter).
* `Permanent`: trying again can't help; the intent is parked as poison, an operator decides.
* `Ambiguous`: the effect may have happened; it is resolved by a probe, or by an operator.

An error's text is one sentence about what is wrong and one about what to do next. It carries no
payload and no mail address, because errors end up in logs.
"""

from __future__ import annotations


class OutboxError(Exception):
    """The root of all errors of this package."""


class Transient(OutboxError):
    """Trying again later can succeed.

    `retry_after` (seconds) is the participant's own wish, when it told one. `untouched` promises that nothing has
    happened (a connection that was refused): without it, a request that failed may have had its effect all the same,
    and a saga that goes back undoes that.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, untouched: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.untouched = untouched


class Unavailable(Transient):
    """The whole participant is down (server stopped, disk full): its lane waits and parks nothing."""


class Fenced(Transient):
    """Another owner has claimed the lane since: nothing more may be written under this epoch."""


class Permanent(OutboxError):
    """Trying again can't help."""


class Ambiguous(OutboxError):
    """The effect may have happened, and the participant didn't say."""


class IntentRefused(Permanent):
    """An intent that can't be written. Raised before the commit, so nothing is lost: the transaction
    can go on without it, or be rolled back."""


class PayloadInvalid(IntentRefused):
    """The payload is not JSON that every reader of the log can read."""


class PayloadTooLarge(IntentRefused):
    """The payload is over the limit; large things are blobs."""


class UnknownTarget(IntentRefused):
    """No participant is registered under this name."""


class AddressInvalid(IntentRefused):
    """A mail address or header that can't be sent safely."""


class BlobRefused(IntentRefused):
    """The bytes of a blob can't be staged (larger or smaller than declared, not readable)."""


class StoreRefused(BlobRefused):
    """The blob store can't be written: it has no room, or fails. Nothing is wrong with the bytes."""


class SagaRefused(Permanent):
    """A definition that can't keep the promise, or a saga that can't be started so; the text says why."""


class MessageAbandoned(Permanent):
    """What is stored as the result of a message whose actor has not ended it: its workers died, or it was skipped."""


class NotThisLog(Permanent):
    """A position names a tick that this log doesn't have: the participant has seen another history."""


class WentBack(NotThisLog):
    """The log lacks what was seen of it: it went back to an earlier time, and nobody has adopted it since. All its
    lanes are stopped, not only the one that has seen it. `says` is the sentence without the remedy."""

    def __init__(self, message: str, says: str) -> None:
        super().__init__(message)
        self.says = says


class NotThisLane(NotThisLog):
    """The participant's data were written for another lane, or under another number of lanes."""


class NotReady(OutboxError):
    """Something that the command needs is not set up, or of another version; the text says what to do."""


class NotMigrated(NotReady):
    """The database has no outbox schema, or an older one: run `outbox migrate`."""


class DatabaseNewer(NotReady):
    """The database was migrated by a newer version of this package: upgrade the package."""


class StateVersion(NotReady):
    """The state directory was made by another version of this package."""


class WaitTimeout(OutboxError, TimeoutError):
    """A participant did not reach the position in time."""


class DepthExceeded(PayloadInvalid):
    """The payload is nested more deeply than readers accept."""
