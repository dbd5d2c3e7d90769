"""What is measured: networks, batch sizes, steps, and who takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastddpm.noise import normals
from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec

SEED = 0
"""Seed of the noise that all peers start from."""

_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
_CELEBAHQ: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
_GOOGLE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "downsample_padding": 0, "flip_sin_to_cos": False,
    "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 32, "attention_head_dim": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """One network and what is done with it.

    Attributes:
        name: short name, as in `--workloads`.
        title: for people.
        batches: batch sizes, ascending.
        steps: sampling steps of one timed run, one for each batch size; divisors of T.
        peers: names of the peers that take part, the most important first.
        model: what `Sampler.from_pretrained` takes; "" for a network made here, or for none at all (the update alone).
        flags: the flags of that checkpoint.
        unet: configuration (diffusers' names) of a network with random weights, or None.
        variance: diffusers' variance_type of the random network.
        lucidrains: arguments of a U-Net of similar size in denoising-diffusion-pytorch, or None.
        share: weight of the workload when the time is shared out.
    """

    name: str
    title: str
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    peers: tuple[str, ...]
    model: str = ""
    flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    unet: Mapping[str, Any] | None = None
    variance: str = "fixed_large"
    lucidrains: Mapping[str, Any] | None = None
    share: float = 1.0

    @property
    def is_update(self) -> bool:
        """Whether only the update is measured, around a network that costs nothing."""
        return not self.model and self.unet is None


OURS = ("fastddpm-compiled", "fastddpm-eager", "fastddpm-compiled-bf16")
_THEIRS = ("diffusers", "onnxruntime", "diffusers-compiled", "lucidrains", "openvino")
_BF16 = ("openvino-bf16", "diffusers-bf16", "diffusers-compiled-bf16")
ALL_PEERS = (*OURS, *_THEIRS, "reference", *_BF16)

_MNIST_UNET = {"dim": 32, "dim_mults": [1, 2, 3], "channels": 1}
_CIFAR10_UNET = {"dim": 128, "dim_mults": [1, 2, 2, 2], "channels": 3}

FULL = (
    Workload("update", "the update alone, [B, 3, 32, 32]", (1,), (1000,),
             ("fastddpm-compiled", "fastddpm-eager", "diffusers", "reference")),
    Workload("mnist", "the shipped 28×28 model", (1, 16, 64), (20, 10, 4),
             (*OURS, *_THEIRS, "reference", "openvino-bf16"), "mnist", lucidrains=_MNIST_UNET, share=5),
    Workload("cifar10", "the U-Net of google/ddpm-cifar10-32, random weights", (1, 8), (5, 2), ALL_PEERS,
             unet={**_GOOGLE, **_CIFAR10}, lucidrains=_CIFAR10_UNET, share=7),
    Workload("celebahq256", "the U-Net of google/ddpm-celebahq-256, random weights", (1,), (2,),
             (*OURS, "diffusers", "onnxruntime", "openvino", "openvino-bf16"),
             unet={**_GOOGLE, **_CELEBAHQ}, variance="fixed_small", share=4),
)  # fmt: skip
QUICK = (
    Workload("mnist", FULL[1].title, (1, 16), (10, 4),
             ("fastddpm-compiled", "fastddpm-eager", "diffusers", "onnxruntime", "reference"), "mnist", share=3),
    Workload("update", FULL[0].title, (1,), (1000,), ("fastddpm-compiled", "fastddpm-eager", "diffusers")),
    Workload("cifar10", FULL[2].title, (1,), (2,), ("fastddpm-eager", "diffusers"), unet=FULL[2].unet),
)  # fmt: skip
NAMES = tuple(workload.name for workload in FULL)


def choose(names: Sequence[str], quick: bool) -> list[Workload]:
    """The standard workloads of these names; all of them for no names.

    Raises:
        ValueError: a name is unknown.
    """
    there = {workload.name: workload for workload in (QUICK if quick else FULL)}
    wrong = [name for name in names if name not in NAMES]
    if wrong:
        raise ValueError(f"--workloads must be among {', '.join(NAMES)}, got {wrong[0]!r}; correct it")
    whole = {workload.name: workload for workload in FULL}
    return [there.get(name, whole[name]) for name in names] if names else list(there.values())


def for_model(model: str, flags: Mapping[str, object], batches: Sequence[int], quick: bool) -> Workload:
    """The workload of somebody's own checkpoint."""
    if model == "mnist" and not batches:
        return choose(["mnist"], quick)[0]
    sizes = tuple(sorted(set(batches))) or ((1,) if quick else (1, 8))
    peers = QUICK[0].peers if quick else tuple(name for name in ALL_PEERS if name != "lucidrains")
    return Workload(
        Path(model).stem or "model", model, sizes, tuple(4 if size < 16 else 2 for size in sizes), peers, model, flags
    )


class Half(nn.Module):
    """A network that costs next to nothing: ε̂ = x/2. What remains of a step is everything outside the network."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Half of x."""
        return 0.5 * x


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is told about a workload, as plain JSON data.

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
    """

    model: str
    flags: Mapping[str, Any]
    shape: tuple[int, int, int]
    T: int
    classes: int | None
    folder: str
    why_no_folder: str
    lucidrains: Mapping[str, Any] | None
    scratch: str
    threads: int
    device: str = "cpu"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """From JSON."""
        return cls(**{**values, "shape": tuple(values["shape"])})

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


Precision = Literal["fp32", "bf16"]
