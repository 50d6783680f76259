"""The form of a saga's input: how a value becomes JSON, and the JSON the same value again.

Made by `outbox.saga.definition` when a saga is declared, from the annotations of its input. What JSON can't bring back
as it was is refused there, with the place and the reason, and not found out by a step at night. Pure; nothing here
knows a database.

Raises `SagaRefused`: for an annotation that has no form, for a value that is not of its annotation, and for JSON that
is not of this form. The text names the place, and never quotes a value.
"""

from __future__ import annotations

import base64
import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple, NewType, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from outbox.errors import SagaRefused

_MICROSECOND = timedelta(microseconds=1)


class Form(NamedTuple):
    """Both ways between a value and JSON."""

    #: What the JSON looks like: the same for two annotations whose JSON each of them can read.
    text: str
    #: (value, place) → JSON.
    write: Callable[[Any, str], Any]
    #: (JSON, place) → value.
    read: Callable[[Any, str], Any]


def form(annotation: Any, place: str) -> Form:
    """The form of what is annotated so; `place` is its name in messages."""
    return _form(annotation, place, ())


def _form(annotation: Any, place: str, within: tuple[Any, ...]) -> Form:
    while isinstance(annotation, NewType) or get_origin(annotation) is Annotated:
        annotation = getattr(annotation, "__supertype__", None) or get_args(annotation)[0]
    found = _simple(annotation, place) or _composed(annotation, place, within)
    if found is None:
        name = annotation if isinstance(annotation, str | ForwardRef) else getattr(annotation, "__name__", annotation)
        raise SagaRefused(
            f"{place} is declared as {name}, and a saga's input would not come back from JSON as that: use text, "
            "numbers, booleans, dates and times, Decimal, UUID, bytes, enums, dataclasses, and lists, tuples, sets and "
            "dicts of them"
        )
    return found


