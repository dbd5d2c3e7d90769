"""LikelihoodStep: one term of the variational bound for each picture of a batch, tensors in and tensors out.

It is to likelihoods what `Step` is to samples: run eagerly, compiled or captured, it is this object. Pictures stay what
they are, and their clocks go down the rows of a `LikelihoodTable` in the same book.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.kernels.normals import normals
from fastddpm.kernels.q_sample import Levels, q_sample_reference
from fastddpm.process.likelihood import discretized_gaussian_log_likelihood, normal_kl
from fastddpm.process.likelihood_table import LIKELIHOOD_COLUMNS, LikelihoodTable
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import DynamicThreshold, dynamic_bound
from fastddpm.step.network import Network

ALWAYS = ("x", "step", "end", "sample_id", "seed", "rows", "timesteps", "conditions")
"""The arguments that every step has."""
TERMS = ("vlb", "x_start_mse", "eps_mse")
"""What a step finds out of each picture, in the order of the numbers in `State.terms`."""

_COLUMN = {name: i for i, name in enumerate(LIKELIHOOD_COLUMNS)}


@dataclasses.dataclass(frozen=True)
class LikelihoodForm:
    """What distinguishes such steps of one network; everything else about a run is in the tensors.

    Attributes:
        labelled: whether the network is told the class in each step; otherwise the rows hold it.
        noise: whether ε is an argument; otherwise it is made from seed, id and timestep, in a domain of its own.
        learned: whether the network's second half of channels is the variance.
        self_condition: whether the network takes an estimate of x_0; it is given zeros, as in a run's first step.
        unit_range: whether the network works in [0, 1] rather than in [−1, 1].
        threshold: dynamic thresholding, or None.
        in_place: whether the results are written into the arguments, as a captured graph needs.
    """

    labelled: bool = False
    noise: bool = False
    learned: bool = False
    self_condition: bool = False
    unit_range: bool = False
    threshold: DynamicThreshold | None = None
    in_place: bool = False

    histories = ()
    """Nothing is remembered from one row to the next."""
    caption = ", likelihood"
    """What tells its times from those of other steps."""

    @property
    def names(self) -> tuple[str, ...]:
        """The step's arguments, in order."""
        wanted = {"labels": self.labelled, "terms": True, "noise": self.noise}
        return (*ALWAYS, *(name for name, is_wanted in wanted.items() if is_wanted))

    def for_packages(self) -> LikelihoodForm:
        """The form that is compiled ahead of time for such steps."""
        return dataclasses.replace(self, in_place=False)

    def for_graphs(self) -> tuple[LikelihoodForm, ...]:
        """The forms that do for such steps in captured graphs, the leanest first."""
        return (dataclasses.replace(self, in_place=True),)

    @classmethod
    def of(cls, spec: ModelSpec, table: LikelihoodTable, *, labelled: bool, noise: bool) -> LikelihoodForm:
        """The form for a run.

        Args:
            spec: the network's conventions.
            table: the run's rows.
            labelled: whether the network is told the class in each step.
            noise: whether each step is handed its ε.
        """
        return cls(
            labelled=labelled,
            noise=noise,
            learned=table.variance == "learned_range",
            self_condition=spec.self_condition,
            unit_range=spec.to_unit == "identity",
            threshold=table.threshold,
        )


