"""A mail as a step that can be undone: on hold in a real Postfix until the saga has decided."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fixtures.post import Post
from tests.fixtures.site import LIMIT, until

APPLICATION = """
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from outbox import Outbox, Settings
from tests.fixtures.shop import Folder, invite
settings = Settings.load()
Session = sessionmaker(sa.create_engine(settings.sqlalchemy_url))
outbox = Outbox(Session, settings)
with Session.begin() as session:
    for n in range(4):
        invite.start(session, Folder(f"folder-{n}", bad=n % 2 == 1), key=str(n))
"""


@pytest.mark.root
def test_saga_i7_held_mail_leaves_only_when_the_saga_goes_forward(post: Post, app_url: str) -> None:
    # Given: sagas that have a mail as their first step, and of which every other one fails later
    site = post.site
    site.environment |= {"OUTBOX_SAGAS": "tests.fixtures.shop"}
    environment = site.environment | {"OUTBOX_DATABASE": app_url}
    assert (
        subprocess.run([sys.executable, "-c", APPLICATION], env=environment, check=False, timeout=LIMIT).returncode == 0
    )

    # When: they run
    site.start("saga")
    post.worker()
    until(lambda: site.one("select count(*) from outbox.saga where ended_at is not null") == 4, "all sagas have ended")

    # Then: the mails of those that completed came once, the others were deleted on hold and nobody has seen them
    post.drained()
    rows = site.admin.execute(
        "select g.state, t.result ->> 'token' from outbox.saga g join outbox.saga_step t on t.saga = g.id "
        "where t.step = 'letter' order by g.key"
    ).fetchall()
    assert [state for state, _ in rows] == ["completed", "compensated"] * 2
    post.tokens = [token for _, token in rows]
    until(lambda: sum(post.arrived()) >= 2, "the mails have come")
    assert post.arrived() == [1, 0, 1, 0]
