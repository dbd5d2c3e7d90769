"""Loaders for trained checkpoints, one module per dialect: detect → spec → weights."""

from __future__ import annotations

import os
from pathlib import Path

from fastddpm.checkpoints import native
from fastddpm.checkpoints.base import Checkpoint, CheckpointError

__all__ = ["SHIPPED", "Checkpoint", "CheckpointError", "load_checkpoint"]

_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
SHIPPED = ("mnist",)


def load_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Load a checkpoint that ships with the package, by name, or one on disk, by path.

    A path that exists wins over a shipped name.

    Args:
        name_or_path: One of `SHIPPED`, or a checkpoint folder.

    Returns:
        The network with its schedule and conventions.

    Raises:
        CheckpointError: If there is no such checkpoint or it cannot be read.
    """
    path = Path(name_or_path)
    if not path.exists() and str(name_or_path) in SHIPPED:
        path = _PRETRAINED / str(name_or_path)
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint at {path}; give a folder, or one of the shipped names: {', '.join(SHIPPED)}"
        )
    if native.detect(path):
        return native.load(path)
    inside = sorted(entry.name for entry in path.iterdir())[:5] if path.is_dir() else "a file"
    raise CheckpointError(
        f"{path} is not a checkpoint that fastddpm reads: expected a folder with {native.CONFIG_NAME} "
        f"(format fastddpm) and {native.WEIGHTS_NAME}, got {inside}"
    )
