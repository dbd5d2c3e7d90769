"""Which tensors go to the Triton kernels, decided without importing Triton.

Triton, and what PyTorch needs to register an op made of its kernels, take more than a second and 150 MB to import. So
the kernels stand in modules of their own, `…_triton.py`, which an op's public function imports where it first calls it.
"""

import importlib.util
import os

__all__ = ["HAS_TRITON", "INTERPRETED", "runs_triton"]


def _is_installed() -> bool:
    """Whether `import triton` would find a package, and not just a folder of that name."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None


def is_interpreted() -> bool:
    """Whether Triton would interpret kernels: what `triton.knobs.runtime.interpret` reads from the environment."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


HAS_TRITON = _is_installed()
"""Whether Triton is installed; it is not on macOS, Windows and some machines without a GPU."""

INTERPRETED = HAS_TRITON and is_interpreted()
"""Whether Triton's interpreter runs the kernels, on the CPU; as it was when this was imported."""


def runs_triton(device_type: str) -> bool:
    """Whether tensors on this kind of device go to the Triton kernels.

    They do on CUDA and ROCm, and under `TRITON_INTERPRET=1` on the CPU too. The choice is made in Python, before
    the op, because an op backed by Triton cannot run on CPU tensors outside the interpreter.
    """
    return HAS_TRITON and device_type == ("cpu" if INTERPRETED else "cuda")
