"""fastddpm's own format: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, load_weights
from fastddpm.files import write_json, write_tensors
from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec
from fastddpm.unet import UNet, UNetConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = "fastddpm"
FORMAT_VERSION = 1

T = TypeVar("T")


def detect(path: Path) -> bool:
    """Whether `path` is a folder in this format, perhaps a damaged one.

    Raises:
        CheckpointError: If its config.json cannot be read, so that nobody can tell.
    """
    return (path / CONFIG_NAME).is_file() and read_json(path / CONFIG_NAME).get("format") == FORMAT


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
        path: The folder.

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
    try:
        unet = UNetConfig.from_dict(config["unet"])
        schedule = NoiseSchedule.from_config(config["schedule"])
        spec = ModelSpec.from_dict(config["spec"])
        check_agreement(unet, spec)
    except KeyError as error:
        raise CheckpointError(f"{path / CONFIG_NAME}: the entry {error} is missing; write the file again") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG_NAME}: {error}") from error
    with torch.device("meta"):
        network = UNet(unet)
    load_weights(network, read_safetensors(path / WEIGHTS_NAME), str(path / WEIGHTS_NAME))
    training = config.get("training")
    return Checkpoint(network.eval(), schedule, spec, FORMAT, path, training if isinstance(training, dict) else {})


def check_agreement(unet: UNetConfig, spec: ModelSpec) -> None:
    """Check that a network's structure fits the conventions.

    Raises:
        ValueError: If shape, output channels or classes do not agree.
    """
    channels, height, width = spec.shape
    expected = channels * (2 if spec.learned_variance else 1)
    if (unet.in_channels, *unet.sample_size) != (channels, height, width) or unet.out_channels != expected:
        raise ValueError(
            f"unet and spec must agree, got unet {unet.in_channels}→{unet.out_channels} channels at "
            f"{unet.sample_size} but spec.shape {spec.shape} with variance {spec.variance}"
        )
    rows = 0 if unet.num_classes is None else unet.num_classes
    needed = max(spec.num_classes or 0, 0 if spec.null_class is None else spec.null_class + 1)
    if needed > rows or (rows > 0 and spec.num_classes is None):
        raise ValueError(f"unet has {rows} class rows but spec needs {needed} (num_classes and null_class)")


def save(
    path: Path,
    network: UNet,
    schedule: NoiseSchedule,
    spec: ModelSpec,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; each file appears whole or not at all.

    Args:
        path: The folder; it is made if it is missing.
        network: The network whose configuration is stored.
        schedule: The noise schedule it was trained with.
        spec: The conventions it was trained with.
        weights: Parameters to store instead of the network's own (an exponential moving average, say).
        dtype: How the weights are stored; they are always computed with in the sampler's precision.
        training: How the checkpoint came about, for people: data, steps, loss.

    Raises:
        OSError: If a file cannot be written.
    """
    tensors = {name: value.to(dtype) for name, value in (weights or network.state_dict()).items()}
    write_tensors(path / WEIGHTS_NAME, tensors, {"format": FORMAT})
    write_json(
        path / CONFIG_NAME,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "unet": network.config.to_dict(),
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
    return _opened(path, lambda: load_file(path))


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
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint folder is incomplete")
    try:
        return read()
    except Exception as error:  # the library lets a damaged header surface as errors of many types
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: If it is missing, damaged, or holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; the checkpoint folder is incomplete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); fetch or write the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(config).__name__}; fetch it again")
    return config
