"""What only a GPU has: capture and replay, launches, a loop that waits for nothing, and speeds beside a copy's."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastddpm.bench import cases, kernels, profiling
from fastddpm.bench.peaks import Peaks
from fastddpm.doctor.engines import PICTURES, RUNS, compare_runs, small_sampler
from fastddpm.doctor.surroundings import ProblemError
from fastddpm.engines.gpu import Gpu, Graph, capture_cuda_graph
from fastddpm.sampler import Sampler
from fastddpm.step.request import RunOptions, make_request

STEPS = 30
EFFORT = cases.Effort(rounds=10, calls=20)


class CountingCapture:
    """Captures CUDA graphs, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, launches: Callable[[], object]) -> Graph:
        """Capture."""
        self.made += 1
        return capture_cuda_graph(launches)


def check_cuda_graph(device: torch.device) -> str:
    """Replayed steps against eager ones; later runs, of whatever solver, replay what the first one captured."""
    sampler, capture = _replaying(device)
    counts: list[int] = []
    text = compare_runs(sampler, "cuda_graph", lambda: counts.append(capture.made))
    if capture.made != counts[0]:
        raise ProblemError(f"graphs must be captured once, got {capture.made - counts[0]} more in later runs")
    return f"{counts[0]} graphs captured once, replayed for all; {text}"


def check_no_waiting(device: torch.device) -> str:
    """The loops of the engines never wait for the GPU: anything that would is an error while they run."""
    samplers = {"eager": small_sampler(device), "cuda_graph": _replaying(device)[0]}
    for name, sampler in samplers.items():
        request = make_request(sampler.spec, device, PICTURES, RunOptions(batch_size=PICTURES))
        table = sampler.table(**RUNS[0])
        sampler.sample(PICTURES, progress=False, **RUNS[0])
        with sampler.stepper.undisturbed(), sampler.stepper.begin(table, request) as runner:
            torch.cuda.set_sync_debug_mode("error")
            try:
                left = table.S
                while left:
                    left -= runner.run(left)
            except RuntimeError as error:
                raise ProblemError(f"the {name} loop must not wait for the GPU, got {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return f"{', '.join(samplers)}: nothing waits for the GPU in {table.S} steps"


def check_launches(device: torch.device) -> str:
    """Kernels per step of a replayed graph, as the profiler sees them."""
    sampler, _ = _replaying(device)
    with tempfile.TemporaryDirectory(prefix="fastddpm-doctor-") as folder:
        found = profiling.trace(sampler, Path(folder, "trace.json"), batch=PICTURES, steps=STEPS, steps_only=True)
    if not found.launches:
        raise ProblemError("the profiler must see kernels, got none; it may not be allowed to (CUPTI, permissions)")
    return f"{found.launches:.1f} kernels per step, {found.busy_ms:.3g} of {found.wall_ms:.3g} ms are theirs"


def check_copy(device: torch.device) -> str:
    """GB/s, read and written, of a copy far larger than the caches."""
    return f"{_copy_gb_s(device):.0f} GB/s"


def check_speed(kernel: str, device: torch.device) -> str:
    """GB/s of a kernel at a size several times the caches', and its share of the copy's.

    Raises:
        ValueError: it computes something else than what it replaces.
    """
    case = _case(kernel)
    copy = _copy_gb_s(device)
    # Ours and what it is compared with; a third contender would have to be compiled first.
    found = cases.measure(dataclasses.replace(case, contenders=case.contenders[:2]), "cuda", EFFORT, copy)
    ours = found["contenders"][0]
    size = "×".join(map(str, case.shape))
    return f"{size}: {ours['gb_s']:.0f} GB/s, {ours['of_copy']:.0%} of the copy's ({ours['ms']['p50'] * 1e3:.1f} µs)"


def _case(kernel: str) -> cases.Case:
    pictures, hidden = kernels.PICTURES["cuda"][-1], kernels.HIDDEN["cuda"][0]
    if kernel == "p_sample":
        return kernels.update_case(pictures, False, "cuda")
    if kernel == "q_sample":
        return kernels.noising_case(pictures, False, False, "cuda")
    return kernels.norm_case(hidden, True, "cuda")


@functools.cache
def _copy_gb_s(device: torch.device) -> float:
    return Peaks("cuda").copy()


@functools.cache
def _replaying(device: torch.device) -> tuple[Sampler, CountingCapture]:
    """A sampler that replays, for all checks: to compile its step takes longest."""
    capture = CountingCapture()
    return small_sampler(device, "cuda_graph", Gpu(graphs=True, capture=capture)), capture
