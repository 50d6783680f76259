"""Queues of actors that are relayed to a broker of dramatiq, and what the far side tells of it."""

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("do $$ begin raise exception 'there is no way down from 0014: restore a backup instead'; end $$")
