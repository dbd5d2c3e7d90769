"""Pictures of a data set, as one uint8 tensor in memory: idx files (MNIST's format), folders, .npz archives."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastddpm.files import check_regular
from fastddpm.pictures.arrays import check_bytes, read_idx, read_npz
from fastddpm.pictures.picture_file import read_picture

PICTURE_ARRAYS = ("images", "x", "x_train", "arr_0")
"""What the pictures of an .npz archive may be called; the first of them is taken."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MAX_SIDE = 4096
_MAX_CLASSES = 1 << 16


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Pictures and, where there are any, their classes.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N] in [0, num_classes), or None.
        class_names: One name per class, or None without labels.
        source: What the pictures were read from, for messages and model cards.
        note: What was decided in reading them, for people; empty where there was nothing to decide.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    source: str
    note: str = ""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return None if self.class_names is None else len(self.class_names)


def load_images(
    path: str | Path, *, labels: str | Path | None = None, size: int | None = None, classes: bool = True
) -> ImageData:
    """Read pictures from an idx file, an .npz archive or a folder.

    A folder may hold MNIST's idx files (the training pair is taken), or images; images in sub-folders belong to the
    class that the sub-folder names. An idx file's labels are found beside it by MNIST's naming unless given.

    All images of a folder decide together: 3 channels if any is in colour, 4 if any has an alpha that is not opaque
    everywhere, else 1. `ImageData.note` says what was decided.

    Args:
        path: The file or the folder.
        labels: An idx file of labels to use instead of the one found by name; for idx files only.
        size: Resize images to this many pixels (centre crop, then Lanczos); for folders of images only.
        classes: Whether to read classes where there are any.

    Returns:
        The pictures in memory.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file is truncated, foreign, inconsistent or too large, its samples are not known to be
            intensities, images lie beside class folders, or nothing usable is found.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"pictures {source} do not exist; give an idx file, an .npz or a folder of images")
    idx = sorted(source.glob("train-images*idx3-ubyte*")) if source.is_dir() else []
    images_in_folder = source.is_dir() and not idx
    if size is not None and not (images_in_folder and 1 <= size <= _MAX_SIDE):
        expected = f"in 1 … {_MAX_SIDE}" if images_in_folder else "left out: only a folder of images is resized"
        raise ValueError(f"{source}: --size must be {expected}, got {size}")
    if labels is not None and (images_in_folder or source.suffix == ".npz" or not classes):
        why = "it belongs to idx files only" if classes else "no classes are wanted"
        raise ValueError(f"{source}: --labels must be left out, got {labels}; {why}")
    if images_in_folder:
        return _load_folder(source, size, classes)
    if source.suffix == ".npz":
        return _load_npz(source, classes)
    return _load_idx_pair(idx[0] if idx else source, None if labels is None else Path(labels), classes)


def _load_idx_pair(path: Path, labels_path: Path | None, classes: bool) -> ImageData:
    pictures = read_idx(path)
    if pictures.ndim not in (3, 4) or 0 in pictures.shape:
        raise ValueError(
            f"{path}: images must have shape [N, H, W] or [N, H, W, C], got {pictures.shape}; is it labels?"
        )
    if labels_path is None and classes:
        name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        beside = [path.with_name(name), path.with_name(f"{name}.gz")]
        labels_path = next((file for file in beside if file != path and file.exists()), None)
    labels = None if labels_path is None else read_idx(labels_path).astype(np.int64)
    return _assemble(pictures if pictures.ndim == 4 else pictures[..., None], labels, None, path.name)


def _load_npz(path: Path, classes: bool) -> ImageData:
    in_classes = ("labels", "y", "y_train", "arr_1", "class_names") if classes else ()
    arrays = read_npz(path, (*PICTURE_ARRAYS, *in_classes))
    pictures = next((arrays[n] for n in PICTURE_ARRAYS if n in arrays), None)
    if pictures is None or pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
        found = {n: f"{a.dtype}{list(a.shape)}" for n, a in arrays.items()}
        raise ValueError(f"{path}: needs an array images or arr_0, uint8 [N, H, W, C], got {found or 'none'}")
    labels = next((arrays[n] for n in ("labels", "y", "y_train", "arr_1") if n in arrays), None)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: labels must be integers [N], got {labels.dtype}{list(labels.shape)}")
    names = [str(n) for n in arrays["class_names"]] if "class_names" in arrays else None
    return _assemble(pictures if pictures.ndim == 4 else pictures[..., None], labels, names, path.name)


def _load_folder(folder: Path, size: int | None, classes: bool) -> ImageData:
    files, others = image_files(folder)
    names, labels = classes_of(folder, files) if classes else (None, None)
    pictures: list[NDArray[np.uint8]] = []
    remarks: Counter[str] = Counter()
    for file in files:
        picture = read_picture(file, size)
        pixels = picture.pixels
        if pictures and pixels.shape[:2] != pictures[0].shape[:2]:
            raise ValueError(
                f"{file}: images must have one size, got {pixels.shape[:2]} and {pictures[0].shape[:2]}; use --size"
            )
        check_bytes(str(folder), (len(files), *pixels.shape), len(files) * pixels.nbytes)
        pictures.append(pixels)
        remarks.update(picture.remarks)
    kinds = Counter(_KINDS[pixels.shape[2]] for pixels in pictures)
    alpha = any(pixels.shape[2] in (2, 4) for pixels in pictures)
    channels = 4 if alpha else max(pixels.shape[2] for pixels in pictures)
    stacked = np.stack([_with_channels(pixels, channels) for pixels in pictures])
    note = [f"{count:,} {remark}" for remark, count in sorted(remarks.items())]
    if len(kinds) > 1 or alpha:
        found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        note.insert(0, f"{found}: all become {_KINDS[channels]}")
    if others:
        suffixes = ", ".join(sorted({other.suffix or other.name for other in others})[:5])
        note.append(f"{len(others):,} other files left out ({suffixes})")
    return _assemble(stacked, labels, names, folder.name, "; ".join(note))


_KINDS = {1: "gray", 2: "gray with alpha", 3: "in colour", 4: "in colour with alpha"}


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below a folder, through links too, and the other files, both sorted; hidden ones are neither.

    Raises:
        ValueError: If there are no images, or one is a link to nothing, a pipe, a socket or a device.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))  # links may lead in circles
        folders[:] = [n for n in folders if not n.startswith(".") and os.path.realpath(f"{place}/{n}") not in seen]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    images = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{folder}: no images found (looked for {', '.join(IMAGE_SUFFIXES)} and idx files)")
    for file in images:
        check_regular(file)
        if not file.exists():
            raise ValueError(f"{file}: the link must lead to an image, got one to nothing; mend or remove it")
    return images, sorted(set(found) - set(images))


def classes_of(folder: Path, files: list[Path]) -> tuple[list[str] | None, NDArray[np.integer] | None]:
    """The classes that the sub-folders name and each image's, or None for both where no image is in a sub-folder."""
    tops = [file.relative_to(folder).parts for file in files]
    stray = next((file for file, parts in zip(files, tops, strict=True) if len(parts) == 1), None)
    names = sorted({parts[0] for parts in tops if len(parts) > 1})
    if not names:
        return None, None
    if stray is not None:
        raise ValueError(
            f"{folder}: images must all be in sub-folders, which name their classes, or none, got {stray.name} beside "
            f"{names[0]}/; move it, or use --no-classes"
        )
    index = {name: label for label, name in enumerate(names)}
    return names, np.array([index[parts[0]] for parts in tops])


