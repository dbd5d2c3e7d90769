"""What is traced: the network, the network at a table's rows, the update and the last mapping.

The update is `advance` itself, handed a network's output instead of a network; so the file holds the same arithmetic
as every other engine, and no second version of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.blocks import timestep_embedding
from fastddpm.denoiser import Denoiser, bind
from fastddpm.export.engine_network import EngineNetwork
from fastddpm.images import to_unit
from fastddpm.spec import ModelSpec
from fastddpm.state import State, advance
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

EXAMPLE_BATCH = 3
"""Samples of a traced example: more than one, or the tracer takes the batch for a constant."""


class Network(nn.Module):
    """(x, t[, y][, x_self_cond]) → output, as the network has it."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`; callables without parameters become modules here."""
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """The raw output for x [B, C, H, W], t [B], y [B] and the last estimate of x_0."""
        more = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return torch.as_tensor(self.model(x, t, **more) if y is None else self.model(x, t, y, **more))


class RowNetwork(nn.Module):
    """(x, step[, y][, history]) → output: the network asked for rows of a table, its time projections tabulated."""

    def __init__(self, denoiser: Denoiser) -> None:
        """Take over the denoiser's tensors as buffers, so that they get names of their own in the file."""
        super().__init__()
        self.denoiser = denoiser
        self.network = denoiser.unet if denoiser.unet is not None else denoiser.model
        for name in ("times", "projections", "slots"):
            self.register_buffer(name, getattr(denoiser, name), persistent=False)

    def forward(self, x: Tensor, step: Tensor, y: Tensor | None = None, history: Tensor | None = None) -> Tensor:
        """The raw output for x [B, C, H, W], step [B], y [B] and the last estimate of x_0."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("times", "projections", "slots")}
        own["model" if self.denoiser.unet is None else "unet"] = self.network
        return dataclasses.replace(self.denoiser, **own)(x, step, y, history)


class EmbeddedRows(nn.Module):
    """(x, step, y) → output: a U-Net asked for rows of a table, with the embeddings of their times tabulated.

    For tables of more steps and classes than there is room for projections: classes are still added as they come.
    """

    def __init__(self, unet: UNet, times: Tensor) -> None:
        """Tabulate `times` [S+1]."""
        super().__init__()
        self.unet = unet
        c = unet.config
        with torch.no_grad():
            features = timestep_embedding(times, c.sinusoids, order=c.embedding, shift=c.embedding_shift)
            self.register_buffer("embeddings", unet.time_mlp(features.to(unet.time_projection.weight.dtype)))

    def forward(self, x: Tensor, step: Tensor, y: Tensor) -> Tensor:
        """The raw output for x [B, C, H, W], step [B] and y [B]; `UNet.embed` with its first half looked up."""
        unet = self.unet
        embedding = torch.as_tensor(self.embeddings)[step] + cast(nn.Embedding, unet.label_embedding)(y)
        return unet.body(x, unet.time_projection(F.silu(embedding)))


@dataclasses.dataclass(frozen=True)
class _Given(Denoiser):
    """A network that has already answered."""

    out: Tensor | None = None
    out_uncond: Tensor | None = None

    def predict(self, *_: object, **__: object) -> tuple[Tensor, Tensor | None]:
        """The answers, whatever is asked."""
        return torch.as_tensor(self.out), self.out_uncond


def _given(*_: object) -> Tensor:
    raise NotImplementedError("the update is traced with a network that has already answered")


class Update(nn.Module):
    """(x, out, step[, out_uncond, guidance, history, noise]) → x, step[, history]."""

    def __init__(self, table: StepTable) -> None:
        """Take the table's tensors as buffers."""
        super().__init__()
        self.table = table
        self.register_buffer("rows", table.rows)
        self.register_buffer("timesteps", table.timesteps)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        step: Tensor,
        out_uncond: Tensor | None = None,
        guidance: Tensor | None = None,
        history: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One `advance` that changes none of its arguments; noise is float32 [B, C, H, W]."""
        rows, timesteps = torch.as_tensor(self.rows), torch.as_tensor(self.timesteps)
        table = dataclasses.replace(self.table, rows=rows, timesteps=timesteps)
        past = None if history is None else history.clone()
        # Nothing is drawn here, so it does not matter what seed and id are.
        state = State(x.clone(), step.clone(), step, step, None, guidance, past)
        given = _Given(model=_given, times=timesteps, null_class=None, out=out, out_uncond=out_uncond)
        advance(given, table, state, noise=None if noise is None else noise[None])
        return (state.x, state.step) if state.history is None else (state.x, state.step, state.history)


class Pictures(nn.Module):
    """The final state → pictures in [0, 1], as `Sampler.sample` maps them."""

    def __init__(self, spec: ModelSpec) -> None:
        """Remember the mapping."""
        super().__init__()
        self.mapping = spec.to_unit

    def forward(self, x: Tensor) -> Tensor:
        """Pictures, float32 [B, C, H, W]."""
        return to_unit(x, self.mapping)


def as_module(model: object) -> nn.Module:
    """The network as a module; a bare callable is wrapped.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, EngineNetwork):
        model = model.module
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"export: model must be a module or a callable, got {type(model).__name__}; pass a Sampler")

    call: Callable[..., Tensor] = model

    class Function(nn.Module):
        def forward(self, *arguments: Tensor, **more: Tensor) -> Tensor:
            return torch.as_tensor(call(*arguments, **more))

    return Function().eval()


def keeps_history(table: StepTable, spec: ModelSpec) -> bool:
    """Whether a step needs the x̂_0 of the one before."""
    return table.uses_history or spec.self_condition


def row_network(model: nn.Module, spec: ModelSpec, table: StepTable) -> RowNetwork | EmbeddedRows:
    """The network at a table's rows; what depends on time alone is tabulated unless that would blow the file up.

    A table of projections holds a row for each step and class. Where it would be more than twice as large as the
    weights (1000 steps of ten classes, say), the file gets a table of time embeddings, a row for each step, and the
    layers that make projections of them.
    """
    denoiser = bind(model, spec, table)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if denoiser.projections is not None and denoiser.projections.numel() * 4 <= 2 * weights:
        return RowNetwork(denoiser)
    if isinstance(model, UNet) and model.label_embedding is not None:
        return EmbeddedRows(model, denoiser.times)
    return RowNetwork(dataclasses.replace(denoiser, unet=None, projections=None, slots=None))


def example(spec: ModelSpec, names: tuple[str, ...], batch: int) -> dict[str, Tensor]:
    """Arguments of the right shapes and dtypes for tracing, each a tensor of its own (a tracer merges shared ones)."""
    picture = (batch, *spec.shape)
    out = (batch, spec.shape[0] * (2 if spec.learned_variance else 1), *spec.shape[1:])
    fed = spec.times_fed(torch.zeros(1, dtype=torch.int64)).dtype
    makers = {
        **{name: (picture, torch.float32) for name in ("x", "x_self_cond", "history", "noise")},
        **{name: (out, torch.float32) for name in ("out", "out_uncond")},
        **{name: ((batch,), torch.int64) for name in ("step", "sample_id", "seed", "y")},
        "t": ((batch,), fed),
        "guidance": ((batch,), torch.float32),
    }
    return {name: torch.zeros(makers[name][0], dtype=makers[name][1]) for name in names}
