"""Operations: who is at one, where it goes on, and who may not."""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

import psycopg
import pytest

from outbox import follower, operation
from outbox.errors import Fenced, NotReady

Conn = psycopg.Connection[Any]


def test_operation_goes_on_where_it_stood_when_its_process_is_gone(operator: Conn) -> None:
    # Given a scrub whose process has written its progress, and died since
    begun = operation.begin(operator, "scrub", {"target": "index"})
    begun.save(operator, {"key": "m"})
    operator.execute("update outbox.operation set place = replace(place, %s, '/4194305/')", (f"/{os.getpid()}/",))
    # When another one takes it up
    resumed = operation.resume(operator, begun.id)
    # Then it has the progress, and the first one can't write any more
    assert (resumed.request, resumed.progress) == ({"target": "index"}, {"key": "m"})
    with pytest.raises(Fenced):
        begun.save(operator, {"key": "z"})
    with pytest.raises(Fenced):
        begun.end(operator)
    resumed.end(operator, result={"missing": 0})
    [row] = operation.find(operator, kind="scrub")
    assert (row["state"], row["result"], row["progress"]) == ("done", {"missing": 0}, {"key": "m"})


def test_operation_is_refused_to_a_second_process_when_one_is_at_it(operator: Conn) -> None:
    begun = operation.begin(operator, "replay", {})
    with pytest.raises(NotReady, match="is at operation"):
        operation.resume(operator, begun.id)
    # ... until its lease has run out: it may be on a machine that is gone
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=operation.TTL + 1)
    operator.execute("select set_config('outbox.fake_now', %s, false)", (later.isoformat(),))
    assert operation.resume(operator, begun.id).epoch == begun.epoch + 1


@pytest.mark.parametrize("state", ["done", "failed", "abandoned"])
def test_operation_is_not_resumed_when_it_has_ended(operator: Conn, state: operation.State) -> None:
    begun = operation.begin(operator, "replay", {})
    begun.end(operator, state)
    with pytest.raises(NotReady, match=f"has ended \\({state}\\)"):
        operation.resume(operator, begun.id)


def test_operation_can_be_resumed_at_once_when_its_process_has_let_go(operator: Conn) -> None:
    begun = operation.begin(operator, "replay", {})
    begun.end(operator, "running")
    assert operation.resume(operator, begun.id).id == begun.id


@pytest.mark.parametrize("state", ["done", "failed", "abandoned"])
def test_operation_holds_the_log_until_it_has_ended_or_was_given_up(operator: Conn, state: operation.State) -> None:
    # Given an operation that needs the log from a tick on
    begun = operation.begin(operator, "resilver", {})
    begun.hold(operator, 1, "why")
    operator.execute("update outbox.follower set seen_at = now() - interval '2 days'")
    # When it says how far it is, then it was seen
    begun.save(operator, {})
    assert [(each.name, each.seen_seconds < 3600) for each in follower.find(operator)] == [(begun.follower, True)]
    # When it is left for somebody to resume, then it goes on holding it
    begun.end(operator, "running")
    resumed = operation.resume(operator, begun.id)
    resumed.hold(operator, 1, "why")
    assert [each.name for each in follower.find(operator)] == [begun.follower]
    # When it ends, or nobody will resume it, then nothing is held any more
    resumed.end(operator, state)
    assert follower.find(operator) == []
