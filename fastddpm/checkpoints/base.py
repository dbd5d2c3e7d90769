"""What every dialect's loader returns, and the one way in which weights enter a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, foreign or inconsistent; the message says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained network with all that is needed to sample from it.

    Args:
        network: (x, t[, y]) → output, in evaluation mode.
        schedule: The noise schedule it was trained with.
        spec: The conventions it was trained with.
        dialect: Whose format it was read from.
        path: Where it was read.
        training: How it came about, as far as the file says.
    """

    network: nn.Module
    schedule: NoiseSchedule
    spec: ModelSpec
    dialect: str
    path: Path
    training: Mapping[str, Any]


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put `weights` into `network` as float32, all or none.

    Args:
        network: A module whose parameters may still be on the meta device.
        weights: One tensor for each parameter and buffer, of the same shape.
        source: The file's name for messages.

    Raises:
        CheckpointError: If names or shapes differ or a value is not finite.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source}: weights do not fit the configuration: {'; '.join(problems[:3])}{more}; "
            "take both files from the same checkpoint"
        )
    converted = {name: weights[name].to(torch.float32) for name in expected}
    broken = [name for name, value in converted.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{source}: {len(broken)} tensors hold NaN or infinity, first {broken[0]}; fetch it again"
        )
    network.load_state_dict(converted, strict=True, assign=True)
