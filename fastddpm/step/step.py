"""Step: one reverse step of a batch, tensors in and tensors out.

It is the only form of a step. Run eagerly, compiled ahead of time, by `torch.compile`, captured in a CUDA graph,
exported to ONNX or served, it is this object, and what a test proves of it holds for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastddpm.kernels.operands import Operands
from fastddpm.kernels.p_sample import p_sample, p_sample_reference
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import DynamicThreshold, StepTable, dynamic_bound
from fastddpm.step.book import Book
from fastddpm.step.likelihood import ALWAYS, LikelihoodForm, LikelihoodStep
from fastddpm.step.network import Network
from fastddpm.step.state import State

HISTORIES = ("history", "history2")
"""Where the estimates of x_0 of the last steps are kept, the newest first."""
KNOWN = ("known", "mask")
"""What a step is told of pictures of which a part is known."""
CHANGED = ("x", "step", *HISTORIES)
"""The arguments that a step changes, in the order of its results; the histories only where they are kept."""


@dataclasses.dataclass(frozen=True)
class StepForm:
    """What distinguishes steps of one network; everything else about a run is in the tensors.

    Attributes:
        guided: whether the network is asked for the output without class too (classifier-free guidance).
        labelled: whether the network is told the class in each step; otherwise the rows hold it.
        history: how many of the last x̂_0 are kept: 0, 1 (DPM-Solver++(2M), self-conditioned networks, previews) or 2
            (DPM-Solver++(3M)).
        noise: whether z is an argument; otherwise it is made from seed, id and timestep.
        stochastic: whether σ·z is added at all; a run whose σ are all 0 needs no noise to be made.
        learned: whether the network's second half of channels is the variance.
        self_condition: whether the network is given the previous x̂_0.
        condition: whether the network is given a condition, channels behind x that are the same in all steps.
        null_class: the label of "no class", where the network is told the class in each step.
        threshold: dynamic thresholding, or None.
        masked: whether a part of each picture may be known and is held at its level. It takes noise: `stochastic`.
        in_place: whether the results are written into the arguments `CHANGED`, as a captured graph needs. Otherwise
            the arguments stay as they are: ahead-of-time packages were seen to lose changes that are made to them.
    """

    guided: bool = False
    labelled: bool = False
    history: int = 0
    noise: bool = False
    stochastic: bool = True
    learned: bool = False
    self_condition: bool = False
    condition: bool = False
    null_class: int | None = None
    threshold: DynamicThreshold | None = None
    masked: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        """A self-conditioned network always has a history, and known pixels always are noised."""
        if self.masked and not self.stochastic:
            raise ValueError("StepForm: stochastic must be True for a masked step, got False; known pixels are noised")
        if not 0 <= self.history <= len(HISTORIES):
            raise ValueError(f"StepForm: history must be 0, 1 or 2, got {self.history}; keep as many as rows read")
        if self.self_condition and not self.history:
            raise ValueError("StepForm: history must be at least 1 for a self-conditioned network, got 0; keep one")

    @property
    def histories(self) -> tuple[str, ...]:
        """Those of `HISTORIES` that are kept."""
        return HISTORIES[: self.history]

    @property
    def names(self) -> tuple[str, ...]:
        """The step's arguments, in order."""
        wanted = {
            "labels": self.labelled,
            "uncond": self.guided and not self.labelled,
            "guidance": self.guided,
            **{name: name in self.histories for name in HISTORIES},
            **dict.fromkeys(KNOWN, self.masked),
            "condition": self.condition,
            "noise": self.noise,
        }
        return (*ALWAYS, *(name for name, is_wanted in wanted.items() if is_wanted))

    @property
    def caption(self) -> str:
        """What tells its times from those of other steps."""
        return ", guided" if self.guided else ""

    def for_packages(self) -> StepForm:
        """The form that is compiled ahead of time for such steps: with a history and noise it serves most solvers.

        Only solvers that look back two steps have packages of their own, or the others' would carry a second history.
        """
        return dataclasses.replace(self, history=max(1, self.history), stochastic=True, in_place=False)

    def for_graphs(self) -> tuple[StepForm, ...]:
        """The forms that do for such steps in captured graphs, the leanest first; all have noise for every solver."""
        depths = range(self.history, len(HISTORIES) + 1)
        return tuple(dataclasses.replace(self, history=depth, stochastic=True, in_place=True) for depth in depths)

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        table: StepTable,
        *,
        guided: bool = False,
        labelled: bool = False,
        noise: bool = False,
        masked: bool = False,
    ) -> StepForm:
        """The leanest form for a run.

        Args:
            spec: the network's conventions.
            table: the run's rows.
            guided: whether any sample's guidance scale is not 1.
            labelled: whether the network is told the class in each step.
            noise: whether each step is handed its z.
            masked: whether a part of some picture is known.
        """
        return cls(
            guided=guided,
            labelled=labelled,
            history=max(table.history, int(spec.self_condition)),
            noise=noise,
            stochastic=table.uses_noise or masked,
            learned=table.variance == "learned_range",
            self_condition=spec.self_condition,
            condition=spec.condition_channels > 0,
            null_class=spec.null_class if labelled else None,
            threshold=table.threshold,
            masked=masked,
        )


