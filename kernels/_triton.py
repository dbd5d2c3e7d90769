"""Triton where it is installed, and a harmless stand-in where it is not (macOS, Windows, CPU-only machines).

The kernels are written once, with `jit` and `tl` from here. Without Triton they are plain functions that
nothing calls: the wrappers then take the PyTorch reference.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:

    class _Absent:
        """Answers what the kernels touch while their module is imported, and nothing else."""

        @staticmethod
        def constexpr(value: object) -> object:
            return value

    tl: Any = _Absent()  # type: ignore[no-redef]
    libdevice: Any = _Absent()  # type: ignore[no-redef]
    HAS_TRITON = False
    INTERPRETED = False


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - a JITFunction has no useful static type
    """`triton.jit` where Triton is installed; elsewhere the function itself."""
    return triton.jit(function) if HAS_TRITON else function


def runs_triton(device_type: str) -> bool:
    """Whether tensors on this kind of device go to the Triton kernels.

    They do on CUDA and ROCm, and under `TRITON_INTERPRET=1` on the CPU too. The choice is made in Python, before
    the op, because an op backed by Triton cannot run on CPU tensors outside the interpreter.
    """
    return HAS_TRITON and device_type == ("cpu" if INTERPRETED else "cuda")
