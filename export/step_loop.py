"""StepLoop: an exported step run again and again, on buffers that are allocated once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastddpm.engines.loop import Course
from fastddpm.export.session import OnnxSession, import_onnxruntime
from fastddpm.process.noise import normals
from fastddpm.step.state import State
from fastddpm.step.step import CHANGED


class StepLoop:
    """Runs a step model in place, as far as ONNX Runtime allows.

    A run must not write where it reads, so there are two sets of buffers and two bindings, one from the first to the
    second and one back: no state is copied between steps, and each binding has fixed addresses, as a CUDA graph needs.
    """

    def __init__(self, session: OnnxSession, batch: int) -> None:
        """Allocate the buffers and bind them.

        Args:
            session: a step.
            batch: samples that run together.

        Raises:
            ValueError: the model is no step, or was exported for another batch.
        """
        if session.facts["what"] != "step":
            raise ValueError(f"StepLoop: the model must be a step, got a {session.facts['what']}; export a step")
        if session.batch not in (None, batch):
            raise ValueError(f"StepLoop: batch must be the model's, {session.batch}, got {batch}; pad the batch")
        self.session = session
        self._carried = [name for name in CHANGED if name in session.inputs]  # the output is called `name`_next
        self._fixed = {name: session.buffer(name, batch) for name in session.inputs if name not in self._carried}
        self._states = [{name: session.buffer(name, batch) for name in self._carried} for _ in range(2)]
        self._bindings = [self._bind(0), self._bind(1)]
        self._options = [self._run_options(i) for i in range(2)]
        self._turn = 0

    def _bind(self, turn: int) -> object:
        binding = self.session.raw.io_binding()
        for name, value in (*self._fixed.items(), *self._states[turn].items()):
            binding.bind_ortvalue_input(name, value)
        for name, value in self._states[1 - turn].items():
            binding.bind_ortvalue_output(f"{name}_next", value)
        return binding

    def _run_options(self, turn: int) -> object:
        """Each binding has its own addresses and so its own captured graph."""
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = 4
        if self.session.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(turn + 1))
        return options

    def begin(self, x_T: np.ndarray, feeds: dict[str, np.ndarray]) -> None:
        """Start a run.

        Args:
            x_T: float32 [B, C, H, W].
            feeds: the inputs that stay the same, by name; noise may come later.

        Raises:
            TypeError: an input has another dtype.
            ValueError: an input is missing or of another shape.
        """
        whole = {"x": x_T, **feeds}
        for name in (*self._carried, "noise"):
            if name in self.session.inputs and name not in whole:
                whole[name] = self.session.zeros(name, len(x_T))
        self.session.check(whole)
        self._turn = 0
        for name, value in whole.items():
            self.write(name, value)

    def write(self, name: str, value: np.ndarray) -> None:
        """Put an array into an input's buffer."""
        buffer = self._fixed[name] if name in self._fixed else self._states[self._turn][name]
        buffer.update_inplace(np.ascontiguousarray(value))

    def read(self, name: str) -> np.ndarray:
        """What a carried value is now; the array may be overwritten by the next but one step."""
        array: np.ndarray = self._states[self._turn][name].numpy()
        return array

    def step(self) -> None:
        """Advance every sample by one row."""
        self.session.raw.run_with_iobinding(self._bindings[self._turn], self._options[self._turn])
        self._turn = 1 - self._turn


class OnnxRunner:
    """Drives one batch through an exported step; a `fastddpm.engines.runner.Runner`."""

    def __init__(self, loop: StepLoop, state: State, feeds: dict[str, np.ndarray], course: Course) -> None:
        """Put a batch into the buffers.

        Args:
            loop: the step.
            state: the samples at their start.
            feeds: the inputs that stay the same.
            course: the steps.
        """
        self._loop, self._start, self._course, self._made = loop, state, course, 0
        loop.begin(state.x.numpy(), feeds)

    @property
    def state(self) -> State:
        """The samples as they are now; may be overwritten by the next but one step."""
        start, keeps = self._start, "history" in self._loop.session.inputs
        history = torch.from_numpy(self._loop.read("history")) if keeps else None
        x = torch.from_numpy(self._loop.read("x"))
        return State(x, start.step + self._made, start.end, start.sample_id, start.seed, history=history)

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """See `Runner.run`; noise that nobody supplies, and the file takes, is the seeded one."""
        course, start = self._course, self._start
        made = 1 if noise is not None or "noise" in self._loop.session.inputs else most
        for i in range(self._made, self._made + made):
            if noise is None and course.draws[i]:
                t = torch.full_like(start.sample_id, course.counters[i])
                _, C, H, W = start.x.shape
                noise = normals(start.seed, start.sample_id, t, (C, H, W))[None]
            if noise is not None:
                self._loop.write("noise", noise[0].cpu().numpy())
            self._loop.step()
        self._made += made
        return made

    def close(self) -> None:
        """Nothing is to be given back."""


class ChainRunner:
    """Draws one batch by an exported chain, which is one call; a `fastddpm.engines.runner.Runner`."""

    def __init__(self, session: OnnxSession, state: State, feeds: Mapping[str, np.ndarray]) -> None:
        """Take a batch.

        Args:
            session: the chain.
            state: the samples at their start.
            feeds: its inputs.
        """
        self._session, self._feeds, self.state = session, dict(feeds), state

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """All steps, whatever is asked for; see `Runner.run`."""
        self.state.x = torch.from_numpy(self._session.run(self._feeds)["pictures"])
        return int(self.state.end[0])

    def close(self) -> None:
        """Nothing is to be given back."""
