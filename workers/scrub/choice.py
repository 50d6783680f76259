"""Which subject a participant is, by the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from outbox.blob import BlobStore
from outbox.errors import NotReady
from outbox.participant import Participant
from outbox.settings import Settings, required
from outbox.store import Store, open_store
from workers.scrub.subject import Subject
from workers.scrub.survey import lanes_of

UNSCRUBBED = ("saga", "actor")
"""Participants that hold nothing outside the database."""


def subject_of(
    settings: Settings, conn: psycopg.Connection[Any], target: str, make: Callable[[], Participant] | None = None
) -> tuple[Subject, Store | None]:
    """The subject, and its store if it is one of blobs. `make` makes a participant of the user's own.

    Raises `NotReady`.
    """
    lanes_of(conn, target)
    if target in UNSCRUBBED:
        raise NotReady(f"{target} keeps everything in the database: there is nothing to compare")
    if make is not None:
        from workers.scrub.own import OwnSubject  # noqa: PLC0415 - each import is only paid where it is used

        return OwnSubject(target, make), None
    if target == "index":
        from workers.scrub.index import IndexSubject  # noqa: PLC0415

        try:
            return IndexSubject(required(settings.index, "OUTBOX_INDEX")), None
        except NotReady as error:
            raise _nothing_there(conn, error) from error
    from workers.scrub.blob import BlobSubject  # noqa: PLC0415

    store = open_store(settings)
    if isinstance(store, BlobStore) and not (store.directory / "objects").is_dir():
        raise NotReady(
            f"there is no store of blobs in {store.directory}: mount it if it is somewhere else, or start the blob "
            "worker, which makes a new one; then outbox resilver blob --from takes the blobs from a copy"
        )
    return BlobSubject(store), store


def _nothing_there(conn: psycopg.Connection[Any], error: NotReady) -> NotReady:
    """An index that is gone under a running worker is made anew when that one writes, which may be in a week."""
    running = "select from outbox.lane where target = 'index' and owner is not null and lease_until >= outbox.now()"
    if conn.execute(running).fetchone() is None:
        return error
    return NotReady(
        f"{str(error).partition(':')[0]}, and its worker runs: restart the worker, and all of it is indexed again from "
        "base and log; or set OUTBOX_INDEX to where the index is"
    )
