"""The smallest network that has every part, random weights, and pictures that can be learned: for quick tests."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastddpm.checkpoints import native
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.pictures.data import ImageData
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

SIDE = 8
CLASSES = 3
T = 20

UNET = UNetConfig(
    sample_size=(SIDE, SIDE), in_channels=1, out_channels=1, channels=(8, 8), layers=1, attention=(False, True),
    norm_groups=4, num_classes=CLASSES + 1,
)  # fmt: skip
SPEC = ModelSpec(shape=(1, SIDE, SIDE), num_classes=CLASSES, null_class=CLASSES, class_names=("bar", "dot", "2"))


def network(config: UNetConfig = UNET, seed: int = 0) -> UNet:
    """A network whose every weight is random, those that training starts at zero too."""
    torch.manual_seed(seed)
    net = UNet(config)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def save_checkpoint(folder: Path, unet: UNetConfig = UNET, spec: ModelSpec = SPEC, **options: Any) -> Path:  # noqa: ANN401
    """A checkpoint in fastddpm's own format."""
    native.save(folder, network(unet), NoiseSchedule.linear(T), spec, **options)
    return folder


def unconditional(**changes: Any) -> tuple[UNetConfig, ModelSpec]:  # noqa: ANN401
    """Configuration and conventions of a network without classes; `changes` are the conventions'."""
    spec = ModelSpec(shape=(1, SIDE, SIDE), **changes)
    unet = dataclasses.replace(UNET, num_classes=None, out_channels=2 if spec.learned_variance else 1)
    return unet, spec


def pictures(n: int = 64) -> ImageData:
    """Pictures of three classes that differ in where they are bright, with a little noise."""
    labels = np.arange(n) % CLASSES
    noise = np.random.default_rng(0).integers(0, 40, (n, 1, SIDE, SIDE))
    images = noise + 200 * (np.arange(SIDE) // 3 == labels[:, None])[:, None, None, :]
    return ImageData(
        torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels), SPEC.class_names, "made-up pictures"
    )


def environment(**extra: str) -> dict[str, str]:
    """Environment of a command that is run as users run it, on one core and without terminal tricks."""
    dropped = ("FASTDDPM_TRACEBACK", "FORCE_COLOR", "TTY_COMPATIBLE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **extra}


def command(*arguments: object) -> list[str]:
    """The command line `fastddpm …` of this interpreter."""
    return [sys.executable, "-m", "fastddpm", *map(str, arguments)]
