"""`orm`: what an intent adds to an ordinary transaction.

Both sides insert one mapped row, flush and commit, durably. Ours also puts the row's document into the log, through
the session hook, as an application would. The sides take turns in blocks of transactions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from outbox import Outbox, Settings
from tests.bench.figure import Bar, Figure
from tests.bench.pair import compare
from tests.bench.site import Site

BLOCK = 25
"""Transactions of one side before the other has its turn."""

_TEXT = "A note of a few lines, as somebody types it: what was said, by whom, and what is to be done about it. " * 3


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "bench_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    text: Mapped[str]


def measure(site: Site, *, quick: bool) -> Iterator[Figure]:
    """A row and an intent, against the row."""
    settings = Settings(
        database=site.server.url("app", site.database()), index=site.home, blobs=site.home, smtp="unix:/nowhere"
    )
    engine = sa.create_engine(settings.sqlalchemy_url)
    try:
        Base.metadata.create_all(engine)
        plain, hooked = sessionmaker(engine), sessionmaker(engine)
        outbox = Outbox(hooked, settings)
        numbers = itertools.count(1)

        def without() -> float:
            start = time.perf_counter()
            for number in itertools.islice(numbers, BLOCK):
                with plain.begin() as session:
                    session.add(Note(title=f"Note {number}", text=_TEXT))
                    session.flush()
            return (time.perf_counter() - start) / BLOCK

        def with_intent() -> float:
            start = time.perf_counter()
            for number in itertools.islice(numbers, BLOCK):
                with hooked.begin() as session:
                    session.add(Note(title=f"Note {number}", text=_TEXT))
                    session.flush()
                    outbox.index.put(session, f"note/{number}", title=f"Note {number}", text=_TEXT)
            return (time.perf_counter() - start) / BLOCK

        pair = compare(with_intent, without, pairs=15 if quick else 61)
    finally:
        engine.dispose()
    yield Figure("orm.ratio", pair.ratio, "ratio of time", Bar("<=", 1.3))
    yield Figure("orm.with", pair.ours * 1000, "ms/transaction")
    yield Figure("orm.without", pair.theirs * 1000, "ms/transaction")
