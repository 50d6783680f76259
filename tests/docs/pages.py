"""The documentation as the tests see it: pages, their headings, their fenced blocks, their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: The tutorial first, because its reader begins with nothing.
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")], key=lambda page: (page.parent.name != "tutorial", page))

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced code block."""

    page: Path
    line: int
    language: str
    text: str
    #: What the comment on the line above says: `as: ROLE`, `output`, `not run: REASON`; or nothing.
    mark: str

    @property
    def place(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path) -> Iterator[Block]:
    text = read(page)
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        yield Block(page, line, match["language"], match["text"], match["mark"] or "")


def prose(page: str | Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def sections(page: str | Path, level: int) -> dict[str, str]:
    """Heading of this level → what stands below it, up to the next heading of this level or a higher one."""
    text = read(page)
    shown = _FENCE.sub(lambda block: re.sub(r"^#", " ", block[0], flags=re.MULTILINE), text)
    heads = [head for head in _HEADING.finditer(shown) if len(head[1]) <= level]
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {head[2]: text[head.end() : end] for head, end in zip(heads, ends, strict=True) if len(head[1]) == level}


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may say behind the #."""
    heads = (head[2] for head in _HEADING.finditer(prose(page)))
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def rows(text: str) -> list[list[str]]:
    """The cells of every table in `text`, without heads."""
    found: list[list[str]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        head = number + 1 < len(lines) and lines[number + 1].startswith("|---")
        if line.startswith("|") and not line.startswith("|---") and not head:
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.append([cell.strip() for cell in cells])
    return found


def code(cell: str) -> str:
    """The first `code` of a cell."""
    match = re.search(r"`([^`]+)`", cell)
    assert match is not None, cell
    return match[1]
