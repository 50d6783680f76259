"""The log, its ticks, lanes and positions, with roles and grants. The story is told in the SQL file."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute(
        "do $$ begin raise exception 'there is no way down from 0001: it would drop the log; "
        "restore a backup instead'; end $$"
    )
