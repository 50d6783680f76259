"""`outbox work cron`: sends the messages of the schedules of the actors in OUTBOX_ACTORS, and runs none of them.

Called by `workers.cli.work`. For a site that has no workers for them, because its messages go to another broker:
workers send what is due themselves. Any number may run. Raises `NotReady` for what is missing.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from importlib.util import find_spec

from outbox.errors import NotReady
from outbox.settings import Settings


def run_schedules(state: str | None, stop: threading.Event) -> None:
    """Until `stop` is set."""
    settings = Settings.load(state, role="actor")
    if not settings.actors:
        raise NotReady("no actors are configured: name the modules with their schedules in OUTBOX_ACTORS")
    if find_spec("dramatiq") is None:
        raise NotReady("dramatiq is not installed: pip install 'postgres-outbox[dramatiq]'")
    import dramatiq  # noqa: PLC0415 - asked for above

    from outbox.actor import OutboxBroker  # noqa: PLC0415
    from workers.actor.timetable import Timetable  # noqa: PLC0415

    if state:
        os.environ["OUTBOX_STATE"] = state
    sys.path.append(os.getcwd())
    for module in settings.actors:
        try:
            import_module(module)
        except ImportError as error:
            raise NotReady(f"the module {module} can't be imported ({error}): correct OUTBOX_ACTORS") from error
    broker = dramatiq.get_broker()
    if not isinstance(broker, OutboxBroker):
        raise NotReady(
            "the modules in OUTBOX_ACTORS set no OutboxBroker: call dramatiq.set_broker() in the first of them"
        )
    timetable = Timetable(broker)
    timetable.start()
    stop.wait()
    timetable.stop()
    broker.close()
