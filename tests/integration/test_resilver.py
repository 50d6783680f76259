"""A resilver of the index: the new one is what the log says, and whoever searches or writes notices nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import generation
from outbox.errors import Fenced, NotThisLane
from outbox.lane import claim
from outbox.participant import LaneView
from tests.fixtures.rebuild import Rebuild, Writers
from tests.fixtures.site import LIMIT, Site, until
from workers.index import IndexParticipant
from workers.shard import format_of

ROOT = Path(__file__).resolve().parents[2]

POISON = json.dumps({"text": ["no text"]})


def park(site: Site, key: str) -> None:
    """An intent that failed, and is tried again tomorrow."""
    with site.admin.transaction():
        site.emit(key, "failed at first")
        site.admin.execute(
            "insert into outbox.parked (id, target, slot, key, reason, retry_at) select id, target, slot, key, "
            "'due', now() + interval '1 day' from outbox.log order by id desc limit 1"
        )


def lanes(site: Site) -> list[tuple[int, int, int]]:
    return site.admin.execute(
        "select lane, slot_low, slot_high from outbox.lane where target = 'index' order by lane"
    ).fetchall()


def test_resilver_i8_index_is_what_the_log_says_when_its_shards_change_while_writers_write(rebuild: Rebuild) -> None:
    # Given an index with deleted documents, and intents that are poison, skipped and not due yet
    site = rebuild.site
    site.start("clock")
    for n in range(60):
        site.emit(f"first/{n}")
    for n in range(0, 60, 7):
        site.admin.execute("select outbox.emit('index', 'delete', %s)", (f"first/{n}",))
    site.admin.execute("select outbox.emit('index', 'put', 'first/1', %s)", (POISON,))
    site.admin.execute("select outbox.emit('index', 'put', 'later', '{\"text\": \"x\"}', now() + interval '1 day')")
    worker = site.start("index")
    until(lambda: rebuild.inventory() == rebuild.due(), "the first index")
    assert site.one("select count(*) from outbox.parked") == 2
    with Writers(rebuild.app_url):
        # When it is cut into three, and into two, while its worker runs and others write
        for number, shards in enumerate((3, 2), 1):
            rebuild.run("--yes", "--shards", str(shards))
            # Then searches read the new one, the old one is gone, and the lanes are cut as the shards
            assert rebuild.generation == number
            assert rebuild.folders() == [f"g{number}"]
            assert [lane[0] for lane in lanes(site)] == list(range(shards))
            assert lanes(site)[-1][2] == 16383
    # Then the worker, which was never told, goes on with them; nothing is missing and nothing too much
    until(lambda: rebuild.inventory() == rebuild.due(), "the worker has drained the new lanes")
    assert worker.poll() is None
    assert site.one("select count(*) from outbox.parked") == 2
    rows = site.admin.execute("select state, result ->> 'shards' from outbox.operation order by id").fetchall()
    assert rows == [("done", "3"), ("done", "2")]


SEARCHER = """
import sys
from pathlib import Path
from outbox.search import Index

seen = set()
with Index(Path(sys.argv[1])) as index:
    for line in iter(sys.stdin.readline, ""):
        for _ in range(5):
            found = {hit.key for hit in index.search("always", limit=5000).hits}
            # A key that was found once is always found: nothing here is deleted.
            assert seen <= found, f"missing: {sorted(seen - found)[:5]} of {len(seen)}"
            seen = found
        print(len(seen), index._identity[0][0].parent.name, flush=True)
