"""The index as people handle it: restored from a copy, swapped, fed by another log, in several shards."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from outbox import Outbox, Settings, status
from outbox.errors import Fenced, NotThisLane
from outbox.participant import LaneView
from outbox.search import Index
from tests.fixtures.site import LIMIT, Site, until
from tests.integration.test_index import Opener, at, batch, opened, put
from tests.integration.test_search import write
from workers.index import IndexParticipant
from workers.shard import inventory

__all__ = ["opened"]  # a fixture

HALVES = ((0, 8191), (8192, 16383))


def digests(site: Site) -> dict[str, str]:
    """key → digest of the document's intent, of all shards."""
    return {item.key: item.digest for item in IndexParticipant(site.home / "index").inventory()}


def due(site: Site) -> dict[str, str]:
    """key → digest of what the log says last of it, without what is deleted."""
    found = site.admin.execute(
        "select key, encode(sha256(convert_to(payload::text, 'UTF8')), 'hex') from (select distinct on (key) * "
        "from outbox.log where target = 'index' order by key, id desc) as latest where action = 'put'"
    )
    return dict(found.fetchall())


def reason(site: Site, lane: int = 0) -> str | None:
    """Why a lane is stopped; None if it isn't."""
    row = site.admin.execute(
        "select reason from outbox.lane where target = 'index' and lane = %s and state = 'stopped'", (lane,)
    ).fetchone()
    return None if row is None else str(row[0])


def drain(site: Site, *words: str) -> None:
    assert site.start("index", "--until-idle", *words).wait(LIMIT) == 0


def replace(shard: Path, copy: Path) -> None:
    """Put the copy in the shard's place; again, if its worker made a new one in between."""
    for number in itertools.count():
        shard.rename(shard.with_name(f"old-{number}"))
        try:
            copy.rename(shard)
        except OSError:
            continue
        return


# -------------------------------------------------------------------------------------- restored from a copy


@pytest.mark.parametrize("running", [False, True], ids=["worker-stopped", "worker-running"])
def test_index_i2_i3_catches_up_when_it_was_restored_from_an_older_copy(site: Site, running: bool) -> None:
    # Given: a copy of the shard, and a log that went on
    site.start("clock")
    for n in range(5):
        site.emit(f"k{n}", "early")
    drain(site)
    shard, copy = site.home / "index" / "00", site.home / "copy"
    shutil.copytree(shard, copy)
    for n in range(3, 9):
        site.emit(f"k{n}", "late")
    site.admin.execute("select outbox.emit('index', 'delete', 'k0')")
    if running:
        site.start("index")
        until(lambda: digests(site) == due(site), "everything is indexed")
    else:
        drain(site)

    # When: the copy is put in its place
    assert {item.key for item in inventory(copy)} == {f"k{n}" for n in range(5)}
    replace(shard, copy)
    site.emit("after")

    # Then: what it has missed comes again, by itself
    if not running:
        site.start("index")
    until(lambda: digests(site) == due(site), "the copy catches up")
    assert len(digests(site)) == 9


def test_index_i3_i6_writes_nothing_into_a_shard_that_was_put_in_place_of_its_own(
    opened: Opener, tmp_path: Path
) -> None:
    # Given: a worker with an open shard, and an older copy of that
    owner = opened()
    owner.apply(batch(1), at(1))
    shard = tmp_path / "index" / "00"
    shutil.copytree(shard, tmp_path / "copy")
    owner.apply(batch(2), at(2))
    # When: the copy replaces the files in the same folder
    for file in shard.iterdir():
        file.unlink()
    for file in (tmp_path / "copy").iterdir():
        shutil.copy2(file, shard)
    # Then: the worker notices, leaves them as they are, and is told to claim its lane anew
    with pytest.raises(Fenced, match="replaced under its worker"):
        owner.apply(batch(3), at(3))
    again = opened(epoch=2)
    assert again.position() == at(1)
    assert {item.key for item in again.inventory()} == {intent.key for intent in batch(1)}


def test_index_i6_makes_no_new_shard_in_the_middle_of_its_log_when_its_own_is_moved_away(
    opened: Opener, tmp_path: Path
) -> None:
    owner = opened()
    owner.apply(batch(1), at(1))
    (tmp_path / "index" / "00").rename(tmp_path / "away")
    with pytest.raises(Fenced):
        owner.apply(batch(2), at(2))
    assert opened(epoch=2).position() is None


def test_index_reader_sees_the_copy_when_it_was_restored_in_place(tmp_path: Path) -> None:
    # Given: two indexes of the same revision, and a reader of the first
    for name in ("one", "two"):
        write(tmp_path / name, 0, {name: {"text": "word"}})
    one, two = tmp_path / "one" / "00", tmp_path / "two" / "00"
    with Index(tmp_path / "one") as index:
        assert [hit.key for hit in index.search("word").hits] == ["one"]
        # When: the files are replaced, and the folder stays
        for file in two.iterdir():
            (one / file.name).unlink(missing_ok=True)
            shutil.copy2(file, one)
        # Then
        assert [hit.key for hit in index.search("word").hits] == ["two"]


