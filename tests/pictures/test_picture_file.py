"""One image file: every kind of sample arrives with its right levels, or the file is refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastddpm.pictures.picture_file import read_picture

RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 2**16, (9, 7, 4), dtype=np.uint16)
DEEP[0] = [[0, 127, 128, 129], [255, 256, 257, 385], [386, 32767, 32768, 65534], *[[65535] * 4] * 4]
GRAY_ALPHA, COLOUR = RANDOM.integers(0, 255, (2, 9, 7, 3), dtype=np.uint8)
COLOUR_ALPHA = np.dstack((COLOUR, GRAY_ALPHA[..., 0]))
PNG_KINDS = {1: 0, 3: 2, 2: 4, 4: 6}


def rounded(values, largest=65535):
    """The nearest of 256 levels (PNG specification, section 13.12), in float64; no sample lies between two."""
    return np.floor(values.astype(np.float64) * 255 / largest + 0.5).astype(np.uint8)


def png16(path, values, interlaced=False, transparent=None):
    """Write a PNG of 16 bits per sample, which Pillow cannot do in colour; each row with the filter Sub."""
    height, width, channels = values.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def rows(part):
        lines = []
        for line in part.astype(">u2").reshape(len(part), -1).view(np.uint8).reshape(len(part), -1):
            before = np.concatenate((np.zeros(2 * channels, np.uint8), line[: -2 * channels]))
            lines.append(b"\1" + (line - before).tobytes())
        return b"".join(lines)

    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    parts = [values[y::dy, x::dx] for y, dy, x, dx in passes] if interlaced else [values]
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_KINDS[channels], 0, 0, interlaced)
    content = chunk(b"IHDR", header)
    if transparent is not None:
        content += chunk(b"tRNS", struct.pack(f">{channels}H", *transparent))
    content += chunk(b"IDAT", zlib.compress(b"".join(rows(part) for part in parts if part.size)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))
    return path


def tiff(path, values, order="<", photometric=None, extra=(), kind=1, bits=None, planes=1, deflated=False):
    """Write a TIFF of one strip."""
    height, width, channels = values.shape
    typed = values.astype(values.dtype.newbyteorder(order))
    strip = (typed if planes == 1 else typed.transpose(2, 0, 1).copy()).tobytes()
    if deflated:
        strip = zlib.compress(strip)
    tags = [
        (256, [width]), (257, [height]), (258, [bits or 8 * values.itemsize] * channels), (259, [8 if deflated else 1]),
        (262, [(1 if channels < 3 else 2) if photometric is None else photometric]), (273, None), (277, [channels]),
        (278, [height]), (279, [len(strip) // (channels if planes == 2 else 1)] * (channels if planes == 2 else 1)),
        (284, [planes]), (338, list(extra)), (339, [kind] * channels),
    ]  # fmt: skip
    tags = [(number, entries) for number, entries in tags if entries is None or entries]
    data_at = 8 + 2 + 12 * len(tags) + 4
    more, directory = b"", b""
    strips = [0] * (channels if planes == 2 else 1)
    sizes = sum(4 * len(entries or strips) for _, entries in tags if len(entries or strips) > 1)
    for i in range(len(strips)):
        strips[i] = data_at + sizes + i * (len(strip) // len(strips))
    for number, entries in tags:
        packed = struct.pack(f"{order}{len(entries or strips)}I", *(entries or strips))
        if len(packed) > 4:
            place = data_at + len(more)
            more, packed = more + packed, struct.pack(f"{order}I", place)
        directory += struct.pack(f"{order}HHI", number, 4, len(entries or strips)) + packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    path.write_bytes(start + directory + struct.pack(f"{order}I", 0) + more + strip)
    return path


# ---------------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize("interlaced", [False, True], ids=["in order", "interlaced"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(tmp_path, channels, interlaced):
    values = DEEP[..., :channels]
    picture = read_picture(png16(tmp_path / "a.png", values, interlaced))
    assert np.array_equal(picture.pixels, rounded(values))
    assert picture.remarks == ("of more than 8 bits (rounded to 8)",)


def test_every_level_of_16_bits(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels[..., 0], rounded(ramp))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_colour_of_a_png_of_16_bits(tmp_path, channels):
    values = DEEP[..., :channels]
    key = values[4, 3].tolist()
    pixels = read_picture(png16(tmp_path / "a.png", values, transparent=key)).pixels
    assert np.array_equal(pixels[..., :-1], rounded(values))
    assert np.array_equal(pixels[..., -1] == 0, (values == key).all(-1)) and set(np.unique(pixels[..., -1])) == {0, 255}


@pytest.mark.parametrize("deflated", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize(("channels", "extra"), [(1, ()), (3, ()), (4, (2,))], ids=["gray", "colour", "alpha"])
def test_tiff_of_16_bits(tmp_path, channels, extra, order, deflated):
    values = DEEP[..., :channels]
    path = tiff(tmp_path / "a.tif", values, order, extra=extra, deflated=deflated)
    assert np.array_equal(read_picture(path).pixels, rounded(values))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_that_counts_from_white(tmp_path, dtype):
    values = DEEP[..., :1].astype(dtype)
    largest = np.iinfo(dtype).max
    pixels = read_picture(tiff(tmp_path / "a.tif", values, photometric=0)).pixels
    assert np.array_equal(pixels, rounded(largest - values, largest))


def test_tiff_of_12_bits(tmp_path):
    values = np.array([[0, 1, 8, 9, 2047, 2048, 4094, 4095]])
    packed = np.array([[a >> 4, (a & 15) << 4 | b >> 8, b & 255] for a, b in values.reshape(-1, 2)], np.uint8)
    path = tiff(tmp_path / "a.tif", packed.reshape(1, 12, 1), bits=12)
    path.write_bytes(path.read_bytes().replace(struct.pack("<HHII", 256, 4, 1, 12), struct.pack("<HHII", 256, 4, 1, 8)))
    assert np.array_equal(read_picture(path).pixels[..., 0], rounded(values, 4095))


def test_cmyk_of_16_bits_is_cmyk_of_8_bits(tmp_path):
    pixels = read_picture(tiff(tmp_path / "a.tif", DEEP, photometric=5)).pixels
    expected = Image.frombytes("CMYK", (7, 9), rounded(DEEP).tobytes()).convert("RGB")
    assert np.array_equal(pixels, np.asarray(expected))


REFUSED = {
    "float": ({"values": DEEP[..., :1] / np.float32(65535), "kind": 3}, "whose range is not known"),
    "32 bits": ({"values": DEEP[..., :1].astype(np.uint32)}, "whose range is not known"),
    "signed 32 bits": ({"values": DEEP[..., :1].astype(np.int32), "kind": 2}, "whose range is not known"),
    "signed 16 bits": ({"values": DEEP[..., :1].astype(np.int16), "kind": 2}, "whose range is not known"),
    "signed 8 bits": ({"values": DEEP[..., :1].astype(np.int8), "kind": 2}, "whose range is not known"),
    "four bands": ({"values": COLOUR_ALPHA, "extra": (0,)}, "got 1 more; write the pictures as .npz"),
    "five bands": ({"values": np.dstack((COLOUR_ALPHA, COLOUR))[..., :5], "extra": (2, 0)}, "got 2 more"),
    "two bands": ({"values": GRAY_ALPHA[..., :2], "extra": (0,)}, "got 1 more"),
    "16 bits in planes": ({"values": DEEP[..., :3], "planes": 2}, "must be interleaved"),
    "16 bits times alpha": ({"values": DEEP, "extra": (1,)}, "must be interleaved"),
    "Lab": ({"values": COLOUR, "photometric": 8}, "whose range is not known"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_would_need_a_guess_is_refused(tmp_path, case):
    arguments, phrase = case
    with pytest.raises(ValueError, match=rf"a\.tif: .*{phrase}"):
        read_picture(tiff(tmp_path / "a.tif", **arguments))


# ---------------------------------------------------------------------- 8 bits and fewer


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_of_few_bits(tmp_path, bits):
    levels = RANDOM.integers(0, 2**bits, (5, 6), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    if bits < 8:
        packed = np.packbits(np.unpackbits(levels[..., None], axis=2, count=8)[..., 8 - bits :].reshape(5, -1), axis=1)
        header = struct.pack(">IIBBBBB", 6, 5, bits, 0, 0, 0, 0)
        chunks = [
            (b"IHDR", header),
            (b"IDAT", zlib.compress(b"".join(b"\0" + r.tobytes() for r in packed))),
            (b"IEND", b""),
        ]
        content = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels[..., 0], rounded(levels, 2**bits - 1)) and picture.remarks == ()


@pytest.mark.parametrize(
    ("mode", "suffix", "pixels"),
    [("L", "png", COLOUR[..., :1]), ("LA", "png", GRAY_ALPHA[..., :2]), ("RGB", "png", COLOUR), ("RGB", "bmp", COLOUR),
     ("RGB", "tif", COLOUR), ("RGBA", "png", COLOUR_ALPHA), ("RGBA", "tif", COLOUR_ALPHA)],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_plain_files_come_back(tmp_path, mode, suffix, pixels):
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(tmp_path / f"a.{suffix}")
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert np.array_equal(picture.pixels, pixels) and picture.remarks == ()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_alpha_that_is_opaque_everywhere_is_left_out(tmp_path, mode):
    Image.fromarray(COLOUR).convert(mode).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(COLOUR).convert(mode[:-1])).reshape(9, 7, -1)
    assert np.array_equal(picture.pixels, expected)
    assert picture.remarks == ("with an alpha that is opaque everywhere (left out)",)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_become_colour(tmp_path, suffix):
    few = (COLOUR // 128 * 255).astype(np.uint8)
    image = Image.fromarray(few).quantize(8)
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_picture(tmp_path / f"a.{suffix}").pixels, few)
    image.save(tmp_path / f"b.{suffix}", transparency=int(np.asarray(image)[2, 2]))
    pixels = read_picture(tmp_path / f"b.{suffix}").pixels
    assert pixels.shape[2] == 4 and np.array_equal(pixels[..., 3] == 0, (few == few[2, 2]).all(-1))


def test_the_transparent_level_of_a_gray_png(tmp_path):
    Image.fromarray(COLOUR[..., 0]).save(tmp_path / "a.png", transparency=int(COLOUR[3, 3, 0]))
    pixels = read_picture(tmp_path / "a.png").pixels
    assert pixels.shape[2] == 2 and np.array_equal(pixels[..., 0], COLOUR[..., 0])
    assert np.array_equal(pixels[..., 1] == 0, COLOUR[..., 0] == COLOUR[3, 3, 0])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), (level, 0, 0)) for level in (255, 0)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert bool((picture.pixels[..., 0] == 255).all()) and "of several frames (the first is taken)" in picture.remarks


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_pictures_stand_as_their_cameras_say(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR).save(
        tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
    upright = {
        1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, -1), 7: np.rot90(COLOUR, 2).transpose(1, 0, 2), 8: np.rot90(COLOUR),
    }  # fmt: skip
    assert np.array_equal(read_picture(tmp_path / f"a.{suffix}").pixels, upright[orientation])


def test_a_damaged_exif_block_is_no_reason_to_refuse(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, COLOUR)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    path = png16(tmp_path / "a.png", DEEP)
    content = path.read_bytes()
    header = struct.pack(">II", 60_000, 60_000) + content[24:29]
    path.write_bytes(content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:])
    with pytest.raises(ValueError, match=r"a\.png: must have at most [\d,]+ pixels, got more; make it smaller"):
        read_picture(path)
