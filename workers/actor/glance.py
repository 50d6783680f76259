"""The glance: one query for all lanes that stand at the same tick, because nothing was left over.

Mostly there is little between two ticks, and nothing for most lanes: then this is all that is read, however many lanes
and queues a process has. What is more is read lane by lane (`workers.actor.holding`). Called by
`workers.actor.delivery`; nothing is durable when it returns, as after any page.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from outbox import log
from outbox.database import Connection
from outbox.intent import Intent
from outbox.tick import Tick
from workers.actor.holding import Holding

MOST = 64
"""Intents between two ticks, from which on there are so many that each lane reads its own."""


def look(
    conn: Connection, holdings: Sequence[Holding], newest: Tick, hunger: Mapping[str, int]
) -> dict[Holding, list[Intent]]:
    """What there is up to `newest`, for lanes of which that is all: pages as after `Holding.read`.

    `hunger`: how many messages each queue takes, at most. Lanes that are left out are to be read one by one.
    """
    standing: dict[Tick, list[Holding]] = defaultdict(list)
    for holding in holdings:
        if (start := holding.stands_before(newest)) is not None:
            standing[start].append(holding)
    seen: dict[Holding, list[Intent]] = {}
    for start, together in standing.items():
        if len(together) > 1:
            seen.update(_between(conn, start, newest, together, hunger))
    for holding, page in seen.items():
        holding.shown(newest, page)
    return seen


def _between(
    conn: Connection, start: Tick, newest: Tick, together: Sequence[Holding], hunger: Mapping[str, int]
) -> dict[Holding, list[Intent]]:
    targets = sorted({holding.lane.target for holding in together})
    found = log.glance(conn, start, newest, targets=targets, limit=MOST)
    if len(found) == MOST:
        return {}
    left = Counter(hunger)
    pages: dict[Holding, list[Intent]] = {}
    for holding in together:
        low, high = holding.lane.slots
        page = [one for one, slot in found if one.target == holding.lane.target and low <= slot <= high]
        if len(page) <= left[holding.lane.target]:
            left[holding.lane.target] -= len(page)
            pages[holding] = page
    return pages
