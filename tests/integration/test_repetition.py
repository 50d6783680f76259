"""Repetitions and their guard: what is said again never overwrites something newer, in whatever order it is read."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from outbox import decision, live, operation, repetition, tick
from outbox.errors import NotReady
from outbox.operation import Operation
from outbox.repetition import Again
from tests.fixtures.lanes import TARGET, Bench, Sink, keep
from tests.integration.test_reader import POISON

Conn = psycopg.Connection[Any]


class Repeater:
    """Repeats intents of the bench's participant, as an operation does."""

    def __init__(self, bench: Bench, operator: Conn) -> None:
        self.bench = bench
        self.operator = operator
        self.operation: Operation = operation.begin(operator, "replay", {})

    def since(self) -> int:
        return repetition.since(self.operator)

    def repeat(self, of: int, since: int | None, *, anew: bool = False) -> int:
        with self.operator.transaction():
            _, [number] = repetition.append(self.operator, self.operation, TARGET, [Again(of, since)], anew=anew)
        return number

    def bring_back(self, *keys: str) -> int:
        again = repetition.of_keys(self.operator, TARGET, keys)
        if again:
            with self.operator.transaction():
                repetition.append(self.operator, self.operation, TARGET, again)
        return len(again)


@pytest.fixture
def repeater(bench: Bench, operator: Conn) -> Repeater:
    return Repeater(bench, operator)


def delete(bench: Bench, key: str) -> int:
    row = bench.admin.execute("select outbox.emit(%s, 'delete', %s)", (TARGET, key)).fetchone()
    assert row is not None
    return int(row[0])


def writer(bench: Bench) -> Conn:
    """A connection that has a transaction of its own; it closes with the test."""
    return psycopg.connect(bench.admin.info.dsn)


def emit(conn: Conn, key: str, payload: int) -> int:
    row = conn.execute("select outbox.emit(%s, 'put', %s, %s)", (TARGET, key, json.dumps(payload))).fetchone()
    assert row is not None
    return int(row[0])


def live_now(bench: Bench) -> dict[str, Any]:
    bench.clock.step()
    return {i.key: i.payload for i in live.puts(bench.conn, TARGET, tick.latest(bench.conn))}


def test_repetition_i8_brings_back_what_a_participant_has_lost(bench: Bench, repeater: Repeater) -> None:
    # Given: two keys that were applied, and a participant that has forgotten them
    bench.emit("a", 1)
    number = bench.emit("a", 2)
    bench.emit("b", 3)
    delete(bench, "b")
    bench.emit("c", 4)
    reader = bench.reader()
    bench.drain(reader)
    bench.sink.effects.clear()
    # When
    assert repeater.bring_back("a", "b", "c", "never") == 4
    bench.drain(reader)
    # Then each comes once more, as its last word says, and says whose repetition it is
    assert bench.sink.effects == [("a", 2), ("b", {}), ("c", 4), ("never", {})]
    actions = bench.admin.execute(
        "select key, action, headers -> 'replay' ->> 'of' from outbox.log where outbox.repeats(headers) is not null "
        "order by id"
    ).fetchall()
    assert actions[0] == ("a", "put", str(number))
    assert [row[1] for row in actions] == ["put", "delete", "put", "delete"]
    assert live_now(bench) == {"a": 2, "c": 4}


@pytest.mark.parametrize("newer", ["put", "delete"])
def test_repetition_i4_is_left_out_when_something_newer_came_before_it(
    bench: Bench, repeater: Repeater, newer: str
) -> None:
    # Given: it is known what is to be repeated
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    # When something newer is written before it is repeated
    if newer == "put":
        bench.emit("k", 2)
    else:
        delete(bench, "k")
    repeater.repeat(old, since)
    # Then, read in one batch or in two, the newer one stays
    expected = ("k", 2) if newer == "put" else ("k", {})
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1), expected]
    repeater.repeat(old, since)
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1), expected]
    assert bench.parked() == {}
    assert live_now(bench) == ({"k": 2} if newer == "put" else {})
    # ... and is what is said of the key, whatever was repeated since
    [word] = repetition.words(bench.conn, TARGET, {})
    assert word.rank > old


def test_repetition_i4_is_applied_when_the_newer_one_comes_after_it(bench: Bench, repeater: Repeater) -> None:
    old = bench.emit("k", 1)
    since = repeater.since()
    repeater.repeat(old, since)
    bench.emit("k", 2)
    bench.drain(bench.reader())
    assert bench.sink.effects == [("k", 1), ("k", 1), ("k", 2)]


