"""Dialect: how one project's files are told from others and read; most hold a U-Net like ours, under other names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from fastddpm.checkpoints.base import Checkpoint, CheckpointError, blamed_on
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.networks import choose_network, find_networks, training_of
from fastddpm.checkpoints.renaming import Names, load_renamed
from fastddpm.nets.unet import UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

StateDict = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A project that writes files of its own.

    Args:
        name: Its name.
        reason: What shows that a file is of it.
        detect: Whether the contents of a file are of it.
        load: Makes the network, its schedule and conventions from a path, the contents of the file and the flags.
    """

    name: str
    reason: str
    detect: Callable[[object], bool]
    load: Callable[[Path, object, Mapping[str, object]], Checkpoint]


@dataclasses.dataclass(frozen=True)
class UNetDialect:
    """A project whose files hold state dicts of a U-Net like ours: what is its own.

    Args:
        name: Its name.
        reason: What shows that a file is of it.
        entries: Keys that every network of it has.
        flags: The names of its options.
        config: The structure, from the weights' names and shapes and the flags; asks for all that is missing first.
        process: The schedule and the conventions, from the structure, the weights and the flags.
        names: What it calls the parts of a network.
        presets: Flags of its published networks, by their names.
        relatives: What is published with these and draws no pictures, by name: what it is, and what to do with it.
        constants: Keys of tensors that are no weights.
    """

    name: str
    reason: str
    entries: tuple[str, ...]
    flags: tuple[str, ...]
    config: Callable[[StateDict, Flags], UNetConfig]
    process: Callable[[UNetConfig, StateDict, Flags], tuple[NoiseSchedule, ModelSpec]]
    names: Callable[[UNetConfig], Names]
    presets: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    relatives: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: tuple[str, ...] = ()

    def detect(self, values: object) -> bool:
        """Whether the contents of a file hold such weights."""
        return bool(find_networks(values, *self.entries))

    def load(self, path: Path, values: object, given: Mapping[str, object]) -> Checkpoint:
        """Make the network, its schedule and conventions from a file's contents and the flags.

        Of several networks in the file it takes the averaged weights; the flag `model` picks another by its name.

        Raises:
            CheckpointError: If the weights are not whole, or flags are missing, unknown or wrong.
        """
        source, preset = f"{path}, taken for {self.name} ({self.reason})", given.get("preset")
        if isinstance(preset, str) and preset in self.relatives:
            raise CheckpointError(f"{source}: {preset} is {self.relatives[preset]}; give a network that draws pictures")
        flags = Flags(source, given, self.flags, self.presets)
        name, state = choose_network(find_networks(values, *self.entries), flags)
        with blamed_on(flags.source):
            config = self.config(state, flags)
            schedule, spec = self.process(config, state, flags)
        weights = {key: value for key, value in state.items() if key not in self.constants}
        network = load_renamed(config, self.names(config), weights, flags.source)
        training = training_of(values, name)
        return Checkpoint(network, schedule, spec, self.name, path, training, self.reason, flags.settings())