def _simple(annotation: Any, place: str) -> Form | None:
    """The form of what has no parts."""
    if annotation in (Any, object):
        return Form("any", _plain, lambda data, _place: data)
    if annotation is None or annotation in _SCALARS:
        return _scalar(type(None) if annotation is None else annotation)
    if annotation in _TEXTS:
        return _text(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _enum(annotation, place)
    if get_origin(annotation) is Literal:
        return _literal(get_args(annotation), place)
    return None


def _composed(annotation: Any, place: str, within: tuple[Any, ...]) -> Form | None:
    """The form of what has parts."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union(arguments, place, within)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, place, within)
    kind = origin or annotation
    if kind in _MAPPINGS:
        return _mapping(arguments, place, within)
    if kind in _ROWS:
        return _row(_ROWS[kind], arguments, place, within)
    return None


def _wrong(value: Any, place: str, wanted: str) -> SagaRefused:
    return SagaRefused(f"{place} is {type(value).__name__} and declared as {wanted}: correct one of them")


# --------------------------------------------------------------------------------------------- plain JSON

_SCALARS: tuple[type, ...] = (str, int, float, bool, type(None))


def _scalar(kind: type) -> Form:
    def same(value: Any, place: str) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise _wrong(value, place, kind.__name__)

    return Form(kind.__name__, same, same)


def _plain(value: Any, place: str) -> Any:
    """Any JSON, which must be plain: a tuple would come back as a list, a number as a key as text."""
    if type(value) in _SCALARS:
        return value
    if type(value) is list:
        return [_plain(one, f"{place}[]") for one in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(one, f"{place}[{key!r}]") for key, one in value.items()}
    raise SagaRefused(
        f"{place} is {type(value).__name__}{' with keys that are not text' if type(value) is dict else ''}, which "
        "would not come back from JSON as it is: use text, numbers, booleans, None, lists and dicts, or declare the "
        "saga's input as a dataclass"
    )


# ------------------------------------------------------------------------------------- what is kept as text

_TEXTS: dict[Any, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (lambda value: str(value // _MICROSECOND), lambda text: int(text) * _MICROSECOND),
    Decimal: (str, Decimal),
    UUID: (str, UUID),
    bytes: (lambda value: base64.b64encode(value).decode(), lambda text: base64.b64decode(text, validate=True)),
}


def _text(kind: type) -> Form:
    put, get = _TEXTS[kind]

    def write(value: Any, place: str) -> Any:
        # A datetime is a date too, and would come back as one.
        if type(value) is not kind:
            raise _wrong(value, place, kind.__name__)
        return put(value)

    def read(value: Any, place: str) -> Any:
        try:
            if type(value) is str:
                return get(value)
        except (ValueError, ArithmeticError):
            pass
        raise SagaRefused(f"{place} is no {kind.__name__}: correct what starts the saga")

    return Form(kind.__name__, write, read)


def _enum(kind: type[Enum], place: str) -> Form:
    if not all(type(one.value) in (str, int) for one in kind):
        raise SagaRefused(f"{place} is an enum whose values are not all text or whole numbers: give it such values")

    def write(value: Any, place: str) -> Any:
        if not isinstance(value, kind):
            raise _wrong(value, place, kind.__name__)
        return value.value

    def read(value: Any, place: str) -> Any:
        try:
            return kind(value)
        except ValueError:
            raise SagaRefused(
                f"{place} has a value that {kind.__name__} doesn't have: deploy an enum that has"
            ) from None

    # Not the values: one more of them changes nothing for sagas that run.
    return Form("enum", write, read)


def _literal(values: tuple[Any, ...], place: str) -> Form:
    if not all(type(one) in _SCALARS for one in values):
        raise SagaRefused(f"{place} is a Literal of what is not plain JSON: use text, whole numbers and booleans")

    def same(value: Any, place: str) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise SagaRefused(f"{place} has a value that its Literal doesn't have: correct one of them")
        return value

    return Form("literal", same, same)


def _union(kinds: Sequence[Any], place: str, within: tuple[Any, ...]) -> Form:
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        one = _form(others[0], place, within)
        if one.text.endswith("?") or one.text == "any":
            return one
        return Form(
            f"{one.text}?",
            lambda value, place: None if value is None else one.write(value, place),
            lambda value, place: None if value is None else one.read(value, place),
        )
    if not all(kind in _SCALARS for kind in kinds):
        raise SagaRefused(
            f"{place} is a union whose parts can't be told apart in JSON: use None with one type, a union of text, "
            "numbers and booleans, or a field for each"
        )

    def same(value: Any, place: str) -> Any:
        if type(value) not in kinds:
            raise _wrong(value, place, " | ".join(kind.__name__ for kind in kinds))
        return value

    return Form("|".join(sorted(kind.__name__ for kind in kinds)), same, same)


# ---------------------------------------------------------------------------------------- what has parts

_MAPPINGS = (dict, Mapping, MutableMapping)
_ROWS: dict[Any, Callable[[Any], Any]] = {
    list: list, Sequence: list, MutableSequence: list, tuple: tuple, set: set, frozenset: frozenset,
}  # fmt: skip


def _mapping(arguments: tuple[Any, ...], place: str, within: tuple[Any, ...]) -> Form:
    key, value = arguments or (str, Any)
    if key is not str:
        raise SagaRefused(f"{place} is a dict whose keys are not str, and JSON has no others: use str, or a list")
    part = _form(value, f"{place}[…]", within)

    def each(way: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def go(value: Any, place: str) -> Any:
            if type(value) is not dict or not all(type(key) is str for key in value):
                raise _wrong(value, place, "dict with text as keys")
            return {key: way(one, f"{place}[{key!r}]") for key, one in value.items()}

        return go

    return Form(f"dict[{part.text}]", each(part.write), each(part.read))


def _row(kind: Callable[[Any], Any], arguments: tuple[Any, ...], place: str, within: tuple[Any, ...]) -> Form:
    fixed = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
    parts = [_form(one, f"{place}[]", within) for one in (arguments if fixed else (arguments or (Any,))[:1])]

    def check(value: Any, wanted: Any, place: str) -> None:
        if type(value) is not wanted or (fixed and len(value) != len(parts)):
            raise _wrong(value, place, f"{wanted.__name__} of {len(parts)}" if fixed else wanted.__name__)

    def write(value: Any, place: str) -> Any:
        check(value, kind, place)
        forms = parts if fixed else parts * len(value)
        made = [one.write(each, f"{place}[]") for one, each in zip(forms, value, strict=True)]
        # A set has no order, and the same input must be the same JSON.
        return sorted(made, key=repr) if kind in (set, frozenset) else made

    def read(value: Any, place: str) -> Any:
        check(value, list, place)
        forms = parts if fixed else parts * len(value)
        return kind([one.read(each, f"{place}[]") for one, each in zip(forms, value, strict=True)])

    inner = ",".join(one.text for one in parts)
    return Form(f"[{inner}]" if fixed else f"list[{inner}]", write, read)


def _dataclass(kind: Any, place: str, within: tuple[Any, ...]) -> Form:
    if kind in within:
        raise SagaRefused(f"{place} contains itself: give the parts ids, and list them")
    fields, hints = _fields(kind, place)
    parts = {name: _form(hints[name], f"{place}.{name}", (*within, kind)) for name in fields}
    needed = {name for name, optional in fields.items() if not optional}

    def write(value: Any, place: str) -> Any:
        if type(value) is not kind:
            raise _wrong(value, place, kind.__name__)
        return {name: part.write(getattr(value, name), f"{place}.{name}") for name, part in parts.items()}

    def read(value: Any, place: str) -> Any:
        if type(value) is not dict:
            raise _wrong(value, place, kind.__name__)
        if lost := value.keys() - parts.keys():
            raise SagaRefused(f"{place} has no field {min(lost)!r}: deploy a {kind.__name__} that has it")
        if missing := needed - value.keys():
            raise SagaRefused(f"{place} lacks {min(missing)!r}: start it with that, or give the field a default")
        given = {name: parts[name].read(one, f"{place}.{name}") for name, one in value.items()}
        try:
            return kind(**given)
        except Exception as error:
            raise SagaRefused(
                f"{place} is refused by {kind.__name__} ({type(error).__name__}): deploy one that takes what was given"
            ) from error

    # A field with a default may come later: sagas that run don't have it, and can be read all the same.
    text = ",".join(f"{name}:{parts[name].text}" for name in sorted(needed))
    return Form(f"{{{text}}}", write, read)


def _fields(kind: Any, place: str) -> tuple[dict[str, bool], dict[str, Any]]:
    """→ the fields that it is made from, each with whether it has a default, and the annotations."""
    missing = dataclasses.MISSING
    fields = {
        field.name: field.default is not missing or field.default_factory is not missing
        for field in dataclasses.fields(kind)
        if field.init
    }
    if more := inspect.signature(kind).parameters.keys() - fields.keys():
        raise SagaRefused(f"{place} takes {min(more)!r}, which is no field and isn't kept: make it a field")
    try:
        return fields, get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise SagaRefused(
            f"the annotations of {place} can't be read ({error}): define {kind.__name__} and what it names at the top "
            "of a module"
        ) from None
