"""What a worker is told about a workload, and the files that all workers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.bench.twins import NoTwinError, random_checkpoint, twin_folder
from fastddpm.bench.workloads import Workload
from fastddpm.checkpoints import load_checkpoint
from fastddpm.common.records import Record
from fastddpm.process.noise import normals
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

SEED = 0
"""Seed of the noise that all peers start from."""


class Half(nn.Module):
    """A network that costs next to nothing: ε̂ = x/2. What remains of a step is everything outside the network."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Half of x."""
        return 0.5 * x


@dataclasses.dataclass(frozen=True)
class Job(Record):
    """A workload as plain JSON data.

    Attributes:
        model: a checkpoint, or "" for `Half`.
        flags: its flags.
        shape: (C, H, W).
        T: training steps.
        classes: number of classes, or None.
        folder: the same network as a folder of diffusers, or "".
        why_no_folder: why there is none.
        lucidrains: arguments of a U-Net of similar size, or None.
        scratch: a folder for files that workers share.
        threads: CPU threads.
        device: "cpu" or "cuda".
        steps_only: whether a timed run is the steps alone, and not the call as users make it, which also makes the
            start and hands out pictures. So on GPUs, where a run of few steps must stand for one of many.
        dry: whether compilers only trace: for tests of this machinery.
        batches: the batch sizes that will be asked for.
    """

    model: str
    flags: Mapping[str, object]
    shape: tuple[int, int, int]
    T: int
    classes: int | None
    folder: str
    why_no_folder: str
    lucidrains: Mapping[str, object] | None
    scratch: str
    threads: int
    device: str = "cpu"
    steps_only: bool = False
    dry: bool = False
    batches: tuple[int, ...] = (1,)

    def without_network(self) -> Job:
        """The same shapes around a network that costs nothing."""
        return dataclasses.replace(self, model="", flags={}, classes=None, folder="", why_no_folder="")

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps of a run: diffusers' "leading" spacing, which ends at 0."""
        stride = self.T // steps
        return [i * stride for i in reversed(range(steps))]

    def labels(self, batch: int) -> Tensor | None:
        """The classes of a batch, in turn."""
        return None if self.classes is None else torch.arange(batch) % self.classes

    def noise(self, batch: int, t: int) -> Tensor:
        """Philox noise at timestep t, float32 [B, C, H, W]: what the engine makes by itself, for the others."""
        ids = torch.arange(batch)
        return normals(torch.full_like(ids, SEED), ids, torch.full_like(ids, t), self.shape)


def update_parts(shape: tuple[int, int, int], T: int) -> tuple[NoiseSchedule, ModelSpec]:
    """Schedule and conventions around `Half`: Ho et al.'s."""
    return NoiseSchedule.linear(T, dtype=torch.float32), ModelSpec(shape)


def make_job(
    workload: Workload, folder: Path, *, threads: int, device: str = "cpu", steps_only: bool = False, dry: bool = False
) -> Job:
    """Make a workload's files and say where they are.

    Args:
        workload: what is measured.
        folder: for the files.
        threads: as in `Job`, and so are device, steps_only and dry.
        device: "cpu" or "cuda".
        steps_only: whether a timed run is the steps alone.
        dry: whether compilers only trace.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    update = Job("", {}, (3, 32, 32), 1000, None, "", "", None, str(folder), threads, device, steps_only, dry,
                 workload.batches)  # fmt: skip
    if workload.is_update:
        return update
    model, flags = workload.model, workload.flags
    if workload.unet is not None:
        model = str(random_checkpoint(folder / "random", workload.unet, workload.variance))
    checkpoint = load_checkpoint(model, **flags)
    twin, why = "", ""
    try:
        twin = str(twin_folder(folder / "diffusers", checkpoint))
    except (NoTwinError, ImportError) as error:
        why = str(error)
    spec = checkpoint.spec
    return dataclasses.replace(
        update, model=model, flags=flags, shape=spec.shape, T=checkpoint.schedule.T, classes=spec.num_classes,
        folder=twin, why_no_folder=why, lucidrains=workload.lucidrains,
    )  # fmt: skip
