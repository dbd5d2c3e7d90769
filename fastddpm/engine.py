"""How `advance` runs: eagerly, compiled, or as a CUDA graph.

An `Engine` belongs to one network. It makes a `Runner` for each batch, which drives `advance` and nothing else:

    eager       the Python function itself.
    compiled    one ahead-of-time compiled package (CPU, see `fastddpm.compiled`) or `torch.compile` (GPU).
    cuda_graph  the compiled step, captured K times over and replayed.
    onnx        eager steps of a network that ONNX Runtime runs (see `fastddpm.export`).
    auto        whichever is quickest, the time to compile included: it compiles only where the run is long enough to
                earn that back, or takes a package that is there already, and remembers what it measured per network,
                batch and device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastddpm.compiled import (
    CompileError,
    checked,
    compile_step,
    is_cacheable,
    load_step,
    not_one_graph,
    package_path,
    weights_hash,
)
from fastddpm.cuda_graph import StepGraph
from fastddpm.denoiser import Denoiser
from fastddpm.measured import Measured, remember, remembered
from fastddpm.state import State, advance
from fastddpm.step_call import StepCall
from fastddpm.step_table import StepTable

EngineName = Literal["auto", "eager", "compiled", "cuda_graph", "onnx"]
MOST_GRAPH_STEPS = 64
"""Runs of up to so many steps are one CUDA graph; longer ones are cut into graphs of `GRAPH_STEPS`."""
GRAPH_STEPS = 50
COMPILE_S = 45.0
"""What compiling is taken to cost where it was never measured."""
GAIN = 1 / 3
"""The part of an eager step's time that compiling is taken to save where it was never measured."""
_FIRST_TIMED = 2  # the first step of a run also allocates, and says little about the others
_LOOK_S = 0.05  # small steps are made without looking up for so long
_TRIALS = 3  # calls that are timed, after one that is not


class Runner:
    """Drives one batch: `run` makes one or more steps of `state`."""

    def __init__(
        self,
        state: State,
        step: Callable[[Tensor | None], object],
        graph: StepGraph | None = None,
        decide: Callable[[float], Callable[[Tensor | None], object] | None] | None = None,
    ) -> None:
        """Take a function that makes one step with the noise it is given.

        Args:
            state: the samples.
            step: makes one step of them.
            graph: several steps at once.
            decide: is told what a step takes, in milliseconds, once that is known, and may return a better function.
        """
        self.state, self.step, self.graph = state, step, graph
        self._decide, self._made = decide, 0

    def run(self, most: int, noise: Tensor | None) -> int:
        """Make at most `most` steps, at least one; returns how many."""
        if self.graph is not None and most >= self.graph.steps:
            self.graph.replay()
            return self.graph.steps
        began = time.perf_counter()
        if self._decide is None:
            end, made = began + _LOOK_S, 0
            while made < most and (made == 0 or time.perf_counter() < end):
                self.step(noise)
                made += 1
            return made
        self.step(noise)
        self._made += 1
        if self._made == _FIRST_TIMED:
            self.step = self._decide(1000 * (time.perf_counter() - began)) or self.step
            self._decide = None
        return 1


