"""One reverse DDPM step on the CPU: the fused update against the textbook, element by element the same.

Both start from the network's output, so that the network's time, which is the same for both, is left out.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastddpm.kernels import normals_reference, p_sample
from fastddpm.reference import p_mean_variance
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers import ddpm_table

T = 1000
STEP = 500  # halfway: clipping, both means and the noise all take part
ATOL = 1e-5  # float32 rounding of values below 10, in two orders of summation
ROUNDS = 40
SHAPES = {"cifar-b64": (64, 3, 32, 32), "256px-b4": (4, 3, 256, 256)}


def _seconds(function: Callable[[], object]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


@pytest.fixture(scope="module")
def peak_gb_per_s() -> float:
    """What this machine's memory gives to a copy far larger than its caches, measured in this run."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9


@pytest.mark.benchmark(group="p_sample")
@pytest.mark.parametrize("supplied", [True, False], ids=["noise-given", "noise-made"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_p_sample(
    benchmark: BenchmarkFixture, peak_gb_per_s: float, shape: tuple[int, int, int, int], supplied: bool
) -> None:
    """Assert that both give the same state, then time both."""
    generator = torch.Generator().manual_seed(0)
    x, out, z = (torch.randn(shape, generator=generator) for _ in range(3))
    schedule = NoiseSchedule.linear(T)
    table = ddpm_table(schedule, torch.arange(T - 1, -1, -1))
    B, numel = shape[0], x[0].numel()
    step, end = torch.full((B,), STEP), torch.full((B,), table.S)
    ids, seed = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    t = torch.full((B,), T - 1 - STEP)
    noise = z[None] if supplied else None

    def textbook() -> Tensor:
        p = p_mean_variance(schedule, out, x, t)
        drawn = z if supplied else normals_reference(seed, ids, t, numel).reshape(shape)
        return p.mean + (0.5 * p.log_variance).exp() * drawn

    def fused(state: Tensor) -> None:
        p_sample(state, out, table.rows, table.timesteps, step, end, ids, seed, noise=noise)

    state = x.clone()
    fused(state)
    torch.testing.assert_close(state, textbook(), rtol=0.0, atol=ATOL)

    reference = _seconds(textbook)
    # The state is updated in place again and again; it stays bounded, because a step's c_x is below 1.
    benchmark(fused, state)
    stats: Any = benchmark.stats
    fused_p50 = float(np.median(stats.stats.data))
    # What must move at the least: x and out read, x written, and the noise read where it is supplied.
    moved = x.nbytes * (4 if supplied else 3)
    benchmark.extra_info.update(
        reference_p50=reference,
        speedup=reference / fused_p50,
        gb_per_s=moved / fused_p50 / 1e9,
        peak_gb_per_s=peak_gb_per_s,
    )
