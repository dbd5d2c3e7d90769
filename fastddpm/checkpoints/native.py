"""fastddpm's own format: a folder with config.json and model.safetensors.

config.json holds the network's structure ("unet", or "lucidrains" for denoising-diffusion-pytorch's), "schedule",
"spec" and "training".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, blamed_on, check_file, load_weights
from fastddpm.checkpoints.flags import Flags, classes_of
from fastddpm.checkpoints.lucidrains_schedule import BUFFERS, RoundedSchedule
from fastddpm.files import write_json, write_tensors
from fastddpm.nets.lucidrains import LucidrainsConfig, LucidrainsUNet
from fastddpm.nets.rows import RowNetwork
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "fastddpm"
FORMAT_VERSION = 1
FLAGS = ("null_class", "image_size")
_LUCIDRAINS = "lucidrains"
_ARRAY = "schedule."

T = TypeVar("T")


def detect(path: Path) -> bool:
    """Whether `path` is a folder in this format, perhaps a damaged one.

    Raises:
        CheckpointError: If its config.json cannot be read, so that nobody can tell.
    """
    return (path / CONFIG_NAME).is_file() and read_json(path / CONFIG_NAME).get("format") == FORMAT


def load(path: Path, given: Mapping[str, object] | None = None) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
        path: The folder.
        given: Flags: `null_class`, the label that stands for "no class" where the folder names none, and `image_size`,
            to draw pictures of another size than the network was trained on.

    Returns:
        The network in float32 on the CPU, in evaluation mode, with its schedule and conventions.

    Raises:
        CheckpointError: If a file is missing, truncated or foreign, or the weights do not fit the configuration.
    """
    config = read_json(path / CONFIG_NAME)
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / CONFIG_NAME}: format_version must be {FORMAT_VERSION}, got {version!r}; update fastddpm"
        )
    with blamed_on(str(path / CONFIG_NAME)):
        schedule = NoiseSchedule.from_config(config["schedule"])
        spec = ModelSpec.from_dict(config["spec"])
        flags = Flags(str(path), given or {}, FLAGS)
        network: RowNetwork
        if _LUCIDRAINS in config:
            structure = LucidrainsConfig.from_dict(config[_LUCIDRAINS])
            rows = _check_lucidrains(structure, spec)
            spec = _resized(spec, flags, len(structure.dim_mults))
            with torch.device("meta"):
                network = LucidrainsUNet(structure)
        else:
            unet = UNetConfig.from_dict(config["unet"])
            check_agreement(unet, spec)
            spec = _resized(spec, flags, len(unet.channels))
            rows = unet.num_classes
            with torch.device("meta"):
                network = UNet(dataclasses.replace(unet, sample_size=spec.shape[1:]))
        if "null_class" in flags and spec.null_class is None:
            spec = dataclasses.replace(spec, class_names=None, **classes_of(rows, flags))
        flags.agree(null_class=spec.null_class)
    weights, source = read_safetensors(path / WEIGHTS_NAME), str(path / WEIGHTS_NAME)
    if network.kind == _LUCIDRAINS:
        schedule = _rounded_schedule(schedule, weights, source)
    load_weights(network, weights, source)
    training = config.get("training")
    history = training if isinstance(training, dict) else {}
    reason = f"{CONFIG_NAME} with format {FORMAT}"
    return Checkpoint(network.eval(), schedule, spec, FORMAT, path, history, reason)


def _resized(spec: ModelSpec, flags: Flags, levels: int) -> ModelSpec:
    """The conventions with the size of pictures that is asked for."""
    if "image_size" not in flags:
        return spec
    return dataclasses.replace(spec, shape=(spec.shape[0], *flags.size(("image_size",), levels)))


def _check_lucidrains(structure: LucidrainsConfig, spec: ModelSpec) -> int | None:
    """The rows of the class embedding, "no class" included, if the conventions are such a network's.

    Raises:
        ValueError: If they are not.
    """
    expected = structure.channels * (2 if spec.learned_variance else 1)
    found = (structure.channels, structure.out_channels, structure.num_classes, structure.self_condition)
    if found != (spec.shape[0], expected, spec.num_classes, spec.self_condition):
        raise ValueError(
            f"lucidrains and spec must agree, got {found[0]}→{found[1]} channels, {found[2]} classes and "
            f"self_condition {found[3]} but spec.shape {spec.shape} with variance {spec.variance}, {spec.num_classes} "
            f"classes and self_condition {spec.self_condition}"
        )
    if any(size % 2 ** (len(structure.dim_mults) - 1) for size in spec.shape[1:]):
        raise ValueError(f"spec.shape must be divisible by 2 for each of lucidrains' levels but one, got {spec.shape}")
    return None if structure.num_classes is None else structure.num_classes + 1


