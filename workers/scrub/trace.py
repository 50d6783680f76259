"""Traces: what a mail server has written down of the mails that it took, all of it.

Where `workers.evidence` asks for one mail, this reads everything there is: Postfix's log and queue, the Maildir of the
embedded server, or what came back to the receipt's recipient. A trace names a mail by the token in its envelope sender.

Raises `Unavailable` when it can't be read, `NotReady` when the settings name no evidence.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from itertools import count
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, NamedTuple

import psycopg

from outbox import sql
from outbox.errors import NotReady, Unavailable
from outbox.settings import Settings
from workers.envelope import SENDER
from workers.evidence import PostfixEvidence, log_time
from workers.witness import KEPT

_NAMED = SENDER.pattern + r"(?P<domain>[^>\s]{1,255})"
_LOGGED = re.compile(rb"/qmgr\[\d+\]: (?P<queue_id>[0-9A-Za-z]+): from=<" + _NAMED.encode("ascii") + b">")
_RETURN = re.compile(b"<" + _NAMED.encode("ascii") + b">")
_QUEUED = re.compile(_NAMED)


OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
"""How a log file with such an ending is read."""


class Trace(NamedTuple):
    """One mail, or one part of its recipients, that a server took."""

    token: str
    part: str
    #: Empty: the mail is waiting in the queue, and may be counted again when it leaves it.
    queue_id: str
    #: Of the envelope sender; empty: not known, and perhaps none of ours.
    domain: str


class Traces(NamedTuple):
    """What there is."""

    #: Since when no trace is missing; None: one that is missing means nothing.
    since: datetime | None
    all: Iterable[Trace]


def traces(settings: Settings, conn: psycopg.Connection[Any]) -> Traces:
    """Where OUTBOX_MAIL_EVIDENCE says."""
    kind, _, path = settings.mail_evidence.partition(":")
    if kind in ("postfix", "hold"):
        return _postfix(PostfixEvidence(Path(path)))
    if kind == "maildir":
        return Traces(None, _maildir(Path(path)))
    if kind == "receipt":
        return _postmarks(conn)
    raise _nothing()


def check_traces(settings: Settings) -> None:
    """Raises `NotReady` if the settings name nothing that traces could be found in."""
    if settings.mail_evidence == "none":
        raise _nothing()


def _nothing() -> NotReady:
    return NotReady("OUTBOX_MAIL_EVIDENCE=none: there is nothing to compare the receipts of mails with")


def _postfix(postfix: PostfixEvidence) -> Traces:
    try:
        # The queue first: what leaves it meanwhile was logged before, and is found in the log.
        queued = list(_queue(postfix.run("postqueue", "-c", str(postfix.config_directory), "-j")))
        files = _rotated(postfix.find_log())
        since = next(filter(None, map(_begins, reversed(files))), None)
    except (OSError, EOFError, LZMAError, zlib.error, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise _unreadable(error) from error
    return Traces(since, _chain(queued, files))


def _unreadable(error: Exception) -> Unavailable:
    return Unavailable(
        f"Postfix's log or its queue can't be read ({type(error).__name__}): let this user read the log and run "
        "postqueue"
    )


def _rotated(log: Path) -> list[Path]:
    """The log and what logrotate has made of it, the newest first, as far back as no file is missing.

    In this order, one that is renamed while they are read is read twice and not missed.
    """
    files = [log]
    for number in count(1):
        names = [f"{log.name}.{number}{ending}" for ending in OPENERS]
        found = [path for path in map(log.with_name, names) if path.exists()]
        if not found:
            break
        files.append(found[0])
    # With `dateext` it names them otherwise.
    dated = re.compile(re.escape(log.name) + r"-\d{8,}(" + "|".join(map(re.escape, OPENERS)) + ")")
    files += sorted((path for path in log.parent.iterdir() if dated.fullmatch(path.name)), reverse=True)
    return files


def _opened(path: Path) -> IO[bytes]:
    ending = path.suffix if path.suffix in OPENERS else ""
    file: IO[bytes] = OPENERS[ending](path, "rb")
    return file


def _begins(path: Path) -> datetime | None:
    with _opened(path) as file:
        return log_time(file.readline())


def _queue(listed: str) -> Iterator[Trace]:
    for line in listed.splitlines():
        match = _QUEUED.match(json.loads(line)["sender"])
        if match is not None:
            yield Trace(match["token"], match["part"], "", match["domain"])


def _chain(queued: list[Trace], files: list[Path]) -> Iterator[Trace]:
    yield from queued
    for path in files:
        try:
            with _opened(path) as file:
                for line in file:
                    if b"from=<b+" in line and (match := _LOGGED.search(line)):
                        yield Trace(*(match[name].decode("ascii", "replace") for name in Trace._fields))
        except FileNotFoundError:
            # Renamed since: all is read a second time.
            continue
        except (OSError, EOFError, LZMAError, zlib.error) as error:
            raise _unreadable(error) from error


def _maildir(path: Path) -> Iterator[Trace]:
    try:
        # A message moves from new to cur: looked at in this order, it can't slip past.
        names = {entry.name.partition(":")[0]: entry.path for f in ("new", "cur") for entry in os.scandir(path / f)}
    except OSError as error:
        raise Unavailable(
            f"the Maildir can't be read ({type(error).__name__}): is OUTBOX_MAIL_EVIDENCE right?"
        ) from error
    for name, place in names.items():
        try:
            with open(place, "rb") as file:
                first = file.readline(1024)
        except FileNotFoundError:
            continue
        if first.startswith(b"Return-Path:") and (match := _RETURN.search(first)):
            token, part, domain = (match[each].decode("ascii", "replace") for each in ("token", "part", "domain"))
            yield Trace(token, part, name, domain)


def _postmarks(conn: psycopg.Connection[Any]) -> Traces:
    row = conn.execute(sql.load("postmark_watched")).fetchone()
    since = max(row[0], row[2] - KEPT + timedelta(hours=1)) if row and row[0] else None
    return Traces(since, _brought(conn))


def _brought(conn: psycopg.Connection[Any]) -> Iterator[Trace]:
    with conn.transaction():
        conn.execute("set local enable_seqscan = on")
        with conn.cursor(name="outbox_scrub") as cursor:
            cursor.itersize = 1000
            for token, part, queue_id in cursor.execute(sql.load("scrub_postmarks")):
                yield Trace(token, part, queue_id or "-", "")
