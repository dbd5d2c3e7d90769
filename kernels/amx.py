"""What the kernels on the matrix unit of Intel's processors (`amx.h`) have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from fastddpm.kernels.native import NativeError, load

PART = 32
"""Numbers of a tile's row: the kernels take channels, and attention positions, in multiples of it."""


def load_amx(source: Path, arguments: Sequence[type]) -> ctypes.CDLL:
    """A compiled kernel, with the leave of the system to use the unit.

    Args:
        source: the C file, called as its function.
        arguments: the function's types.

    Raises:
        NativeError: it cannot be compiled here, or processor, compiler or system lack the unit.
    """
    name = source.stem
    library = load(source, ("amx_start", name, f"aoti_torch_cpu_{name}"))
    getattr(library, name).argtypes = arguments
    if library.amx_start():
        raise NativeError(f"{name}: processor, compiler and system must have AMX, got one that has not")
    return library
