"""Actors: messages of dramatiq on the log. Needs the extra `dramatiq`; `import outbox` doesn't load this package.

import dramatiq
from outbox.actor import OutboxBroker

broker = OutboxBroker(outbox)
dramatiq.set_broker(broker)
"""

from outbox.actor.broker import OutboxBroker
from outbox.actor.cron import Cron
from outbox.actor.limits import OutboxLimits
from outbox.actor.outcomes import Outcomes
from outbox.actor.results import OutboxResults
from outbox.actor.unique import Duplicate

__all__ = ["Cron", "Duplicate", "OutboxBroker", "OutboxLimits", "OutboxResults", "Outcomes"]
