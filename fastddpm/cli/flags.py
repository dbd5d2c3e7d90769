"""`--flag NAME=VALUE`: what another project's file of weights does not say about itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated

import typer

FlagOption = Annotated[
    list[str] | None,
    typer.Option(
        "--flag",
        metavar="NAME=VALUE",
        help="For other projects' files: an option of training that the file does not hold, under that project's own "
        "name (`num_heads=4`, `noise_schedule=cosine`, `preset=cifar10`). May be repeated.",
    ),
]
_TAKEN = ("device", "engine", "graph_steps", "name_or_path", "precision")  # options of the command itself
_WORDS = {"True": True, "False": False, "None": None}
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")  # JSON lacks the plus sign, and .5 and 1.


def parse_flags(texts: Sequence[str] | None) -> dict[str, object]:
    """The flags as `load_checkpoint` takes them.

    A value is a JSON value, True, False, None, a number, a list of such with commas between, or else a word.

    Raises:
        ValueError: If an entry is not NAME=VALUE, or a name comes twice.
    """
    flags: dict[str, object] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in _TAKEN:
            raise ValueError(f"--flag must be NAME=VALUE, got {text!r}; write --flag num_heads=4, say")
        if name in flags:
            raise ValueError(f"--flag {name} must be given once, got it twice; keep one")
        flags[name] = _value(value)
    return flags


def _value(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        value: object = json.loads(text)
        return value
    except (ValueError, RecursionError):
        values = [_value(part) for part in text.split(",")] if "," in text else [text]
        return text if any(isinstance(value, str) for value in values) else values
