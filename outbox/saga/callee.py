"""What a step calls: an application's function, looked at where it is declared.

Called by `outbox.saga.definition`. Raises `SagaRefused` for what the engine could not call, which it would find out try
after try.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from outbox.errors import SagaRefused
from outbox.saga.plan import Act


def refuse_async(name: str, act: Act, function: object) -> None:
    if not inspect.iscoroutinefunction(function):
        return
    if act is not Act.FUNCTION:
        raise SagaRefused(
            f"step {name!r} is async, and to make an intent or an input waits for nothing: use a plain def"
        )
    if find_spec("greenlet") is None:
        raise SagaRefused(f"step {name!r} is async, which needs greenlet: pip install 'postgres-outbox[asyncio]'")


def refuse_arguments(name: str, act: Act, function: Callable[..., Any]) -> None:
    given = ("session", "run") if act is Act.FUNCTION else ("run",)
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        raise SagaRefused(f"what step {name!r} calls does not take ({', '.join(given)}): let it take that") from None
    except ValueError:
        return  # of some functions written in C nobody knows what they take
