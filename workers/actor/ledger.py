"""The ledger: writes down what became of messages, for many at once.

`write` puts everything that is to be said of all lanes into one transaction: positions with what is open, messages
that are to be tried again or have failed for good, what sagas are told. A lane's part counts only while its epoch is
current, and that of a message with a row of its own only while this consumer is its holder. When it returns, all that
is durable, and what was not ours any more is known. If the database is lost in between, the same is written again:
every part of it can be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from outbox import parked, sql
from outbox.actor.delivered import Delivered
from outbox.actor.results import Result, store
from outbox.database import Connection
from outbox.errors import Fenced, IntentRefused
from outbox.failpoint import hit
from outbox.intent import Intent, payload_text
from outbox.parked import ERROR_LIMIT, Parking
from outbox.retry import Backoff
from outbox.saga import report
from outbox.saga.report import Report
from workers.actor import line
from workers.actor.consumer import Said
from workers.actor.holding import Holding

logger = logging.getLogger("outbox.actor")

BACKOFF = Backoff(first=1.0, limit=60.0)
"""For what dramatiq's middleware was to send again and couldn't."""

OVER = "it is over its rate limit, and waits for its turn"
"""What is shown of such a message."""

_NOT_KEPT = ("eta", "traceback")
"""Options that an earlier try has left and the next one doesn't need. A traceback may quote arguments."""


class Settled(NamedTuple):
    """A message that dramatiq has given back."""

    message: Delivered
    said: Said
    #: Why not, if it failed: the exception is gone later.
    error: str = ""
    options: dict[str, Any] | None = None


class _Row(NamedTuple):
    """What is written of a message that has a row of its own; no reason: it is done."""

    id: int
    reason: str | None
    attempts: int = 0
    deaths: int = 0
    wait: float = 0.0
    error: str = ""


