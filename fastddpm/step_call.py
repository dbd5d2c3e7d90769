"""A step as a function of tensors: what is exported, compiled and called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.denoiser import Denoiser
from fastddpm.fast_layers import with_fast_layers
from fastddpm.kernels._native import processor
from fastddpm.state import State, advance
from fastddpm.step_table import StepTable
from fastddpm.unet import UNet

CHANGED = ("x", "step", "history")
"""The tensors of a `State` that `advance` changes."""


class StepModule(nn.Module):
    """`advance` as a function of all tensors that it reads, in the order of `names`, with the network inside.

    With `in_place` it changes its arguments, as a CUDA graph needs. Otherwise it returns what `advance` changes and
    changes nothing itself: ahead-of-time packages were seen to lose changes that are made to an argument.
    """

    def __init__(self, denoiser: Denoiser, table: StepTable, names: Sequence[str], *, in_place: bool) -> None:
        """Keep what is not a tensor of a denoiser and a table; the network becomes a sub-module."""
        super().__init__()
        network = denoiser.unet if denoiser.unet is not None else denoiser.model
        self.network = network if isinstance(network, nn.Module) else None
        self._denoiser, self._table, self._names = denoiser, table, tuple(names)
        self._in_place = in_place

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """One step; returns the new values of `CHANGED`, or nothing where they are changed in place."""
        values = dict(zip(self._names, tensors, strict=True))
        if not self._in_place:
            values |= {name: values[name].clone() for name in CHANGED}
        network: Any = self._denoiser.model if self.network is None else self.network
        denoiser = dataclasses.replace(
            self._denoiser,
            model=network,
            unet=network if self._denoiser.unet is not None else None,
            times=values["times"],
            projections=values.get("projections"),
            slots=values.get("slots"),
        )
        table = dataclasses.replace(self._table, rows=values["rows"], timesteps=values["timesteps"])
        state = State(*(values.get(field.name) for field in dataclasses.fields(State)))  # type: ignore[arg-type]
        advance(denoiser, table, state, noise=values.get("noise"))
        return () if self._in_place else tuple(values[name] for name in CHANGED)


@dataclasses.dataclass(frozen=True)
class StepCall:
    """One batch's step as a function of named tensors: what is exported, and what a package is called with.

    Attributes:
        denoiser: the network at the table's rows.
        table: the rows; noise is always taken to be used, so that a package serves every solver.
        state: the samples. A history is kept always, for the same reason.
        noise: float32 [N, B, C, H, W], or None for Philox.
    """

    denoiser: Denoiser
    table: StepTable
    state: State
    noise: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The arguments by name, without those that are None."""
        values: dict[str, Tensor | None] = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(State)}
        values |= {"rows": self.table.rows, "timesteps": self.table.timesteps, "times": self.denoiser.times}
        values |= {"projections": self.denoiser.projections, "slots": self.denoiser.slots, "noise": self.noise}
        return {name: value for name, value in values.items() if value is not None}

    def copy(self) -> StepCall:
        """The same call on a copy of the samples."""
        return dataclasses.replace(self, state=self.state.copy())

    @property
    def in_place(self) -> bool:
        """Whether the step changes the state's own tensors."""
        return self.state.x.device.type == "cuda"

    def bound(self, step: Callable[..., Any]) -> Callable[[Tensor | None], None]:
        """A compiled step on these samples: a function of the noise, if there is any.

        On a CPU the state gets new tensors for those that change, which is quicker than to copy into the old ones.
        """
        tensors = self.tensors()
        supplied = tensors.pop("noise", None) is not None
        arguments = list(tensors.values())
        in_place = self.in_place
        x, row, history = (list(tensors).index(name) for name in CHANGED)

        def run(noise: Tensor | None) -> None:
            changed = step(*arguments, noise) if supplied else step(*arguments)
            if in_place:
                return
            state = self.state
            state.x, state.step, state.history = changed
            arguments[x], arguments[row], arguments[history] = changed

        return run

    def module(self) -> StepModule:
        """The step as a module over these tensors; on a CPU its layers run the quicker way for this batch."""
        step = self._module()
        if self.state.x.device.type == "cpu" and step.network is not None:
            tensors = tuple(self.copy().tensors().values())

            def run(network: nn.Module) -> None:
                step.network = network
                step(*tensors)

            with torch.no_grad():
                step.network, _ = with_fast_layers(step.network, run)
        return step

    def _module(self) -> StepModule:
        table = dataclasses.replace(self.table, uses_noise=True, uses_history=True)
        return StepModule(self.denoiser, table, list(self.tensors()), in_place=self.in_place)

    def dynamic_shapes(self) -> tuple[dict[int, Any] | None, ...]:
        """Which sizes may differ between calls: the number of rows."""
        rows = torch.export.Dim("rows", min=2, max=1 << 20)
        dynamic: dict[str, dict[int, Any]] = {name: {0: rows} for name in ("rows", "timesteps", "times")}
        dynamic["projections"] = {0: torch.export.Dim("projections", min=2)}
        if self.noise is not None and len(self.noise) > 1:
            dynamic["noise"] = {0: torch.export.Dim("noise", min=2)}
        return tuple(dynamic.get(name) for name in self.tensors())

    def signature(self) -> dict[str, Any]:
        """All that a package depends on, apart from the weights: two calls with the same one can share it."""
        shapes = {
            name: [str(value.dtype), list(value.shape[1:] if given else value.shape)]
            for (name, value), given in zip(self.tensors().items(), self.dynamic_shapes(), strict=True)
        }
        return {
            "tensors": shapes,
            "network": _describe(self.denoiser),
            "null class": self.denoiser.null_class,
            "self condition": self.denoiser.self_condition,
            "learned variance": self.table.variance == "learned_range",
            "threshold": None if self.table.threshold is None else dataclasses.astuple(self.table.threshold),
            "device": str(self.state.x.device),
            "threads": torch.get_num_threads(),
            "processor": f"{processor()} {torch.backends.cpu.get_cpu_capability()}",
            "versions": [fastddpm.__version__, torch.__version__],
        }


def _describe(denoiser: Denoiser) -> str:
    network = denoiser.unet if denoiser.unet is not None else denoiser.model
    return repr(network.config) if isinstance(network, UNet) else type(network).__qualname__
