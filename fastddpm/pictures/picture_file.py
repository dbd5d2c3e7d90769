"""PictureFile: one image file as 8-bit samples, and what had to be decided on the way."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

_GRAY = ("1", "L", "LA", "La")
_MODES = (*_GRAY, "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _PLANES, _EXTRA, _FORMAT = 258, 262, 284, 338, 339  # TIFF 6.0's tags


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """A picture as its file has it.

    Args:
        pixels: uint8 [H, W, C]; C is 1 for gray, 3 for colour, and one more where some pixel is not opaque.
        remarks: What was decided on the way, each as a phrase that follows a count of pictures.
    """

    pixels: NDArray[np.uint8]
    remarks: tuple[str, ...]


def read_picture(file: Path, size: int | None = None) -> PictureFile:
    """Read one image file; what cannot be mapped to 8 bits without a guess is refused.

    Samples of 12 and 16 bits become round(255 v / (2**bits − 1)) (PNG specification, section 13.12), palettes and CMYK
    become RGB. Of several frames the first is taken, and the camera's orientation (EXIF) is applied.

    Args:
        file: The file.
        size: Crop the centre square and resize it to this many pixels (Lanczos).

    Returns:
        The picture.

    Raises:
        ValueError: If it is no readable image, too large, or of samples or channels that are not known to be
            intensities.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                refused = _refusal(image)
                picture = None if refused else _decoded(file, image, size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file}: must have at most {Image.MAX_IMAGE_PIXELS or 0:,} pixels, got more; make it smaller"
        ) from error
    except Exception as error:  # the decoders of damaged images raise what they please
        raise ValueError(f"{file}: not a readable image ({error}); remove or replace it") from error
    if picture is None:
        raise ValueError(f"{file}: {refused}")
    return picture


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the layout of the samples in the file."""
    args = image.tile[0][3] if image.tile else ""
    return str(args[0] if isinstance(args, tuple) else args)


def _is_deep(rawmode: str) -> bool:
    """Whether there are unsigned samples of more than 8 bits."""
    return (";16" in rawmode or rawmode == "I;12") and not rawmode.endswith("S")


def _refusal(image: ImageFile.ImageFile) -> str | None:
    """Why the picture cannot be used without a guess; None if it can."""
    raw, tags = _rawmode(image), getattr(image, "tag_v2", {})
    deep = _is_deep(raw)
    if image.mode not in _MODES and not (deep and image.mode.startswith("I")) or set(tags.get(_FORMAT, ())) - {1}:
        return (
            f"samples must be unsigned, of 8 or 16 bits, got {raw or image.mode}, whose range is not known; "
            "map it to 8 or 16 bits and save it anew"
        )
    extra = tuple(tags.get(_EXTRA, ()))
    if len(extra) > 1 or 0 in extra:
        return (
            f"channels must be gray or colour, with alpha or without, got {len(extra)} more; write the pictures as "
            ".npz, uint8 [N, H, W, C]"
        )
    many_bits = max(tags.get(_BITS, (8,))) > 8
    if many_bits and not image.mode.startswith("I") and (tags.get(_PLANES) == 2 or not deep or raw.startswith("RGBa")):
        return "16-bit colour must be interleaved, with plain alpha or none, got another TIFF layout; save it as PNG"
    return None


def _decoded(file: Path, image: ImageFile.ImageFile, size: int | None) -> PictureFile:
    raw, remarks = _rawmode(image), []
    if getattr(image, "is_animated", False):
        remarks.append("of several frames (the first is taken)")
    if _is_deep(raw):
        remarks.append("of more than 8 bits (rounded to 8)")
    plain: Image.Image = _eight_bits(file, image, raw) if _is_deep(raw) else image
    turn = _turn(image)
    if turn is not None:
        remarks.append("turned as their cameras say")
        plain = plain.transpose(turn)
    gray, transparent = plain.mode in _GRAY, plain.has_transparency_data
    plain = plain.convert({"La": "LA", "RGBa": "RGBA"}.get(plain.mode, plain.mode))
    plain = plain.convert("RGBA" if transparent else "L" if gray else "RGB")
    pixels = np.asarray(plain if size is None else _fitted(plain, size), dtype=np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if transparent and bool((pixels[..., 3] == 255).all()):
        remarks.append("with an alpha that is opaque everywhere (left out)")
        transparent, pixels = False, pixels[..., :3]
    if gray and pixels.shape[2] > 1:
        pixels = pixels[..., [0, 3] if transparent else [0]]
    return PictureFile(pixels, tuple(remarks))


def _fitted(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def _turn(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """How EXIF says to turn the picture; Pillow itself turns TIFFs, and damaged EXIF is as good as none."""
    if image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as with the decoders
        return None


def _eight_bits(file: Path, image: ImageFile.ImageFile, raw: str) -> Image.Image:
    """A picture of 12 or 16 bits per sample in 8: the level of v is round(255 v / largest)."""
    tags = getattr(image, "tag_v2", {})
    values: NDArray[np.integer]
    largest = 2 ** int(tags.get(_BITS, (16,))[0]) - 1
    if raw.startswith("I"):
        mode, values = "L", np.asarray(image).astype(np.int32)
        values = largest - values if tags.get(_PHOTOMETRIC) == 0 else values
    elif raw == "LA;16B":  # as four bytes: Pillow itself keeps only the higher of each pair
        four = _samples(file, "RGBA")
        mode, values = "LA", four[..., ::2] << 8 | four[..., 1::2]
    else:
        # Pillow keeps only the higher byte of each sample; told the other order of bytes, it keeps the lower one.
        swapped = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
        mode, values = image.mode, _samples(file, raw) << 8 | _samples(file, raw[:-1] + swapped)
    levels = ((510 * values + largest) // (2 * largest)).astype(np.uint8)
    if "transparency" in image.info:  # the one colour that PNG calls transparent
        seen = values != np.array(image.info["transparency"])
        opaque = (seen if mode == "L" else seen.any(-1)).astype(np.uint8) * 255
        mode, levels = mode + "A", np.dstack((levels, opaque))
    return Image.frombytes(mode, (levels.shape[1], levels.shape[0]), levels.tobytes())


def _samples(file: Path, raw: str) -> NDArray[np.integer]:
    """The file's samples, read as if `raw` were their layout."""
    with Image.open(file) as image:
        image.tile = [tile._replace(args=_with_rawmode(tile.args, raw)) for tile in image.tile]
        return np.asarray(image).astype(np.int32)


def _with_rawmode(args: Any, raw: str) -> Any:  # noqa: ANN401 - whatever a decoder takes
    return (raw, *args[1:]) if isinstance(args, tuple) else raw