class LikelihoodStep(nn.Module):
    """One term of every picture's bound: the picture noised to its row's timestep, the network, and what it misses.

    Ho et al. 2020, eq. 5 and 13, as OpenAI's `calc_bpd_loop` has it. Nothing is kept between calls.
    """

    eager_because = ""
    changed = ("step", "terms")
    """The arguments that a step changes, in the order of its results."""

    def __init__(self, network: nn.Module, form: LikelihoodForm) -> None:
        """Join a network and a form.

        Args:
            network: offers what `fastddpm.step.network.Network` says.
            form: which arguments there are, and what is done with them.
        """
        super().__init__()
        self.network, self.form, self.names = network, form, form.names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Find the terms.

        Args:
            tensors: in the order of `LikelihoodForm.names`: x, x_0 in the network's range, step, end, sample_id and
                seed as in `State`; rows (those of a `LikelihoodTable`), timesteps and conditions as in `Book`; then
                labels, where the form has them, terms as in `State`, and noise, float32 [1, B, C, H, W], ε.

        Returns:
            step, one row later, and terms, float32 [B, 3] in the order of `TERMS`: bits per dimension and two means of
            squares. Those of a picture that is done mean nothing.

        Raises:
            ValueError: the variance is learned and the network returns none, or there are too many or few tensors.
        """
        given = dict(zip(self.names, tensors, strict=True))
        x_start, step, rows = given["x"], given["step"], given["rows"]
        eps = given["noise"][0] if self.form.noise else self._noise(given)
        levels = Levels(rows[:, _COLUMN["signal"]], rows[:, _COLUMN["spread"]])
        x_t, _ = q_sample_reference(x_start, step, levels, eps)
        network = cast(Network, self.network)
        guess = torch.zeros_like(x_t) if self.form.self_condition else None
        out = network.body(x_t, given["conditions"], step, given.get("labels"), guess).float()
        terms = self.terms(x_start, x_t, out, rows.index_select(0, step))
        later = torch.minimum(step + 1, given["end"])
        return (step.copy_(later), given["terms"].copy_(terms)) if self.form.in_place else (later, terms)

    def terms(self, x_start: Tensor, x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        """What follows the network.

        Args:
            x_start: float32 [B, C, H, W].
            x_t: the same, noised.
            out: the network's output, float32 [B, C or 2C, H, W].
            rows: float32 [B, len(COLUMNS)], each picture's row.

        Returns:
            As `forward`'s terms.
        """
        channels = x_start.shape[1]
        if self.form.learned and out.shape[1] != 2 * channels:
            raise ValueError(
                f"likelihood: the network must return {2 * channels} channels for learned_range, got {out.shape[1]}; "
                "use a fixed variance"
            )
        at = {name: rows[:, i].reshape(-1, 1, 1, 1) for name, i in _COLUMN.items()}
        estimate = torch.addcmul(at["a_x"] * x_t, at["a_o"], out[:, :channels])
        if self.form.threshold is None:
            estimate = torch.minimum(torch.maximum(estimate, -at["bound"]), at["bound"])
        else:
            limit = dynamic_bound(x_t, out, rows, self.form.threshold).reshape(-1, 1, 1, 1)
            estimate = torch.minimum(torch.maximum(estimate, -limit), limit) / limit
        excess = at["log_excess"]
        if self.form.learned:
            excess = torch.addcmul(excess, at["log_slope"], out[:, channels:])
        missing, zero = x_start - estimate, torch.zeros_like(at["scale"])
        kl = normal_kl(at["scale"] * missing, zero, zero, excess)
        nll = -self._decoded(x_start, estimate, at["log_true"] + excess)
        term = torch.where(at["decodes"] > 0, nll, kl)
        x_start_mse = missing.square().flatten(1).mean(1)
        return torch.stack(
            (term.flatten(1).mean(1) / math.log(2.0), x_start_mse, rows[:, _COLUMN["snr"]] * x_start_mse), dim=1
        )

    def _decoded(self, x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """The log-likelihoods of x_0's levels, of which 256 are spread over the network's range."""
        if self.form.unit_range:
            x_start, mean, log_variance = 2 * x_start - 1, 2 * mean - 1, log_variance + 2 * math.log(2.0)
        return discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)

    def _noise(self, given: dict[str, Tensor]) -> Tensor:
        x, t = given["x"], given["timesteps"].index_select(0, given["step"])
        made = normals(given["seed"], given["sample_id"], t, x[0].numel())
        return made.reshape(x.shape)
