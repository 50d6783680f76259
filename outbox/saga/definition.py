"""The definition of a saga: what an application declares, and starts in its transactions.

    publish = Saga("publish", Folder)

    @publish.function                      # writes in the engine's transaction: once, with the step's outcome
    def reserve(session, run): ...

    @reserve.undo
    def release(session, run): ...

    @publish.intent                        # an intent for a participant
    def index(run): return run.index.put(run.input.path, title=run.input.title)

    @index.undo
    def unindex(run): return run.index.delete(run.input.path)

    @publish.mail(kind="pivot")            # from here on it only goes forward
    def announce(run): return run.mail.send(sender=…, to=…, subject=…, text=…)

    with Session.begin() as session:
        publish.start(session, Folder(…), key="folder/7")

Steps follow one another as they are declared; `after=` makes a graph of them. The linter (`outbox.saga.plan.lint`)
refuses a definition that can't keep the promise, when it is first used: when the engine loads it, when it is started,
or by `check()`.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast, overload
from uuid import NAMESPACE_URL, UUID, uuid5

from outbox.errors import SagaRefused
from outbox.saga.callee import refuse_arguments, refuse_async
from outbox.saga.form import form
from outbox.saga.plan import FOR_EVER, LONGEST, WAITS, Act, Kind, Node, Plan, Retry, lint
from outbox.saga.run import Action, Input, Run

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")

KindName = Literal["compensatable", "pivot", "retriable"]
FunctionOf = TypeVar("FunctionOf", bound=Callable[..., Any])
Function = Callable[["Session", Run[Input]], Any] | Callable[["AsyncSession", Run[Input]], Awaitable[Any]]
"""(session, run) → the step's result."""
Maker = Callable[[Run[Input]], Action]
"""(run) → what a maker of `run` made."""


class Options(TypedDict, total=False):
    """What can be said of each step that does something."""

    #: Instead of the function's name. `_` is written `-`.
    name: str
    #: The steps that must be done before: by default the one declared before; `()` for none.
    after: Step | str | Iterable[Step | str] | None
    #: compensatable (the default), pivot or retriable.
    kind: KindName
    retry: Retry
    #: Seconds from the step's begin, all tries together, after which it has failed.
    timeout: float
    #: Nobody can take it back: the linter keeps it at the pivot or after it. Of mail this is known.
    irreversible: bool


def new_id() -> UUID:
    """An id that nobody else has (a UUID of version 7, RFC 9562).

    It begins with the time in milliseconds, so that new sagas come to lie beside each other at the end of the indexes.
    With random ones each touches pages of its own: among a million kept sagas that is six times the WAL.
    """
    milliseconds = time.time_ns() // 1_000_000
    number = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0x2 << 62 | secrets.randbits(62)
    return UUID(int=number)


class Step:
    """A declared step. Decorate its compensation with `.undo`."""

    def __init__(self, node: Node, do: Callable[..., Any] | None = None, child: Saga[Any] | None = None) -> None:
        self.node = node
        self.do = do
        self.undo_function: Callable[..., Any] | None = None
        self.child = child

    @property
    def name(self) -> str:
        """What it is called in results, tables and commands."""
        return self.node.name

    def undo(self, function: FunctionOf) -> FunctionOf:
        """Declare the compensation: of the same form as the step; of a child: a function (session, run).

        It may be tried more than once, so it must not matter how often it succeeds.
        """
        if self.node.act in WAITS:
            raise SagaRefused(f"step {self.name!r} only waits: there is nothing to undo, remove its compensation")
        act = Act.FUNCTION if self.node.act is Act.CHILD else self.node.act
        refuse_async(self.name, act, function)
        refuse_arguments(self.name, act, function)
        self.node = dataclasses.replace(self.node, undo=act)
        self.undo_function = function
        return function


