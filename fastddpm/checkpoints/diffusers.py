"""diffusers: a pipeline's folder (model_index.json, unet/, scheduler/), or the folder of a UNet2DModel alone.

config.json and scheduler_config.json determine everything. What they leave out is the library's default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, blamed_on, check_channels
from fastddpm.checkpoints.diffusers_scheduler import SCHEDULER_FLAGS, Conventions, read_scheduler
from fastddpm.checkpoints.diffusers_unet import UNet2DConfig, load_network, network_from
from fastddpm.checkpoints.diffusers_weights import check_variant, read_weights
from fastddpm.checkpoints.flags import Flags, classes_of
from fastddpm.checkpoints.native import read_json
from fastddpm.common.records import read_record
from fastddpm.nets.unet import UNetConfig
from fastddpm.process.spec import ModelSpec

__all__ = ["CONFIG_NAME", "FLAGS", "INDEX_NAME", "NAME", "check_pipeline", "detect", "load", "network_from"]

NAME = "diffusers"
INDEX_NAME = "model_index.json"
CONFIG_NAME = "config.json"
SUBFOLDERS = ("unet", "unet_ema")
FLAGS = ("scheduler", "sample_size", "image_size", "variant", "subfolder", "null_class", "condition_channels",
         *SCHEDULER_FLAGS)  # fmt: skip
_OTHERS = {
    "ConsistencyModelPipeline": "consistency models",
    "KarrasVePipeline": "Karras et al.'s variance-exploding models",
    "ScoreSdeVePipeline": "score-SDE's variance-exploding models",
}
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")


def detect(path: Path) -> bool:
    """Whether `path` is a folder of diffusers, perhaps with something in it that is not supported.

    Raises:
        CheckpointError: If its JSON cannot be read, so that nobody can tell.
    """
    return bool(_reason(path))


def _reason(path: Path) -> str:
    if (path / INDEX_NAME).is_file():
        return INDEX_NAME
    if (path / CONFIG_NAME).is_file():
        return f"{CONFIG_NAME} with _class_name" if "_class_name" in read_json(path / CONFIG_NAME) else ""
    found = [name for name in SUBFOLDERS if (path / name / CONFIG_NAME).is_file()]
    return f"{found[0]}/{CONFIG_NAME}" if found else ""


def load(path: Path, given: Mapping[str, object]) -> Checkpoint:
    """Read a folder.

    Flags: `variant`, as in the library ("fp16"); `subfolder`, "unet" or "unet_ema"; `scheduler`, another
    scheduler_config.json than the folder's (or its folder); `sample_size`, where the configuration has none;
    `image_size`, to draw pictures of another size than that; `null_class`, the label that stands for "no class";
    `condition_channels`, those that the network takes behind x's, where their numbers do not say it; and for a network
    that stands alone the options of DDPMScheduler.

    Raises:
        CheckpointError: If files are missing, damaged or of a kind that is not supported, or flags are wrong.
    """
    reason = _reason(path)
    source = f"{path}, taken for {NAME} ({reason})"
    flags = Flags(source, given, FLAGS)
    check_pipeline(path)
    folder = _network_folder(path, flags)
    config = _unet_config(folder / CONFIG_NAME, flags)
    schedule, conventions = read_scheduler(path, flags)
    spec = _spec(config, conventions, flags)
    state, weights = read_weights(folder, check_variant(flags.given(["variant"]).get("variant"), source))
    flags.note("weights", str(weights.relative_to(path)), "file")
    network = load_network(config, state, f"{weights}, taken for {NAME} ({reason})")
    return Checkpoint(network, schedule, spec, NAME, path, {}, reason, flags.settings())


def check_pipeline(path: Path) -> None:
    """Check that a pipeline's folder, if it is one, consists of a network and a scheduler alone.

    Raises:
        CheckpointError: If it has other parts, or its model_index.json cannot be read.
    """
    if not (path / INDEX_NAME).is_file():
        return
    values = read_json(path / INDEX_NAME)
    kind = values.get("_class_name")
    if isinstance(kind, str) and kind in _OTHERS:
        raise CheckpointError(f"{path / INDEX_NAME}: {kind} is of {_OTHERS[kind]}, not of a DDPM: not supported")
    parts = {name for name, value in values.items() if isinstance(value, list) and len(value) == 2 and any(value)}
    if kind in _PIPELINES or (parts - {"_class_name"}) == {"unet", "scheduler"}:
        return
    hint = "which is not supported"
    if kind == "LDMPipeline":
        hint = "whose pictures need its decoder; load it with diffusers and give it to fastddpm.accelerate"
    raise CheckpointError(
        f"{path / INDEX_NAME}: the pipeline must be {' or '.join(_PIPELINES)}, or another one of a unet and a "
        f"scheduler alone, got {kind}, {hint}"
    )


def _network_folder(path: Path, flags: Flags) -> Path:
    """Where the network is: a subfolder by the library's names, or the folder itself."""
    there = [name for name in SUBFOLDERS if (path / name).is_dir()]
    if "subfolder" in flags:
        name = flags.choice("subfolder", SUBFOLDERS)
        if name not in there:
            raise CheckpointError(f"{flags.source}: subfolder must be one that there is, got {name}; leave it out")
        return path / name
    if len(there) > 1 and not (path / INDEX_NAME).is_file():  # a pipeline's own network is in unet
        flags.require("subfolder (unet or unet_ema, the averaged weights)")
    return path / there[0] if there else path


