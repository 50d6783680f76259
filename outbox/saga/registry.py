"""Which sagas are deployed: those that the modules named by `OUTBOX_SAGAS` define.

Called by the engine and by `outbox saga check`. Raises `NotReady` for a module that can't be imported, `SagaRefused`
for a definition that can't keep its promise.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from outbox.errors import NotReady, SagaRefused
from outbox.saga.definition import Saga

Definitions = dict[tuple[str, int], Saga[Any]]
"""(name, version) → definition."""


def deployed(modules: Sequence[str]) -> Definitions:
    """The definitions in `modules`, and in those of the entry-point group `outbox.sagas`."""
    named = [*modules, *(point.value for point in entry_points(group="outbox.sagas"))]
    if os.getcwd() not in sys.path:
        # As `python -m` has it: an application's modules are found from its own directory.
        sys.path.append(os.getcwd())
    found: Definitions = {}
    for name in named:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise NotReady(f"the module {name!r} of OUTBOX_SAGAS can't be imported ({error}): correct it") from error
        for value in vars(module).values():
            if isinstance(value, Saga):
                register(found, value)
    return found


def register(found: Definitions, saga: Saga[Any]) -> None:
    """Add one, and the children of it."""
    saga.check()
    known = found.setdefault((saga.name, saga.version), saga)
    if known is not saga:
        raise SagaRefused(f"there are two sagas {saga.name!r} of version {saga.version}: raise one's version")
    for step in saga.steps:
        if step.child is not None and (step.child.name, step.child.version) not in found:
            register(found, step.child)
