"""Any checkpoint that fastddpm reads, written in its own format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from fastddpm.checkpoints import diffusers, load_checkpoint, native
from fastddpm.checkpoints.base import Checkpoint, CheckpointError
from fastddpm.files import check_writable, temporary_folder

Dtype = Literal["fp32", "fp16"]
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    flags: Mapping[str, object] | None = None,
    *,
    dtype: Dtype = "fp32",
    force: bool = False,
) -> Checkpoint:
    """Write a checkpoint of any dialect in fastddpm's own format: a folder with config.json and model.safetensors.

    The copy needs no flags any more. In fp32 it gives the same outputs and the same samples as the original, bit for
    bit; its schedule is the original's, in the arithmetic of the project that it comes from.

    Args:
        source: What `load_checkpoint` takes.
        destination: The folder to write; it appears whole or not at all.
        flags: What the source does not determine, as for `load_checkpoint`.
        dtype: How the weights are stored. They are always widened to float32 on loading.
        force: Whether a checkpoint of fastddpm's own that is there may be replaced. Other files there stay.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: If the source cannot be read, or a weight does not fit into float16.
        FileExistsError: If the destination holds something that may not be replaced.
        ValueError: If dtype is unknown.
        OSError: If nothing can be written there.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"convert_checkpoint: dtype must be fp32 or fp16, got {dtype!r}; pick one")
    target = Path(destination)
    check_destination(target, force)
    checkpoint = load_checkpoint(source, **(flags or {}))
    if target.exists() and checkpoint.path.exists() and target.samefile(checkpoint.path):
        raise FileExistsError(f"{target}: the destination must not be the source itself; give another folder")
    _check_range(checkpoint, dtype)
    write_folder(target, checkpoint, dtype, _history(checkpoint, source, flags or {}))
    return checkpoint


def check_destination(target: Path, force: bool) -> None:
    """Refuse before the work what would be refused after it.

    Raises:
        FileExistsError: If something is there that may not be replaced.
        OSError: If nothing can be written there.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: the destination must be a folder, got a file; give another place")
    if target.is_dir() and any(target.iterdir()):
        own = not (target / native.CONFIG_NAME).exists() or native.detect(target)
        if not own or (target / diffusers.INDEX_NAME).exists():
            raise FileExistsError(f"{target} holds something else than a checkpoint of fastddpm; give another folder")
        if not force:
            raise FileExistsError(f"{target} must be empty or new, got a folder with files in it; use --force to write")
    check_writable(target)


def write_folder(target: Path, checkpoint: Checkpoint, dtype: Dtype, training: Mapping[str, object]) -> None:
    """Write beside the target first, and put it in place when it is whole.

    Raises:
        OSError: If a file cannot be written.
    """
    target = Path(os.path.realpath(target))  # a link to a folder stands for the folder
    with temporary_folder(target) as temporary:
        weights = {name: value.to(_DTYPES[dtype]) for name, value in checkpoint.network.state_dict().items()}
        parts = checkpoint.network, checkpoint.schedule, checkpoint.spec
        native.save(temporary, *parts, weights=weights, training=training)
        if target.is_dir() and any(target.iterdir()):
            # In this order, so that a folder left half-way is no checkpoint at all, rather than two mixed.
            (target / native.CONFIG_NAME).unlink(missing_ok=True)
            for name in (native.WEIGHTS_NAME, native.CONFIG_NAME):
                os.replace(temporary / name, target / name)
        else:
            os.replace(temporary, target)


def _check_range(checkpoint: Checkpoint, dtype: Dtype) -> None:
    if dtype == "fp32":
        return
    largest = torch.finfo(_DTYPES[dtype]).max
    for name, value in checkpoint.network.state_dict().items():
        if value.is_floating_point() and value.numel() and bool(value.abs().max() > largest):
            raise CheckpointError(
                f"{checkpoint.path}: {name} must lie within ±{largest:g} for fp16, got "
                f"{float(value.abs().max()):g}; use fp32"
            )


def _history(checkpoint: Checkpoint, source: str | os.PathLike[str], flags: Mapping[str, object]) -> dict[str, object]:
    """How the copy came about, as JSON: where from, and with which flags."""
    given = {name: _plain(value) for name, value in flags.items() if not name.startswith("_")}
    origin: dict[str, object] = {"dialect": checkpoint.dialect, "name": Path(source).name, "flags": given}
    return {**checkpoint.training, "converted_from": origin}


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
