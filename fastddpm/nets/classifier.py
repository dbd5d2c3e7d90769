"""Classifier: the way down of a U-Net with a pooling head, trained on noised pictures (Dhariwal & Nichol 2021, sec. 4).

Its gradient ∇_x log p(y|x_t) guides samples towards a class: `Classifier.cond_fn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.common.records import Record, Within
from fastddpm.nets.blocks import ResBlock, Stage, timestep_embedding
from fastddpm.nets.config import UNetConfig
from fastddpm.nets.unet import down_stages, mid_stage

Pool = Literal["attention", "adaptive"]


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(Record):
    """Everything that determines the classifier's structure and its parameters' shapes.

    Args:
        encoder: The way down and the bottom, as a U-Net has them; what it says of the way up and output is not used.
        num_classes: Classes K that the logits tell apart.
        pool: How the bottom becomes a vector: by "attention", the query being the mean of all positions, or by the
            mean itself ("adaptive").
    """

    encoder: UNetConfig
    num_classes: Annotated[int, Within(1, 2**20)] = 1000
    pool: Pool = "attention"


class Classifier(nn.Module):
    """Logits of the classes of noised pictures, (x_t, t) → [B, K]."""

    label_embedding = None
    up: Sequence[Stage] = ()
    """It has a U-Net's way down alone."""

    def __init__(self, config: ClassifierConfig) -> None:
        """Make a network with PyTorch's own initialisation; it is meant to be loaded, not trained."""
        super().__init__()
        self.config, encoder = config, config.encoder
        self.time_mlp = nn.Sequential(
            nn.Linear(encoder.sinusoids, encoder.embedding_dim),
            nn.SiLU(),
            nn.Linear(encoder.embedding_dim, encoder.embedding_dim),
        )
        self.stem = nn.Conv2d(encoder.in_channels, encoder.stem, 3, padding=1)
        self.down, _ = down_stages(encoder)
        self.mid = mid_stage(encoder)
        width = encoder.channels[-1]
        self.norm_out = nn.GroupNorm(encoder.norm_groups, width, eps=encoder.norm_eps)
        self.head: nn.Module = MeanPool(width, config.num_classes)
        if config.pool == "attention":
            height, wide = (side >> len(encoder.channels) - 1 for side in encoder.sample_size)
            heads = encoder.num_heads if encoder.head_channels is None else width // encoder.head_channels
            self.head = AttentionPool(width, height * wide, heads, config.num_classes)
        self.projection_widths = [m.projection_width for m in self.modules() if isinstance(m, ResBlock)]
        self.time_projection = nn.Linear(encoder.embedding_dim, sum(self.projection_widths))

    @property
    def structure(self) -> UNetConfig:
        """The configuration of the parts that it shares with U-Nets."""
        return self.config.encoder

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The logits.

        Args:
            x: float [B, C, H, W], noised pictures, in the range and of the size that it was trained on.
            t: [B], timesteps as it was trained to be fed.

        Returns:
            float [B, K], unnormalised log-probabilities.

        Raises:
            ValueError: x has another shape.
        """
        encoder = self.config.encoder
        shape = (encoder.in_channels, *encoder.sample_size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"Classifier: x must be [B, {', '.join(map(str, shape))}], got {tuple(x.shape)}")
        features = timestep_embedding(t, encoder.sinusoids, order=encoder.embedding, shift=encoder.embedding_shift)
        embedding = F.silu(self.time_mlp(features))
        rows = iter(torch.split(self.time_projection(embedding), self.projection_widths, dim=1))
        h = self.stem(x)
        for stage in (*self.down, self.mid):
            for block, attention in cast(Stage, stage).pairs():
                h = attention(block(h, next(rows)))
            resample = cast(Stage, stage).resample
            if resample is not None:
                h = resample(h, next(rows)) if isinstance(resample, ResBlock) else resample(h)
        return torch.as_tensor(self.head(F.silu(self.norm_out(h))))

    def cond_fn(self, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The gradient that guides samples: `Sampler.sample(…, class_labels=y, cond_fn=classifier.cond_fn(scale))`.

        Args:
            scale: s in s · ∇_x log p(y|x_t) (Dhariwal & Nichol 2021, sec. 4.3); 1 is the classifier's own.

        Returns:
            (x, t, y) → s · ∇_x log p(y|x_t), shaped as x; y int64 [B] must be classes that the classifier knows. It
            raises a ValueError where y is None or unknown, or where x is on another device than the classifier.
        """

        def gradient(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            labels = self._checked(x, y)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                chosen = F.log_softmax(self(leaf, t), dim=-1).gather(1, labels[:, None])
                (found,) = torch.autograd.grad(chosen.sum(), leaf)
            return scale * torch.as_tensor(found)

        return gradient

    def _checked(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The labels, if the classifier knows them and is where x is."""
        known = self.config.num_classes
        if y is None:
            raise ValueError(f"cond_fn: y must be classes in 0 … {known - 1}, got None; give class_labels")
        if bool(((y < 0) | (y >= known)).any()):
            raise ValueError(
                f"cond_fn: y must be classes in 0 … {known - 1}, got {y.tolist()[:8]}; pick those it knows"
            )
        if x.device != self.stem.weight.device:
            raise ValueError(
                f"cond_fn: the classifier must be on {x.device}, where the samples are, got {self.stem.weight.device}; "
                "move it there with .to(…)"
            )
        return y


class MeanPool(nn.Module):
    """The mean over all positions, then one layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        """Make a head of `channels` channels."""
        super().__init__()
        self.out = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to logits [B, K]."""
        return torch.as_tensor(self.out(x.mean((2, 3))))


class AttentionPool(nn.Module):
    """One query, the mean over all positions, attends to itself and all of them (Radford et al. 2021, sec. 2.4)."""

    def __init__(self, channels: int, positions: int, heads: int, num_classes: int) -> None:
        """Make a head for `positions` positions of `channels` channels."""
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to logits [B, K]."""
        rows = x.flatten(2)
        rows = torch.cat((rows.mean(2, keepdim=True), rows), dim=2) + self.positions
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(rows.transpose(1, 2)).chunk(3, 2)
        )
        # The other positions' answers are not asked for.
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return torch.as_tensor(self.out(pooled.flatten(1)))
