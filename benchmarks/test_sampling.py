"""A whole run of the shipped network: the engine against the textbook loop, which draws the same pictures.

Both call the same network, so the ratio says what the engine saves around it: the time embedding, the scheduler's
arithmetic and the noise.
"""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastddpm import Sampler
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.noise import normals
from fastddpm.reference import p_sample_loop

STEPS = 20
ATOL = 1e-4  # what the engine promises against the reference after a whole run
ROUNDS = 7


def _timed(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.benchmark(group="sampling")
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_ancestral_digits(benchmark: BenchmarkFixture, batch: int) -> None:
    """Assert that both draw the same digits, then time them in turn."""
    sampler = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    timesteps = sampler.table(solver="ddpm", steps=STEPS).timesteps[:-1]
    ids, y = torch.arange(batch), torch.arange(batch) % 10

    def noise(t: int) -> Tensor:
        return normals(torch.zeros_like(ids), ids, torch.full_like(ids, t), sampler.spec.shape)

    def textbook() -> Tensor:
        z = lambda i: noise(int(timesteps[i]))  # noqa: E731
        return p_sample_loop(
            sampler.network, sampler.schedule, noise(X_T_COUNTER), z, timesteps=timesteps, y=y, variance="fixed_small"
        )

    def engine() -> Tensor:
        return sampler.sample(batch, class_labels=y, solver="ddpm", steps=STEPS, output="raw", progress=False)

    torch.testing.assert_close(engine(), textbook(), rtol=0.0, atol=ATOL)
    pairs = np.array([(_timed(textbook), _timed(engine)) for _ in range(ROUNDS)])
    benchmark.extra_info.update(
        reference_ms_per_step=float(np.median(pairs[:, 0])) / STEPS * 1e3,
        engine_ms_per_step=float(np.median(pairs[:, 1])) / STEPS * 1e3,
        ratio_to_reference=float(np.median(pairs[:, 0] / pairs[:, 1])),
        digits_per_second_at_20_steps=batch / float(np.median(pairs[:, 1])),
    )
    benchmark.pedantic(engine, rounds=3)  # type: ignore[no-untyped-call]
