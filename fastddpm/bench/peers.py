"""What is compared: a base class, the engine, the textbook, and the machine's own limits.

A peer loads a job's network, is prepared for a batch and a number of steps, then draws pictures: `pictures` from the
common noise, to be compared, and `run` as its users would call it, or the steps of it alone, to be timed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.bench.arithmetic import Precision, arithmetic
from fastddpm.bench.job import SEED, Half, Job, update_parts
from fastddpm.bench.peaks import Peaks
from fastddpm.engines.choose import EngineName
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.process.reference import p_sample_loop
from fastddpm.sampler import Sampler
from fastddpm.step.request import RunOptions, make_request

OUTSIDE_STEPS, OUTSIDE_ROUNDS = 200, 5


class MissingError(RuntimeError):
    """This peer cannot take part; the message is a line that says why."""


class Peer:
    """One way of sampling.

    Args:
        precision: of the network.
        mode: the network's under `torch.compile`; None leaves it as it is.
    """

    equality = True
    """Whether its pictures must equal the reference's: it runs the same network."""
    export_s = 0.0
    """Seconds of loading that went into a file that other workers read too."""

    def __init__(self, precision: Precision = "fp32", mode: str | None = None) -> None:
        self.precision, self.mode = precision, mode
        self.batch, self.steps = 0, 0

    @property
    def dtype(self) -> torch.dtype:
        """The precision as PyTorch has it."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def load(self, job: Job) -> None:
        """Load the network.

        Raises:
            MissingError: the peer cannot take part.
        """
        if self.precision == "tf32" and job.device == "cpu":
            raise MissingError("tf32 is for GPUs")
        self.job = job

    def prepare(self, batch: int, steps: int) -> None:
        """Get ready for runs of `steps` steps of `batch` pictures."""
        self.batch, self.steps = batch, steps

    def pictures(self) -> Tensor:
        """The pictures of the common noise, float32 [B, C, H, W] in [0, 1]."""
        raise NotImplementedError

    def run(self) -> None:
        """The timed call."""
        raise NotImplementedError

    def how(self) -> str:
        """What turned out to run, where the peer chooses; "" elsewhere."""
        return ""

    def flops(self) -> float:
        """Arithmetic of one evaluation of the network for one picture; 0 where it is not known."""
        return 0.0

    def outside(self) -> float | None:
        """Milliseconds of a step around a network that costs nothing; None where that says nothing."""
        return None

    def _labels(self) -> Tensor | None:
        return self.job.labels(self.batch)

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """In the block, float32 on a GPU means what the precision says."""
        return arithmetic(self.precision, self.job.device)


def outside_ms(peer: Peer, job: Job, batch: int) -> float:
    """The median milliseconds of a step of `peer`, whose network is then `Half`."""
    steps = min(OUTSIDE_STEPS, job.T)
    peer.load(job.without_network())
    peer.prepare(batch, steps)
    peer.run()
    times = []
    for _ in range(OUTSIDE_ROUNDS):
        began = time.perf_counter()
        peer.run()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / steps * 1e3


def count_flops(network: nn.Module, *example: Tensor) -> float:
    """Floating-point operations of one call, two for each multiply-add; counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: value.to("meta") for name, value in network.state_dict().items()}
    buffers = {name: value.to("meta") for name, value in network.named_buffers()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network, {**state, **buffers}, tuple(tensor.to("meta") for tensor in example))
    return float(counter.get_total_flops())


def steps_of(sampler: Sampler, batch: int, timesteps: Sequence[int], labels: Tensor | None) -> Callable[[], Tensor]:
    """All steps of a batch as a function, and nothing besides: the one place that reaches into the engine.

    Args:
        sampler: whose engine makes them.
        batch: samples.
        timesteps: to visit, descending.
        labels: int64 [B], or None.

    Returns:
        Makes the steps, from the same start each time, and returns the final state, which the next call overwrites.
    """
    stepper, table = sampler.stepper, sampler.table(solver="ddpm", timesteps=timesteps)
    request = make_request(sampler.spec, sampler.device, batch, RunOptions(SEED, class_labels=labels, batch_size=batch))
    under_way = contextlib.ExitStack()  # the batch is never given back
    with stepper.undisturbed():
        runner = under_way.enter_context(stepper.begin(table, request, to_come=1 << 20))
        start = runner.state.copy()

    def run() -> Tensor:
        with stepper.undisturbed():
            runner.state.put(slice(None), start)
            made = 0
            while made < table.S:
                made += runner.run(table.S - made)
        return runner.state.x

    run.under_way = under_way  # type: ignore[attr-defined]
    return run


