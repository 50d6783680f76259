"""Decisions of operators against real lanes: what they do, and that they and a worker's try never mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest

from outbox import audit, decision, tick
from outbox.intent import Intent
from outbox.participant import Evidence, Outcome, Verdict
from outbox.position import Position
from outbox.retry import Backoff
from tests.fixtures.lanes import Bench, Sink, keys
from tests.fixtures.site import LIMIT, until
from tests.integration.test_reader import POISON, RETRY, Ambivalent, Keeper, KillerDied

LATER = Backoff(first=3600, limit=3600)


def refusals(conn: psycopg.Connection[Any], action: decision.Action, *ids: int) -> list[str | None]:
    return [one.refused for one in decision.decide(conn, action, ids)]


def rows(bench: Bench, query: str) -> list[tuple[Any, ...]]:
    return bench.admin.execute(query).fetchall()


def test_decision_retry_i4_lets_a_poison_intent_and_those_behind_it_go_in_order(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    # Given: a key whose head is poison, and another key that flows
    bench.sink.fate["k"] = POISON
    first, *_ = (bench.emit("k", n) for n in (1, 2, 3))
    bench.emit("other", 0)
    reader = bench.reader()
    bench.drain(reader)
    assert bench.parked() == {"poison": ["k"], "blocked": ["k", "k"]}
    assert bench.sink.effects == [("other", 0)]

    # When: the cause is gone, and an operator says so
    bench.sink.fate.clear()
    assert refusals(operator, "retry", first) == [None]
    bench.drain(reader)

    # Then
    assert bench.sink.effects[1:] == [("k", 1), ("k", 2), ("k", 3)]
    assert bench.parked() == {}


def test_decision_retry_begins_to_count_anew_when_tries_were_used_up(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = RETRY
    number = bench.emit("k")
    reader = bench.reader(backoff=Backoff(first=0, limit=0, attempts=3))
    bench.drain(reader)
    assert bench.parked() == {"poison": ["k"]}
    assert refusals(operator, "retry", number) == [None]
    bench.drain(reader)
    assert rows(bench, "select reason, attempts from outbox.parked") == [("poison", 3)]


def test_decision_skip_i4_gives_the_next_of_the_key_its_turn_and_later_ones_pass(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = POISON
    first = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    bench.emit("k", 2)
    bench.drain(reader)
    bench.sink.fate.clear()
    assert refusals(operator, "skip", first) == [None]
    reader.decided()
    bench.drain(reader)
    bench.emit("k", 3)
    bench.drain(reader)
    assert bench.sink.effects == [("k", 2), ("k", 3)]
    assert bench.parked() == {"skipped": ["k"]}
    assert refusals(operator, "retry", first) == ["it was skipped: emit another intent instead"]


def test_decision_skip_tries_nothing_that_is_to_be_skipped_too(bench: Bench, operator: psycopg.Connection[Any]) -> None:
    bench.sink.fate["k"] = POISON
    ids = [bench.emit("k", n) for n in range(5)]
    reader = bench.reader()
    bench.drain(reader)
    bench.sink.fate.clear()
    # One at a time, as with many: the worker may look in between.
    for number in reversed(ids[:4]):
        assert refusals(operator, "skip", number) == [None]
        reader.decided()
        bench.drain(reader)
    assert bench.sink.effects == [("k", 4)]


def test_decision_skip_i3_holds_when_a_participant_is_restored_from_an_older_copy(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    # Given: a participant that keeps its position, and a copy of it from before
    keeper = Keeper()
    bench.emit("a", 1)
    bench.drain(bench.reader(sink=keeper))
    copy = keeper.own
    keeper.fate["k"] = POISON
    number = bench.emit("k", 2)
    bench.emit("k", 3)
    reader = bench.reader(lane=reclaimed(bench), sink=keeper)
    bench.drain(reader)
    assert refusals(operator, "skip", number) == [None]
    keeper.fate.clear()
    reader.decided()
    bench.drain(reader)
    assert keeper.effects == [("a", 1), ("k", 3)]

    # When: the copy reads the log again
    restored = Keeper()
    restored.own = copy
    bench.drain(bench.reader(lane=reclaimed(bench), sink=restored))

    # Then: what was skipped stays skipped, and isn't parked again
    assert restored.effects == [("k", 3)]
    assert bench.parked() == {"skipped": ["k"]}


def reclaimed(bench: Bench) -> Any:
    bench.die()
    return bench.claim()


def test_decision_tells_the_workers_and_a_refusal_does_not(
    bench: Bench, operator: psycopg.Connection[Any], worker: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = POISON
    number = bench.emit("k")
    bench.drain(bench.reader())
    worker.execute(f"listen {tick.CHANNEL}")
    assert refusals(operator, "applied", number) != [None]
    assert refusals(operator, "retry", number) == [None]
    heard = [notice.payload for notice in worker.notifies(timeout=LIMIT, stop_after=1)]
    assert heard == [tick.DECIDED]


# --------------------------------------------------------------------------------- against a worker's try


class Watched(Sink):
    """Calls back while it applies."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
        self.meanwhile()
        return super().apply(batch, position)


