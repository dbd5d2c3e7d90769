"""From the sampler's state to pictures and files: grids, folders of PNGs, GIFs and .npz archives."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastddpm.files import atomic_path

Output = Literal["unit", "raw", "uint8", "pil"]
ToBytes = Literal["round", "truncate"]
ToUnit = Literal["clamp", "affine", "identity"]
SHOWN_CHANNELS = (1, 3, 4)
"""Channels of pictures that image files can hold: gray, colour, colour with alpha."""
GAP = 2
"""Pixels between the pictures of a grid and around them."""


def to_unit(x: Tensor, mapping: ToUnit = "clamp") -> Tensor:
    """Map a state in [−1, 1] to [0, 1]: clamp(x/2 + ½, 0, 1).

    What the state is clipped to in a run, it is also here; only without clipping do the other mappings leave [0, 1].

    Args:
        x: any shape.
        mapping: "clamp"; "affine", x/2 + ½ alone; or "identity", x of networks whose range is [0, 1] already.
    """
    if mapping == "identity":
        return x
    return (x / 2 + 0.5).clamp(0, 1) if mapping == "clamp" else x / 2 + 0.5


def to_uint8(x: Tensor, to_bytes: ToBytes = "round", mapping: ToUnit = "clamp") -> Tensor:
    """Map a state to bytes: the nearest of the 256 levels ("round") or the next lower one ("truncate").

    `mapping` is as in `to_unit`; pictures outside [0, 1] are clamped.
    """
    if mapping == "identity":
        x = 2 * x - 1
    if to_bytes == "truncate":
        return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return (to_unit(x) * 255).round().to(torch.uint8)


def to_pil(x: Tensor, to_bytes: ToBytes = "round", mapping: ToUnit = "clamp") -> list[Image.Image]:
    """Map states [n, C, H, W] to PIL images, by way of `to_uint8`; C is 1, 3 or 4.

    Raises:
        ValueError: C is none of these.
    """
    return [_image(picture) for picture in to_uint8(x, to_bytes, mapping)]


def check_output(output: object) -> None:
    """Raise ValueError unless `output` is a form that `to_output` knows."""
    if not isinstance(output, str) or output not in get_args(Output):
        raise ValueError(f"sample: output must be unit, raw, uint8 or pil, got {output!r}; pick one")


def to_output(
    x: Tensor, output: Output, to_bytes: ToBytes = "round", mapping: ToUnit = "clamp"
) -> Tensor | list[Image.Image]:
    """The final state in the form that the caller of `Sampler.sample` asked for."""
    if output == "pil":
        return to_pil(x, to_bytes, mapping)
    if output == "uint8":
        return to_uint8(x, to_bytes, mapping)
    return x if output == "raw" else to_unit(x, mapping)


def _image(picture: Tensor) -> Image.Image:
    """A uint8 picture [C, H, W] as a PIL image."""
    if picture.shape[0] not in SHOWN_CHANNELS:
        raise ValueError(
            f"pictures must have 1, 3 or 4 channels, got {picture.shape[0]}; use output='raw' and map them"
        )
    array = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def make_grid(pictures: Tensor, *, columns: int | None = None, min_side: int = 0) -> Image.Image:
    """Lay pictures out in rows.

    Args:
        pictures: uint8 [n, C, H, W].
        columns: pictures per row; None makes the grid about square.
        min_side: enlarge by whole factors (pixels stay pixels) until the longer side has this many pixels.

    Returns:
        The grid.

    Raises:
        ValueError: there are no pictures, or they have neither 1, 3 nor 4 channels.
    """
    n, _, height, width = pictures.shape
    if n == 0:
        raise ValueError("make_grid: pictures must be at least one, got none")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    images = [_image(picture) for picture in pictures]
    grid = Image.new(images[0].mode, grid_size(n, height, width, columns=columns))
    for i, image in enumerate(images):
        grid.paste(image, (GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)))
    factor = max(1, math.ceil(min_side / max(grid.size)))
    return grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST) if factor > 1 else grid


def grid_size(n: int, height: int, width: int, *, columns: int | None = None) -> tuple[int, int]:
    """(width, height) of the grid that `make_grid` makes of n pictures, before it is enlarged."""
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    return columns * (width + GAP) + GAP, math.ceil(n / columns) * (height + GAP) + GAP


def save_image(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write one image, atomically; the suffix chooses the format.

    Raises:
        ValueError: the suffix is not an image format.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: the file name must end like an image (.png), got {suffix or 'no suffix'!r}")
    _write(path, image, str(kind))


def encode_png(picture: Tensor) -> bytes:
    """A picture as the bytes of a PNG file.

    Args:
        picture: uint8 [C, H, W]; C is 1, 3 or 4.

    Raises:
        ValueError: C is none of these.
    """
    return _encoded(_image(picture), "PNG")


def decode_png(content: bytes) -> NDArray[np.uint8]:
    """What `encode_png` encoded, as uint8 [H, W, C].

    Raises:
        OSError: it is no image.
    """
    with Image.open(io.BytesIO(content)) as image:
        array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:  # noqa: ANN401
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def _write(path: str | os.PathLike[str], image: Image.Image, kind: str, **options: Any) -> None:  # noqa: ANN401
    # In memory first: writing to a file, Pillow's encoders overlook that a disk took only a part.
    content = _encoded(image, kind, **options)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def save_folder(folder: str | os.PathLike[str], pictures: Tensor, names: Sequence[int]) -> None:
    """Write pictures as `000042.png` and so on, each atomically.

    Args:
        folder: where; made if missing.
        pictures: uint8 [n, C, H, W].
        names: one number per picture (the sample id).

    Raises:
        OSError: a file cannot be written.
    """
    for picture, name in zip(pictures, names, strict=True):
        save_image(folder_file(folder, name), _image(picture))


def read_folder(folder: str | os.PathLike[str], names: Sequence[int]) -> Tensor:
    """Read back what `save_folder` wrote.

    Args:
        folder: where.
        names: the numbers of the pictures.

    Returns:
        uint8 [n, C, H, W].

    Raises:
        OSError: a file is missing or no image.
        ValueError: the pictures differ in size or channels, or there are none.
    """
    arrays = (decode_png(folder_file(folder, name).read_bytes()) for name in names)
    pictures = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) != 1:
        raise ValueError(
            f"read_folder: pictures must have one shape, got {sorted(shapes)} in {folder}; mend the folder"
        )
    return torch.stack(pictures)


def folder_file(folder: str | os.PathLike[str], name: int) -> Path:
    """The file of sample `name` in a folder of PNGs."""
    return Path(folder) / f"{name:06d}.png"


def save_gif(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, seconds: float = 4.0) -> None:
    """Write frames as an endless GIF that rests on the last frame, atomically.

    Args:
        path: the file.
        frames: at least one image, all of one size.
        seconds: how long the frames before the last take together.

    Raises:
        ValueError: there are no frames.
        OSError: the file cannot be written.
    """
    if not frames:
        raise ValueError("save_gif: frames must be at least one, got none")
    each = max(20, round(1000 * seconds / max(1, len(frames) - 1)))
    durations = [each] * (len(frames) - 1) + [2000]
    _write(path, frames[0], "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
