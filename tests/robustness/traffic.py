"""One application: `python -m tests.robustness.traffic NAME SEED`, until SIGTERM.

Where everything is comes from the environment, as for any application. Each transaction writes rows of its own tables
and some intents, in one of the ways that an application may: several of a key, in savepoints that are rolled back or
released, rolled back as a whole. When the database is lost in the middle of a COMMIT, it asks whether that happened,
and is told wrong if the answer differs from what its rows say: then it ends with status 3.
"""

from __future__ import annotations

import datetime as dt
import random
import signal
import sys
import threading
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Settings
from tests.robustness.model import Kind

PACE = 0.01
"""Seconds between transactions: the faults matter, not the load."""

PATIENCE = 300.0
"""Seconds that it waits for a database that is away."""

KEYS = 30
"""Things that the applications fight for; few, so that each has a history."""

METADATA = sa.MetaData()

THING = sa.Table(
    "thing",
    METADATA,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    # Of a file: what is in it.
    sa.Column("digest", sa.Text, nullable=False, server_default=""),
)

OPERATION = sa.Table(
    "operation",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("amount", sa.Integer, nullable=False),
    sa.Column("ref", sa.Text, nullable=False),
)

TRANSACTION = sa.Table("transaction", METADATA, sa.Column("id", sa.Text, primary_key=True))


class OnPurpose(Exception):
    """Rolls back."""


class Application:
    """Writes until it is told to stop."""

    def __init__(self, name: str, seed: str) -> None:
        self.name = name
        self.seed = seed
        settings = Settings.load(role="app")
        self.engine = sa.create_engine(settings.sqlalchemy_url, pool_pre_ping=True)
        self.sessions = sessionmaker(self.engine)
        self.outbox = Outbox(self.sessions, settings)

    def run(self, stop: threading.Event) -> int:
        """→ exit status."""
        number = 0
        while not stop.is_set():
            number += 1
            if not self._transact(f"{self.name}.{number}"):
                return 3
            stop.wait(PACE)
        return 0

    def _transact(self, transaction: str) -> bool:
        """One transaction, again if it did not commit. → False if we were told wrong about that."""
        deadline = time.monotonic() + PATIENCE
        while True:
            draw = random.Random(f"{self.seed}/{transaction}")
            session = self.sessions()
            try:
                with session, session.begin():
                    _Work(self.outbox, session, draw, transaction).run()
            except OnPurpose:
                return True
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
                verdict = self._committed(session, deadline)
                if verdict != self._is_there(transaction, deadline):
                    print(f"{transaction}: told that it {'did' if verdict else 'did not'} commit", file=sys.stderr)
                    return False
                if verdict:
                    return True
            else:
                return True

    def _committed(self, session: Session, deadline: float) -> bool:
        token = self.outbox.token(session)
        while token is not None:
            try:
                with self.sessions() as another:
                    verdict = self.outbox.committed(another, token)
                if verdict is not None:
                    return verdict
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)
        return False

    def _is_there(self, transaction: str, deadline: float) -> bool:
        while True:
            try:
                with self.sessions() as session:
                    return session.scalar(sa.select(TRANSACTION.c.id).filter_by(id=transaction)) is not None
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