# ---------------------------------------------------------------------------------------------- refusals


def _another_database(site: Site) -> None:
    site.admin.execute("update outbox.identity set log = 'ffffffffffffffff'")


def _restored(site: Site) -> None:
    """What the ticks look like when the same numbers were taken again after a restore."""
    for (tick,) in site.admin.execute("select id from outbox.tick order by id").fetchall():
        site.admin.execute("update outbox.tick set nonce = 'ffffffffffffffff' where id = %s", (tick,))
    # ... and the positions since then are not those that the index knows
    site.admin.execute("update outbox.position set own = null")


def _restored_to_an_earlier_time(site: Site) -> None:
    site.admin.execute("delete from outbox.position")
    site.admin.execute("delete from outbox.tick where id > 1")


@pytest.mark.parametrize(
    ("change", "whose"),
    [
        (_another_database, "another database's log"),
        (_restored, "restored to an earlier time"),
        (_restored_to_an_earlier_time, "restored to an earlier time"),
    ],
)
def test_index_i1_i2_stops_and_says_what_to_do_when_its_position_is_not_of_this_log(
    site: Site, change: Callable[[Site], None], whose: str
) -> None:
    # Given: an index that was fed by a log which is another one now
    clock = site.start("clock")
    site.emit("k")
    drain(site)
    clock.terminate()
    assert clock.wait(LIMIT) == 0
    change(site)
    # ... by the index alone: nobody else remembers
    shutil.rmtree(site.home / "none" / "watermark")
    site.emit("never")

    # When: its worker starts
    worker = site.start("index")

    # Then: the lane stops, nothing is written, and the status names the way out
    stopped = until(partial(reason, site), "the lane is stopped")
    assert whose in stopped
    assert "Nothing was skipped" in stopped
    move = f"mv {site.home}/index/00 {site.home}/index/00.refused"
    way = move if change is _another_database else "outbox adopt"
    assert way in stopped
    until(lambda: way in " ".join(status.read(site.admin).warnings()), "the status says it")
    assert list(digests(site)) == ["k"]
    worker.terminate()
    worker.wait(LIMIT)
    if change is not _another_database:
        # A log that went back concerns everybody: no other lane goes on either
        site.start("blob")
        until(lambda: site.one("select reason from outbox.lane where target = 'blob'") == stopped, "the others stop")
        return

    # And: done so, it is filled from this log
    shutil.move(site.home / "index" / "00", site.home / "index" / "00.refused")
    site.start("clock")
    drain(site)
    assert digests(site) == due(site)


def test_index_i1_i4_stops_when_a_shard_was_swapped_with_another_lanes(site: Site, tmp_path: Path) -> None:
    # Given: an index of two shards
    site.admin.execute("select outbox.register('index', 2)")
    for n in range(20):
        site.emit(f"k{n}")
    site.start("clock")
    drain(site)
    before = digests(site)

    # When: their folders are swapped
    index = site.home / "index"
    (index / "00").rename(index / "swap")
    (index / "01").rename(index / "00")
    (index / "swap").rename(index / "01")
    site.emit("k1", "changed")
    site.start("index")

    # Then: both lanes stop, and nothing was written into the wrong one
    for lane in (0, 1):
        stopped = until(partial(reason, site, lane), f"lane {lane} is stopped")
        assert "was swapped with another shard" in stopped
        assert f"mv {index}/0{lane} {index}/0{lane}.refused" in stopped
    assert digests(site) == before


@pytest.mark.parametrize("other", [HALVES[0], HALVES[1], (0, 5460)])
def test_index_refuses_a_shard_of_another_number_of_lanes(
    opened: Opener, tmp_path: Path, other: tuple[int, int]
) -> None:
    owner = opened()
    owner.apply([put(1, "k", text="x")], at(1))
    owner.close()
    for _ in range(2):
        participant = IndexParticipant(tmp_path / "index")
        with pytest.raises(NotThisLane, match=r"Either put the lane's own shard in its place, or move the shard away"):
            participant.open(LaneView("index", 0, 2, unclean=False, slots=other))
        participant.close()
    assert opened(epoch=1).position() == at(1)


def test_index_takes_an_empty_shard_of_another_number_of_lanes_and_begins_anew(tmp_path: Path) -> None:
    for epoch, slots in enumerate([(0, 16383), *HALVES], 1):
        participant = IndexParticipant(tmp_path)
        participant.open(LaneView("index", 0, epoch, unclean=False, slots=slots))
        assert participant.position() is None
        participant.apply([], at(epoch))
        participant.close()


