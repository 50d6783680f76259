"""The sagas that are measured, each of three steps. Named by OUTBOX_SAGAS where the engine is a process of its own."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import Saga
from outbox.saga.run import Action, Run
from tests.bench.noop import TARGET

STEPS = ("one", "two", "three")

Input = dict[str, int]


def _undo(_session: Session, _run: Run[Any]) -> None:
    """Nothing is to be undone: these never fail."""


def _nothing(_session: Session, _run: Run[Any]) -> None:
    """What a step does when only the engine is measured."""


def _row(session: Session, run: Run[Any]) -> None:
    session.execute(sa.text("insert into effect (saga) values (:saga)"), {"saga": run.id})


def _intent(run: Run[Any]) -> Action:
    return run.emit(TARGET, "put", str(run.id), {})


three: Saga[Input] = Saga("three", dict)
writing: Saga[Input] = Saga("writing", dict)
sending: Saga[Input] = Saga("sending", dict)
for _step in STEPS:
    three.function(name=_step)(_nothing).undo(_undo)
    writing.function(name=_step)(_row).undo(_undo)
    sending.intent(name=_step)(_intent).undo(_intent)
