"""diffusers' files of weights: safetensors or .bin, in one piece or in shards, plain or of a named variant."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.native import read_json
from fastddpm.checkpoints.reading import as_state_dict, read_file

STEM = "diffusion_pytorch_model"
SUFFIXES = ("safetensors", "bin")
_VARIANT = re.compile(rf"{STEM}\.(?!bin$|safetensors)([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
_INDEX = re.compile(rf"{STEM}\.(safetensors|bin)\.index((?:\.[\w-]+)?)\.json")
_MOST_SHARDS = 1000


def choose_weights(names: Collection[str], variant: str | None) -> str | None:
    """Which of a folder's files to read first: safetensors before .bin, one file before an index of shards.

    Args:
        names: The names of the folder's files.
        variant: Such as "fp16"; None for the plain weights.

    Returns:
        The name of a file of weights or of an index, or None if there is none.
    """
    middle = f".{variant}" if variant else ""
    for suffix in SUFFIXES:
        for name in (f"{STEM}{middle}.{suffix}", f"{STEM}.{suffix}.index{middle}.json"):
            if name in names:
                return name
    return None


def variants(names: Collection[str]) -> list[str]:
    """The variants of which there are weights among a folder's files."""
    return sorted({found[1] for found in map(_VARIANT.fullmatch, names) if found})


def missing_weights(source: str, names: Collection[str], variant: str | None) -> str:
    """What to say of a folder in which `choose_weights` found nothing."""
    middle = f".{variant}" if variant else ""
    wanted = " or ".join(f"{STEM}{middle}.{suffix}" for suffix in SUFFIXES)
    others = [other for other in variants(names) if other != variant]
    if variant and choose_weights(names, None):
        remedy = "leave variant out"
    else:
        remedy = f"give variant={others[0]}" if others else "fetch it again"
    got = f"the variants {', '.join(others)}" if others else "neither"
    return f"{source}: there must be {wanted}, whole or in shards, got {got}; {remedy}"


def shards_of(name: str, names: Collection[str]) -> list[str]:
    """The shards that belong to an index, by their names; none for a file of weights.

    Args:
        name: What `choose_weights` chose.
        names: The names of the folder's files.
    """
    found = _INDEX.fullmatch(name)
    if found is None:
        return []
    shard = re.compile(rf"{STEM}{re.escape(found[2])}-\d+-of-\d+\.{found[1]}")
    return sorted(filter(shard.fullmatch, names))


def check_variant(variant: object, source: str) -> str | None:
    """A variant's name, or None.

    Raises:
        CheckpointError: If it cannot be a part of a file's name.
    """
    if variant is None or (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        return variant
    raise CheckpointError(f"{source}: variant must be a part of a file's name like fp16, got {variant!r}; correct it")


def read_weights(folder: Path, variant: str | None) -> tuple[dict[str, Tensor], Path]:
    """Read the weights of a model's folder, whole or not at all.

    Args:
        folder: The folder.
        variant: Such as "fp16"; None for the plain weights.

    Returns:
        The state dict, and the file that was read first.

    Raises:
        CheckpointError: If there are none, a shard is missing or damaged, or the index does not fit the shards.
    """
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    name = choose_weights(names, variant)
    if name is None:
        raise CheckpointError(missing_weights(str(folder), names, variant))
    path = folder / name
    return (_read_shards(path) if name.endswith(".json") else _read_one(path)), path


def _read_one(path: Path) -> dict[str, Tensor]:
    state = as_state_dict(read_file(path))
    if state is None:
        raise CheckpointError(f"{path}: must hold a state dict, tensors by name, got something else; fetch it again")
    return state


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors that an index names, each from its shard."""
    weight_map = read_json(index).get("weight_map")
    shards = shard_names(weight_map)
    if not isinstance(weight_map, dict) or not shards or len(shards) > _MOST_SHARDS:
        raise CheckpointError(f"{index}: weight_map must give each tensor's file, got something else; fetch it again")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; fetch them"
        )
    state: dict[str, Tensor] = {}
    for name in shards:
        part = _read_one(index.parent / name)
        wanted = {key for key, shard in weight_map.items() if shard == name}
        if part.keys() != wanted:
            odd = sorted(part.keys() ^ wanted)[0]
            where = "lacks" if odd in wanted else "also holds"
            raise CheckpointError(f"{index.parent / name}: {where} {odd}, unlike {index.name}; fetch both again")
        state.update(part)
    return state


def shard_names(weight_map: object) -> list[str]:
    """The files of an index in order, or none if they are not plain names of files beside it."""
    if not isinstance(weight_map, dict):
        return []
    names = list(weight_map.values())
    if not all(isinstance(name, str) and name.endswith(SUFFIXES) and Path(name).name == name for name in names):
        return []
    return sorted(set(names))
