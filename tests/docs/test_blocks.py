"""Every fenced block of the README and the documentation runs, in the order of its page, against one embedded stack.

    python   a script in the working directory; if its first line is `# NAME.py`, it is saved under that name instead
    bash     run as it is, but for lines that set a machine up (make, sudo, git): their targets must exist
    sql      run by psql as the role that the comment above says: <!-- as: app -->
    ini      parsed; so is JSON
    text     not run; below <!-- output -->, it must be in what the block before it printed
    mermaid  not run; the states in it are compared in test_reference

A block below <!-- not run: REASON --> is passed over; there may be few of them.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from outbox.errors import NotReady
from outbox.settings import Settings
from tests.docs.pages import PAGES, ROOT, Block, blocks, name, read
from workers.stack import Stack

NOT_RUN_LIMIT = 2
"""Blocks that the tests pass over, at most."""

_SET_UP = re.compile(r"(make|sudo|git|apt-get|\. \.venv/bin/activate)\b")
_FILE = re.compile(r"# (\w+\.py)\n")
_DATABASE_USER = {"app": "app", "worker": "outbox_worker", "admin": "postgres", "operator": "postgres"}


class Desk:
    """A working directory with a running stack in `.outbox`, as a reader of the documentation has it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.stack = Stack(home / ".outbox")
        own = {key: value for key, value in os.environ.items() if not key.startswith(("OUTBOX_", "PG"))}
        path = f"{Path(sys.executable).parent}:{self.stack.postgres.binaries}:{os.environ['PATH']}"
        self.environment = own | {"PATH": path, "PYTHONWARNINGS": "error"}
        self.printed = ""

    def run(self, block: Block) -> None:
        match block.language:
            case "python":
                self._python(block)
            case "bash":
                lines = [line for line in block.text.splitlines() if not _SET_UP.match(line)]
                self._command(block, ["bash", "-euo", "pipefail", "-c", "\n".join(lines)])
            case "sql":
                self._sql(block)
            case "ini":
                parse_ini(block.text)
            case "json":
                json.loads(block.text)
            case "text" if block.mark == "output":
                missing = [line for line in block.text.splitlines() if line not in self.printed.splitlines()]
                assert not missing, f"{block.place}: not printed: {missing}; but:\n{self.printed}"
            case "text" | "mermaid":
                pass
            case other:
                pytest.fail(f"{block.place}: a block of the language {other!r}, which no test runs")

    def _python(self, block: Block) -> None:
        named = _FILE.match(block.text)
        if named:
            (self.home / named[1]).write_text(block.text, encoding="utf-8")
            compile(block.text, named[1], "exec")
            return
        script = self.home / "block.py"
        script.write_text(block.text, encoding="utf-8")
        self._command(block, [sys.executable, script.name])

    def _sql(self, block: Block) -> None:
        kind, _, role = block.mark.partition(": ")
        assert kind == "as", f"{block.place}: say as whom, in a comment above the block"
        url = Settings.load(self.stack.state, env={}).database.replace("//app@", f"//{_DATABASE_USER[role]}@")
        options = {"PGOPTIONS": "-c role=outbox_operator"} if role == "operator" else {}
        psql = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", block.text]
        self._command(block, psql, **options)

    def _command(self, block: Block, command: list[str], **more: str) -> None:
        done = subprocess.run(
            command, cwd=self.home, env=self.environment | more, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180, check=False,
        )  # fmt: skip
        self.printed = done.stdout
        assert done.returncode == 0, f"{block.place} fails:\n{done.stdout}"


def parse_ini(text: str) -> None:
    """A configuration with sections, or lines of NAME=value."""
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.read_string(text if text.startswith("[") else f"[environment]\n{text}")
    assert all(value for section in parser.sections() for value in parser[section].values())


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    home = Path(tempfile.mkdtemp(prefix="ob-"))
    home.chmod(0o755)
    desk = Desk(home)
    try:
        yield desk
    finally:
        with suppress(NotReady):
            desk.stack.down()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name)
def test_blocks_of_a_page_run_in_order(page: Path, desk: Desk) -> None:
    if "redis-server" in read(page) and shutil.which("redis-server") is None:
        pytest.skip("Redis is not installed: `make test` as root on Debian does it")
    desk.stack.up()  # a page before may have stopped it, as its reader would
    for block in blocks(page):
        if not block.mark.startswith("not run: "):
            desk.run(block)


def test_few_blocks_are_passed_over() -> None:
    passed_over = [block.place for page in PAGES for block in blocks(page) if block.mark.startswith("not run")]
    assert len(passed_over) <= NOT_RUN_LIMIT, passed_over


def test_every_block_says_its_language() -> None:
    assert [block.place for page in PAGES for block in blocks(page) if not block.language] == []
    # And none was overlooked.
    assert sum(read(page).count("\n```") for page in PAGES) == 2 * sum(len(list(blocks(page))) for page in PAGES)


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"(?:^ *|`)make ([a-z-]+)", read(page), re.MULTILINE)}
    assert named
    assert named <= targets
