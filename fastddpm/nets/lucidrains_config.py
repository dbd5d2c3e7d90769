"""LucidrainsConfig: all that determines the structure of denoising-diffusion-pytorch's U-Net."""

from __future__ import annotations

import dataclasses
from typing import Annotated, TypedDict

from fastddpm.common.records import Record, Within

_MOST = 2**16  # far above any width, and products of two of them still fit everywhere
_MOST_LEVELS = 16
_Count = Annotated[int, Within(1, _MOST)]


@dataclasses.dataclass(frozen=True)
class LucidrainsConfig(Record):
    """Everything that determines what the network computes and its parameters' shapes.

    Args:
        dim: The unit of all widths, and the sinusoids' number.
        init_dim: Width of the first convolution.
        dim_mults: Width of each level, finest first, in units of `dim`.
        full_attn: For each level, whether its attention is over all pairs of positions; otherwise it is linear.
        attn_heads: Heads of each level's attention and, behind them, of the middle's.
        attn_dim_head: Channels per head, likewise.
        channels: Channels C of x and, unless the variance is learned, of the output.
        self_condition: Whether the network is fed an estimate of x_0 beside x.
        learned_variance: Whether the output has 2C channels.
        num_classes: Classes, besides which there is one row for "no class"; None for none. Such networks halve the
            resolution by strided convolutions, others by folding four pixels into one.
        learned_sinusoidal_dim: Twice the learned or random frequencies of the time; None for fixed ones.
        sinusoidal_pos_emb_theta: Longest wavelength of the fixed ones, divided by 2π.
        groups: Of the blocks' group norms; None for RMS norms.
        memory: Whether attention has keys and values of its own beside those of the positions.
        mean_value: Whether linear attention divides the values by H · W.
        layer_norm: Whether attention has layer norms instead of RMS norms.

    Raises:
        RecordError: A field is not of its type and range.
        ValueError: Fields do not fit each other.
    """

    dim: _Count
    init_dim: _Count
    dim_mults: tuple[_Count, ...]
    full_attn: tuple[bool, ...]
    attn_heads: tuple[_Count, ...]
    attn_dim_head: tuple[_Count, ...]
    channels: _Count = 3
    self_condition: bool = False
    learned_variance: bool = False
    num_classes: _Count | None = None
    learned_sinusoidal_dim: _Count | None = None
    sinusoidal_pos_emb_theta: Annotated[float, Within(1, 1e30, above=True)] = 10_000.0
    groups: _Count | None = None
    memory: bool = True
    mean_value: bool = False
    layer_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.dim_mults)
        for name, count in (("full_attn", levels), ("attn_heads", levels + 1), ("attn_dim_head", levels + 1)):
            _expect(len(getattr(self, name)) == count, self, name, f"a list of {count}")
        _expect(levels <= _MOST_LEVELS, self, "dim_mults", f"a list of at most {_MOST_LEVELS}")
        _expect(max(self.widths) <= _MOST, self, "dim_mults", f"widths of at most {_MOST} in units of dim = {self.dim}")
        fixed = self.learned_sinusoidal_dim is None
        _expect(not fixed or (self.dim % 2 == 0 and self.dim >= 4), self, "dim", "an even number of at least 4")
        _expect(fixed or (self.learned_sinusoidal_dim or 0) % 2 == 0, self, "learned_sinusoidal_dim", "an even number")
        divides = self.groups is None or not any(width % self.groups for width in self.widths)
        _expect(divides, self, "groups", f"a divisor of all widths {self.widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before each level, and those of the coarsest."""
        return self.init_dim, *(self.dim * mult for mult in self.dim_mults)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.channels * (2 if self.learned_variance else 1)


class Arguments(TypedDict, total=False):
    """Some of the fields of `LucidrainsConfig`."""

    dim: int
    init_dim: int
    dim_mults: tuple[int, ...]
    full_attn: tuple[bool, ...]
    attn_heads: tuple[int, ...]
    attn_dim_head: tuple[int, ...]
    channels: int
    self_condition: bool
    learned_variance: bool
    num_classes: int | None
    learned_sinusoidal_dim: int | None
    sinusoidal_pos_emb_theta: float
    groups: int | None
    memory: bool
    mean_value: bool
    layer_norm: bool


def _expect(is_right: bool, config: LucidrainsConfig, name: str, expected: str) -> None:
    if not is_right:
        raise ValueError(f"LucidrainsConfig: {name} must be {expected}, got {getattr(config, name)!r}; correct it")
