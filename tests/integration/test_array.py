"""Arrays as text, read by Postgres."""

from __future__ import annotations

import uuid

import psycopg
import pytest

from outbox.sql.array import array
from workers.postgres import Postgres


@pytest.mark.parametrize("cast", ["text", "varchar"])
def test_array_i2_comes_back_as_it_was_whatever_the_texts_are(server: Postgres, cast: str) -> None:
    # Given texts that mean something inside an array's literal
    texts = ["", "null", "NULL", None, '"', "\\", '\\"', "a,b", "{x}", " space ", "line\nline", "ü→😀", "'; drop", "%s"]
    # When Postgres reads them
    with psycopg.connect(server.url()) as conn:
        row = conn.execute(f"select %s::{cast}[]", (array(texts),)).fetchone()
    # Then they are the same
    assert row is not None
    assert row[0] == texts


def test_array_i2_keeps_its_length_when_there_is_nothing_in_it(server: Postgres) -> None:
    with psycopg.connect(server.url()) as conn:
        row = conn.execute("select %s::uuid[]", (array([]),)).fetchone()
    assert row == ([],)


def test_array_i2_takes_ids_numbers_and_booleans(server: Postgres) -> None:
    ids = [uuid.uuid4(), uuid.uuid4()]
    with psycopg.connect(server.url()) as conn:
        row = conn.execute(
            "select %s::uuid[], %s::bigint[], %s::bool[], %s::float8[]",
            (array(ids), array([-1, None, 2**62]), array([True, False]), array([0.1, 1e-7, float("inf")])),
        ).fetchone()
    assert row == (ids, [-1, None, 2**62], [True, False], [0.1, 1e-7, float("inf")])
