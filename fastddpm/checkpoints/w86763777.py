"""Checkpoints of w86763777/pytorch-ddpm: a dict with net_model, ema_model, sched, optim, step and x_T."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError, check_channels
from fastddpm.checkpoints.dialect import UNetDialect
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.reading import highest_index
from fastddpm.checkpoints.renaming import Kind, Names, Part
from fastddpm.nets.blocks import timestep_embedding
from fastddpm.nets.unet import UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec, Prediction

TABLE = "time_embedding.timembedding.0.weight"
_REQUIRED = ("beta_1", "beta_T", "mean_type", "var_type")
FLAGS = (*_REQUIRED, "img_size", "image_size", "T", "ch", "ch_mult", "attn", "num_res_blocks", "dropout", "model")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "xstart": "x_start", "xprev": "x_prev"}


def _check_times(state: Mapping[str, Tensor], source: str) -> int:
    """T, from the frozen table of time embeddings, which must be the one that we compute."""
    table = state.get(TABLE)
    if table is None or table.ndim != 2 or not table.is_floating_point() or table.shape[1] % 2:
        raise CheckpointError(f"{source}: {TABLE} must be a table [T, even width]; fetch the file again")
    ours = timestep_embedding(torch.arange(len(table)), table.shape[1], order="interleaved", shift=0.0)
    # Sines of large arguments, rounded once differently: 1e-3 leaves room for a million steps.
    if not bool(((ours - table.float()).abs() < 1e-3).all()):
        raise CheckpointError(f"{source}: {TABLE} must hold the sinusoids of 0 … T−1, got others; it was changed")
    return len(table)


def _config(state: Mapping[str, Tensor], flags: Flags) -> UNetConfig:
    """The structure, from the weights' names and shapes."""
    flags.require(*_REQUIRED, *(() if "image_size" in flags else ("img_size",)))
    flags.agree(T=_check_times(state, flags.source))
    count = highest_index(state, "downblocks.") + 1
    strided = [i for i in range(count) if f"downblocks.{i}.main.weight" in state]
    layers, levels = (strided[0] if strided else count), len(strided) + 1
    firsts = [level * (layers + 1) for level in range(levels)]
    size = flags.size(("image_size", "img_size"), levels)
    head = state["head.weight"].shape
    ch = state[TABLE].shape[1]
    channels = tuple(state[f"downblocks.{i}.block1.2.weight"].shape[0] for i in firsts)
    config = UNetConfig(
        sample_size=size,
        in_channels=head[1],
        out_channels=state["tail.2.weight"].shape[0],
        channels=channels,
        stem_channels=head[0],
        embedding_channels=ch,
        layers=layers,
        attention=tuple(f"downblocks.{i}.attn.proj_q.weight" in state for i in firsts),
        norm_groups=32,
        norm_eps=1e-5,
        embedding="interleaved",
        embedding_shift=0.0,
    )
    check_channels(flags.source, config.in_channels, config.out_channels, config.in_channels)
    flags.agree(ch=ch, ch_mult=tuple(width / ch for width in channels), num_res_blocks=layers)
    flags.agree_attention("attn", config.attention, list(range(levels)))
    return config


def _process(config: UNetConfig, state: Mapping[str, Tensor], flags: Flags) -> tuple[NoiseSchedule, ModelSpec]:
    betas = torch.linspace(flags.number("beta_1"), flags.number("beta_T"), len(state[TABLE])).double()
    variance = flags.choice("var_type", ("fixedlarge", "fixedsmall"))
    spec = ModelSpec(
        (config.in_channels, *config.sample_size),
        prediction=_PREDICTIONS[flags.choice("mean_type", tuple(_PREDICTIONS))],
        variance="fixed_large" if variance == "fixedlarge" else "fixed_small",
        clip=None,  # its clipping of x_0 comes after the mean has been computed
    )
    return NoiseSchedule.from_betas(betas), spec


def names_of(config: UNetConfig) -> Names:
    """What this dialect calls the parts of a network."""
    levels, layers = len(config.channels), config.layers

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            prefix = f"middleblocks.{i}"
        elif part == "down":
            prefix = f"downblocks.{level * (layers + 1) + i}"
        else:
            prefix = f"upblocks.{(levels - 1 - level) * (layers + 2) + i}"
        return f"{prefix}.attn" if kind == "attention" else prefix

    return Names(
        fixed={"time_mlp.0": "time_embedding.timembedding.1", "time_mlp.2": "time_embedding.timembedding.3",
               "stem": "head", "norm_out": "tail.0", "conv_out": "tail.2"},
        block={"norm1": "block1.0", "conv1": "block1.2", "time": "temb_proj.1", "norm2": "block2.0",
               "conv2": "block2.3", "skip": "shortcut"},
        norm="group_norm", qkv=("proj_q", "proj_k", "proj_v"), out="proj", down_conv="main", up_conv="main",
        place=place,
    )  # fmt: skip


DIALECT = UNetDialect(
    name="w86763777",
    reason="keys time_embedding.timembedding and downblocks",
    entries=(TABLE, "downblocks.0.block1.0.weight"),
    flags=FLAGS,
    config=_config,
    process=_process,
    names=names_of,
    constants=(TABLE,),
)
