"""The receipt's recipient: a small LMTP server that the mail server brings one copy of each mail to.

Run by `outbox work receipts`. It answers 250 when the postmark is in Postgres, durably; while Postgres is away it
answers 451, and the mail server keeps the copy and tries again. A crash between the two makes the mail server
bring it again, and the postmark is there once. Other recipients than receipts are refused for good.

It listens on loopback, or on a unix socket that is open to whoever may enter its directory. Whoever can connect can
say that a mail was taken. Its log holds no address.

SIGTERM: stops at once, exit 0; what is on its way is brought again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiosmtpd.lmtp import LMTP

from outbox.database import reason
from workers.postmark import LOST, Postmark, Postmarks, ReceiptAddress

logger = logging.getLogger("outbox.lmtp")

BEAT = 5.0
"""Seconds between two signs of life in `outbox.postmark_watch`."""

SIZE_LIMIT = 10 * 1024 * 1024
"""Bytes of a message, which is in memory while it is taken: a payload's limit, and what servers put before it."""

_FORGET_EVERY = 3600.0

# The newest is on top. The name of the message stands before the date, as the last of its kind.
_RECEIVED = re.compile(rb"^Received:((?:[^\r\n]|\r?\n[ \t])*)", re.MULTILINE | re.IGNORECASE)
_ID = re.compile(rb".*\bid\s+([0-9A-Za-z._-]{1,64})", re.DOTALL)


def queue_id(content: bytes) -> str:
    """What the mail server that brought a message called it: stable while it brings the same one again; or ""."""
    received = _RECEIVED.search(content.partition(b"\r\n\r\n")[0])
    found = _ID.match(received[1].rpartition(b";")[0]) if received else None
    return found[1].decode("ascii") if found else ""


class _Connection(LMTP):
    def __init__(self, receiver: Receiver) -> None:
        super().__init__(
            receiver, data_size_limit=SIZE_LIMIT, enable_SMTPUTF8=True, hostname="localhost", ident="outbox",
            loop=asyncio.get_running_loop(),
        )  # fmt: skip
        self._receiver = receiver

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._receiver.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._receiver.connections.discard(self)

    def hang_up(self) -> None:
        """End the session at once."""
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()


class Receiver:
    """What aiosmtpd asks about each command (its `handle_…` hooks)."""

    def __init__(self, address: ReceiptAddress, postmarks: Postmarks) -> None:
        self._address, self._postmarks = address, postmarks
        # One connection to Postgres, and so one thread that has it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="postmarks")
        self.connections: set[_Connection] = set()

    async def handle_EHLO(  # noqa: N802 - the names are aiosmtpd's
        self, server: Any, session: Any, envelope: Any, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        return [*responses[:-1], "250-PIPELINING", "250-ENHANCEDSTATUSCODES", responses[-1]]

    async def handle_RCPT(  # noqa: N802
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        if self._address.match(address) is None:
            return "550 5.1.1 not a receipt"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        postmarks = [found for to in envelope.rcpt_tos if (found := self._address.match(to)) is not None]
        reply = await self._run(self._store, postmarks, queue_id(envelope.original_content))
        # LMTP has a reply for each recipient, and aiosmtpd sends one for all.
        return "\r\n".join([reply] * len(envelope.rcpt_tos))

    async def handle_exception(self, error: Exception) -> str:
        logger.error("a session raised %s", type(error).__name__)
        await self._run(setattr, self._postmarks, "gap", True)
        return "451 4.3.0 Internal error"

    def _store(self, postmarks: list[Postmark], queue_id: str) -> str:
        try:
            self._postmarks.put(postmarks, queue_id)
        except LOST as error:
            self._postmarks.gap = True
            logger.warning("a receipt can't be stored (%s): the mail server brings it again", reason(error))
            self._postmarks.close()
            return "451 4.3.0 The database is away"
        return "250 2.0.0 Ok"

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def beat(self) -> None:
        """Say for ever that somebody listens."""
        forgot = 0.0
        while True:
            try:
                await self._run(self._postmarks.watch)
                if time.monotonic() - forgot > _FORGET_EVERY:
                    await self._run(self._postmarks.forget)
                    forgot = time.monotonic()
            except LOST as error:
                logger.warning("the database is lost (%s): trying again", reason(error))
                await self._run(self._postmarks.close)
            await asyncio.sleep(BEAT)

    def close(self) -> None:
        """End every session at once, and let go of the database."""
        for connection in list(self.connections):
            connection.hang_up()
        self._thread.shutdown()
        self._postmarks.close()


async def _serve(receiver: Receiver, sock: socket.socket, stop: threading.Event) -> None:
    # aiosmtpd logs commands and addresses, at any level.
    logging.getLogger("mail.log").disabled = True
    loop = asyncio.get_running_loop()
    make = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
    server = await make(lambda: _Connection(receiver), sock=sock)
    # After that: from now on nothing is refused.
    beat = loop.create_task(receiver.beat())
    logger.info("the receipt's recipient listens")
    try:
        while not stop.is_set() and not beat.done():  # noqa: ASYNC110 - a thread's event, which also sees the parent go
            await asyncio.sleep(0.1)
    finally:
        server.close()
        beat.cancel()
        receiver.close()
    if beat.done() and not beat.cancelled():
        beat.result()
    logger.info("the receipt's recipient has stopped")


def serve(address: ReceiptAddress, database: str, sock: socket.socket, stop: threading.Event) -> None:
    """Take receipts until `stop` is set. Raises `NotReady` when the database doesn't fit this code."""
    asyncio.run(_serve(Receiver(address, Postmarks(database, "receipts")), sock, stop))