@pytest.mark.parametrize("action", ["retry", "skip"])
def test_decision_i3_is_refused_while_a_worker_tries_and_taken_before_and_after(
    bench: Bench, operator: psycopg.Connection[Any], action: decision.Action
) -> None:
    # Given: one intent that failed
    sink = Watched()
    sink.fate["k"] = RETRY
    number = bench.emit("k", 1)
    reader = bench.reader(sink=sink, backoff=LATER)
    bench.drain(reader)
    assert refusals(operator, "retry", number) == [None]

    # When: the operator acts while it is being tried
    said: list[str | None] = []
    sink.meanwhile = lambda: said.extend(refusals(operator, action, number))
    bench.drain(reader)

    # Then: refused, and nothing of it is in the audit trail; afterwards it is taken, and the worker finds it
    assert said == ["it is being tried right now: look again"]
    assert len(audit.find(operator, intent=number)) == 1
    sink.meanwhile = lambda: None
    sink.fate.clear()
    assert refusals(operator, action, number) == [None]
    bench.drain(reader)
    assert sink.effects == ([("k", 1)] if action == "retry" else [])


def test_decision_i6_fences_an_owner_whose_lease_ran_out_in_the_middle_of_a_try(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    from outbox.errors import Fenced

    sink = Watched()
    sink.fate["k"] = RETRY
    number = bench.emit("k", 1)
    reader = bench.reader(sink=sink)
    bench.drain_once(reader)

    def paused() -> None:
        bench.die()
        assert refusals(operator, "skip", number) == [None]

    sink.meanwhile = paused
    with pytest.raises(Fenced):
        bench.drain(reader)
    assert bench.parked() == {"skipped": ["k"]}
    # The lane is free, for an owner with a higher epoch.
    sink.meanwhile = lambda: None
    bench.emit("k", 2)
    sink.fate.clear()
    bench.drain(bench.reader(sink=sink))
    assert sink.effects == [("k", 2)]


def test_decision_skip_i4_is_not_undone_by_a_worker_that_gives_the_same_intent_its_turn(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    # Given: a head that is about to succeed, two behind it, and an operator who is skipping the first of them
    bench.sink.fate["k"] = RETRY
    ids = [bench.emit("k", n) for n in (1, 2, 3)]
    reader = bench.reader(backoff=LATER)
    bench.drain(reader)
    bench.sink.fate.clear()
    assert refusals(operator, "retry", ids[0]) == [None]
    failed: list[BaseException] = []

    def drain() -> None:
        try:
            bench.drain(reader)
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    worker = threading.Thread(target=drain)
    with operator.transaction():
        assert refusals(operator, "skip", ids[1]) == [None]
        # When: the worker has applied the head, and wants to give the next its turn
        worker.start()
        waits = (
            "select from pg_stat_activity where wait_event_type = 'Lock' and usename = 'outbox_worker' "
            "and datname = current_database()"
        )
        until(lambda: rows(bench, waits), "the worker waits for the operator")
    worker.join(LIMIT)
    assert not failed
    assert not worker.is_alive()

    # Then: the skipped one stays skipped, and the one behind it comes
    reader.decided()
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1), ("k", 3)]
    assert bench.parked() == {"skipped": ["k"]}