class Step(nn.Module):
    """One reverse step of every sample of a batch: the network at its rows, then the fused update.

    A sample whose clock is at its chapter's end stays as it is, bit for bit. Called again and again on its own results,
    a step makes the whole trajectory; nothing is kept between calls.

    Attributes:
        eager_because: why it can only be run eagerly; empty where it need not be.
    """

    eager_because = ""

    def __init__(self, network: nn.Module, form: StepForm) -> None:
        """Join a network and a form.

        Args:
            network: offers what `fastddpm.step.network.Network` says.
            form: which arguments there are, and what is done with them.
        """
        super().__init__()
        self.network, self.form, self.names = network, form, form.names
        self.changed = tuple(name for name in CHANGED if name in form.names)

    def formed(self, form: StepForm) -> Step:
        """The same step in another form."""
        return Step(self.network, form)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Make the step.

        Args:
            tensors: in the order of `StepForm.names`: x, step, end, sample_id and seed as in `State`; rows, timesteps
                and conditions as in `Book`; then, as the form has them, labels, uncond, guidance, history, history2,
                known, mask and condition as in `State`, and noise, float32 [N, B, C, H, W], z, as in `p_sample` (with
                N = 1 that of this step).

        Returns:
            x, step and, where they are kept, the histories, one step later.

        Raises:
            ValueError: the variance is learned and the network returns none, or there are too many or few tensors.
        """
        given = dict(zip(self.names, tensors, strict=True))
        out, out_uncond = self.ask(given)
        return self.update(
            Operands(
                given["x"], out, given["rows"], given["timesteps"],
                given["step"], given["end"], given["sample_id"], given["seed"],
                given.get("noise"), out_uncond, given.get("guidance"),
                given.get("history"), given.get("history2"), given.get("known"), given.get("mask"),
            )
        )  # fmt: skip

    def ask(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The network's output and, in guided runs, that without class, from one call of twice the batch.

        Args:
            given: x, step, conditions and, as the form has them, labels, uncond, history and condition, as in
                `forward`.

        Returns:
            [B, C or 2C, H, W], and the same again or None.
        """
        network, form, x, step = cast(Network, self.network), self.form, given["x"], given["step"]
        labels, conditions = given.get("labels"), given["conditions"]
        x = torch.cat((x, given["condition"]), dim=1) if form.condition else x
        past = given["history"] if form.self_condition else None
        if not form.guided:
            return network.body(x, conditions, step, labels, past), None
        again = step if labels is not None else step + given["uncond"]
        if labels is not None:
            labels = torch.cat((labels, torch.full_like(labels, form.null_class or 0)))
        past = None if past is None else torch.cat((past, past))
        both = network.body(torch.cat((x, x)), conditions, torch.cat((step, again)), labels, past)
        out, out_uncond = both.chunk(2)
        return out, out_uncond

    def update(self, given: Operands) -> tuple[Tensor, ...]:
        """What follows the network: x̂_0, its bound, the solver's row and the clock.

        Args:
            given: all but `bound`.

        Returns:
            As `forward`.

        Raises:
            ValueError: the variance is learned and the network returns none.
        """
        form, channels = self.form, given.x.shape[1]
        if form.learned and given.out.shape[1] != 2 * channels:
            raise ValueError(
                f"step: the network must return {2 * channels} channels for learned_range, got {given.out.shape[1]}; "
                "use a fixed variance"
            )
        if form.threshold is not None:
            combined = given.out
            if given.out_uncond is not None and given.guidance is not None:
                combined = given.out_uncond + given.guidance[:, None, None, None] * (given.out - given.out_uncond)
            rows = given.table[torch.minimum(given.step, given.end)]
            given = Operands(*given[:-1], dynamic_bound(given.x, combined, rows, form.threshold))
        later = torch.minimum(given.step + 1, given.end)
        run = p_sample if form.in_place else p_sample_reference
        changed = run(given, stochastic=form.stochastic)
        new, *past = changed or [value for value in (given.x, given.history, given.history2) if value is not None]
        later = given.step.copy_(later) if form.in_place else later
        return (new, later, *past[: form.history])


@dataclasses.dataclass(frozen=True)
class Call:
    """A step with the tensors of one batch.

    Attributes:
        step: the step.
        state: the samples.
        book: the rows that they are at.
        noise: float32 [1, B, C, H, W], an example of the z or ε that each step will be given, or None.
    """

    step: Step | LikelihoodStep
    state: State
    book: Book
    noise: Tensor | None = None

    def arguments(self) -> list[Tensor]:
        """The step's arguments, in order."""
        book, state = self.book, vars(self.state)
        given = {"rows": book.rows, "timesteps": book.timesteps, "conditions": book.conditions, "noise": self.noise}
        return [value for name in self.step.names if (value := given.get(name, state.get(name))) is not None]

    def copy(self) -> Call:
        """The same call on a copy of the samples."""
        return dataclasses.replace(self, state=self.state.copy())

    def formed(self, **changes: Any) -> Call:  # noqa: ANN401 - the fields of `StepForm` type them
        """The call with another form of the step; where it keeps a history now, there is room for it."""
        return self.with_form(dataclasses.replace(self.step.form, **changes))

    def with_form(self, form: StepForm | LikelihoodForm) -> Call:
        """The call with this form of the step, which must be of its kind."""
        state = self.state
        if missing := [name for name in form.histories if getattr(state, name) is None]:
            state = dataclasses.replace(state, **{name: torch.zeros_like(state.x) for name in missing})
        if isinstance(self.step, Step) and isinstance(form, StepForm):
            return dataclasses.replace(self, step=self.step.formed(form), state=state)
        return dataclasses.replace(self, step=step_of(self.step.network, form), state=state)


def step_of(network: nn.Module, form: StepForm | LikelihoodForm) -> Step | LikelihoodStep:
    """The step of a network in a form: one that moves samples, or one that measures pictures."""
    return LikelihoodStep(network, form) if isinstance(form, LikelihoodForm) else Step(network, form)
