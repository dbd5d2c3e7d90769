"""Which U-Net of denoising-diffusion-pytorch has given weights: its arguments, from their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains_package import Module
from fastddpm.checkpoints.reading import highest_index

ENTRY = "init_conv.weight"
"""The weight that all U-Nets of the package begin with."""


def structure(weights: Mapping[str, Tensor], flags: Flags) -> tuple[Module, dict[str, Any]]:
    """Which U-Net of the package has such weights, and the arguments that make it, as plain JSON data.

    Args:
        weights: The U-Net's own state dict.
        flags: What the caller said; what contradicts the weights is refused.

    Returns:
        The module of the package and the arguments that the weights show.

    Raises:
        CheckpointError: If they are another U-Net's, a weight that says something is missing or of an impossible shape,
            or a flag contradicts it.
    """
    source = flags.source
    _refuse_relatives(weights, source)
    levels = highest_index(weights, "downs.") + 1
    if levels < 1:
        raise CheckpointError(f"{source}: downs.0.0.block1.proj.weight is missing; give the whole state dict")
    width, into = _shape(weights, ENTRY, 4, source)[:2]
    out = _shape(weights, "final_conv.weight", 4, source)[0]
    time = _shape(weights, "time_mlp.1.weight", 2, source)[0]
    dim, rest = divmod(time, 4)
    by_classes = "classes_emb.weight" in weights
    is_self_conditioned = not by_classes and into == 2 * out
    channels = out if is_self_conditioned else into
    if rest or dim < 1 or out not in (channels, 2 * channels):
        raise CheckpointError(
            f"{source}: a U-Net must return as many channels as it takes, half as many (self-conditioning) or twice as "
            f"many (learned variance), and have a time MLP of 4 · dim, got {into} to {out} channels and {time}; "
            "no other is supported"
        )
    outs = [_shape(weights, _down(weights, level, levels), 4, source)[0] for level in range(levels)]
    if any(size % dim for size in outs):
        raise CheckpointError(
            f"{source}: widths must be multiples of dim = {dim}, got {outs}; give the whole state dict"
        )
    arguments: dict[str, Any] = {"dim": dim, "init_dim": width, "dim_mults": [size // dim for size in outs]}
    arguments |= {"channels": channels, "learned_variance": out == 2 * channels}
    if "time_mlp.0.weights" in weights:  # learned or random: it makes no difference once they are there
        size = 2 * _shape(weights, "time_mlp.0.weights", 1, source)[0]
        arguments |= {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": size}
    if by_classes:
        arguments["num_classes"] = _shape(weights, "classes_emb.weight", 2, source)[0]
    else:
        arguments |= {"self_condition": is_self_conditioned, **_attention(weights, levels, source)}
    _agree(flags, arguments, out)
    return "classifier_free_guidance" if by_classes else "denoising_diffusion_pytorch", arguments


def unseen_arguments(
    weights: Mapping[str, Tensor], flags: Flags, module: Module, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments that change what the network computes and do not show in its weights.

    Args:
        weights: As for `structure`.
        flags: What the caller said.
        module: What `structure` found.
        arguments: The same.

    Returns:
        Further arguments, empty where the package's own defaults are meant.

    Raises:
        CheckpointError: If a flag is missing or out of range.
    """
    if module == "classifier_free_guidance":
        name = "mid_attn.fn.fn.to_qkv.weight"
        hidden = _shape(weights, name, 4, flags.source)[0] // 3
        asked = "attn_heads" if "attn_heads" in flags else "attn_dim_head"
        number = flags.integer(asked)
        if hidden % number:
            raise flags.wrong(asked, f"a divisor of {hidden}, the width of {name}")
        heads = number if asked == "attn_heads" else hidden // number
        flags.agree(attn_heads=heads, attn_dim_head=hidden // heads)
        return {"attn_heads": heads, "attn_dim_head": hidden // heads}
    theta = flags.number("sinusoidal_pos_emb_theta", 10000)
    if theta <= 1:
        raise flags.wrong("sinusoidal_pos_emb_theta", "a number above 1")
    # Older versions of the package have no such argument, and 10000.
    return {} if theta == 10000 or "learned_sinusoidal_cond" in arguments else {"sinusoidal_pos_emb_theta": theta}


def _refuse_relatives(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse other U-Nets of the package, and those of its older versions, by name."""
    first = weights[ENTRY]
    if first.ndim != 4:
        what = {3: "1-D", 5: "3-D"}.get(first.ndim, f"{first.ndim - 2}-D")
        raise CheckpointError(
            f"{source}: the U-Net must be 2-D, got a {what} one, which is not supported; give another"
        )
    if "classes_emb.weight" not in weights and any(name.startswith("downs.0.2.fn.") for name in weights):
        raise CheckpointError(
            f"{source}: the U-Net must be that of a recent version of the package, got one with downs.0.2.fn, as older "
            "versions and the module guided_diffusion have, which is not supported; give another"
        )


def _shape(weights: Mapping[str, Tensor], name: str, ndim: int, source: str) -> tuple[int, ...]:
    if name not in weights:
        raise CheckpointError(f"{source}: {name} is missing; give the whole state dict of that network")
    shape = tuple(weights[name].shape)
    if len(shape) != ndim or not all(shape):
        raise CheckpointError(f"{source}: {name} must have {ndim} axes, got shape {list(shape)}; fetch the file again")
    return shape


def _down(weights: Mapping[str, Tensor], level: int, levels: int) -> str:
    """The convolution at the end of a level of the way down: behind a rearrangement where it halves the resolution."""
    name = f"downs.{level}.3.weight"
    return name if level == levels - 1 or name in weights else f"downs.{level}.3.1.weight"


def _attention(weights: Mapping[str, Tensor], levels: int, source: str) -> dict[str, Any]:
    """The attention of each level, from its memory: [2, heads, dim, n], or [2, heads, n, dim] where it is full."""
    full, heads, widths = [], [], []
    for level in range(levels):
        prefix = f"downs.{level}.2"
        full.append(f"{prefix}.to_out.weight" in weights)
        memory = _shape(weights, f"{prefix}.mem_kv", 4, source)
        heads.append(memory[1])
        widths.append(memory[3 if full[-1] else 2])
    return {"full_attn": full, "attn_heads": heads, "attn_dim_head": widths}


def _agree(flags: Flags, arguments: Mapping[str, Any], out: int) -> None:
    """Compare the flags that the weights determine with them, one number standing for that of each level."""
    flags.agree(out_dim=out, num_classes=arguments.get("num_classes"))
    for name in ("dim", "init_dim", "channels", "self_condition", "learned_variance", "learned_sinusoidal_dim"):
        if name in arguments:
            flags.agree(**{name: arguments[name]})
    flags.agree(dim_mults=tuple(float(mult) for mult in arguments["dim_mults"]))
    for name in ("full_attn", "attn_heads", "attn_dim_head"):
        value = arguments.get(name)
        flag = flags.given((name,)).get(name)
        if value is None or flag is None:
            continue
        given = list(flag) if isinstance(flag, (list, tuple)) else [flag] * len(value)
        if given == [False] * len(value) and not isinstance(flag, (list, tuple)):
            given[-1] = True  # the package takes full_attn=False for its default
        if given != value:
            raise CheckpointError(
                f"{flags.source}: {name} must be {value}, as its weights have it, got {flag!r}; leave the flag out"
            )
