"""`engine="onnx"` and `engine="openvino"`: steps whose network another library runs, from a file that we export.

The library is given `Network.body` alone, and everything around it is `fastddpm.Step`'s own, run eagerly: so one file
serves every solver, guidance and kind of step, and noise is made in 64-bit arithmetic, which not every library has.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.engines import cache
from fastddpm.engines.ahead_of_time import give_memory_back
from fastddpm.engines.choose import Engine, EngineName
from fastddpm.engines.compare import check_step
from fastddpm.engines.quick import Libraries
from fastddpm.engines.runner import Runner, StepFunction, StepRunner
from fastddpm.export.body import body_file
from fastddpm.export.runtimes import Feeds, OnnxRuntime, Opened, OpenVino, Runtime, missing_packages, version
from fastddpm.kernels.native import processor
from fastddpm.kernels.normals import native_normals
from fastddpm.step.likelihood import LikelihoodStep
from fastddpm.step.network import Network
from fastddpm.step.step import Call, Step

RUNTIMES: tuple[Runtime, ...] = (OpenVino(), OnnxRuntime())
"""In the order in which "auto" tries them."""
_MOST_OPEN = 4  # networks of one sampler that are open at once: when weights change, the one before is of no more use


class Served(nn.Module):
    """A network whose body a library runs; of a `Network` it has what a step asks for, and nothing else."""

    def __init__(self, open_body: Callable[[Feeds], Opened]) -> None:
        """Nothing is opened yet.

        Args:
            open_body: opens the body for feeds of one form.
        """
        super().__init__()
        self._open_body = open_body
        self._opened: dict[tuple[object, ...], Opened] = {}

    def body(
        self,
        x: Tensor,
        conditions: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """See `Network.body`."""
        rows = conditions if index is None else conditions.index_select(0, index)
        given = {"x": x, "rows": rows, "labels": labels, "past": x_self_cond}
        feeds = {name: value for name, value in given.items() if value is not None}
        form = tuple((name, tuple(value.shape)) for name, value in feeds.items())
        if form not in self._opened:
            self._opened[form] = self._open_body(feeds)
        return self._opened[form](feeds)


class Library:
    """Steps of one network, run by one library; a `fastddpm.engines.quick.Quick`."""

    cost_s, gain = 10.0, 0.25

    def __init__(self, runtime: Runtime, precision: str, weights: Callable[[], str]) -> None:
        """Nothing is exported yet.

        Args:
            runtime: the library.
            precision: the network's arithmetic.
            weights: the digest of the network's weights as they are now.
        """
        self.name = runtime.name
        self.runtime, self._precision, self._weights = runtime, precision, weights
        self._served: dict[str, Served] = {}
        self._open_s = 0.0

    def formed(self, call: Call) -> Call:
        """The call as it is, its results in memory of their own."""
        return call.formed(in_place=False)

    def key(self, call: Call) -> str:
        """Names the network in this library and the batch; one serves all solvers, for it knows nothing of them."""
        any_solver = call.with_form(call.step.form.for_packages())
        return cache.key_of(
            self._weights()[:8],
            library=[self.name, version(self.runtime.package), self._precision],
            shape=list(call.state.x.shape),
            form=repr(any_solver.step.form),
            network=_network(call).identity(),
            threads=torch.get_num_threads(),
            processor=processor(),
            device=str(call.state.x.device),
            weights=self._weights(),
        )

    def is_kept(self, call: Call) -> bool:
        """Whether the network is known by its configuration and weights alone."""
        return _network(call).identity() is not None

    def is_ready(self, call: Call) -> bool:
        """Whether the network is open for such calls."""
        return self.key(call) in self._served

    is_there = is_ready

    def prepare(self, call: Call, on_compile: Callable[[bool], None]) -> float | None:
        """Have the network open, exported first where there is no file, and its step compared with an eager one.

        Args:
            call: a call that `formed` made.
            on_compile: called with True before and False afterwards.

        Returns:
            Seconds that it takes where there is a file, as in the next process; None if it was open.

        Raises:
            CompileError: the network cannot be exported, the library refuses it, or its step differs from an eager one.
            OSError: the file cannot be written.
        """
        key = self.key(call)
        if key in self._served:
            return None
        self._open_s = 0.0
        on_compile(True)
        try:
            served = Served(self._opener(call))
            check_step(_function(call, served), call)
        finally:
            on_compile(False)
            give_memory_back()
        while len(self._served) >= _MOST_OPEN:
            self._served.pop(next(iter(self._served)))
        self._served[key] = served
        return self._open_s

    def runner(self, call: Call) -> Runner:
        """Drives a call whose network is open."""
        return StepRunner(_function(call, self._served[self.key(call)]), call)

    def forget(self, call: Call) -> None:
        """Close the network; its file stays."""
        self._served.pop(self.key(call), None)

    def _opener(self, call: Call) -> Callable[[Feeds], Opened]:
        network, weights, threads = call.step.network, self._weights(), torch.get_num_threads()

        def open_body(feeds: Feeds) -> Opened:
            with body_file(_in_float32(network), feeds, weights) as path:
                began = time.perf_counter()
                opened = self.runtime.open(path, feeds, precision=self._precision, threads=threads)
                self._open_s += time.perf_counter() - began
                return opened

        return open_body


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """In the block, PyTorch works in the calling thread alone, or its pool would fight with a library's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def engine_of(
    name: EngineName,
    device: torch.device,
    precision: str,
    weights: Callable[[], str],
    *,
    graph_steps: int | None = None,
) -> Engine:
    """An engine that has the libraries' ways too; arguments as in `Engine` and `libraries`."""
    known = libraries(name, device, precision, weights)
    return Engine(name, device, graph_steps=graph_steps, weights=weights, libraries=known)


