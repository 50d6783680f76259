"""The index participant against real Xapian: documents, positions, fencing, full disks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from outbox.document import LANGUAGES, document, key_term
from outbox.errors import Fenced, Unavailable
from outbox.intent import Intent
from outbox.participant import Evidence, LaneView, Outcome, Participant
from outbox.position import Position
from workers import shard as shards
from workers.index import IndexParticipant
from workers.shard import xapian

Opener = Callable[..., IndexParticipant]


def at(number: int) -> Position:
    return Position("a" * 16, number, "b" * 16)


def put(number: int, key: str, **content: Any) -> Intent:
    return Intent.make("index", "put", key, document(**content))._replace(id=number)


def delete(number: int, key: str) -> Intent:
    return Intent.make("index", "delete", key, None)._replace(id=number)


def batch(number: int, size: int = 20) -> list[Intent]:
    """The `number`-th batch: new documents, and one that each batch writes again."""
    own = [put(number * 1000 + i, f"{number}/{i}", text=f"words of {number} and {i}") for i in range(size)]
    return [*own, put(number * 1000 + size, "latest", text=f"batch {number}")]


def verdicts(outcomes: list[Outcome]) -> list[str]:
    return [outcome.verdict.value for outcome in outcomes]


def stored(participant: IndexParticipant, key: str) -> dict[str, Any]:
    db = participant._shard.database()
    found = [json.loads(db.get_document(posting.docid).get_data()) for posting in db.postlist(key_term(key))]
    assert len(found) == 1
    content: dict[str, Any] = found[0]
    return content


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a lane of the index in `tmp_path`; what is left open is closed after the test."""
    made: list[IndexParticipant] = []

    def opener(epoch: int = 1, lane: int = 0, directory: Path = tmp_path / "index") -> IndexParticipant:
        participant = IndexParticipant(directory)
        made.append(participant)
        participant.open(LaneView("index", lane, epoch, unclean=False))
        return participant

    yield opener
    for participant in made:
        participant.close()


# --------------------------------------------------------------------------------------------- documents


def test_index_is_a_participant(tmp_path: Path) -> None:
    participant = IndexParticipant(tmp_path)
    assert isinstance(participant, Participant)
    assert participant.keeps_position
    assert not participant.records_attempts


def test_index_starts_from_the_beginning_when_it_is_new(opened: Opener, tmp_path: Path) -> None:
    participant = opened(lane=3)
    assert participant.position() is None
    assert list(participant.inventory()) == []
    assert (tmp_path / "index" / "03").is_dir()


def test_index_stores_document_and_position_together(opened: Opener) -> None:
    participant = opened()
    intent = put(7, "k", title="Title", text="some text", keywords={"folder": "lib"}, data={"url": "u"})
    assert verdicts(participant.apply([intent], at(1))) == ["applied"]
    participant.close()
    again = opened(epoch=2)
    assert again.position() == at(1)
    (item,) = again.inventory()
    assert item == ("k", sha256(intent.body.encode()).hexdigest(), 7)
    assert stored(again, "k") == {
        "key": "k",
        "id": 7,
        "digest": item.digest,
        "title": "Title",
        "text": "some text",
        "data": {"url": "u"},
    }


def test_index_i3_keeps_one_document_when_applied_twice(opened: Opener) -> None:
    participant = opened()
    participant.apply(batch(1), at(1))
    first = sorted(participant.inventory())
    participant.apply(batch(1), at(1))
    assert sorted(participant.inventory()) == first
    assert participant._shard.database().get_doccount() == len(first)


def test_index_i4_ends_with_the_last_intent_when_a_batch_has_several_of_a_key(opened: Opener) -> None:
    participant = opened()
    intents = [
        put(1, "a", text="one"),
        put(2, "b", text="one"),
        put(3, "a", text="two"),
        delete(4, "b"),
        delete(5, "c"),
        put(6, "c", text="three"),
    ]
    assert verdicts(participant.apply(intents, at(1))) == ["applied"] * 6
    assert {(item.key, item.id) for item in participant.inventory()} == {("a", 3), ("c", 6)}


