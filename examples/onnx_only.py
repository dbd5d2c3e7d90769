"""Pictures from one ONNX file, without PyTorch and without fastddpm: onnxruntime, numpy and Pillow are enough.

    fastddpm export mnist digits.onnx --what chain
    python examples/onnx_only.py digits.onnx

writes the grid that `fastddpm sample mnist` writes for the same seed. The file holds the whole run: seed and sample ids
go in, pictures come out; its metadata say which classes there are and how pictures become bytes.
"""

import argparse
import json
import math

import numpy as np
import onnxruntime
from PIL import Image


def draw(session: onnxruntime.InferenceSession, facts: dict, n: int, seed: int, guidance: float) -> np.ndarray:
    """Draw samples 0 … n−1 of a seed, the classes in turn; uint8 [n, C, H, W]."""
    ids = np.arange(n, dtype=np.int64)
    feeds = {
        "sample_id": ids,
        "seed": np.full(n, seed, dtype=np.uint64).view(np.int64),  # all 64 bits, whatever their sign
        "y": ids % (facts["spec"]["num_classes"] or 1),
        "guidance": np.full(n, guidance, dtype=np.float32),
    }
    wanted = [value.name for value in session.get_inputs()]
    (pictures,) = session.run(["pictures"], {name: feeds[name] for name in wanted})
    levels = pictures * np.float32(255)
    if facts["spec"]["to_bytes"] == "round":
        levels = np.round(levels)
    return np.clip(levels, 0, 255).astype(np.uint8)


def make_grid(pictures: np.ndarray, gap: int = 2, min_side: int = 480) -> Image.Image:
    """Lay pictures out in a square, two pixels apart, enlarged by a whole factor."""
    n, channels, height, width = pictures.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (gap + k * (size + gap) for k, size in zip(divmod(i, columns), (height, width), strict=True))
        canvas[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    image = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    factor = max(1, math.ceil(min_side / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def main() -> None:
    """Read the arguments, draw, write the grid."""
    parser = argparse.ArgumentParser(description="Draw pictures from a chain that `fastddpm export` wrote.")
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("--n", type=int, default=64, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="a picture depends on seed and number alone")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="scale of classifier-free guidance; 1: none")
    parser.add_argument("--grid", default="grid.png", help="the image to write")
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.model, providers=onnxruntime.get_available_providers()[-1:])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["fastddpm"])
    pictures = draw(session, facts, options.n, options.seed, options.guidance_scale)
    make_grid(pictures).save(options.grid)
    print(
        f"wrote {options.grid}: {options.n} pictures, {facts['solver']} in {facts['steps']} steps, seed {options.seed}"
    )


if __name__ == "__main__":
    main()
