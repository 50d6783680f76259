"""Actors: messages of dramatiq on the log. Needs the extra `dramatiq`; `import outbox` doesn't load this package.

import dramatiq
from outbox.actor import OutboxBroker

broker = OutboxBroker(outbox)
dramatiq.set_broker(broker)
"""

from outbox.actor.broker import OutboxBroker
from outbox.actor.outcomes import Outcomes

__all__ = ["OutboxBroker", "Outcomes"]
