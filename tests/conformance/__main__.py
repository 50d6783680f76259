"""Puts the broker through dramatiq's own tests: `make conformance`.

They come from dramatiq's source distribution, pinned by its hash (`dramatiq.txt`), and run against a Postgres and a
clock of the run's own. What they find instead of dramatiq's brokers is in `suite/`; what is left out, and why, in
`suite/left_out.txt`. Arguments are pytest's.

Many of these tests measure times, for a machine that has nothing else to do: what fails is run again, alone, up to
`CHANCES` times. What the broker does wrong now and then is for tests of our own to find.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import dramatiq

from outbox import migrate
from outbox.settings import Settings
from workers.postgres import DATABASE, Postgres
from workers.process import run_clock

HERE = Path(__file__).parent

CHANCES = 5


def fetch(into: Path) -> Path:
    """Dramatiq's tests, beside ours. → the folder above them."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    only = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "-r", str(HERE / "dramatiq.txt")]
    subprocess.run([*pip, *only, "-d", str(into)], check=True)
    (archive,) = into.glob("*.tar.gz")
    if archive.name != f"dramatiq-{dramatiq.__version__}.tar.gz":
        raise SystemExit(f"dramatiq {dramatiq.__version__} is installed, and {archive.name} is pinned: pin that one")
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    home = into / "run"
    shutil.copytree(into / archive.name.removesuffix(".tar.gz") / "tests", home / "tests")
    for name in ("conftest.py", "common.py", "left_out.txt"):
        shutil.copy(HERE / "suite" / name, home / "tests")
    shutil.copy(HERE / "suite" / "package.py", home / "tests" / "__init__.py")
    return home


def run(where: Path, env: dict[str, str], words: list[str]) -> int:
    """Pytest over these words, and again over what failed. → its last exit code."""
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "--timeout=300", "-c", os.devnull]
    options = [word for word in words if word.startswith("-")]
    code = 1
    for chance in range(CHANCES):
        if chance:
            print(f"\nagain, because they measure times: {' '.join(words)}", flush=True)
        code = subprocess.run([*command, "--rootdir", str(where), *words], cwd=where, env=env, check=False).returncode
        failed = (where / "failed.txt").read_text(encoding="utf-8").splitlines()
        if code != 1 or not failed:
            break
        words = [*options, *failed]
    return code


def main(words: list[str]) -> int:
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    home.chmod(0o755)
    postgres = Postgres(home / "pg", home / "sockets")
    stop = threading.Event()
    try:
        where = fetch(home)
        postgres.init()
        with (postgres.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\nfsync = off\n")
        postgres.start()
        postgres.provide()
        migrate.upgrade(postgres.url(database=DATABASE))
        env = os.environ | {
            "OUTBOX_DATABASE": postgres.url("app", DATABASE),
            "OUTBOX_ACTOR_DATABASE": postgres.url("actor", DATABASE),
            "OUTBOX_STATE": str(home / "none"),
        }
        worker = {**env, "OUTBOX_DATABASE": postgres.url("outbox_worker", DATABASE)}
        clock = threading.Thread(target=run_clock, args=(Settings.load(env=worker), stop))
        clock.start()
        try:
            return run(where, env, words or ["tests"])
        finally:
            stop.set()
            clock.join()
    finally:
        if postgres.pid():
            postgres.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
