"""Runners: what drives one batch to its end, whatever makes its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastddpm.step.state import State
from fastddpm.step.step import Call

StepFunction = Callable[..., Sequence[Tensor]]
"""A step's arguments, in order → the new values of those that it `changed`."""

LOOK_S = 0.05  # small steps are made without looking up for so long
FIRST_TIMED = 2  # the first step of a run also allocates, and says little about the others


class Runner(Protocol):
    """Drives one batch."""

    @property
    def state(self) -> State:
        """The samples as they are now."""

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """Make at most `most` steps, at least one; returns how many.

        Args:
            most: steps that are left.
            noise: float32 [1, B, C, H, W], z or ε of the next step, where the step takes it; then one step is made.
        """

    def close(self) -> None:
        """The run is over: memory that others may use is given back. `state` must have been read before."""


class StepRunner:
    """Calls a function step by step and goes on with what it returns."""

    def __init__(self, function: StepFunction, call: Call) -> None:
        """Take the samples of a call.

        Args:
            function: the step itself, or what was compiled of it.
            call: the samples, and the rows as they are in the book now.
        """
        self._function, self.state = function, call.state
        names = call.step.names
        self._arguments = call.arguments()[: len(names) - ("noise" in names)]
        self._changed = call.step.changed
        self._places = [names.index(name) for name in self._changed]

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """Make steps until it is time to look up; see `Runner.run`."""
        end, made = time.perf_counter() + LOOK_S, 1
        self.make(*([] if noise is None else [noise]))
        while noise is None and made < most and time.perf_counter() < end:
            self.make()
            made += 1
        for name, place in zip(self._changed, self._places, strict=True):
            setattr(self.state, name, self._arguments[place])
        return made

    def close(self) -> None:
        """Nothing is to be given back."""

    def make(self, *noise: Tensor) -> None:
        """Make one step, of which `state` is not told yet."""
        for place, value in zip(self._places, self._function(*self._arguments, *noise), strict=True):
            self._arguments[place] = value


class DecidingRunner:
    """Starts with one runner, times a step, and may go on with another."""

    def __init__(self, first: Runner, decide: Callable[[float, State], Runner | None]) -> None:
        """Take the first runner.

        Args:
            first: makes the first steps.
            decide: is told the milliseconds that a step takes, once that is known, and the samples; returns what
                goes on with them, or None.
        """
        self._runner, self._decide, self._made = first, decide, 0

    @property
    def state(self) -> State:
        """The samples as they are now."""
        return self._runner.state

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """See `Runner.run`."""
        if self._made >= FIRST_TIMED:
            return self._runner.run(most, noise)
        began = time.perf_counter()
        made = self._runner.run(1, noise)
        self._made += 1
        if self._made == FIRST_TIMED:
            synchronize(self.state)
            self._runner = self._decide(1000 * (time.perf_counter() - began), self.state) or self._runner
        elif self._made == FIRST_TIMED - 1:
            synchronize(self.state)  # or the next step's time would hold this one's
        return made

    def close(self) -> None:
        """See `Runner.close`."""
        self._runner.close()


class ChangingRunner:
    """Goes on with another runner, from a step's end on, once something is ready."""

    def __init__(self, first: Runner, is_ready: Callable[[], bool], change: Callable[[State], Runner]) -> None:
        """Take the first runner.

        Args:
            first: makes the first steps.
            is_ready: asked between steps.
            change: is told the samples, once that is so; returns what goes on with them.
        """
        self._runner, self._is_ready, self._change = first, is_ready, change
        self._waits = True

    @property
    def state(self) -> State:
        """The samples as they are now."""
        return self._runner.state

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """See `Runner.run`."""
        if self._waits and self._is_ready():
            self._waits = False
            first, self._runner = self._runner, self._change(self._runner.state)
            first.close()
        return self._runner.run(most, noise)

    def close(self) -> None:
        """See `Runner.close`."""
        self._runner.close()


def synchronize(state: State) -> None:
    """Wait until a GPU has made what it was told to."""
    if state.x.device.type == "cuda":
        torch.cuda.synchronize(state.x.device)