def _rounded_schedule(exact: NoiseSchedule, weights: dict[str, Tensor], source: str) -> RoundedSchedule:
    """The schedule with the package's own arrays, which are taken out of the weights.

    Raises:
        CheckpointError: If one of them is not [T], or the betas are out of range.
    """
    arrays = {name: weights.pop(_ARRAY + name) for name in BUFFERS if _ARRAY + name in weights}
    odd = [name for name, value in arrays.items() if value.shape != (exact.T,) or value.dtype != torch.float32]
    if odd:
        raise CheckpointError(f"{source}: {_ARRAY}{odd[0]} must hold {exact.T} float32 numbers; write it again")
    with blamed_on(source):
        schedule = RoundedSchedule.of(exact, arrays)
    return schedule


def check_agreement(unet: UNetConfig, spec: ModelSpec) -> None:
    """Check that a network's structure fits the conventions.

    Raises:
        ValueError: If shape, output channels or classes do not agree.
    """
    channels, height, width = spec.shape
    expected = channels * (2 if spec.learned_variance else 1)
    into = channels + spec.condition_channels
    if (unet.in_channels, *unet.sample_size) != (into, height, width) or unet.out_channels != expected:
        raise ValueError(
            f"unet and spec must agree, got unet {unet.in_channels}→{unet.out_channels} channels at "
            f"{unet.sample_size} but spec.shape {spec.shape} with variance {spec.variance}, condition_channels "
            f"{spec.condition_channels}"
        )
    rows = 0 if unet.num_classes is None else unet.num_classes
    needed = max(spec.num_classes or 0, 0 if spec.null_class is None else spec.null_class + 1)
    if needed > rows or (rows > 0 and spec.num_classes is None):
        raise ValueError(f"unet has {rows} class rows but spec needs {needed} (num_classes and null_class)")


def save(
    path: Path,
    network: RowNetwork,
    schedule: NoiseSchedule,
    spec: ModelSpec,
    *,
    weights: Mapping[str, Tensor] | None = None,
    training: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint folder; each file appears whole or not at all.

    Args:
        path: The folder; it is made if it is missing.
        network: The network whose configuration is stored.
        schedule: The noise schedule it was trained with.
        spec: The conventions it was trained with.
        weights: Parameters to store as they are (an exponential moving average, say), instead of the network's own in
            float32. Whatever their type, they are computed with in the sampler's precision.
        training: How the checkpoint came about, for people: data, steps, loss.

    Raises:
        TypeError: If the network is of another kind.
        OSError: If a file cannot be written.
    """
    try:
        structure: dict[str, object] = {network.kind: network.config.to_dict()}
    except AttributeError:
        got = type(network).__name__
        raise TypeError(f"native.save: network must be a UNet, got {got}; only those can be stored") from None
    tensors = dict(weights or {name: value.float() for name, value in network.state_dict().items()})
    if isinstance(schedule, RoundedSchedule) and network.kind == _LUCIDRAINS:
        known = {name for name in BUFFERS if name == "betas" or name in vars(schedule)}
        tensors |= {_ARRAY + name: getattr(schedule, name).clone() for name in known}
    write_tensors(path / WEIGHTS_NAME, tensors, {"format": FORMAT})
    write_json(
        path / CONFIG_NAME,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **structure,
            "schedule": schedule.to_config(),
            "spec": spec.to_dict(),
            "training": dict(training or {}),
        },
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: If it is missing, truncated or foreign.
    """
    # Copies: a tensor that is a view of the mapped file would keep all of it in memory.
    return _opened(path, lambda: {name: tensor.clone() for name, tensor in load_file(path).items()})


def read_metadata(path: Path) -> dict[str, str]:
    """Read the string metadata of a safetensors file.

    Raises:
        CheckpointError: If it is missing, truncated or foreign.
    """

    def read() -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})

    return _opened(path, read)


def _opened(path: Path, read: Callable[[], T]) -> T:
    check_file(path)
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the checkpoint folder is incomplete")
    try:
        return read()
    except Exception as error:  # the library lets a damaged header surface as errors of many types
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: If it is missing, damaged, or holds something else.
    """
    check_file(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; the checkpoint folder is incomplete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch or write the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(config).__name__}; fetch it again")
    return config
