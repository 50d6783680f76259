"""The configurations mean to supervisord what they mean to us: read back by supervisord's own parser."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outbox.cli import main
from outbox.errors import NotReady
from workers import supervisor
from workers.postgres import Postgres

SHIPPED = Path(supervisor.__file__).with_name("supervisord.conf")

# In a process of its own: supervisord changes the umask, reads sys.argv and warns.
READ = """
import json, sys
from supervisor.options import ServerOptions
from shlex import split
options = ServerOptions()
options.realize(["-c", sys.argv[1]])
print(json.dumps({
    config.name: {
        "argv": split(config.command), "log": config.stdout_logfile, "retries": config.startretries,
        "directory": config.directory, "autostart": config.autostart, "priority": config.priority,
        "signal": int(config.stopsignal), "environment": config.environment,
    }
    for group in options.process_group_configs for config in group.process_configs
} | {"socket": options.configroot.supervisord.server_configs[0]["file"]}))
"""


def read(file: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", READ, file.name], cwd=file.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_shipped_file_is_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervisor-config"]) == 0
    assert capsys.readouterr().out == SHIPPED.read_text(encoding="utf-8")


def test_production(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "100% ours"
    (directory / "log").mkdir(parents=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    command = "'/opt/my venv/bin/outbox' --verbose"
    assert main(["supervisor-config", "--user", user, "--directory", str(directory), "--command", command]) == 0
    file = tmp_path / "supervisord.conf"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    programs = read(file)
    assert programs.pop("socket") == str(directory / "supervisor.sock")
    assert set(programs) == {*supervisor.WORKERS, "scrub"}
    for name, program in programs.items():
        words = ["scrub", "--scheduled"] if name == "scrub" else ["work", name]
        assert program["argv"] == ["/opt/my venv/bin/outbox", "--verbose", *words]
        assert program["directory"] == str(directory)
        assert program["log"] == str(directory / "log" / f"{name}.log")
        assert program["environment"]["OUTBOX_BLOBS"] == str(directory / "blobs")
        assert program["environment"]["OUTBOX_DATABASE"].startswith("postgresql://")
        assert program["autostart"] is True


@pytest.mark.parametrize("name", ["plain", "a b", "50% off", "x ;y #z", "it's", 'say "hi"', "%(here)s", "ünï"])
def test_embedded_in_any_directory(tmp_path: Path, name: str) -> None:
    state = tmp_path / name
    (state / "log").mkdir(parents=True)
    sockets = tmp_path / "run"
    sockets.mkdir()
    postgres = Postgres(state / "pg", sockets)
    postgres.user = None  # the parser looks users up
    file = state / "supervisord.conf"
    file.write_text(supervisor.embedded(state, sockets, postgres, home=state.parent), encoding="utf-8")
    programs = read(file)
    assert programs.pop("socket") == str(sockets / "ctl.sock")
    assert programs["postgres"]["argv"] == postgres.command
    assert programs["mailserver"]["argv"][-3:] == [str(state / "mail"), "--listen", f"unix:{sockets}/smtp.sock"]
    assert programs["clock"]["argv"] == [sys.executable, "-P", "-m", "outbox", "work", "clock"]
    # Stopped in the reverse order: workers, mail server, Postgres.
    assert programs["postgres"]["priority"] < programs["mailserver"]["priority"] < programs["clock"]["priority"]
    assert [name for name, program in programs.items() if program["autostart"]] == ["postgres", "mailserver"]
    assert all(program["retries"] > 10**6 for program in programs.values())


@pytest.mark.parametrize("directory", ["relative", "/a\nb", "/a ;b", '/a"b'])
def test_directories_that_a_configuration_cant_hold(directory: str) -> None:
    with pytest.raises(NotReady):
        supervisor.production("nobody", directory, "outbox")


def test_production_has_a_program_for_each_lane_when_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "outbox"
    (directory / "log").mkdir(parents=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert main(["supervisor-config", "--user", user, "--directory", str(directory), "--lanes", "index=2"]) == 0
    file = tmp_path / "supervisord.conf"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    programs = read(file)
    workers = {"clock", "index-0", "index-1", "blob", "mail", "saga", "actors", "relay"}
    assert set(programs) == {"socket", *workers, "scrub"}
    assert programs["index-1"]["argv"] == ["outbox", "work", "index", "--lane", "1"]


@pytest.mark.parametrize("lanes", ["index", "clock=2", "relay=2", "other=2", "index=two"])
def test_production_refuses_lanes_of_what_it_does_not_run(lanes: str) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["supervisor-config", "--lanes", lanes])
    assert wrong.value.code == 2
