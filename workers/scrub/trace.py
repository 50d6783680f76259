"""Traces: what a mail server has written down of the mails that it took, all of it.

Where `workers.evidence` asks for one mail, this reads everything there is: Postfix's log and queue, the Maildir of the
embedded server, or what came back to the receipt's recipient. A trace names a mail by the token in its envelope sender.

Raises `Unavailable` when it can't be read, `NotReady` when the settings name no evidence.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

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
        log = postfix.find_log()
        files = [path for path in (log.with_name(log.name + ".1"), log) if path == log or path.exists()]
        with files[0].open("rb") as file:
            since = log_time(file.readline())
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise Unavailable(
            f"Postfix's log or its queue can't be read ({type(error).__name__}): let this user read the log and run "
            "postqueue"
        ) from error
    return Traces(since, _chain(queued, files))


def _queue(listed: str) -> Iterator[Trace]:
    for line in listed.splitlines():
        match = _QUEUED.match(json.loads(line)["sender"])
        if match is not None:
            yield Trace(match["token"], match["part"], "", match["domain"])


def _chain(queued: list[Trace], files: list[Path]) -> Iterator[Trace]:
    yield from queued
    for path in files:
        with path.open("rb") as file:
            for line in file:
                if b"from=<b+" in line and (match := _LOGGED.search(line)):
                    yield Trace(*(match[name].decode("ascii", "replace") for name in Trace._fields))


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
