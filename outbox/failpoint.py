"""Named gaps between two durable writes, at which a test can kill the process, or suspend it.

`hit(name)` stands in the code at each gap and does nothing unless the environment variable
`OUTBOX_FAILPOINT` names it: `OUTBOX_FAILPOINT=index.committed` kills the process there with SIGKILL,
`…=index.committed:3` at the third time. With `:stop` at the end it is suspended there instead (SIGSTOP), once, and
goes on when the test sends SIGCONT: a zombie, if its lease ran out meanwhile. Tests only; there is no other action.

A participant of a user's own hits failpoints of its own: their names begin with `own.`, and stand nowhere else.
"""

from __future__ import annotations

import os
import signal

#: Every failpoint, in the order of an intent's life. A name that isn't here can't be hit.
NAMES = (
    # The application, inside its transaction.
    "blob.written",
    "blob.uploaded",
    "blob.staged",
    "session.appended",
    # The clock, and any owner of a lane.
    "lane.claimed",
    "lane.renewed",
    "tick.taken",
    # A worker opens its participant, and finds out what its predecessor left in doubt.
    "index.made",
    "index.opened",
    "index.epoch",
    "blob.opened",
    "receipt.resolved",
    # A batch.
    "reader.aside",
    "lane.suspected",
    "receipt.opened",
    "receipt.returned",
    "index.documents",
    "index.committed",
    "blob.shelved",
    "blob.put",
    "blob.replaced",
    "blob.deleted",
    "blob.linked",
    "blob.synced",
    "blob.copied",
    "blob.marked",
    "blob.published",
    "maildir.written",
    "maildir.renamed",
    "maildir.stored",
    "mail.submitted",
    "receipt.stored",
    "receipt.prepared",
    "mail.released",
    "reader.applied",
    "lane.advanced",
    "reader.parked",
    "reader.recorded",
    "blob.settled",
    "reader.settled",
    # The saga engine: a batch of its lane.
    "saga.written",
    "saga.committed",
    # Actors: a lane is claimed, messages are, and what became of them is written down.
    "actor.adopted",
    "actor.taken",
    "actor.placed",
    "actor.counted",
    "actor.recording",
    "actor.recorded",
    "actor.claimed",
    "actor.released",
    # Schedules of actors.
    "cron.declared",
    "cron.sending",
    "cron.sent",
    # The relay: steps of sagas are noted, messages handed on, outcomes heard.
    "relay.noted",
    "relay.confirmed",
    "relay.heard",
    # What is parked.
    "parked.taken",
    "parked.returned",
    "parked.applied",
    "parked.recorded",
    "parked.promoted",
    # A replay.
    "replay.begun",
    "replay.appended",
    "replay.saved",
    "replay.ended",
    # A resilver: of the index beside the lanes, of blobs in place and into another store.
    "resilver.built",
    "resilver.based",
    "resilver.caught",
    "resilver.checked",
    "resilver.swapped",
    "resilver.drained",
    "resilver.ready",
    "resilver.removed",
    "resilver.repeated",
    "resilver.copied",
    # The end of an owner, and housekeeping.
    "lane.shown",
    "lane.released",
    "house.partitions",
    "house.ticks",
    "house.positions",
    "house.expired",
    "retention.written",
    "retention.archived",
    "retention.noted",
    "retention.carried",
    "retention.dropped",
    "retention.forgotten",
    "sweep.removed",
    "sweep.purged",
    # A scrub, and its repair.
    "scrub.spilled",
    "scrub.confirmed",
    "scrub.saved",
    "scrub.aside",
    "scrub.emitted",
    # An operator takes a restored log over.
    "adopt.begun",
    "adopt.written",
    "adopt.adopted",
)

_name, *_words = os.environ.get("OUTBOX_FAILPOINT", "").split(":")
if _name and _name not in NAMES and not _name.startswith("own."):
    raise SystemExit(f"OUTBOX_FAILPOINT={_name} is not a failpoint; known: {', '.join(NAMES)}")
_signal = signal.SIGSTOP if _words[-1:] == ["stop"] else signal.SIGKILL
_left = int(_words[0]) if _words[:1] not in ([], ["stop"]) else 1


def hit(name: str) -> None:
    """Die here, or stand still, if the test asked for it."""
    global _left  # noqa: PLW0603 - one counter per process is the point
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), _signal)
