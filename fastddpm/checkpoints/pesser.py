"""Ho et al.'s networks in PyTorch, as pesser/pytorch_diffusion converts and stores them: a bare state dict.

ermongroup/ddim trains the same network; its ckpt.pth is a list [model, optimizer, epoch, step, ema].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastddpm.checkpoints.base import check_channels
from fastddpm.checkpoints.dialect import UNetDialect
from fastddpm.checkpoints.flags import Flags, level_sizes
from fastddpm.checkpoints.reading import highest_index
from fastddpm.checkpoints.renaming import Kind, Names, Part
from fastddpm.nets.unet import UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

_SCHEDULES = ("quad", "linear", "warmup10", "warmup50", "const", "jsd", "sigmoid")
_DIFFUSION = ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps", "model_var_type")
_MODEL = ("resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout")
FLAGS = (*_MODEL, "resamp_with_conv", *_DIFFUSION, "image_size", "model")

_LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000}
_LSUN = {**_LINEAR, "resolution": 256, "model_var_type": "fixedsmall"}
PRESETS: dict[str, dict[str, object]] = {
    "cifar10": {**_LINEAR, "resolution": 32, "model_var_type": "fixedlarge"},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_church": _LSUN,
}
PRESETS |= {f"ema_{name}": flags for name, flags in PRESETS.items()}


def _config(state: Mapping[str, Tensor], flags: Flags) -> UNetConfig:
    """The structure, from the weights' names and shapes."""
    flags.require(*(() if "image_size" in flags else ("resolution",)), *_DIFFUSION)
    levels = highest_index(state, "down.") + 1
    size = flags.size(("image_size", "resolution"), levels)
    layers = highest_index(state, "down.0.block.") + 1
    ch, stem = state["temb.dense.0.weight"].shape[1], state["conv_in.weight"].shape
    channels = tuple(state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels))
    out = state["conv_out.weight"].shape[0]
    config = UNetConfig(
        sample_size=size,
        in_channels=stem[1],
        out_channels=out,
        channels=channels,
        stem_channels=stem[0],
        embedding_channels=ch,
        layers=layers,
        attention=tuple(f"down.{i}.attn.0.q.weight" in state for i in range(levels)),
        norm_groups=32,
        norm_eps=1e-6,
        conv_resample=levels == 1 or "down.0.downsample.conv.weight" in state,
        downsample_padding="asymmetric",
        embedding="sin_cos",
        embedding_shift=1.0,
    )
    check_channels(flags.source, stem[1], out, stem[1])
    flags.agree(
        in_channels=stem[1],
        out_ch=out,
        ch=ch,
        ch_mult=tuple(width / ch for width in channels),
        num_res_blocks=layers,
        resamp_with_conv=config.conv_resample,
    )
    trained = flags.size(("resolution", "image_size"), levels)
    flags.agree_attention("attn_resolutions", config.attention, *level_sizes(trained, levels))
    return config


def _process(config: UNetConfig, state: Mapping[str, Tensor], flags: Flags) -> tuple[NoiseSchedule, ModelSpec]:
    variance = flags.choice("model_var_type", ("fixedlarge", "fixedsmall"))
    spec = ModelSpec(
        (config.in_channels, *config.sample_size),
        variance="fixed_large" if variance == "fixedlarge" else "fixed_small",
        prev_timestep="chain",
        to_bytes="truncate",
    )
    return _schedule(flags), spec


def _schedule(flags: Flags) -> NoiseSchedule:
    kind, T = flags.choice("beta_schedule", _SCHEDULES), flags.integer("num_diffusion_timesteps")
    start, end = flags.number("beta_start"), flags.number("beta_end")
    if kind == "linear":
        return NoiseSchedule.linear(T, start, end)
    if kind == "quad":
        return NoiseSchedule.scaled_linear(T, start, end)
    if kind == "sigmoid":  # ermongroup's
        return NoiseSchedule.logistic(T, start, end)
    if kind == "jsd":
        return NoiseSchedule.from_betas(1.0 / torch.linspace(T, 1, T, dtype=torch.float64))
    betas = torch.full((T,), end, dtype=torch.float64)
    if kind.startswith("warmup"):
        warm = int(T * int(kind.removeprefix("warmup")) / 100)
        betas[:warm] = torch.linspace(start, end, warm, dtype=torch.float64)
    return NoiseSchedule.from_betas(betas)


def names_of(config: UNetConfig) -> Names:
    """What this dialect calls the parts of a network."""

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            return f"mid.attn_{i + 1}" if kind == "attention" else f"mid.block_{i + 1}"
        if kind == "resample":
            return f"{part}.{level}.{part}sample"
        return f"{part}.{level}.{'attn' if kind == 'attention' else 'block'}.{i}"

    return Names(
        fixed={"time_mlp.0": "temb.dense.0", "time_mlp.2": "temb.dense.1", "stem": "conv_in", "norm_out": "norm_out",
               "conv_out": "conv_out"},
        block={"norm1": "norm1", "conv1": "conv1", "time": "temb_proj", "norm2": "norm2", "conv2": "conv2",
               "skip": "nin_shortcut"},
        norm="norm", qkv=("q", "k", "v"), out="proj_out", down_conv="conv", up_conv="conv", place=place,
    )  # fmt: skip


DIALECT = UNetDialect(
    name="pesser",
    reason="keys temb.dense and down.0.block",
    entries=("temb.dense.0.weight", "down.0.block.0.norm1.weight"),
    flags=FLAGS,
    config=_config,
    process=_process,
    names=names_of,
    presets=PRESETS,
)
