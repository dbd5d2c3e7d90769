"""Options that a file of weights does not determine, under the names that the peer itself gives them."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

from fastddpm.checkpoints.base import CheckpointError

# Options of the projects for what is not supported; a suggestion of another name would lead astray.
_UNSUPPORTED = {
    "small_size": "super-resolution",
    "large_size": "super-resolution",
    "remove_parallel_component": "projected guidance",
    "keep_parallel_frac": "projected guidance",
    "rescaled_phi": "rescaled guidance",
    "use_cfg_plus_plus": "CFG++",
}
# And those of what is elsewhere.
_ELSEWHERE = {
    "cond_fn": "it is an option of Sampler.sample",
    "classifier_": "fastddpm.load_classifier reads classifiers, whose cond_fn Sampler.sample takes",
}
_NO_PRESETS: Mapping[str, Mapping[str, object]] = {}


class Flags:
    """The options that a caller gave for one checkpoint, checked as they are read.

    Names that begin with an underscore are notes, as JSON files of flags have them, and are not looked at.
    """

    def __init__(
        self,
        source: str,
        given: Mapping[str, object],
        known: Collection[str],
        presets: Mapping[str, Mapping[str, object]] = _NO_PRESETS,
    ) -> None:
        """Collect the options; a preset fills in those that are not given.

        Args:
            source: The checkpoint and what it was taken for, to start messages with.
            given: What the caller gave.
            known: The names that the dialect has.
            presets: Flags of published models by name; the flag `preset` picks one.

        Raises:
            CheckpointError: If a name or the preset is unknown.
        """
        self.source, self._presets = source, presets
        names = {*known, "preset"} if presets else set(known)
        values = {name: value for name, value in given.items() if not name.startswith("_")}
        unknown = sorted(values.keys() - names)
        if unknown:
            for start, what in _UNSUPPORTED.items():
                if unknown[0].startswith(start):
                    raise CheckpointError(f"{source}: {what} ({unknown[0]}) is not supported; leave it out")
            for start, where in _ELSEWHERE.items():
                if unknown[0].startswith(start):
                    raise CheckpointError(f"{source}: {unknown[0]} is no flag of a network: {where}; leave it out")
            near = difflib.get_close_matches(unknown[0], sorted(names), 1)
            hint = (
                f"did you mean {near[0]}?" if near else f"leave it out; there are {', '.join(sorted(names)) or 'none'}"
            )
            raise CheckpointError(f"{source}: there is no flag {', '.join(unknown)} for it; {hint}")
        preset = values.pop("preset", None)
        if preset is not None:
            if not isinstance(preset, str) or preset not in presets:
                raise CheckpointError(f"{source}: preset must be one of {', '.join(presets)}, got {preset!r}; pick one")
            values = {**presets[preset], **values}
        origins = {name: "flag" if name in given else f"preset {preset}" for name in values}
        self._values = values
        self._settings = {name: (value, origins[name]) for name, value in values.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def require(self, *names: str) -> None:
        """Raise CheckpointError naming all of `names` that are not given."""
        missing = [name for name in names if name.partition(" ")[0] not in self._values]
        if missing:
            named = next((name for name in self._presets if f"{name}." in self.source), None)
            presets = f", or preset= one of {', '.join(self._presets)}" if self._presets else ""
            if named:
                presets = f", or, as the file's name has it, preset={named}"
            raise CheckpointError(
                f"{self.source}: the file does not say {', '.join(missing)}; "
                f"give them as they were in training, like {missing[0].partition(' ')[0]}=…{presets}"
            )

    def settings(self) -> dict[str, tuple[object, str]]:
        """All that has been given, read or compared so far: name → (value, where it comes from), for people."""
        return dict(self._settings)

    def note(self, name: str, value: object, origin: str) -> None:
        """Remember for `settings` what the loader read elsewhere."""
        self._settings[name] = (value, origin)

    def note_all(self, defaults: Mapping[str, object], given: Mapping[str, object], origin: str) -> None:
        """The same for several, of which those that are `given` are of this origin."""
        for name, default in defaults.items():
            self.note(name, given.get(name, default), origin if name in given else "default")

    def given(self, names: Collection[str]) -> dict[str, object]:
        """Those of `names` that are given, unchecked."""
        return {name: value for name, value in self._values.items() if name in names}

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """The error for a flag whose value cannot be."""
        return CheckpointError(f"{self.source}: {name} must be {expected}, got {self._values.get(name)!r}; correct it")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An int of at least `least`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(name, "a finite number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false, also as the projects' own command lines have it."""
        value = _truth(self._get(name, default))
        if value is None:
            raise self.wrong(name, "True or False")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of `choices`."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def text(self, name: str, default: str) -> str:
        """Any string; integers are taken for what was written, with commas between several."""
        value = self._get(name, default)
        parts = value if isinstance(value, (list, tuple)) and value else [value]
        if not all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in parts):
            raise self.wrong(name, "a string")
        return ",".join(map(str, parts))

    def path(self, name: str) -> str | None:
        """A path, or None if it is not given."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise self.wrong(name, "a path")
        return None if value is None else os.fspath(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """A list of numbers, also a single one or a string with commas; None if it is absent or empty."""
        value = self._values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = (value,)
        parts: object = value.split(",") if isinstance(value, str) and value else value
        if parts is None or parts == "":
            return None
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            raise self.wrong(name, "a list of numbers")
        try:
            return tuple(float(part) for part in parts)
        except (TypeError, ValueError) as error:
            raise self.wrong(name, "a list of numbers") from error

    def size(self, names: Sequence[str], levels: int) -> tuple[int, int]:
        """Height and width of the pictures: one integer for both, two, or a string of two with a comma.

        Args:
            names: The flags that may say it; the first that is given does.
            levels: The network's resolutions, each half of the one before.
        """
        name = next((name for name in names if name in self), names[-1])
        value = self._values.get(name)
        sides = value.split(",") if isinstance(value, str) else value
        sides = tuple(sides) if isinstance(sides, (list, tuple)) else (sides,)
        sides = tuple(int(side) if isinstance(side, str) and side.strip().isdecimal() else side for side in sides)
        if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
            raise self.wrong(name, "one integer or two, (height, width)")
        factor = 2 ** (levels - 1)
        if any(side % factor for side in sides):
            raise self.wrong(name, f"divisible by {factor} (the network has {levels} resolutions)")
        return sides[0], sides[-1]

    def agree(self, **derived: object) -> None:
        """Check that flags which the weights determine, where they are given at all, say the same.

        Raises:
            CheckpointError: If one does not.
        """
        for name, value in derived.items():
            self.note(name, value, "file")
            if isinstance(value, tuple):
                numbers = self.numbers(name)
                differs = numbers is not None and numbers != value
            else:
                given = self._values.get(name, value)
                differs = given != value and not (isinstance(value, bool) and _truth(given) is value)
            if differs:
                raise CheckpointError(
                    f"{self.source}: {name} must be {value!r}, as its weights have it, got {self._values[name]!r}; "
                    "leave the flag out"
                )

    def agree_attention(self, name: str, attention: Sequence[bool], *sizes: Sequence[float]) -> None:
        """Check that a list of the picture sizes with attention, where it is given, fits the weights.

        Args:
            name: The flag.
            attention: Whether each level has attention in the weights.
            sizes: Each level's picture size, or whatever else the flag counts levels by; heights and widths where they
                differ, of which either may be meant.

        Raises:
            CheckpointError: If it does not.
        """
        numbers = self.numbers(name)
        choices = [[size for size, attends in zip(side, attention, strict=True) if attends] for side in sizes]
        derived = choices[0]
        self.note(name, derived, "file")
        fits = (set(numbers or ()) & set(side) == set(choice) for side, choice in zip(sizes, choices, strict=True))
        if numbers is not None and not any(fits):
            raise CheckpointError(
                f"{self.source}: {name} must be {derived}, as its weights have it, got {self._values[name]!r}; "
                "leave the flag out, or correct the picture's size"
            )

    def _get(self, name: str, default: object) -> object:
        if name not in self._values and default is not None:
            self.note(name, default, "default")
        return self._values.get(name, default)


def _truth(value: object) -> bool | None:
    """The truth value that is written so on the projects' command lines (OpenAI's `str2bool`); None for others."""
    word = str(value).lower() if isinstance(value, (bool, str)) else ""
    return True if word in ("true", "t", "yes", "y", "1") else False if word in ("false", "f", "no", "n", "0") else None


class Classes(TypedDict):
    """The arguments of `ModelSpec` that say which classes there are."""

    num_classes: int | None
    null_class: int | None


def classes_of(rows: int | None, flags: Flags) -> Classes:
    """Which classes a network knows, and which of its labels stands for "no class" (the flag `null_class`).

    A null class that has the last row is not counted among the classes; one in another row keeps its number there, so
    that the others keep theirs.

    Args:
        rows: Rows of the class embedding, or None for networks without.
        flags: May hold `null_class`.

    Returns:
        Arguments of `ModelSpec`.

    Raises:
        CheckpointError: If there is a null class but no such row, or nothing besides.
    """
    if "null_class" not in flags:
        return {"num_classes": rows, "null_class": None}
    if rows is None or rows < 2:
        got = "none" if rows is None else rows
        raise flags.wrong("null_class", f"left out: a network needs at least 2 labels for one, and this has {got}")
    null = flags.integer("null_class", least=0)
    if null >= rows:
        raise flags.wrong("null_class", f"one of the network's labels, 0 … {rows - 1}")
    return {"num_classes": rows - 1 if null == rows - 1 else rows, "null_class": null}


def level_sizes(size: tuple[int, int], levels: int) -> list[list[float]]:
    """The heights of a network's resolutions and the widths, finest first; once where they are the same."""
    return [[side / 2**level for level in range(levels)] for side in dict.fromkeys(size)]
