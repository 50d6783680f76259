"""The subject of a scrub: what it asks of a participant, whichever that is.

`workers.scrub.index`, `workers.scrub.blob` and `workers.scrub.own` are subjects. A subject only looks: it takes no
lane and no fence, and its methods may be called while workers write.

They raise `Unavailable` and OSError when the participant can't be looked at, `NotThisLog` when it has seen another
history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from outbox.intent import Intent
from outbox.position import Position
from workers.scrub.finding import Kind, Repair
from workers.scrub.pace import Pace


class Held(NamedTuple):
    """One thing that a participant holds."""

    #: Empty if it can't be told: nothing then repairs it, but for `Subject.advice`.
    key: str
    #: The intent that wrote it; 0 if that isn't known.
    id: int
    #: Where it is, in the participant's own words.
    place: str
    #: What is wrong with it whatever the log says; empty if nothing is.
    fault: str = ""


class Fault(NamedTuple):
    """What is wrong with what is held, compared with its intent."""

    kind: Kind
    why: str


class Subject(Protocol):
    """A participant, as scrub sees it."""

    target: str
    #: What to do about a finding that no intent repairs.
    advice: str
    #: What to do about something without a key.
    stray_advice: str

    def positions(self) -> dict[int, Position | None]:
        """Where the participant itself says that it is, by lane; empty if it keeps no position."""

    def held(self) -> Iterator[Held]:
        """Everything, in no particular order."""

    def look(self, seen: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        """What is held under these keys now; newer than anything that this object has seen before. `seen` is what was
        found under each in the inventory: by that, things are looked at again that no key leads to."""

    def still(self, stray: Held) -> bool:
        """Whether something without a key is still there, and as it was."""

    def size(self, intent: Intent) -> int:
        """Bytes that `fault` reads for this intent beside what the log has, about."""

    def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
        """Compare what is held with its intent, as closely as can be. None if nothing is wrong."""

    def repair(self, kind: Kind) -> Repair:
        """Which intent repairs a finding of this kind with a key."""

    def close(self) -> None:
        """Let go of files and connections."""
