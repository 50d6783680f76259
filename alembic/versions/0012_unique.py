"""Unique messages, and schedules. The story is told in the SQL file."""

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("do $$ begin raise exception 'there is no way down from 0012: restore a backup instead'; end $$")