def _unet_config(path: Path, flags: Flags) -> UNetConfig:
    values = read_json(path)
    if values.get("_class_name") != "UNet2DModel":
        got = values.get("_class_name")
        raise CheckpointError(f"{path}: the network must be a UNet2DModel, got {got}, which is not supported")
    with blamed_on(str(path)):
        config = read_record(UNet2DConfig, values, more=True)
        _check_sample_size(values.get("sample_size"), flags)
        flags.note_all({name: vars(config)[name] for name in vars(config) if name != "sample_size"}, values, "file")
        if "image_size" in flags or "sample_size" in flags:
            size = flags.size(("image_size", "sample_size"), len(config.block_out_channels))
            config = dataclasses.replace(config, sample_size=size)
        structure = config.structure()
    return structure


def _check_sample_size(size: object, flags: Flags) -> None:
    """Ask for the size of pictures where the configuration has none, and compare where both say it."""
    if size is None:
        if "image_size" not in flags:
            flags.require("sample_size")
        return
    pair = tuple(size) if isinstance(size, list) else (size, size)
    if "sample_size" in flags and flags.size(("sample_size",), 1) != pair:
        raise flags.wrong("sample_size", f"{size}, as {CONFIG_NAME} has it (image_size= draws pictures of another)")
    flags.note("sample_size", size, "file")


def _spec(config: UNetConfig, conventions: Conventions, flags: Flags) -> ModelSpec:
    with blamed_on(flags.source):
        classes = classes_of(config.num_classes, flags)
        spec = ModelSpec((config.in_channels, *config.sample_size), **conventions, **classes)
        condition = _condition_channels(config, spec, flags)
        shape = (config.in_channels - condition, *config.sample_size)
    return dataclasses.replace(spec, shape=shape, condition_channels=condition)


def _condition_channels(config: UNetConfig, spec: ModelSpec, flags: Flags) -> int:
    """Channels that the network takes behind x's: those that it has no output for.

    A network that returns as many as it takes may have no condition, and then its variance is not learned; only the
    flag `condition_channels` says that it has one.

    Raises:
        CheckpointError: If the channels do not fit the variance, or the flag does not fit the channels.
    """
    into, out, learned = config.in_channels, config.out_channels, spec.learned_variance
    channels = out // 2 if learned else out
    if (learned and out % 2) or channels > into or (into == out and learned and "condition_channels" not in flags):
        check_channels(flags.source, into, out, into, 2 * into)
        even = into == out and out % 2 == 0
        maybe = f", or it is conditioned on pictures: give condition_channels={into - out // 2}" if even else ""
        raise CheckpointError(
            f"{flags.source}: out_channels must be {into * (2 if learned else 1)} for variance {spec.variance}, got "
            f"{out}; the scheduler belongs to another network{maybe}"
        )
    flags.agree(condition_channels=into - channels)
    return into - channels
