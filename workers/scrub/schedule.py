"""The schedule: scrubs that nobody has to think of.

`outbox scrub --scheduled` is a program for supervisord. It scrubs each participant when the last complete scrub of it
began longer ago than OUTBOX_SCRUB_EVERY, one after the other, and politely: with a low priority, which Linux takes
for the disk too, and at OUTBOX_SCRUB_RATE. It repairs nothing: what it finds is for a person, whom `outbox status`
tells.

A scrub that was killed goes on with the next start. The database decides what is due, so that it doesn't matter how
many of these programs run, or on which machine: an operation has one owner.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg

from outbox import operation, sql
from outbox.database import Connection, Unreachable, connect, reason
from outbox.errors import Fenced, NotReady, NotThisLog, OutboxError, Unavailable
from outbox.operation import Operation
from outbox.settings import Settings
from workers.cli.work import contributed
from workers.scrub.choice import subject_of
from workers.scrub.pace import Rate
from workers.scrub.survey import Progress, Survey

log = logging.getLogger("outbox.scrub")

KIND = "scrub"
BUILT_IN = ("index", "blob", "mail")

LOOK_EVERY = 30.0
"""Seconds between looks whether something is due."""

NICE = 10
"""Steps of priority below the workers."""


def result(progress: Progress) -> dict[str, Any]:
    """What is kept of a scrub, and shown by `outbox status`."""
    names = ("tick", "items", "bytes", "moving", "counts", "emitted", "mended", "note")
    return {"found": progress.found, **{name: getattr(progress, name) for name in names}}


def known(settings: Settings, conn: psycopg.Connection[Any]) -> list[str]:
    """The participants that can be scrubbed here without being named."""
    registered = {row[0] for row in conn.execute("select target from outbox.participant")}
    there = {"index": settings.index, "blob": settings.blobs, "mail": settings.mail_evidence != "none"}
    return [target for target in BUILT_IN if target in registered and there[target]]


def run(settings: Settings, targets: Sequence[str], rate: float | None, stop: threading.Event) -> None:
    """Scrub what is due, until told to stop. Raises `NotReady` if there is no schedule."""
    required_every(settings)
    settings = replace(settings, scrub_rate=rate or settings.scrub_rate)
    with suppress(OSError):
        os.nice(NICE)
    while not stop.is_set():
        try:
            with connect(settings.database, name="scrub") as conn:
                for target in targets or known(settings, conn):
                    if not stop.is_set():
                        if_due(settings, conn, target, stop)
        except (psycopg.OperationalError, Unreachable) as error:
            log.warning("scrub: the database is lost (%s): trying again", reason(error))
        stop.wait(LOOK_EVERY)


def required_every(settings: Settings) -> float:
    """Seconds between two scrubs. Raises `NotReady` when nothing says how many."""
    if settings.scrub_every is None:
        raise NotReady("OUTBOX_SCRUB_EVERY is not set: say how often, such as 7d, or scrub without --scheduled")
    return settings.scrub_every


class _Stopped(Exception):
    """The program is to end, in the middle of a scrub."""


def if_due(settings: Settings, conn: Connection, target: str, stop: threading.Event) -> None:
    """Scrub one participant, if it is its time and nobody is at it."""
    request = {"target": target, "repair": False, "every": required_every(settings)}
    ours = _take_up(conn, request)
    if ours is None:
        return
    log.info("scrub %d of %s begins", ours.id, target)

    def tell(_progress: Progress) -> None:
        if stop.is_set():
            raise _Stopped

    try:
        progress = _survey(settings, conn, ours, tell)
    except _Stopped:
        ours.end(conn, "running")
    except Fenced as error:
        log.warning("%s", error)
    except (Unavailable, NotThisLog, NotReady, OSError) as error:
        # Not ended: it is taken up again with the next look, and no new one begins.
        said = str(error) if isinstance(error, OutboxError) else os.strerror(error.errno or 0)
        log.warning("scrub %d of %s waits: %s", ours.id, target, said)
        ours.end(conn, "running", error=said)
    else:
        ours.end(conn, "done", result=result(progress))
        log.info("scrub %d of %s is done: %d findings", ours.id, target, progress.found)


def _take_up(conn: Connection, request: dict[str, Any]) -> Operation | None:
    """The scrub that goes on or begins now; None if none is due, or somebody is at it."""
    for row in operation.find(conn, kind=KIND, state="running"):
        if row["request"] == request:
            try:
                return operation.resume(conn, row["id"])
            except NotReady:
                return None
    for row in conn.execute(sql.load("scrub_last")):
        if row[0] == request["target"] and row[6] < request["every"]:
            return None
    return operation.begin(conn, KIND, request)


def _survey(settings: Settings, conn: Connection, ours: Operation, tell: Callable[[Progress], None]) -> Progress:
    target = ours.request["target"]
    if target == "mail":
        from workers.scrub.mail import MailSurvey  # noqa: PLC0415 - only paid where it is used

        return MailSurvey(settings, conn, ours).run()
    subject, store = subject_of(settings, conn, target, None if target in BUILT_IN else contributed(target))
    rate = None if settings.scrub_rate is None else Rate(settings.scrub_rate, "items" if store is None else "bytes")
    try:
        return Survey(conn, ours, subject, rate=rate, tell=tell).run()
    finally:
        subject.close()
