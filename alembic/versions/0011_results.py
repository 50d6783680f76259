"""Results of actors, what rate limiters count, and the rates of actors."""

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("do $$ begin raise exception 'there is no way down from 0011: restore a backup instead'; end $$")
