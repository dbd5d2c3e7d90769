"""Which U-Net of denoising-diffusion-pytorch has given weights: its arguments, from their names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError, check_channels
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains_versions import guided_diffusion, is_grouped, is_wrapped
from fastddpm.checkpoints.reading import highest_index
from fastddpm.nets.lucidrains_config import Arguments

ENTRY = "init_conv.weight"
"""The weight that all U-Nets of the package begin with."""
_FIXED_HEADS = (4, 32)  # heads and their width


def structure(weights: Mapping[str, Tensor], flags: Flags) -> Arguments:
    """What the weights show of the U-Net that has them.

    Args:
        weights: The U-Net's own state dict, under today's names.
        flags: What the caller said; what contradicts the weights is refused.

    Returns:
        Fields of `LucidrainsConfig`; heads, where they show, without the middle's.

    Raises:
        CheckpointError: If they are another U-Net's, a weight that says something is missing or of an impossible shape,
            or a flag contradicts it.
    """
    source = flags.source
    levels = highest_index(weights, "downs.") + 1
    if levels < 1:
        raise CheckpointError(f"{source}: downs.0.0.block1.proj.weight is missing; give the whole state dict")
    width, into = _shape(weights, ENTRY, 4, source)[:2]
    out = _shape(weights, "final_conv.weight", 4, source)[0]
    time = _shape(weights, "time_mlp.1.weight", 2, source)[0]
    dim, rest = divmod(time, 4)
    by_classes = "classes_emb.weight" in weights
    # What the package feeds back and what somebody else adds look alike, but its diffusion takes nothing else.
    denied = flags.given(("self_condition",)).get("self_condition") is False
    is_self_conditioned = not by_classes and into == 2 * out and not denied
    channels = out if is_self_conditioned else into
    if out == 2 * channels + 2:
        raise CheckpointError(f"{source}: a network of WeightedObjectiveGaussianDiffusion, which is not supported")
    check_channels(source, channels, out, channels, 2 * channels)
    if rest or dim < 1:
        raise CheckpointError(f"{source}: a U-Net must have a time MLP of 4 · dim, got {time}; give it whole")
    outs = [_shape(weights, _down(weights, level, levels), 4, source)[0] for level in range(levels)]
    if any(size % dim for size in outs):
        raise CheckpointError(
            f"{source}: widths must be multiples of dim = {dim}, got {outs}; give the whole state dict"
        )
    arguments: Arguments = {"dim": dim, "init_dim": width, "dim_mults": tuple(size // dim for size in outs)}
    arguments |= {"channels": channels, "learned_variance": out == 2 * channels}
    if "time_mlp.0.weights" in weights:  # learned or random: it makes no difference once they are there
        size = 2 * _shape(weights, "time_mlp.0.weights", 1, source)[0]
        arguments["learned_sinusoidal_dim"] = size
    if by_classes:
        arguments["num_classes"] = _shape(weights, "classes_emb.weight", 2, source)[0]
    else:
        arguments |= {"self_condition": is_self_conditioned, **_attention(weights, levels, source)}
    _agree(flags, arguments, out)
    return arguments


def unseen(weights: Mapping[str, Tensor], flags: Flags, arguments: Arguments, heads: int | None = None) -> Arguments:
    """What changes the network's outputs and does not, or not wholly, show in its weights.

    Args:
        weights: As for `structure`.
        flags: What the caller said.
        arguments: What `structure` found.
        heads: Of attention in versions of the package that knew no other number.

    Returns:
        Further fields of `LucidrainsConfig`.

    Raises:
        CheckpointError: If a flag is missing or out of range.
    """
    levels = range(len(arguments["dim_mults"]))
    found: Arguments = {}
    if "num_classes" in arguments:  # there all but the middle's is as it is
        found["full_attn"] = tuple(False for _ in levels)
        pairs = [_FIXED_HEADS for _ in levels] + [_split(weights, "mid_attn.to_qkv.weight", flags, heads)]
    elif "attn_heads" in arguments:
        pairs = list(zip(arguments["attn_heads"], arguments["attn_dim_head"], strict=True))
    else:
        pairs = [_split(weights, f"downs.{level}.2.to_qkv.weight", flags, heads) for level in levels]
    if len(pairs) == len(levels):
        pairs.append(pairs[-1])
    theta = flags.number("sinusoidal_pos_emb_theta", 10000)
    if theta <= 1:
        raise flags.wrong("sinusoidal_pos_emb_theta", "a number above 1")
    numbers, widths = zip(*pairs, strict=True)
    return found | {"attn_heads": numbers, "attn_dim_head": widths, "sinusoidal_pos_emb_theta": theta}


def _split(weights: Mapping[str, Tensor], name: str, flags: Flags, known: int | None) -> tuple[int, int]:
    """How many heads of which width an attention has whose weights show the product alone."""
    hidden = _shape(weights, name, 4, flags.source)[0] // 3
    asked = "attn_heads" if "attn_heads" in flags or known is not None else "attn_dim_head"
    number = known if known is not None else flags.integer(asked)
    if hidden % number:
        raise flags.wrong(asked, f"a divisor of {hidden}, the width of {name}")
    heads = number if asked == "attn_heads" else hidden // number
    if known is not None or asked == "attn_heads":
        flags.agree(attn_heads=heads)
    if known is not None or asked == "attn_dim_head":
        flags.agree(attn_dim_head=hidden // heads)
    return heads, hidden // heads


def refuse_relatives(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse other U-Nets of the package by name.

    Raises:
        CheckpointError: If it is one.
    """
    first = weights[ENTRY]
    if first.ndim != 4:
        what = {3: "1-D", 5: "3-D"}.get(first.ndim, f"{first.ndim - 2}-D")
        raise CheckpointError(
            f"{source}: the U-Net must be 2-D, got a {what} one, which is not supported; give another"
        )
    if "classes_emb.weight" in weights:
        return
    if is_wrapped(weights) and not is_grouped(weights):
        raise guided_diffusion(source)
    if "downs.0.3.weight" in weights and weights["downs.0.3.weight"].shape[2:] == (4, 4):
        raise CheckpointError(f"{source}: the U-Net is of the package's version 0.31 or older, which is not supported")


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


