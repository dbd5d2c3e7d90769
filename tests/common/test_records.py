"""Records: what their hints allow comes back from JSON, and all else is refused by name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from fastddpm.common.records import Record, RecordError, Within, check_record, read_record


@dataclasses.dataclass(frozen=True)
class Part(Record):
    """One field of each kind."""

    count: Annotated[int, Within(1, 10)]
    share: Annotated[float, Within(0, 1, above=True)] = 1
    size: float | None = None
    kind: Literal["a", "b", 3] = "a"
    flags: tuple[bool, ...] = (True,)
    pair: tuple[Annotated[int, Within(0)], str] = (0, "x")
    open: bool = False
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plain:
    number: int


GOOD = [
    {"count": 1}, {"count": 10, "share": 0.5}, {"count": 1, "size": 7}, {"count": 1, "size": float("inf")},
    {"count": 1, "kind": 3}, {"count": 1, "flags": [False, True]}, {"count": 1, "pair": [2**70, ""]},
    {"count": 1, "more": {"a": [1, {"b": None}]}},
]  # fmt: skip


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_what_the_hints_allow_comes_back(values):
    made = Part.from_dict(values)
    assert Part.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert all(getattr(made, name) == (tuple(v) if isinstance(v, list) else v) for name, v in values.items())


BAD = {
    "count must be an integer in [1, 10], got 0;": {"count": 0},
    "count must be an integer in [1, 10], got 11;": {"count": 11},
    "count must be an integer in [1, 10], got True;": {"count": True},
    "count must be an integer in [1, 10], got 1.0;": {"count": 1.0},
    "share must be a number in (0, 1], got 0;": {"share": 0},
    "share must be a number in (0, 1], got nan;": {"share": float("nan")},
    "share must be a number in (0, 1], got '1';": {"share": "1"},
    "size must be a number or null, got False;": {"size": False},
    "kind must be one of a, b, 3, got 'c';": {"kind": "c"},
    "kind must be one of a, b, 3, got 3.0;": {"kind": 3.0},
    "flags must be a list, each true or false, got ();": {"flags": []},
    "flags must be a list, each true or false, got (True, 1);": {"flags": [True, 1]},
    "pair must be a list of 2, each an integer of at least 0 and a string, got (0,);": {"pair": [0]},
    "pair must be a list of 2, each an integer of at least 0 and a string, got (-1, 'x');": {"pair": [-1, "x"]},
    "open must be true or false, got None;": {"open": None},
    "more must be an object of named values, got (1,);": {"more": [1]},
    "must hold nothing but count, share, size, kind, flags, pair, open, more, got colour;": {"colour": 2},
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=[str(change) for change in BAD.values()])
@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_all_else_is_refused_by_name(message, change, kind):
    with pytest.raises(kind) as caught:
        Part.from_dict({"count": 1} | change)
    assert str(caught.value).startswith(f"Part: {message}")


@pytest.mark.parametrize("values", [[], "count", 7, None], ids=repr)
def test_only_an_object_is_read(values):
    with pytest.raises(RecordError, match="Part: must be an object of named values, got"):
        Part.from_dict(values)


def test_a_missing_field_is_named():
    with pytest.raises(RecordError, match="Part: must hold count, got size, open; add what is missing"):
        Part.from_dict({"size": 1, "open": True})
    with pytest.raises(RecordError, match="Part: must hold count, got nothing"):
        Part.from_dict({})


def test_a_long_value_is_cut_short():
    with pytest.raises(RecordError) as caught:
        Part(1, size=10**400, kind="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_a_dataclass_that_is_no_record_is_read_and_checked_alike():
    assert read_record(Plain, {"number": 1, "later": 2}, more=True) == Plain(1)
    with pytest.raises(RecordError, match="Plain: number must be an integer, got 'x'"):
        read_record(Plain, {"number": "x"})
    with pytest.raises(RecordError, match="Plain: number"):
        check_record(Plain("x"))
