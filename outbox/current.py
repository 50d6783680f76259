"""The session that a piece of code is in: so that a send that names no session commits with it.

`entered` is called by `outbox.session` for each transaction of an attached session that begins. It belongs to the
thread (or the asyncio task) that began it, until it ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar

from sqlalchemy.orm import Session

from outbox.errors import IntentRefused

_OPEN: ContextVar[tuple[weakref.ref[Session], ...]] = ContextVar("outbox_sessions", default=())


def entered(session: Session) -> None:
    """A transaction of this session has begun here."""
    others = [one for one in _OPEN.get() if _in_transaction(one) not in (None, session)]
    _OPEN.set((*others, weakref.ref(session)))


def current(wanted: Callable[[Session], bool]) -> Session | None:
    """The session that is wanted, and with a transaction in progress that was begun here; or None.

    Raises `IntentRefused` if there are several: nobody can tell which one is meant.
    """
    if not _OPEN.get():
        return None
    found = [session for one in _OPEN.get() if (session := _in_transaction(one)) is not None and wanted(session)]
    if len(found) > 1:
        raise IntentRefused(
            "several sessions are in a transaction here: say which is meant, with broker.using(session)"
        )
    return found[0] if found else None


def _in_transaction(one: weakref.ref[Session]) -> Session | None:
    session = one()
    return session if session is not None and session.in_transaction() else None
