"""Runs the migrations, online (on a connection that `outbox.migrate` gives) or as SQL text.

The version table lives in the schema `outbox`, so that it never meets the application's own alembic.
"""

from __future__ import annotations

from alembic import context

VERSION = {"version_table": "alembic_version", "version_table_schema": "outbox"}

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, transactional_ddl=True, **VERSION)
    with context.begin_transaction():
        context.execute("create schema if not exists outbox")
        context.run_migrations()
else:
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, transactional_ddl=True, **VERSION)
    with context.begin_transaction():
        context.execute("create schema if not exists outbox")
        context.run_migrations()
