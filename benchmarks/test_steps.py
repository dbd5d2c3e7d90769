"""A step of a network: ours in its engines and precisions beside diffusers, the other runtimes and the textbook.

On a CPU every peer has a process of its own, because pools of threads spin; on a GPU all share this one.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.tape import TAPE
from fastddpm.bench.entrants import is_ours
from fastddpm.bench.figures import as_json
from fastddpm.bench.runner import WorkloadRun, left_out
from fastddpm.bench.settings import Deadline, Settings
from fastddpm.bench.workloads import FULL, ON_GPU, Workload

MINUTES = 30.0
CASES = {
    f"{device}, {workload.name}, B = {batch}": (device, workload, batch, steps)
    for device, workload in itertools.chain(
        (("cpu", workload) for workload in FULL if workload.name in ("mnist", "update")),
        (("cuda", workload) for workload in ON_GPU),
    )
    for batch, steps in zip(workload.batches, workload.steps, strict=True)
}
pytestmark = pytest.mark.benchmark(group="steps", timer=TAPE)


@pytest.mark.parametrize(("kind", "workload", "batch", "steps"), CASES.values(), ids=CASES.keys())
def test_step(
    kind: str, workload: Workload, batch: int, steps: int, device: str, record: Callable[..., None], tmp_path: Path
) -> None:
    """Assert that all draw the same pictures, then time them in turn."""
    if kind != device:
        pytest.skip("needs a GPU that torch can use" if kind == "cuda" else "for CPUs: --device cpu")
    one = dataclasses.replace(workload, batches=(batch,), steps=(steps,), more=())
    on_gpu = device == "cuda"
    settings = Settings(
        60 * MINUTES, 9, torch.get_num_threads(), device, looks=False, local=on_gpu, steps_only=on_gpu
    )  # fmt: skip
    result = WorkloadRun(one, settings, Deadline(settings.seconds)).measure(tmp_path, {})
    (figures,) = result.batches
    ours = [peer for peer in figures.peers if is_ours(peer.peer) and peer.seconds]
    assert ours, left_out([result])
    best = min(ours, key=lambda peer: min(peer.seconds))
    record([s / steps for s in best.seconds], best=best.peer, left_out=left_out([result]), **as_json(figures))
