"""What every reader of the log must show: no loss, no ghost, nothing twice, per-key order."""

from __future__ import annotations

from collections.abc import Iterable


def violations(committed: Iterable[tuple[str, int]], seen: Iterable[tuple[int, str, int]]) -> list[str]:
    """What is wrong with `seen`, given the (key, number) pairs that committed.

    The numbers of a key rise in the order in which its row was locked and its transactions committed.
    """
    wrong: list[str] = []
    expected = list(committed)
    got = [(key, number) for _, key, number in seen]
    if lost := set(expected) - set(got):
        wrong.append(f"I2: {len(lost)} lost")
    if ghosts := set(got) - set(expected):
        wrong.append(f"I1: {len(ghosts)} ghosts")
    if len(got) != len(set(got)):
        wrong.append(f"I3: {len(got) - len(set(got))} twice")
    last: dict[str, int] = {}
    for key, number in got:
        if number <= last.get(key, 0):
            wrong.append(f"I4: {key} went from {last[key]} to {number}")
        last[key] = number
    return wrong
