"""The reply to COMMIT is lost on the network: the application finds out what became of its transaction."""

from __future__ import annotations

from typing import Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker

from outbox import Outbox, Settings
from tests.fixtures.proxy import Proxy
from tests.fixtures.site import LIMIT, Site, until


@pytest.mark.parametrize(("cut", "committed"), [("before", False), ("after", True)])
def test_commit_i1_i2_is_told_right_when_its_reply_is_lost(
    site: Site, proxy: Proxy, database: str, cut: Literal["before", "after"], committed: bool
) -> None:
    # Given: an application behind a network that breaks with its COMMIT, before or after that arrives
    settings = Settings(proxy.url("app", database), site.home / "index", site.home / "blobs", "smtp://127.0.0.1:1")
    engine = sa.create_engine(settings.sqlalchemy_url)
    sessions = sessionmaker(engine)
    outbox = Outbox(sessions, settings)
    session = sessions()
    outbox.index.put(session, "k", text="text")
    session.flush()
    proxy.cut_commit(cut)

    # When
    with pytest.raises(sa.exc.OperationalError):
        session.commit()
    token = outbox.token(session)
    session.close()
    assert token is not None
    assert proxy.has_cut

    # Then: the answer is right, and so is what the index shows
    with sessions() as another:
        until(lambda: outbox.committed(another, token) is not None, "the server has noticed")
        assert outbox.committed(another, token) is committed
    engine.dispose()
    site.start("clock")
    site.emit("end")
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    assert site.documents() == (["end", "k"] if committed else ["end"])
