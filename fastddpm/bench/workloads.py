"""What is measured: networks, batch sizes, steps, and who takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastddpm.process.spec import Variance

_CIFAR10: dict[str, object] = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
_CELEBAHQ: dict[str, object] = {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
_GOOGLE: dict[str, object] = {
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
        steps: sampling steps of one timed run, one for each batch size; divisors of T. So many that what a call costs
            besides them, which users' hundreds of steps make nothing of, is a few hundredths at most.
        peers: names of the peers that always take part, in the order in which they get ready: a compiler that takes
            longer than it may must not cost the others their turn.
        more: names of those that take part where time is left, in this order.
        model: what `Sampler.from_pretrained` takes; "" for a network made here, or for none at all (the update alone).
        flags: the flags of that checkpoint.
        unet: configuration (diffusers' names) of a network with random weights, or None.
        variance: variance of the random network.
        lucidrains: arguments of a U-Net of similar size in denoising-diffusion-pytorch, or None.
        cold_s: seconds that `peers` take at a batch size when nothing is compiled yet, on two cores: kept free.
    """

    name: str
    title: str
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    peers: tuple[str, ...]
    more: tuple[str, ...] = ()
    model: str = ""
    flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    unet: Mapping[str, object] | None = None
    variance: Variance = "fixed_large"
    lucidrains: Mapping[str, object] | None = None
    cold_s: float = 60.0

    @property
    def is_update(self) -> bool:
        """Whether only the update is measured, around a network that costs nothing."""
        return not self.model and self.unet is None

    @property
    def everyone(self) -> tuple[str, ...]:
        """All peers that may take part."""
        return (*self.peers, *self.more)


_CORE = ("reference", "fastddpm-eager", "diffusers", "onnxruntime", "openvino", "fastddpm-compiled")
_MORE = ("fastddpm-compiled-bf16", "openvino-bf16", "fastddpm-openvino", "lucidrains", "diffusers-compiled",
         "diffusers-bf16", "diffusers-compiled-bf16")  # fmt: skip
_ON_GPU = ("fastddpm-eager", "fastddpm-compiled", "fastddpm-graph", "diffusers", "diffusers-reduced")
GPU_PEERS = ("reference", *(f"{name}-{precision}" for precision in ("tf32", "bf16") for name in _ON_GPU),
             "reference-tf32")  # fmt: skip

_MNIST_UNET = {"dim": 32, "dim_mults": [1, 2, 3], "channels": 1}
_CIFAR10_UNET = {"dim": 128, "dim_mults": [1, 2, 2, 2], "channels": 3}

_UPDATE = Workload("update", "the update alone, [B, 3, 32, 32]", (1,), (1000,),
                   ("reference", "fastddpm-eager", "diffusers", "fastddpm-compiled"))  # fmt: skip
_MNIST = Workload("mnist", "the shipped 28×28 model", (1, 16, 64), (20, 10, 4), _CORE,
                  (*_MORE[:3], "lucidrains", "diffusers-compiled"), "mnist",
                  lucidrains=_MNIST_UNET, cold_s=110)  # fmt: skip
_CIFAR10_NET = Workload("cifar10", "the U-Net of google/ddpm-cifar10-32, random weights", (1, 8), (10, 4), _CORE, _MORE,
                        unet={**_GOOGLE, **_CIFAR10}, lucidrains=_CIFAR10_UNET, cold_s=170)  # fmt: skip
_CELEBAHQ_NET = Workload("celebahq256", "the U-Net of google/ddpm-celebahq-256, random weights", (1,), (1,), _CORE[1:],
                         ("openvino-bf16", "fastddpm-compiled-bf16", "fastddpm-openvino"),
                         unet={**_GOOGLE, **_CELEBAHQ}, variance="fixed_small", cold_s=360)  # fmt: skip

FULL = (_CIFAR10_NET, _MNIST, _UPDATE, _CELEBAHQ_NET)
QUICK = (
    dataclasses.replace(_MNIST, batches=(1,), steps=(10,), more=("openvino",),
                        peers=("reference", "fastddpm-eager", "diffusers", "onnxruntime", "fastddpm-compiled")),
)  # fmt: skip
ON_GPU = (
    dataclasses.replace(_CIFAR10_NET, batches=(1, 16, 128, 512), steps=(20, 20, 10, 10), peers=GPU_PEERS, more=()),
    dataclasses.replace(_CELEBAHQ_NET, batches=(1, 8, 32), steps=(20, 10, 10), peers=GPU_PEERS, more=()),
)
QUICK_ON_GPU = (dataclasses.replace(ON_GPU[0], batches=(1, 128), steps=(50, 20)),)
NAMES = tuple(workload.name for workload in FULL)


def standard(quick: bool, device: str) -> tuple[Workload, ...]:
    """The project's own workloads on a kind of device: larger ones on GPUs."""
    if device == "cuda":
        return QUICK_ON_GPU if quick else ON_GPU
    return QUICK if quick else FULL


def choose(names: Sequence[str], quick: bool, device: str = "cpu") -> list[Workload]:
    """The standard workloads of these names; all of them for no names.

    Raises:
        ValueError: a name is unknown.
    """
    there = {workload.name: workload for workload in standard(quick, device)}
    wrong = [name for name in names if name not in NAMES]
    if wrong:
        raise ValueError(f"--workloads must be among {', '.join(NAMES)}, got {wrong[0]!r}; correct it")
    whole = {workload.name: workload for workload in (*FULL, *standard(False, device))}
    return [there.get(name, whole[name]) for name in names] if names else list(there.values())


def for_model(
    model: str, flags: Mapping[str, object], batches: Sequence[int], quick: bool, device: str = "cpu"
) -> Workload:
    """The workload of somebody's own checkpoint."""
    if model == "mnist" and not batches and device == "cpu":
        return choose(["mnist"], quick)[0]
    sizes = tuple(sorted(set(batches))) or ((1,) if quick else (1, 8))
    steps = tuple(4 if size < 16 else 2 for size in sizes)
    peers, more = (QUICK[0].peers, QUICK[0].more) if quick else (_CORE, tuple(n for n in _MORE if n != "lucidrains"))
    if device == "cuda":
        peers, more, steps = GPU_PEERS, (), tuple(50 if size < 64 else 10 for size in sizes)
    return Workload(Path(model).stem or "model", model, sizes, steps, peers, more, model, flags, cold_s=120)