def test_reader_leaves_an_intent_alone_that_an_operator_is_deciding_about(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = bench.sink.fate["l"] = RETRY
    number = bench.emit("k", 1)
    bench.emit("l", 2)
    reader = bench.reader(backoff=LATER)
    bench.drain(reader)
    bench.sink.fate.clear()
    bench.admin.execute("update outbox.parked set retry_at = outbox.now()")
    with operator.transaction():
        assert refusals(operator, "skip", number) == [None]
        bench.drain(reader)  # doesn't wait, and doesn't try it
        assert bench.sink.effects == [("l", 2)]
    bench.drain(reader)
    assert bench.sink.effects == [("l", 2)]


def test_reader_counts_no_try_and_no_death_for_what_the_participant_left_untried(bench: Bench) -> None:
    # Given: three parked intents, and a participant that goes down after the first of a batch
    class Tired(Sink):
        def apply(self, batch: Sequence[Intent], position: Position | None) -> Sequence[Outcome]:
            return super().apply(batch[:1], position)

    bench.sink.fate.update(dict.fromkeys("abc", RETRY))
    for key in "abc":
        bench.emit(key)
    bench.drain(bench.reader(backoff=LATER))
    before = rows(bench, "select key, attempts, deaths from outbox.parked order by id")
    bench.admin.execute("update outbox.parked set retry_at = outbox.now()")
    bench.die()
    reader = bench.reader(sink=Tired(), backoff=LATER)
    reader._parked_at = 0.0
    # When
    assert reader._retry_parked()
    # Then
    after = rows(bench, "select key, attempts, deaths, trying from outbox.parked order by id")
    assert after == [(key, attempts, deaths, None) for key, attempts, deaths in before[1:]]


# ------------------------------------------------------------------------------------------ in doubt


def doubtful(bench: Bench) -> tuple[Ambivalent, int]:
    """An intent in doubt: its worker died after the effect, and nothing can tell."""
    sink = Ambivalent()
    sink.die_after_effect = True
    number = bench.emit("k", 1)
    bench.clock.step()
    with pytest.raises(KillerDied):
        bench.drain(bench.reader(sink=sink))
    bench.die()
    return sink, number


def test_decision_applied_i3_closes_the_receipt_for_good(bench: Bench, operator: psycopg.Connection[Any]) -> None:
    sink, number = doubtful(bench)
    bench.emit("k", 2)
    reader = bench.reader(sink=sink)
    bench.drain(reader)
    assert bench.parked() == {"in_doubt": ["k"], "blocked": ["k"]}
    for action in ("retry", "skip"):
        assert refusals(operator, action, number) == ["its effect may have happened: resolve it"]

    assert refusals(operator, "applied", number) == [None]
    reader.decided()
    bench.drain(reader)

    assert sink.effects == [("k", 1), ("k", 2)]
    state, evidence = rows(bench, f"select state, evidence from outbox.receipt where id = {number}")[0]
    assert (state, evidence["heuristic"]) == ("closed", {"applied": True, "by": "outbox_operator"})
    # Whatever reads the log again, it is not sent again.
    bench.admin.execute("delete from outbox.position")
    bench.drain(bench.reader(lane=reclaimed(bench), sink=sink))
    assert sink.effects == [("k", 1), ("k", 2)]


def test_decision_not_applied_tries_again_and_keeps_what_is_known_to_be_done(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    sink, number = doubtful(bench)
    reader = bench.reader(sink=sink)
    bench.drain(reader)
    evidence = '{"accepted": {"0": "Q1"}, "doubt": "2026-01-01T00:00:00+00:00"}'
    bench.admin.execute("update outbox.receipt set evidence = %s where id = %s", (evidence, number))
    assert refusals(operator, "not_applied", number) == [None]
    bench.drain(reader)
    assert sink.receipts == {number: {"accepted": {"0": "Q1"}}}
    assert sink.effects == [("k", 1), ("k", 1)]
    assert bench.parked() == {}


def test_decision_retry_tries_those_again_that_were_refused_but_not_those_done(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    sink = Ambivalent()
    sink.fate["k"] = Outcome(Verdict.POISON, {"accepted": {"0": "Q1"}, "refused": {"1": "550"}}, "refused")
    number = bench.emit("k", 1)
    reader = bench.reader(sink=sink)
    bench.drain(reader)
    assert refusals(operator, "retry", number) == [None]
    sink.fate.clear()
    bench.drain(reader)
    assert sink.receipts == {number: {"accepted": {"0": "Q1"}}}


def test_decision_i3_is_refused_while_the_outcome_of_the_last_attempt_is_not_known(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    # Given: a parked mail whose worker died while it was tried again
    sink = Ambivalent()
    sink.fate["k"] = RETRY
    number = bench.emit("k", 1)
    bench.drain(bench.reader(sink=sink, backoff=LATER))
    assert refusals(operator, "retry", number) == [None]
    sink.fate.clear()
    sink.die_after_effect = True
    reader = bench.reader(lane=reclaimed(bench), sink=sink)
    with pytest.raises(KillerDied):
        bench.drain(reader)
    bench.die()
    # When, Then: nobody may skip what may have been sent
    (said,) = refusals(operator, "skip", number)
    assert said is not None
    assert "not known yet" in said
    # … until its worker has looked into it.
    sink.probed[number] = Evidence.APPLIED
    reader = bench.reader(sink=sink)
    bench.admin.execute("update outbox.parked set retry_at = outbox.now()")
    bench.drain(reader)
    assert keys(sink.effects) == ["k"]
    assert bench.parked() == {}


def test_decision_skip_is_refused_for_an_effect_that_waits_for_its_release(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    sink = Ambivalent()
    sink.fate["k"] = Outcome(Verdict.RETRY, {"accepted": {"0": "Q1"}}, "not released")
    number = bench.emit("k", 1)
    reader = bench.reader(sink=sink, backoff=LATER)
    bench.drain(reader)
    bench.admin.execute("update outbox.receipt set state = 'prepared'")
    assert refusals(operator, "skip", number) == ["its effect is prepared already, and can only be released: retry it"]
    assert refusals(operator, "retry", number) == [None]
    assert rows(bench, "select state from outbox.receipt") == [("prepared",)]


# -------------------------------------------------------------------------------------------- audit


def test_audit_has_a_row_for_what_was_done_and_none_for_what_was_refused(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = POISON
    first, second = bench.emit("k", 1), bench.emit("k", 2)
    bench.drain(bench.reader())
    done = decision.decide(operator, "retry", [first, second, 10**9], note="the cause is gone")
    assert [(one.id, one.reason, one.refused is None) for one in done] == [
        (first, "poison", True),
        (second, "blocked", False),
        (10**9, None, False),
    ]
    (row,) = audit.find(operator)
    assert (row["who"], row["client"], row["action"]) == ("outbox_operator", decision.client(), "retry")
    assert (row["intent"], row["target"], row["reason"]) == (first, "sink", "poison")
    assert (row["error"], row["note"]) == ("never", "the cause is gone")


def test_audit_is_undone_with_the_action_when_its_transaction_is_rolled_back(
    bench: Bench, operator: psycopg.Connection[Any]
) -> None:
    bench.sink.fate["k"] = POISON
    number = bench.emit("k", 1)
    bench.drain(bench.reader())
    with operator.transaction(force_rollback=True):
        assert refusals(operator, "skip", number) == [None]
    assert audit.find(operator) == []
    assert bench.parked() == {"poison": ["k"]}


def test_audit_is_append_only_for_its_owner_too(bench: Bench, operator: psycopg.Connection[Any]) -> None:
    bench.sink.fate["k"] = POISON
    number = bench.emit("k", 1)
    bench.drain(bench.reader())
    decision.decide(operator, "skip", [number])
    for statement in ("update outbox.audit set note = 'x'", "delete from outbox.audit", "truncate outbox.audit"):
        with pytest.raises(psycopg.Error, match="append-only") as caught:
            bench.admin.execute(statement)
        assert caught.value.sqlstate == "OB001"


@pytest.mark.parametrize("words", ["'explode', '{1}'", "null, '{1}'", "'skip', '{1}', repeat('x', 1001)"])
def test_decision_refuses_what_is_none(operator: psycopg.Connection[Any], words: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        operator.execute(f"select outbox.decide({words})")
    assert caught.value.sqlstate == "OB004"
