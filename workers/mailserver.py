"""The embedded mail server: takes mail into a Maildir, for trying things out, tests and small sites.

    python -m workers.mailserver --maildir DIR --listen unix:/path/to/socket

Run by supervisord; `OUTBOX_SMTP` replaces it by a real server. It delivers nothing anywhere: whoever a mail is
for, it lands in the one Maildir, with the envelope in its first lines (`Return-Path`, `Delivered-To`). It listens
on a unix socket that only its own user may open, or on loopback.

What it promises:

* 250 means durable: tmp, fsync, rename into new, fsync of new, and only then the answer.
* A message is stored whole or not at all, also when the client hangs up meanwhile. Every message that was taken
  is kept: no deduplication, so that a mail sent twice is seen twice.
* One session per lane, which a worker names in EHLO as `mail-<lane>-<epoch>.<domain>`: a new session ends the
  older one and is answered when that is over, with what it was writing. So a worker that opens a session and then
  looks into the Maildir sees all that its predecessor got through, and the predecessor can send no more. As long
  as this server runs, a session of a lower epoch than it has seen is refused.

SIGTERM: takes no new session, finishes the messages that are on their way, exits 0. Its log holds no address.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP

from outbox.errors import NotReady
from workers.listener import listening_socket
from workers.maildir import Maildir
from workers.relay import smtp_target

logger = logging.getLogger("outbox.mailserver")

SIZE_LIMIT = 100 * 1024 * 1024
"""Bytes of a message. It is held in memory while it is taken."""

GRACE = 20.0
"""Seconds that a message which is on its way is given after SIGTERM."""

#: Names of sessions that are fenced. Other clients on this machine may share one name, and mean no harm.
_FENCED = re.compile(r"(?P<lane>mail-\d+)-(?P<epoch>\d{1,18})(?P<domain>\..+)")
_FENCED_OFF = "550 5.7.1 a newer owner of this lane has a session"


class _Connection(SMTP):
    """One session. aiosmtpd cancels its coroutine when the client hangs up; a write goes on by itself."""

    def __init__(self, server: Mailserver) -> None:
        super().__init__(
            server, data_size_limit=SIZE_LIMIT, enable_SMTPUTF8=True, hostname="localhost", ident="outbox",
            loop=asyncio.get_running_loop(),
        )  # fmt: skip
        self._server = server
        #: A message is on its way.
        self.busy = False
        self.writing: asyncio.Future[str] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._server.forget(self)

    async def over(self) -> None:
        """Return when nothing of this session can happen any more."""
        if self._handler_coroutine is not None:
            await asyncio.wait({self._handler_coroutine})
        if self.writing is not None:
            await asyncio.wait({self.writing})
            self.writing.exception()  # nobody else may be left to look at it

    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802 - the name is aiosmtpd's
        self.busy = True
        try:
            await super().smtp_DATA(arg)
        finally:
            self.busy = False
            if self._server.draining:
                self.goodbye()

    def goodbye(self) -> None:
        """End an idle session."""
        if isinstance(self.transport, asyncio.Transport) and not self.busy:
            self.transport.write(b"421 4.3.2 the mail server stops\r\n")
            self.transport.close()

    def hang_up(self) -> None:
        """End the session at once, whatever it is doing; a write goes on."""
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()


class Mailserver:
    """The sessions, and what aiosmtpd asks about each command (its `handle_…` hooks)."""

    def __init__(self, maildir: Maildir) -> None:
        self.maildir = maildir
        self.draining = False
        self.connections: set[_Connection] = set()
        #: Sessions by lane, each with its epoch.
        self._lanes: dict[str, set[_Connection]] = {}
        #: The highest epoch of each lane, also when its session is over: a predecessor may wake up after that.
        self._epochs: dict[str, int] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def forget(self, connection: _Connection) -> None:
        """A session's connection is gone; its name is free when it is over."""
        task = asyncio.get_running_loop().create_task(self._free(connection))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _free(self, connection: _Connection) -> None:
        await connection.over()
        self.connections.discard(connection)
        for lane in [lane for lane, sessions in self._lanes.items() if connection in sessions]:
            self._lanes[lane].remove(connection)
            if not self._lanes[lane]:
                del self._lanes[lane]

    async def _fence(self, connection: _Connection, name: str) -> bool:
        """Wait until the session is the only one of its lane. → whether it may be."""
        match = _FENCED.fullmatch(name)
        if match is None:
            return True
        lane, epoch = match["lane"] + match["domain"], int(match["epoch"])
        if epoch < self._epochs.get(lane, 0):
            return False
        self._epochs[lane] = epoch
        sessions = self._lanes.setdefault(lane, set())
        older = [session for session in sessions if session is not connection]
        sessions.add(connection)
        for session in older:
            session.hang_up()
        await asyncio.gather(*(session.over() for session in older))
        return True

    async def handle_EHLO(  # noqa: N802
        self,
        server: _Connection,
        session: Any,
        envelope: Any,
        hostname: str,
        responses: list[str],
    ) -> list[str]:
        if not await self._fence(server, hostname):
            return [_FENCED_OFF]
        session.host_name = hostname
        # Commands are read from a stream one by one, which is all that pipelining asks for.
        return [*responses[:-1], "250-PIPELINING", "250-ENHANCEDSTATUSCODES", responses[-1]]

    async def handle_HELO(self, server: _Connection, session: Any, envelope: Any, hostname: str) -> str:  # noqa: N802
        if not await self._fence(server, hostname):
            return _FENCED_OFF
        session.host_name = hostname
        return "250 localhost"

    async def handle_MAIL(  # noqa: N802
        self,
        server: _Connection,
        session: Any,
        envelope: Any,
        address: str,
        options: list[str],
    ) -> str:
        if not address.isprintable():
            return "553 5.1.7 control character in the address"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 Ok"

    async def handle_RCPT(  # noqa: N802
        self,
        server: _Connection,
        session: Any,
        envelope: Any,
        address: str,
        options: list[str],
    ) -> str:
        if not address.isprintable():
            return "553 5.1.3 control character in the address"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, server: _Connection, session: Any, envelope: Any) -> str:  # noqa: N802
        lines = [f"Return-Path: <{envelope.mail_from}>", *(f"Delivered-To: {to}" for to in envelope.rcpt_tos)]
        header = "".join(f"{line}\r\n" for line in lines).encode()
        server.writing = asyncio.get_running_loop().run_in_executor(
            None, self.maildir.store, header, envelope.original_content
        )
        try:
            # Shielded: the client may hang up now, and the message is stored all the same.
            queue_id = await asyncio.shield(server.writing)
        except OSError as error:
            logger.error("a message can't be stored: %s", error.strerror)  # noqa: TRY400 - the disk's fault
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return "452 4.3.1 Insufficient system storage" if full else "451 4.3.0 Can't store the message"
        return f"250 2.0.0 Ok: queued as {queue_id}"

    async def handle_exception(self, error: Exception) -> str:
        logger.error("a session raised %s", type(error).__name__)
        return "451 4.3.0 Internal error"

    async def drain(self) -> None:
        """End the sessions: idle ones at once, the others after their message."""
        self.draining = True
        for connection in list(self.connections):
            connection.goodbye()
        over = [asyncio.ensure_future(connection.over()) for connection in self.connections]
        if over:
            _, late = await asyncio.wait(over, timeout=GRACE)
            if late:
                logger.warning("%d messages were not sent to their end in %.0f s: cut off", len(late), GRACE)
        for connection in list(self.connections):
            connection.hang_up()
            await connection.over()
        await asyncio.gather(*self._ending)


