"""Heard: where the events of an application's sessions come from.

`outbox.session` listens there. An `AsyncSession` has none of its own: they come from the plain session behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import async_sessionmaker

Sessions: TypeAlias = "sessionmaker[Any] | async_sessionmaker[Any] | type[Session] | Session"


def heard(sessions: Any) -> Any:
    """`sessions` itself; for an `async_sessionmaker` the plain sessions behind its own: it is given some if need be."""
    asynchronous: Any = getattr(sessions, "class_", None)
    if not hasattr(asynchronous, "sync_session_class"):
        return sessions
    behind = sessions.kw.get("sync_session_class") or asynchronous.sync_session_class
    if behind is Session:
        # Everybody's: listening there would be listening to sessions of others.
        behind = sessionmaker()
        sessions.configure(sync_session_class=behind)
    return behind
