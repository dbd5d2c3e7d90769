"""C kernels for the CPU: compiled for this processor when first used, and kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastddpm.kernels.kept import cache_folder as cache_folder
from fastddpm.kernels.kept import find, keep, sealed, unsealed

ALIGNED = Path(__file__).with_name("aligned.h")
"""What the code around compiled steps includes; no kernel does."""
HEADERS = tuple(sorted(set(Path(__file__).parent.glob("*.h")) - {ALIGNED}))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno")
_ops = torch.library.Library("fastddpm", "FRAGMENT")  # type: ignore[no-untyped-call]
_kernels: dict[str, tuple[Callable[[], object], str]] = {}  # of each op: what loads it, and its declaration in C


class Choice(threading.local):
    """Whether this thread asks for a C kernel where PyTorch's own operations would do; by itself it does not."""

    made = False

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Ask for it in the block."""
        before, self.made = self.made, True
        try:
            yield
        finally:
            self.made = before


class NativeError(RuntimeError):
    """A C kernel cannot be compiled or loaded here."""


@functools.cache
def processor() -> str:
    """A short name of this processor's model, instruction set and C library: code compiled for it runs on its like."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict.fromkeys(line.strip() for line in file if line.startswith(("model name", "flags", "Features")))
        text = "\n".join(lines)
    except OSError:
        text = platform.processor()
    text += "".join(platform.libc_ver())
    return f"{platform.machine()}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def compiler() -> str | None:
    """Where the C compiler is, or None."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")


def can_load(loaded: Callable[[], object]) -> bool:
    """Whether a kernel can be compiled here; it is loaded then."""
    try:
        return bool(loaded())
    except NativeError:
        return False


def register(
    schema: str,
    function: Callable[..., object],
    fake: Callable[..., object],
    loaded: Callable[[], object],
    declaration: str,
) -> None:
    """Register an op for CPUs; the checks of `torch.library.custom_op` on each call cost as much as a small layer.

    Args:
        schema: of the op, in PyTorch's words.
        function: runs it.
        fake: tells its results' shapes.
        loaded: loads the kernel, or raises NativeError.
        declaration: in C, of the function that compiled steps call; its name must be `aoti_torch_cpu_` and the op's.
    """
    name = schema.partition("(")[0]
    _kernels[name] = loaded, declaration
    _ops.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))  # type: ignore[no-untyped-call]
    _ops.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastddpm::{name}", fake)


def shims() -> dict[object, list[str]]:
    """The ops that compiled steps call in C, with their declarations."""
    return {getattr(torch.ops.fastddpm, name).default: [text] for name, (_, text) in _kernels.items()}


def load_all() -> None:
    """Load the kernels that can be: a compiled step looks their functions up."""
    for loaded, _ in _kernels.values():
        can_load(loaded)


def load(source: Path, functions: tuple[str, ...]) -> ctypes.CDLL:
    """A C file as a loaded library, compiled unless it was.

    Args:
        source: the C file.
        functions: names that the library must have.

    Raises:
        NativeError: there is no C compiler, it fails, or the result does not load.
    """
    result = load_library(source, functions)
    if isinstance(result, str):
        raise NativeError(result)
    return result


@functools.cache
def load_library(source: Path, functions: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library, or why there is none: to find that out again would take as long as the first time."""
    why = ""
    try:
        digest = hashlib.blake2b(b"".join(path.read_bytes() for path in (source, *HEADERS)), digest_size=8)
        digest.update(" ".join((os.environ.get("CC", ""), *_FLAGS, processor())).encode())
        for path in _candidates(source, f"{source.stem}-{digest.hexdigest()}"):
            try:
                library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # compiled steps look its functions up
                for function in functions:
                    library[function]
                return library
            except (OSError, AttributeError) as error:
                why = str(error)
    except (OSError, NativeError) as error:
        why = str(error)
    return f"{source.name}: must be compiled and loaded, got {' '.join(why.split())}"


def _candidates(source: Path, key: str) -> Iterator[Path]:
    """The library that was kept; and if that one does not load, a new one."""
    kept = find(key, ".so")
    if kept is not None:
        yield kept
    cc = compiler()
    if cc is None:
        raise NativeError("no C compiler; install gcc")
    new = unsealed(key, ".so")
    # PyTorch's C interface is found in the library that this process has loaded, by its name.
    torch_cpu = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    command = [cc, *_FLAGS, str(source), *torch_cpu, "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise NativeError(f"from {cc}: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
    own = sealed(new, key, ".so")
    yield keep(own)
    yield own  # for a cache on a disk that nothing may be executed from
