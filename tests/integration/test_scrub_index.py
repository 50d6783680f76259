"""Scrub of a real index that was damaged behind its worker's back: each kind is found, repaired, and gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from outbox.document import key_term
from outbox.errors import Unavailable
from tests.fixtures.scrub import Yard, kinds
from workers import shard
from workers.scrub import index as scrubbed
from workers.shard import FORMAT, inventory, xapian


def _doc(db: Any, key: str) -> Any:
    [posting] = list(db.postlist(key_term(key)))
    return db.get_document(posting.docid)


def test_scrub_i2_is_clean_when_the_index_holds_what_the_log_says(yard: Yard) -> None:
    # Given documents of every shape, some changed and some deleted since
    for n in range(30):
        yard.put(f"note/{n}", f"words of {n} and more of them", title=f"Note {n}")
    yard.put("long/" + "k" * 400, "a key that has no room in a term")
    yard.put("ä/ö", "日本語テキスト and more", keywords={"folder": ["lib", "x" * 300]}, language="de", data={"n": 1.5})
    yard.put("note/3", "changed")
    yard.put("note/4", "changed twice")
    yard.put("note/4", "changed twice")
    yard.delete("index", "note/5")
    yard.drain()
    # When it is scrubbed
    progress = yard.survey("index")
    # Then everything was looked at, and nothing is wrong
    assert (progress.items, progress.found, progress.moving) == (31, 0, 0)
    # And what is not applied yet is no finding either
    yard.put("note/6", "committed, and no worker has seen it")
    yard.delete("index", "note/7")
    yard.bench.clock.step()
    assert yard.survey("index").found == 0


def test_scrub_i9_finds_and_repairs_what_was_done_to_the_index_behind_its_back(yard: Yard) -> None:
    for n in range(20):
        yard.put(f"note/{n}", f"words of {n}", title=f"Note {n}", keywords={"n": str(n)})
    yard.delete("index", "note/19")
    yard.put("note/5", "the newer words of 5")
    yard.drain()
    # Given a deleted document, a foreign one, one that was deleted and is back, one of an older intent, and others
    # whose words, keywords, record or key were changed
    db = yard.writable()
    db.delete_document(key_term("note/1"))
    foreign = xapian.Document()
    foreign.set_data(json.dumps({"key": "foreign", "id": 1, "digest": "0", "title": "", "text": "", "data": {}}))
    foreign.add_boolean_term(key_term("foreign"))
    db.add_document(foreign)
    changes: dict[str, Callable[[Any], Any]] = {
        "note/2": lambda d: d.add_term("smuggled"),
        "note/3": lambda d: d.remove_term("XN:3"),
        "note/4": lambda d: d.set_data(d.get_data().replace(b"words of", b"wards of")),
        "note/6": lambda d: d.set_data(b"\xff not json"),
        "note/7": lambda d: d.add_posting("words", 77),
    }
    for key, change in changes.items():
        doc = _doc(db, key)
        change(doc)
        db.replace_document(key_term(key), doc)
    # An older content, and one document twice
    old = _doc(db, "note/5")
    record = json.loads(old.get_data())
    old.set_data(json.dumps(record | {"digest": "1" * 64, "id": 1}))
    db.replace_document(key_term("note/5"), old)
    db.add_document(_doc(db, "note/8"))
    db.commit()
    db.close()
    # When it is scrubbed, all of them are found, and nothing else
    wrong = {
        "note/1": "missing", "note/2": "corrupt", "note/3": "corrupt", "note/4": "corrupt", "note/5": "stale",
        "note/6": "corrupt", "note/7": "corrupt", "note/8": "corrupt", "foreign": "orphaned",
    }  # fmt: skip
    assert {key: kind for kind, key in yard.found("index")} == wrong
    # And when it is repaired, another scrub finds nothing
    progress = yard.repair("index")
    assert (progress.emitted, progress.gone) == (len(wrong), 0)
    assert yard.found("index") == []
    assert yard.survey("index").items == 19


def test_scrub_tells_what_no_intent_repairs_when_a_document_has_no_key(yard: Yard) -> None:
    yard.put("note/1")
    yard.drain()
    db = yard.writable()
    db.add_document(xapian.Document())
    db.commit()
    db.close()
    progress = yard.repair("index")
    assert kinds(progress) == [("orphaned", "00/2")]
    assert (progress.emitted, progress.mended) == (0, 0)
    assert "resilver" in progress.findings[0].advice


def test_scrub_finds_a_document_that_no_search_finds_when_a_table_is_damaged(yard: Yard) -> None:
    # Given an index in whose table of words one key was overwritten on the disk: Xapian has no checksums
    for n in range(9):
        yard.put(f"note/{n}", f"words of {n}")
    yard.drain()
    table = yard.index / "00" / "postlist.glass"
    content = table.read_bytes()
    assert b"Qnote/8" in content
    table.write_bytes(content.replace(b"Qnote/8", b"Qnote/9"))
    # Then it is found, and is still found when it was repaired as far as that goes: the old one is there yet
    assert yard.found("index") == [("corrupt", "note/8")]
    yard.repair("index")
    [finding] = yard.survey("index").findings
    assert (finding.key, finding.kind, finding.repair) == ("note/8", "corrupt", "")
    assert "resilver index" in finding.advice


def test_scrub_accuses_nobody_when_the_index_was_restored_from_an_older_copy(yard: Yard) -> None:
    # Given an index in the place of which an older copy was put, and whose worker has not caught up yet
    yard.put("note/1", "old")
    yard.put("note/2")
    yard.drain()
    shutil.copytree(yard.index, yard.home / "copy")
    yard.put("note/1", "new")
    yard.delete("index", "note/2")
    yard.put("note/3")
    yard.drain()
    shutil.rmtree(yard.index)
    (yard.home / "copy").rename(yard.index)
    # Then it is compared as of where it is, and not of where its lane was
    progress = yard.survey("index")
    assert (progress.findings, progress.items) == ([], 2)
    # ... and also when it has caught up
    yard.drain()
    assert yard.survey("index").moving == yard.survey("index").found == 0


def test_scrub_takes_no_offence_at_words_when_another_version_made_the_shard(yard: Yard) -> None:
    yard.put("note/1")
    yard.put("note/2")
    yard.drain()
    db = yard.writable()
    db.set_metadata(FORMAT, "made otherwise")
    for key in ("note/1", "note/2"):
        doc = _doc(db, key)
        doc.add_term("Zother")
        if key == "note/2":
            doc.set_data(doc.get_data().replace(b"some", b"sume"))
        db.replace_document(key_term(key), doc)
    db.commit()
    db.close()
    assert yard.found("index") == [("corrupt", "note/2")]


def test_scrub_goes_through_all_shards_and_sees_a_document_in_the_wrong_one(yard: Yard) -> None:
    yard.operator.execute("select outbox.register('index', 2)")
    for n in range(12):
        yard.put(f"note/{n}")
    yard.drain()
    assert (yard.survey("index").found, yard.survey("index").items) == (0, 12)
    # Given a document of one shard that was moved into the other one, and one that was copied
    first, second = yard.writable("00"), yard.writable("01")
    here = sorted(item.key for item in inventory(yard.index / "00"))
    moved, copied = here[:2]
    for key in (moved, copied):
        second.add_document(_doc(first, key))
    first.delete_document(key_term(moved))
    for db in (first, second):
        db.commit()
        db.close()
    assert yard.found("index") == sorted([("corrupt", moved), ("corrupt", copied)], key=lambda found: found[1])
    # When it is repaired, the right shards have theirs, and the others are left to a resilver
    yard.repair("index")
    findings = yard.survey("index").findings
    assert [(each.key, each.repair) for each in findings] == sorted([(moved, ""), (copied, "")])
    assert {moved, copied} <= {item.key for item in inventory(yard.index / "00")}


@pytest.mark.parametrize("where", [(scrubbed, "_slice"), (scrubbed, "_under"), (shard, "_slice")], ids=str)
def test_scrub_i5_calls_nothing_damaged_that_a_commit_has_written_over(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    # Given two documents, of which one is missing so that there is a second look
    yard.put("note/1")
    yard.put("note/2")
    yard.drain()
    db = yard.writable()
    db.delete_document(key_term("note/2"))
    db.close()
    module, name = where
    real = getattr(module, name)
    commits = [True, False]

    def overwritten(*words: Any, **named: Any) -> Any:
        # What Xapian says of a block that belongs to a newer commit by now, and of one that is really damaged
        if commits:
            if commits.pop(0):
                yard.put("note/3")
                yard.drain()
            else:
                commits.append(False)
            raise xapian.DatabaseCorruptError("Expected block 5 to be level 1, not 0")
        return real(*words, **named)

    def look() -> None:
        if module is shard:
            assert {item.key for item in inventory(yard.index / "00")} == {"note/1", "note/3"}
        else:
            assert yard.found("index") == [("missing", "note/2")]

    monkeypatch.setattr(module, name, overwritten)
    # When nothing was committed since, then it is damage
    commits.reverse()
    with pytest.raises(Unavailable, match="DatabaseCorruptError"):
        look()
    # When something was, it is read again
    commits[:] = [True]
    look()


def test_scrub_says_what_to_do_when_a_table_can_not_be_read_at_all(yard: Yard) -> None:
    # Given a shard whose table of words was overwritten
    for n in range(200):
        yard.put(f"note/{n}", f"words of {n}")
    yard.drain()
    table = yard.index / "00" / "postlist.glass"
    table.write_bytes(b"\xff" * table.stat().st_size)
    with pytest.raises(Unavailable, match="outbox resilver index"):
        yard.survey("index")


def test_scrub_accuses_nobody_when_the_index_is_built_anew_in_the_middle(yard: Yard) -> None:
    from outbox import generation, operation
    from workers.scrub.index import IndexSubject
    from workers.scrub.survey import Survey

    # Given an index in which a document is missing
    for n in range(5):
        yard.put(f"note/{n}")
    yard.drain()
    shutil.copytree(yard.index / "00", yard.home / "whole")
    db = yard.writable()
    db.delete_document(key_term("note/3"))
    db.close()

    class Meanwhile(IndexSubject):
        def held(self) -> Any:
            yield from super().held()
            # Another generation, which has it, and in which the documents have other numbers, takes its place
            place = generation.folder(yard.index, 1)
            place.mkdir()
            db = xapian.WritableDatabase(str(place / "00"), xapian.DB_CREATE)
            old = xapian.Database(str(yard.home / "whole"))
            for number in (5, 4, 3, 2, 1):
                db.add_document(old.get_document(number))
            old.close()
            db.close()
            generation.ready(yard.index, 1)
            shutil.rmtree(yard.index / "00")

    # When it is scrubbed meanwhile, then nothing is missing
    progress = Survey(yard.operator, operation.begin(yard.operator, "scrub", {}), Meanwhile(yard.index)).run()
    assert (progress.findings, progress.items) == ([], 5)
