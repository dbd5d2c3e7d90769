"""A network bound to a step table: it is asked for table rows, not for timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.spec import ModelSpec
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

TABLE_BYTES = 256 << 20
"""Largest table of time projections; past it they are computed in the loop (1000 steps of many classes)."""


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The network at the rows of one table.

    Attributes:
        model: (x, t[, y]) → output, used where there is no projection table.
        times: [S+1], what the network is fed as t in each row.
        null_class: the label of "no class", for guidance.
        unet: set together with `projections`.
        projections: [(S+1) · L, D], all time projections of the U-Net: row r, label slot s at r · L + s.
        slots: int64 [num_classes rows], label → slot, or None without classes.
        self_condition: whether the model takes the previous x̂_0 too, as `x_self_cond`.
    """

    model: Callable[..., Tensor]
    times: Tensor
    null_class: int | None
    unet: UNet | None = None
    projections: Tensor | None = None
    slots: Tensor | None = None
    self_condition: bool = False

    def __call__(self, x: Tensor, step: Tensor, labels: Tensor | None, x_self_cond: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: float32 [B, C, H, W].
            step: int64 [B], rows of the table.
            labels: int64 [B] or None.
            x_self_cond: float32 [B, C, H, W], the previous step's x̂_0 or zeros, for networks with self-conditioning.

        Returns:
            [B, C or 2C, H, W].
        """
        if self.unet is None or self.projections is None:
            t = self.times[step]
            more = {"x_self_cond": x_self_cond} if self.self_condition else {}
            return self.model(x, t, **more) if labels is None else self.model(x, t, labels, **more)
        index = step
        if self.slots is not None and labels is not None:
            index = step * (self.projections.shape[0] // self.times.shape[0]) + self.slots[labels]
        return self.unet.body(x, self.projections, index)

    def predict(
        self,
        x: Tensor,
        step: Tensor,
        labels: Tensor | None,
        *,
        guided: bool = False,
        x_self_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, where the run is guided, the output without class, from one call of twice the batch."""
        if not self.self_condition:
            x_self_cond = None
        if not guided or labels is None or self.null_class is None:
            return self(x, step, labels, x_self_cond), None
        nulls = torch.full_like(labels, self.null_class)
        twice = None if x_self_cond is None else torch.cat((x_self_cond, x_self_cond))
        both = self(torch.cat((x, x)), torch.cat((step, step)), torch.cat((labels, nulls)), twice)
        out, out_uncond = both.chunk(2)
        return out, out_uncond


def bind(
    model: Callable[..., Tensor],
    spec: ModelSpec,
    table: StepTable,
    labels: Tensor | None = None,
    guided: bool = False,
) -> Denoiser:
    """Bind a network to a table; a `UNet` gets its time projections tabulated.

    Args:
        model: the network.
        spec: its conventions.
        table: the run's table, on the network's device.
        labels: all labels that the run will ask for, or None if they are not known yet: then all classes are tabulated.
        guided: whether the run also asks for `spec.null_class`.

    Returns:
        The network at the table's rows.
    """
    times = spec.times_fed(table.timesteps)
    plain = Denoiser(model, times, spec.null_class, self_condition=spec.self_condition)
    if not isinstance(model, UNet):
        return plain
    rows, width = len(times), sum(model.projection_widths)
    wanted, slots = None, None
    if model.config.num_classes is not None:
        wanted = torch.arange(model.config.num_classes) if labels is None else labels.cpu()
        if guided and spec.null_class is not None:
            wanted = torch.cat((wanted, torch.tensor([spec.null_class])))
        wanted = torch.tensor(sorted(set(wanted.tolist())), dtype=torch.int64, device=times.device)
        # A label that was not announced must fail on indexing, not borrow another label's row.
        nowhere = len(times) * len(wanted)
        slots = torch.full((model.config.num_classes,), nowhere, dtype=torch.int64, device=times.device)
        slots[wanted] = torch.arange(len(wanted), device=times.device)
    if rows * (1 if wanted is None else len(wanted)) * width * 4 > TABLE_BYTES:
        return plain
    return dataclasses.replace(plain, unet=model, projections=model.tabulate(times, wanted), slots=slots)
