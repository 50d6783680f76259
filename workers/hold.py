"""Postfix's HOLD queue: where mail is prepared that a later word releases or withdraws.

Used by `workers.heldmail` and `outbox doctor`. A message that came in by a port whose mail goes on hold is durable and
complete there, and nothing but `release` lets it go. It is found by its envelope sender, which names the intent
(`workers.envelope`), and from then on called by its queue id.

Postfix's own tools do the work: `postqueue -j` lists, `postsuper -H` releases, `postsuper -d` withdraws. The
last two need root, so the command is a setting (OUTBOX_POSTSUPER, such as `sudo -n /usr/sbin/postsuper`). It is called
with fixed arguments, the HOLD queue only, and queue ids on its standard input, each checked to be one.

What was released or withdrawn is durable when the call returns (the spool's file system is synced), and both can be
repeated: a queue id that isn't on hold is passed over. Queue ids must be the long ones, which Postfix never uses twice.

Every method raises `Unavailable` when Postfix or its tools don't answer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from outbox.errors import Ambiguous, NotReady, Unavailable
from outbox.failpoint import hit
from outbox.participant import Evidence
from workers.envelope import SENDER
from workers.evidence import Finding
from workers.smtp import SmtpSession

logger = logging.getLogger("outbox.mail")

QUEUE_ID = re.compile(r"[0-9A-Za-z]{10,64}")
"""A queue id, and nothing that could be an option or a path."""

PROBE = "probe@outbox.invalid"
"""Whom the message is for that shows that a port's mail goes on hold. Its domain can't exist (RFC 2606)."""

_PROBE_DATA = b"Subject: probe\r\n\r\nDoes mail that comes in here go on hold? This one is withdrawn at once.\r\n"

_LEFT_OVER = 3600
"""Seconds after which a probe on hold is nobody's: who made it died."""

_SUDOERS = "let this user run it, by a line in sudoers and OUTBOX_POSTSUPER"

Copies = dict[str, list[str]]
"""part of the recipients (`workers.envelope`) → queue ids on hold, oldest first. More than one: surplus copies."""


