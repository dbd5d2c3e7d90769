"""Loaders for trained checkpoints, one module per dialect: detect → config → names → spec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fastddpm.checkpoints import diffusers, diffusers_weights, hub, lucidrains, native, openai, pesser, w86763777
from fastddpm.checkpoints.base import Checkpoint, CheckpointError
from fastddpm.checkpoints.dialect import Dialect
from fastddpm.checkpoints.networks import state_dicts
from fastddpm.checkpoints.reading import read_file

__all__ = ["SHIPPED", "Checkpoint", "CheckpointError", "load_checkpoint"]

_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
SHIPPED = ("mnist",)
_PARTS = (native.CONFIG_NAME, native.WEIGHTS_NAME, diffusers.INDEX_NAME, diffusers_weights.STEM)
_FILES = (
    openai.DIALECT,
    pesser.DIALECT,
    w86763777.DIALECT,
    Dialect(lucidrains.NAME, lucidrains.REASON, lucidrains.detect, lucidrains.load),
)
# What networks that are not supported have among their keys: pieces of names, all of which must be there.
_RELATIVES = {
    "a latent diffusion model": ("model.diffusion_model.",),
    "denoising-diffusion-pytorch's UViT (simple_diffusion)": ("vit.layers.", "time_mlp."),
    "denoising-diffusion-pytorch's KarrasUnet": ("input_block.weight", "to_time_emb."),
    "SR3, a super-resolution network": ("noise_level_mlp.", "downs."),
    "Palette, a network conditioned on pictures": ("cond_embed.", "input_blocks."),
    "DiT, a transformer": ("x_embedder.proj.", "t_embedder.mlp."),
    "a score-SDE network": ("all_modules.",),
}


def load_checkpoint(name_or_path: str | os.PathLike[str], **flags: object) -> Checkpoint:
    """Load a checkpoint that ships with the package, by name, one on disk, by path, or one on the Hugging Face Hub.

    Which project wrote it is found out by its files and keys. A shipped name wins over a folder of that name in the
    working directory: that is `./mnist`, or a `Path`. Where there is nothing of that path, "owner/name" is taken for a
    repository on the Hub, of which only what is needed is fetched, once.

    Args:
        name_or_path: One of `SHIPPED`, a repository on the Hub ("google/ddpm-cifar10-32", "owner/name@revision") or a
            file of weights in one ("owner/name/model.pt"), a checkpoint folder (fastddpm, diffusers), or a file of
            weights (OpenAI's improved- and guided-diffusion, pesser/pytorch_diffusion, w86763777/pytorch-ddpm,
            lucidrains' denoising-diffusion-pytorch).
        flags: What a file does not determine, under the names that the project itself gives its options; `preset`
            names a published network, `null_class` the label that stands for "no class", where guidance is wanted of a
            network that has one, and `image_size` the size of the pictures to draw, an integer or (height, width): any
            that the network can halve as often as it does. Names that begin with an underscore are taken for notes.

    Returns:
        The network with its schedule and conventions.

    Raises:
        CheckpointError: If there is no such checkpoint, it cannot be read, or a flag is missing, unknown or wrong.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and name_or_path in SHIPPED:
        path = _PRETRAINED / name_or_path
    if not os.path.exists(path):
        wanted = hub.parse_id(name_or_path) if isinstance(name_or_path, str) else None
        if wanted is None:
            raise CheckpointError(
                f"no checkpoint at {path}; give a folder, or one of the shipped names: {', '.join(SHIPPED)}"
            )
        path = hub.fetch(wanted, flags)
    folder = _folder_of(path)
    if folder is not None:
        raise CheckpointError(f"{path} is a file of a checkpoint; give its folder, {folder}")
    return _load_folder(path, flags) if path.is_dir() else _load_file(path, flags)


def _folder_of(path: Path) -> Path | None:
    """The checkpoint's folder, if the path is a file of such a checkpoint as is given by its folder."""
    if not path.name.startswith(_PARTS) or path.is_dir():
        return None
    if path.parent.name in diffusers.SUBFOLDERS and (path.parent.parent / diffusers.INDEX_NAME).is_file():
        return path.parent.parent
    if native.detect(path.parent) or diffusers.detect(path.parent):
        return path.parent
    return None


def _load_folder(path: Path, flags: Mapping[str, object]) -> Checkpoint:
    is_native, is_diffusers = native.detect(path), diffusers.detect(path)
    if is_native and is_diffusers:
        raise CheckpointError(f"{path} is both {native.FORMAT} and {diffusers.NAME}; keep one of them in the folder")
    if is_diffusers:
        return diffusers.load(path, flags)
    if is_native:
        given = [name for name in flags if not name.startswith("_") and name not in native.FLAGS]
        if given:
            raise CheckpointError(
                f"{path}: fastddpm's own checkpoints take no flags but {', '.join(native.FLAGS)}, got "
                f"{', '.join(given)}; omit it"
            )
        return native.load(path, flags)
    try:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    raise CheckpointError(
        f"{path} is not a checkpoint that fastddpm reads: expected a folder with {native.CONFIG_NAME} "
        f"(format {native.FORMAT}) and {native.WEIGHTS_NAME}, or one of {diffusers.NAME} with {diffusers.INDEX_NAME}, "
        f"got {inside}; {_file_within(path) or 'give another folder'}"
    )


def _file_within(path: Path) -> str | None:
    """What to say of a folder with another project's file in it."""
    suffixes = (".pt", ".pth", ".ckpt")
    found = sorted(entry.name for entry in path.iterdir() if entry.suffix in suffixes and entry.is_file())
    return f"give the file in it, {path / found[-1]}" if found else None


def _load_file(path: Path, flags: Mapping[str, object]) -> Checkpoint:
    values = read_file(path)
    relative = _relative(values)
    if relative is not None:
        raise CheckpointError(f"{path} holds {relative}, which is not supported; give another file")
    found = [dialect for dialect in _FILES if dialect.detect(values)]
    if len(found) > 1:
        reasons = " and ".join(f"{dialect.name} ({dialect.reason})" for dialect in found)
        raise CheckpointError(f"{path} could be {reasons}; keep one network in the file")
    if found:
        return found[0].load(path, values, flags)
    known = "; ".join(f"{dialect.name}: {dialect.reason}" for dialect in _FILES)
    raise CheckpointError(f"{path} is of no kind that fastddpm reads ({known}), got {_describe(values)}; give another")


def _relative(values: object) -> str | None:
    """Which network that is not supported a file holds, if its keys show one."""
    for state in state_dicts(values).values():
        for what, pieces in _RELATIVES.items():
            if all(any(piece in name for name in state) for piece in pieces):
                return what
    return None


def _describe(values: object) -> str:
    if any(name.startswith("down_blocks.") for state in state_dicts(values).values() for name in state):
        return "the weights of diffusers without their config.json, which must lie beside them in a folder"
    if not isinstance(values, Mapping):
        return type(values).__name__
    names = sorted(map(str, values))
    if {"model", "ema", "step"} <= set(names):
        return (
            "a file of denoising-diffusion-pytorch without its 2-D U-Net (Karras and elucidated ones are not supported)"
        )
    return f"keys {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
