"""The sender: connections for what an application sends outside of its sessions, each in a transaction of its own.

What `run` executes is durable when it returns. Connections are kept and shared by the threads of a process, and
never by two processes: a fork begins with none. Raises dramatiq's `ConnectionFailed` when the database can't be
reached, `ConnectionClosed` when the connection was lost on the way, and nobody knows whether it was done.
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import psycopg
from dramatiq.errors import ConnectionClosed, ConnectionFailed

from outbox.database import Connection, Unreachable, connect, reason

PATIENCE = 60.0
"""Seconds that a send waits for the database."""

KEPT = 32
"""Connections that are kept while nobody uses them."""

_Value = TypeVar("_Value")


class Sender:
    """Connections to one database, as the application's user."""

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._idle: deque[Connection] = deque()
        self._process = os.getpid()

    def run(self, work: Callable[[Connection], _Value]) -> _Value:
        """`work` on a connection in autocommit mode."""
        conn = self._take()
        try:
            made = work(conn)
        except psycopg.OperationalError as error:
            conn.close()
            raise ConnectionClosed(
                f"the database was lost on the way ({reason(error)}): it may be done, or not"
            ) from error
        except BaseException:
            conn.close()
            raise
        if len(self._idle) < KEPT:
            self._idle.append(conn)
        else:
            conn.close()
        return made

    def _take(self) -> Connection:
        if self._process != os.getpid():
            # The parent's: to close them would end its sessions.
            self._idle, self._process = deque(), os.getpid()
        while self._idle:
            conn = self._idle.pop()
            if not conn.closed and not _hung_up(conn):
                return conn
            conn.close()
        try:
            return connect(self._url(), name="send", patience=PATIENCE)
        except Unreachable as error:
            raise ConnectionFailed(str(error)) from error

    def close(self) -> None:
        """Close what is idle. It can be used again."""
        if self._process == os.getpid():
            while self._idle:
                self._idle.pop().close()


def _poll(conn: Connection) -> select.poll:
    poll = select.poll()  # select() has no numbers beyond 1023
    poll.register(conn.fileno(), select.POLLIN)
    return poll


def _hung_up(conn: Connection) -> bool:
    """Whether the server has ended an idle connection: then it has said so, or there is an end of file to read."""
    return bool(_poll(conn).poll(0))
