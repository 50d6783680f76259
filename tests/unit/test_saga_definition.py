"""What the linter refuses, and why; and what a definition becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from outbox import Retry, Saga
from outbox.errors import IntentRefused, SagaRefused
from outbox.intent import Intent
from outbox.saga.plan import Act, Kind, Node, Plan, lint
from outbox.saga.run import Action, BlobMaker, IndexMaker, MailMaker, Run

Definition = Saga[dict[str, Any]]


def do(run: Any) -> Any:
    return run.emit("index", "put", "k")


def function(session: Any, run: Any) -> None:
    """Does nothing."""


def bound(_first: int, _session: Any, _run: Any) -> None:
    """For `partial`."""


def undone(saga: Definition, name: str, **options: Any) -> Any:
    step = saga.intent(name=name, **options)(do)
    step.undo(do)
    return step


def mail_before_the_pivot(saga: Definition) -> None:
    saga.mail(name="m")(do)
    saga.intent(name="p", kind="pivot")(do)


def no_compensation(saga: Definition) -> None:
    saga.function(name="f")(function)


def retriable_without_pivot(saga: Definition) -> None:
    saga.intent(name="r", kind="retriable")(do)


def two_pivots(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot")(do)
    saga.intent(name="q", kind="pivot")(do)


def beside_the_pivot(saga: Definition) -> None:
    undone(saga, "a", after=())
    saga.intent(name="p", kind="pivot", after=())(do)


def undone_after_the_pivot(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot")(do)
    saga.intent(name="r", kind="retriable")(do).undo(do)


def unbounded_wait(saga: Definition) -> None:
    saga.signal("approval")


def signal_after_the_pivot(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot")(do)
    saga.signal("approval", timeout=5)


def timeout_shorter_than_tries(saga: Definition) -> None:
    saga.function(name="f", timeout=5, retry=Retry(attempts=10, first=10))(function).undo(function)


def timeout_shorter_than_tries_of_an_intent(saga: Definition) -> None:
    undone(saga, "a", timeout=5, retry=Retry(attempts=10, first=10))


def timeout_after_the_pivot(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot")(do)
    saga.intent(name="r", kind="retriable", timeout=5)(do)


def pivot_with_compensation(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot")(do).undo(do)


def tried_for_ever(saga: Definition) -> None:
    saga.function(name="f", retry=Retry(attempts=None))(function).undo(function)


def irreversible_before_the_pivot(saga: Definition) -> None:
    saga.intent(name="a", irreversible=True)(do).undo(do)
    saga.intent(name="p", kind="pivot")(do)


def retriable_beside_the_pivot(saga: Definition) -> None:
    saga.intent(name="p", kind="pivot", after=())(do)
    saga.intent(name="r", kind="retriable", after=())(do)


def itself(saga: Definition) -> None:
    saga.child(saga, name="again")(do).undo(function)


def itself_by_another(saga: Definition) -> None:
    other: Definition = Saga("other", dict)
    saga.child(other, name="o")(do).undo(function)
    other.child(saga, name="s")(do).undo(function)


def child_without_compensation(saga: Definition) -> None:
    other: Definition = Saga("other", dict)
    undone(other, "a")
    saga.child(other, name="o")(do)


def nothing(saga: Definition) -> None:
    """No steps."""


@pytest.mark.parametrize(
    ("declare", "why"),
    [
        (mail_before_the_pivot, "can't be undone and stands before the pivot"),
        (no_compensation, "has no compensation"),
        (retriable_without_pivot, "nothing before it is the pivot"),
        (two_pivots, "2 pivots"),
        (beside_the_pivot, "is not before the pivot"),
        (undone_after_the_pivot, "would never run"),
        (unbounded_wait, "may wait for ever"),
        (signal_after_the_pivot, "where nothing can fail any more"),
        (timeout_shorter_than_tries, "before its 10 tries are over"),
        (timeout_shorter_than_tries_of_an_intent, "before its 10 tries are over"),
        (timeout_after_the_pivot, "can't time out"),
        (pivot_with_compensation, "is the pivot and has a compensation"),
        (nothing, "has no steps"),
        (tried_for_ever, "may be tried for ever"),
        (irreversible_before_the_pivot, "can't be undone and stands before the pivot"),
        (retriable_beside_the_pivot, "nothing before it is the pivot"),
        (itself, "starts itself again"),
        (itself_by_another, "starts itself again"),
        (child_without_compensation, "has no compensation"),
    ],
)
def test_linter_refuses_what_can_not_keep_the_promise_and_says_why(
    declare: Callable[[Definition], None], why: str
) -> None:
    saga: Definition = Saga("wrong", dict)
    declare(saga)
    with pytest.raises(SagaRefused, match=why) as caught:
        saga.check()
    for reason in str(caught.value).split("; "):
        assert any(
            word in reason.split(":")[-1] for word in ("give", "make", "put", "keep", "add", "name", "raise", "remove")
        )


def test_linter_finds_what_is_unreachable() -> None:
    """Steps can only be declared in an order; a plan made by hand can say anything."""
    late = Node("a", Act.FUNCTION, after=(1,), undo=Act.FUNCTION)
    assert "unreachable" in lint(Plan("p", 1, (late, Node("b", Act.FUNCTION, undo=Act.FUNCTION))))[0]
    saga: Definition = Saga("night", dict, deadline=3600)
    undone(saga, "a")
    saga.delay("night", 8 * 3600)
    undone(saga, "b")
    with pytest.raises(SagaRefused, match="deadline of 3600 s is over before its delays"):
        saga.check()
    after: Definition = Saga("night", dict, deadline=3600)
    after.intent(name="p", kind="pivot")(do)
    after.delay("night", 8 * 3600)
    after.check()


def test_linter_lets_a_timeout_end_tries_that_have_no_number() -> None:
    saga: Definition = Saga("patient", dict)
    saga.function(name="f", timeout=60, retry=Retry(attempts=None))(function).undo(function)
    saga.check()


def test_linter_knows_no_cycle_in_a_child_that_is_used_twice() -> None:
    other: Definition = Saga("other", dict)
    undone(other, "a")
    saga: Definition = Saga("twice", dict)
    for name in ("one", "two"):
        saga.child(other, name=name)(do).undo(function)
    saga.check()


def test_linter_accepts_a_graph_with_waits(run: Run[dict[str, Any]]) -> None:
    saga: Definition = Saga("right", dict)
    first, second = undone(saga, "a", after=()), undone(saga, "b", after=())
    saga.signal("approval", timeout=60, after=(first, second))
    pivot = saga.intent(name="p", kind="pivot")(do)
    saga.delay("night", 60)
    saga.mail(name="m", kind="retriable", after=[pivot, "night"])(do)
    saga.check()
    assert [node.after for node in saga.plan.nodes] == [(), (), (0, 1), (2,), (3,), (3, 4)]


@pytest.fixture
def run() -> Run[dict[str, Any]]:
    from uuid import UUID

    return Run(UUID(int=1), {}, {}, "", IndexMaker(), BlobMaker(), MailMaker("outbox.test"))


def mail(run: Run[dict[str, Any]]) -> Action:
    return run.mail.send(sender="a@example.org", to="b@example.org", subject="s", text="t")


@pytest.mark.parametrize("with_pivot", [False, True])
def test_held_mail_is_prepared_where_it_stands_and_released_after_the_pivot(
    run: Run[dict[str, Any]], with_pivot: bool
) -> None:
    saga: Definition = Saga("held", dict)
    step = saga.mail(name="m", held=True)(mail)
    undone(saga, "a")
    if with_pivot:
        saga.intent(name="p", kind="pivot")(do)
    release = saga.plan.nodes[-1]
    assert release.name == "m.release"
    assert release.kind is (Kind.RETRIABLE if with_pivot else Kind.PIVOT)
    assert {saga.plan.nodes[n].name for n in release.after} == ({"m", "p"} if with_pivot else {"a"})
    assert step.do is not None
    prepared = step.do(run)
    assert prepared.intent.action == "prepare"
    later: Run[dict[str, Any]] = Run(run.id, {}, {"m": prepared.result}, "", run.index, run.blobs, run.mail)
    assert step.undo_function is not None
    assert saga.steps[-1].do is not None
    for action, made in (("withdraw", step.undo_function(later)), ("release", saga.steps[-1].do(later))):
        assert made.intent.action == action
        assert made.intent.key == prepared.intent.key
        assert made.intent.payload == {"token": prepared.intent.payload["token"]}


def test_definition_refuses_names_that_are_wrong_twice_or_late() -> None:
    saga: Definition = Saga("names", dict)
    undone(saga, "a")
    with pytest.raises(SagaRefused, match="twice"):
        undone(saga, "a")
    with pytest.raises(SagaRefused, match="not declared before it"):
        undone(saga, "b", after="later")
    with pytest.raises(SagaRefused, match="not a name"):
        Saga("Big Name", dict)
    elsewhere: Definition = Saga("elsewhere", dict)
    with pytest.raises(SagaRefused, match="of another saga"):
        undone(saga, "b", after=undone(elsewhere, "a"))
    saga.check()
    with pytest.raises(SagaRefused, match="in use"):
        undone(saga, "c")


def test_definition_refuses_what_the_engine_could_not_run() -> None:
    saga: Definition = Saga("unrunnable", dict)

    async def later(_run: Any) -> Any:
        """There is nothing to wait for."""

    with pytest.raises(SagaRefused, match="async"):
        saga.intent(later)  # type: ignore[arg-type]
    wait = saga.signal("wait", timeout=float("inf"))
    with pytest.raises(SagaRefused, match="only waits"):
        wait.undo(lambda _session, _run: None)
    with pytest.raises(SagaRefused, match="a timeout that never comes"):
        saga.check()
    for seconds in (float("nan"), float("inf"), 0.0):
        with pytest.raises(SagaRefused, match="lock_timeout"):
            Saga("locks", dict, lock_timeout=seconds)


@pytest.mark.parametrize(
    ("declare", "why"),
    [
        (lambda saga: saga.function(name="f", kind="maybe")(function), "of the kind 'maybe': use compensatable, pivot"),
        (lambda saga: saga.function(name="f", timeout="5")(function), "is str: give it seconds"),
        (lambda saga: saga.function(name="f")(do), r"does not take \(session, run\)"),
        (lambda saga: saga.intent(name="i")(function), r"does not take \(run\)"),
        (lambda saga: saga.intent(name="i")(do).undo(function), r"does not take \(run\)"),
        (lambda saga: saga.child("other", name="c")(do), "give it a Saga"),
        (lambda _saga: Retry(attempts=0), "a number of tries in all, or None"),
        (lambda _saga: Retry(first=float("nan")), "give it seconds"),
        (lambda _saga: Retry(limit=-1), "give it seconds"),
        (lambda _saga: Saga("v", dict, version=0), "version"),
        (lambda _saga: Saga("v", dict, version="2"), "version"),  # type: ignore[arg-type]
        (lambda _saga: Saga("v", dict, deadline=0), "deadline"),
    ],
)
def test_definition_refuses_at_once_what_would_fail_later(declare: Callable[[Definition], Any], why: str) -> None:
    with pytest.raises(SagaRefused, match=why):
        declare(Saga("wrong", dict))


def test_definition_takes_functions_that_take_more_or_hide_what_they_take() -> None:
    saga: Definition = Saga("callables", dict)
    saga.function(name="a")(lambda *_: None).undo(partial(bound, 1))
    saga.function(name="b")(lambda *_: None).undo(function)
    saga.check()


@dataclass
class Folder:
    path: str


def test_payload_is_of_the_declared_input() -> None:
    saga = Saga("typed", Folder)
    saga.function(name="f", kind="pivot")(function)
    assert saga.payload(Folder("x"), "k") == {"name": "typed", "version": 1, "input": {"path": "x"}, "key": "k"}
    assert saga.read({"path": "x"}) == Folder("x")
    with pytest.raises(SagaRefused, match="give it Folder"):
        saga.payload({"path": "x"})  # type: ignore[arg-type]
    assert saga.id_of("k") == saga.id_of("k") != saga.id_of("l")


def test_start_refuses_what_is_not_json() -> None:
    with pytest.raises(IntentRefused):
        Intent.make("saga", "start", "k", {"input": object()})


def test_shape_changes_with_the_steps_and_not_with_their_retries() -> None:
    def made(name: str, attempts: int) -> str:
        saga: Definition = Saga("shape", dict)
        undone(saga, name, retry=Retry(attempts=attempts))
        return saga.plan.shape

    assert made("a", 2) == made("a", 3) != made("b", 2)