class HoldQueue:
    """The HOLD queue of one Postfix on this machine. Also the evidence of what was prepared (`MailEvidence`)."""

    #: What was released is not on hold any more, and that it was prepared is on record in the database.
    lasting = False

    def __init__(self, config_directory: Path, postsuper: str = "postsuper", *, settle: float = 1.0) -> None:
        """`postsuper` is the command as one would type it, without options."""
        self.config_directory = config_directory
        #: Seconds for which a message that isn't there is waited for. What comes later is a surplus copy that stays on
        #: hold: untidy, and no more than that.
        self.settle = settle
        self._command = shlex.split(postsuper)
        self._spool = ""

    @classmethod
    def named(cls, setting: str, postsuper: str) -> HoldQueue:
        """What OUTBOX_MAIL_EVIDENCE=hold:/etc/postfix names. Raises `NotReady`."""
        path = setting.partition(":")[2]
        if not path.startswith("/") or not (Path(path) / "main.cf").exists():
            raise NotReady(
                "OUTBOX_MAIL_EVIDENCE=hold: names no folder with a main.cf: name Postfix's configuration directory"
            )
        return cls(Path(path), postsuper)

    # ------------------------------------------------------------------------------- may it be relied on

    def check(self) -> None:
        """Whether the tools can be used and queue ids are never used twice."""
        if self._postconf("enable_long_queue_ids") != "yes":
            raise Unavailable(
                "Postfix uses short queue ids, again and again: set enable_long_queue_ids = yes in main.cf"
            )
        self._postsuper("-H", [])
        self.ids_for("")

    def prove(self, session: SmtpSession) -> None:
        """Whether mail handed over in `session` goes on hold: shown by a message that is withdrawn again."""
        try:
            taken = session.submit("", [PROBE], _PROBE_DATA)
        except Ambiguous as error:
            raise Unavailable(str(error)) from None
        if taken.queue_id is None:
            replies = sorted({str(reply) for reply in (taken.deferred | taken.refused).values()})
            raise Unavailable(
                f"the mail server refuses the probe for {PROBE} ({', '.join(replies)}), so that nothing shows whether "
                "its mail goes on hold: give the port in master.cf recipient restrictions of its own"
            )
        found = self.ids_for(PROBE)
        old = [queue_id for queue_id, at in found.items() if at < time.time() - _LEFT_OVER]
        held = taken.queue_id in found
        self.withdraw([taken.queue_id, *old] if held else old)
        if not held:
            raise Unavailable(
                "mail that is handed to OUTBOX_SMTP does not go on hold: give that port in master.cf the option "
                "smtpd_sender_restrictions=check_sender_access,static:HOLD, or name another port"
            )

    # ------------------------------------------------------------------------------------- what is there

    def held(self) -> dict[str, Copies]:
        """Everything of ours on hold, by token."""
        found: dict[str, Copies] = {}
        for message in self._listed():
            if match := SENDER.match(message["sender"]):
                found.setdefault(match["token"], {}).setdefault(match["part"], []).append(message["queue_id"])
        return found

    def recipient(self, token: str, part: str) -> str | None:
        """Found without."""

    def ours(self) -> dict[str, int]:
        """Queue ids on hold of mails of ours → when they came, in seconds since 1970."""
        listed = self._listed()
        return {each["queue_id"]: int(each["arrival_time"]) for each in listed if SENDER.match(each["sender"])}

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """What is on hold of each token. Exact, in the sense that counts: what isn't found here is never sent."""
        deadline = time.monotonic() + self.settle
        while True:
            found = self.held() if tokens else {}
            if time.monotonic() >= deadline or tokens.keys() <= found.keys():
                break
            time.sleep(min(0.1, self.settle))
        sent = {token: {part: ids[0] for part, ids in found.get(token, {}).items()} for token in tokens}
        return {
            token: Finding(Evidence.APPLIED if parts else Evidence.NOT_APPLIED, parts) for token, parts in sent.items()
        }

    def ids_for(self, recipient: str) -> dict[str, int]:
        """Queue ids on hold of messages for `recipient` → when they came, in seconds since 1970."""
        return {
            message["queue_id"]: int(message["arrival_time"])
            for message in self._listed()
            if any(each["address"] == recipient for each in message["recipients"])
        }

    def _listed(self) -> Iterator[dict[str, Any]]:
        try:
            lines = self._run("postqueue", "-c", str(self.config_directory), "-j").splitlines()
            messages = [json.loads(line) for line in lines]
            on_hold = [message for message in messages if message["queue_name"] == "hold"]
            return iter(sorted(on_hold, key=lambda message: (message["arrival_time"], message["queue_id"])))
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"what postqueue -j prints can't be read ({type(error).__name__})") from None

    # ------------------------------------------------------------------------------------ the second phase

    def release(self, queue_ids: Sequence[str]) -> None:
        """Let go of messages, and have Postfix deliver them now. Those that aren't on hold were released before."""
        self._postsuper("-H", queue_ids)
        hit("mail.released")
        self._sync()
        try:
            # Each by its id: `postqueue -f` would have all deferred mail of the host tried again.
            self._run(
                "xargs", "-r", "-n", "1", "-P", "2", "postqueue", "-c", str(self.config_directory), "-i",
                given=_lines(queue_ids),
            )  # fmt: skip
        except Unavailable as error:
            # They are released. Postfix's next look at its deferred mail (queue_run_delay) finds them.
            logger.warning("released mail was not delivered at once: %s", error)

    def withdraw(self, queue_ids: Sequence[str]) -> None:
        """Delete messages from the HOLD queue. Those that aren't there are passed over."""
        if queue_ids:
            self._postsuper("-d", queue_ids)
            self._sync()

    def _postsuper(self, option: str, queue_ids: Sequence[str]) -> None:
        command = [*self._command, "-c", str(self.config_directory), option, "-", "hold"]
        try:
            self._run(*command, given=_lines(queue_ids))
        except Unavailable as error:
            raise Unavailable(f"{error}: {_SUDOERS}") from None

    def _sync(self) -> None:
        self._spool = self._spool or self._postconf("queue_directory")
        self._run("sync", "-f", self._spool)

    def _postconf(self, name: str) -> str:
        return self._run("postconf", "-c", str(self.config_directory), "-h", name).strip()

    @staticmethod
    def _run(*command: str, given: str = "") -> str:
        # Debian keeps these in /usr/sbin, which the PATH of an ordinary user lacks.
        environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin", "LC_ALL": "C"}
        try:
            return subprocess.run(
                command, input=given, capture_output=True, check=True, timeout=60, env=environment, text=True,
                errors="replace",
            ).stdout  # fmt: skip
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{command[0]} failed with status {error.returncode}") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"{command[0]} can't be run ({type(error).__name__})") from None


def _lines(queue_ids: Iterable[str]) -> str:
    """For a command's standard input; only what is a queue id ever gets there."""
    checked = [queue_id for queue_id in dict.fromkeys(queue_ids) if QUEUE_ID.fullmatch(queue_id)]
    return "".join(f"{queue_id}\n" for queue_id in checked)
