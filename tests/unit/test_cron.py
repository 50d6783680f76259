"""Schedules: which slots an expression names, across changes of the clocks, and what is done about missed ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any

import dramatiq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.actor import Cron, OutboxBroker
from outbox.actor.cron import LATE, MOST, due, schedules


def local(cron: Cron, after: str, count: int) -> list[str]:
    """The next slots after a UTC time, as a clock on the wall shows them."""
    start = datetime.fromisoformat(after).replace(tzinfo=UTC)
    return [f"{slot.astimezone(cron.zone):%m-%d %H:%M %Z}" for slot in islice(cron.slots(start), count)]


def test_cron_slot_follows_the_wall_clock_when_the_season_changes() -> None:
    cron = Cron("0 9 * * *", timezone="Europe/Berlin")
    assert local(cron, "2026-03-28 07:00", 2) == ["03-28 09:00 CET", "03-29 09:00 CEST"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # The hour from 2 to 3 is not there: what was for it runs at its end, once.
        ("30 2 * * *", ["03-28 02:30 CET", "03-29 03:00 CEST", "03-30 02:30 CEST"]),
        ("0,30 2 * * *", ["03-28 02:00 CET", "03-28 02:30 CET", "03-29 03:00 CEST", "03-30 02:00 CEST"]),
        ("0 3 * * *", ["03-28 03:00 CET", "03-29 03:00 CEST", "03-30 03:00 CEST"]),
        # What runs every hour just goes on.
        ("0 * * * *", ["03-28 01:00 CET", "03-28 02:00 CET"]),
    ],
)
def test_cron_slot_in_the_missing_hour_comes_at_its_end_when_the_clocks_go_forward(
    expression: str, expected: list[str]
) -> None:
    assert local(Cron(expression, timezone="Europe/Berlin"), "2026-03-27 23:30", len(expected)) == expected


def test_cron_every_hour_goes_on_when_the_clocks_go_forward() -> None:
    cron = Cron("0 * * * *", timezone="Europe/Berlin")
    assert local(cron, "2026-03-29 00:30", 2) == ["03-29 03:00 CEST", "03-29 04:00 CEST"]
    assert local(cron, "2026-03-28 23:30", 2) == ["03-29 01:00 CET", "03-29 03:00 CEST"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # The hour from 2 to 3 comes twice: a fixed hour runs the first time only.
        ("30 2 * * *", ["10-25 02:30 CEST", "10-26 02:30 CET"]),
        # What runs every half hour runs in both.
        ("*/30 * * * *", ["10-25 01:30 CEST", "10-25 02:00 CEST", "10-25 02:30 CEST", "10-25 02:00 CET",
                          "10-25 02:30 CET", "10-25 03:00 CET"]),
    ],
)  # fmt: skip
def test_cron_slot_of_the_doubled_hour_comes_once_when_the_hour_is_fixed(expression: str, expected: list[str]) -> None:
    assert local(Cron(expression, timezone="Europe/Berlin"), "2026-10-24 23:00", len(expected)) == expected


def test_cron_slot_is_not_named_again_when_asked_in_the_second_of_the_doubled_hours() -> None:
    # Given a worker that starts at 02:15 in the second 02 o'clock, when 02:30 was in the first
    cron = Cron("30 2 * * *", timezone="Europe/Berlin")
    assert local(cron, "2026-10-25 01:15", 1) == ["10-26 02:30 CET"]


@given(
    expression=st.sampled_from(
        ["*/7 * * * *", "30 2 * * *", "0 */2 * * *", "15,45 1-3 * * *", "0 0 1 * *", "59 23 * * sun"]
    ),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    start=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)),  # noqa: DTZ001 - made aware below
    skip=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_cron_slots_rise_and_are_the_same_from_wherever_one_asks(
    expression: str, zone: str, start: datetime, skip: int
) -> None:
    # Given slots as they are found from one time on
    cron = Cron(expression, timezone=zone)
    found = list(islice(cron.slots(start.replace(tzinfo=UTC)), 12))
    assert all(one < two for one, two in pairwise(found))
    # When one asks again from one of them, or just before it, then the same come
    assert list(islice(cron.slots(found[skip]), 5)) == found[skip + 1 : skip + 6]
    assert next(cron.slots(found[skip] - timedelta(seconds=1))) == found[skip]


NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def at(hour: int, minute: int = 0, day: int = 1) -> datetime:
    return datetime(2026, 6, day, hour, minute, tzinfo=UTC)


def test_cron_missed_slots_are_made_up_for_as_the_schedule_says() -> None:
    # Given a schedule for each hour, and workers that were away from 9 to 12:20
    def todo(missed: Any, now: datetime) -> tuple[list[datetime], int]:
        found = due(Cron("0 * * * *", missed=missed), at(9), now)
        # Whatever is sent, all of them are done with then.
        assert found.upto == at(12)
        assert found.following == at(13)
        return found.slots, found.left_out

    # Then it says what is sent
    assert todo("once", at(12, 20)) == ([at(12)], 2)
    assert todo("skip", at(12, 20)) == ([], 3)
    assert todo("all", at(12, 20)) == ([at(10), at(11), at(12)], 0)
    # And one that has just come is not missed
    assert todo("skip", at(12) + LATE) == ([at(12)], 2)


def test_cron_missed_slots_are_bounded_when_a_machine_was_off_for_years() -> None:
    # Given a schedule for each minute, and three years
    cron = Cron("* * * * *", missed="all")
    found = due(cron, NOON - timedelta(days=1100), NOON)
    # Then the newest are sent, and what is left out is told
    assert found.slots == [NOON - timedelta(minutes=n) for n in reversed(range(MOST))]
    assert found.left_out > 0
    assert due(Cron("* * * * *"), NOON - timedelta(days=1100), NOON).slots == [NOON]
    # And a rare one is found however long ago it was
    rare = due(Cron("0 0 29 2 *", missed="all"), datetime(2015, 1, 1, tzinfo=UTC), NOON)
    assert [slot.year for slot in rare.slots] == [2016, 2020, 2024]


def test_cron_nothing_is_due_when_the_clock_stands_before_the_last_slot() -> None:
    found = due(Cron("0 * * * *", missed="all"), at(12), at(11))
    assert (found.slots, found.left_out) == ([], 0)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("* * * *", "five fields"),
        ("* * * * * *", "five fields"),
        ("61 * * * *", "not an expression of cron: Bad minute"),
        ("0 0 30 2 *", "not an expression of cron|no time at all"),
        ("@daily", "five fields"),
        (7, "neither an expression"),
        (["0 0 * * *", "0 1 * * *"], "give each a name"),
        ([Cron("0 0 * * *", name="n"), Cron("0 1 * * *", name="n")], "two schedules n"),
        (Cron("0 0 * * *", name="n" * 201), "over 200 bytes"),
        (Cron("0 0 * * *", args=(object(),)), "JSON"),
    ],
)
def test_cron_schedule_is_refused_when_an_actor_is_declared(option: object, sentence: str) -> None:
    broker = OutboxBroker()
    with pytest.raises((ValueError, TypeError), match=sentence):
        dramatiq.actor(broker=broker, cron=option)(lambda: None)
    assert broker.actors == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"timezone": "Europe/Nowhere"}, "no time zone 'Europe/Nowhere'"), ({"timezone": "../etc"}, "no time zone"),
     ({"missed": "never"}, "not one of skip, once and all")],
)  # fmt: skip
def test_cron_is_refused_when_its_options_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Cron("0 0 * * *", **options)


def test_cron_names_are_one_for_each_schedule_of_all_actors() -> None:
    # Given an actor with two schedules
    broker = OutboxBroker()
    both = [Cron("0 0 * * *", name="night", args=(1,)), Cron("0 12 * * *", name="day", args=(2,))]
    actor = dramatiq.actor(broker=broker, actor_name="a", cron=both)(lambda n: None)
    assert [(one.name, one.message().args) for one in schedules(actor)] == [("night", (1,)), ("day", (2,))]
    # Then no other actor has one of their names
    with pytest.raises(ValueError, match="two schedules"):
        dramatiq.actor(broker=broker, actor_name="night", cron="0 1 * * *")(lambda: None)
    assert {one.name for one in broker.schedules()} == {"night", "day"}
