"""C kernels for the CPU: compiled for this processor when first used, and kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE_VARIABLE = "FASTDDPM_CACHE"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno")


class NativeError(RuntimeError):
    """A C kernel cannot be compiled or loaded here."""


def cache_folder() -> Path:
    """Where compiled code is kept: $FASTDDPM_CACHE, or `fastddpm` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


@functools.cache
def processor() -> str:
    """A short name of this processor's model and instruction set: code that was compiled for it runs on its like."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict.fromkeys(line.strip() for line in file if line.startswith(("model name", "flags", "Features")))
        text = "\n".join(lines)
    except OSError:
        text = platform.processor()
    return f"{platform.machine()}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """A C file as a loaded library.

    Raises:
        NativeError: there is no C compiler, it fails, or the result does not load.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NativeError(f"{source.name}: a C compiler must be there, found none; install gcc")
    digest = hashlib.blake2b(source.read_bytes(), digest_size=8)
    digest.update(" ".join((compiler, *_FLAGS, processor())).encode())
    target = cache_folder() / f"{source.stem}-{digest.hexdigest()}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / target.name
                command = [compiler, *_FLAGS, str(source), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                    raise NativeError(f"{source.name}: must compile with {compiler}, got {reason}")
                os.replace(built, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeError(f"{source.name}: must be compiled and loaded, got {error}") from error
