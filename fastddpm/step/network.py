"""What a step asks of a network, and how any callable comes to offer it.

A network's dependence on time is known before a run begins, so it is asked twice: once for all rows of a run
(`tabulate`), and then in each step for a batch of samples, each at its own row (`body`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from fastddpm.process.spec import ModelSpec

TABLE_BYTES = 256 << 20
"""Largest table of all training steps and classes; networks that would need more are told the class in each step."""


@runtime_checkable
class Network(Protocol):
    """A module that can be asked for rows."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What its arithmetic is in; None where only its own code could tell."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, as modules have them."""

    def tabulate(self, times: Tensor, label: int | None = None) -> Tensor:
        """What `body` has to know of each row.

        Args:
            times: [R], what the network is fed as t.
            label: the class that all rows are for; None where there is none, or where `body` is told.

        Returns:
            [R, …], one entry a row.
        """

    def body(
        self,
        x: Tensor,
        conditions: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The output for samples at rows.

        Args:
            x: float32 [B, C, H, W].
            conditions: [R, …], from `tabulate`.
            index: int64 [B], which row is a sample's.
            labels: int64 [B], classes, where the rows were tabulated without; or None.
            x_self_cond: float32 [B, C, H, W], the previous x̂_0, for self-conditioned networks; or None.

        Returns:
            [B, C or 2C, H, W].
        """

    def cast(self, dtype: torch.dtype) -> Self:
        """A network with its arithmetic in another dtype; this one stays as it is."""

    def identity(self) -> str | None:
        """What tells it apart from other networks of the same weights, or None where only its code could tell."""

    def row_numbers(self) -> int | None:
        """Numbers in a row of `tabulate` with a label; None where rows cannot hold a class."""


class Foreign(nn.Module):
    """Any (x, t[, y][, x_self_cond]) → output as a `Network`: a row is the t that it is fed."""

    def __init__(self, model: Callable[..., Tensor], dtype: torch.dtype | None = None) -> None:
        """Wrap a callable.

        Args:
            model: the callable; a module becomes a submodule.
            dtype: what its arithmetic is cast to, by autocast, or None; float32 needs no cast.
        """
        super().__init__()
        self.model, self.dtype = model, None if dtype == torch.float32 else dtype

    def forward(self, x: Tensor, t: Tensor, *labels: Tensor, **more: Tensor) -> Tensor:
        """The model's own call."""
        if self.dtype is None:
            return torch.as_tensor(self.model(x, t, *labels, **more))
        with torch.autocast(x.device.type, self.dtype):
            out: Tensor = self.model(x, t, *labels, **more)
        return out.float()

    def tabulate(self, times: Tensor, label: int | None = None) -> Tensor:
        """The times themselves."""
        return times

    def body(
        self,
        x: Tensor,
        conditions: Tensor,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """See `Network.body`."""
        t = conditions if index is None else conditions.index_select(0, index)
        more = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return torch.as_tensor(self(x, t, *(() if labels is None else (labels,)), **more))

    def cast(self, dtype: torch.dtype) -> Foreign:
        """See `Network.cast`."""
        return Foreign(self.model, dtype)

    def identity(self) -> None:
        """Nothing is known of a foreign network's code."""

    def row_numbers(self) -> None:
        """Rows hold times alone."""


def as_network(model: Callable[..., Tensor] | Network) -> nn.Module:
    """The network as steps ask for it: itself, if it offers what `Network` says, or wrapped.

    Raises:
        TypeError: it cannot be called, or offers the main part of it and not all.
    """
    if isinstance(model, Network):
        return cast(nn.Module, model)
    if hasattr(model, "tabulate") and hasattr(model, "body"):
        lacking = ", ".join(sorted(name for name in vars(Network) if name[0] != "_" and not hasattr(model, name)))
        raise TypeError(f"network: a model with tabulate and body must be a Network, got one without {lacking}; add it")
    if not callable(model):
        raise TypeError(f"network: model must be a module or a callable, got {type(model).__name__}; pass (x, t) → ε")
    return Foreign(model)


def rows_hold_classes(network: Network, spec: ModelSpec, T: int) -> bool:
    """Whether each class gets rows of its own, which saves telling the network of it in each step.

    It depends on the network and its training alone, never on a run: a sample must not depend on its company.
    """
    numbers = network.row_numbers()
    if spec.num_classes is None or numbers is None:
        return False
    classes = max(spec.num_classes, 0 if spec.null_class is None else spec.null_class + 1)
    return (T + 1) * classes * numbers * 4 <= TABLE_BYTES
