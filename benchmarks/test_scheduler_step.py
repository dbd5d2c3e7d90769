"""The update with its noise at [1, 3, 32, 32]: ours against diffusers' DDPMScheduler.step, one process.

Between calls of the compiled step there is nothing but the loop, as in `Sampler.sample`.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastddpm.bench.workloads import Half, Job
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.sampler import Sampler
from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec

SHAPE = (3, 32, 32)
STEPS = 1000
ROUNDS = 7
ATOL = 1e-4
JOB = Job("", {}, SHAPE, 1000, None, "", "", None, "", torch.get_num_threads())


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@pytest.mark.benchmark(group="update")
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_step_around_a_network_that_costs_nothing(benchmark: BenchmarkFixture, engine: Any) -> None:  # noqa: ANN401
    """Assert that both end at the same pictures, then time them in turn; the compiled one's bar is a ratio of 8."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(STEPS)
    network, schedule = Half(), NoiseSchedule.linear(1000, dtype=torch.float32)
    sampler = Sampler(network, schedule, ModelSpec(SHAPE), device="cpu", engine=engine)

    def ours() -> Tensor:
        return sampler.sample(1, solver="ddpm", timesteps=JOB.timesteps(STEPS), output="raw", progress=False)

    def theirs(start: Tensor | None = None) -> Tensor:
        x = torch.randn(1, *SHAPE) if start is None else start
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        return x

    noises = iter([JOB.noise(1, t) for t in JOB.timesteps(STEPS) if t > 0])
    with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises)):
        expected = theirs(JOB.noise(1, X_T_COUNTER))
    torch.testing.assert_close(ours(), expected, rtol=0.0, atol=ATOL)
    pairs = np.array([(_seconds(theirs), _seconds(ours)) for _ in range(ROUNDS)])
    benchmark.extra_info.update(
        diffusers_us_per_step=float(np.median(pairs[:, 0])) / STEPS * 1e6,
        us_per_step=float(np.median(pairs[:, 1])) / STEPS * 1e6,
        ratio_to_diffusers=float(np.median(pairs[:, 0] / pairs[:, 1])),
    )
    benchmark.pedantic(ours, rounds=3)  # type: ignore[no-untyped-call]
