"""Evidence: whether a mail server has taken a message whose reply was lost.

Used by `workers.mail`, chosen by the setting OUTBOX_MAIL_EVIDENCE. Nothing here makes an effect. A message is
looked for by its envelope sender, which names the intent (`workers.envelope`): servers log the Message-ID before
a message is safe, and the sender after.

What is *not* found counts only when it can't turn up later. So the caller first opens a new session with the
server, which proves that it is up and that the old connection, whose process or socket is gone, is no longer
answered. What else it takes depends on the server:

* the embedded one (`MaildirEvidence`) answers a new session's EHLO only when the older session of that lane is
  over with all it wrote: a look into the Maildir is then exact.
* Postfix (`PostfixEvidence`) gives no such sign. It is asked again after a settle time.
* any other that brings receipts back is asked by `workers.witness`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from outbox.errors import NotReady, Unavailable
from outbox.participant import Evidence
from outbox.settings import Settings
from workers.envelope import SENDER, WHOLE
from workers.postmark import ReceiptAddress
from workers.relay import Relay

logger = logging.getLogger("outbox.mail")

_CLOCKS = timedelta(seconds=60)
"""How far the database's clock and this machine's may be apart."""

_SENDER = re.compile(SENDER.pattern.encode("ascii"))
_LOGGED = re.compile(rb"/qmgr\[\d+\]: (?P<queue_id>[0-9A-Za-z]+): from=<" + SENDER.pattern.encode("ascii"))

Sent = dict[str, dict[str, str]]
"""token → part of the recipients (`workers.envelope`) → the server's queue id."""


class Finding(NamedTuple):
    """What is known of one token. APPLIED and NOT_APPLIED: `sent` is all that was taken. UNKNOWN: it may not be."""

    evidence: Evidence
    sent: Mapping[str, str]


class MailEvidence(Protocol):
    """A way to find out what a mail server has taken."""

    #: Whether what was taken is found for as long as the server keeps it, whatever our database has forgotten.
    lasting: bool

    def check(self) -> None:
        """Raise `Unavailable` if nothing could be found out."""

    def recipient(self, token: str, part: str) -> str | None:
        """One more recipient of a message, by which it can be found later; None if it needs none."""

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """A finding for each token, given the time at which its first attempt in doubt was opened.

        To be called after a new session with the server was opened. May take some seconds.
        """


def evidence_for(setting: str, settings: Settings | None = None) -> MailEvidence:
    """The evidence that OUTBOX_MAIL_EVIDENCE names: `maildir:/path`, `postfix:/etc/postfix`, `none`; and, with the
    settings by which its mails come back, `receipt:ADDRESS`. Raises `NotReady`."""
    kind, _, path = setting.partition(":")
    if setting == "none":
        return NoEvidence()
    if kind == "receipt" and settings is not None:
        from workers.witness import Witness  # noqa: PLC0415 - it builds on this module

        return Witness(ReceiptAddress.read(path), Relay.of(settings), settings.database, settings.mail_domain)
    if kind == "maildir" and path.startswith("/"):
        return MaildirEvidence(Path(path))
    if kind == "postfix" and path.startswith("/"):
        if not (Path(path) / "main.cf").exists():
            raise NotReady(f"OUTBOX_MAIL_EVIDENCE: {path} has no main.cf: name Postfix's configuration directory")
        return PostfixEvidence(Path(path))
    raise NotReady(
        "OUTBOX_MAIL_EVIDENCE is not understood: "
        "write maildir:/path, postfix:/etc/postfix, hold:/etc/postfix, receipt:receipt@example.org, or none"
    )


class NoEvidence:
    """A server that can't be asked, such as a remote relay: the message's policy decides."""

    lasting = False

    def check(self) -> None:
        """Nothing is promised."""

    def recipient(self, token: str, part: str) -> str | None:
        """Nobody is asked."""

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """Nothing is known."""
        return dict.fromkeys(tokens, Finding(Evidence.UNKNOWN, {}))


class MaildirEvidence:
    """The Maildir of the embedded server. A message deleted from it within the minute of its arrival is missed."""

    lasting = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """A Maildir that isn't there yet is an empty one."""

    def recipient(self, token: str, part: str) -> str | None:
        """Found without."""

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """Exact, if the caller's session is of the lane that the attempts were made in."""
        sent: Sent = {token: {} for token in tokens}
        if not tokens:
            return {}
        since = (min(tokens.values()) - _CLOCKS).timestamp()
        try:
            # A message moves from new to cur: looked at in this order, it can't slip past.
            for folder in ("new", "cur"):
                for entry in os.scandir(self.path / folder):
                    _note(sent, self._return_path(entry, since), entry.name.split(".")[1:2])
        except OSError as error:
            logger.warning("the Maildir can't be read (%s): is OUTBOX_MAIL_EVIDENCE right?", type(error).__name__)
            return {token: Finding(Evidence.UNKNOWN, parts) for token, parts in sent.items()}
        return {token: _finding(parts) for token, parts in sent.items()}

    @staticmethod
    def _return_path(entry: os.DirEntry[str], since: float) -> re.Match[bytes] | None:
        try:
            if entry.stat().st_mtime < since:
                return None
            with open(entry.path, "rb") as file:
                first = file.readline(1024)
        except FileNotFoundError:
            return None  # moved to cur, or deleted
        return _SENDER.search(first) if first.startswith(b"Return-Path:") else None


