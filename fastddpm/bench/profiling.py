"""Where a step's time goes: a Chrome trace, the dearest kernels, launches, and what lies between them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from fastddpm.bench.peers import steps_of
from fastddpm.bench.timing import Clock
from fastddpm.files import atomic_path
from fastddpm.sampler import Sampler

TOP = 10
CONVOLUTIONS = re.compile("conv|fprop|implicit|winograd", re.IGNORECASE)
"""In the names of operators and kernels that convolve."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kind of kernel cost.

    Attributes:
        name: the operator's or the kernel's.
        calls: in a step.
        ms: in a step, without what it called in turn.
        share: of all kernels' time.
    """

    name: str
    calls: float
    ms: float
    share: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """A step, taken apart: a GPU's kernels, or a CPU's operators.

    Attributes:
        kernels: the dearest, the dearest first.
        launches: kernels or operators in a step.
        busy_ms: all kernels of a step.
        wall_ms: a step without the profiler; on a GPU, what it has more than `busy_ms` are gaps.
        convolutions: the share of those that convolve.
        host_ms: in which the host launches a step. Where it is less than `wall_ms`, a GPU never waits for its host.
    """

    kernels: list[Kernel]
    launches: float
    busy_ms: float
    wall_ms: float
    convolutions: float
    host_ms: float


def trace(sampler: Sampler, path: Path, *, batch: int, steps: int, steps_only: bool = False) -> Profile:
    """Profile a run after a first one that warms up.

    Args:
        sampler: what runs.
        path: where the Chrome trace goes (open it in chrome://tracing or ui.perfetto.dev).
        batch: pictures at a time.
        steps: of the run.
        steps_only: whether the steps alone are run, and not the call as users make it.

    Raises:
        OSError: the trace cannot be written.
    """
    run, on_gpu = _run(sampler, batch, steps, steps_only), sampler.device.type == "cuda"

    def once() -> None:
        run()
        if on_gpu:
            torch.cuda.synchronize()

    once()
    wall_ms = Clock.of(sampler.device).spent(run) / steps
    began = time.perf_counter()
    run()
    host_ms = 1e3 * (time.perf_counter() - began) / steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        once()
    with atomic_path(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (event.key, event.count, float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3)
        for event in profiler.key_averages()
        if event.device_type == kind
    ]
    total = sum(ms for _, _, ms in found) or 1.0
    convolving = sum(ms for name, _, ms in found if CONVOLUTIONS.search(name)) / total
    dearest = sorted(found, key=lambda entry: -entry[2])[:TOP]
    kernels = [Kernel(name, count / steps, ms / steps, ms / total) for name, count, ms in dearest]
    launches = sum(count for _, count, _ in found) / steps
    return Profile(kernels, launches, total / steps, wall_ms, convolving, host_ms)


def _run(sampler: Sampler, batch: int, steps: int, steps_only: bool) -> Callable[[], object]:
    classes = sampler.spec.num_classes
    labels = None if classes is None else torch.arange(batch) % classes
    if steps_only:
        timesteps = sampler.table(solver="ddpm", steps=steps).timesteps[:-1].tolist()
        return steps_of(sampler, batch, timesteps, labels)
    return lambda: sampler.sample(
        batch, solver="ddpm", steps=steps, class_labels=labels, batch_size=batch, progress=False
    )
