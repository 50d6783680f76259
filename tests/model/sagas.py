"""Sagas, model-based: hypothesis drives a real engine and a real reader on a real Postgres, and kills them.

The truth is kept outside of the sagas' tables: what the sink was made to do (it keeps its own position, as an index
does), and a table of what function steps did. Run by tests/integration and, for longer, by tests/faults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import workers.engine
import workers.reader
from outbox.errors import Permanent, Unavailable
from tests.model.sagasite import Deed, Killed, Site, Truth

FATES = ("applied", "retry", "poison", "doubt: happened", "doubt: did not")
#: Where the engine is killed, and where the sink's worker is.
ENGINE_GAPS = ("saga.written", "saga.committed", "reader.applied", "reader.recorded", "parked.taken")
SINK_GAPS = ("reader.aside", "reader.applied", "reader.recorded", "parked.taken", "parked.applied", "parked.recorded")
NAMES = st.sampled_from(("row", "diamond", "asks", "locked", "family"))
ROUNDS = 60
"""Rounds of a minute each within which everything ends once nothing fails any more (I10)."""


class Sagas(RuleBasedStateMachine):
    """Sagas are started, signalled, cancelled and helped; workers step, fail, die and come back."""

    site: Site

    def __init__(self) -> None:
        super().__init__()
        site = self.site
        site.fates.clear()
        site.broken.clear()
        site.armed = ""
        self.started: list[UUID] = []
        self.ended: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        """Of a run before, which may have failed half-way."""
        site = self.site
        if site._engine is not None:
            site.kill_engine()
        if site._sink is not None:
            site.kill_sink()
        site.admin.execute("set session_replication_role = replica")
        old = site.sink
        site.sink = Truth(site.fates)
        site.sink.own = old.own
        for _ in range(2):
            site.admin.execute(
                "delete from outbox.saga; delete from outbox.saga_step; delete from outbox.saga_timer; "
                "delete from outbox.saga_lock; delete from outbox.saga_event; delete from outbox.parked; "
                "update outbox.lane set deaths = 0, suspect = null"
            )
            site.sinker_made()
            site.settle()
        site.admin.execute("delete from deed; delete from outbox.saga; set session_replication_role = origin")
        site.sink.deeds.clear()

    # ---------------------------------------------------------------------------------------- what goes on

    @initialize(names=st.lists(NAMES, min_size=2, max_size=5), lock=st.sampled_from(("x", "y")))
    def begin(self, names: list[str], lock: str) -> None:
        for name in names:
            self.start(name, None, lock)

    @rule(
        name=NAMES,
        key=st.sampled_from((None, None, "one")),
        lock=st.sampled_from(("x", "y")),
    )
    def start(self, name: str, key: str | None, lock: str) -> None:
        if len(self.started) < 8:
            made = f"{id(self)}:{key}" if key else None
            self.started.append(self.site.start(self.site.sagas[name], {"lock": lock}, key=made))

    @rule()
    def tick(self) -> None:
        self.site.clock.step()

    @rule(rounds=st.integers(1, 4))
    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            for who in ("engine", "sink"):
                self.site.clock.step()
                self._step(who, None)

    @rule(who=st.sampled_from(("engine", "sink")))
    def alone(self, who: str) -> None:
        self.site.clock.step()
        self._step(who, None)

    @rule(
        death=st.sampled_from([*(("engine", gap) for gap in ENGINE_GAPS), *(("sink", gap) for gap in SINK_GAPS)]),
        fates=st.dictionaries(st.sampled_from("abcpr"), st.sampled_from(FATES)),
        cancelled=st.booleans(),
    )
    def kill(self, death: tuple[str, str], fates: dict[str, str], cancelled: bool) -> None:
        who, gap = death
        if who == "sink":
            self.site.fates.update(dict.fromkeys("abcpr", "retry") if gap.startswith("parked") else fates)
        self._kill(who, gap)
        if cancelled:
            # Before anybody has come up again.
            for saga in self.started:
                self.site.cancel(saga)
            self._step("sink" if who == "engine" else "engine", None)

    def _kill(self, who: str, gap: str) -> None:
        """Go on until one dies there."""
        for _ in range(4):
            self.site.clock.step()
            if self._step(who, gap):
                return
            self._step("sink" if who == "engine" else "engine", None)
            if gap.startswith("parked"):
                self.site.later(25)

    def _step(self, who: str, gap: str | None) -> bool:
        """Have one do a piece of work. → whether it died of it."""
        site = self.site
        site.sinker_made()
        if site._engine is None:
            site.later(0)  # its connection is new
        reader = site.engine if who == "engine" else site.sinker
        reader.decided()
        site.armed = gap or ""
        try:
            reader.step()
        except Unavailable:
            assert site.sink.down  # type: ignore[attr-defined]
        except Killed:
            if who == "engine":
                site.kill_engine()
            else:
                site.kill_sink()
            return True
        finally:
            site.armed = ""
        return False

    @rule(fates=st.dictionaries(st.sampled_from("abcpr"), st.sampled_from(FATES), min_size=1))
    def trouble(self, fates: dict[str, str]) -> None:
        self.site.fates.update(fates)

    @rule()
    def calm(self) -> None:
        self.site.fates.clear()
        self.site.broken.clear()
        self.site.sink.down = False  # type: ignore[attr-defined]

    @rule(down=st.booleans())
    def outage(self, down: bool) -> None:
        self.site.sink.down = down  # type: ignore[attr-defined]

    @rule(
        steps=st.sets(st.sampled_from(("a", "b", "f", "p-f", "r-f")), min_size=1),
        error=st.sampled_from((ValueError("later"), ValueError("later"), Permanent("never"))),
    )
    def bug(self, steps: set[str], error: Exception) -> None:
        self.site.broken.update(dict.fromkeys(steps, error))

    @rule(seconds=st.sampled_from((25.0, 130.0, 1000.0)))
    def time(self, seconds: float) -> None:
        self.site.later(seconds)

    @rule(which=st.integers(0, 7), accepted=st.booleans())
    def signal(self, which: int, accepted: bool) -> None:
        if self.started:
            self.site.signal(self.started[which % len(self.started)], "go", accepted=accepted)

    @rule(which=st.sets(st.integers(0, 7), min_size=1))
    def cancel(self, which: set[int]) -> None:
        for saga in {self.started[n % len(self.started)] for n in which}:
            self.site.cancel(saga)

    @rule(how=st.sampled_from(("retry", "skip")))
    def operator(self, how: str) -> None:
        """One who looks at what is parked for a retry, and at what is in doubt."""
        self.site.admin.execute(
            "select outbox.decide(%s, array(select id from outbox.parked where reason = 'retry' and target = 'sink'))",
            (how,),
        )
        self.resolve()

    @rule()
    def resolve(self) -> None:
        """An operator finds out how it was, and says so."""
        site = self.site
        doubts = site.admin.execute(
            "select p.id, t.saga, t.step from outbox.parked p left join outbox.saga_step t on t.intent = p.id "
            "where p.reason = 'in_doubt'"
        ).fetchall()
        for number, saga, step in doubts:
            happened = number in site.sink.deeds  # type: ignore[attr-defined]
            # Either of the two commands.
            if saga is not None and number % 2:
                site.admin.execute("select outbox.saga_ask(%s, 'resolve', %s, %s)", (saga, step, happened))
            else:
                word = "applied" if happened else "not_applied"
                site.admin.execute("select outbox.decide(%s, array[%s::bigint])", (word, number))
        deeds = Counter(site.deeds())
        stuck = site.admin.execute(
            "select s.id::text, t.step, s.decision, t.intent from outbox.saga s "
            "join outbox.saga_step t on t.saga = s.id where t.state = 'stuck'"
        ).fetchall()
        for saga, step, decision, _ in stuck:
            # Nobody knows of a pivot; anything else is tried again.
            happened = deeds[Deed(saga, step, decision == "abort")] > 0
            more = {"step": step, "happened": happened} if decision == "open" else {"step": step}
            site.ask(UUID(saga), "resolve" if decision == "open" else "retry", **more)

    # -------------------------------------------------------------------------------------------- what holds

    @invariant()
    def either_or(self) -> None:
        """An ended saga is one or the other, and stays so (I3, I7)."""
        site = self.site
        rows = site.admin.execute("select id::text, state, reason, name from outbox.saga").fetchall()
        deeds = site.deeds()
        for saga, state, reason, name in rows:
            assert (
                self.ended.setdefault(saga, state) == state
                if state in ("completed", "compensated")
                else (saga not in self.ended)
            ), f"{name} was {self.ended[saga]}, and is {state}"
            if state == "stuck":
                assert reason, "a stuck saga says why"
            if saga in self.ended:
                mine = [deed for deed in deeds if deed.saga == saga]
                self._consistent(saga, state, [(deed.step, deed.undo) for deed in mine])

    def _consistent(self, saga: str, state: str, deeds: list[tuple[str, bool]]) -> None:
        site = self.site
        steps = site.steps(UUID(saga))
        noted = site.admin.execute("select step, what from outbox.saga_event where saga = %s", (saga,)).fetchall()
        unknown = {step for step, what in noted if what == "unknown"}
        skipped = {step for step, what in noted if what == "parked: skip"}
        for step, is_in in steps.items():
            mine = [undo for one, undo in deeds if one == step]
            about = f"{step} of a {state} saga is {is_in}: {mine}"
            assert mine.count(False) <= 1 or step in unknown, f"once: {about}"
            if step in ("go", "sleep", "sub") or (is_in == "skipped" and step in skipped):
                continue  # nothing of its own, or left out by an operator, who sees to it
            if state == "completed":
                assert True not in mine, f"nothing is undone: {about}"
                assert is_in == "done", about
                assert mine, f"everything is done: {about}"
            else:
                assert step not in ("p", "r", "p-f", "r-f") or not mine, f"never beyond the pivot: {about}"
                assert not mine or mine[-1], f"undone, and not done after that: {about}"
                assert is_in in ("undone", "failed", "skipped"), about

    def teardown(self) -> None:
        """Nothing fails any more: everything ends, and nothing is left (I2, I10)."""
        site = self.site
        site.fates.clear()
        site.broken.clear()
        site.sink.down = False  # type: ignore[attr-defined]
        for _ in range(ROUNDS):
            site.sinker_made()
            site.later(0)
            for reader in (site.engine, site.sinker):
                reader.decided()
            site.settle()
            self.resolve()
            site.later(60)
            if not self._open():
                break
        assert not self._open(), f"these never end: {self._open()}"
        # What was set before rings in vain.
        site.later(10_000)
        site.settle()
        self.either_or()
        assert set(map(str, self.started)) <= set(self.ended), "a saga that was started is not there"
        for table in ("saga_lock", "saga_timer"):
            assert site.admin.execute(f"select count(*) from outbox.{table}").fetchone() == (0,), table
        left = site.admin.execute("select id, reason, error from outbox.parked where reason <> 'skipped'").fetchall()
        assert not left, f"parked: {left}"

    def _open(self) -> list[Any]:
        return self.site.admin.execute(
            "select s.name, s.state, s.reason, (select json_agg(array[t.step, t.state, t.intent::text] order by place) "
            "from outbox.saga_step t where t.saga = s.id) from outbox.saga s where s.ended_at is null"
        ).fetchall()


@contextmanager
def machine(*given: Any) -> Iterator[type[Sagas]]:
    """The machine for a database; `.site.reached` counts the deaths."""
    site = Site(*given)
    modules = vars(workers.reader), vars(workers.engine)
    hits = [module["hit"] for module in modules]
    for module in modules:
        module["hit"] = site.hit
    try:
        yield type("Machine", (Sagas,), {"site": site})
    finally:
        for module, hit in zip(modules, hits, strict=True):
            module["hit"] = hit
        site.close()
