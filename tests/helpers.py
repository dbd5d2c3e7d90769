"""What several tests share: where data outside the repository is, and a run of a step table."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.kernels.operands import Operands
from fastddpm.kernels.p_sample import p_sample_reference
from fastddpm.process.reference import Model
from fastddpm.process.table import StepTable, dynamic_bound


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable) or Path(__file__).resolve().parents[2] / "shared" / default)
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder}; {variable} may name another")
    return folder


def peers_dir() -> Path:
    """The fixtures that other projects' code made: $FASTDDPM_PEERS, or ../shared/peers; skips if absent."""
    return _folder("FASTDDPM_PEERS", "peers")


@functools.cache
def oracle(peer: str) -> dict[str, Tensor]:
    """What a peer's own code gave: the arrays of its `oracle.npz`. They are shared, so nobody may change them."""
    with np.load(peers_dir() / peer / "oracle.npz") as data:
        return {key: torch.from_numpy(np.asarray(data[key])) for key in data.files}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the largest number."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def mnist_dir() -> Path:
    """MNIST's idx files: $FASTDDPM_MNIST, or ../shared/data/mnist; skips if absent."""
    return _folder("FASTDDPM_MNIST", "data/mnist")


def run_table(table: StepTable, model: Model, x_T: Tensor, z: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """Drive a whole run of a table with the plain kernel; noise z [S, B, C, H, W], or Philox's own."""
    x, batch = x_T.float(), x_T.shape[0]
    histories = [torch.full_like(x, torch.nan)] * table.history
    ids, seeds, end = torch.arange(batch), torch.full((batch,), seed), torch.full((batch,), table.S)
    for i in range(table.S):
        step = torch.full((batch,), i)
        out = model(x, table.timesteps[step])
        bound = None if table.threshold is None else dynamic_bound(x, out, table.rows[step], table.threshold)
        noise = None if z is None else z[i : i + 1].float()
        past = dict(zip(("history", "history2"), histories, strict=False))
        given = Operands(
            x, out, table.rows, table.timesteps, step, end, ids, seeds, noise=noise, bound=bound, **past
        )  # fmt: skip
        x, *histories = p_sample_reference(given, stochastic=table.uses_noise)
        histories = histories[: table.history]
    return x


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition holds within so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
