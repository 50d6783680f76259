"""The swap: the lanes of the index write the next generation from here on, and searches read it.

    swap     one transaction: new lanes in the place of the old ones, which are ours for now
    drain    the ordinary reader takes them to where the old ones were
    ready    searches may read it
    remove   the old generation's files

Until `swap` has committed, nothing of the old generation has changed, and it goes on. From then on the database says
that the new one counts. A process that dies after it leaves lanes that their workers take over at once, and which say
for themselves that the new generation is ready; what is left to do is to remove the old one.

So that no search ever finds less than the one before, the new generation is ready only when it has all that the old
owners may have written: they are told, and waited for until they have let go of their shards.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from outbox import generation, sql, tick
from outbox.database import connect
from outbox.errors import NotReady, OutboxError
from outbox.failpoint import hit
from outbox.lane import SAFE_SHARE, Lane, now, place
from outbox.log import Slots
from outbox.settings import Settings
from outbox.tick import Tick
from workers.index import IndexParticipant
from workers.lease import Lease
from workers.reader import Reader
from workers.resilver.draft import TARGET, Draft
from workers.shard import xapian

logger = logging.getLogger("outbox.resilver")

LEASES = 2.0
"""Leases that old owners are waited for. One that is suspended for longer can do no harm: nobody reads what it
writes, and no position of it counts."""

_LOOK_EVERY = 0.02

_SHARD = re.compile(r"\d{2,}(\.\d+\.new)?")


def swap(
    conn: psycopg.Connection[Any], directory: Path, drafts: Sequence[Draft], *, was: int, number: int, ttl: float
) -> list[Lane]:
    """Have the lanes write generation `number`. → the lanes, which are ours. Closes the drafts.

    Durable when it returns. Raises `NotReady` if the lanes are not of generation `was` any more.
    """
    positions = [draft.position for draft in drafts]
    again = sorted({one for draft in drafts for one in draft.aside})
    for draft in drafts:
        draft.close()
    # The folders' names must not be lost after the database has named them.
    generation.sync(generation.folder(directory, number))
    generation.sync(directory)
    sent = now()
    parameters = {
        "target": TARGET,
        "was": was,
        "generation": number,
        "ticks": [position.tick for position in positions if position is not None],
        "again": again,
        "owner": uuid.uuid4(),
        "place": place(),
        "ttl": ttl,
    }
    try:
        rows = conn.execute(sql.load("generation_swap"), parameters).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        user = conn.info.user
        raise NotReady(
            f"the database user {user} may not swap generations: use a member of outbox_operator "
            f"(GRANT outbox_operator TO {user})"
        ) from None
    except psycopg.DatabaseError as error:
        if error.sqlstate == "OB016":
            raise NotReady(f"{error.diag.message_primary}. {error.diag.message_hint}") from None
        raise
    hit("resilver.swapped")
    return [
        Lane(
            TARGET, lane, epoch, Slots(low, high), ttl, deaths=0, unclean=False, deadline=sent + SAFE_SHARE * ttl,
            lanes=len(rows), generation=number,
        )
        for lane, epoch, low, high in rows
    ]  # fmt: skip


def drain(conn: psycopg.Connection[Any], settings: Settings, directory: Path, lanes: Sequence[Lane], was: int) -> None:
    """Take the lanes to where the old ones can have been, and give them back.

    A lane that somebody else has by now, or that can't be drained, is left to its worker.
    """
    with ExitStack() as leases, ThreadPoolExecutor(len(lanes), "drain") as pool:
        for lane in lanes:
            leases.enter_context(Lease(settings.database, lane))
        _wait_for_owners(generation.folder(directory, was), now() + LEASES * settings.ttl)
        until = tick.latest(conn)
        for lane, drained in [(lane, pool.submit(_drain, settings, directory, lane, until)) for lane in lanes]:
            try:
                drained.result()
            except (OutboxError, psycopg.Error) as error:
                logger.warning("%s: left to its worker: %s", lane, error)
    hit("resilver.drained")


def _drain(settings: Settings, directory: Path, lane: Lane, until: Tick) -> None:
    with connect(settings.database, name=f"resilver {lane}") as conn:
        reader = Reader(conn, lane, IndexParticipant(directory, serves=False))
        try:
            reader.open()
            while reader.position.tick < until.id:
                reader.step()
            reader.close()
        finally:
            reader.participant.close()
            lane.release(conn)


def _wait_for_owners(folder: Path, until: float) -> None:
    """Until no process has a shard of the old generation open for writing."""
    for shard in sorted(folder.glob("[0-9][0-9]*/iamglass")):
        while now() < until:
            try:
                xapian.WritableDatabase(str(shard.parent), xapian.DB_OPEN).close()
            except xapian.DatabaseLockError:
                time.sleep(_LOOK_EVERY)
            except xapian.DatabaseError:
                break  # damaged: nobody writes it
            else:
                break


def serve(directory: Path, number: int) -> None:
    """Let searches read generation `number`; durable when it returns."""
    generation.ready(directory, number)
    hit("resilver.ready")


def remove(directory: Path, keep: Sequence[int]) -> None:
    """Remove the files of all generations but those to keep. Raises OSError."""
    for number in generation.folders(directory):
        if number not in keep:
            _remove(generation.folder(directory, number))
    if 0 not in keep:
        for path in directory.iterdir():
            if _SHARD.fullmatch(path.name):
                _remove(path)
    generation.sync(directory)


def _remove(path: Path) -> None:
    # An owner that was suspended may still make files: they go with the next resilver.
    shutil.rmtree(path, ignore_errors=True)
    hit("resilver.removed")
