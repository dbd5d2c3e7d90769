"""What is compared: a base class, the textbook, the engine, and the machine's own limits.

A peer loads a job's network, is prepared for a batch and a number of steps, then draws pictures: `pictures` from the
common noise, to be compared, and `run` as its users would call it, to be timed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.bench.workloads import SEED, Half, Job, Precision, update_parts
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.reference import p_sample_loop
from fastddpm.sampler import Sampler

OUTSIDE_STEPS = 200
COPY_BYTES = 1 << 27


class MissingError(RuntimeError):
    """This peer cannot take part; the message is a line that says why."""


class Peer:
    """One way of sampling.

    Args:
        precision: of the network.
        compiled: whether the network is compiled.
    """

    equality = True
    """Whether its pictures must equal the reference's: it runs the same network."""

    def __init__(self, precision: Precision = "fp32", compiled: bool = False) -> None:
        self.precision, self.compiled = precision, compiled
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

    def flops(self) -> float:
        """Arithmetic of one evaluation of the network for one picture; 0 where it is not known."""
        return 0.0

    def outside(self) -> float | None:
        """Milliseconds of a step around a network that costs nothing; None where that says nothing."""
        return None

    def _labels(self) -> Tensor | None:
        return self.job.labels(self.batch)


def outside_ms(peer: Peer, job: Job, batch: int, rounds: int = 5) -> float:
    """The median milliseconds of a step of `peer`, whose network is then `Half`."""
    steps = min(OUTSIDE_STEPS, job.T)
    peer.load(job.without_network())
    peer.prepare(batch, steps)
    peer.run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        peer.run()
        times.append(time.perf_counter() - began)
    return sorted(times)[rounds // 2] / steps * 1e3


def count_flops(network: nn.Module, *example: Tensor) -> float:
    """Floating-point operations of one call, two for each multiply-add; counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: value.to("meta") for name, value in network.state_dict().items()}
    buffers = {name: value.to("meta") for name, value in network.named_buffers()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network, {**state, **buffers}, tuple(tensor.to("meta") for tensor in example))
    return float(counter.get_total_flops())


class EnginePeer(Peer):
    """fastddpm, as `Sampler.sample` with seeds.

    Args:
        engine: as in `Sampler`.
        precision: the same.
    """

    def __init__(self, engine: str, precision: Precision = "fp32") -> None:
        super().__init__(precision, compiled=engine != "eager")
        self.engine = engine

    def load(self, job: Job) -> None:
        """Load through `Sampler.from_pretrained`."""
        super().load(job)
        options = self._options()
        if job.model:
            self.sampler = Sampler.from_pretrained(job.model, device=job.device, **options, **job.flags)
        else:
            self.sampler = Sampler(Half(), *update_parts(job.shape, job.T), device=job.device, **options)

    def _options(self) -> dict[str, Any]:
        wanted = {"engine": self.engine, "precision": self.precision}
        known = inspect.signature(Sampler.__init__).parameters
        missing = {name: value for name, value in wanted.items() if name not in known}
        if any(value not in ("eager", "fp32") for value in missing.values()):
            raise MissingError(f"this version of fastddpm has no {' and no '.join(missing)}")
        return {name: value for name, value in wanted.items() if name in known}

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
        """The same call."""
        self.pictures()

    def flops(self) -> float:
        """Counted on the network in PyTorch."""
        model = self.sampler.model
        if not self.job.model or not isinstance(model, nn.Module):
            return 0.0
        y = self.job.labels(1)
        t = self.sampler.spec.times_fed(torch.zeros(1, dtype=torch.int64))
        return count_flops(model, torch.zeros(1, *self.job.shape), t, *([] if y is None else [y]))

    def outside(self) -> float:
        """Of a sampler of the same engine."""
        return outside_ms(EnginePeer(self.engine, self.precision), self.job, self.batch)


class ReferencePeer(Peer):
    """`fastddpm.reference`, the textbook loop, around the network in PyTorch."""

    def load(self, job: Job) -> None:
        """Load the network through `Sampler.from_pretrained`."""
        super().load(job)
        self.plain = EnginePeer("eager")
        self.plain.load(job)
        self.sampler = self.plain.sampler
        spec = self.sampler.spec
        if spec.self_condition or spec.prediction == "x_prev":
            raise MissingError("the textbook has no loop for this network's conventions")

    def _network(self, x: Tensor, t: Tensor, y: Tensor | None = None, /) -> Tensor:
        return self.sampler.network(x, self.sampler.spec.times_fed(t), y)

    def pictures(self) -> Tensor:
        """With the engine's noise, made in the loop as the engine makes it."""
        spec, timesteps = self.sampler.spec, self.job.timesteps(self.steps)
        x = p_sample_loop(
            self._network,
            self.sampler.schedule,
            self.job.noise(self.batch, X_T_COUNTER).to(self.job.device),
            lambda i: self.job.noise(self.batch, timesteps[i]),
            timesteps=torch.tensor(timesteps),
            y=self._labels(),
            prediction=spec.prediction,
            variance=spec.variance,
            clip=spec.clip,
            threshold=spec.threshold,
        )
        return (x / 2 + 0.5).clamp(0, 1).cpu()

    def run(self) -> None:
        """The same call."""
        self.pictures()

    def flops(self) -> float:
        """Counted on the same network."""
        return self.plain.flops()

    def outside(self) -> float:
        """Of the textbook loop."""
        return outside_ms(ReferencePeer(), self.job, self.batch)


# ------------------------------------------------------------------ what the machine gives


@dataclasses.dataclass
class Limits:
    """The fastest matrix product and copy that this process can do, found once, measured again on demand."""

    device: str = "cpu"

    def gemm(self, precision: Precision, repeats: int = 3) -> float:
        """GFLOP/s of the fastest of several matrix products."""
        kind = _gemm_of(precision, self.device)
        return max(kind.speed(self.device) for _ in range(repeats))

    def copy(self, repeats: int = 3) -> float:
        """GB/s, read and written, of a copy far larger than caches."""
        source = torch.ones(COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        seconds = min(_seconds(lambda: target.copy_(source), self.device) for _ in range(repeats + 1))
        return 2 * COPY_BYTES / seconds / 1e9


@dataclasses.dataclass(frozen=True)
class _Gemm:
    call: Callable[[], object]
    flops: float
    name: str

    def speed(self, device: str) -> float:
        return self.flops / _seconds(self.call, device) / 1e9


@functools.cache
def _gemm_of(precision: Precision, device: str) -> _Gemm:
    """The fastest kind: PyTorch's matrix product, or a 1×1 convolution, which oneDNN runs as one."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kinds: list[_Gemm] = []
    for size in (1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        kinds.append(_Gemm(functools.partial(torch.mm, a, b), 2.0 * size**3, f"mm {size}"))
    for channels, side in ((512, 64), (1024, 32), (1024, 64)):
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
        w = torch.randn(channels, channels, 1, 1, device=device, dtype=dtype)
        x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
        call = functools.partial(F.conv2d, x, w)
        kinds.append(_Gemm(call, 2.0 * channels**2 * side**2, f"1×1 convolution {channels}"))
    return max(kinds, key=lambda kind: max(kind.speed(device) for _ in range(4)))


def _seconds(call: Callable[[], object], device: str) -> float:
    with torch.no_grad():
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class LimitsPeer(Peer):
    """Not a sampler: answers how fast the machine is right now."""

    equality = False

    def load(self, job: Job) -> None:
        """Find the fastest kinds of product."""
        super().load(job)
        self.limits = Limits(job.device)

    def measure(self, precisions: Sequence[str]) -> dict[str, float]:
        """GFLOP/s of each precision, and GB/s of a copy as "copy"."""
        return {name: self.limits.gemm(cast(Precision, name)) for name in precisions} | {"copy": self.limits.copy()}
