"""Source: what is exported, apart from how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastddpm.checkpoints import Checkpoint, load_checkpoint
from fastddpm.engines.precision import Precision
from fastddpm.engines.stepper import Stepper
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.step.network import as_network

CPU = torch.device("cpu")


class Exportable(Protocol):
    """What a `Sampler` offers, of which a source is made."""

    schedule: NoiseSchedule
    spec: ModelSpec
    precision: Precision
    checkpoint: Checkpoint | None

    @property
    def model(self) -> Callable[..., Tensor]:
        """The network."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A network with its schedule and conventions.

    Attributes:
        network: (x, t[, y]) → output.
        schedule: the noise schedule it was trained with.
        spec: its conventions.
        checkpoint: where it was read, if it was.
    """

    network: nn.Module
    schedule: NoiseSchedule
    spec: ModelSpec
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, model: Exportable | str | os.PathLike[str]) -> Source:
        """The source of a sampler, or of what `load_checkpoint` takes.

        Raises:
            CheckpointError: there is no such checkpoint or it cannot be read.
            ValueError: the sampler's network is not float32.
        """
        if isinstance(model, (str, os.PathLike)):
            found = load_checkpoint(model)
            return cls(found.network, found.schedule, found.spec, found)
        if model.precision != "fp32":
            raise ValueError(f"export: the sampler's precision must be fp32, got {model.precision}; make it anew")
        network = model.model if isinstance(model.model, nn.Module) else as_network(model.model)
        return cls(network, model.schedule, model.spec, model.checkpoint)

    def stepper(self) -> Stepper:
        """What makes the network's steps eagerly on the CPU."""
        return Stepper.eager(self.network, self.spec, self.schedule.T)
