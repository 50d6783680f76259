"""`outbox doctor` on hosts that are sound, and on hosts that lack one thing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import lane
from outbox.watermark import Watermark
from tests.fixtures.postfix import Postfix
from tests.fixtures.site import LIMIT, Site
from workers.postgres import Postgres


def ask(site: Site, *words: str, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """→ exit status, and the checks that are not ok, by name."""
    done = subprocess.run(
        [sys.executable, "-m", "outbox", "doctor", "--json", *words],
        env=site.environment | environment, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is (done.returncode == 0)
    assert answer["checks"]
    return done.returncode, {check["name"]: check for check in answer["checks"] if not check["ok"]}


def test_doctor_finds_what_a_database_lacks(
    site: Site, server: Postgres, app_url: str, admin: psycopg.Connection[Any]
) -> None:
    # Given: the tests' own server, which doesn't wait for its disk; no clock runs
    status, missing = ask(site, "database")
    assert (status, set(missing)) == (1, {"fsync", "clock"})
    # When: asked as an application; of a database without a schema; of no database
    assert "GRANT outbox_worker TO app" in ask(site, "database", OUTBOX_DATABASE=app_url)[1]["rights"]["advice"]
    bare = ask(site, "database", OUTBOX_DATABASE=server.url())[1]
    nobody = ask(site, "database", OUTBOX_DATABASE="postgresql://u@127.0.0.1:1/d")[1]
    # Then: it says what to do
    assert "outbox migrate" in bare["usable"]["advice"]
    assert "is it running?" in nobody["usable"]["advice"]


def test_doctor_finds_a_log_that_can_not_go_on(site: Site, tmp_path: Path) -> None:
    # Given: a log that is where it was written, and a directory in which its tick was noted
    assert "history" not in ask(site, "database")[1]
    with psycopg.connect(site.environment["OUTBOX_DATABASE"], autocommit=True) as conn:
        Watermark(tmp_path / "none", "sink/0").note(lane.stand(conn, "index", 0))
    assert "history" not in ask(site, "database")[1]
    # When that was copied, then when the server was restored to an earlier time
    shutil.copytree(tmp_path / "none", tmp_path / "copy")
    copied = ask(site, "database", OUTBOX_STATE=str(tmp_path / "copy"))[1]["history"]
    site.admin.execute("update outbox.era set timeline = '0000002A'")
    restored = ask(site, "database")[1]["history"]
    # Then it says so, and what helps
    assert "is a copy" in copied["found"]
    assert "restored to an earlier time" in restored["found"]
    assert "outbox adopt" in restored["advice"]


def test_doctor_finds_nothing_wrong_with_sound_stores_and_leaves_nothing_there(site: Site) -> None:
    (site.home / "blobs").mkdir()
    before = sorted(site.home.rglob("*"))
    assert ask(site, "index", "blobs") == (0, {})
    assert sorted(site.home.rglob("*")) == before


def test_doctor_finds_stores_that_can_not_be_written(site: Site) -> None:
    status, missing = ask(site, "index", "blobs", OUTBOX_INDEX="/proc/index", OUTBOX_BLOBS="/proc/blobs")
    assert status == 1
    assert {"writable", "hard links"} <= set(missing)


def test_doctor_finds_the_embedded_mail_server_sound(site: Site, smtp: str) -> None:
    assert ask(site, "mail", OUTBOX_SMTP=smtp) == (0, {})


def test_doctor_finds_a_mail_server_that_does_not_answer(site: Site) -> None:
    status, missing = ask(site, "mail", OUTBOX_SMTP="smtp://127.0.0.1:1")
    assert (status, set(missing)) == (1, {"usable"})


def test_doctor_refuses_a_subject_that_it_does_not_know(site: Site) -> None:
    command = [sys.executable, "-m", "outbox", "doctor", "weather"]
    done = subprocess.run(command, env=site.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none of database, index, blobs, mail" in done.stderr


@pytest.mark.root
def test_doctor_finds_what_hold_lacks(site: Site, postfix: Postfix, tmp_path: Path) -> None:
    # Given: a Postfix set up as it should be
    site.environment |= {
        "OUTBOX_SMTP": postfix.hold_url, "OUTBOX_MAIL_EVIDENCE": postfix.hold, "OUTBOX_MAIL_DOMAIN": "outbox.test"
    }  # fmt: skip
    assert ask(site, "mail") == (0, {})
    assert postfix.queue("hold") == [], "the probe is gone"
    # When: one thing is not as it should be. Then: it is named, with what to do
    assert "static:HOLD" in ask(site, "mail", OUTBOX_SMTP=postfix.url)[1]["hold"]["advice"]
    assert "OUTBOX_POSTSUPER" in ask(site, "mail", OUTBOX_POSTSUPER="false")[1]["hold"]["advice"]
    assert set(ask(site, "mail", OUTBOX_MAIL_DOMAIN="outbox.invalid")[1]) == {"domain"}
    text = (postfix.etc / "main.cf").read_text(encoding="ascii")
    for line in ("enable_long_queue_ids = yes", "smtpd_forbid_bare_newline = yes"):
        assert line in text
        text = text.replace(line, "")
    (tmp_path / "main.cf").write_text(text.replace("= 104857600", "= 20000"), encoding="ascii")
    (tmp_path / "master.cf").write_text((postfix.etc / "master.cf").read_text(encoding="ascii"), encoding="ascii")
    missing = ask(site, "mail", OUTBOX_MAIL_EVIDENCE=f"hold:{tmp_path}")[1]
    assert {"message_size_limit", "smtpd_forbid_bare_newline", "enable_long_queue_ids", "hold"} == set(missing)


@pytest.mark.root
def test_doctor_finds_a_log_that_can_not_be_read(site: Site, postfix: Postfix, tmp_path: Path) -> None:
    site.environment |= {"OUTBOX_SMTP": postfix.url, "OUTBOX_MAIL_DOMAIN": "outbox.test"}
    assert ask(site, "mail", OUTBOX_MAIL_EVIDENCE=postfix.evidence) == (0, {})
    text = (postfix.etc / "main.cf").read_text(encoding="ascii")
    (tmp_path / "main.cf").write_text(text.replace("mail.log", "no.log"), encoding="ascii")
    missing = ask(site, "mail", OUTBOX_MAIL_EVIDENCE=f"postfix:{tmp_path}")[1]
    assert set(missing) == {"log"}
