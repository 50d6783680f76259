"""The driver: statements of ours on the connection of an application's session.

Past SQLAlchemy, so that payloads stay out of its log (`echo`) and its errors, and a transaction with one intent takes a
tenth less time. Called by `outbox.session`.
"""

from __future__ import annotations

from typing import Any, LiteralString, cast

import psycopg
import sqlalchemy as sa


def run(connection: sa.Connection, statement: LiteralString, parameters: Any) -> list[Any]:
    """The rows of one statement, in the connection's transaction. Raises SQLAlchemy's errors, without parameters."""
    driver: Any = connection.connection.driver_connection
    try:
        if isinstance(driver, psycopg.AsyncConnection):
            return sa.util.await_only(_fetched(driver, statement, parameters))
        return list(driver.execute(statement, parameters))
    except psycopg.Error as error:
        adapted: Any = connection.connection.dbapi_connection
        lost = connection.dialect.is_disconnect(cast(Any, error), adapted, None)
        if lost:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            statement,
            None,
            error,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=lost,
            dialect=connection.dialect,
        ) from error


async def _fetched(driver: psycopg.AsyncConnection[Any], statement: LiteralString, parameters: Any) -> list[Any]:
    cursor = await driver.execute(statement, parameters)
    return await cursor.fetchall()
