"""Engine: how one network's steps run, and the choice where that is left to us.

eager       the Python function itself.
compiled    the step as one graph: an ahead-of-time package on CPUs, `torch.compile` on GPUs.
cuda_graph  the compiled step, captured several times over and replayed with one launch.
onnx        eager steps of a network that ONNX Runtime runs (see `fastddpm.export`).
auto        eager, or the best of the others for the device, whichever was measured to be quicker; it compiles only
where the run is long enough to earn the time back, and remembers what it measured.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch

from fastddpm.engines.ahead_of_time import AheadOfTime
from fastddpm.engines.compare import CompileError
from fastddpm.engines.gpu import Gpu
from fastddpm.engines.measured import Measured, remember, remembered
from fastddpm.engines.runner import FIRST_TIMED, DecidingRunner, Runner, StepRunner, synchronize
from fastddpm.step.state import State
from fastddpm.step.step import Call

EngineName = Literal["auto", "eager", "compiled", "cuda_graph", "onnx"]
COMPILE_S = 45.0
"""What compiling is taken to cost where it was never measured."""
GAIN = 1 / 3
"""The part of an eager step's time that compiling is taken to save where it was never measured."""
_TRIALS = 3  # calls that are timed, after one that is not


class Quick(Protocol):
    """A way to run steps that has to be prepared; `AheadOfTime` and `Gpu` are two."""

    name: str

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


class Engine:
    """Runs one network's steps; see the module's docstring for the kinds.

    Attributes:
        name: the kind that was asked for.
        used: the kind that ran last; "" before the first run.
        why: why it was that one.
    """

    def __init__(
        self,
        name: EngineName,
        device: torch.device,
        *,
        graph_steps: int | None = None,
        weights: Callable[[], str] = lambda: "",
        quick: Quick | None = None,
    ) -> None:
        """Choose a kind.

        Args:
            name: "auto", "eager", "compiled", "cuda_graph" or "onnx".
            device: where the network is.
            graph_steps: steps that a CUDA graph holds; None is `fastddpm.engines.gpu.GRAPH_STEPS`.
            weights: the digest of the network's weights.
            quick: what prepares steps, instead of the device's own.

        Raises:
            ValueError: the name is unknown, "cuda_graph" is asked for on a CPU, or graph_steps is not positive.
        """
        if name not in get_args(EngineName):
            raise ValueError(f"engine must be one of {', '.join(get_args(EngineName))}, got {name!r}; pick one")
        if name == "cuda_graph" and device.type != "cuda" and quick is None:
            raise ValueError(
                f"engine must be auto, eager or compiled on a {device.type}, got cuda_graph; it is for GPUs"
            )
        if graph_steps is not None and (isinstance(graph_steps, bool) or graph_steps < 1):
            raise ValueError(f"graph_steps must be a positive int or None, got {graph_steps!r}; leave it out")
        self.name, self.device = name, device
        self.used, self.why = "", "nothing was sampled yet"
        on_gpu = Gpu(graphs=name != "compiled", graph_steps=graph_steps)
        self.quick = quick or (on_gpu if device.type == "cuda" else AheadOfTime(weights))
        self._because = "asked for"
        self._failed: dict[str, str] = {}
        self._warned = False

    @property
    def in_place(self) -> bool:
        """Whether eager steps change the samples' own tensors: GPUs do, for it saves a copy."""
        return self.device.type == "cuda"

    def check_eager(self, what: str, why: str) -> None:
        """See that this engine may run steps eagerly.

        Args:
            what: what is only run so.
            why: for what reason.

        Raises:
            ValueError: the engine is one that compiles and was asked for by its name.
        """
        if self.name not in ("auto", "eager", "onnx"):
            raise ValueError(f"engine must be auto or eager for {what}, got {self.name}: {why}; use engine='eager'")

    def settle(self, name: EngineName) -> None:
        """Leave off choosing: from now on all steps are made by one kind, as if it had been asked for.

        Args:
            name: "eager", or the device's own quick kind.

        Raises:
            ValueError: the choice was not left to us, or the name is none that "auto" chooses from.
        """
        if self.name != "auto" or name not in ("eager", self.quick.name):
            raise ValueError(f"engine must be {name}, got {self.name} on a {self.device.type}; ask for {name}")
        self._because = self.why if name == self.used else "as in the run that this one joins"
        self.name = name

    def compile(self, call: Call) -> float | None:
        """Make sure that such calls need no compiling.

        Returns:
            Seconds that compiling took; None if there was nothing to do.

        Raises:
            CompileError: the step does not compile.
            OSError: the package cannot be written.
        """
        call = self.quick.formed(call)
        if self.quick.is_there(call):
            return None
        seconds = self.quick.prepare(call, lambda _: None)
        self._measure(call, None, seconds)
        return seconds

    def runner(self, call: Call, *, to_come: int, on_compile: Callable[[bool], None] = lambda _: None) -> Runner:
        """What drives a batch.

        Args:
            call: the step and the samples; the runner may work on a copy, which is its `state`.
            to_come: steps of such batches that are to be made, this one's included.
            on_compile: called with True before and False after compiling.

        Raises:
            CompileError: the engine is not "auto" and the step does not compile.
            OSError: the engine is not "auto" and a package cannot be written.
            ValueError: the engine compiles, was asked for by its name, and the step can only be run eagerly.
        """
        eager = call.formed(in_place=self.in_place)
        if self.name in ("eager", "onnx"):
            self.used, self.why = self.name, self._because
            return StepRunner(eager.step, eager)
        if call.step.eager_because:
            self.check_eager("this step", call.step.eager_because)
            self.used, self.why = "eager", call.step.eager_because
            return StepRunner(eager.step, eager)
        wanted = self.quick.formed(call)
        if self.name != "auto":
            self.quick.prepare(wanted, on_compile)
            self.used, self.why = self.quick.name, self._because
            return self.quick.runner(wanted)
        key = self.quick.key(wanted)
        known = remembered().get(key) if self.quick.is_kept(wanted) else None
        why = self._failed.get(key) or ("" if self.quick.is_there(wanted) else _not_worth(known, to_come))
        if why:
            self.used, self.why = "eager", why
            return StepRunner(eager.step, eager)
        if self.quick.is_there(wanted):
            return self._prepared(wanted, known, on_compile) or StepRunner(eager.step, eager)

        def decide(eager_ms: float, state: State) -> Runner | None:
            measured = dataclasses.replace(known or Measured(eager_ms), eager_ms=eager_ms)
            why = _not_worth(measured, to_come - FIRST_TIMED)
            if why:
                self.why = why
                return None
            return self._prepared(
                self.quick.formed(dataclasses.replace(call, state=state)), measured, on_compile
            )  # fmt: skip

        self.used, self.why = "eager", "the run is too short to tell"
        return DecidingRunner(StepRunner(eager.step, eager), decide)

    def _prepared(self, call: Call, known: Measured | None, on_compile: Callable[[bool], None]) -> Runner | None:
        """The quick runner; None where it fails or is no quicker, with `why` set."""
        key = self.quick.key(call)
        try:
            seconds = self.quick.prepare(call, on_compile)
            if known is None or known.compiled_ms is None:
                known = self._measure(call, known, seconds)
            if known.compiled_ms is None or known.compiled_ms < known.eager_ms:
                runner = self.quick.runner(call)
                self.used, self.why = self.quick.name, _times(known)
                return runner
            self.used, self.why = "eager", _times(known)
        except (CompileError, OSError) as error:
            self.used, self.why = "eager", f"the step does not compile: {error}"
            if not self._warned:
                self._warned = True
                warnings.warn(f"sampling goes on eagerly: {error}", RuntimeWarning, stacklevel=2)
        self._failed[key] = self.why
        return None

    def _measure(self, call: Call, known: Measured | None, seconds: float | None) -> Measured:
        """What a prepared step takes, and an eager one if that is not known; remembered on disk."""
        compiled_ms = milliseconds(self.quick.runner, call)
        eager_ms = known.eager_ms if known is not None else self._eager_ms(call)
        batch, *shape = call.state.x.shape
        label = f"batch {batch} of {' × '.join(map(str, shape))}{call.step.form.caption} on {self.device}, "
        label += f"{torch.get_num_threads()} threads"
        measured = Measured(round(eager_ms, 3), round(compiled_ms, 3), seconds, label)
        if self.quick.is_kept(call):
            remember(self.quick.key(call), measured)
        return measured

    def _eager_ms(self, call: Call) -> float:
        return milliseconds(lambda call: StepRunner(call.step, call), call.formed(in_place=self.in_place))