async def serve(maildir: Maildir, sock: socket.socket, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, and finish what is on its way then."""
    # aiosmtpd logs commands and addresses, at any level.
    logging.getLogger("mail.log").disabled = True
    mailserver = Mailserver(maildir)
    loop = asyncio.get_running_loop()
    if sock.family == socket.AF_UNIX:
        server: asyncio.Server = await loop.create_unix_server(lambda: _Connection(mailserver), sock=sock)
    else:
        server = await loop.create_server(lambda: _Connection(mailserver), sock=sock)
    logger.info("the mail server is ready")
    try:
        await stop.wait()
    finally:
        server.close()
        await mailserver.drain()
    logger.info("the mail server has stopped")


async def _main(maildir: Maildir, sock: socket.socket) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(maildir, sock, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server. → the process's exit status: 2 if it can't start, and says why."""
    parser = argparse.ArgumentParser(prog="python -m workers.mailserver", description="A mail server into a Maildir.")
    parser.add_argument("--maildir", type=Path, required=True, metavar="DIR", help="made if it isn't there")
    parser.add_argument("--listen", required=True, metavar="URL", help="unix:/path or smtp://127.0.0.1:PORT")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    try:
        maildir = Maildir(given.maildir.absolute())
        sock = listening_socket(smtp_target(given.listen))
    except NotReady as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(_main(maildir, sock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
