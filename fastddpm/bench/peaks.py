"""What the machine gives at most: the fastest matrix product and a large copy, measured in the same run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F

from fastddpm.bench.arithmetic import Precision, arithmetic
from fastddpm.bench.timing import Clock

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Far more than the caches hold."""
MATRICES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
CONVOLUTIONS = {"cpu": ((1, 512, 64), (1, 1024, 32), (1, 1024, 64)), "cuda": ((64, 1024, 32),)}
"""(B, C, H = W) of 1×1 convolutions, which oneDNN and cuDNN run as matrix products."""
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product on random data; on zeros some processors are quicker.

    Attributes:
        call: computes it.
        flop: its arithmetic.
        name: for the results.
    """

    call: Callable[[], object]
    flop: float
    name: str


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The device's limits: found once, measured again on demand.

    Attributes:
        device: where.
        dry: tiny sizes, for tests: the figures then say nothing.
    """

    device: str = "cpu"
    dry: bool = False

    def product(self, precision: Precision, repeats: int = REPEATS) -> float:
        """GFLOP/s of the fastest of several matrix products."""
        return max(self.speed(_fastest(self, precision), precision) for _ in range(repeats))

    def copy(self, repeats: int = REPEATS) -> float:
        """GB/s, read and written, of a copy far larger than caches."""
        size = 1 << 20 if self.dry else COPY_BYTES[self._kind]
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        clock = Clock.of(self.device)
        ms = min(clock.spent(lambda: target.copy_(source)) for _ in range(repeats + 1))
        return 2 * size / ms / 1e6

    def measure(self, precisions: Sequence[str]) -> dict[str, float]:
        """GFLOP/s of each precision, and GB/s of a copy as "copy"."""
        return {name: self.product(cast(Precision, name)) for name in precisions} | {"copy": self.copy()}

    def products(self, precision: Precision) -> list[Product]:
        """Those that are tried."""
        randn = functools.partial(
            torch.randn, device=self.device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
        )
        found = []
        for size in (64,) if self.dry else MATRICES[self._kind]:
            a, b = (randn(size, size) for _ in range(2))
            found.append(Product(functools.partial(torch.mm, a, b), 2.0 * size**3, f"mm {size}"))
        for batch, channels, side in ((1, 16, 8),) if self.dry else CONVOLUTIONS[self._kind]:
            x, w = randn(batch, channels, side, side), randn(channels, channels, 1, 1)
            x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
            flop = 2.0 * batch * channels**2 * side**2
            found.append(Product(functools.partial(F.conv2d, x, w), flop, f"1×1 convolution {channels}"))
        return found

    @property
    def _kind(self) -> str:
        return torch.device(self.device).type

    def speed(self, product: Product, precision: Precision) -> float:
        """GFLOP/s of one product, timed once."""
        with torch.no_grad(), arithmetic(precision, self.device):
            return product.flop / Clock.of(self.device).spent(product.call) / 1e6


@functools.cache
def _fastest(peaks: Peaks, precision: Precision) -> Product:
    speed = functools.partial(peaks.speed, precision=precision)
    return max(peaks.products(precision), key=lambda product: max(speed(product) for _ in range(REPEATS + 1)))
