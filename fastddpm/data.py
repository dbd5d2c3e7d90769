"""Training pictures: idx files (MNIST's format), folders of images and .npz archives, as one uint8 tensor in memory."""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MAX_BYTES = 64 << 30
_MAX_SIDE = 4096
_MAX_CLASSES = 1 << 16

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Pictures and, where there are any, their classes.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N] in [0, num_classes), or None.
        class_names: One name per class, or None without labels.
        source: What the pictures were read from, for messages and model cards.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    source: str

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return None if self.class_names is None else len(self.class_names)


def load_images(path: str | Path, *, labels: str | Path | None = None, size: int | None = None) -> ImageData:
    """Read training pictures from an idx file, an .npz archive or a folder.

    A folder may hold MNIST's idx files (the training pair is taken), or images; images in sub-folders belong to the
    class that the sub-folder names. An idx file's labels are found beside it by MNIST's naming unless given.

    Args:
        path: The file or the folder.
        labels: An idx file of labels to use instead of the one found by name; for idx files only.
        size: Resize images to this many pixels (centre crop, then Lanczos); for folders of images only.

    Returns:
        The pictures in memory.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file is truncated, foreign or inconsistent, or nothing usable is found.
    """
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(
            f"training data {source} does not exist; give an idx file, an .npz or a folder of images"
        )
    idx = sorted(source.glob("train-images*idx3-ubyte*")) if source.is_dir() else []
    images_in_folder = source.is_dir() and not idx
    if size is not None and not (images_in_folder and 1 <= size <= _MAX_SIDE):
        expected = f"in 1 … {_MAX_SIDE}" if images_in_folder else "left out: only a folder of images is resized"
        raise ValueError(f"{source}: --size must be {expected}, got {size}")
    if labels is not None and (images_in_folder or source.suffix == ".npz"):
        raise ValueError(f"{source}: --labels must be left out, got {labels}; it belongs to idx files only")
    if images_in_folder:
        return _load_folder(source, size)
    if source.suffix == ".npz":
        return _load_npz(source)
    return _load_idx_pair(idx[0] if idx else source, None if labels is None else Path(labels))


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped or not (format: LeCun et al., the MNIST page).

    Args:
        path: The file.

    Returns:
        uint8 array of the shape that the header states.

    Raises:
        ValueError: If the file is not idx, not of bytes, or its length does not match its header.
        OSError: If it cannot be read.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: gzip stream is damaged ({error}); fetch the file again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8 or not 1 <= raw[3] <= 4:
        raise ValueError(f"{path}: not an idx file of unsigned bytes (starts with {raw[:4].hex() or 'nothing'})")
    start = 4 + 4 * raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], dtype=">u4")) if len(raw) >= start else ()
    if not shape or len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path}: header states shape {shape}, but {max(0, len(raw) - start)} bytes follow; fetch it again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def _load_idx_pair(path: Path, labels_path: Path | None) -> ImageData:
    pictures = read_idx(path)
    if pictures.ndim not in (3, 4) or 0 in pictures.shape:
        raise ValueError(
            f"{path}: images must have shape [N, H, W] or [N, H, W, C], got {pictures.shape}; is it labels?"
        )
    if labels_path is None:
        name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        beside = [path.with_name(name), path.with_name(f"{name}.gz")]
        labels_path = next((file for file in beside if file != path and file.exists()), None)
    labels = None if labels_path is None else read_idx(labels_path).astype(np.int64)
    return _assemble(pictures if pictures.ndim == 4 else pictures[..., None], labels, None, path.name)


def _load_npz(path: Path) -> ImageData:
    wanted = {"images", "x", "x_train", "arr_0", "labels", "y", "y_train", "arr_1", "class_names"}
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in wanted.intersection(archive.files)}
    except Exception as error:  # a foreign file surfaces as errors of many types: zip, zlib, header, encoding …
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({error}); write it with numpy.savez") from error
    pictures = next((arrays[n] for n in ("images", "x", "x_train", "arr_0") if n in arrays), None)
    if pictures is None or pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
        found = {n: f"{a.dtype}{list(a.shape)}" for n, a in arrays.items()}
        raise ValueError(f"{path}: needs an array images or arr_0, uint8 [N, H, W, C], got {found or 'none'}")
    labels = next((arrays[n] for n in ("labels", "y", "y_train", "arr_1") if n in arrays), None)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: labels must be integers [N], got {labels.dtype}{list(labels.shape)}")
    names = [str(n) for n in arrays["class_names"]] if "class_names" in arrays else None
    return _assemble(pictures if pictures.ndim == 4 else pictures[..., None], labels, names, path.name)


def _load_folder(folder: Path, size: int | None) -> ImageData:
    files = sorted(
        f
        for f in folder.rglob("*")
        if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".") and f.is_file()
    )
    if not files:
        raise ValueError(f"{folder}: no images found (looked for {', '.join(IMAGE_SUFFIXES)} and idx files)")
    tops = [f.relative_to(folder).parts for f in files]
    in_classes = all(len(parts) > 1 for parts in tops)
    names = sorted({parts[0] for parts in tops}) if in_classes else None
    labels = np.array([names.index(parts[0]) for parts in tops]) if names else None
    mode = "L" if _opened(files[0], lambda image: image.mode) in ("L", "1", "I", "I;16", "LA") else "RGB"
    pictures = [_read_image(file, mode, size) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"{file}: images must have one size, got {picture.shape[:2]} and {pictures[0].shape[:2]}; use --size"
            )
    return _assemble(np.stack(pictures), labels, names, folder.name)


def _read_image(file: Path, mode: str, size: int | None) -> NDArray[np.uint8]:
    image = _opened(file, lambda image: image.convert(mode))
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def _opened(file: Path, read: Callable[[Image.Image], R]) -> R:
    try:
        with Image.open(file) as image:
            return read(image)
    except Exception as error:  # the decoders of damaged images raise what they please
        raise ValueError(f"{file}: not a readable image ({error}); remove or replace it") from error


def _assemble(
    pictures: NDArray[np.uint8], labels: NDArray[np.integer] | None, names: list[str] | None, source: str
) -> ImageData:
    if pictures.nbytes > _MAX_BYTES or len(pictures) == 0:
        raise ValueError(
            f"{source}: needs between 1 picture and {_MAX_BYTES >> 30} GiB of pixels, got {pictures.shape}"
        )
    if pictures.shape[3] not in (1, 3, 4) or 0 in pictures.shape:
        raise ValueError(
            f"{source}: pictures must be [N, H, W, C] with 1, 3 or 4 channels, got {pictures.shape}; move the axes"
        )
    if labels is not None:
        if labels.shape != (len(pictures),):
            raise ValueError(
                f"{source}: {len(pictures)} images but labels of shape {labels.shape}; files do not belong together"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= _MAX_CLASSES:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{source}: labels must be in 0 … {_MAX_CLASSES - 1}, got {wrong}; number the classes")
        names = names or [str(i) for i in range(highest + 1)]
        if highest >= len(names):
            raise ValueError(f"{source}: label {highest} has no name; class_names has {len(names)} entries")
    images = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    integers = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageData(images, integers, None if labels is None or names is None else tuple(names), source)