class PostfixEvidence:
    """Postfix's queue (`postqueue -j`), and what its queue manager logged as it took messages over.

    Needs the right to read the log. Not seen: what was logged into a file that has since been compressed or
    removed. Then, and whenever the log doesn't reach back to the attempt, the finding is UNKNOWN.
    """

    lasting = True

    def __init__(self, config_directory: Path, *, log: Path | None = None, settle: float = 5.0) -> None:
        self.config_directory = config_directory
        #: Seconds after which what a dead connection had handed over is in the queue or never will be.
        self.settle = settle
        self._log = log

    def recipient(self, token: str, part: str) -> str | None:
        """Found without."""

    def look(self, tokens: Mapping[str, datetime]) -> Mapping[str, Finding]:
        """Takes `settle` seconds if there is a token that isn't found."""
        sent: Sent = {token: {} for token in tokens}
        # From now, not from the attempt: the old connection died at some time before now.
        deadline = time.monotonic() + self.settle
        while True:
            begun = time.monotonic()
            # The queue first: what leaves it meanwhile was logged before, and is found in the log.
            known = self._look_into_queue(sent) & self._look_into_log(sent, min(tokens.values(), default=None))
            if begun >= deadline or all(WHOLE in parts for parts in sent.values()):
                break
            time.sleep(min(1.0, deadline - time.monotonic()) if begun < deadline else 0)
        return {
            token: _finding(parts) if known or WHOLE in parts else Finding(Evidence.UNKNOWN, parts)
            for token, parts in sent.items()
        }

    def _look_into_queue(self, sent: Sent) -> bool:
        try:
            listed = self.run("postqueue", "-c", str(self.config_directory), "-j")
            for line in listed.splitlines():
                message = json.loads(line)
                _note(sent, _SENDER.match(message["sender"].encode()), [message["queue_id"]])
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            logger.warning("Postfix's queue can't be read (%s): may this user run postqueue?", type(error).__name__)
            return False
        return True

    def _look_into_log(self, sent: Sent, since: datetime | None) -> bool:
        """→ whether the log reaches back to `since`."""
        oldest: datetime | None = None
        try:
            log = self._log or self.find_log()
            # Newest first: a file that is renamed in between is read twice, never missed.
            for path in (log, log.with_name(log.name + ".1")):
                if path != log and not path.exists():
                    continue
                with open(path, "rb") as file:
                    first = file.readline()
                    oldest = log_time(first) or oldest
                    for line in _chain(first, file):
                        if b"from=<b+" in line and (match := _LOGGED.search(line)):
                            _note(sent, match, [match["queue_id"].decode("ascii")])
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("Postfix's log can't be read (%s): add this user to its group", type(error).__name__)
            return False
        return since is None or (oldest is not None and oldest <= since)

    def check(self) -> None:
        """Raise `Unavailable` when nothing could be decided: better known before a mail is sent than after."""
        try:
            with open(self._log or self.find_log(), "rb"):
                pass
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(
                f"Postfix's log can't be read ({type(error).__name__}), so that no attempt in doubt could be decided: "
                "set maillog_file in main.cf (or install rsyslog) and let this user read it, or set "
                "OUTBOX_MAIL_EVIDENCE=none"
            ) from error

    def find_log(self) -> Path:
        """Where Postfix logs. Raises OSError, `subprocess.SubprocessError`."""
        configured = self.run("postconf", "-c", str(self.config_directory), "-h", "maillog_file").strip()
        self._log = Path(configured or "/var/log/mail.log")
        return self._log

    @staticmethod
    def run(*command: str) -> str:
        """What one of Postfix's tools prints. Raises OSError, `subprocess.SubprocessError`."""
        # Debian keeps these in /usr/sbin, which the PATH of an ordinary user lacks.
        environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin", "LC_ALL": "C"}
        return subprocess.run(
            command, capture_output=True, check=True, timeout=60, env=environment, text=True, errors="replace"
        ).stdout


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_SYSLOG = re.compile(r"(?P<month>[A-Z][a-z]{2}) +(?P<day>\d+) (?P<time>\d\d:\d\d:\d\d) ")


def log_time(line: bytes, now: datetime | None = None) -> datetime | None:
    """When a line of a log was written, in ISO form or in syslog's old one (no year, local time); or None."""
    text = line[:64].decode("ascii", "replace")
    now = now or datetime.now(UTC)
    try:
        return datetime.fromisoformat(text.split(" ")[0]).astimezone()
    except ValueError:
        match = _SYSLOG.match(text)
    if match is None or match["month"] not in _MONTHS:
        return None
    month = _MONTHS.index(match["month"]) + 1
    for year in (now.year, now.year - 1):
        try:
            found = datetime.fromisoformat(f"{year}-{month:02}-{int(match['day']):02}T{match['time']}").astimezone()
        except ValueError:
            continue
        if found <= now + timedelta(days=1):
            return found
    return None


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _note(sent: Sent, match: re.Match[bytes] | None, queue_id: list[str]) -> None:
    if match is not None and (parts := sent.get(match["token"].decode("ascii"))) is not None:
        parts.setdefault(match["part"].decode("ascii"), queue_id[0] if queue_id else "")


def _finding(parts: Mapping[str, str]) -> Finding:
    return Finding(Evidence.APPLIED if parts else Evidence.NOT_APPLIED, parts)
