"""diffusers: a pipeline's folder (model_index.json, unet/, scheduler/), or the folder of a UNet2DModel alone.

config.json and scheduler_config.json determine everything. What they leave out is the library's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError
from fastddpm.checkpoints.diffusers_scheduler import SCHEDULER_FLAGS, Scheduler, read_scheduler
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.native import read_json
from fastddpm.checkpoints.reading import as_state_dict, read_file
from fastddpm.checkpoints.renaming import Kind, Names, Part, load_renamed
from fastddpm.spec import ModelSpec
from fastddpm.unet import UNetConfig

NAME = "diffusers"
INDEX_NAME = "model_index.json"
CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
FLAGS = ("scheduler", "sample_size", *SCHEDULER_FLAGS)

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_DOWN = {"DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True)}
_UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
# UNet2DModel's own defaults, for configurations that leave an entry out.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}


def detect(path: Path) -> bool:
    """Whether `path` is a folder of diffusers, perhaps with something in it that is not supported.

    Raises:
        CheckpointError: If its JSON cannot be read, so that nobody can tell.
    """
    if (path / INDEX_NAME).is_file():
        return True
    return (path / CONFIG_NAME).is_file() and "_class_name" in read_json(path / CONFIG_NAME)


def load(path: Path, given: Mapping[str, object]) -> Checkpoint:
    """Read a folder.

    Flags: `scheduler`, another scheduler_config.json than the folder's (or its folder); `sample_size`, where the
    configuration has none; and for a network that stands alone the options of DDPMScheduler.

    Raises:
        CheckpointError: If files are missing, damaged or of a kind that is not supported, or flags are wrong.
    """
    source = f"{path}, taken for {NAME} ({INDEX_NAME} or {CONFIG_NAME} with _class_name)"
    flags = Flags(source, given, FLAGS)
    _check_pipeline(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    config = _unet_config(folder / CONFIG_NAME, flags)
    scheduler = read_scheduler(path, flags)
    spec = _spec(config, scheduler, source)
    weights = _find_weights(folder)
    state = _renamed_attention(_read_weights(weights))
    network = load_renamed(config, _names(config), state, str(weights))
    return Checkpoint(network, scheduler.schedule, spec, NAME, path, {})


def _check_pipeline(path: Path) -> None:
    if not (path / INDEX_NAME).is_file():
        return
    kind = read_json(path / INDEX_NAME).get("_class_name")
    if kind not in _PIPELINES:
        raise CheckpointError(
            f"{path / INDEX_NAME}: the pipeline must be {' or '.join(_PIPELINES)}, got {kind}, which is not supported"
        )


def _unet_config(path: Path, flags: Flags) -> UNetConfig:
    values = read_json(path)
    if values.get("_class_name") != "UNet2DModel":
        got = values.get("_class_name")
        raise CheckpointError(f"{path}: the network must be a UNet2DModel, got {got}, which is not supported")
    values = {**_DEFAULTS, **values}
    for name, allowed in _ONLY.items():
        if values[name] not in allowed:
            raise CheckpointError(
                f"{path}: {name} must be {' or '.join(map(repr, allowed))}, got {values[name]!r}: not supported"
            )
    if values["sample_size"] is None:
        flags.require("sample_size")
        values["sample_size"] = flags.integer("sample_size")
    else:
        flags.agree(sample_size=values["sample_size"])
    try:
        return UNetConfig(**_structure(values, path))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error


def _structure(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of our configuration."""
    size, channels = values["sample_size"], _list(values, "block_out_channels", path)
    down = _levels(values, "down_block_types", _DOWN, values["downsample_type"], path)
    up = list(reversed(_levels(values, "up_block_types", _UP, values["upsample_type"], path)))
    if not len(down) == len(up) == len(channels):
        raise CheckpointError(
            f"{path}: block_out_channels, down_block_types and up_block_types must have one entry per level, got "
            f"{len(channels)}, {len(down)} and {len(up)}; mend the file"
        )
    default_norm = values["resnet_time_scale_shift"] == "default"
    groups = values["attn_norm_num_groups"]
    return {
        "sample_size": tuple(size) if isinstance(size, list) else (size, size),
        "in_channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "channels": tuple(channels),
        "time_channels": values["time_embedding_dim"] or None,
        "layers": values["layers_per_block"],
        "attention": tuple(attends for attends, _ in down),
        "up_attention": tuple(attends for attends, _ in up),
        "resblock_down": tuple(in_block for _, in_block in down),
        "resblock_up": tuple(in_block for _, in_block in up),
        "mid_attention": values["add_attention"],
        "mid_attention_norm": default_norm or groups is not None,
        "mid_attention_groups": groups,
        "head_channels": values["attention_head_dim"],  # null is one head at each width, which is our default
        "norm_groups": values["norm_num_groups"],
        "norm_eps": values["norm_eps"],
        "dropout": values["dropout"],
        "scale_shift": not default_norm,
        "downsample_padding": "asymmetric" if values["downsample_padding"] == 0 else "symmetric",
        "num_classes": values["num_class_embeds"],
        "embedding": "cos_sin" if values["flip_sin_to_cos"] else "sin_cos",
        "embedding_shift": values["freq_shift"],
    }


