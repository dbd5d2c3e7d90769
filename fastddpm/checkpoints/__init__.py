"""Loaders for trained checkpoints, one module per dialect: detect → spec → weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.checkpoints import diffusers, native, openai, pesser, w86763777
from fastddpm.checkpoints.base import Checkpoint, CheckpointError
from fastddpm.checkpoints.reading import read_file

__all__ = ["SHIPPED", "Checkpoint", "CheckpointError", "load_checkpoint"]

_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
SHIPPED = ("mnist",)
_FILES = (openai, pesser, w86763777)


def load_checkpoint(name_or_path: str | os.PathLike[str], **flags: object) -> Checkpoint:
    """Load a checkpoint that ships with the package, by name, or one on disk, by path.

    Which project wrote it is found out by its files and keys. A shipped name wins over a folder of that name in the
    working directory: that is `./mnist`, or a `Path`.

    Args:
        name_or_path: One of `SHIPPED`, a checkpoint folder (fastddpm, diffusers), or a file of weights (OpenAI's
            improved- and guided-diffusion, pesser/pytorch_diffusion, w86763777/pytorch-ddpm).
        flags: What a file does not determine, under the names that the project itself gives its options; `preset`
            names a published network. Names that begin with an underscore are taken for notes.

    Returns:
        The network with its schedule and conventions.

    Raises:
        CheckpointError: If there is no such checkpoint, it cannot be read, or a flag is missing, unknown or wrong.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in SHIPPED:
        path = _PRETRAINED / name_or_path
    if not os.path.exists(path):
        raise CheckpointError(
            f"no checkpoint at {path}; give a folder, or one of the shipped names: {', '.join(SHIPPED)}"
        )
    if path.name in (native.CONFIG_NAME, native.WEIGHTS_NAME) and native.detect(path.parent):
        raise CheckpointError(f"{path} is a file of a checkpoint; give its folder, {path.parent}")
    return _load_folder(path, flags) if path.is_dir() else _load_file(path, flags)


def _load_folder(path: Path, flags: Mapping[str, object]) -> Checkpoint:
    is_native, is_diffusers = native.detect(path), diffusers.detect(path)
    if is_native and is_diffusers:
        raise CheckpointError(f"{path} is both {native.FORMAT} and {diffusers.NAME}; keep one of them in the folder")
    if is_diffusers:
        return diffusers.load(path, flags)
    if is_native:
        given = [name for name in flags if not name.startswith("_")]
        if given:
            raise CheckpointError(f"{path}: fastddpm's own checkpoints take no flags, got {', '.join(given)}; omit it")
        return native.load(path)
    try:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    raise CheckpointError(
        f"{path} is not a checkpoint that fastddpm reads: expected a folder with {native.CONFIG_NAME} "
        f"(format {native.FORMAT}) and {native.WEIGHTS_NAME}, or one of {diffusers.NAME} with {diffusers.INDEX_NAME}, "
        f"got {inside}; give another folder"
    )


def _load_file(path: Path, flags: Mapping[str, object]) -> Checkpoint:
    values = read_file(path)
    found = [dialect for dialect in _FILES if dialect.detect(values)]
    if len(found) > 1:
        reasons = " and ".join(f"{dialect.NAME} ({dialect.REASON})" for dialect in found)
        raise CheckpointError(f"{path} could be {reasons}; keep one network in the file")
    if found:
        checkpoint: Checkpoint = found[0].load(path, values, flags)
        return checkpoint
    known = "; ".join(f"{dialect.NAME}: {dialect.REASON}" for dialect in _FILES)
    raise CheckpointError(f"{path} is of no kind that fastddpm reads ({known}), got {_describe(values)}; give another")


def _describe(values: Any) -> str:  # noqa: ANN401 - whatever a file holds
    if not isinstance(values, Mapping):
        return type(values).__name__
    names = sorted(map(str, values))
    if {"model", "ema", "step"} <= set(names):
        return "the keys of denoising-diffusion-pytorch, which is not supported yet"
    return f"keys {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
