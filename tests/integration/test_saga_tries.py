"""How often a step's intent is tried, and what its saga believes of tries that failed."""

from __future__ import annotations

from typing import Any

import pytest

from outbox import Saga
from outbox.errors import Transient, Unavailable
from outbox.participant import Outcome, Verdict
from outbox.retry import Backoff
from outbox.saga.plan import Retry
from tests.fixtures.lanes import Sink
from tests.fixtures.sagas import Rig, sink_step

RETRY = Outcome(Verdict.RETRY, error="not now")
UNTOUCHED = RETRY._replace(untouched=True)
POISON = Outcome(Verdict.POISON, error="it can't be done")

THRICE = Retry(attempts=3, first=0.001, limit=0.001)


def pair(**options: Any) -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga("pair", dict)
    sink_step(saga, "a")
    sink_step(saga, "b", **options)
    if options.get("kind") == "pivot":
        sink_step(saga, "c", kind="retriable")
    return saga


class Counting(Sink):
    """Counts the tries of a key, and lets the last one through."""

    def __init__(self, key: str, lets: int) -> None:
        super().__init__()
        self.key, self.lets = key, lets
        self.tries: list[int] = []

    def apply(self, batch: Any, position: Any) -> Any:
        for intent in batch:
            if intent.key == self.key:
                self.fate.pop(self.key, None)  # its undo succeeds
            if intent.payload == self.key:
                self.tries.append(intent.id)
                if len(self.tries) < self.lets:
                    self.fate[self.key] = RETRY
        return super().apply(batch, position)


def settle_retries(rig: Rig) -> None:
    """Until what is parked for a retry has had all of its tries."""
    for _ in range(200):
        rig.admin.execute("update outbox.parked set retry_at = outbox.now() where reason = 'retry'")
        rig.settle()
        if "retry" not in rig.parked():
            return
    raise AssertionError("it is tried for ever")


@pytest.mark.parametrize("kind", ["compensatable", "pivot"])
def test_saga_i3_tries_an_intent_as_often_as_its_step_says_and_it_is_one_intent(rig: Rig, kind: str) -> None:
    # Given: a worker whose own rules would try for a day, and a step that says three times
    rig.sink = Counting("b", lets=99)
    rig._sink = rig.reader(backoff=Backoff(first=0.0, limit=0.0, attempts=60))
    saga = rig.start(pair(retry=THRICE, kind=kind), {})
    # When: it keeps failing
    settle_retries(rig)
    # Then: it was tried three times, each time as the same intent, which a participant may know by its id
    tries = rig.sink.tries
    assert len(tries) == 3
    assert len(set(tries)) == 1
    if kind == "compensatable":
        # … and because a try may have had its effect, it is undone.
        assert rig.state(saga) == "compensated"
        assert rig.done() == ["a", "undo b", "undo a"]
        assert "tried 3 times" in rig.reason(saga)
    else:
        assert rig.state(saga) == "stuck"
        assert rig.done() == ["a"]


def test_saga_goes_on_when_the_last_try_that_its_step_allows_succeeds(rig: Rig) -> None:
    rig.sink = Counting("b", lets=3)
    saga = rig.start(pair(retry=THRICE), {})
    settle_retries(rig)
    assert rig.state(saga) == "completed"
    assert rig.done() == ["a", "b"]


def test_saga_intent_is_tried_once_when_its_participant_refuses_for_good(rig: Rig) -> None:
    rig.sink.fate["b"] = POISON
    saga = rig.start(pair(retry=THRICE), {})
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]