def test_index_delete_is_harmless_when_there_is_nothing(opened: Opener) -> None:
    participant = opened()
    participant.apply([put(1, "a", text="x")], None)
    for _ in range(2):
        assert verdicts(participant.apply([delete(2, "a")], None)) == ["applied"]
    assert list(participant.inventory()) == []


def test_index_keeps_keys_apart_when_they_are_long_and_alike(opened: Opener) -> None:
    participant = opened()
    keys = ["x" * 511 + end for end in "ab"]
    participant.apply([put(n, key, text=str(n), keywords={"tag": key}) for n, key in enumerate(keys)], at(1))
    assert {item.key for item in participant.inventory()} == set(keys)
    participant.apply([delete(3, keys[0])], at(2))
    assert {item.key for item in participant.inventory()} == {keys[1]}


def test_index_has_a_stemmer_for_every_language(opened: Opener) -> None:
    participant = opened()
    intents = [put(n, code, text="word 東京", language=code) for n, code in enumerate(LANGUAGES)]
    assert set(verdicts(participant.apply(intents, at(1)))) == {"applied"}


def test_index_writes_only_the_position_when_the_batch_is_empty(opened: Opener) -> None:
    participant = opened()
    assert participant.apply([], at(5)) == []
    assert participant.position() == at(5)
    assert participant.apply([], None) == []