def test_repetition_i4_loses_against_a_straggler_in_either_order(bench: Bench, repeater: Repeater) -> None:
    # Given: a transaction that has written, and that nobody sees yet
    old = bench.emit("k", 1)
    bench.emit("l", 1)
    reader = bench.reader()
    bench.drain(reader)
    with writer(bench) as straggler, writer(bench) as other:
        emit(straggler, "k", 2)
        emit(other, "l", 2)
        bench.clock.step()
        bench.emit("m", 0)
        bench.drain(reader)
        since = repeater.since()
        # When one of two commits before its key is repeated, and the other one after its repetition was read
        other.commit()
        repeater.repeat(old, since)
        repeater.repeat(old + 1, since)
        bench.drain(reader)
        straggler.commit()
    bench.drain(reader)
    # Then the later batch has the straggler, and it wins; the other one had come before
    assert bench.sink.effects[3:] == [("l", 2), ("k", 1), ("k", 2)]
    assert live_now(bench) == {"k": 2, "l": 2, "m": 0}
    # And a participant that reads everything again in one go ends with the same
    fresh = Sink()
    fresh.keeps_position = True
    bench.die()
    bench.drain(bench.reader(sink=fresh))
    assert dict(fresh.effects) == {"k": 2, "l": 2, "m": 0}


def test_repetition_waits_for_what_stands_before_it_when_that_fails(
    bench: Bench, repeater: Repeater, operator: Conn
) -> None:
    # Given: something newer, in the same batch, that is poison
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    bench.sink.fate["k"] = POISON
    poison = bench.emit("k", 2)
    repeater.repeat(old, since)
    bench.drain(reader)
    assert bench.parked() == {"poison": ["k"], "blocked": ["k"]}
    bench.sink.fate.clear()
    bench.sink.effects.clear()
    # When an operator skips it, it is nothing that was overtaken by: the repetition counts
    assert [one.refused for one in decision.decide(operator, "skip", [poison])] == [None]
    reader.decided()
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1)]
    assert bench.parked() == {"skipped": ["k"]}
    assert live_now(bench) == {"k": 1}


def test_repetition_is_left_out_when_what_it_waited_for_gets_through(
    bench: Bench, repeater: Repeater, operator: Conn
) -> None:
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    bench.sink.fate["k"] = POISON
    poison = bench.emit("k", 2)
    bench.drain(reader)
    repeater.repeat(old, since)
    bench.drain(reader)
    bench.sink.fate.clear()
    bench.sink.effects.clear()
    decision.decide(operator, "retry", [poison])
    reader.decided()
    bench.drain(reader)
    assert bench.sink.effects == [("k", 2)]
    assert bench.parked() == {}
    assert live_now(bench) == {"k": 2}


def test_repetition_notices_what_was_parked_when_it_was_written_and_applied_before_it(
    bench: Bench, repeater: Repeater, operator: Conn
) -> None:
    # Given: a newer intent that is scheduled, far back in the log
    bench.emit("k", 1)
    due = bench.emit("k", 2, due="2999-01-01")
    reader = bench.reader()
    bench.drain(reader)
    for n in range(5):
        bench.emit("other", n)
    bench.drain(reader)
    again = repetition.of_keys(operator, TARGET, ["k"])
    assert again[0].since is not None
    assert again[0].since < due
    # When its time comes before the repetition is appended
    decision.decide(operator, "retry", [due])
    bench.admin.execute("update outbox.parked set reason = 'retry', retry_at = now()")
    bench.drain(reader)
    bench.sink.effects.clear()
    with operator.transaction():
        repetition.append(operator, repeater.operation, TARGET, again)
    bench.drain(reader)
    # Then
    assert bench.sink.effects == []
    assert live_now(bench)["k"] == 2


def test_repetition_holds_back_a_key_of_which_a_later_intent_is_parked(bench: Bench, repeater: Repeater) -> None:
    bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    bench.sink.fate["k"] = POISON
    bench.emit("k", 2)
    bench.drain(reader)
    assert repeater.bring_back("k") == 0


def test_repetition_is_judged_by_the_base_when_the_log_it_was_written_in_is_gone(
    bench: Bench, repeater: Repeater
) -> None:
    # Given: repetitions of three keys; since then, two were put and deleted in a part of the log that was dropped
    numbers = [bench.emit(key, 1) for key in ("same", "newer", "gone")]
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    newer = bench.emit("newer", 2)
    horizon = delete(bench, "gone") + 1
    for number in numbers:
        repeater.repeat(number, since)
    keep(bench, horizon, {"same": (numbers[0], 1), "newer": (newer, 2)})
    bench.sink.effects.clear()
    # When
    bench.drain(reader)
    # Then only what is still live is there again
    assert bench.sink.effects == [("same", 1)]


def test_repetition_of_another_operations_is_refused_when_it_is_not_under_way(
    bench: Bench, repeater: Repeater, worker: Conn
) -> None:
    number = bench.emit("k", 1)
    repeater.operation.end(repeater.operator)
    with pytest.raises(NotReady, match=r"is not under way\. Begin one, or resume it"):
        repeater.repeat(number, 0)
    begun = operation.begin(worker, "scrub", {})
    with pytest.raises(NotReady, match="GRANT outbox_operator TO"):
        repetition.append(worker, begun, TARGET, [Again(number, 0)])