"""


def test_resilver_i5_searches_find_all_that_they_found_before_when_the_index_is_swapped(rebuild: Rebuild) -> None:
    # Given a search in another process, again and again, and documents that come all the time
    site = rebuild.site
    site.start("clock")
    site.start("index")
    for n in range(100):
        site.emit(f"old/{n}", "always")
    until(lambda: len(rebuild.inventory()) == 100, "the first documents")
    searcher = subprocess.Popen(
        [sys.executable, "-c", SEARCHER, str(rebuild.index)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    site.running.append(searcher)

    def search() -> list[str]:
        assert searcher.stdin is not None
        assert searcher.stdout is not None
        searcher.stdin.write("\n")
        searcher.stdin.flush()
        line = searcher.stdout.readline()
        assert line, searcher.communicate()[1]
        return line.split()

    emitted = 100
    for number in (1, 2, 3):
        # When the index is built anew
        resilver = rebuild.start("--yes", "--shards", str(number))
        while resilver.poll() is None or search()[1] != f"g{number}":
            site.emit(f"new/{emitted}", "always")
            emitted += 1
            # Then no search fails, and none misses what one before it had
            search()
        assert resilver.returncode == 0, resilver.communicate()
    until(lambda: search()[0] == str(emitted), "the searches find everything")


def test_resilver_i4_catches_up_what_was_set_aside_when_it_is_applied_later(rebuild: Rebuild) -> None:
    from workers.resilver.draft import Draft

    # Given intents that wait for another try
    site = rebuild.site
    site.start("clock")
    site.emit("same", "first")
    park(site, "same")
    park(site, "other")
    rebuild.drain()
    place = generation.folder(rebuild.index, 1)
    place.mkdir()
    draft = Draft(place, 0, 1)
    with psycopg.connect(rebuild.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        # When a draft is built, they become due, and it catches up
        draft.build(conn, lambda _: None)
        assert (draft.documents, len(draft.aside)) == (1, 2)
        site.admin.execute("update outbox.parked set retry_at = now()")
        rebuild.drain()
        assert draft.catch_up(conn) == 2
        # Then it has them, although their places in the log are behind it
        assert (draft.documents, draft.aside) == (2, [])
        assert draft.check(conn, lambda _: None) == []
    draft.close()


def test_resilver_i4_leaves_out_a_repetition_that_something_newer_came_before(rebuild: Rebuild) -> None:
    from outbox import operation
    from outbox.repetition import Again, append
    from workers.resilver.draft import Draft

    # Given a draft, and then a newer put and a repetition of the older one
    site = rebuild.site
    site.start("clock")
    site.emit("k", "older")
    rebuild.drain()
    place = generation.folder(rebuild.index, 1)
    place.mkdir()
    draft = Draft(place, 0, 1)
    with psycopg.connect(rebuild.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        draft.build(conn, lambda _: None)
        site.emit("k", "newer")
        with conn.transaction():
            append(conn, operation.begin(conn, "replay", {}), "index", [Again(1, 0)])
        rebuild.drain()
        # When it catches up, then it has the newer one, as the index that serves
        assert draft.catch_up(conn) == 2
        assert draft._digest("k") == rebuild.inventory()["k"] == rebuild.due_of(2)
    draft.close()


def test_resilver_i8_finds_a_document_that_is_not_what_the_log_says(rebuild: Rebuild) -> None:
    from outbox.document import key_term
    from workers.resilver.draft import Draft
    from workers.shard import xapian

    # Given a draft in which one document is another one, one is missing, and one is too much
    site = rebuild.site
    site.start("clock")
    for key in ("a", "b", "c"):
        site.emit(key)
    rebuild.drain()
    place = generation.folder(rebuild.index, 1)
    place.mkdir()
    draft = Draft(place, 0, 1)
    with psycopg.connect(rebuild.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        draft.build(conn, lambda _: None)
        assert draft.check(conn, lambda _: None) == []
        with draft._shard.transaction() as db:
            [posting] = list(db.postlist(key_term("a")))
            doc = db.get_document(posting.docid)
            doc.set_data(json.dumps({"key": "a", "digest": "0" * 64, "id": 1}))
            db.replace_document(posting.docid, doc)
        # Then each is found
        assert draft.check(conn, lambda _: None) == ["the document of intent 1 is missing or another one"]
        with draft._shard.transaction() as db:
            db.delete_document(key_term("a"))
        assert draft.check(conn, lambda _: None) == ["the document of intent 1 is missing or another one"]
        draft.begin_anew()
        draft.build(conn, lambda _: None)
        with draft._shard.transaction() as db:
            db.add_document(xapian.Document())
        assert draft.check(conn, lambda _: None) == ["1 documents are of no live key"]
    draft.close()


def test_resilver_i2_tries_again_what_was_applied_between_the_last_look_and_the_swap(rebuild: Rebuild) -> None:
    from outbox import Settings
    from workers.resilver import swap
    from workers.resilver.draft import Draft

    # Given a draft that has left out an intent which the old lane applies since
    site = rebuild.site
    site.start("clock")
    park(site, "k")
    rebuild.drain()
    place = generation.folder(rebuild.index, 1)
    place.mkdir()
    draft = Draft(place, 0, 1)
    settings = Settings.load(env=rebuild.environment)
    with psycopg.connect(rebuild.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        draft.build(conn, lambda _: None)
        site.admin.execute("update outbox.parked set retry_at = now()")
        rebuild.drain()
        assert list(rebuild.inventory()) == ["k"]
        # When the lanes are swapped
        owned = swap.swap(conn, rebuild.index, [draft], was=0, number=1, ttl=60)
        swap.drain(conn, settings, rebuild.index, owned, 0)
        swap.serve(rebuild.index, 1)
    # Then the new lane has it too
    rebuild.drain()
    assert rebuild.generation == 1
    assert list(rebuild.inventory()) == ["k"]


@pytest.mark.parametrize("failpoint", ["resilver.built", "resilver.swapped"])
def test_resilver_i10_goes_on_when_it_was_killed(rebuild: Rebuild, failpoint: str) -> None:
    site = rebuild.site
    site.start("clock")
    for n in range(40):
        site.emit(f"k{n}")
    rebuild.drain()
    before = rebuild.inventory()
    # When it is killed (I11: there)
    rebuild.run("--yes", "--shards", "2", failpoint=failpoint, status=-9)
    # Then the one or the other is whole
    swapped = failpoint == "resilver.swapped"
    assert rebuild.generation == 0
    assert rebuild.inventory() == before
    site.emit("one more")
    rebuild.drain()
    # ... and with the next owner, the one that counts is searched
    assert rebuild.generation == (1 if swapped else 0)
    assert rebuild.inventory() == rebuild.due()
    # When the same is asked for again, then it ends
    _, said = rebuild.run("--yes", "--shards", "2")
    assert "goes on" in said
    assert rebuild.folders() == ["g1"]
    assert rebuild.inventory() == rebuild.due()
    assert site.admin.execute("select state from outbox.operation").fetchall() == [("done",)]


def test_resilver_i10_builds_only_the_rest_when_it_goes_on(rebuild: Rebuild) -> None:
    from workers.resilver.draft import AFTER, Draft
    from workers.shard import POSITION

    site = rebuild.site
    site.start("clock")
    site.admin.execute(
        "select count(outbox.emit('index', 'put', 'k' || lpad(n::text, 5, '0'), '{\"text\": \"t\"}')) "
        "from generate_series(1, 2500) as n"
    )
    rebuild.drain()
    # Given one that was killed after its first commit
    rebuild.run("--yes", failpoint="resilver.built", status=-9)
    draft = Draft(generation.folder(rebuild.index, 1), 0, 1)
    assert (draft.documents, draft._said(AFTER), draft._said(POSITION)) == (2000, "k02000", "")
    # When it goes on
    told: list[int] = []
    with psycopg.connect(rebuild.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        draft.build(conn, told.append)
        # Then the other documents are what it writes
        assert told == [500]
        assert draft.check(conn, told.append) == []
    draft.close()


def test_resilver_i6_old_owner_changes_nothing_when_it_was_suspended_through_the_swap(rebuild: Rebuild) -> None:
    # Given a worker that stands still in the middle of a batch
    site = rebuild.site
    site.start("clock")
    site.emit("before")
    rebuild.drain()
    zombie = site.start("index", OUTBOX_FAILPOINT="index.committed:stop")
    site.emit("during")

    def stands() -> bool:
        return Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    until(stands, "it stands still")
    # When the index is built anew behind its back, and goes on
    rebuild.run("--yes")
    site.emit("after")
    rebuild.drain()
    assert rebuild.inventory().keys() == {"before", "during", "after"}
    position = site.one("select max(tick) from outbox.position where target = 'index'")
    zombie.send_signal(18)
    # Then it notices, and works on the new one
    until(lambda: site.one("select owner is not null from outbox.lane where target = 'index'"), "it has the lane again")
    site.emit("last")
    until(lambda: rebuild.inventory().keys() == {"before", "during", "after", "last"}, "it goes on")
    assert site.one("select max(tick) from outbox.position where target = 'index'") >= position
    assert rebuild.generation == 1


def test_resilver_begins_from_the_log_again_when_all_of_the_index_is_lost(rebuild: Rebuild) -> None:
    site = rebuild.site
    site.start("clock")
    for n in range(20):
        site.emit(f"k{n}")
    rebuild.drain()
    rebuild.run("--yes", "--shards", "2")
    # When it is lost, and its worker starts
    shutil.rmtree(rebuild.index)
    rebuild.drain()
    # Then it is there again, where searches look
    assert rebuild.generation == 1
    assert rebuild.inventory() == rebuild.due()


def test_resilver_builds_an_index_of_which_nothing_is_left(rebuild: Rebuild) -> None:
    site = rebuild.site
    site.start("clock")
    for n in range(20):
        site.emit(f"k{n}")
    rebuild.drain()
    shutil.rmtree(rebuild.index)
    rebuild.run("--yes")
    assert (rebuild.folders(), rebuild.inventory()) == (["g1"], rebuild.due())


def test_index_lane_refuses_a_generation_that_its_database_does_not_know(tmp_path: Path) -> None:
    # Given an index that was built anew, and a database that was restored to the time before
    participant = IndexParticipant(tmp_path)
    participant.open(LaneView("index", 0, 9, unclean=False, generation=3))
    participant.close()
    assert generation.current(tmp_path) == 3
    # When a lane is opened under the older one, then nothing is made, and it says what to do
    with pytest.raises(NotThisLane, match=r"generation 3, and this database knows 2.*outbox resilver index"):
        IndexParticipant(tmp_path).open(LaneView("index", 0, 10, unclean=False, generation=2))
    assert [path.name for path in tmp_path.iterdir()] == ["g3"]


def test_resilver_is_what_such_a_lane_needs(rebuild: Rebuild) -> None:
    # Given the index of a database that has forgotten its generations
    site = rebuild.site
    site.start("clock")
    site.emit("k")
    rebuild.drain()
    rebuild.run("--yes")
    site.admin.execute("update outbox.participant set generation = 0")
    process = site.start("index")
    until(lambda: site.one("select state from outbox.lane where target = 'index'") == "stopped", "the lane stops")
    process.kill()
    # When it is built anew
    rebuild.run("--yes")
    # Then it is of a generation that neither has seen, and the lane goes on
    site.emit("k2")
    rebuild.drain()
    assert rebuild.folders() == ["g2"]
    assert rebuild.inventory() == rebuild.due()


# ------------------------------------------------------------------------------------------------ command


def test_resilver_plan_changes_nothing_when_it_is_not_agreed_to(rebuild: Rebuild) -> None:
    site = rebuild.site
    site.start("clock")
    site.emit("k")
    rebuild.drain()
    # When it is only planned, or nobody agrees
    said, _ = rebuild.run("--dry-run", "--json", "--shards", "3")
    _, asked = rebuild.run(status=1)
    # Then the plan is told
    plan = json.loads(said)
    assert (plan["documents"], plan["shards_now"], plan["shards"]) == (1, 1, 3)
    assert "add --yes" in asked
    # ... and nothing is begun
    assert rebuild.folders() == ["00"]
    assert site.one("select count(*) from outbox.operation") == 0


def test_resilver_prints_one_object_when_json_is_asked_for(rebuild: Rebuild) -> None:
    rebuild.site.start("clock")
    rebuild.site.emit("k")
    rebuild.drain()
    said, _ = rebuild.run("--yes", "--json")
    result = json.loads(said)
    assert (result["generation"], result["shards"], result["documents"]) == (1, 1, 1)
    assert rebuild.site.one("select result -> 'documents' from outbox.operation") == 1


def test_resilver_is_refused_when_another_one_has_not_ended(rebuild: Rebuild) -> None:
    rebuild.site.start("clock")
    rebuild.site.emit("k")
    rebuild.drain()
    rebuild.run("--yes", "--shards", "2", failpoint="resilver.based", status=-9)
    _, said = rebuild.run("--yes", "--shards", "3", status=1)
    assert "has not ended" in said
    assert "--resume 1" in said
    rebuild.run("--resume", "1")
    assert rebuild.folders() == ["g1"]


def test_resilver_stops_and_can_go_on_when_it_is_told_to_stop(rebuild: Rebuild) -> None:
    site = rebuild.site
    site.start("clock")
    for n in range(50):
        site.emit(f"k{n}")
    rebuild.drain()
    # Given one that is slow
    process = rebuild.start("--yes", "--rate", "1")
    until(lambda: site.one("select progress ->> 'doing' from outbox.operation") == "building", "it builds")
    # When it is stopped
    process.terminate()
    _, said = process.communicate(timeout=2 * LIMIT)
    # Then it says how to go on, and does
    assert process.returncode == 130
    assert "--resume 1" in said
    rebuild.run("--resume", "1")
    assert rebuild.inventory() == rebuild.due()


def test_swap_is_for_operators_only(admin: psycopg.Connection[Any]) -> None:
    signature = "outbox.swap(text, bigint, bigint, bigint[], bigint[], uuid, text, double precision)"
    for role, may in (("outbox_operator", True), ("outbox_worker", False), ("outbox_app", False), ("public", False)):
        row = admin.execute("select has_function_privilege(%s, %s, 'execute')", (role, signature)).fetchone()
        assert row == (may,)


def test_swap_i6_fences_the_owners_of_before(admin: psycopg.Connection[Any], worker: psycopg.Connection[Any]) -> None:
    # Given an owner
    owned = claim(worker, "index", 0, owner=uuid.uuid4(), ttl=600)
    assert owned is not None
    # When the lanes are swapped
    admin.execute("select * from outbox.swap('index', 0, 1, '{1}', '{}', gen_random_uuid(), 'here', 600)")
    # Then nothing is written any more under its epoch
    for write in (owned.renew, owned.fence, lambda conn: owned.advance(conn, owned.stand(conn))):
        with pytest.raises(Fenced):
            write(worker)


def test_swap_is_refused_when_another_one_came_in_between(admin: psycopg.Connection[Any]) -> None:
    swap = "select * from outbox.swap('index', %s, %s, '{1}', '{}', gen_random_uuid(), 'here', 5)"
    assert len(admin.execute(swap, (0, 4)).fetchall()) == 1
    for was, then in ((0, 5), (4, 4), (4, 3)):
        with pytest.raises(psycopg.DatabaseError) as refused:
            admin.execute(swap, (was, then))
        assert refused.value.sqlstate == "OB016"


# ------------------------------------------------------------------------------------------------- format


def test_doctor_names_shards_of_another_format_and_resilver_renews_them(
    rebuild: Rebuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outbox import Settings
    from workers.doctor import examine

    # Given a shard whose documents were made by another version
    site = rebuild.site
    site.start("clock")
    site.emit("k")
    rebuild.drain()
    [shard] = [rebuild.index / "00"]
    now = format_of(shard)
    _set_format(shard, "0123456789abcdef")
    settings = Settings.load(env=site.environment)

    def told() -> dict[str, bool]:
        return {check.name: check.ok for check in examine(settings, ["index"])}

    # Then the doctor says so, and the lane goes on
    assert told()["format"] is False
    site.emit("k2")
    rebuild.drain()
    assert format_of(shard) == "0123456789abcdef"
    # When it is built anew, all is of this version
    rebuild.run("--yes")
    assert format_of(rebuild.index / "g1" / "00") == now
    assert told()["format"] is True


def test_format_tells_versions_apart_when_anything_of_a_document_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import index

    made = index.format_of_documents.__wrapped__
    before = made()
    assert made() == before
    monkeypatch.setattr(index, "TITLE_WEIGHT", 4)
    assert made() != before


def _set_format(shard: Path, text: str) -> None:
    from workers.shard import FORMAT, xapian

    db = xapian.WritableDatabase(str(shard), xapian.DB_OPEN)
    db.set_metadata(FORMAT, text)
    db.commit()
    db.close()