# ------------------------------------------------------------------------------------------ several shards


@pytest.fixture
def two(site: Site) -> Site:
    site.admin.execute("select outbox.register('index', 2)")
    return site


@pytest.mark.parametrize("apart", [False, True], ids=["a-thread-each", "a-process-each"])
def test_index_i2_i3_i4_drains_two_lanes_into_two_shards(two: Site, apart: bool) -> None:
    two.start("clock")
    for n in range(40):
        two.emit(f"k{n % 30}", f"version {n}")
    if apart:
        drain(two, "--lane", "0")
        first = digests(two)
        assert 0 < len(first) < 30
        drain(two, "--lane", "1")
        assert first.items() < digests(two).items()
    else:
        drain(two)
    assert digests(two) == due(two)
    # Each key in the shard of its slot.
    for lane, (low, high) in enumerate(HALVES):
        participant = IndexParticipant(two.home / "index")
        participant.open(LaneView("index", lane, 100, unclean=False, slots=(low, high)))
        for item in participant.inventory():
            assert low <= two.one(f"select outbox.slot('{item.key}')") <= high
        participant.close()


def test_work_says_so_when_there_is_no_such_lane(two: Site) -> None:
    worker = two.start("index", "--lane", "2")
    _, errors = worker.communicate(timeout=LIMIT)
    assert worker.returncode == 1
    assert errors.splitlines()[-1] == "outbox work: index has no lane 2: it has 2, counted from 0 (`outbox register`)"


def test_search_i2_waits_for_all_shards_and_merges_them(two: Site, app_url: str) -> None:
    # Given: documents of one transaction, in both shards
    two.start("clock")
    for lane in ("0", "1"):
        two.start("index", "--lane", lane)
    settings = Settings(database=app_url, index=two.home / "index", blobs=two.home / "blobs", smtp="smtp://127.0.0.1:1")
    engine = create_engine(settings.sqlalchemy_url)
    sessions: sessionmaker[Session] = sessionmaker(engine)
    outbox = Outbox(sessions, settings)
    words = ["lighthouse", "harbour", "pier", "tide"]
    with sessions.begin() as session:
        for n in range(40):
            text = f"{' '.join(['lighthouse'] * (n % 7 + 1))} and {words[n % 4]} number {n}. " + "Other words. " * 10
            outbox.index.put(session, f"k{n}", title=f"Note {n}", text=text, keywords={"side": words[n % 2]})
    token = outbox.token(session)
    assert token is not None

    # When: the application waits for its own commit
    outbox.wait(session, token, "index", timeout=LIMIT)

    # Then: a query sees all of it, from both
    with Index(settings.index) as index:
        found = index.search("lighthouses", limit=100)
        assert found.matches == 40
        assert {hit.key for hit in found.hits} == {f"k{n}" for n in range(40)}
        lanes = {
            key: lane for lane in (0, 1) for key in [item.key for item in inventory(two.home / "index" / f"0{lane}")]
        }
        assert set(lanes.values()) == {0, 1}
        # Ranked as one index: the best first, whatever shard it is in.
        scores = [hit.score for hit in found.hits]
        assert scores == sorted(scores, reverse=True)
        # Paged without a gap or an overlap.
        pages = [hit.key for n in range(0, 40, 7) for hit in index.search("lighthouses", limit=7, offset=n).hits]
        assert pages == [hit.key for hit in found.hits]
        # Snippets, filters, the key, and spelling, in whatever shard.
        assert all("**lighthouse**" in hit.snippet for hit in found.hits)
        assert index.search("lighthouse", filters={"side": "harbour"}).matches == 20
        assert {index.search(f"key:k{n}").hits[0].title for n in range(40)} == {f"Note {n}" for n in range(40)}
        assert index.search("lihgthouse").corrected == "lighthouse"
    engine.dispose()


def test_search_scores_are_those_of_one_index_when_there_are_several_shards(tmp_path: Path) -> None:
    texts = {f"k{n}": {"text": "rare " * (n == 3) + "common words " * (n + 1)} for n in range(9)}
    write(tmp_path / "one", 0, texts)
    for lane in range(3):
        write(tmp_path / "three", lane, {key: texts[key] for n, key in enumerate(texts) if n % 3 == lane})
    results: list[Any] = []
    for name in ("one", "three"):
        with Index(tmp_path / name) as index:
            for query in ("rare", "common", "rare OR common"):
                hits = index.search(query, limit=9).hits
                results.append([query, *sorted((hit.key, round(hit.score, 6)) for hit in hits)])
    assert results[:3] == results[3:]


def test_status_shows_each_lane_of_the_index(two: Site, admin: psycopg.Connection[Any]) -> None:
    shown = [(lane["target"], lane["lane"]) for lane in status.read(admin).lanes if lane["target"] == "index"]
    assert shown == [("index", 0), ("index", 1)]
