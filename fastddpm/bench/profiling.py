"""Where a step's time goes: a Chrome trace, and the dearest kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastddpm.files import atomic_path
from fastddpm.sampler import Sampler

TOP = 10


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kind of kernel cost.

    Attributes:
        name: the operator's or the kernel's.
        calls: in a step.
        ms: in a step, without what it called in turn.
        share: of the whole run.
    """

    name: str
    calls: float
    ms: float
    share: float


def trace(sampler: Sampler, path: Path, *, batch: int, steps: int) -> list[Kernel]:
    """Profile a run after a first one that warms up.

    Args:
        sampler: what runs.
        path: where the Chrome trace goes (open it in chrome://tracing or ui.perfetto.dev).
        batch: pictures at a time.
        steps: of the run.

    Returns:
        The dearest kernels, the dearest first.

    Raises:
        OSError: the trace cannot be written.
    """
    classes = sampler.spec.num_classes
    labels = None if classes is None else [i % classes for i in range(batch)]

    def once() -> None:
        sampler.sample(batch, solver="ddpm", steps=steps, class_labels=labels, batch_size=batch, progress=False)
        if sampler.device.type == "cuda":
            torch.cuda.synchronize()

    once()
    on_gpu = sampler.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        once()
    with atomic_path(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    times = {
        event.key: (event.count, float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3)
        for event in profiler.key_averages()
    }
    total = sum(ms for _, ms in times.values()) or 1.0
    dearest = sorted(times.items(), key=lambda entry: -entry[1][1])[:TOP]
    return [Kernel(name, count / steps, ms / steps, ms / total) for name, (count, ms) in dearest]