def libraries(name: str, device: torch.device, precision: str, weights: Callable[[], str]) -> Libraries:
    """The ways of other libraries that an engine may take.

    Args:
        name: of the engine: a library's own, or "auto", for which those count that run on this device as it is.
        device: where states are.
        precision: the network's arithmetic.
        weights: the digest of the network's weights.

    Returns:
        The ways, which import their libraries when first prepared.

    Raises:
        ValueError: a library is asked for by name that is not installed, or cannot do what is asked.
    """
    ways, missing = [], []
    for runtime in RUNTIMES:
        if name not in ("auto", runtime.name) or (name == "auto" and device.type != "cpu"):
            continue
        absent = missing_packages(runtime)
        refusal = "" if absent else runtime.takes(precision, device)
        if name == "auto" and absent:
            missing.append(f"{runtime.name} is not installed")
        elif absent:
            raise ValueError(
                f"engine: {name} needs the packages {', '.join(absent)}, which are not installed; "
                f"run pip install 'fastddpm[{name}]'"
            )
        elif refusal and name != "auto":
            raise ValueError(refusal)
        elif not refusal:
            ways.append(Library(runtime, precision, weights))
    return Libraries(tuple(ways), tuple(missing))


def _function(call: Call, served: Served) -> StepFunction:
    """The call's step around a network in a library."""
    step = _with_network(call.step, served)

    def function(*tensors: Tensor) -> Sequence[Tensor]:
        with one_thread(), native_normals():
            return cast(Sequence[Tensor], step(*tensors))

    return function


def _network(call: Call) -> Network:
    return cast(Network, call.step.network)


def _with_network(step: Step | LikelihoodStep, network: nn.Module) -> Step | LikelihoodStep:
    """A step of the same kind and form around another network."""
    other = copy.copy(step)
    other._modules = {**step._modules, "network": network}
    return other


def _in_float32(network: nn.Module) -> nn.Module:
    """The network with float32 weights: a library lowers the precision by itself."""
    known = cast(Network, network)
    return network if known.dtype in (None, torch.float32) else cast(nn.Module, known.cast(torch.float32))
