"""Classifiers of OpenAI's guided-diffusion (its EncoderUNetModel): a bare state dict and the flags of training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.checkpoints import openai
from fastddpm.checkpoints.base import CheckpointError, blamed_on
from fastddpm.checkpoints.flags import Flags, level_sizes
from fastddpm.checkpoints.networks import choose_network, find_networks
from fastddpm.checkpoints.reading import highest_index, read_file
from fastddpm.checkpoints.renaming import Names, fill_renamed
from fastddpm.nets.classifier import Classifier, ClassifierConfig, Pool
from fastddpm.nets.unet import UNetConfig

HEAD_CHANNELS = 64
"""What guided-diffusion's create_classifier always takes."""
PRESETS: dict[str, dict[str, object]] = {
    "64x64_classifier": {"image_size": 64, "classifier_depth": 4},
    **{f"{size}x{size}_classifier": {"image_size": size, "classifier_depth": 2} for size in (128, 256, 512)},
}
"""The flags of the published classifiers that their weights do not show, as guided-diffusion's README states them."""
# What the weights tell: accepted, and compared with them.
_DERIVED = ("classifier_width", "classifier_attention_resolutions", "classifier_use_scale_shift_norm",
            "classifier_resblock_updown", "classifier_pool")  # fmt: skip
FLAGS = ("image_size", "classifier_depth", "num_head_channels", "model", "classifier_use_fp16", *_DERIVED)


def load_classifier(path: str | os.PathLike[str], **flags: object) -> Classifier:
    """Load a classifier of guided-diffusion: 64x64_classifier.pt and its kind, or one trained by classifier_train.py.

    Args:
        path: The file of weights.
        flags: What it does not determine, under guided-diffusion's own names: `image_size` and `classifier_depth`, and
            `num_head_channels` where that is not 64; or `preset`, the name of a published classifier
            ("256x256_classifier"). Others are compared with the weights.

    Returns:
        (x, t) → logits, in float32 on the CPU, in evaluation mode; its `cond_fn(scale)` guides samples.

    Raises:
        CheckpointError: If there is no such file, it is damaged or no classifier, or a flag is missing or wrong.
    """
    file = Path(path)
    found = find_networks(read_file(file), *openai.DIALECT.entries)
    source = f"{file}, taken for a classifier of guided-diffusion"
    if not found:
        raise CheckpointError(f"{source}: must hold {' and '.join(openai.DIALECT.entries)}, got neither; give another")
    given = Flags(source, flags, FLAGS, PRESETS)
    _, state = choose_network(found, given)
    with blamed_on(given.source):
        config = _config(state, given)
    with torch.device("meta"):
        network = Classifier(config)
    return fill_renamed(network, _names(config), state, given.source).eval().requires_grad_(False)


def _pool(state: Mapping[str, Tensor], source: str) -> Pool:
    """How the bottom becomes a vector, by the names of the last layers.

    Raises:
        CheckpointError: If it is no classifier, or pools in a way that is not supported.
    """
    if any(name.startswith("output_blocks.") for name in state):
        raise CheckpointError(f"{source}: must be a classifier, got a U-Net; give it to fastddpm.load_checkpoint")
    if "out.2.positional_embedding" in state and "out.2.c_proj.weight" in state:
        return "attention"
    if "out.3.weight" in state and state["out.3.weight"].ndim == 4:
        return "adaptive"
    raise CheckpointError(
        f"{source}: classifier_pool must be attention or adaptive, got spatial or spatial_v2 or a file that is cut "
        "short; no other is supported"
    )


def _depth(state: Mapping[str, Tensor], entries: int, updown: bool, flags: Flags) -> int:
    """ResBlocks a level; where one of them changes the resolution, the weights look alike, and the flag says it."""
    if not updown:
        plain = [n for n in range(1, entries) if f"input_blocks.{n}.0.in_layers.0.weight" not in state]
        depth = (plain[0] if plain else entries) - 1
        flags.agree(classifier_depth=depth)
        return depth
    depth = flags.integer("classifier_depth")
    if entries % (depth + 1):
        raise flags.wrong("classifier_depth", f"one less than a divisor of the weights' {entries} input_blocks")
    return depth


def _config(state: Mapping[str, Tensor], flags: Flags) -> ClassifierConfig:
    """The structure, from the weights' names and shapes and the flags."""
    pool = _pool(state, flags.source)
    entries = highest_index(state, "input_blocks.") + 1
    updown = not any(name.startswith("input_blocks.") and ".op." in name for name in state)
    flags.require("image_size", *(("classifier_depth",) if updown else ()))
    depth = _depth(state, entries, updown, flags)
    levels = max(1, entries // (depth + 1))
    firsts = [1 + level * (depth + 1) for level in range(levels)]
    size, base = flags.size(("image_size",), levels), state["time_embed.0.weight"].shape[1]
    _check_size(state, size, levels, flags)
    attention = tuple(f"input_blocks.{n}.1.qkv.weight" in state for n in firsts)
    channels = tuple(state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts)
    stem = state["input_blocks.0.0.weight"].shape
    encoder = UNetConfig(
        sample_size=size,
        in_channels=stem[1],
        channels=channels,
        stem_channels=stem[0],
        embedding_channels=base,
        time_channels=state["time_embed.0.weight"].shape[0],
        layers=depth,
        attention=attention,
        head_channels=flags.integer("num_head_channels", HEAD_CHANNELS),
        attention_order="heads_qkv",
        norm_groups=32,
        norm_eps=1e-5,
        scale_shift=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * channels[0],
        resblock_updown=updown,
        embedding="cos_sin",
        embedding_shift=0.0,
    )
    flags.agree(
        classifier_width=base,
        classifier_use_scale_shift_norm=encoder.scale_shift,
        classifier_resblock_updown=updown,
        classifier_pool=pool,
    )
    flags.agree_attention("classifier_attention_resolutions", attention, *level_sizes(size, levels))
    last = "out.2.c_proj.weight" if pool == "attention" else "out.3.weight"
    return ClassifierConfig(encoder, state[last].shape[0], pool)


def _check_size(state: Mapping[str, Tensor], size: tuple[int, int], levels: int, flags: Flags) -> None:
    """Compare the pictures' size and the number of levels with the positions that the head knows.

    Raises:
        CheckpointError: If they do not fit.
    """
    positions = state.get("out.2.positional_embedding")
    if positions is None:
        return
    wanted = (size[0] >> levels - 1) * (size[1] >> levels - 1) + 1
    if positions.ndim != 2 or positions.shape[1] != wanted:
        raise CheckpointError(
            f"{flags.source}: {levels} levels of {size[0]}×{size[1]} pictures must leave {wanted - 1} positions, got "
            f"weights for {positions.shape[-1] - 1}; correct image_size or classifier_depth"
        )


def _names(config: ClassifierConfig) -> Names:
    of_unet = openai.DIALECT.names(config.encoder)
    fixed = {ours: of_unet.fixed[ours] for ours in ("time_mlp.0", "time_mlp.2", "stem", "norm_out")}
    attends = config.pool == "attention"
    head = {"head.qkv": "out.2.qkv_proj", "head.out": "out.2.c_proj"} if attends else {"head.out": "out.3"}
    positions = {"head.positions": "out.2.positional_embedding"} if attends else {}
    return Names(
        fixed={**fixed, **head}, block=of_unet.block, norm=of_unet.norm, qkv=of_unet.qkv, out=of_unet.out,
        down_conv=of_unet.down_conv, up_conv=of_unet.up_conv, place=of_unet.place, tensors=positions,
    )  # fmt: skip
