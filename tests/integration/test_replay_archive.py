"""A replay of what retention archived in S3 and dropped, from command to command."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outbox import archive
from outbox.bucket import Bucket
from outbox.cli import main
from outbox.message import message_payload
from outbox.replay.resent import NAMES as NAMED
from tests.fixtures.lanes import Bench
from tests.fixtures.retention import fill, grow_old
from tests.fixtures.s3 import Server


@pytest.fixture
def kept(
    bench: Bench, operator_url: str, s3_server: Server, s3_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where the log's first part is: two documents, one of which was deleted, an event, and three mails, of which one
    was sent, one withdrawn by its saga, and one skipped. → its place in S3."""
    for name, value in (
        ("DATABASE", operator_url), ("STATE", str(tmp_path / "none")), ("S3_ENDPOINT", s3_server.endpoint),
    ):  # fmt: skip
        monkeypatch.setenv(f"OUTBOX_{name}", value)
    reader = bench.reader()
    for action, key in (("put", "kept"), ("put", "gone"), ("delete", "gone"), ("touch", "kept")):
        bench.admin.execute("select outbox.emit('sink', %s, %s, '1')", (action, key))
    mails = []
    for subject in ("sent", "withdrawn", "skipped"):
        payload = message_payload(
            domain="outbox.invalid", sender="a@example.org", to="b@example.org", subject=subject, text="text"
        )
        row = bench.admin.execute("select outbox.emit('mail', 'send', %s, %s)", (subject, json.dumps(payload)))
        mails += [made[0] for made in row]
    bench.admin.execute(
        "insert into outbox.receipt (id, target, slot, state, epoch, closed_at) "
        "values (%s, 'mail', 0, 'closed', 1, now())",
        (mails[0],),
    )
    bench.admin.execute("insert into outbox.saga_void (id) values (%s)", (mails[1],))
    bench.admin.execute(
        "insert into outbox.parked (id, target, slot, key, reason) values (%s, 'mail', 0, 'skipped', 'skipped')",
        (mails[2],),
    )
    fill(bench)
    bench.drain(reader)
    reader.close()
    # The mails' own lane has passed them.
    bench.admin.execute(
        "insert into outbox.position (target, lane, epoch, tick) select 'mail', 0, 1, max(id) from outbox.tick"
    )
    grow_old(bench.admin)
    assert main(["retention", "--age", "30d", "--archive", s3_url, "--yes"]) == 0
    assert bench.admin.execute("select count(*) from outbox.log").fetchone() == (0,)
    bench.clock.step()
    return s3_url


def again(bench: Bench) -> list[tuple[str, str, Any]]:
    return bench.admin.execute(
        "select target || ' ' || action, key, payload from outbox.log where headers ? 'replay' order by id"
    ).fetchall()


def replay(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["replay", *words, "--yes", "--json"]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def test_replay_i1_from_an_archive_in_s3_repeats_what_counts_still_and_no_mail(
    kept: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    # When what the archive has is replayed
    done = replay(capsys, "--from-archive", kept)
    # Then the plan has counted all of it, and what is live is said again; nothing else unless it is asked for
    lines = {(each["target"], each["action"], each["fate"]): each["intents"] for each in done["plan"]["lines"]}
    assert lines == {
        ("sink", "put", "again"): 1, ("sink", "put", "superseded"): 1, ("sink", "delete", "again"): 1,
        ("sink", "touch", "event"): 1, ("mail", "send", "mail"): 1, ("mail", "send", "recalled"): 2,
    }  # fmt: skip
    assert (done["again"], done["left_out"]) == (2, {"superseded": 1, "event": 1, "mail": 1, "recalled": 2})
    assert sorted(row[:2] for row in again(bench)) == [("sink delete", "gone"), ("sink put", "kept")]


def test_replay_i3_from_an_archive_in_s3_sends_a_mail_again_when_it_is_asked_to(
    kept: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    # When: only mails, and only those that were sent
    done = replay(capsys, "mail", "--from-archive", kept, "--resend-mail", "--from", "1d", "--to", "0s")
    # Then it is one, and it names the first one
    assert (done["again"], done["left_out"]) == (1, {"recalled": 2})
    [(what, key, payload)] = again(bench)
    assert (what, key) == ("mail send", "sent")
    assert payload["message_id"].startswith("<replay.")
    assert f"\r\n{NAMED}: " in payload["message"]
    # ... and of another time, none
    assert replay(capsys, "mail", "--from-archive", kept, "--resend-mail", "--to", "1d")["plan"]["intents"] == 0


def test_replay_i5_uses_nothing_of_an_archive_in_s3_that_was_changed_or_is_not_there(
    kept: str, bench: Bench, s3_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    # Given an archive of which the last bytes were lost
    bucket = Bucket(kept, s3_server.endpoint)
    (found,) = archive.find(kept, endpoint=s3_server.endpoint)
    content = bucket.get(found.name)
    assert content is not None
    bucket.put(found.name, content[:-30])
    # When, then
    assert main(["replay", "--from-archive", kept, "--yes"]) == 1
    assert "is damaged" in capsys.readouterr().err
    # ... nor where there is none of this log
    for place in (f"{kept}/elsewhere", "s3://no-such-bucket-here/x"):
        assert main(["replay", "--from-archive", place, "--yes"]) == 1
        said = capsys.readouterr().err
        assert "there is no archive of this log" in said or "S3" in said
    assert again(bench) == []