class _Work:
    """What one transaction does."""

    def __init__(self, outbox: Outbox, session: Session, draw: random.Random, transaction: str) -> None:
        self.outbox, self.session, self.draw, self.transaction = outbox, session, draw, transaction
        self.count = 0

    def run(self) -> None:
        keys = sorted(self.draw.sample(range(KEYS), self.draw.randint(1, 3)))
        self.session.execute(sa.insert(TRANSACTION).values(id=self.transaction))
        for key in keys:  # in order, or two applications wait for each other
            self._lock(f"doc/{key}")
        for key in keys:
            self._lock(f"file/{key}")
        for key in keys:
            self._some(key)
            if self.draw.random() < 0.3:
                self._savepoint(key)
        if self.draw.random() < 0.1:
            self.session.flush()
            raise OnPurpose

    def _lock(self, key: str) -> None:
        self.session.execute(
            sa.text("insert into thing values (:key, 0) on conflict (key) do update set version = thing.version"),
            {"key": key},
        )

    def _savepoint(self, key: int) -> None:
        try:
            with self.session.begin_nested():
                self._some(key)
                if self.draw.random() < 0.5:
                    raise OnPurpose
        except OnPurpose:
            pass

    def _some(self, key: int) -> None:
        for _ in range(self.draw.choice((1, 1, 1, 2, 4))):
            kind = self.draw.random()
            if kind < 0.35:
                self._put(f"doc/{key}")
            elif kind < 0.45:
                self._delete(f"doc/{key}")
            elif kind < 0.65:
                self._file(f"file/{key}")
            elif kind < 0.8:
                self._mail()
            elif kind < 0.9:
                self._note(f"doc/{key}")
            elif kind < 0.97:
                self._due()
            else:
                self._poison(f"doc/{key}")

    def _record(self, kind: Kind, key: str, row: str, *, amount: int = 0, ref: str = "", name: str = "") -> str:
        """A row for an operation. → its id."""
        version = self.session.execute(
            sa.text("update thing set version = version + 1 where key = :key returning version"), {"key": row}
        ).scalar_one()
        made = name or self._name()
        self.session.execute(
            sa.insert(OPERATION).values(id=made, kind=kind, key=key, version=version, amount=amount, ref=ref)
        )
        return made

    def _name(self) -> str:
        self.count += 1
        return f"{self.transaction}.{self.count}"

    def _put(self, key: str) -> None:
        amount = self.draw.randint(1, 1000)
        made = self._record("index.put", key, key, amount=amount)
        text = " ".join(self.draw.choices(("heron", "wren", "owl", "swift", "robin"), k=self.draw.randint(1, 200)))
        self.outbox.index.put(self.session, key, text=text, data={"op": made, "amount": amount})

    def _delete(self, key: str) -> None:
        made = self._record("index.delete", key, key)
        self.outbox.emit(self.session, "index", "delete", key, {"op": made})

    def _due(self) -> None:
        amount, when = (
            self.draw.randint(1, 1000),
            dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.draw.random() * 5),
        )
        name = self._name()
        key = f"due/{name}"
        self._lock(key)
        self._record("index.due", key, key, amount=amount, name=name)
        payload = {"text": "later", "data": {"op": name, "amount": amount}}
        self.outbox.emit(self.session, "index", "put", key, payload, due=when)

    def _poison(self, key: str) -> None:
        made = self._record("index.poison", key, key)
        self.outbox.emit(self.session, "index", "put", key, {"op": made, "titel": "no such member"})

    def _file(self, key: str) -> None:
        row: Any = self.session.execute(sa.text("select digest from thing where key = :key"), {"key": key})
        before = row.scalar_one()
        if before:
            self._record("blob.delete", before, key)
            self.outbox.blobs.delete(self.session, before)
        name = self._name()
        content = name.encode() + b"\n" + self.draw.randbytes(self.draw.choice((0, 100, 10_000, 200_000)))
        blob = self.outbox.blobs.put(self.session, content)
        self._record("blob.put", blob.digest, key, amount=blob.size, name=name)
        self.session.execute(
            sa.text("update thing set digest = :digest where key = :key"), {"digest": blob.digest, "key": key}
        )

    def _mail(self) -> None:
        name = self._name()
        ref = self.outbox.mail.send(
            self.session,
            sender="a@outbox.example",
            to="b@outbox.example",
            subject=name,
            text="text",
            key=f"mail/{name}",
        )
        self._lock(f"mail/{name}")
        self._record("mail.send", f"mail/{name}", f"mail/{name}", ref=ref, name=name)

    def _note(self, key: str) -> None:
        made = self._record("witness.note", key, key)
        self.outbox.emit(self.session, "witness", "note", key, {"op": made})


if __name__ == "__main__":
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    sys.exit(Application(*sys.argv[1:]).run(stop))
