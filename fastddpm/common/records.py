"""Records: frozen dataclasses whose type hints say what their fields may hold, and how they are read from JSON."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


class RecordError(ValueError, TypeError):
    """A field is missing, unknown, or not of its type and range: to whoever reads a file it is all the same."""


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number, for `Annotated`.

    Args:
        low: The least; without `above` it is in the range.
        high: The most. Infinity is in no range.
        above: Whether `low` itself is out of the range.
    """

    low: float
    high: float = sys.float_info.max
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == sys.float_info.max:
            return f"{'above' if self.above else 'of at least'} {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}]"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a record inherits: it is checked when it is made, and goes to JSON and comes back.

    Hints may be int, float, bool, str, a Literal, a class, a tuple of hints (at least one where their number is open),
    one or the other of several, and numbers `Annotated` with `Within`.

    Attributes:
        REMEDY: How errors end that say what a field must be.

    Raises:
        RecordError: If a field is not of its type and range.
    """

    REMEDY = "correct it"

    def __post_init__(self) -> None:
        check_record(self)

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """From JSON values; see `read_record`.

        Raises:
            RecordError: If a field is missing, unknown, or not of its type and range, or it is no object at all.
        """
        return read_record(cls, values)


def read_record(kind: type[Kind], values: object, *, more: bool = False) -> Kind:
    """A dataclass from JSON values, whose lists become tuples.

    Args:
        kind: The dataclass.
        values: An object with its fields; those that have defaults may be left out.
        more: Whether there may be fields that it does not know, which are passed over.

    Raises:
        RecordError: If a field is missing, unknown, or not of its type and range, or it is no object at all.
    """
    name = kind.__name__
    if not isinstance(values, Mapping):
        raise RecordError(f"{name}: must be an object of named values, got {type(values).__name__}; correct it")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(str(given) for given in values if given not in fields)
    if unknown and not more:
        raise RecordError(f"{name}: must hold nothing but {', '.join(fields)}, got {', '.join(unknown)}; correct it")
    needed = [field for field in fields.values() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [field.name for field in needed if field.name not in values]:
        got = ", ".join(map(str, values)) or "nothing"
        raise RecordError(f"{name}: must hold {', '.join(missing)}, got {got}; add what is missing")
    given = {field: values[field] for field in fields if field in values}
    record = kind(**{field: tuple(value) if isinstance(value, list) else value for field, value in given.items()})
    check_record(record)
    return record


def check_record(record: DataclassInstance) -> None:
    """Check the fields of a dataclass against their type hints.

    Raises:
        RecordError: If one is not of its type and range.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            expected = f"{name} must be {_wording(hint)}"
            remedy = getattr(record, "REMEDY", Record.REMEDY)
            raise RecordError(f"{type(record).__name__}: {expected}, got {reprlib.repr(value)}; {remedy}")


@functools.cache
def _hints(kind: type[DataclassInstance]) -> dict[str, type]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: object, hint: type) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0]) and all(value in bounds for bounds in inner[1:])
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is tuple:
        if not isinstance(value, tuple) or not value:
            return False
        hints = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(hints) and all(map(_fits, value, hints))
    kinds = (int, float) if hint is float else origin or hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _wording(hint: type) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join((_wording(inner[0]), *map(str, inner[1:])))
    if origin in (Union, UnionType):
        return " or ".join(map(_wording, inner))
    if origin is Literal:
        return repr(inner[0]) if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        count = "a list, each" if inner[-1] is ... else f"a list of {len(inner)}, each"
        return f"{count} {' and '.join(dict.fromkeys(_wording(part) for part in inner if part is not ...))}"
    return _WORDS.get(hint, "an object of named values")