def _attention(weights: Mapping[str, Tensor], levels: int, source: str) -> Arguments:
    """The attention of each level, from its memory: [2, heads, dim, n], or [2, heads, n, dim] where it is full."""
    full = tuple(f"downs.{level}.2.to_out.weight" in weights for level in range(levels))
    if not any(name.endswith(".mem_kv") for name in weights):  # before 1.9 the heads do not show
        return {"full_attn": full}
    heads, widths = [], []
    for level in range(levels):
        memory = _shape(weights, f"downs.{level}.2.mem_kv", 4, source)
        heads.append(memory[1])
        widths.append(memory[3 if full[level] else 2])
    return {"full_attn": full, "attn_heads": tuple(heads), "attn_dim_head": tuple(widths)}


def _agree(flags: Flags, arguments: Arguments, out: int) -> None:
    """Compare the flags that the weights determine with them, one number standing for that of each level."""
    flags.agree(out_dim=out, num_classes=arguments.get("num_classes"))
    for name in ("dim", "init_dim", "channels", "self_condition", "learned_variance", "learned_sinusoidal_dim"):
        if name in arguments:
            flags.agree(**{name: arguments[name]})
    flags.agree(dim_mults=tuple(float(mult) for mult in arguments["dim_mults"]))
    heads, widths = arguments.get("attn_heads"), arguments.get("attn_dim_head")
    for name, value in {"full_attn": arguments.get("full_attn"), "attn_heads": heads, "attn_dim_head": widths}.items():
        flag = flags.given((name,)).get(name)
        if value is None or flag is None:
            continue
        given = list(flag) if isinstance(flag, (list, tuple)) else [flag] * len(value)
        if given == [False] * len(value) and not isinstance(flag, (list, tuple)):
            given[-1] = True  # the package takes full_attn=False for its default
        if given != list(value):
            raise CheckpointError(
                f"{flags.source}: {name} must be {list(value)}, as its weights have it, got {flag!r}; leave it out"
            )
