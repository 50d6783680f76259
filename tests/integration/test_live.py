"""What is live, by base and log."""

from __future__ import annotations

from outbox import live, tick
from outbox.log import Slots
from tests.fixtures.lanes import Bench


def _live(bench: Bench, at: tick.Tick, **more: object) -> list[tuple[str, int]]:
    return [(i.key, i.payload) for i in live.puts(bench.conn, "sink", at, **more)]  # type: ignore[arg-type]


def _emit(bench: Bench, action: str, key: str, payload: int = 0) -> int:
    sql = (
        "insert into outbox.log (target, action, key, payload) values ('sink', %s, %s, to_jsonb(%s::int)) returning id"
    )
    return int(bench.admin.execute(sql, (action, key, payload)).fetchone()[0])  # type: ignore[index]


def test_live_is_the_last_put_of_each_key_that_was_not_deleted_since(bench: Bench) -> None:
    # Given keys that were put, put again, deleted, and put after that; and an event
    for action, key, n in [("put", "a", 1), ("put", "b", 2), ("put", "a", 3), ("delete", "b", 0), ("put", "Z", 4),
                           ("put", "ä", 5), ("delete", "ä", 0), ("put", "ä", 6), ("touch", "c", 7)]:  # fmt: skip
        _emit(bench, action, key, n)
    bench.clock.step()
    # Then each live key comes once, in the order of bytes, whatever the database's collation is
    now = tick.latest(bench.conn)
    assert _live(bench, now) == [("Z", 4), ("a", 3), ("ä", 6)]
    assert _live(bench, now, after="Z") == [("a", 3), ("ä", 6)]
    # And each of two halves of the slots has its part of them
    halves = [_live(bench, now, slots=Slots(*ends)) for ends in ((0, 8191), (8192, 16383))]
    assert sorted(halves[0] + halves[1]) == [("Z", 4), ("a", 3), ("ä", 6)]


def test_live_is_what_it_was_when_an_earlier_tick_is_asked_for(bench: Bench) -> None:
    _emit(bench, "put", "a", 1)
    bench.clock.step()
    then = tick.latest(bench.conn)
    _emit(bench, "put", "a", 2)
    _emit(bench, "delete", "a")
    bench.clock.step()
    assert _live(bench, then) == [("a", 1)]
    assert _live(bench, tick.latest(bench.conn)) == []


def test_live_goes_on_from_the_base_when_a_part_of_the_log_was_dropped(bench: Bench) -> None:
    bench.admin.execute(
        "insert into outbox.base (target, key, id, payload, created_at) values ('sink', 'old', 1, '1', now()), "
        "('sink', 'changed', 2, '2', now()), ('sink', 'gone', 3, '3', now()), ('other', 'else', 4, '4', now())"
    )
    bench.admin.execute("update outbox.horizon set id = 11")
    bench.admin.execute("select setval('outbox.log_id', 10)")
    _emit(bench, "put", "changed", 20)
    _emit(bench, "delete", "gone")
    bench.clock.step()
    assert _live(bench, tick.latest(bench.conn)) == [("changed", 20), ("old", 1)]


def test_live_leaves_out_what_was_never_applied_when_it_is_parked_or_void(bench: Bench) -> None:
    _emit(bench, "put", "a", 1)
    parked = _emit(bench, "put", "a", 2)
    void = _emit(bench, "delete", "a")
    bench.admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason) "
        "values (%s, 'sink', outbox.slot('a'), 'a', 'poison')",
        (parked,),
    )
    bench.admin.execute("insert into outbox.saga_void (id) values (%s)", (void,))
    bench.clock.step()
    assert _live(bench, tick.latest(bench.conn)) == [("a", 1)]
