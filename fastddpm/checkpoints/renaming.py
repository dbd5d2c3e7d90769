"""Another project's names for the parts of a U-Net or a classifier, and the way of its weights into ours.

All of them stack the same parts; what differs is how the parts are called, and that we keep each attention's q, k and
v in one layer and all blocks' time projections in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from fastddpm.checkpoints.base import check_weights
from fastddpm.nets.blocks import Attention, ResBlock, Stage
from fastddpm.nets.classifier import Classifier
from fastddpm.nets.unet import UNet, UNetConfig

Part = Literal["down", "mid", "up"]
Kind = Literal["block", "attention", "resample"]
Net = TypeVar("Net", UNet, Classifier)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a project calls the parts.

    Args:
        fixed: Its names of our time_mlp.0, time_mlp.2, label_embedding, stem, norm_out and conv_out.
        block: Its names, within a ResBlock, of norm1, conv1, time, norm2, conv2 and skip.
        norm: The norm within an attention.
        qkv: The projections within an attention, one name if they are fused already.
        out: The last layer within an attention.
        down_conv: The convolution of a downsampler, within what `place` calls its resampling.
        up_conv: The same for an upsampler.
        place: (part, level, i, kind) → the prefix of that part. Levels count from the finest on both ways; i counts
            the blocks of the level. A change of resolution has the i after the last block's.
        tensors: Its names of our tensors that are neither a layer's weight nor its bias.
    """

    fixed: Mapping[str, str]
    block: Mapping[str, str]
    norm: str
    qkv: tuple[str, ...]
    out: str
    down_conv: str
    up_conv: str
    place: Callable[[Part, int, int, Kind], str]
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One of our tensors: the names of theirs that it is made of, and how many rows each has (None: equal parts)."""

    theirs: tuple[str, ...]
    rows: tuple[int, ...] | None = None


def load_renamed(
    config: UNetConfig,
    names: Names,
    state: Mapping[str, Tensor],
    source: str,
    option: Callable[[str], str | None] = lambda name: None,
) -> UNet:
    """Build a U-Net and fill it with a project's weights.

    Args:
        config: The structure.
        names: What the project calls the parts.
        state: Its state dict.
        source: The file and what it was taken for, for messages.
        option: One of their names → the option of the configuration that it hangs on, if any does.

    Returns:
        The network in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If tensors are missing or left over, or have other shapes or values than they must.
    """
    with torch.device("meta"):
        network = UNet(config)
    return fill_renamed(network, names, state, source, option)


def fill_renamed(
    network: Net,
    names: Names,
    state: Mapping[str, Tensor],
    source: str,
    option: Callable[[str], str | None] = lambda name: None,
) -> Net:
    """Fill a network, on the meta device, with a project's weights; arguments and errors as in `load_renamed`."""
    pieces = pieces_of(network, names)
    parts = {ours: _shapes(piece, tuple(network.get_parameter(ours).shape)) for ours, piece in pieces.items()}

    def remedy(odd: list[str]) -> str:
        options = " and ".join(dict.fromkeys(filter(None, map(option, odd))))
        hint = f"check {options} in its configuration, or " if options else ""
        return f"{hint}give the whole state dict of that network, and no other's"

    theirs = check_weights({name: shape for part in parts.values() for name, shape in part}, state, source, remedy)
    found = {ours: [theirs[name] for name, _ in part] for ours, part in parts.items()}
    fused = {ours: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for ours, tensors in found.items()}
    network.load_state_dict(fused, strict=True, assign=True)
    return network.eval()


def pieces_of(network: UNet | Classifier, names: Names) -> dict[str, _Piece]:
    """All of our tensors and what they are made of, block by block in the order of the time projections."""
    config = network.structure
    pieces: dict[str, _Piece] = {}
    projections: list[str] = []

    def layer(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            pieces[f"{ours}.{kind}"] = _Piece(tuple(f"{name}.{kind}" for name in theirs))

    def block(ours: str, theirs: str, module: ResBlock) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            layer(f"{ours}.{part}", f"{theirs}.{names.block[part]}")
        if isinstance(module.skip, nn.Conv2d):
            layer(f"{ours}.skip", f"{theirs}.{names.block['skip']}")
        projections.append(f"{theirs}.{names.block['time']}")

    def attention(ours: str, theirs: str, module: Attention) -> None:
        if isinstance(module.norm, nn.GroupNorm):
            layer(f"{ours}.norm", f"{theirs}.{names.norm}")
        layer(f"{ours}.qkv", *(f"{theirs}.{name}" for name in names.qkv))
        layer(f"{ours}.out", f"{theirs}.{names.out}")

    def stage(part: Part, ours: str, level: int, module: Stage) -> None:
        pairs = module.pairs()
        for i, (res, att) in enumerate(pairs):
            block(f"{ours}.blocks.{i}", names.place(part, level, i, "block"), cast(ResBlock, res))
            if isinstance(att, Attention):
                attention(f"{ours}.attentions.{i}", names.place(part, level, i, "attention"), att)
        place = names.place(part, level, len(pairs), "resample")
        if isinstance(module.resample, ResBlock):
            block(f"{ours}.resample", place, module.resample)
        elif module.resample is not None and config.conv_resample:
            conv = names.down_conv if part == "down" else names.up_conv
            layer(f"{ours}.resample.conv", f"{place}.{conv}")

    for ours, theirs in names.fixed.items():
        if ours == "label_embedding":
            if network.label_embedding is not None:
                pieces["label_embedding.weight"] = _Piece((f"{theirs}.weight",))
        else:
            layer(ours, theirs)
    pieces |= {ours: _Piece((theirs,)) for ours, theirs in names.tensors.items()}
    levels = len(config.channels)
    for level, module in enumerate(network.down):
        stage("down", f"down.{level}", level, cast(Stage, module))
    stage("mid", "mid", levels - 1, network.mid)
    for i, module in enumerate(network.up):
        stage("up", f"up.{i}", levels - 1 - i, cast(Stage, module))
    for kind in ("weight", "bias"):
        theirs_all = tuple(f"{name}.{kind}" for name in projections)
        pieces[f"time_projection.{kind}"] = _Piece(theirs_all, tuple(network.projection_widths))
    return pieces


def _shapes(piece: _Piece, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The names of theirs that one of our tensors is made of, and the shapes they must have."""
    rows = piece.rows or (shape[0] // len(piece.theirs),) * len(piece.theirs)
    return [(name, (n, *shape[1:])) for name, n in zip(piece.theirs, rows, strict=True)]
