"""A saga's input comes back as what it was, or the saga is refused where it is declared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NewType, Optional
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outbox import Saga
from outbox.errors import SagaRefused
from outbox.saga.form import form

Code = NewType("Code", str)


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Class(Enum):
    SLOW = "slow"
    FAST = "fast"


class Rank(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Leg:
    code: Code
    at: datetime
    seats: tuple[int, ...] = ()


@dataclass
class Trip:
    """Everything that has a form."""

    who: str
    legs: list[Leg]
    price: Decimal
    id: UUID
    rank: Rank
    day: date
    hour: time
    lasts: timedelta
    ticket: bytes
    tags: frozenset[str]
    pair: tuple[int, Leg | None]
    by_name: Mapping[str, Sequence[Leg]]
    how: Literal["train", 2, True]
    either: int | str | None
    free: Any = None
    speed: Annotated[Class, "how fast"] = Class.SLOW
    ratio: float = 0.0
    note: Optional[str] = None  # noqa: UP045 - as people write it
    parts: list = field(default_factory=list)  # type: ignore[type-arg]
    seen: int = field(default=0, init=False, compare=False)


moments = st.datetimes(timezones=st.none() | st.just(UTC)).map(lambda moment: moment.replace(fold=0))
legs = st.builds(Leg, st.text(max_size=9).map(Code), moments, st.lists(st.integers(), max_size=3).map(tuple))
free = st.none() | st.lists(st.booleans() | st.text(), max_size=2) | st.dictionaries(st.text(), st.integers())
trips = st.builds(
    Trip,
    who=st.text(),
    legs=st.lists(legs, max_size=3),
    price=st.decimals(allow_nan=False),
    id=st.uuids(),
    rank=st.sampled_from(Rank),
    day=st.dates(),
    hour=st.times().map(lambda moment: moment.replace(fold=0)),  # which ISO 8601 has no word for
    lasts=st.timedeltas(),
    ticket=st.binary(),
    tags=st.frozensets(st.text(), max_size=1),  # whose repr has an order
    pair=st.tuples(st.integers(), st.none() | legs),
    by_name=st.dictionaries(st.text(), st.lists(legs, max_size=2), max_size=2),
    how=st.sampled_from(("train", 2, True)),
    either=st.none() | st.integers() | st.text(),
    free=free,
    speed=st.sampled_from(Class),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    note=st.none() | st.text(),
    parts=st.lists(st.integers()),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trips)
def test_form_brings_an_input_back_as_it_was(trip: Trip) -> None:
    saga = Saga("trip", Trip)
    again = saga.read(json.loads(json.dumps(saga.written(trip))))
    assert again == trip
    assert repr(again) == repr(trip), "with the types that it had"


def inputs() -> dict[str, tuple[Any, str]]:
    """Annotations that have no form, and why."""

    class Plain:
        """No dataclass."""

    class Odd(Enum):
        PLACE = (1, 2)

    @dataclass
    class Local:
        part: Nowhere  # type: ignore[name-defined]  # noqa: F821 - that is the point

    @dataclass
    class Extra:
        path: str
        mode: InitVar[int]

    return {
        "a class of one's own": (Plain, "declared as Plain"),
        "a complex number": (list[complex], "declared as complex"),
        "keys that are not text": (dict[int, str], "keys are not str"),
        "an enum of tuples": (Odd, "not all text or whole numbers"),
        "a union": (Leg | Trip, "can't be told apart"),
        "a union of dates": (date | str, "can't be told apart"),
        "a name that can't be found": (Local, "at the top of a module"),
        "more than its fields": (Extra, "takes 'mode'"),
        "itself": (Tree, "contains itself"),
        "a literal": (Literal[b"x"], "not plain JSON"),
    }


@dataclass
class Tree:
    below: list[Tree]


@pytest.mark.parametrize("name", inputs())
def test_form_refuses_what_json_can_not_bring_back_when_it_is_declared(name: str) -> None:
    annotation, why = inputs()[name]
    with pytest.raises(SagaRefused, match=why):
        Saga("wrong", annotation)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "1"), (int, True), (str, 1), (bool, 1), (float, "1"), (date, NOON), (UUID, "x"),
        (list[int], (1,)), (list[int], ["1"]), (tuple[int, int], (1,)), (dict[str, int], {1: 1}), (Class, "slow"),
        (Leg, {"code": "x"}), (Any, (1,)), (Any, {1: 1}), (Any, [{"at": NOON}]), (set[int], [1]),
        (Literal[1], True), (int | str, 1.0),
    ],
)  # fmt: skip
def test_form_refuses_a_value_of_another_type_and_does_not_quote_it(annotation: Any, value: Any) -> None:
    with pytest.raises(SagaRefused, match="the input") as caught:
        form(annotation, "the input").write(value, "the input")
    assert "2026" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "data"),
    [
        (date, "never"), (date, 5), (Decimal, "x"), (UUID, "x"), (bytes, "é"), (timedelta, "x"), (Class, "warp"),
        (Leg, []), (Leg, {"code": "x"}), (Leg, {"code": "x", "at": "2026-01-01", "other": 1}), (list[int], {}),
        (tuple[int, int], [1, 2, 3]),
    ],
)  # fmt: skip
def test_form_refuses_json_of_another_form(annotation: Any, data: Any) -> None:
    with pytest.raises(SagaRefused, match="the input"):
        form(annotation, "the input").read(data, "the input")


def test_form_names_the_place() -> None:
    @dataclass
    class Journey:
        legs: list[Leg]

    place = "the input of saga 'trip'"
    journey = Journey([Leg(Code("x"), "today")])  # type: ignore[arg-type]
    with pytest.raises(SagaRefused, match=r"the input of saga 'trip'\.legs\[\]\.at is str and declared as datetime"):
        form(Journey, place).write(journey, place)


def test_shape_changes_with_the_input_and_not_with_a_field_that_has_a_default() -> None:
    @dataclass
    class Before:
        path: "str"  # noqa: UP037 - all of these are
        size: int

    @dataclass
    class Longer:
        path: str
        size: int
        note: str | None = None

    @dataclass
    class Other:
        path: str
        size: str

    def shape(kind: Any) -> str:
        saga: Saga[Any] = Saga("shape", kind)
        saga.function(name="f", kind="pivot")(lambda _session, _run: None)
        return saga.plan.shape

    assert shape(Before) == shape(Longer) != shape(Other)
    assert form(Longer, "x").read({"path": "p", "size": 1}, "x") == Longer("p", 1)
    assert len({shape(dict), shape(Before), shape(Other)}) == 3
