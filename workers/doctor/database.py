"""What `outbox doctor` asks of the database."""

from __future__ import annotations

from typing import Any

import psycopg

from outbox import era
from outbox.database import check_schema, connect
from outbox.settings import Settings
from outbox.watermark import Watermark
from workers.doctor import Findings

_OLDEST = 150000

_RIGHTS = """
select has_table_privilege('outbox.log', 'select') and has_table_privilege('outbox.tick', 'insert')
   and has_table_privilege('outbox.position', 'insert') and has_table_privilege('outbox.parked', 'insert')
   and has_table_privilege('outbox.receipt', 'insert') and has_any_column_privilege('outbox.lane', 'update')
"""


def database(settings: Settings) -> Findings:
    """Reachable, new enough, durable, migrated, with the rights of a worker, and the server that the log goes on in."""
    with connect(settings.database, name="doctor", check=False) as conn:
        version = conn.info.server_version
        text = f"Postgres {version // 10000}.{version % 10000}"
        yield "version", version >= _OLDEST, text, "use Postgres 15 or later"
        for name in ("fsync", "full_page_writes"):
            value = _one(conn, f"show {name}")
            yield name, value == "on", value, f"set {name} = on: with off, a power cut destroys the database"
        check_schema(conn)
        yield "schema", True, "up to date", ""
        user = conn.info.user
        allowed = bool(_one(conn, _RIGHTS))
        yield "rights", allowed, f"user {user}", f"run GRANT outbox_worker TO {user}"
        if not allowed:
            return
        yield _history(conn, settings)
        age = _one(conn, "select extract(epoch from outbox.now() - max(at)) from outbox.tick")
        runs = _one(conn, "select lease_until > outbox.now() from outbox.lane where target = 'clock'")
        found = f"newest tick {float(age):.0f} s old" if age is not None else "no tick"
        yield "clock", bool(runs), found, "start `outbox work clock`: without ticks nothing is read"


def _history(conn: psycopg.Connection[Any], settings: Settings) -> tuple[str, bool, str, str]:
    """Whether lanes may go on here: by the database, and by what this machine has seen."""
    now = era.look(conn)
    says = now.trouble.says if now.trouble else Watermark(settings.state).trouble(conn, now)
    advice = "no lane goes on: `outbox adopt --dry-run` shows what was not done, `outbox adopt` goes on"
    return "history", says is None, says or f"era {now.number}, goes on in this server since {now.at:%Y-%m-%d}", advice


def _one(conn: psycopg.Connection[Any], query: str) -> Any:
    # The queries are constants of this module.
    row = conn.execute(query.encode()).fetchone()
    return None if row is None else row[0]
