"""Engine: how one network's steps run, and the choice where that is left to us.

eager       the Python function itself.
compiled    the step as one graph: an ahead-of-time package on CPUs, `torch.compile` on GPUs.
cuda_graph  the compiled step, captured several times over and replayed with one launch.
onnx        steps whose network ONNX Runtime runs, openvino those whose network OpenVINO runs (see
            `fastddpm.export.library`).
auto        the quickest of all that are there for the device; it compiles only where the run is long enough to earn
            the time back, and remembers what it measured (see `fastddpm.engines.contest`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from fastddpm.engines.ahead_of_time import AheadOfTime
from fastddpm.engines.background import Background
from fastddpm.engines.contest import Contest, Contestant, Verdict, known_eager_ms
from fastddpm.engines.gpu import Gpu
from fastddpm.engines.quick import Libraries, Quick
from fastddpm.engines.runner import FIRST_TIMED, ChangingRunner, DecidingRunner, Runner, StepRunner
from fastddpm.step.state import State
from fastddpm.step.step import Call

EngineName = Literal["auto", "eager", "compiled", "cuda_graph", "onnx", "openvino"]
OnCompile = Callable[[bool], None]
LIBRARIES: tuple[EngineName, ...] = ("onnx", "openvino")
"""Engines whose steps are Python's own around a network that a library runs."""
LEAST_SETTLED = 20
"""A run whose choice is settled before it begins is measured for if it has more steps."""