def _levels(
    values: Mapping[str, Any], name: str, known: Mapping[str, tuple[bool, bool | None]], kind: str | None, path: Path
) -> list[tuple[bool, bool]]:
    """For each level whether it has attention, and whether its change of resolution is a ResBlock."""
    levels = []
    for block in _list(values, name, path):
        block = block.removeprefix("UNetRes") if isinstance(block, str) else block  # the oldest files' names
        if not isinstance(block, str) or block not in known:
            raise CheckpointError(
                f"{path}: {name} must be among {', '.join(known)}, got {block!r}, which is not supported"
            )
        attends, in_block = known[block]
        levels.append((attends, kind == "resnet" if in_block is None else in_block))
    return levels


def _list(values: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    if not isinstance(values[name], list) or not values[name]:
        raise CheckpointError(f"{path}: {name} must be a list with one entry per level, got {values[name]!r}; mend it")
    return list(values[name])


def _spec(config: UNetConfig, scheduler: Scheduler, source: str) -> ModelSpec:
    try:
        spec = ModelSpec(
            (config.in_channels, *config.sample_size), num_classes=config.num_classes, **scheduler.conventions
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    wanted = config.in_channels * (2 if spec.learned_variance else 1)
    if config.out_channels != wanted:
        raise CheckpointError(
            f"{source}: out_channels must be {wanted} for variance {spec.variance}, got {config.out_channels}; "
            "the scheduler belongs to another network"
        )
    return spec


def _find_weights(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: there must be {' or '.join(WEIGHTS_NAMES)}, got neither; fetch it again")
    return found[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    state = as_state_dict(read_file(path))
    if state is None:
        raise CheckpointError(f"{path}: must hold a state dict, tensors by name, got something else; fetch it again")
    return state


def _renamed_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the attention layers' names of today, whichever the file has."""
    renamed = {}
    for name, value in state.items():
        if ".attentions." in name:
            for old, new in _OLD_ATTENTION.items():
                name = name.replace(old, new)
        renamed[name] = value
    return renamed


def _names(config: UNetConfig) -> Names:
    levels = len(config.channels)

    def place(part: Part, level: int, i: int, kind: Kind) -> str:
        if part == "mid":
            return f"mid_block.{'attentions' if kind == 'attention' else 'resnets'}.{i}"
        block = f"down_blocks.{level}" if part == "down" else f"up_blocks.{levels - 1 - level}"
        if kind == "resample":
            return f"{block}.{part}samplers.0"
        return f"{block}.{'attentions' if kind == 'attention' else 'resnets'}.{i}"

    return Names(
        fixed={
            "time_mlp.0": "time_embedding.linear_1",
            "time_mlp.2": "time_embedding.linear_2",
            "label_embedding": "class_embedding",
            "stem": "conv_in",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out",
        },
        block={
            "norm1": "norm1",
            "conv1": "conv1",
            "time": "time_emb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "skip": "conv_shortcut",
        },
        norm="group_norm",
        qkv=("to_q", "to_k", "to_v"),
        out="to_out.0",
        down_conv="conv",
        up_conv="conv",
        place=place,
    )