class EnginePeer(Peer):
    """fastddpm, as `Sampler.sample` with seeds.

    Args:
        engine: as in `Sampler`.
        precision: the same.
    """

    def __init__(self, engine: EngineName, precision: Precision = "fp32") -> None:
        super().__init__(precision)
        self.engine = engine

    def load(self, job: Job) -> None:
        """Load through `Sampler.from_pretrained`."""
        super().load(job)
        if self.engine == "cuda_graph" and job.device == "cpu":
            raise MissingError("CUDA graphs are for GPUs")
        device, engine, precision = job.device, self.engine, self.precision
        if job.model:
            self.sampler = Sampler.from_pretrained(
                job.model, device=device, engine=engine, precision=precision, flags=job.flags
            )
        else:
            parts = update_parts(job.shape, job.T)
            self.sampler = Sampler(Half(), *parts, device=device, engine=engine, precision=precision)

    def prepare(self, batch: int, steps: int) -> None:
        """Choose the timed call."""
        super().prepare(batch, steps)
        self._timed: Callable[[], object] = self.pictures
        if self.job.steps_only:
            self._timed = steps_of(self.sampler, batch, self.job.timesteps(steps), self._labels())

    def pictures(self) -> Tensor:
        """With the engine's own noise, which the others are given."""
        return self.sampler.sample(
            self.batch,
            seed=SEED,
            solver="ddpm",
            timesteps=self.job.timesteps(self.steps),
            class_labels=self._labels(),
            batch_size=self.batch,
            progress=False,
        ).cpu()

    def run(self) -> None:
        """The same call, or its steps alone."""
        self._timed()

    def how(self) -> str:
        """The engine that ran, and why."""
        return f"{self.sampler.engine.used}: {self.sampler.engine.why}"

    def flops(self) -> float:
        """Counted on the network in PyTorch."""
        if not self.job.model:
            return 0.0
        y = self.job.labels(1)
        t = self.sampler.spec.times_fed(torch.zeros(1, dtype=torch.int64))
        network, x = self.sampler.stepper.network, torch.zeros(1, *self.job.shape)
        return count_flops(network, x, t, *([] if y is None else [y]))

    def outside(self) -> float:
        """Of a sampler of the same engine."""
        return outside_ms(EnginePeer(self.engine, self.precision), self.job, self.batch)


class ReferencePeer(Peer):
    """`fastddpm.process.reference`, the textbook loop, around the network in PyTorch."""

    def load(self, job: Job) -> None:
        """Load the network through `Sampler.from_pretrained`."""
        super().load(job)
        self.plain = EnginePeer("eager", self.precision)
        self.plain.load(job)
        self.sampler = self.plain.sampler
        spec = self.sampler.spec
        if spec.self_condition or spec.prediction == "x_prev":
            raise MissingError("the textbook has no loop for this network's conventions")

    def _network(self, x: Tensor, t: Tensor, y: Tensor | None = None, /) -> Tensor:
        return self.sampler.network(x, self.sampler.spec.times_fed(t), y)

    def _loop(self, x_T: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        spec = self.sampler.spec
        with self._arithmetic():
            return p_sample_loop(
                self._network,
                self.sampler.schedule,
                x_T,
                noise,
                timesteps=torch.tensor(self.job.timesteps(self.steps)),
                y=self._labels(),
                prediction=spec.prediction,
                variance=spec.variance,
                clip=spec.clip,
                threshold=spec.threshold,
            )

    def pictures(self) -> Tensor:
        """With the engine's noise, made in the loop as the engine makes it."""
        timesteps = self.job.timesteps(self.steps)
        start = self.job.noise(self.batch, X_T_COUNTER).to(self.job.device)
        x = self._loop(start, lambda i: self.job.noise(self.batch, timesteps[i]))
        return (x / 2 + 0.5).clamp(0, 1).cpu()

    def run(self) -> None:
        """The same call, or the loop alone with noise of PyTorch's, as textbooks have it."""
        if not self.job.steps_only:
            self.pictures()
            return
        x = torch.randn(self.batch, *self.job.shape, device=self.job.device)
        self._loop(x, lambda _: torch.randn_like(x))

    def flops(self) -> float:
        """Counted on the same network."""
        return self.plain.flops()

    def outside(self) -> float:
        """Of the textbook loop."""
        return outside_ms(ReferencePeer(), self.job, self.batch)


class LimitsPeer(Peer):
    """Not a sampler: answers how fast the machine is right now."""

    equality = False

    def load(self, job: Job) -> None:
        """Say where."""
        super().load(job)
        self.peaks = Peaks(job.device, job.dry)

    def measure(self, precisions: Sequence[str]) -> dict[str, float]:
        """GFLOP/s of each precision, and GB/s of a copy as "copy"."""
        return self.peaks.measure([cast(Precision, name) for name in precisions])
