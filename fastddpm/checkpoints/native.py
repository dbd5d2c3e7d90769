"""fastddpm's own format: a folder with config.json and model.safetensors.

config.json holds the network's structure ("unet"), or what another package needs to make it ("foreign": its kind,
module and arguments), with "schedule", "spec" and "training".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, blamed_on, check_file, check_weights, load_weights
from fastddpm.checkpoints.flags import Flags, classes_of
from fastddpm.checkpoints.lucidrains_package import Module, PackageUNet
from fastddpm.checkpoints.lucidrains_schedule import BUFFERS, RoundedSchedule
from fastddpm.files import write_json, write_tensors
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
        network: UNet | PackageUNet
        if "foreign" in config:
            network, rows = _foreign_network(config["foreign"], spec, path)
            spec = _resized(spec, flags, len(network.arguments.get("dim_mults", ())))
        else:
            unet = UNetConfig.from_dict(config["unet"])
            check_agreement(unet, spec)
            spec = _resized(spec, flags, len(unet.channels))
            network, rows = _own_network(dataclasses.replace(unet, sample_size=spec.shape[1:])), unet.num_classes
        if "null_class" in flags and spec.null_class is None:
            spec = dataclasses.replace(spec, class_names=None, **classes_of(rows, flags))
        flags.agree(null_class=spec.null_class)
    weights, source = read_safetensors(path / WEIGHTS_NAME), str(path / WEIGHTS_NAME)
    if isinstance(network, PackageUNet):
        schedule = _rounded_schedule(schedule, weights, source)
        network.load(check_weights(network.shapes(), weights, source))
    else:
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


def _own_network(config: UNetConfig) -> UNet:
    """Our U-Net, without weights."""
    with torch.device("meta"):
        return UNet(config)


def _foreign_network(entry: object, spec: ModelSpec, path: Path) -> tuple[PackageUNet, int | None]:
    """Another package's network, without weights, and the rows of its class embedding.

    Raises:
        CheckpointError: If the entry is not one that `save` writes, or the package is missing.
        ValueError: If the network does not fit the conventions.
    """
    if not isinstance(entry, dict) or entry.keys() != {"kind", "module", "arguments"}:
        raise CheckpointError(f"{path / CONFIG_NAME}: foreign must hold kind, module and arguments; write it again")
    if entry["kind"] != _LUCIDRAINS or entry["module"] not in get_args(Module):
        raise CheckpointError(
            f"{path / CONFIG_NAME}: foreign must be of kind {_LUCIDRAINS} and module {' or '.join(get_args(Module))}, "
            f"got {entry['kind']!r} and {entry['module']!r}; update fastddpm"
        )
    if not isinstance(entry["arguments"], dict) or not all(isinstance(name, str) for name in entry["arguments"]):
        raise CheckpointError(f"{path / CONFIG_NAME}: the arguments of foreign must be named values; write it again")
    network = PackageUNet(entry["module"], entry["arguments"])
    channels, classes = entry["arguments"].get("channels", 3), network.classes
    if channels != spec.shape[0] or (classes is None) != (spec.num_classes is None):
        raise ValueError(
            f"foreign and spec must agree, got {channels} channels and {classes} classes but spec.shape {spec.shape} "
            f"and {spec.num_classes}"
        )
    return network, None if classes is None else classes + 1


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
    network: nn.Module,
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
        network: The network whose configuration is stored: a `UNet`, or one that the lucidrains loader made.
        schedule: The noise schedule it was trained with.
        spec: The conventions it was trained with.
        weights: Parameters to store instead of the network's own (an exponential moving average, say).
        dtype: How the weights are stored; they are always computed with in the sampler's precision.
        training: How the checkpoint came about, for people: data, steps, loss.

    Raises:
        TypeError: If the network is of another kind.
        OSError: If a file cannot be written.
    """
    if isinstance(network, UNet):
        structure: dict[str, Any] = {"unet": network.config.to_dict()}
        own: Mapping[str, Tensor] = network.state_dict()
    elif isinstance(network, PackageUNet):
        arguments = dict(network.arguments)
        structure = {"foreign": {"kind": _LUCIDRAINS, "module": network.module, "arguments": arguments}}
        # As copies: parts of one tensor cannot be stored.
        own = {name: value.clone() for name, value in network.weights().items()}
    else:
        raise TypeError(f"native.save: network must be a UNet, got {type(network).__name__}; only those can be stored")
    tensors = {name: value.to(dtype) for name, value in (weights or own).items()}
    if isinstance(schedule, RoundedSchedule) and isinstance(network, PackageUNet):
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


def read_json(path: Path) -> dict[str, Any]:
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
