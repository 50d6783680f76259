"""Keys of actors: messages that run one at a time in order, or so many at a time (the SQL file tells the story)."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute(Path(__file__).with_suffix(".sql").read_text(encoding="utf-8"))


def downgrade() -> None:
    op.execute("do $$ begin raise exception 'there is no way down from 0013: restore a backup instead'; end $$")
