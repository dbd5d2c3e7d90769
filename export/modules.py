"""What is traced: the network, and a step's two halves on one chapter of rows, `Step.ask` and `Step.update`.

They are traced apart, because in a file with an open batch only the samples that are guided are asked for twice.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.images import to_unit
from fastddpm.kernels.operands import Operands
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.network import Network, as_network
from fastddpm.step.step import HISTORIES, KNOWN, Step, StepForm

EXAMPLE_BATCH = 3
"""Samples of a traced example: more than one, or the tracer takes the batch for a constant."""


class Whole(nn.Module):
    """(x, t[, y][, x_self_cond]) → output, as the network has it."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`; callables without parameters become modules here."""
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """The raw output for x [B, C, H, W], t [B], y [B] and the last estimate of x_0."""
        more = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return torch.as_tensor(self.model(x, t, **more) if y is None else self.model(x, t, y, **more))


class Ask(nn.Module):
    """(x, step[, y][, history][, condition]) → output: `Step.ask`, with what depends on time alone tabulated."""

    def __init__(self, step: Step, spec: ModelSpec, table: StepTable) -> None:
        """Tabulate a run; classes are told in each step, or a file of many would hold a table for each."""
        super().__init__()
        self.step = step
        with torch.no_grad():
            conditions = cast(Network, step.network).tabulate(spec.times_fed(table.timesteps))
        self.register_buffer("conditions", conditions)

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        y: Tensor | None = None,
        history: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The raw output for x [B, C, H, W], step [B], y [B], the last estimate of x_0 and what stands behind x."""
        told = {"labels": y, "history": history, "condition": condition}
        given = {name: value for name, value in told.items() if value is not None}
        return self.step.ask({"x": x, "step": step, "conditions": torch.as_tensor(self.conditions), **given})[0]


class Update(nn.Module):
    """(x, out, step[, out_uncond, guidance, histories, noise, known, mask]) → x, step[, histories]: `Step.update`."""

    def __init__(self, step: Step, table: StepTable) -> None:
        """Take the table's tensors as buffers."""
        super().__init__()
        self.form = step.form
        self.register_buffer("rows", table.rows)
        self.register_buffer("timesteps", table.counters)
        self.register_buffer("end", torch.tensor([table.S]))

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        step: Tensor,
        out_uncond: Tensor | None = None,
        guidance: Tensor | None = None,
        history: Tensor | None = None,
        history2: Tensor | None = None,
        noise: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The update; noise, known and mask are float32 [B, C, H, W]. The tracer wants each argument's name here."""
        rows, timesteps, end = (torch.as_tensor(tensor) for tensor in (self.rows, self.timesteps, self.end))
        z = None if noise is None else noise[None]
        # Nothing is drawn here, so it does not matter what seed and id are.
        return Step(nn.Identity(), self.form).update(
            Operands(
                x, out, rows, timesteps, step, end, step, step, z, out_uncond, guidance, history, history2, known, mask
            )
        )


class Pictures(nn.Module):
    """The final state → pictures in [0, 1], as `Sampler.sample` maps them."""

    def __init__(self, spec: ModelSpec) -> None:
        """Remember the mapping."""
        super().__init__()
        self.mapping = spec.to_unit

    def forward(self, x: Tensor) -> Tensor:
        """Pictures, float32 [B, C, H, W]."""
        return to_unit(x, self.mapping)


def step_of(model: nn.Module, spec: ModelSpec, table: StepTable, *, masked: bool = False) -> Step:
    """The step that a file holds; `masked` where a part of each picture may be known."""
    labelled, noise = spec.num_classes is not None, table.uses_noise or masked
    form = StepForm.of(spec, table, labelled=labelled, noise=noise, masked=masked)
    return Step(as_network(model), form)


def example(spec: ModelSpec, names: tuple[str, ...], batch: int) -> dict[str, Tensor]:
    """Arguments of the right shapes and dtypes for tracing, each a tensor of its own (a tracer merges shared ones).

    Beside `t` stands a network as it is, whose x has the condition's channels behind its own.
    """
    picture, behind = (batch, *spec.shape), (batch, spec.condition_channels, *spec.shape[1:])
    whole = (batch, spec.shape[0] + spec.condition_channels, *spec.shape[1:])
    out = (batch, spec.shape[0] * (2 if spec.learned_variance else 1), *spec.shape[1:])
    fed = spec.times_fed(torch.zeros(1, dtype=torch.int64)).dtype
    makers = {
        **{name: (picture, torch.float32) for name in ("x_self_cond", *HISTORIES, "noise", *KNOWN)},
        "x": (whole if "t" in names else picture, torch.float32),
        "condition": (behind, torch.float32),
        **{name: (out, torch.float32) for name in ("out", "out_uncond")},
        **{name: ((batch,), torch.int64) for name in ("step", "sample_id", "seed", "y")},
        "t": ((batch,), fed),
        "guidance": ((batch,), torch.float32),
    }
    return {name: torch.zeros(makers[name][0], dtype=makers[name][1]) for name in names}
