"""A resilver of blobs: what is missing or damaged comes back through the lanes, or goes to another store."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from outbox.blob import BlobStore
from outbox.s3 import S3Store
from tests.fixtures.rebuild import Rebuild
from tests.fixtures.s3 import ENVIRONMENT
from tests.fixtures.s3 import Server as S3Server
from tests.fixtures.site import LIMIT, Site, until


@pytest.fixture
def store(site: Site) -> BlobStore:
    return BlobStore(site.home / "blobs")


def put(site: Site, store: BlobStore, content: bytes, *, inline: bool = False) -> str:
    """A transaction with a blob. → its digest."""
    from outbox.blob import Inline

    digest = hashlib.sha256(content).hexdigest()
    with site.admin.transaction():
        xid = site.one("select pg_current_xact_id()::text::bigint")
        log = site.one("select log from outbox.identity")
        payload = (
            Inline(digest, len(content), content).payload()
            if inline
            else store.stage(content, xid=xid, log=log).payload()
        )
        site.admin.execute("select outbox.emit('blob', 'put', %s, %s)", (digest, json.dumps(payload)))
    return digest


def drain(site: Site) -> None:
    assert site.start("blob", "--until-idle").wait(2 * LIMIT) == 0


def spoil(path: Path, content: bytes) -> None:
    path.chmod(0o640)
    path.write_bytes(content)


def whole(store: BlobStore | S3Store) -> set[str]:
    """Digests of the blobs whose bytes are right."""
    return {blob.digest for blob in store.inventory() if store.verify(blob.digest)}


def test_resilver_i5_i8_brings_blobs_back_from_another_site_when_they_are_lost_or_damaged(
    rebuild: Rebuild, store: BlobStore
) -> None:
    # Given a store and a copy of it, in both of which something is wrong
    site = rebuild.site
    site.start("clock")
    names = ("whole", "missing", "same size", "short", "copy damaged too", "nowhere")
    digests = {name: put(site, store, name.encode() * 100) for name in names}
    digests["inline"] = put(site, store, b"travels in its intent", inline=True)
    deleted = put(site, store, b"deleted")
    site.admin.execute("select outbox.emit('blob', 'delete', %s)", (deleted,))
    drain(site)
    other = BlobStore(site.home / "other")
    shutil.copytree(store.directory, other.directory)
    for name in ("missing", "copy damaged too", "nowhere", "inline"):
        store.path(digests[name]).unlink()
    spoil(store.path(digests["same size"]), b"x" * 900)
    spoil(store.path(digests["short"]), b"x")
    spoil(other.path(digests["copy damaged too"]), b"y" * 1600)
    other.path(digests["nowhere"]).unlink()
    # When it is gone through, and the lane applies what that says
    said, _ = rebuild.run("--yes", "--json", "--from", str(other.directory), target="blob", status=1)
    drain(site)
    # Then everything is whole that is whole anywhere, and the rest is named
    result = json.loads(said)
    lost = {digests["copy damaged too"], digests["nowhere"]}
    assert (result["whole"], result["missing"], result["damaged"], result["lost"]) == (1, 4, 2, 2)
    assert set(result["digests"]) == lost
    assert whole(store) == set(digests.values()) - lost
    # ... nothing is left behind, and a second look finds no more to do
    assert list(store.stages()) == []
    assert site.one("select count(*) from outbox.parked") == 0
    again, _ = rebuild.run("--yes", "--json", target="blob", status=1)
    assert json.loads(again)["whole"] == len(digests) - 2


def test_resilver_i4_leaves_a_blob_deleted_when_it_is_deleted_before_the_lane_gets_there(
    rebuild: Rebuild, store: BlobStore
) -> None:
    site = rebuild.site
    site.start("clock")
    digest = put(site, store, b"short-lived")
    drain(site)
    other = BlobStore(site.home / "other")
    shutil.copytree(store.directory, other.directory)
    store.path(digest).unlink()
    # Given a delete that commits after the resilver has looked, and comes first in the log
    blocker = rebuild.start("--yes", "--from", str(other.directory), target="blob", failpoint="resilver.repeated:stop")
    until(lambda: site.one("select count(*) from outbox.log where headers is not null") == 1, "it is repeated")
    site.admin.execute("select outbox.emit('blob', 'delete', %s)", (digest,))
    blocker.send_signal(18)
    blocker.communicate(timeout=LIMIT)
    # When both are applied, then the delete counts
    drain(site)
    assert whole(store) == set()


def test_resilver_i10_goes_on_with_blobs_when_it_was_killed(rebuild: Rebuild, store: BlobStore) -> None:
    site = rebuild.site
    site.start("clock")
    digests = {put(site, store, b"blob %d" % n) for n in range(4)}
    drain(site)
    other = BlobStore(site.home / "other")
    shutil.copytree(store.directory, other.directory)
    shutil.rmtree(store.directory / "objects")
    words = ("--yes", "--from", str(other.directory))
    # When it is killed after the second one, and goes on
    rebuild.run(*words, target="blob", failpoint="resilver.repeated:2", status=-9)
    _, said = rebuild.run(*words, target="blob")
    assert "goes on" in said
    drain(site)
    # Then each was repeated once
    assert whole(store) == digests
    assert site.one("select count(*) from outbox.log where headers is not null") == 4


def test_resilver_i8_copies_a_directory_into_a_bucket_when_it_is_to_move(
    rebuild: Rebuild, store: BlobStore, s3: S3Store, s3_server: S3Server, s3_url: str
) -> None:
    # Given blobs in a directory, and a bucket
    site = rebuild.site
    site.start("clock")
    digests = {put(site, store, b"blob %d" % n) for n in range(3)} | {put(site, store, b"small", inline=True)}
    drain(site)
    rebuild.environment |= ENVIRONMENT | {"OUTBOX_S3_ENDPOINT": s3_server.endpoint}
    # When it is killed on the way, run again, and run once more after the last write
    rebuild.run("--yes", "--to", s3_url, target="blob", failpoint="resilver.copied", status=-9)
    rebuild.run("--yes", "--to", s3_url, target="blob")
    digests.add(put(site, store, b"one more"))
    drain(site)
    said, _ = rebuild.run("--yes", "--json", "--to", s3_url, target="blob")
    assert json.loads(said)["copied"] == 1
    # Then the bucket has all of them, and lanes that are told of it go on there
    assert whole(s3) == digests
    gone = digests.pop()
    site.admin.execute("select outbox.emit('blob', 'delete', %s)", (gone,))
    site.environment |= ENVIRONMENT | {"OUTBOX_BLOBS": s3_url, "OUTBOX_S3_ENDPOINT": s3_server.endpoint}
    drain(site)
    assert whole(s3) == digests


def test_resilver_i1_another_store_has_nothing_that_was_deleted_between_two_runs(
    rebuild: Rebuild, store: BlobStore
) -> None:
    # Given a store that was copied, and which holds something of somebody else's
    site = rebuild.site
    site.start("clock")
    kept, gone = put(site, store, b"kept"), put(site, store, b"gone", inline=True)
    drain(site)
    other = BlobStore(site.home / "other")
    rebuild.run("--yes", "--to", str(other.directory), target="blob")
    assert whole(other) == {kept, gone}
    foreign = hashlib.sha256(b"foreign").hexdigest()
    other.path(foreign).parent.mkdir(exist_ok=True)
    other.path(foreign).write_bytes(b"foreign")
    # When a blob is deleted, and the store is copied once more
    site.admin.execute("select outbox.emit('blob', 'delete', %s)", (gone,))
    drain(site)
    said, _ = rebuild.run("--yes", "--json", "--to", str(other.directory), target="blob")
    # Then it is gone there too, into the trash, and nothing else is
    result = json.loads(said)
    assert (result["there"], result["deleted"]) == (1, 1)
    assert whole(other) == {kept, foreign}
    assert [path.name.endswith(gone) for path in (other.directory / "trash").iterdir()] == [True]


def test_resilver_refuses_a_source_that_is_not_there(rebuild: Rebuild, store: BlobStore) -> None:
    # Given a blob that is lost
    site = rebuild.site
    site.start("clock")
    digest = put(site, store, b"blob")
    drain(site)
    store.path(digest).unlink()
    # When another store is named that is none, then nothing is begun
    _, said = rebuild.run("--yes", "--from", str(site.home / "typo"), target="blob", status=1)
    assert "there is no store of blobs" in said
    assert site.one("select count(*) from outbox.operation") == 0
    # When nobody has the bytes, then nothing is said of what was put again
    told, _ = rebuild.run("--yes", target="blob", status=1)
    assert digest in told
    assert "put again" not in told


def test_resilver_i2_calls_no_blob_lost_when_its_store_has_no_room(rebuild: Rebuild, store: BlobStore) -> None:
    # Given a lost blob that a copy has, and a store that nothing can be staged in
    site = rebuild.site
    site.start("clock")
    digest = put(site, store, b"blob")
    drain(site)
    other = BlobStore(site.home / "other")
    shutil.copytree(store.directory, other.directory)
    store.path(digest).unlink()
    (store.directory / "staging").rename(site.home / "staging")
    (store.directory / "staging").write_text("no folder")
    # When it is gone through, then it stops, and says how it goes on
    _, said = rebuild.run("--yes", "--from", str(other.directory), target="blob", status=1)
    assert "outbox resilver: the blob store can't be written" in said
    assert "outbox resilver blob --resume 1" in said
    # When there is room, then it does
    (store.directory / "staging").unlink()
    (site.home / "staging").rename(store.directory / "staging")
    rebuild.run("--resume", "1", target="blob")
    drain(site)
    assert whole(store) == {digest}


def test_resilver_refuses_a_store_that_lanes_already_write(rebuild: Rebuild, store: BlobStore) -> None:
    site = rebuild.site
    site.start("clock")
    put(site, store, b"blob")
    drain(site)
    _, said = rebuild.run("--yes", "--to", str(store.directory), target="blob", status=1)
    assert "another worker has taken over" in said or "in use" in said