def test_saga_tries_by_the_worker_s_rules_when_its_step_says_nothing(rig: Rig) -> None:
    rig.sink = Counting("b", lets=99)
    rig._sink = rig.reader(backoff=Backoff(first=0.0, limit=0.0, attempts=5))
    saga = rig.start(pair(), {})
    settle_retries(rig)
    assert rig.state(saga) == "compensated"
    assert len(rig.sink.tries) == 5


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("kind", ["compensatable", "pivot"])
def test_saga_i7_is_compensated_without_an_undo_when_every_try_promises_that_nothing_happened(
    rig: Rig, raises: bool, kind: str
) -> None:
    rig.sink.fate["b"] = Transient("connection refused", untouched=True) if raises else UNTOUCHED
    saga = rig.start(pair(retry=THRICE, kind=kind), {})
    settle_retries(rig)
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]


def test_saga_i7_undoes_what_a_try_may_have_done_before_the_last_one_was_refused_for_good(rig: Rig) -> None:
    # Given: a request that timed out, so that nobody knows
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["b"] = RETRY
    saga = rig.start(pair(), {})
    rig.settle()
    # … one that was refused at the door
    rig.sink.fate["b"] = UNTOUCHED
    rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
    rig.settle()
    # … and one that found the participant down
    rig.sink.fate["b"] = Unavailable("down")
    rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
    rig.sinker._parked_at = -10.0
    with pytest.raises(Unavailable):
        rig.sinker.step()
    # When: the participant says no, as it does to what it has already
    rig.sink.fate["b"] = POISON
    rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
    rig.sinker._parked_at = -10.0
    rig.sinker.step()
    rig.sink.fate.clear()
    rig.settle()
    # Then
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo b", "undo a"]


@pytest.mark.parametrize("doubtful", [False, True])
@pytest.mark.parametrize("how", ["cancel", "timeout", "skip"])
def test_saga_i7_undoes_a_parked_step_only_if_a_try_may_have_had_its_effect(rig: Rig, doubtful: bool, how: str) -> None:
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["b"] = RETRY if doubtful else UNTOUCHED
    saga = rig.start(pair(timeout=30.0), {})
    rig.settle()
    assert rig.parked() == {"retry": ["b"]}
    rig.sink.fate.clear()
    if how == "cancel":
        rig.cancel(saga)
    elif how == "timeout":
        rig.later(31)
    else:
        rig.admin.execute("select outbox.decide('skip', array(select id from outbox.parked))")
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", *(["undo b"] if doubtful else []), "undo a"]


def test_saga_step_is_known_not_to_have_happened_when_an_operator_said_so_after_a_try(rig: Rig) -> None:
    rig._sink = rig.reader(backoff=Backoff(first=3600, limit=3600))
    rig.sink.fate["b"] = RETRY
    saga = rig.start(pair(), {})
    rig.settle()
    rig.sink.fate["b"] = Outcome(Verdict.IN_DOUBT, error="nobody knows")
    rig.admin.execute("update outbox.parked set retry_at = outbox.now()")
    rig.settle()
    assert rig.parked() == {"in_doubt": ["b"]}
    rig.sink.fate["b"] = POISON
    rig.admin.execute("select outbox.decide('not_applied', array(select id from outbox.parked))")
    rig.settle()
    assert rig.state(saga) == "compensated"
    assert rig.done() == ["a", "undo a"]


REFUSED = {"refused": {"0": "550 5.1.1"}}
ACCEPTED = {"accepted": {"1": "ABC"}, **REFUSED}


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (POISON, "compensated"),
        (POISON._replace(receipt=REFUSED), "compensated"),
        (POISON._replace(receipt=ACCEPTED), "stuck"),
        (RETRY, "compensated"),
        (RETRY._replace(receipt=ACCEPTED), "stuck"),
    ],
)
def test_saga_i7_asks_the_receipts_whether_its_pivot_has_happened_when_they_are_kept(
    rig: Rig, outcome: Outcome, state: str
) -> None:
    """A mail that one of two recipients has got: nobody can say that it was not sent."""
    rig.sink.records_attempts = True
    rig.sink.fate["b"] = outcome
    saga = rig.start(pair(kind="pivot", retry=THRICE), {})
    settle_retries(rig)
    assert rig.state(saga) == state
    assert rig.done() == (["a"] if state == "stuck" else ["a", "undo a"])
