"""Numbers of things, as people read them: `1 intent`, `2,000 intents`."""

from __future__ import annotations


def counted(number: int, noun: str, *, then: tuple[str, str] = ("", "")) -> str:
    """`number` and its noun, whose plural is regular. `then` follows it: (` is`, ` are`)."""
    one, many = then
    return f"1 {noun}{one}" if number == 1 else f"{number:,} {noun}s{many}"
