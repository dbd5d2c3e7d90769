"""Quick: a way to run steps that has to be prepared; what an engine must know of it to choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from fastddpm.engines.runner import Runner
from fastddpm.step.step import Call


class Quick(Protocol):
    """A way to run steps that has to be prepared; `AheadOfTime`, `Gpu` and `fastddpm.export.library.Library` are three.

    Attributes:
        name: of the engine.
        cost_s: what preparing is taken to cost where it was never measured.
        gain: the part of an eager step's time that it is taken to save where it was never measured.
    """

    name: str
    cost_s: float
    gain: float

    def formed(self, call: Call) -> Call:
        """The call in the form that the prepared step serves."""

    def key(self, call: Call) -> str:
        """Names what is prepared, and what was measured of it."""

    def is_kept(self, call: Call) -> bool:
        """Whether the key means the same in other processes."""

    def is_ready(self, call: Call) -> bool:
        """Whether the step is at hand."""

    def is_there(self, call: Call) -> bool:
        """Whether the step can be had without compiling."""

    def prepare(self, call: Call, on_compile: Callable[[bool], None]) -> float | None:
        """Have the step at hand; returns the seconds that compiling took, if it had to."""

    def runner(self, call: Call) -> Runner:
        """What drives a call whose step is at hand."""

    def forget(self, call: Call) -> None:
        """Let go of a step that is at hand: another way was quicker, and two take the memory of two."""


@dataclasses.dataclass(frozen=True)
class Libraries:
    """Ways of other libraries, for `Engine`.

    Attributes:
        ways: those that can be taken here.
        missing: for each that cannot, a few words that say why.
    """

    ways: tuple[Quick, ...] = ()
    missing: tuple[str, ...] = ()