class Ledger:
    """What is to be written next. Used by the delivery's thread alone."""

    def __init__(self, holder: UUID) -> None:
        self._holder = holder
        #: Kept until it is written, however often that fails.
        self._rows: list[_Row] = []
        self._kept: dict[int, str] = {}
        self._told: dict[int, Report] = {}
        self._forget: set[int] = set()
        #: The keys of messages with rows of their own, who others may take the place of.
        self._keys: dict[int, tuple[str, str]] = {}
        #: Whether somebody has got his turn with what was written last.
        self.turned = False
        self._results: dict[int, Result] = {}
        #: Of messages that their actors have acknowledged already, whoever has their lanes by now.
        self._late: list[Result] = []
        self._rings: list[str] = []
        #: Messages of lanes whose actor's own transaction may have committed after all.
        self._unsure: dict[int, Delivered] = {}

    def settle(self, one: Settled, holding: Holding | None) -> None:
        """Take down what became of a message. `holding`: the lane that it came from, or None if that is lost, or if it
        has a row of its own."""
        message = one.message
        if holding is not None:
            if one.said is Said.DONE and message.plain:
                holding.done(message.id)
                return
            if one.said is Said.BACK:
                return  # what was not begun stays open, for the next owner
        parking = self._parking(one)
        kept = parking if message.of_saga is False or one.said is not Said.DEAD else None  # else its saga's affair
        told = None if message.done else self._report(message, parking)
        result = message.result if one.said in (Said.DONE, Said.DEAD) else None
        if result is not None and message.done:
            if message.result_stored:
                self._rings.append(result.key)
            else:
                self._late.append(result)
            result = None
        if message.hold.holder is not None:
            self._settle_own(one, kept, told)
        elif holding is not None:
            self._settle_lane(message, holding, kept, told)
        else:
            return
        if result is not None:
            (self._results if holding is None else holding.results)[message.id] = result
        if kept is not None and one.options is not None:
            self._keep(message, one.options)

    def _settle_lane(self, message: Delivered, holding: Holding, parking: Parking | None, told: Report | None) -> None:
        holding.done(message.id)
        if message.turn is not None:
            holding.line.done(message.turn, message.id)
        if message.done:
            holding.forget.append(message.id)
        elif message.in_transaction:
            self._unsure[message.id] = message
        if parking is not None:
            holding.parkings.append(parking)
        if told is not None:
            holding.reports.append(told)

    def _settle_own(self, one: Settled, parking: Parking | None, told: Report | None) -> None:
        message = one.message
        if message.turn is not None:
            self._keys[message.id] = (message.hold.target, message.turn.key)
        if one.said is Said.BACK:
            self._rows.append(_Row(message.id, "retry", message.attempts - 1, message.deaths - 1))
        elif parking is not None:
            deaths = message.deaths - 1 if one.said is Said.WAIT else 0
            self._rows.append(_Row(message.id, parking.reason, parking.attempts, deaths, parking.wait, parking.error))
        elif not message.done:  # its row is gone, if its actor has acknowledged it
            self._rows.append(_Row(message.id, None))
            self._forget.update([message.id] if message.kept else [])
            if told is not None:
                self._told[message.id] = told

    @staticmethod
    def _parking(one: Settled) -> Parking | None:
        message = one.message
        attempts = max(1, message.attempts)
        if one.said is Said.DEAD:
            return Parking(message.id, "poison", attempts, error=one.error)
        if one.said is Said.WAIT:
            # As if it had never been taken.
            return Parking(message.id, "retry", max(0, message.attempts - 1), message.wait or 0.0, OVER)
        if one.said is Said.RETRY:
            wait = BACKOFF.wait(attempts) if message.retry is None else message.retry
            return Parking(message.id, "retry", attempts, wait, one.error)
        return None

    @staticmethod
    def _report(message: Delivered, parking: Parking | None) -> Report | None:
        if not message.of_saga or (parking is not None and parking.reason == "retry"):
            return None
        return Report(message.id, "applied") if parking is None else Report(message.id, "failed", parking.error)

    def _keep(self, message: Delivered, options: dict[str, Any]) -> None:
        try:
            self._kept[message.id] = payload_text({k: v for k, v in options.items() if k not in _NOT_KEPT})
        except IntentRefused:
            logger.warning("intent %d: what its options have become can't be kept: it goes on with the old", message.id)

    def withdraw(self, intent: Intent, *, told: bool) -> None:
        """A message with a row of its own is recalled by its saga, and was never begun."""
        number = intent.id
        self._keys[number] = (intent.target, intent.key)
        self._rows.append(_Row(number, None))
        self._forget.add(number)
        if not told:
            self._told[number] = Report(number, "void")

    @property
    def rows(self) -> set[int]:
        """Messages with rows of their own of which something is to be written."""
        return {row.id for row in self._rows}

    # --------------------------------------------------------------------------------------- writing

    def nothing(self, holdings: Sequence[Holding]) -> bool:
        """Whether there is nothing to write."""
        rows = self._rows or self._keys or self._late or self._rings
        return not (rows or any(holding.to_write for holding in holdings))

    def write(self, conn: Connection, holdings: Sequence[Holding]) -> set[Holding]:
        """Write everything down. → the lanes among `holdings` that turn out to have another owner."""
        changed = [holding for holding in holdings if holding.to_write]
        more = self._rows or self._keys or self._unsure or self._late or self._rings
        plain = not (more or any(h.parkings or h.reports or h.forget or h.results or h.line.changed for h in changed))
        self.turned = False
        if plain:
            current = _positions(conn, changed)
        else:
            with conn.transaction():
                lanes = {(one.hold.target, one.hold.lane) for one in self._unsure.values()}
                done = self._closed(conn, lanes, list(self._unsure)) if lanes else set()
                current = _positions(conn, changed)
                self._lanes(conn, [holding for holding in changed if holding in current], done)
                self._own(conn)
                self.turned = line.turn(conn, self._next(holdings, current)) > 0
                if self._late:
                    store(conn, self._late)
                if self._rings:
                    conn.execute("select outbox.ring(%s)", (self._rings,))
                hit("actor.recording")
        hit("actor.recorded")
        for holding in current:
            holding.wrote()
        self._rows, self._kept, self._told, self._forget, self._unsure, self._keys = [], {}, {}, set(), {}, {}
        self._results, self._late, self._rings = {}, [], []
        return set(changed) - current

    def _next(self, holdings: Sequence[Holding], current: set[Holding]) -> dict[tuple[str, str], int]:
        """The keys of which somebody may have his turn now → how many are still in the hands of our lanes."""
        keys = {
            (target, key): sum(h.line.busy(key) for h in holdings if h.lane.target == target)
            for target, key in self._keys.values()
        }
        for holding in current:
            keys |= {(holding.lane.target, key): busy for key, busy in holding.line.next().items()}
        return keys

    def _lanes(self, conn: Connection, holdings: Sequence[Holding], done: set[int]) -> None:
        """What goes with the positions of lanes."""
        parkings = [p for holding in holdings for p in holding.parkings if p.id not in done]
        forget = {number for holding in holdings for number in holding.forget} | done
        if parkings:
            parked.put(conn, parkings)
            self._store(conn, [p.id for p in parkings])
        if forget:
            conn.execute(sql.load("actor_forget"), {"ids": sorted(forget)})
        report.send_of_actors(conn, [r for holding in holdings for r in holding.reports if r.id not in done])
        if results := [r for holding in holdings for number, r in holding.results.items() if number not in done]:
            store(conn, results)

    def _own(self, conn: Connection) -> None:
        """Messages with rows of their own: as far as they are still ours."""
        if not self._rows:
            return
        found = conn.execute(
            sql.load("actor_settle"),
            {
                "holder": self._holder,
                "ids": [row.id for row in self._rows],
                "reasons": [row.reason for row in self._rows],
                "attempts": [row.attempts for row in self._rows],
                "deaths": [row.deaths for row in self._rows],
                "waits": [row.wait for row in self._rows],
                "errors": [row.error[:ERROR_LIMIT] for row in self._rows],
            },
        )
        mine = {row[0] for row in found}
        self._store(conn, [row.id for row in self._rows if row.id in mine])
        if forget := sorted(self._forget & mine):
            conn.execute(sql.load("actor_forget"), {"ids": forget})
        report.send_of_actors(conn, [told for number, told in self._told.items() if number in mine])
        if results := [result for number, result in self._results.items() if number in mine]:
            store(conn, results)

    def _store(self, conn: Connection, ids: Sequence[int]) -> None:
        kept = {number: self._kept[number] for number in ids if number in self._kept}
        if kept:
            conn.execute(sql.load("actor_keep"), {"ids": list(kept), "options": list(kept.values())})

    def release(self, conn: Connection, holding: Holding, running: Sequence[Delivered]) -> list[Delivered]:
        """Give a lane up. → those of its running messages that have rows of their own now: all that aren't done.

        What nobody has begun stays open, for the next owner. Raises `Fenced`.
        """
        lane = holding.lane
        rest = holding.open.difference(message.id for message in running)
        with conn.transaction():
            # Holds the lane against actors that are just acknowledging, too.
            done = self._closed(conn, {(lane.target, lane.lane)}, [message.id for message in running])
            aside = [message for message in running if message.id not in done]
            if not _positions(conn, [holding], rest):
                raise Fenced(f"lane {lane} has a new owner (this one's epoch was {lane.epoch}): it stops")
            if aside:
                conn.execute(sql.load("actor_aside"), {"ids": [m.id for m in aside], "holder": self._holder})
            if done:
                conn.execute(sql.load("actor_forget"), {"ids": sorted(done)})
            lane.release(conn)
        hit("actor.released")
        return aside

    @staticmethod
    def _closed(conn: Connection, lanes: Iterable[tuple[str, int]], ids: Sequence[int]) -> set[int]:
        """Those that their actors have acknowledged. Waits for actors that are about to."""
        ordered = sorted(lanes)
        conn.execute(sql.load("actor_hold"), {"targets": [t for t, _ in ordered], "lanes": [n for _, n in ordered]})
        rows = conn.execute(sql.load("actor_closed"), {"ids": list(ids)})
        return {row[0] for row in rows}


def _positions(conn: Connection, holdings: Sequence[Holding], opens: Collection[int] | None = None) -> set[Holding]:
    """Append positions, of one lane with these `opens`. → those whose epoch is current."""
    if not holdings:
        return set()
    rows = conn.execute(
        sql.load("actor_record"),
        {
            "targets": [h.lane.target for h in holdings],
            "lanes": [h.lane.lane for h in holdings],
            "epochs": [h.lane.epoch for h in holdings],
            "ticks": [h.position.tick for h in holdings],
            "uptos": [h.position.upto for h in holdings],
            "afters": [h.position.after for h in holdings],
            "opens": ["{" + ",".join(map(str, sorted(h.open if opens is None else opens))) + "}" for h in holdings],
        },
    ).fetchall()
    found = {(row[0], row[1]) for row in rows}
    return {h for h in holdings if (h.lane.target, h.lane.lane) in found}