class Saga(Generic[Input]):
    """A declared saga. Make one for each version, once, in a module that applications and the engine import."""

    def __init__(
        self,
        name: str,
        input: type[Input],  # noqa: A002 - the word of this domain
        *,
        version: int = 1,
        locks: Callable[[Input], Iterable[str]] | None = None,
        lock_timeout: float = 3600.0,
        deadline: float | None = None,
    ) -> None:
        """`input` is a dataclass (of text, numbers, dates, enums, other dataclasses, …: `outbox.saga.form`), or `dict`
        for any JSON. What would not come back from JSON as it was is refused here.

        Raise `version` when you change the steps, or the input by more than a field with a default: those that run keep
        their version, whose definition stays deployed until `outbox saga check` says that none is open. `locks` names
        what no two sagas may work on at a time: all are taken before the first step, or waited for, `lock_timeout`
        seconds at most. `deadline`: seconds from its start after which it goes back, if it can still.
        """
        if not _NAME.fullmatch(name):
            raise SagaRefused(f"{name!r} is not a name: use lower-case letters, digits, _ and -")
        if type(version) is not int or not 0 < version < 2**31:
            raise SagaRefused(f"version of saga {name!r} is {version!r}: use 1, and one more for each change")
        for what, seconds in (("lock_timeout", lock_timeout), ("deadline", deadline)):
            if seconds is not None and not 0 < seconds <= LONGEST:
                raise SagaRefused(f"{what} of saga {name!r} is {seconds}: give it seconds, {LONGEST:g} at most")
        self.name = name
        self.version = version
        self.input = input
        self._form = form(input, f"the input of saga {name!r}")
        self.locks = locks
        self.lock_timeout = lock_timeout
        self.deadline = deadline
        self.steps: list[Step] = []
        self._held: list[Step] = []
        self._plan: Plan | None = None

    def __repr__(self) -> str:
        return f"<saga {self.name} version {self.version}>"

    # --------------------------------------------------------------------------------------- declaration

    def _add(
        self,
        act: Act,
        name: str,
        do: Callable[..., Any] | None,
        *,
        after: Step | str | Iterable[Step | str] | None,
        kind: KindName = "compensatable",
        retry: Retry | None = None,
        timeout: float | None = None,
        irreversible: bool = False,
        child: Saga[Any] | None = None,
    ) -> Step:
        refuse_async(name, act, do)
        known = {step.name: n for n, step in enumerate(self.steps)}
        name = name.replace("_", "-")
        if do is not None:
            refuse_arguments(name, act, do)
        if self._plan is not None:
            raise SagaRefused(f"saga {self.name!r} is in use: declare step {name!r} before it is started or loaded")
        if not _NAME.fullmatch(name.removesuffix(".release")) or name in known:
            raise SagaRefused(f"step {name!r} of saga {self.name!r} is not a name, or is there twice: rename it")
        if after is None:
            numbers: tuple[int, ...] = (len(self.steps) - 1,) if self.steps else ()
        else:
            names = [after] if isinstance(after, Step | str) else list(after)
            if foreign := [one.name for one in names if isinstance(one, Step) and one not in self.steps]:
                raise SagaRefused(f"step {name!r} comes after {foreign[0]!r} of another saga: name one of this saga")
            texts = [(one.name if isinstance(one, Step) else one).replace("_", "-") for one in names]
            if missing := [text for text in texts if text not in known]:
                raise SagaRefused(f"step {name!r} comes after {missing[0]!r}, which is not declared before it")
            numbers = tuple(sorted({known[text] for text in texts}))
        if timeout is not None and not isinstance(timeout, int | float):
            raise SagaRefused(f"the timeout of step {name!r} is {type(timeout).__name__}: give it seconds")
        if kind not in list(Kind):
            raise SagaRefused(f"step {name!r} is of the kind {kind!r}: use {', '.join(Kind)}")
        kind_ = Kind(kind)
        node = Node(
            name, act, kind_, numbers, None, retry or (FOR_EVER if kind_ is Kind.RETRIABLE else Retry()),
            retry if act is Act.INTENT and kind_ is not Kind.RETRIABLE else None, timeout, irreversible,
        )  # fmt: skip
        step = Step(node, do, child)
        self.steps.append(step)
        return step

    @overload
    def function(self, do: Function[Input], /) -> Step: ...
    @overload
    def function(self, /, **options: Unpack[Options]) -> Callable[[Function[Input]], Step]: ...
    def function(self, do: Function[Input] | None = None, /, **options: Unpack[Options]) -> Any:
        """A step that is a function (session, run): what it writes commits with the step's outcome, once.

        It runs in the engine's transaction: short work, on this database alone. An `async def` has an `AsyncSession`.
        What it returns (JSON, 64 KiB) is the step's result. `Permanent` fails the step; any other exception is tried
        again as `retry` says.
        """
        return self._declare(Act.FUNCTION, do, options)

    @overload
    def intent(self, do: Maker[Input], /) -> Step: ...
    @overload
    def intent(self, /, **options: Unpack[Options]) -> Callable[[Maker[Input]], Step]: ...
    def intent(self, do: Maker[Input] | None = None, /, **options: Unpack[Options]) -> Any:
        """A step that is an intent: a function (run) that returns what a maker of `run` made. It may be called again,
        and has no effect of its own."""
        return self._declare(Act.INTENT, do, options)

    @overload
    def mail(self, do: Maker[Input], /) -> Step: ...
    @overload
    def mail(self, /, *, held: bool = False, **options: Unpack[Options]) -> Callable[[Maker[Input]], Step]: ...
    def mail(self, do: Maker[Input] | None = None, /, *, held: bool = False, **options: Unpack[Options]) -> Any:
        """A step that is a mail: a function (run) that returns `run.mail.send(…)`.

        A mail can't be undone: it is the pivot, or comes after it. Unless it is `held`, where the mail server has a
        hold queue (OUTBOX_MAIL_EVIDENCE=hold:…): the mail is handed over where the step stands, and the plan has a
        step `NAME.release` after the pivot (or as the pivot, if there is none), which lets go of it. Undone, it is
        deleted on hold, and nobody has seen it.
        """
        if not held:
            return self._declare(Act.INTENT, do, options, irreversible=True)

        def declare(do: Maker[Input]) -> Step:
            def prepare(run: Run[Input]) -> Action:
                made = do(run)
                token = made.intent.payload["token"]
                # One key: they come in order.
                return Action(made.intent._replace(action="prepare", key=token), {**made.result, "token": token})

            prepare.__name__ = do.__name__
            step = cast(Step, self._declare(Act.INTENT, prepare, options))

            @step.undo
            def withdraw(run: Run[Input]) -> Action:
                return self._about_held(step, run, "withdraw")

            self._held.append(step)
            return step

        return declare if do is None else declare(do)

    @staticmethod
    def _about_held(step: Step, run: Run[Any], action: str) -> Action:
        token = run.results[step.name]["token"]
        return run.emit("mail", action, token, {"token": token})

    def _release(self) -> None:
        """Add the steps that let go of held mails."""
        for step in self._held:
            pivot = next((one for one in self.steps if one.node.kind is Kind.PIVOT), None)
            before = {n for one in self.steps for n in one.node.after}
            last = [one for n, one in enumerate(self.steps) if n not in before]
            self._add(
                Act.INTENT, f"{step.name}.release",
                partial(lambda step, run: self._about_held(step, run, "release"), step),
                after=last if pivot is None else [pivot, step], kind="retriable" if pivot else "pivot",
            )  # fmt: skip
        self._held = []

    def child(self, child: Saga[Any], **options: Unpack[Options]) -> Callable[[Callable[[Run[Input]], Any]], Step]:
        """A step that is another saga: a function (run) that returns its input. Done when that has completed, failed
        when that was compensated. Its compensation is a function (session, run)."""
        if not isinstance(child, Saga):
            raise SagaRefused(f"a child of saga {self.name!r} is {type(child).__name__}: give it a Saga")
        return cast(Callable[[Callable[[Run[Input]], Any]], Step], self._declare(Act.CHILD, None, options, child=child))

    def _declare(
        self, act: Act, do: Callable[..., Any] | None, options: Options, *, irreversible: bool = False,
        child: Saga[Any] | None = None,
    ) -> Any:  # fmt: skip
        def declare(do: Callable[..., Any]) -> Step:
            return self._add(
                act, options.get("name") or do.__name__, do, after=options.get("after"),
                kind=options.get("kind", "compensatable"), retry=options.get("retry"), timeout=options.get("timeout"),
                irreversible=options.get("irreversible", irreversible), child=child,
            )  # fmt: skip

        return declare if do is None else declare(do)

    def signal(
        self, name: str, *, timeout: float | None = None, after: Step | str | Iterable[Step | str] | None = None
    ) -> Step:
        """A step that waits for `outbox.signal(session, id, name, payload)`, whose payload is its result.

        If the signal refuses, or doesn't come within `timeout` seconds, the saga goes back.
        """
        return self._add(Act.SIGNAL, name, None, after=after, timeout=timeout)

    def delay(self, name: str, seconds: float, *, after: Step | str | Iterable[Step | str] | None = None) -> Step:
        """A step that waits `seconds`."""
        return self._add(Act.DELAY, name, None, after=after, timeout=seconds)

    # ------------------------------------------------------------------------------------------------ use

    @property
    def plan(self) -> Plan:
        """The steps as a value. Raises `SagaRefused` with everything that the linter found."""
        if self._plan is None:
            self._release()
            plan = Plan(
                self.name, self.version, tuple(step.node for step in self.steps), self._form.text, self.deadline
            )
            found = lint(plan)
            if self._starts_itself(self, ()):
                found.append("it starts itself again through its children, so it would never be done: remove that step")
            if found:
                raise SagaRefused(f"saga {self.name!r} can't keep its promise: " + "; ".join(found))
            self._plan = plan
        return self._plan

    @staticmethod
    def _starts_itself(saga: Saga[Any], above: tuple[Saga[Any], ...]) -> bool:
        return saga in above or any(
            Saga._starts_itself(step.child, (*above, saga)) for step in saga.steps if step.child is not None
        )

    def check(self) -> None:
        """Raises `SagaRefused` if the linter finds anything. For a test, or at the end of the module."""
        _ = self.plan

    def read(self, data: Any) -> Input:
        """`data` (JSON) as this saga's input. Raises `SagaRefused` if it is of another form."""
        return cast(Input, self._form.read(data, f"the input of saga {self.name!r}"))

    def written(self, value: Input) -> Any:
        """`value` as JSON. Raises `SagaRefused` if it would not come back as it is."""
        return self._form.write(value, f"the input of saga {self.name!r}")

    def payload(self, value: Input, key: str | None = None) -> dict[str, Any]:
        """The payload of the intent that starts this saga."""
        if isinstance(self.input, type) and not isinstance(value, self.input):
            raise SagaRefused(
                f"saga {self.name!r} is started with {type(value).__name__}: give it {self.input.__name__}"
            )
        _ = self.plan
        made: dict[str, Any] = {"name": self.name, "version": self.version, "input": self.written(value)}
        if key is not None:
            made["key"] = key
        return made

    def id_of(self, key: str) -> UUID:
        """The id of the saga of this name that was, or will be, started with `key`."""
        return uuid5(NAMESPACE_URL, f"outbox:saga:{self.name}:{key}")

    def start(self, session: Session, input: Input, *, key: str | None = None) -> UUID:  # noqa: A002 - as above
        """Start a run when the session's transaction commits, or not at all. → its id.

        `key` makes it idempotent: another start of this name with the same key, whenever it comes, is the same saga.
        Raises `IntentRefused` and `SagaRefused`.
        """
        from outbox.session import Outbox  # noqa: PLC0415 - a definition needs no SQLAlchemy

        saga = new_id() if key is None else self.id_of(key)
        Outbox.of(session).emit(session, "saga", "start", str(saga), self.payload(input, key))
        return saga

    @staticmethod
    def state(session: Session, saga: UUID) -> str | None:
        """Where a run is (`running`, `completed`, `compensated`, `stuck`, …); None before the engine knows of it."""
        import sqlalchemy as sa  # noqa: PLC0415 - as above

        found = session.execute(sa.text("select outbox.saga_state(:saga)"), {"saga": saga}).scalar()
        return None if found is None else str(found)
