"""OpenAI's improved-diffusion and guided-diffusion: a bare state dict, averaged weights in ema_*.pt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError, check_channels
from fastddpm.checkpoints.dialect import UNetDialect
from fastddpm.checkpoints.flags import Flags, classes_of, level_sizes
from fastddpm.checkpoints.openai_presets import PRESETS, RELATIVES
from fastddpm.checkpoints.reading import highest_index
from fastddpm.checkpoints.renaming import Kind, Names, Part
from fastddpm.nets.unet import UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec, Variance
from fastddpm.process.timesteps import respace

_GUIDED_ONLY = ("num_head_channels", "resblock_updown", "use_fp16")
_REQUIRED = ("diffusion_steps", "noise_schedule", "rescale_timesteps", "predict_xstart")
# What the weights tell: accepted, and compared with them.
_DERIVED = ("num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "learn_sigma", "class_cond",
            "use_scale_shift_norm", "resblock_updown")  # fmt: skip
# What matters for training alone.
_TRAINING = ("dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas")
_HEADS = ("num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order")
# What SuperResModel has in image_size's place.
_SIZES = ("large_size", "small_size")
FLAGS = (
    "image_size",
    *_SIZES,
    *_REQUIRED,
    *_HEADS,
    "sigma_small",
    "timestep_respacing",
    "null_class",
    "model",
    *_DERIVED,
    *_TRAINING,
)


def _fixed_variance(flags: Flags) -> Variance:
    """guided-diffusion has no flag for it and always takes the large one."""
    return "fixed_small" if flags.boolean("sigma_small", False) else "fixed_large"


def _refuse_relatives(state: Mapping[str, Tensor], source: str) -> None:
    if not any(name.startswith("output_blocks.") for name in state):
        raise CheckpointError(
            f"{source}: must hold output_blocks, got none: it is a classifier; give the U-Net's file, and this one to "
            "fastddpm.load_classifier"
        )
    if "output_blocks.0.0.in_layers.0.weight" not in state or "out.2.weight" not in state:
        raise CheckpointError(f"{source}: must hold output_blocks.0 and out.2, got one: it is cut short; give it whole")


def _learns_sigma(config: UNetConfig, condition: int) -> bool:
    """Whether the output has 2C channels."""
    return config.out_channels != config.in_channels - condition


def _condition_channels(state: Mapping[str, Tensor], flags: Flags) -> int:
    """Channels of the picture beside x: as many as x has in super-resolution networks, by their flags; 0 in others.

    Raises:
        CheckpointError: If the output has neither C nor 2C channels, or it is open whether there is such a picture.
    """
    stem, out = state["input_blocks.0.0.weight"], state["out.2.weight"]
    if stem.ndim != 4 or out.ndim != 4:
        raise CheckpointError(
            f"{flags.source}: the first and last layers must be 2-D convolutions, got others; give a U-Net"
        )
    c_in, c_out = stem.shape[1], out.shape[0]
    if any(name in flags for name in _SIZES):
        if c_in % 2:
            raise CheckpointError(
                f"{flags.source}: a super-resolution network must take an even number of channels, x's and as many "
                f"again, got {c_in}; leave large_size and small_size out"
            )
        check_channels(flags.source, c_in // 2, c_out, c_in // 2, c_in)
        return int(c_in // 2)
    if c_in == 2 * c_out:
        flags.require("large_size", "small_size")
    check_channels(flags.source, c_in, c_out, c_in, 2 * c_in)
    if c_in == c_out == 6:  # what OpenAI's super-resolution networks have, which see three channels twice
        if flags.boolean("learn_sigma", True):
            raise CheckpointError(
                f"{flags.source}: 6 to 6 channels is super-resolution of 3 channels with learned variance, or a "
                "network of 6 channels without; give large_size and small_size if it is the former, learn_sigma=False "
                "if it is the latter"
            )
    return 0


def _require(flags: Flags, state: Mapping[str, Tensor], condition: int) -> None:
    """Ask for all that is missing at once."""
    needed = [*(_SIZES if condition else ("image_size",)), *_REQUIRED]
    learned = state["out.2.weight"].shape[0] != state["input_blocks.0.0.weight"].shape[1] - condition
    head_channels = flags.integer("num_head_channels", -1, least=-1)
    if head_channels == 0:
        raise flags.wrong("num_head_channels", "−1 or at least 1")
    if head_channels == -1:
        needed.append("num_heads (or num_head_channels)")
    guided = any(name in flags for name in _GUIDED_ONLY) or _resblock_updown(state)
    if not learned and not guided:
        needed.append("sigma_small")
    one_head = head_channels == -1 and "num_heads" in flags and flags.integer("num_heads") == 1
    improved = "sigma_small" in flags and not guided
    if not one_head and not improved:
        needed.append("use_new_attention_order (False for improved-diffusion)")
    flags.require(*needed)


def _resblock_updown(state: Mapping[str, Tensor]) -> bool:
    """Whether an entry of the way up ends with a second ResBlock."""
    return any(key.startswith("output_blocks.") and key.split(".")[2:4] in (["1", "in_layers"], ["2", "in_layers"])
               for key in state)  # fmt: skip


def _layers(state: Mapping[str, Tensor], entries: int) -> int:
    """ResBlocks per level on the way down.

    Each level but the last ends with an entry that only changes the resolution: a convolution, nothing with weights
    (pooling), or a ResBlock like the others, which then shows on the way up, where it shares an entry.
    """
    if _resblock_updown(state):
        ups = range(highest_index(state, "output_blocks.") + 1)
        return next(k for k in ups if any(f"output_blocks.{k}.{j}.in_layers.0.weight" in state for j in (1, 2)))
    plain = [n for n in range(1, entries) if f"input_blocks.{n}.0.in_layers.0.weight" not in state]
    return (plain[0] if plain else entries) - 1


def _config(state: Mapping[str, Tensor], flags: Flags) -> UNetConfig:
    """The structure, from the weights' names and shapes and the flags for the heads."""
    _refuse_relatives(state, flags.source)
    condition = _condition_channels(state, flags)
    _require(flags, state, condition)
    entries = highest_index(state, "input_blocks.") + 1
    layers = _layers(state, entries)
    levels = max(1, entries // (layers + 1))
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    size = flags.size(("image_size", "large_size") if condition else ("image_size",), levels)
    stem, base = state["input_blocks.0.0.weight"].shape, state["time_embed.0.weight"].shape[1]
    channels = tuple(state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts)
    attention = tuple(f"input_blocks.{n}.1.qkv.weight" in state for n in firsts)
    ups = highest_index(state, "output_blocks.") + 1
    up_attention = tuple(f"output_blocks.{ups - 1 - level * (layers + 1)}.1.qkv.weight" in state
                         for level in range(levels))  # fmt: skip
    widths = state["input_blocks.1.0.emb_layers.1.weight"].shape[0], channels[0]
    new_order = flags.boolean("use_new_attention_order", False)
    up_heads = flags.integer("num_heads_upsample", -1, least=-1)
    head_channels = flags.integer("num_head_channels", -1, least=-1)
    config = UNetConfig(
        sample_size=size,
        in_channels=stem[1],
        out_channels=state["out.2.weight"].shape[0],
        channels=channels,
        stem_channels=stem[0],
        embedding_channels=base,
        time_channels=state["time_embed.0.weight"].shape[0],
        layers=layers,
        attention=attention,
        up_attention=up_attention,
        num_heads=1 if head_channels != -1 else flags.integer("num_heads"),
        up_num_heads=None if up_heads == -1 or head_channels != -1 else up_heads,
        head_channels=None if head_channels == -1 else head_channels,
        attention_order="qkv_heads" if new_order else "heads_qkv",
        norm_groups=32,
        norm_eps=1e-5,
        scale_shift=widths[0] == 2 * widths[1],
        resblock_updown=_resblock_updown(state),
        conv_resample=levels == 1 or f"input_blocks.{layers + 1}.0.op.weight" in state,
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        embedding="cos_sin",
        embedding_shift=0.0,
    )
    flags.agree(
        num_channels=base,
        num_res_blocks=layers,
        channel_mult=tuple(width / base for width in channels),
        learn_sigma=_learns_sigma(config, condition),
        class_cond=config.num_classes is not None,
        use_scale_shift_norm=config.scale_shift,
        resblock_updown=config.resblock_updown,
    )
    flags.agree_attention("attention_resolutions", attention, *level_sizes(size, levels))
    return config


def _process(config: UNetConfig, state: Mapping[str, Tensor], flags: Flags) -> tuple[NoiseSchedule, ModelSpec]:
    condition = _condition_channels(state, flags)
    T, learned = flags.integer("diffusion_steps"), _learns_sigma(config, condition)
    spec = ModelSpec(
        (config.in_channels - condition, *config.sample_size),
        prediction="x_start" if flags.boolean("predict_xstart") else "eps",
        variance="learned_range" if learned else _fixed_variance(flags),
        **classes_of(config.num_classes, flags),
        time_scale=1000.0 / T if flags.boolean("rescale_timesteps") else 1.0,
        respacing=flags.text("timestep_respacing", ""),
        to_bytes="truncate",
        condition_channels=condition,
        condition_scale=_condition_scale(flags) if condition else 1,
    )
    if spec.respacing:
        respace(T, spec.respacing)
    if flags.choice("noise_schedule", ("linear", "cosine")) == "cosine":
        return NoiseSchedule.cosine(T), spec
    return NoiseSchedule.linear(T, 1000.0 / T * 1e-4, 1000.0 / T * 0.02), spec


def _condition_scale(flags: Flags) -> int:
    """How many times larger the pictures are than those that they are made of."""
    small, large = flags.integer("small_size"), flags.integer("large_size")
    if large % small:
        raise flags.wrong("small_size", f"a part of large_size, {large}")
    return large // small


def names_of(config: UNetConfig) -> Names:
    """What this dialect calls the parts of a network."""
    levels, layers = len(config.channels), config.layers

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            return f"middle_block.{1 if kind == 'attention' else 2 * i}"
        if part == "down":
            return f"input_blocks.{1 + level * (layers + 1) + i}.{1 if kind == 'attention' else 0}"
        entry = (levels - 1 - level) * (layers + 1)
        if kind == "resample":  # shares the last block's entry, behind its attention if there is one
            attends = (config.up_attention or config.attention)[level]
            return f"output_blocks.{entry + layers}.{2 if attends else 1}"
        return f"output_blocks.{entry + i}.{1 if kind == 'attention' else 0}"

    return Names(
        fixed={"time_mlp.0": "time_embed.0", "time_mlp.2": "time_embed.2", "label_embedding": "label_emb",
               "stem": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"},
        block={"norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "skip": "skip_connection"},
        norm="norm", qkv=("qkv",), out="proj_out", down_conv="op", up_conv="conv", place=place,
    )  # fmt: skip


DIALECT = UNetDialect(
    name="openai",
    reason="keys time_embed and input_blocks",
    entries=("time_embed.0.weight", "input_blocks.0.0.weight"),
    flags=FLAGS,
    config=_config,
    process=_process,
    names=names_of,
    presets=PRESETS,
    relatives=RELATIVES,
)
