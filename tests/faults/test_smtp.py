"""Every script of a mail server that doesn't behave, each against a lane of mails."""

from __future__ import annotations

import pytest

from tests.fixtures.hostile import BROKEN, LYING, MIXED, REFUSING, SLOW, MailLane, Script, play


@pytest.mark.parametrize("script", [*REFUSING, *MIXED, *BROKEN, *SLOW, *LYING], ids=lambda script: script.name)
def test_smtp_i2_i3_i10_everybody_has_it_once_and_the_lane_goes_on(mail_lane: MailLane, script: Script) -> None:
    play(mail_lane, script)
