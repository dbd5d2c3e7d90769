"""GPUs: a step through `torch.compile`, and captured several times over in CUDA graphs that are replayed.

Nothing in a step depends on a value that the host knows: the samples' clocks, seeds and ids and the book's rows all
live in device memory, and a step changes the samples in place. So replaying the same launches makes any trajectory: a
graph that is captured once for a batch's shape serves every solver, number of steps, class and seed.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastddpm.common.wording import first_line
from fastddpm.engines import cache
from fastddpm.engines.compare import CompileError, check_step, not_one_graph
from fastddpm.engines.modules import tensors_of
from fastddpm.engines.runner import Runner, StepFunction, StepRunner
from fastddpm.step.likelihood import LikelihoodForm, LikelihoodStep
from fastddpm.step.state import State
from fastddpm.step.step import Call, Step, StepForm

GRAPH_STEPS = 10
"""Steps that one launch from the host makes; what a run's length leaves over is made by graphs of one step."""
WARM_UPS = 3  # as PyTorch's documentation has it: libraries allocate their workspaces in the first calls
_MANY = 1 << 16
_Kind = tuple[StepForm | LikelihoodForm, tuple[int, ...]]


class Graph(Protocol):
    """Launches that were recorded once."""

    def replay(self) -> None:
        """Make them again, on the same memory."""


Capture = Callable[[Callable[[], object]], Graph]
"""Record the launches that a function makes, without making them."""


