"""Actors: who is alone in hand, and an acknowledgement while a lane changes hands."""

from pathlib import Path

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("do $$ begin raise exception 'there is no way down from 0015: restore a backup instead'; end $$")
