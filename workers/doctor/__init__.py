"""The doctor: does this host offer what the settings promise? Asked by `outbox doctor`, before anything is started.

A subject is a function that looks at one part and yields a `Check` for each thing it looked at. It changes nothing
that outlives it: a file that it writes it removes, a mail that it puts on hold it withdraws. A subject may raise
`OutboxError` or `OSError` for what it can't go on without. A new one is added to `SUBJECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psycopg

from outbox.database import reason
from outbox.errors import OutboxError
from outbox.settings import Settings


class Check(NamedTuple):
    """One thing that was looked at."""

    subject: str
    name: str
    ok: bool
    #: What was found, in a few words.
    found: str
    #: What to do about it, if it isn't ok.
    advice: str = ""


Findings = Iterator[tuple[str, bool, str, str]]
"""What a subject yields: name, ok, found, advice."""


def _subjects() -> dict[str, Callable[[Settings], Findings]]:
    from workers.doctor.database import database  # noqa: PLC0415 - each needs this module
    from workers.doctor.mail import mail  # noqa: PLC0415
    from workers.doctor.stores import blobs, index  # noqa: PLC0415

    return {"database": database, "index": index, "blobs": blobs, "mail": mail}


NAMES = ("database", "index", "blobs", "mail")
"""The subjects, in the order in which they are looked at."""


def examine(settings: Settings, subjects: Sequence[str] = NAMES) -> Iterator[Check]:
    """Look at each subject; what one can't go on without is its last check."""
    known = _subjects()
    for subject in subjects:
        try:
            for finding in known[subject](settings):
                yield Check(subject, *finding)
        except (OutboxError, OSError, psycopg.Error) as error:
            what, _, advice = reason(error).partition(": ")
            yield Check(subject, "usable", ok=False, found=what, advice=advice or "see to it, and ask again")
