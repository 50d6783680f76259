"""Pictures of a saga's steps: for a terminal, as mermaid, and as SVG. Pure functions of what `outbox.saga.view` reads.

A step stands in the column after the last of those that it comes after, so that arrows point to the right only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

#: How a state is drawn in a terminal.
MARKS = {
    "pending": "·", "running": "▶", "recalled": "◁", "done": "✔", "failed": "✘", "undoing": "◀", "undone": "↺",
    "stuck": "‼", "skipped": "-",
}  # fmt: skip

_COLOURS = {
    "pending": "#eeeeee", "running": "#cfe2ff", "recalled": "#ffe5b4", "done": "#cdeccf", "failed": "#f5c2c7",
    "undoing": "#ffe5b4", "undone": "#e2d9f3", "stuck": "#ff8080", "skipped": "#eeeeee",
}  # fmt: skip

_ARROW = (
    '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
)

_WIDTH, _HEIGHT, _GAP = 150, 44, 50

Nodes = Sequence[Mapping[str, Any]]
"""step, act, kind, after (names), undo, timeout: as in outbox.saga_plan."""


def columns(nodes: Nodes) -> list[list[Mapping[str, Any]]]:
    """The steps in columns."""
    depth: dict[str, int] = {}
    for node in nodes:
        depth[node["step"]] = max((depth[name] + 1 for name in node["after"]), default=0)
    found: list[list[Mapping[str, Any]]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in nodes:
        found[depth[node["step"]]].append(node)
    return found


def terminal(nodes: Nodes, states: Mapping[str, str]) -> str:
    """The steps for a terminal: one line each, with the lines of the graph before it.

    A step that follows only the one above it is drawn under it; the others say what they come after.
    """
    lines = []
    width = max((len(node["step"]) for node in nodes), default=0)
    previous = None
    for node in nodes:
        state = states.get(node["step"], "pending")
        branch = "┬" if not node["after"] else "├" if node is not nodes[-1] else "└"
        after = "" if node["after"] in ([], [previous]) else f"  after {', '.join(node['after'])}"
        kind = {"pivot": "  ◆ pivot", "retriable": "  ▸ retriable"}.get(node["kind"], "")
        name = node["step"].ljust(width)
        lines.append(f"{branch}─ {MARKS.get(state, '?')} {name}  {state.ljust(8)}  {node['act']}{kind}{after}")
        previous = node["step"]
    return "\n".join(lines)


def mermaid(nodes: Nodes, states: Mapping[str, str]) -> str:
    """The steps as a mermaid flowchart."""
    number = {node["step"]: n for n, node in enumerate(nodes)}
    lines = ["flowchart LR"]
    for node in nodes:
        left, right = ("{{", "}}") if node["kind"] == "pivot" else ("[", "]")
        state = states.get(node["step"])
        text = node["step"] if state is None else f"{node['step']}: {state}"
        lines.append(f'  s{number[node["step"]]}{left}"{text}"{right}')
    lines += [f"  s{number[name]} --> s{number[node['step']]}" for node in nodes for name in node["after"]]
    return "\n".join(lines)


def svg(nodes: Nodes, states: Mapping[str, str], title: str) -> str:
    """The steps as a picture of its own, with nothing fetched from elsewhere."""
    place: dict[str, tuple[int, int]] = {}
    grid = columns(nodes)
    for column, several in enumerate(grid):
        for row, node in enumerate(several):
            place[node["step"]] = (10 + column * (_WIDTH + _GAP), 34 + row * (_HEIGHT + 20))
    width = 20 + len(grid) * (_WIDTH + _GAP) - _GAP if grid else 20
    height = 44 + max((len(several) for several in grid), default=0) * (_HEIGHT + 20)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        _ARROW,
        f"<title>{escape(title)}</title>",
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for node in nodes:
        x, y = place[node["step"]]
        for name in node["after"]:
            left, top = place[name]
            lines.append(
                f'<line x1="{left + _WIDTH}" y1="{top + _HEIGHT // 2}" x2="{x}" y2="{y + _HEIGHT // 2}" '
                'stroke="#555" marker-end="url(#a)"/>'
            )
    for node in nodes:
        x, y = place[node["step"]]
        state = states.get(node["step"], "")
        thick = 3 if node["kind"] == "pivot" else 1
        colour = _COLOURS.get(state, "#ffffff")
        box = f'x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"'
        lines += [
            f'<rect {box} stroke="#333" stroke-width="{thick}" fill="{colour}"/>',
            f'<text x="{x + 8}" y="{y + 18}" font-size="12">{escape(node["step"])}</text>',
            f'<text x="{x + 8}" y="{y + 35}" font-size="10" fill="#555">{escape(node["kind"])} {escape(state)}</text>',
        ]
    return "\n".join([*lines, "</svg>"])
