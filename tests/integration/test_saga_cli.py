"""`outbox saga` as an operator uses it, against sagas in every state."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
import pytest

from outbox import Saga, cli, status
from outbox.cli.status import render
from outbox.participant import Outcome, Verdict
from outbox.saga import view
from outbox.saga.plan import Retry
from tests.fixtures.sagas import Rig, function_step, sink_step

POISON = Outcome(Verdict.POISON, error="it can't be done")


class Operator:
    """Runs commands with an operator's rights."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> str:
        assert cli.main(["saga", *words]) == status
        shown = self._capsys.readouterr()
        return shown.out if status == 0 else shown.out + shown.err


@pytest.fixture
def operator(
    rig: Rig, operator_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    monkeypatch.delenv("OUTBOX_SAGAS", raising=False)
    return Operator(capsys)


def plain(name: str = "plain") -> Saga[dict[str, Any]]:
    saga: Saga[dict[str, Any]] = Saga(name, dict)
    sink_step(saga, "a", retry=Retry(attempts=1))
    function_step(saga, "b")
    sink_step(saga, "c", kind="pivot")
    sink_step(saga, "d", kind="retriable", retry=Retry(attempts=1))
    return saga


def stuck(rig: Rig) -> UUID:
    rig.sink.fate["d"] = POISON
    saga = rig.start(plain(), {"n": 1}, key="k1")
    rig.settle()
    assert rig.state(saga) == "stuck"
    return saga


def test_saga_list_filters(rig: Rig, operator: Operator) -> None:
    other: Saga[dict[str, Any]] = Saga("other", dict)
    sink_step(other, "o")
    done = rig.start(other, {}, key="done")
    rig.settle()
    held = stuck(rig)
    assert {row["id"] for row in json.loads(operator("list", "--json"))} == {str(done), str(held)}
    for words in (["--open"], ["--name", "plain"], ["--in", "stuck"], ["--key", "k1"]):
        assert [row["id"] for row in json.loads(operator("list", "--json", *words))] == [str(held)], words
    assert json.loads(operator("list", "--json", "--older-than", "1h")) == []
    text = operator("list")
    assert str(held) in text
    assert "step 'd' is stuck" in text
    assert "There are no sagas" in operator("list", "--name", "nobody")


def test_status_warns_when_a_saga_is_stuck(rig: Rig) -> None:
    stuck(rig)
    found = status.read(rig.admin)
    assert [(one["state"], one["count"]) for one in found.sagas] == [("stuck", 1)]
    assert "1 saga is stuck: see `outbox saga list --in stuck`" in found.warnings()
    assert "open sagas" in render(found)


def test_saga_show_tells_what_happened_and_draws_the_steps(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    text = operator("show", str(saga))
    for part in ("plain version 1, key k1", "stuck (decision: commit)", "✔ a", "◆ pivot", "‼ d", "it can't be done"):
        assert part in text, part
    shown = json.loads(operator("show", str(saga), "--json"))
    assert [step["state"] for step in shown["steps"]] == ["done", "done", "done", "stuck"]
    assert "result" not in shown["steps"][0]
    assert "there is no saga" in operator("show", str(UUID(int=9)), status=1)


def test_saga_retry_takes_a_stuck_step_up_again_and_says_who_asked(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    rig.sink.fate.clear()
    assert "Asked the engine" in operator("retry", str(saga), "d", "--note", "the disk is back")
    rig.settle()
    assert rig.state(saga) == "completed"
    events = json.loads(operator("show", str(saga), "--json"))["events"]
    assert ("retry", "the disk is back", "outbox_operator") in [(e["what"], e["detail"], e["who"]) for e in events]


def test_saga_skip_leaves_a_stuck_step_out(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    operator("skip", str(saga), "d")
    rig.settle()
    assert rig.state(saga) == "completed"
    assert rig.steps(saga)["d"] == "skipped"


@pytest.mark.parametrize(("how", "state"), [("--done", "completed"), ("--not-done", "stuck")])
def test_saga_resolve_takes_an_operators_word(rig: Rig, operator: Operator, how: str, state: str) -> None:
    saga = stuck(rig)
    operator("resolve", str(saga), "d", how)
    rig.settle()
    assert rig.state(saga) == state


def test_saga_cancel_is_refused_after_the_pivot_and_that_is_shown(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    operator("cancel", str(saga), "--note", "please")
    rig.settle()
    assert rig.state(saga) == "stuck"
    assert "the pivot is done" in operator("show", str(saga))


def test_saga_requests_are_refused_at_once_when_they_name_nothing(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    assert "no such step" in operator("retry", str(saga), "nothing", status=1)
    assert "there is no saga" in operator("cancel", str(UUID(int=9)), status=1)


def test_saga_show_tells_each_attempt_in_order_and_results_when_asked(rig: Rig, operator: Operator) -> None:
    # Given: a saga that goes back, and whose compensation is stuck and then tried again
    saga: Saga[dict[str, Any]] = Saga("back", dict)
    function_step(saga, "f")
    step = saga.intent(name="a", retry=Retry(attempts=1))(lambda run: run.emit("sink", "put", "a", "a"))
    step.undo(lambda run: run.emit("sink", "put", "undo a", "undo a"))
    sink_step(saga, "p", kind="pivot")
    rig.sink.fate |= {"undo a": POISON, "p": POISON}
    started = rig.start(saga, {"n": 1}, key="k2")
    rig.settle()
    assert rig.state(started) == "stuck"
    rig.sink.fate.clear()
    operator("retry", str(started), "--note", "again")
    rig.settle()
    assert rig.state(started) == "compensated"
    # Then: the timeline has every attempt, its error, and who acted, in the order in which it happened
    shown = [line.split(maxsplit=3) for line in operator("show", str(started)).split("\n\n")[2].splitlines()[1:]]
    assert [(words[1], words[2]) for words in shown] == [
        ("f", "begins"), ("f", "done"), ("a", "begins"), ("a", "done"), ("p", "begins"), ("p", "failed"),
        ("a", "undoing"), ("a", "failed"), ("a", "stuck"), ("a", "retry"), ("a", "undoing"),
        ("a", "undone"), ("f", "undoing"), ("f", "undone"),
    ]  # fmt: skip
    assert "outbox_operator" in next(words[3] for words in shown if words[2] == "retry")
    # Then: what the application gave and got is shown when it is asked for
    assert '"made"' not in operator("show", str(started))
    text = operator("show", str(started), "--results")
    assert '{"made": "f"}' in text
    assert 'input: {"n": 1}' in text
    assert json.loads(operator("show", str(started), "--json", "--results"))["input"] == {"n": 1}
    assert "input" not in json.loads(operator("show", str(started), "--json"))


def test_saga_requests_reach_all_that_a_filter_is_true_for(rig: Rig, operator: Operator) -> None:
    # Given: three stuck sagas, one of another name, and one under way
    rig.sink.fate["d"] = POISON
    one, other = (Saga(name, dict) for name in ("plain", "other"))
    for definition in (one, other):
        sink_step(definition, "c", kind="pivot")
        sink_step(definition, "d", kind="retriable", retry=Retry(attempts=1))
    held = [rig.start(definition, {}) for definition in (one, one, other)]
    rig.settle()
    going: Saga[dict[str, Any]] = Saga("going", dict)
    sink_step(going, "g")
    under_way = rig.start(going, {})
    rig.settle(sink=False)
    assert {rig.state(saga) for saga in held} == {"stuck"}
    # When: nothing is named, or nobody says yes, Then: nothing is asked
    with pytest.raises(SystemExit):
        operator("retry")
    assert "add --yes" in operator("retry", "--name", "plain", status=1)
    assert "Nothing fits" in operator("skip", "--name", "plain", "--step", "nothing", "--yes", status=1)
    # When: the stuck steps of a name are to be tried again, Then: these are
    rig.sink.fate.clear()
    asked = json.loads(operator("retry", "--name", "plain", "--step", "d", "--yes", "--json"))
    assert {(one["saga"], one["step"]) for one in asked} == {(str(saga), "d") for saga in held[:2]}
    assert "1 saga" in operator("cancel", "--name", "going", "--yes", "--note", "enough")
    rig.settle()
    assert [rig.state(saga) for saga in held] == ["completed", "completed", "stuck"]
    assert rig.state(under_way) == "compensated"
    # When: all stuck steps of one saga are left out, Then: it ends
    operator("skip", str(held[2]))
    rig.settle()
    assert rig.state(held[2]) == "completed"


def test_saga_graph_draws_svg_and_mermaid(rig: Rig, operator: Operator) -> None:
    saga = stuck(rig)
    root = ET.fromstring(operator("graph", str(saga)))  # noqa: S314 - our own
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a", "b", "c", "d"} <= set(texts)
    assert sum(element.tag.endswith("line") for element in root.iter()) == 3
    drawn = operator("graph", str(saga), "--format", "mermaid")
    assert drawn.startswith("flowchart LR")
    assert "s0 --> s1" in drawn


def test_saga_check_fails_when_the_code_can_not_continue_an_open_saga(rig: Rig, operator: Operator) -> None:
    stuck(rig)
    assert "not deployed" in operator("check", status=1)
    assert json.loads(operator("check", "--json", "--sagas", "tests.fixtures.shop", status=1))[0]["sagas"] == 1
    rig.admin.execute("delete from outbox.saga")
    assert "can be continued" in operator("check")


@dataclass
class Parcel:
    to: str
    weight: int = 0


@dataclass
class Box:
    """A later `Parcel`, of which a field with a default has another type."""

    to: str
    weight: list[int] = field(default_factory=list)


def test_saga_check_reads_the_inputs_of_open_sagas(rig: Rig) -> None:
    """What the shape doesn't know: that would come up in the middle of a saga."""
    before, after = Saga("parcel", Parcel), Saga("parcel", Box)
    for saga in (before, after):
        sink_step(saga, "a")
    rig.start(before, Parcel("ann", 5))
    rig.settle(sink=False)
    assert view.uncontinued(rig.admin, {("parcel", 1): before}) == []
    (found,) = view.uncontinued(rig.admin, {("parcel", 1): after})
    assert found["sagas"] == 1
    assert "weight is int and declared as list" in found["why"]


def test_saga_requests_need_an_operators_rights(rig: Rig) -> None:
    saga = stuck(rig)
    with psycopg.connect(rig.settings.database, autocommit=True) as conn:
        for request in ("select outbox.saga_ask(%s, 'cancel')",):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(request, (saga,))
