"""Scrub's look at a participant of one's own, through its `inventory`.

What is listed is compared with the log by key; by content, if the participant can say which digest an intent's content
has (`outbox.participant.Digested`), and otherwise by the id of the intent that wrote it, if it keeps that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from outbox.errors import NotReady
from outbox.intent import Intent
from outbox.participant import Digested, Participant
from outbox.position import Position
from workers.scrub.finding import Kind, Repair
from workers.scrub.pace import Pace
from workers.scrub.subject import Fault, Held


class OwnSubject:
    """A participant that can list what it holds."""

    advice = stray_advice = "see to it by hand: it has no key"

    def __init__(self, target: str, make: Callable[[], Participant]) -> None:
        """Makes the participant, and never opens a lane. Raises `NotReady` if it lists nothing."""
        self.target = target
        self._participant = make()
        if getattr(type(self._participant), "inventory", None) is Participant.inventory:
            raise NotReady(f"{target} can't list what it holds, so there is nothing to compare: write its inventory")

    def positions(self) -> dict[int, Position | None]:
        """Asked without a lane, it can't say."""
        return {}

    def held(self) -> Iterator[Held]:
        """What it lists."""
        for item in self._participant.inventory():
            yield Held(item.key, item.id, item.digest)

    def look(self, seen: Mapping[str, Sequence[Held]]) -> dict[str, list[Held]]:
        """Lists everything again."""
        found: dict[str, list[Held]] = {}
        for held in self.held():
            if held.key in seen:
                found.setdefault(held.key, []).append(held)
        return found

    def still(self, stray: Held) -> bool:
        """Look again."""
        return stray in self.held()

    def size(self, intent: Intent) -> int:
        """The log has it all."""
        return len(intent.body)

    def fault(self, intent: Intent, held: Held, pace: Pace) -> Fault | None:
        """Compare digests, or ids."""
        pace.spend(0, len(intent.body))
        if isinstance(self._participant, Digested):
            if self._participant.digest(intent) == held.place:
                return None
        elif held.id in (0, intent.id):
            return None
        if 0 < held.id < intent.id:
            return Fault("stale", f"what is held is of intent {held.id}, and {intent.id} came after it")
        return Fault("corrupt", f"what is held is not what intent {intent.id} says")

    def repair(self, kind: Kind) -> Repair:
        """As the log has it."""
        return "delete" if kind == "orphaned" else "put"

    def close(self) -> None:
        """Let go of the participant."""
        self._participant.close()
