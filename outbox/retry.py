"""When to try again: exponential backoff with full jitter.

After "Exponential Backoff And Jitter" (M. Brooker, AWS Architecture Blog, 2015): a random time between
nothing and the doubled limit spreads the retries of many best.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waiting times in seconds. `attempt` counts from 1."""

    first: float = 1.0
    limit: float = 3600.0
    #: After so many tries an intent is poison: about a day with the defaults.
    attempts: int = 60
    _random: random.Random = field(default_factory=random.Random, repr=False, compare=False)

    def wait(self, attempt: int, asked: float | None = None) -> float:
        """Seconds before the next try. `asked` is what the participant wished (Retry-After): never earlier."""
        ceiling = min(self.limit, self.first * 2 ** min(attempt - 1, 32))
        # At least a tenth, so that a retry is never at once.
        drawn = self._random.uniform(ceiling / 10, ceiling)
        return drawn if asked is None else max(asked, drawn)

    @property
    def text(self) -> str:
        """As it travels in a header of an intent."""
        return f"{self.first}/{self.limit}/{self.attempts}"

    @classmethod
    def read(cls, text: str) -> Backoff:
        """The one whose `text` this is."""
        first, limit, attempts = text.split("/")
        return cls(float(first), float(limit), int(attempts))


#: For a participant or a database that is down: the lane looks again soon, for ever.
OUTAGE = Backoff(first=0.2, limit=15.0)
