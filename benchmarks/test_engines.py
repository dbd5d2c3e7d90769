"""Engines and precisions on the shipped network, against the eager engine in float32, in one process."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastddpm import Sampler
from fastddpm.bench.figures import PSNR_DB, psnr

STEPS = 10
ROUNDS = 5
ATOL = 1e-3  # of a pixel in [0, 1], after the whole run


def _draw(sampler: Sampler, batch: int) -> Tensor:
    return sampler.sample(
        batch, class_labels=[i % 10 for i in range(batch)], solver="ddpm", steps=STEPS, progress=False
    )


def _seconds(sampler: Sampler, batch: int) -> float:
    began = time.perf_counter()
    _draw(sampler, batch)
    return time.perf_counter() - began


@pytest.mark.benchmark(group="engines")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("batch", [1, 16])
def test_digits(benchmark: BenchmarkFixture, batch: int, engine: Any, precision: Any) -> None:  # noqa: ANN401
    """Assert that the digits are the eager engine's, then time both in turn; the first run's time is told apart."""
    eager = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    sampler = Sampler.from_pretrained("mnist", device="cpu", engine=engine, precision=precision)
    first = _seconds(sampler, batch)
    drawn, expected = _draw(sampler, batch), _draw(eager, batch)
    quality = psnr(drawn.numpy(), expected.numpy())
    if precision == "fp32":
        torch.testing.assert_close(drawn, expected, rtol=0.0, atol=ATOL)
    else:
        assert quality >= PSNR_DB
    pairs = np.array([(_seconds(eager, batch), _seconds(sampler, batch)) for _ in range(ROUNDS)])
    benchmark.extra_info.update(
        first_run_s=first,
        eager_ms_per_step=float(np.median(pairs[:, 0])) / STEPS * 1e3,
        ms_per_step=float(np.median(pairs[:, 1])) / STEPS * 1e3,
        ratio_to_eager=float(np.median(pairs[:, 0] / pairs[:, 1])),
        psnr_db=None if np.isinf(quality) else quality,
    )
    benchmark.pedantic(_draw, args=(sampler, batch), rounds=3)  # type: ignore[no-untyped-call]