def _with_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """The same picture with more channels: gray as colour, and opaque where it has no alpha."""
    found = pixels.shape[2]
    if found == channels:
        return pixels
    colour = pixels[..., [0, 0, 0]] if found < 3 else pixels[..., :3]
    if channels == 3:
        return colour
    alpha = pixels[..., -1:] if found == 2 else np.full_like(colour[..., :1], 255)
    return np.concatenate((colour, alpha), axis=2)


def check_layout(source: str, shape: tuple[int, ...]) -> None:
    """Check that an array [N, H, W, C] may be pictures.

    Raises:
        ValueError: If it is empty, or has the axes of [N, C, H, W] by its looks.
    """
    _, H, W, C = shape
    if 0 in shape:
        raise ValueError(f"{source}: needs at least 1 picture of 1 pixel, got {shape}; give another file")
    if C > 4 and H < min(W, C):
        raise ValueError(
            f"{source}: pictures must be [N, H, W, C], got [N, C, H, W] by its looks, {shape}; move the axes"
        )


def _assemble(
    pictures: NDArray[np.uint8],
    labels: NDArray[np.integer] | None,
    names: list[str] | None,
    source: str,
    note: str = "",
) -> ImageData:
    check_layout(source, pictures.shape)
    N = len(pictures)
    if labels is not None:
        if labels.shape != (N,):
            raise ValueError(f"{source}: {N} images but labels of shape {labels.shape}; files do not belong together")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= _MAX_CLASSES:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{source}: labels must be in 0 … {_MAX_CLASSES - 1}, got {wrong}; number the classes")
        names = names or [str(i) for i in range(highest + 1)]
        if highest >= len(names):
            raise ValueError(f"{source}: label {highest} has no name; class_names has {len(names)} entries")
    images = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    integers = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageData(images, integers, None if labels is None or names is None else tuple(names), source, note)