def capture_cuda_graph(launches: Callable[[], object]) -> Graph:
    """Record launches in a CUDA graph.

    Raises:
        RuntimeError: they cannot be captured, because one waits for the GPU, say.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            launches()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        launches()
    return graph


def compile_in_place(step: Step | LikelihoodStep, arguments: list[Tensor], backend: str = "inductor") -> StepFunction:
    """Compile a step for tensors like these, the book's capacity left open.

    Args:
        step: in place.
        arguments: examples; the samples among them are moved a step on.
        backend: of `torch.compile`.

    Raises:
        CompileError: it does not compile as one graph.
    """
    for name, tensor in zip(step.names, arguments, strict=True):
        if name in ("rows", "timesteps", "conditions"):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    compiled: StepFunction = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    try:
        # Steps of other batches and forms share their Python code with this one; to compile it is no recompilation.
        with (
            torch._dynamo.config.patch(
                error_on_recompile=False, recompile_limit=_MANY, accumulated_recompile_limit=_MANY
            ),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # what `precision` is for
            compiled(*arguments)
    except Exception as error:  # whatever the compiler raises
        raise not_one_graph(error) from error
    return compiled


@dataclasses.dataclass
class _Slot:
    """Memory of one batch, and the graphs that work on it.

    Attributes:
        state: the slot's own samples.
        noise: its own z, where steps take one; or None.
        arguments: all that the graphs read.
        one: makes a step.
        many: makes `GRAPH_STEPS`, or None where each step is handed its noise.
        weights: where the network's weights were when the graphs were captured.
    """

    state: State
    noise: Tensor | None
    arguments: list[Tensor]
    one: Graph
    many: Graph | None
    weights: tuple[int, ...]


class Gpu:
    """Compiles one network's steps, and captures them where `graphs` says so."""

    cost_s, gain = 45.0, 1 / 3

    def __init__(
        self,
        *,
        graphs: bool,
        graph_steps: int | None = None,
        compile_step: Callable[[Step | LikelihoodStep, list[Tensor]], StepFunction] = compile_in_place,
        capture: Capture = capture_cuda_graph,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            graphs: whether steps are captured.
            graph_steps: steps that a graph makes; None is `GRAPH_STEPS`.
            compile_step: how a step is compiled.
            capture: how launches are recorded.
        """
        self.name = "cuda_graph" if graphs else "compiled"
        self.graph_steps = graph_steps or GRAPH_STEPS
        self._graphs, self._compile, self._capture = graphs, compile_step, capture
        self.steps: dict[_Kind, StepFunction] = {}
        self._free: dict[_Kind, list[_Slot]] = {}

    def formed(self, call: Call) -> Call:
        """The call that a compiled step serves: in place, and with noise for every solver.

        No more history is kept than is asked for, unless a step with more is compiled already and one with just that
        is not.
        """
        forms = call.step.form.for_graphs()
        shape = tuple(call.state.x.shape)
        return call.with_form(next((form for form in forms if (form, shape) in self.steps), forms[0]))

    def key(self, call: Call) -> str:
        """Names what was measured of such a step; weights do not matter."""
        device = call.state.x.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        network: Any = call.step.network
        dtypes = sorted({str(p.dtype) for p in network.parameters()})
        return cache.key_of(
            "gpu", kind=_kind(call), network=network.identity(), precision=dtypes, device=name, steps=self.graph_steps
        )

    def is_kept(self, call: Call) -> bool:
        """Whether the network is known by its configuration, so that measurements of it hold in other processes."""
        network: Any = call.step.network
        return network.identity() is not None

    def is_ready(self, call: Call) -> bool:
        """Whether the step is compiled."""
        return _kind(call) in self.steps

    def is_there(self, call: Call) -> bool:
        """Whether the step can be had without compiling; what Inductor keeps on disk is not looked at."""
        return self.is_ready(call)

    def prepare(self, call: Call, on_compile: Callable[[bool], None]) -> float | None:
        """Have the step compiled, and captured.

        Args:
            call: a call that `formed` made.
            on_compile: called with True before and False after compiling.

        Returns:
            Seconds that compiling took; None if it was compiled.

        Raises:
            CompileError: the step does not compile as one graph, cannot be captured, or differs from an eager step.
        """
        kind = _kind(call)
        if kind in self.steps:
            return None
        on_compile(True)
        try:
            began = time.perf_counter()
            function = self._compile(call.step, call.copy().arguments())
            check_step(function, call)
            self.steps[kind] = function
            if self._graphs:
                self._free.setdefault(kind, []).append(self._new_slot(call))
            return time.perf_counter() - began
        except CompileError:
            self.steps.pop(kind, None)
            raise
        finally:
            on_compile(False)

    def runner(self, call: Call) -> Runner:
        """Drives a call whose step is ready."""
        kind = _kind(call)
        if not self._graphs:
            return StepRunner(self.steps[kind], call)
        free = self._free.setdefault(kind, [])
        slot = free.pop() if free else self._new_slot(call)
        if not _still_fits(slot, call):
            slot = self._new_slot(call)
        return GraphRunner(slot, call.state, self.graph_steps, lambda: free.append(slot))

    def forget(self, call: Call) -> None:
        """Nothing is let go: what is compiled serves other runs, and slots are few."""

    def _new_slot(self, call: Call) -> _Slot:
        function = self.steps[_kind(call)]
        own = call.copy() if call.noise is None else dataclasses.replace(call.copy(), noise=call.noise.clone())
        arguments = own.arguments()

        def steps(count: int) -> Callable[[], None]:
            def make() -> None:
                for _ in range(count):
                    function(*arguments)

            return make

        try:
            one = self._capture(steps(1))
            many = self._capture(steps(self.graph_steps)) if own.noise is None and self.graph_steps > 1 else None
        except RuntimeError as error:
            raise CompileError(
                f"engine: the step must be one that a CUDA graph can hold, got {first_line(error)}; "
                "use engine='compiled'"
            ) from error
        return _Slot(own.state, own.noise, arguments, one, many, _addresses(call))


def _kind(call: Call) -> _Kind:
    """What a compiled step depends on, the network aside."""
    return call.step.form, tuple(call.state.x.shape)


def _addresses(call: Call) -> tuple[int, ...]:
    network = call.step.network
    return tuple(tensor.data_ptr() for tensor in tensors_of(network))


def _still_fits(slot: _Slot, call: Call) -> bool:
    """Whether the book's tensors and the weights are where they were when the slot's graphs were captured."""
    return slot.weights == _addresses(call) and all(
        theirs is ours
        for name, theirs, ours in zip(call.step.names, slot.arguments, call.arguments(), strict=True)
        if name in ("rows", "timesteps", "conditions")
    )


class GraphRunner:
    """Replays a slot's graphs until its samples are finished."""

    def __init__(self, slot: _Slot, start: State, graph_steps: int, release: Callable[[], None]) -> None:
        """Copy the samples in; the slot's own memory is the state from here on.

        Args:
            slot: nobody else's until it is released.
            start: the samples.
            graph_steps: what the slot's longer graph makes.
            release: called when the run is over.
        """
        self.state = slot.state
        self._slot, self._graph_steps, self._release = slot, graph_steps, release
        self.state.put(slice(None), start)

    def run(self, most: int, noise: Tensor | None = None) -> int:
        """See `Runner.run`; nothing is waited for."""
        slot = self._slot
        if slot.noise is not None and noise is not None:
            slot.noise.copy_(noise)
        elif slot.many is not None and most >= self._graph_steps:
            slot.many.replay()
            return self._graph_steps
        slot.one.replay()
        return 1

    def close(self) -> None:
        """Give the slot back."""
        self._release()
