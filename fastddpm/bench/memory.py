"""Memory of a long run into a folder: a process that samples small pictures, watched from outside."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastddpm.checkpoints import native
from fastddpm.common.packages import require
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

STEPS = 2
EVERY_S = 0.1
"""Seconds between two looks."""
TOLERATED_BYTES = 48 << 20
"""How much more memory the second half of a run may take than what the first tenth took: a few batches' worth."""


@dataclasses.dataclass
class MemoryCurve:
    """Resident memory while pictures are written.

    Attributes:
        n: pictures of the run.
        batch: pictures at a time.
        seconds: since the start.
        pictures: written so far.
        bytes: resident.
    """

    n: int
    batch: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    pictures: list[int] = dataclasses.field(default_factory=list)
    bytes: list[int] = dataclasses.field(default_factory=list)

    def early(self) -> int:
        """The most while the first tenth, and at least two batches, was drawn."""
        until = max(self.n // 10, 2 * self.batch)
        return max((size for size, n in zip(self.bytes, self.pictures, strict=True) if 0 < n <= until), default=0)

    def late(self) -> int:
        """The most in the second half."""
        return max((size for size, n in zip(self.bytes, self.pictures, strict=True) if n > self.n // 2), default=0)

    @property
    def is_bounded(self) -> bool:
        """Whether the memory stayed where it was."""
        return 0 < self.late() <= self.early() + TOLERATED_BYTES and self.early() > 0

    def sentence(self) -> str:
        """For people."""
        verdict = "bounded" if self.is_bounded else "NOT bounded"
        return (
            f"{self.n:,} pictures into a folder, {self.batch} at a time: {self.early() / 1e6:.0f} MB in the first "
            f"tenth, {self.late() / 1e6:.0f} MB at most in the second half, {verdict}."
        )

    def csv(self) -> str:
        """The curve as seconds, pictures, bytes."""
        rows = zip(self.seconds, self.pictures, self.bytes, strict=True)
        return "seconds,pictures,bytes\n" + "".join(f"{s:.2f},{n},{size}\n" for s, n, size in rows)


def tiny_model(folder: Path) -> Path:
    """A checkpoint that draws 28×28 pictures, of nothing, quickly: a small network with random weights."""
    config = UNetConfig(
        sample_size=(28, 28), in_channels=1, out_channels=1, channels=(8,), layers=1, attention=(False,),
        mid_attention=False, norm_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    native.save(folder, UNet(config), NoiseSchedule.linear(100), ModelSpec((1, 28, 28)))
    return folder


def watch(
    model: Path,
    out: Path,
    n: int,
    *,
    batch: int = 64,
    timeout_s: float = 300.0,
    on_sample: Callable[[int, int], None] = lambda *_: None,
) -> MemoryCurve:
    """Sample n pictures into a folder in another process and record its memory.

    Args:
        model: a checkpoint.
        out: the folder of pictures.
        n: how many.
        batch: pictures at a time.
        timeout_s: after which the process is ended.
        on_sample: is told the pictures and bytes of each look.

    Returns:
        The curve.

    Raises:
        ImportError: psutil is not installed.
        RuntimeError: the process failed or took too long.
    """
    psutil = require("psutil", "bench")
    command = [
        sys.executable, "-m", "fastddpm", "sample", str(model), "-n", str(n), "--folder", str(out), "--steps",
        str(STEPS), "--batch-size", str(batch), "--quiet",
    ]  # fmt: skip
    curve, began = MemoryCurve(n, batch), time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    size = watched.memory_info().rss
                except psutil.NoSuchProcess:
                    break
                if not size:  # it has just ended
                    break
                curve.seconds.append(time.monotonic() - began)
                curve.pictures.append(_count(out))
                curve.bytes.append(size)
                on_sample(curve.pictures[-1], size)
                if curve.seconds[-1] > timeout_s:
                    raise RuntimeError(f"not done within {timeout_s:.0f} s")
                time.sleep(EVERY_S)
            message = b"" if process.stderr is None else process.stderr.read()
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode:
        raise RuntimeError(message.decode(errors="replace").strip()[-300:] or f"exit code {process.returncode}")
    return curve


def _count(folder: Path) -> int:
    """Pictures written so far."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.name.endswith(".png") and not entry.name.startswith(".") for entry in entries)
    except FileNotFoundError:
        return 0