def _times(known: Measured) -> str:
    if known.compiled_ms is None:
        return f"{known.eager_ms:.3g} ms a step eager"
    return f"{known.compiled_ms:.3g} ms a step compiled, {known.eager_ms:.3g} eager"


def _not_worth(known: Measured | None, to_come: int) -> str:
    """Why compiling does not pay for so many steps; "" if it does or may."""
    if to_come <= FIRST_TIMED:
        return f"{to_come} steps are too few to compile for"
    if known is None:
        return ""
    if known.compiled_ms is not None and known.compiled_ms >= known.eager_ms:
        return _times(known)
    cost = COMPILE_S if known.compile_s is None else known.compile_s
    gain = GAIN if known.compiled_ms is None else 1 - known.compiled_ms / known.eager_ms
    saved = to_come * known.eager_ms / 1000 * gain
    if saved < cost:
        return f"compiling would take about {cost:.0f} s and save about {saved:.0f} s"
    return ""


def milliseconds(make: Callable[[Call], Runner], call: Call) -> float:
    """The least of a few timings of a step, after one that is not counted; the call's samples stay as they are."""
    runner = make(call.copy())
    best = float("inf")
    try:
        for trial in range(_TRIALS + 1):
            began = time.perf_counter()
            runner.run(1, call.noise)
            synchronize(runner.state)
            if trial:
                best = min(best, time.perf_counter() - began)
    finally:
        runner.close()
    return best * 1000
