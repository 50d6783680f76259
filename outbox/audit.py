"""The audit trail: what operators did with parked intents.

Written by the database in the transaction of the decision (`outbox.decision`), never changed, read here with the
rights of `outbox_reader`.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import dict_row

from outbox import sql


def find(
    conn: psycopg.Connection[Any],
    *,
    intent: int | None = None,
    target: str | None = None,
    action: str | None = None,
    who: str | None = None,
    since: float | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The newest `limit` actions, the last one last: id, at, who (database user), client (system user and host, as
    the command said), action, intent, target, reason and error (before the action), note. `since` in seconds ago.
    """
    parameters = {"intent": intent, "target": target, "action": action, "who": who, "since": since, "limit": limit}
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql.load("audit_find"), parameters).fetchall()
