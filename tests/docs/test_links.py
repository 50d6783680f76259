"""Links lead somewhere, and every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, name, prose, read

CHANGELOG = ROOT / "CHANGELOG.md"

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Each relative link: as written, the file, the part behind #."""
    found = []
    for link in _LINK.findall(prose(page)):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            found.append((link, (page.parent / file).resolve() if file else page, anchor))
    return found


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link, file, anchor in links(page):
        assert file.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {link} has no such heading"


def test_index_is_a_map_of_every_page() -> None:
    index = DOCS / "index.md"
    assert set(DOCS.rglob("*.md")) - {file for _, file, _ in links(index)} == {index}


def test_readme_leads_to_the_documentation() -> None:
    assert DOCS / "index.md" in {file for _, file, _ in links(ROOT / "README.md")}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name)
def test_pages_name_nothing_of_the_machine_they_were_written_on(page: Path) -> None:
    text = read(page)
    assert not re.search(r"/work/|/root/|/home/\w|/tmp/\w", text)
    assert not re.search(r"\b[Tt]ODO\b|\bFIXME\b", text)


def test_decisions_are_short_and_complete() -> None:
    for page in (DOCS / "decisions").glob("*.md"):
        text = read(page)
        assert len(text.splitlines()) <= 40, name(page)
        for part in ("**Context.**", "**Decision.**", "**Consequence.**", "**Tested by**"):
            assert part in text, f"{name(page)} lacks {part}"