class Engine:
    """Runs one network's steps; see the module's docstring for the kinds."""

    def __init__(self, name: EngineName, device: torch.device, *, graph_steps: int | None = None) -> None:
        """Choose a kind.

        Args:
            name: "auto", "eager", "compiled", "cuda_graph" or "onnx".
            device: where the network is.
            graph_steps: K of a CUDA graph; None captures all steps of runs of up to 64, and 50 of longer ones.

        Raises:
            ValueError: the name is unknown, "cuda_graph" is asked for on a CPU, or graph_steps is not positive.
        """
        if name not in get_args(EngineName):
            raise ValueError(f"engine must be one of {', '.join(get_args(EngineName))}, got {name!r}; pick one")
        if name == "cuda_graph" and device.type != "cuda":
            raise ValueError(
                f"engine must be auto, eager or compiled on a {device.type}, got cuda_graph; it is for GPUs"
            )
        if graph_steps is not None and (isinstance(graph_steps, bool) or graph_steps < 1):
            raise ValueError(f"graph_steps must be a positive int or None, got {graph_steps!r}; leave it out")
        self.name, self.device, self.graph_steps = name, device, graph_steps
        self.used = "eager"
        self.why = "nothing was sampled yet"
        self._weights: str | None = None
        self._steps: dict[str, Callable[..., Any]] = {}
        self._sizes: set[int] = set()  # batches for which a step is compiled
        self._failed: dict[str, str] = {}
        self._captured: tuple[StepCall, Runner] | None = None

    def weights(self, network: Callable[..., Tensor]) -> str:
        """The digest of the engine's network; "" for one that is not a module."""
        if self._weights is None:
            self._weights = weights_hash(network) if isinstance(network, nn.Module) else ""
        return self._weights

    def compile(self, call: StepCall) -> float | None:
        """Make sure that there is a package for such calls.

        Returns:
            Seconds that compiling took; None if it was there.

        Raises:
            CompileError: the step does not compile.
            OSError: the package cannot be written.
        """
        slot = self._slot(call)
        if slot.path.exists():
            return None
        step, seconds = _made(slot, call)
        self._measure(slot, call, step, seconds)
        return seconds

    def padded(self, size: int, full: int) -> int:
        """How many samples a batch of `size` is filled up to, where the run's other batches have `full`.

        A step that is compiled for the others serves the last one too; what it computes for nothing is dropped.
        """
        worth = self.name != "auto" or size > full // 2
        return full if full in self._sizes and worth else size

    def runner(
        self,
        denoiser: Denoiser,
        table: StepTable,
        state: State,
        noise: Tensor | None,
        *,
        to_come: int,
        on_compile: Callable[[bool], None] = lambda _: None,
    ) -> Runner:
        """What drives a batch.

        Args:
            denoiser: the network at the table's rows.
            table: the rows.
            state: the samples, with a history; the runner may work on a copy, which is its `state`.
            noise: a first example of what `Runner.run` will be given as noise.
            to_come: steps of such batches that are to be made, this one's included.
            on_compile: called with True before and False after compiling.

        Raises:
            CompileError: the engine is not "auto" and the step does not compile.
        """

        def eager(z: Tensor | None) -> None:
            advance(denoiser, table, state, noise=z)

        if self.name in ("eager", "onnx"):
            self.used, self.why = self.name, "asked for"
            return Runner(state, eager)
        if self.device.type == "cuda":
            return self._gpu_runner(denoiser, table, state, noise, eager, to_come, on_compile)
        call = StepCall(denoiser, table, state, noise)
        slot = self._slot(call)
        if slot.name in self._steps:
            self.used = "compiled"
            return Runner(state, call.bound(self._steps[slot.name]))
        if self.name == "auto" and not slot.path.exists():
            why = self._failed.get(slot.name) or _not_worth(slot.known, to_come)
            if why:
                self.used, self.why = "eager", why
                return Runner(state, eager)

            def decide(eager_ms: float) -> Callable[[Tensor | None], object] | None:
                return self._decide(slot, call, eager_ms, to_come - _FIRST_TIMED, on_compile)

            self.used, self.why = "eager", "the run is too short to tell"
            return Runner(state, eager, decide=decide)
        step = self._load_or_make(slot, call, on_compile)
        return Runner(state, eager if step is None else call.bound(step))

    # --- CPU ---

    def _slot(self, call: StepCall) -> _Slot:
        keep = is_cacheable(call.denoiser)
        path = package_path(call, self.weights(call.denoiser.model))
        if not keep:  # another network's code is not known to us, so its package is for this process alone
            path = path.with_name(f"{os.getpid()}-{id(self):x}-{path.name}")
        return _Slot(path.stem, path, keep, remembered().get(path.stem) if keep else None)

    def _decide(
        self, slot: _Slot, call: StepCall, eager_ms: float, to_come: int, on_compile: Callable[[bool], None]
    ) -> Callable[[Tensor | None], object] | None:
        """Whether to go on with compiled steps, now that it is known what an eager one takes."""
        known = dataclasses.replace(slot.known or Measured(eager_ms), eager_ms=eager_ms)
        why = _not_worth(known, to_come)
        if why:
            self.why = why
            return None
        step = self._load_or_make(dataclasses.replace(slot, known=known), call, on_compile)
        return None if step is None else call.bound(step)

    def _load_or_make(
        self, slot: _Slot, call: StepCall, on_compile: Callable[[bool], None]
    ) -> Callable[..., Any] | None:
        """The compiled step; None for "auto" where it does not compile or is no quicker, with `why` set."""
        step: Callable[..., Any] | None = None
        seconds = None if slot.known is None else slot.known.compile_s
        try:
            if slot.path.exists():
                with contextlib.suppress(CompileError):  # damaged, and removed
                    step = load_step(slot.path)
            if step is None:
                on_compile(True)
                step, seconds = _made(slot, call)
        except (CompileError, OSError) as error:
            if self.name != "auto":
                raise
            self._failed[slot.name] = f"the step does not compile: {error}"
            self.used, self.why = "eager", self._failed[slot.name]
            return None
        finally:
            on_compile(False)
            if not slot.keep:
                slot.path.unlink(missing_ok=True)
        measured = slot.known
        if measured is None or measured.compiled_ms is None:
            measured = self._measure(slot, call, step, seconds)
        times = f"{measured.compiled_ms:.3g} ms a step compiled, {measured.eager_ms:.3g} eager"
        if self.name == "auto" and measured.compiled_ms is not None and measured.compiled_ms >= measured.eager_ms:
            self._failed[slot.name] = times
            self.used, self.why = "eager", times
            return None
        self._steps[slot.name] = step
        self._sizes.add(len(call.state.x))
        self.used, self.why = "compiled", times
        return step

    def _measure(self, slot: _Slot, call: StepCall, step: Callable[..., Any], seconds: float | None) -> Measured:
        """What a new package takes per step, and an eager step if that is not known; remembered on disk."""
        copy = call.copy()
        bound = copy.bound(step)
        compiled_ms = _milliseconds(lambda: bound(copy.noise))
        eager_ms = _milliseconds(_probe(call)) if slot.known is None else slot.known.eager_ms
        batch, *shape = call.state.x.shape
        size = " × ".join(map(str, shape))
        guided = "" if call.state.guidance is None else ", guided"
        label = f"batch {batch} of {size}{guided} on {self.device}, {torch.get_num_threads()} threads"
        measured = Measured(round(eager_ms, 3), round(compiled_ms, 3), seconds, label)
        if slot.keep:
            remember(slot.name, measured)
        return measured

    # --- GPU ---

    def _gpu_runner(
        self,
        denoiser: Denoiser,
        table: StepTable,
        state: State,
        noise: Tensor | None,
        eager: Callable[[Tensor | None], None],
        to_come: int,
        on_compile: Callable[[bool], None],
    ) -> Runner:
        """`torch.compile` and capture; noise that changes from step to step cannot be captured."""
        step: Callable[[Tensor | None], object] = eager
        call = StepCall(denoiser, table, state, noise)
        if self._captured is not None and noise is None:
            last, runner = self._captured
            if last.denoiser is denoiser and last.table is table and last.signature() == call.signature():
                runner.state.put(torch.arange(len(state.x), device=self.device), state)
                return runner
        compiling = self.name != "auto" or to_come * GAIN * _gpu_ms(call) / 1000 > COMPILE_S
        if compiling:
            module = call.module()
            for tensor, shape in zip(call.tensors().values(), call.dynamic_shapes(), strict=True):
                for axis in shape or ():
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
            compiled = torch.compile(module, fullgraph=True)
            on_compile(True)
            try:
                compiled(*call.copy().tensors().values())
            except Exception as error:  # whatever the compiler raises
                failed = not_one_graph(error)
                if self.name != "auto":
                    raise failed from error
                self.why = f"the step does not compile: {failed}"
            else:
                step = call.bound(compiled)
                self.used, self.why = "compiled", "asked for" if self.name != "auto" else "the run is long"
            finally:
                on_compile(False)
        graph = None
        if self.name in ("cuda_graph", "auto") and (noise is None or len(noise) > 1):
            K = self.graph_steps or (table.S if table.S <= MOST_GRAPH_STEPS else GRAPH_STEPS)
            try:
                graph = StepGraph(lambda: step(noise), state, min(K, table.S))
                self.used, self.why = "cuda_graph", f"{graph.steps} {self.used} steps per launch from the host"
            except RuntimeError as error:
                if self.name != "auto":
                    reason = str(error).splitlines()[0]
                    raise CompileError(
                        f"engine: the step must be one that a CUDA graph can hold, got {reason}; use engine='compiled'"
                    ) from error
                self.why = "the step cannot be captured in a CUDA graph"
        runner = Runner(state, step, graph)
        self._sizes.add(len(state.x))
        self._captured = (call, runner) if graph is not None and noise is None else None
        return runner


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where the package for some calls is, and what is known of it."""

    name: str
    path: Path
    keep: bool
    known: Measured | None


def _not_worth(known: Measured | None, to_come: int) -> str:
    """Why compiling does not pay for so many steps; "" if it does or may."""
    if to_come <= _FIRST_TIMED:
        return f"{to_come} steps are too few to compile for"
    if known is None:
        return ""
    if known.compiled_ms is not None and known.compiled_ms >= known.eager_ms:
        return f"{known.compiled_ms:.3g} ms a step compiled, {known.eager_ms:.3g} eager"
    cost = COMPILE_S if known.compile_s is None else known.compile_s
    gain = GAIN if known.compiled_ms is None else 1 - known.compiled_ms / known.eager_ms
    saved = to_come * known.eager_ms / 1000 * gain
    if saved < cost:
        return f"compiling would take about {cost:.0f} s and save about {saved:.0f} s"
    return ""


def _made(slot: _Slot, call: StepCall) -> tuple[Callable[..., Any], float]:
    """A new package, compared with an eager step, and the seconds that compiling took."""
    seconds = compile_step(call, slot.path)
    return checked(load_step(slot.path), call, slot.path), seconds


def _probe(call: StepCall) -> Callable[[], None]:
    """An eager step on a copy of the samples, to be timed."""
    copy = call.copy()
    return lambda: advance(copy.denoiser, copy.table, copy.state, noise=copy.noise)


def _milliseconds(function: Callable[[], object]) -> float:
    """The least of a few timings, after one call that is not counted."""
    function()
    best = float("inf")
    for _ in range(_TRIALS):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best * 1000


def _gpu_ms(call: StepCall) -> float:
    """An eager step's milliseconds on the GPU."""
    step = _probe(call)

    def timed() -> None:
        step()
        torch.cuda.synchronize()

    return _milliseconds(timed)
