"""`outbox work actors`: dramatiq's workers, for the modules in OUTBOX_ACTORS.

Called by `workers.cli.work`. This process becomes dramatiq's own command line (`python -m dramatiq`), which starts the
worker processes and stops them; supervisord sees one program. Raises `NotReady` without dramatiq.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec

from outbox.errors import NotReady
from outbox.settings import Settings
from workers.process import Stop

log = logging.getLogger("outbox.worker")

_PR_SET_PDEATHSIG = 1


def become_dramatiq(state: str | None, *, processes: int | None, threads: int | None) -> None:
    """Doesn't return, unless no actors are configured: then it waits to be stopped, and does nothing."""
    modules = Settings.load(state, role="actor").actors
    if not modules:
        log.warning("actors: none are configured: name their modules in OUTBOX_ACTORS")
        stop = Stop().install()
        while not stop.wait(1.0):
            pass
        return
    if find_spec("dramatiq") is None:
        raise NotReady("dramatiq is not installed: pip install 'postgres-outbox[dramatiq]'")
    environment = dict(os.environ)
    if state:
        environment["OUTBOX_STATE"] = state
    if mine := environment.get("OUTBOX_ACTOR_DATABASE"):
        # Its actors write as the application does: the user of the workers is a member of both roles.
        environment["OUTBOX_DATABASE"] = mine
    options = [("--processes", processes), ("--threads", threads)]
    words = [word for name, number in options if number is not None for word in (name, str(number))]
    if environment.get("SUPERVISOR_ENABLED"):
        _end_with_parent()
    os.execve(sys.executable, [sys.executable, "-m", "dramatiq", *modules, *words], environment)  # noqa: S606


def _end_with_parent() -> None:
    """SIGTERM when the supervisor is gone, so that nothing runs that nobody would start again. Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
