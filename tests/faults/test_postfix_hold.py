"""A thousand mails in two phases, through kills of everything: counted at the next hop."""

from __future__ import annotations

import pytest

from tests.fixtures.post import Post

pytestmark = pytest.mark.root


def test_hold_i2_i3_each_of_a_thousand_mails_arrives_once_under_30_kills_and_5_of_postfix(post: Post) -> None:
    # Given: thirty waves, in each of which the worker is killed, and in every sixth all of Postfix
    kills = 0

    def nemesis() -> None:
        nonlocal kills
        kills += 1
        post.relay.kill()
        post.relay.start()

    post.storm(waves=30, size=34, seed=11, every=6, nemesis=nemesis)
    assert kills == 5
    # When: a last worker finishes
    post.worker()
    post.drained()
    # Then: each mail came, and as one mail. Postfix's own second deliveries have the queue id of the first.
    assert post.arrived() == [1] * 1020
    again = len(post.sink.messages) - 1020
    print(f"delivered a second time by Postfix itself: {again}")
    assert again <= 100, "Postfix delivers again what it was delivering when it was killed, and no more"
