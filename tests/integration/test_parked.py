"""`outbox parked` and `outbox audit` as an operator uses them."""

from __future__ import annotations

import io
import json
from typing import Any

import psycopg
import pytest

from outbox import span
from outbox.cli import main
from tests.fixtures.lanes import Bench
from tests.integration.test_reader import POISON, RETRY, Ambivalent, KillerDied


@pytest.fixture
def parked(bench: Bench, operator_url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Some of each kind: name → id."""
    import datetime as dt

    from outbox.retry import Backoff

    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    bench.sink.fate |= {"bad/1": POISON, "bad/2": POISON, "slow": RETRY}
    ids = {"bad/1": bench.emit("bad/1", "SECRET"), "behind": bench.emit("bad/1", 2), "bad/2": bench.emit("bad/2")}
    ids["slow"] = bench.emit("slow")
    ids["due"] = bench.emit("due", due=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    bench.drain(bench.reader(backoff=Backoff(first=3600, limit=3600)))
    return ids


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[int]:
    assert main(["parked", "list", "--json", *words]) == 0
    return [row["id"] for row in json.loads(capsys.readouterr().out)]


FILTERS = {
    "": "bad/1 behind bad/2 slow due",
    "--reason poison": "bad/1 bad/2",
    "--reason poison --reason blocked": "bad/1 behind bad/2",
    "--key bad/1": "bad/1 behind",
    "--key-prefix bad/": "bad/1 behind bad/2",
    "--key-prefix bad/ --reason poison": "bad/1 bad/2",
    "--key-prefix b_d": "",
    "--error NEVER": "bad/1 bad/2",
    "--target sink --limit 2": "bad/1 behind",
    "--target index": "",
    "--older-than 1h": "",
    "--older-than 0s": "bad/1 behind bad/2 slow due",
}


def test_parked_list_shows_what_the_filter_says(parked: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    for words, names in FILTERS.items():
        assert listed(capsys, *words.split()) == [parked[name] for name in names.split()], words


def test_parked_list_by_ids_and_as_text(parked: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, str(parked["slow"]), str(parked["due"])) == [parked["slow"], parked["due"]]
    assert main(["parked", "list", "--limit", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["intent", "participant", "key", "reason", "tries", "next", "try",
                                                   "parked", "error"]  # fmt: skip
    assert len(printed.out.splitlines()) == 4
    assert "more than 3" in printed.err
    assert "SECRET" not in printed.out


def test_parked_list_cannot_be_made_to_steer_the_terminal(
    bench: Bench, parked: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.admin.execute("update outbox.parked set key = e'\\x1b[2Jgone', error = e'a\\nb\\x1b]0;x\\x07'")
    assert main(["parked", "list"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_parked_show_prints_everything_but_the_payload(
    parked: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    number = str(parked["bad/1"])
    assert main(["parked", "skip", number, "--note", "known to be wrong"]) == 0
    capsys.readouterr()
    assert main(["parked", "show", number]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("bad/1", "skipped", "never", "known to be wrong", "outbox_operator"))
    assert "SECRET" not in text
    assert main(["parked", "show", number, "--payload"]) == 0
    assert "SECRET" in capsys.readouterr().out
    for words, shown in ((["--payload"], True), ([], False)):
        assert main(["parked", "show", number, "--json", *words]) == 0
        (one,) = json.loads(capsys.readouterr().out)
        assert ("payload" in one["intent"]) == shown
        assert (one["state"], one["parked"]["reason"], one["audit"][0]["action"]) == ("skipped", "skipped", "skip")


def test_parked_bulk_action_prints_its_plan_and_does_nothing_without_a_yes(
    bench: Bench, parked: dict[str, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.parked()
    assert main(["parked", "skip", "--key-prefix", "bad/"]) == 1
    printed = capsys.readouterr()
    assert [line.split() for line in printed.err.splitlines()[:3]] == [
        ["participant", "reason", "intents"],
        ["sink", "blocked", "1"],
        ["sink", "poison", "2"],
    ]
    assert "add --yes" in printed.err

    class Person(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Person("n\n"))
    assert main(["parked", "skip", "--key-prefix", "bad/"]) == 1
    assert bench.parked() == before
    monkeypatch.setattr("sys.stdin", Person("y\n"))
    assert main(["parked", "skip", "--key-prefix", "bad/"]) == 0
    assert bench.parked() == {"skipped": ["bad/1", "bad/1", "bad/2"], "retry": ["slow"], "due": ["due"]}


def test_parked_retry_by_filter_leaves_blocked_and_scheduled_ones_alone(
    bench: Bench, parked: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parked", "retry", "--target", "sink", "--yes", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["reason"], one["refused"]) for one in done] == [
        (parked["bad/1"], "poison", None),
        (parked["bad/2"], "poison", None),
        (parked["slow"], "retry", None),
    ]
    # By its id, a scheduled one is done now.
    assert main(["parked", "retry", str(parked["due"])]) == 0
    bench.sink.fate.clear()
    bench.drain(bench.reader(lane=_again(bench)))
    assert bench.parked() == {}
    assert sorted(key for key, _ in bench.sink.effects) == ["bad/1", "bad/1", "bad/2", "due", "slow"]


def _again(bench: Bench) -> Any:
    bench.die()
    return bench.claim()


def test_parked_action_in_many_transactions_when_there_are_many(
    bench: Bench, parked: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.cli.parked.CHUNK", 2)
    assert main(["parked", "skip", "--target", "sink", "--reason", "poison", "--reason", "blocked", "--yes"]) == 0
    assert bench.parked()["skipped"] == ["bad/1", "bad/1", "bad/2"]
    row = bench.admin.execute("select count(distinct xmin::text), count(*) from outbox.audit").fetchone()
    assert row == (2, 3)
    # From the last to the first: a worker that looks in between finds nothing whose turn it is.
    order = [number for (number,) in bench.admin.execute("select intent from outbox.audit order by id")]
    assert order == [parked["behind"], parked["bad/2"], parked["bad/1"]]


def test_parked_says_what_was_not_done_and_why(
    bench: Bench, parked: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parked", "retry", str(parked["behind"]), str(parked["slow"])]) == 1
    printed = capsys.readouterr()
    assert printed.out == "1 intent to be tried now.\n"
    assert f"intent {parked['behind']}: not done: it is blocked behind intent {parked['bad/1']}" in printed.err
    assert main(["parked", "resolve", "--sent", str(parked["slow"])]) == 1
    assert "nothing about it is in doubt" in capsys.readouterr().err
    assert main(["parked", "skip", "--target", "index"]) == 1
    assert "Nothing is parked that fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "action", "times"),
    [("--sent", "applied", 1), ("--applied", "applied", 1), ("--not-sent", "not_applied", 2),
     ("--not-applied", "not_applied", 2)],
)  # fmt: skip
def test_parked_resolve_i3_is_what_the_operator_says(
    bench: Bench, operator_url: str, monkeypatch: pytest.MonkeyPatch, word: str, action: str, times: int
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    sink = Ambivalent()
    sink.die_after_effect = True
    number = bench.emit("k", 1)
    bench.clock.step()
    with pytest.raises(KillerDied):
        bench.drain(bench.reader(sink=sink))
    reader = bench.reader(lane=_again(bench), sink=sink)
    bench.drain(reader)
    assert main(["parked", "resolve", str(number), word]) == 0
    bench.drain(reader)
    assert sink.effects == [("k", 1)] * times
    assert bench.parked() == {}
    assert bench.admin.execute("select action, reason from outbox.audit").fetchall() == [(action, "in_doubt")]


WRONG = {
    "parked skip": "name the intents",
    "parked resolve 1": "--sent",
    "parked retry x": "is not an id",
    "parked list --older-than soon": "30s, 5min, 2h or 7d",
    "parked list --reason odd": "invalid choice",
    "parked": "required",
    f"parked skip 1 --note {'x' * 1001}": "the limit is 1000",
    "audit list --limit 0": "use 1 or more",
    "why": "required",
    "why -1": "",
    "why nobody": "is not an id",
}


def test_parked_says_what_is_wrong_with_its_words(
    operator_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE", operator_url)
    for words, says in WRONG.items():
        with pytest.raises(SystemExit) as caught:
            main(words.split())
        assert caught.value.code == 2, words
        assert says in capsys.readouterr().err, words


def test_parked_reader_may_look_and_not_act(
    parked: dict[str, int], admin: psycopg.Connection[Any], operator_url: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    admin.execute("create role looker login in role outbox_reader")
    try:
        monkeypatch.setenv("OUTBOX_DATABASE", operator_url.replace("outbox_operator", "looker"))
        assert len(listed(capsys)) == 5
        assert main(["parked", "show", str(parked["slow"])]) == 0
        assert main(["why", str(parked["slow"])]) == 0
        assert main(["audit", "list"]) == 0
        assert main(["parked", "skip", str(parked["slow"])]) == 1
        assert "GRANT outbox_operator TO looker" in capsys.readouterr().err
    finally:
        admin.execute("drop role looker")


def test_audit_list_shows_what_the_filter_says(
    parked: dict[str, int], admin: psycopg.Connection[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parked", "skip", str(parked["bad/1"]), "--note", "one"]) == 0
    assert main(["parked", "retry", str(parked["slow"]), "--note", "two"]) == 0

    def notes(*words: str) -> list[str]:
        capsys.readouterr()
        assert main(["audit", "list", "--json", *words]) == 0
        return [row["note"] for row in json.loads(capsys.readouterr().out)]

    assert notes() == ["one", "two"]
    assert notes("--limit", "1") == ["two"]
    assert notes("--action", "skip") == ["one"]
    assert notes("--intent", str(parked["slow"])) == ["two"]
    assert notes("--who", "nobody") == notes("--target", "index") == notes("--since", "0s") == []
    assert notes("--who", "outbox_operator", "--target", "sink", "--since", "1h") == ["one", "two"]
    assert main(["audit", "list"]) == 0
    assert "two" in capsys.readouterr().out


def test_span_reads_what_people_write() -> None:
    assert [span.parse(text) for text in ("30s", "5min", "5m", "2h", "1.5h", "7 d")] == [
        30,
        300,
        300,
        7200,
        5400,
        604800,
    ]
    for text in ("", "5", "h", "-1s", "1w", "1e9s"):
        with pytest.raises(ValueError, match="not a span of time"):
            span.parse(text)
