"""The wheel, as an application installs it: built, looked into, installed alone, and its database migrated."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from workers.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]

_number = itertools.count()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its own dependencies: no extras, no development tools."""
    home = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    # The versions that were tested; the hashes of the lock can't be used, as the wheel has none.
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    constraints = home / "constraints.txt"
    constraints.write_text("\n".join(re.findall(r"^\S+==[^\\\n]+", locked, re.MULTILINE)), encoding="utf-8")
    python = home / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c"]
    done = subprocess.run([*pip, str(constraints), str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture
def empty(server: Postgres) -> Iterator[str]:
    """The administrator's URL of an empty database."""
    name = f"wheel_{next(_number)}"
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"create database {name} owner app")
    yield server.url(database=name)
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute(f"drop database {name} with (force)")


def run(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Away from the checkout, and with nothing of this process's environment that points to it.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OUTBOX_", "PYTHON"))}
    return subprocess.run(
        [str(python), *arguments], cwd=python.parent, env=env | environment, capture_output=True, text=True, check=False
    )


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        commands = archive.read(entry_points).decode()
    assert {
        "outbox/__main__.py",
        "outbox/py.typed",
        "outbox/_migrations/env.py",
        "outbox/_migrations/script.py.mako",
        "outbox/_migrations/versions/0001_log.py",
        "outbox/_migrations/versions/0001_log.sql",
        "workers/py.typed",
        "workers/supervisord.conf",
        "workers/cli/up.py",
    } <= names
    for file in (ROOT / "outbox" / "sql").glob("*.sql"):
        assert f"outbox/sql/{file.name}" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"outbox", "workers"}
    assert "outbox.cli:main" in commands
    # Each contributed command is in the wheel.
    for module in re.findall(r"= (workers\.cli\.\w+)", commands):
        assert module.replace(".", "/") + ".py" in names


def test_import_is_light(python: Path) -> None:
    code = "import sys, outbox; print(*sorted({name.split('.')[0] for name in sys.modules})); print(outbox.__file__)"
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr
    loaded, file = done.stdout.splitlines()
    assert {"xapian", "aiosmtpd", "dramatiq", "sqlalchemy", "workers"}.isdisjoint(loaded.split())
    assert "site-packages" in file
    # Nor can it need them: none is installed.
    for name in ("xapian", "aiosmtpd", "dramatiq", "supervisor"):
        assert run(python, "-c", f"import {name}").returncode == 1


def test_names_work_with_the_base_dependencies(python: Path) -> None:
    done = run(python, "-c", "import outbox; [getattr(outbox, name) for name in outbox.__all__]")
    assert done.returncode == 0, done.stderr


def test_version_and_help(python: Path) -> None:
    done = run(python, "-m", "outbox", "--version")
    assert (done.returncode, done.stdout) == (0, "outbox 0.1.0\n"), done.stderr
    done = run(python, "-m", "outbox", "--help")
    assert done.returncode == 0
    assert "migrate" in done.stdout


def test_migrate(python: Path, empty: str) -> None:
    done = run(python, "-m", "outbox", "migrate", OUTBOX_DATABASE=empty)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Migrated to ")
    done = run(python, "-m", "outbox", "migrate", "--check", OUTBOX_DATABASE=empty)
    assert (done.returncode, done.stderr) == (0, "")


def test_embedded_stack_says_what_is_missing(python: Path, tmp_path: Path) -> None:
    done = run(python, "-m", "outbox", "up", "--state", str(tmp_path / "s"))
    assert done.returncode == 1
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
