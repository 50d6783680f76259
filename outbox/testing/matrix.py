"""The crash matrix of a saga: for each step, everything that can go wrong with it.

    from outbox.testing import Stage, crash_matrix

    @pytest.mark.parametrize("case", crash_matrix(publish), ids=str)
    def test_publish(case, settings, tmp_path):
        case(Stage(settings, Folder("x"), {"index": lambda: IndexParticipant(tmp_path)}))

A case runs the saga once: the real definition, the real engine, a real Postgres (migrated, with no workers running)
and the participants that it is given, all in this process and under a virtual clock, so that no delay takes time.
At one step it lets something go wrong, and then asks whether the saga kept its promise: completed or compensated,
never both. That is seen at the effects themselves: what was done last to each step, its action or its
compensation. `Stage.check` can look further, at the participants' own content.

    fail before   the step is refused for good, before it had any effect
    fail after    the effect is made, and a failure is reported: it is tried again
    crash         the effect is made, and its worker dies before it records that
    time out      the step is not done in its time (steps with a timeout, and signals)
    cancel        somebody cancels while the step is under way
    engine        the engine dies after it has committed, and before its position is written

Raises `Broken` with what was found. Needs the package `workers`, found through the entry-point group
`outbox.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from outbox.participant import Participant
from outbox.saga.definition import Saga
from outbox.saga.plan import WAITS, Act, Kind
from outbox.settings import Settings


class Stage(NamedTuple):
    """What a saga is rehearsed on."""

    #: Its database is what everything connects as: a member of outbox_saga, with the application's rights.
    settings: Settings
    #: What the saga is started with.
    input: Any
    #: How to make each participant that the saga has steps for.
    participants: Mapping[str, Callable[[], Participant]] = {}
    #: Told how the saga ended (`completed`, `compensated`); raises if the application's own data don't agree.
    check: Callable[[str], None] | None = None


class Mishap(NamedTuple):
    """One case: what goes wrong, and at which step."""

    saga: Saga[Any]
    step: str
    what: str

    def __str__(self) -> str:
        return f"{self.step}-{self.what}".replace(" ", "-")

    def __call__(self, stage: Stage) -> str:
        """Rehearse it. → how the saga ended. Raises `Broken`."""
        (point,) = entry_points(group="outbox.testing", name="rehearsal")
        return str(point.load()(stage, self))


def crash_matrix(saga: Saga[Any]) -> list[Mishap]:
    """A case for everything that can go wrong with each step of `saga`. Raises `SagaRefused`."""
    cases = [Mishap(saga, "", "nothing")]
    for node in saga.plan.nodes:
        wrong = ["cancel", "engine"]
        if node.act not in WAITS:
            wrong.append("fail after")
            if node.kind is not Kind.RETRIABLE:
                wrong.append("fail before")
        if node.act in (Act.INTENT, Act.FUNCTION):
            wrong.append("crash")
        if node.timeout is not None and node.act is not Act.DELAY:
            wrong.append("time out")
        cases += [Mishap(saga, node.name, what) for what in sorted(wrong)]
    return cases