@pytest.mark.parametrize(
    "headers",
    ['{"replay": 1}', '{"replay": {"of": "x"}}', '{"replay": {"of": 1e999, "since": 0}}', '{"replay": {"of": -1}}',
     '{"replay": {"of": 1, "since": 99999999999999999999}}', '["replay"]', '"\\"replay\\""'],
)  # fmt: skip
def test_headers_that_only_look_like_a_repetitions_harm_nothing(bench: Bench, repeater: Repeater, headers: str) -> None:
    bench.admin.execute("select outbox.emit(%s, 'put', 'k', '1', headers => %s::jsonb)", (TARGET, headers))
    reader = bench.reader()
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1)]
    assert live_now(bench) == {"k": 1}
    assert repeater.bring_back("k") == 1
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1)] * 2


def test_repetition_i4_is_left_out_when_it_is_the_straggler_itself(
    bench: Bench, repeater: Repeater, operator: Conn
) -> None:
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    # When something newer, with a higher id, is read before the repetition commits
    with operator.transaction():
        repetition.append(operator, repeater.operation, TARGET, [Again(old, since)])
        bench.emit("k", 2)
        bench.drain(reader)
    bench.drain(reader)
    assert bench.sink.effects == [("k", 1), ("k", 2)]


def test_repetition_is_not_overtaken_by_another_one_of_something_older(bench: Bench, repeater: Repeater) -> None:
    # Given: two replays; the one that is behind says something old, which is left out
    old, early = bench.emit("k", 1), repeater.since()
    new = bench.emit("k", 2)
    reader = bench.reader()
    bench.drain(reader)
    late = repeater.since()
    repeater.repeat(old, early)
    repeater.repeat(new, late)
    bench.sink.effects.clear()
    bench.drain(reader)
    assert bench.sink.effects == [("k", 2)]


def test_repetition_is_left_out_when_what_it_waited_for_gets_through_in_the_middle_of_a_batch(
    bench: Bench, repeater: Repeater, operator: Conn
) -> None:
    # Given: something newer that is poison, and its key's repetition behind it, in a batch that is half read
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    bench.sink.batch_limit = 2
    bench.sink.fate["k"] = POISON
    poison = bench.emit("k", 2)
    repeater.repeat(old, since)
    for n in range(20):
        bench.emit(f"other {n}")
    bench.clock.step()
    reader.step()
    assert reader.position.upto
    assert bench.parked() == {"poison": ["k"], "blocked": ["k"]}
    # When that is applied after all, before the batch is done
    bench.sink.fate.clear()
    decision.decide(operator, "retry", [poison])
    while bench.parked():
        reader.decided()
        reader.step()
    assert reader.position.upto
    # Then it stays
    assert [effect for effect in bench.sink.effects if effect[0] == "k"] == [("k", 1), ("k", 2)]


def test_repetition_is_overtaken_by_nothing_that_says_nothing_of_its_key(bench: Bench, repeater: Repeater) -> None:
    # Given: what has come since: another participant's intent, an event, and one that a saga has recalled
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    bench.admin.execute("select outbox.register('elsewhere')")
    bench.admin.execute("select outbox.emit('elsewhere', 'put', 'k', '2')")
    bench.admin.execute("select outbox.emit(%s, 'event', 'k', '3')", (TARGET,))
    recalled = bench.emit("k", 4)
    bench.admin.execute("insert into outbox.saga_void (id, answered) values (%s, true)", (recalled,))
    # When its key is repeated
    repeater.repeat(old, since)
    bench.sink.effects.clear()
    bench.drain(reader)
    # Then that counts
    assert bench.sink.effects[-1] == ("k", 1)


def test_repetition_of_what_is_gone_is_overtaken_by_nothing_that_was_known(bench: Bench, repeater: Repeater) -> None:
    """As a resilver removes a damaged blob, before it puts it again."""
    number = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    bench.sink.effects.clear()
    with repeater.operator.transaction():
        again = Again(0, max(repeater.since(), number), "k", "delete", "{}")
        repetition.append(repeater.operator, repeater.operation, TARGET, [again])
    bench.drain(reader)
    assert bench.sink.effects == [("k", {})]


def test_repetition_i2_is_applied_when_the_newer_one_is_read_after_it_and_fails(
    bench: Bench, repeater: Repeater
) -> None:
    # Given: a transaction that has written something newer, and which no tick shows when the repetition is read
    old = bench.emit("k", 1)
    reader = bench.reader()
    bench.drain(reader)
    since = repeater.since()
    with writer(bench) as straggler:
        emit(straggler, "k", 2)
        repeater.repeat(old, since)
        bench.clock.step()
    bench.sink.effects.clear()
    # When it has committed by then, and turns out to be poison
    reader.step()
    assert bench.sink.effects == [("k", 1)]
    bench.sink.fate["k"] = POISON
    bench.drain(reader)
    # Then the participant has what was repeated
    assert bench.sink.effects == [("k", 1)]
    assert bench.parked() == {"poison": ["k"]}