@dataclasses.dataclass
class Settled:
    """The choice of one run, made before its first step and kept to its last.

    Attributes:
        verdict: what was chosen; None before.
    """

    verdict: Verdict | None = None


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
        libraries: Libraries | None = None,
    ) -> None:
        """Choose a kind.

        Args:
            name: one of `EngineName`.
            device: where the network is.
            graph_steps: steps that a CUDA graph holds; None is `fastddpm.engines.gpu.GRAPH_STEPS`.
            weights: the digest of the network's weights.
            quick: what prepares steps, instead of the device's own.
            libraries: the ways of other libraries, of which "auto" may take any; None is none.

        Raises:
            ValueError: the name is unknown, "cuda_graph" is asked for on a CPU, a library that is asked for is not
                among those given, or graph_steps is not positive.
        """
        libraries = libraries or Libraries()
        if name not in get_args(EngineName):
            raise ValueError(f"engine must be one of {', '.join(get_args(EngineName))}, got {name!r}; pick one")
        if name == "cuda_graph" and device.type != "cuda" and quick is None:
            raise ValueError(
                f"engine must be auto, eager, compiled, onnx or openvino on a {device.type}, got cuda_graph; "
                "it is for GPUs"
            )
        if graph_steps is not None and (isinstance(graph_steps, bool) or graph_steps < 1):
            raise ValueError(f"graph_steps must be a positive int or None, got {graph_steps!r}; leave it out")
        self.name, self.device = name, device
        self.used, self.why = "", "nothing was sampled yet"
        on_gpu = Gpu(graphs=name != "compiled", graph_steps=graph_steps)
        own = quick or (on_gpu if device.type == "cuda" else AheadOfTime(weights))
        by_name = {way.name: way for way in libraries.ways}
        self.ways: dict[str, Quick] = {**by_name, own.name: own}
        if name in LIBRARIES and name not in by_name:
            raise ValueError(f"engine must be one that is there, got {name}; sample through fastddpm.Sampler")
        self.quick: Quick = by_name.get(name, own)
        """What prepares steps where the kind is asked for by name, and what compiles otherwise."""
        self._because = "asked for"
        self.contest = Contest((*libraries.ways, own), libraries.missing, self.in_place)
        self.background = Background(weights)
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
        if self.name not in ("auto", "eager", *LIBRARIES):
            raise ValueError(f"engine must be auto or eager for {what}, got {self.name}: {why}; use engine='eager'")

    def keep_to(self, name: EngineName) -> None:
        """Leave off choosing: from now on all steps are made by one kind, as if it had been asked for.

        Args:
            name: "eager", or one of the ways that "auto" chooses from here.

        Raises:
            ValueError: the choice was not left to us, or the name is none that "auto" chooses from.
        """
        way = self.ways.get(name)
        if self.name != "auto" or (name != "eager" and way is None):
            raise ValueError(f"engine must be {name}, got {self.name} on a {self.device.type}; ask for {name}")
        self.quick = way or self.quick
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
        one = Contestant.of(self.quick, call, {})
        if one.is_there:
            return None
        seconds = self.quick.prepare(one.call, lambda _: None)
        self.contest.compare(one, None, call, None, seconds)
        return seconds

    def runner(
        self, call: Call, *, to_come: int, on_compile: OnCompile = lambda _: None, settled: Settled | None = None
    ) -> Runner:
        """What drives a batch.

        Args:
            call: the step and the samples; the runner may work on a copy, which is its `state`.
            to_come: steps of such batches that are to be made, this one's included.
            on_compile: called with True before and False after compiling.
            settled: the run's choice, where one engine must make all of its steps: made now, unless it was.

        Raises:
            CompileError: the engine is not "auto" and the step does not compile; or what was settled is gone.
            OSError: the engine is not "auto" and a package cannot be written.
            ValueError: the engine compiles, was asked for by its name, and the step can only be run eagerly.
        """
        if self.name == "eager":
            self.used, self.why = self.name, self._because
            return self._eager(call)
        if call.step.eager_because and self.name not in LIBRARIES:
            self.check_eager("this step", call.step.eager_because)
            self.used, self.why = "eager", call.step.eager_because
            return self._eager(call)
        if self.name != "auto":
            wanted = self.quick.formed(call)
            self.quick.prepare(wanted, on_compile)
            self.used, self.why = self.quick.name, self._because
            return self.quick.runner(wanted)
        if settled is not None:
            settled.verdict = settled.verdict or self._before_the_run(call, to_come, on_compile)
            return self._driven(settled.verdict, call, on_compile)
        return self._changing(call, to_come, on_compile)

    def stop(self) -> None:
        """End what is compiled beside a run."""
        self.background.stop()

    def _before_the_run(self, call: Call, to_come: int, on_compile: OnCompile) -> Verdict:
        """The choice for a whole run, measured where nothing is remembered and the run is long enough."""
        contestants = self.contest.contestants(call)
        eager_ms = known_eager_ms(contestants)
        if eager_ms is None and to_come <= LEAST_SETTLED and not _any_there(contestants):
            return Verdict(notes=[f"{to_come} steps are too few to measure for"])
        eager_ms = eager_ms or self.contest.time_eager(call)
        return self.contest.settle(contestants, call, eager_ms, to_come, on_compile)

    def _changing(self, call: Call, to_come: int, on_compile: OnCompile) -> Runner:
        """What drives a batch whose engine may change at a step's end."""
        contestants = self.contest.contestants(call)
        eager_ms = known_eager_ms(contestants)
        if _any_there(contestants):
            return self._now(call, eager_ms or self.contest.time_eager(call), to_come, on_compile)
        if to_come <= FIRST_TIMED:
            return self._driven(Verdict(notes=[f"{to_come} steps are too few to compile for"]), call, on_compile)
        if eager_ms is not None:
            return self._now(call, eager_ms, to_come, on_compile)

        def decide(eager_ms: float, state: State) -> Runner | None:
            return self._now(dataclasses.replace(call, state=state), eager_ms, to_come - FIRST_TIMED, on_compile)

        self.used, self.why = "eager", "the run is too short to tell"
        return DecidingRunner(self._eager(call), decide)

    def _now(self, call: Call, eager_ms: float, to_come: int, on_compile: OnCompile) -> Runner:
        """The quickest that can be had now; it changes over where a quicker one is compiled meanwhile."""
        contestants = self.contest.contestants(call)
        later = self.background.takes(contestants)
        verdict = self.contest.settle(contestants, call, eager_ms, to_come, on_compile, later)
        one, runner = verdict.later, self._driven(verdict, call, on_compile)
        if one is None:
            return runner
        refusal = self.background.begin(one)
        if refusal:
            self.why += f"; {one.way.name} is not prepared meanwhile: {refusal}"
            return runner
        self.why += f"; {one.way.name} is being prepared meanwhile"

        def decide(state: State) -> Runner:
            failure = self.background.failure(one.key)
            if failure:
                self.contest.fail(one, failure)
            return self._now(dataclasses.replace(call, state=state), verdict.times["eager"], to_come, on_compile)

        return ChangingRunner(runner, lambda: self.background.is_done(one.key), decide)

    def _driven(self, verdict: Verdict, call: Call, on_compile: OnCompile) -> Runner:
        """What a verdict says, with a warning if something that should have worked did not."""
        self.used, self.why = verdict.name, verdict.why
        if verdict.failure and not self._warned:
            self._warned = True
            how = "eagerly" if verdict.best is None else f"with {verdict.name}"
            warnings.warn(f"sampling goes on {how}: {verdict.failure}", RuntimeWarning, stacklevel=2)
        if verdict.best is None:
            return self._eager(call)
        way = verdict.best.way
        wanted = way.formed(call)
        way.prepare(wanted, on_compile)
        return way.runner(wanted)

    def _eager(self, call: Call) -> Runner:
        eager = call.formed(in_place=self.in_place)
        return StepRunner(eager.step, eager)


def _any_there(contestants: Sequence[Contestant]) -> bool:
    return any(one.is_there for one in contestants)