def test_index_inventory_sees_every_document_when_a_writer_overtakes_it(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SLICE", 5)
    writer = opened()
    writer.apply(batch(1), at(1))
    expected = {item.key for item in writer.inventory()}
    seen: set[str] = set()
    for number, item in enumerate(writer.inventory()):
        seen.add(item.key)
        if number % 3 == 0:
            writer.apply([put(9000 + number, "latest", text=f"again {number}")], None)
    assert seen == expected


def test_index_inventory_has_all_shards_when_no_lane_is_opened(opened: Opener, tmp_path: Path) -> None:
    for lane in range(3):
        opened(lane=lane).apply([put(lane, f"k{lane}", text="x")], at(1))
    assert {item.key for item in IndexParticipant(tmp_path / "index").inventory()} == {"k0", "k1", "k2"}


def test_index_probe_has_no_opinion(opened: Opener) -> None:
    doubt: Any = object()
    assert opened().probe([doubt, doubt]) == [(Evidence.UNKNOWN, None)] * 2


def test_index_is_of_the_format_that_readers_know(opened: Opener, tmp_path: Path) -> None:
    participant = opened()
    participant.apply([put(1, "k", keywords={"folder": "lib", "tag": ["a", "b"]})], at(1))
    participant.apply([put(2, "l", keywords={"author": "me"})], at(2))
    db = xapian.Database(str(tmp_path / "index" / "00"))
    assert db.get_metadata("outbox.fields") == b"author folder tag"
    assert db.get_metadata("outbox.position") == str(at(2)).encode()
    assert db.get_metadata("outbox.epoch") == b"1"


# ------------------------------------------------------------------------------------------------ failures

POISON = {
    "action": put(2, "bad", text="x")._replace(action="explode"),
    "no object": put(2, "bad")._replace(body="[]"),
    "no JSON for Python": put(2, "bad")._replace(body='{"data": {"n": ' + "9" * 5000 + "}}"),
    "too deep": put(2, "bad")._replace(body="[" * 5000 + "]" * 5000),
    "infinite": put(2, "bad")._replace(body='{"data": {"n": 1' + "0" * 400 + ".5}}"),
    "surrogate in a keyword": put(2, "bad")._replace(body='{"keywords": {"tag": "\\ud800"}}'),
    "surrogate in the title": put(2, "bad")._replace(body='{"title": "\\ud800"}'),
    "secret": put(2, "bad")._replace(body='{"secret": "hunter2"}'),
}


@pytest.mark.parametrize("bad", POISON.values(), ids=POISON.keys())
def test_index_i2_sets_one_intent_aside_when_it_is_poison(opened: Opener, bad: Intent) -> None:
    participant = opened()
    participant.apply([put(0, "before", text="x")], at(1))
    intents = [put(1, "a", text="x"), bad, put(3, "bad", text="x"), delete(4, "bad"), put(5, "c", text="x")]
    outcomes = participant.apply(intents, at(2))
    assert verdicts(outcomes) == ["applied", "poison", "blocked", "blocked", "applied"]
    assert ": " in outcomes[1].error
    assert "hunter2" not in outcomes[1].error
    assert {item.key for item in participant.inventory()} == {"before", "a", "c"}
    # What isn't parked yet must not be passed.
    assert participant.position() == at(1)


def test_index_keeps_what_came_before_the_poison_of_the_same_key(opened: Opener) -> None:
    participant = opened()
    outcomes = participant.apply([put(1, "k", text="x"), put(2, "k")._replace(body="0"), delete(3, "k")], at(1))
    assert verdicts(outcomes) == ["applied", "poison", "blocked"]
    assert [(item.key, item.id) for item in participant.inventory()] == [("k", 1)]


def test_index_i6_is_fenced_when_a_later_epoch_has_opened_it(opened: Opener) -> None:
    opened(epoch=5).close()
    with pytest.raises(Fenced):
        opened(epoch=4)
    assert opened(epoch=5).position() is None


def test_index_i6_is_fenced_when_another_owner_came_while_it_was_down(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = opened(epoch=1)
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(Unavailable):
        stale.apply(batch(1), at(1))
    monkeypatch.undo()
    owner = opened(epoch=2)
    owner.close()
    with pytest.raises(Fenced):
        stale.apply(batch(2), at(2))


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_index_is_unavailable_when_another_process_writes_it(opened: Opener) -> None:
    first = opened()
    with pytest.raises(Unavailable, match="another process"):
        opened(epoch=2)
    first.close()
    opened(epoch=2)


def test_index_is_unavailable_when_it_is_damaged(opened: Opener, tmp_path: Path) -> None:
    opened().close()
    (tmp_path / "index" / "00" / "iamglass").write_bytes(b"not a version file")
    with pytest.raises(Unavailable, match="move it away"):
        opened()
    # As the message says.
    (tmp_path / "index" / "00").rename(tmp_path / "damaged")
    assert opened().position() is None


def test_index_is_unavailable_when_its_directory_can_not_be_made(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        opened(directory=tmp_path / "file" / "index")


def test_index_writes_nothing_of_a_batch_when_it_is_interrupted(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    participant = opened()
    participant.apply([put(1, "a", text="x")], at(1))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "hit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        participant.apply(batch(2), at(2))
    monkeypatch.undo()
    assert participant.position() == at(1)
    assert [item.key for item in participant.inventory()] == ["a"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.root
def test_index_i10_waits_and_goes_on_when_the_disk_was_full(opened: Opener, small_disk: Path) -> None:
    participant = opened(directory=small_disk / "index")
    participant.apply(batch(1), at(1))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        # A short write means that the disk is full.
        while file.write(b"x" * 65536) == 65536:
            pass
    # What fits into the free blocks of the index may still be written; a batch of new words doesn't.
    big = [put(2000 + n, f"big/{n}", text=" ".join(f"w{n}x{m}" for m in range(50))) for n in range(40)]
    for _ in range(2):
        with pytest.raises(Unavailable, match="see to its disk"):
            participant.apply(big, at(2))
    assert participant.position() == at(1)
    filler.unlink()
    assert set(verdicts(participant.apply(big, at(2)))) == {"applied"}
    assert participant.position() == at(2)
    assert {item.key for item in participant.inventory()} == {i.key for i in [*batch(1), *big]}
