"""What `outbox doctor` asks of the mail server, by the mode that OUTBOX_MAIL_EVIDENCE chooses."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from outbox.errors import Unavailable
from outbox.intent import PAYLOAD_LIMIT
from outbox.plural import counted
from outbox.settings import Settings
from workers.doctor import Findings
from workers.evidence import PostfixEvidence, evidence_for
from workers.hold import HoldQueue
from workers.relay import Relay
from workers.smtp import SmtpSession

_SOUND = (3, 5)
"""The oldest Postfix whose `postqueue -j` and log are as they are read here (tested with 3.7)."""

_TRACE = 4096
"""Bytes that servers add to a message on its way (Received)."""


def mail(settings: Settings) -> Findings:
    """The server, its answers about doubts, and what the chosen mode needs."""
    mode = settings.mail_evidence.partition(":")[0]
    session = SmtpSession(Relay.of(settings), "doctor.outbox.invalid", timeout=10.0)
    try:
        session.connect()
        yield "server", True, "answers", ""
        if mode in ("postfix", "hold"):
            directory = Path(settings.mail_evidence.partition(":")[2])
            hold = HoldQueue.named(f"hold:{directory}", settings.postsuper)
            yield from _postfix(directory)
            if mode == "hold":
                yield from _hold(hold, session)
            else:
                yield from _log(directory)
        else:
            evidence_for(settings.mail_evidence, settings).check()
            found = {"maildir": "the Maildir", "receipt": "a receipt came back"}.get(mode)
            yield "evidence", True, found or "none: each mail's in_doubt decides", ""
    finally:
        session.close()
    if mode in ("postfix", "hold", "receipt"):
        known = not settings.mail_domain.endswith(".invalid")
        yield "domain", known, settings.mail_domain, "set OUTBOX_MAIL_DOMAIN: bounces go there"


def _postfix(directory: Path) -> Findings:
    version = _postconf(directory, "mail_version")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    yield "version", numbers >= _SOUND, f"Postfix {version}", "upgrade Postfix to 3.5 or later"
    limit = int(_postconf(directory, "message_size_limit") or 0)
    enough = limit == 0 or limit >= PAYLOAD_LIMIT + _TRACE
    advice = f"set message_size_limit in main.cf to at least {PAYLOAD_LIMIT + _TRACE}, or mails end as poison"
    yield "message_size_limit", enough, str(limit), advice
    bare = _postconf(directory, "smtpd_forbid_bare_newline")
    advice = "set smtpd_forbid_bare_newline = normalize in main.cf (3.7: yes): others can smuggle mail in else"
    yield "smtpd_forbid_bare_newline", bare not in ("", "no"), bare or "not known to this Postfix", advice
    long = _postconf(directory, "enable_long_queue_ids")
    yield "enable_long_queue_ids", long == "yes", long, "set enable_long_queue_ids = yes in main.cf"


def _log(directory: Path) -> Findings:
    try:
        PostfixEvidence(directory).check()
        yield "log", True, "readable", ""
    except Unavailable as error:
        what, _, advice = str(error).partition(": ")
        yield "log", False, what, advice


def _hold(hold: HoldQueue, session: SmtpSession) -> Findings:
    try:
        hold.check()
        yield "postsuper", True, "postsuper and postqueue can be run", ""
        hold.prove(session)
        yield "hold", True, "a probe went on hold, and was withdrawn", ""
    except Unavailable as error:
        what, _, advice = str(error).partition(": ")
        yield "hold", False, what, advice
        return
    ages = [time.time() - at for at in hold.ours().values()]
    found = (
        f"{counted(len(ages), 'mail')} on hold, the oldest for {max(ages) / 3600:.1f} h" if ages else "nothing on hold"
    )
    yield "waiting", True, found, ""


def _postconf(directory: Path, name: str) -> str:
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin", "LC_ALL": "C"}
    done = subprocess.run(
        ["postconf", "-c", str(directory), "-h", name],
        capture_output=True, check=False, timeout=60, env=environment, text=True,
    )  # fmt: skip
    return done.stdout.strip()
