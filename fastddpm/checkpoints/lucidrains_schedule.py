"""The schedule of a denoising-diffusion-pytorch file: from the arrays that its GaussianDiffusion keeps as buffers.

That package computes in float64 and rounds every array once to float32. Solvers want more digits of ᾱ than that: where
the betas are those of a schedule that the package has, they are made anew in float64; else ᾱ is put together from those
float32 arrays that hold its digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.process.schedule import NoiseSchedule, ScheduleOptions

Objective = Literal["pred_noise", "pred_x0", "pred_v"]
OBJECTIVES: tuple[Objective, ...] = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
_ARRAYS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
BUFFERS = ("betas", *_ARRAYS, "loss_weight", "p2_loss_weight")
"""The names of the buffers, in the package's order; older versions have p2_loss_weight for loss_weight."""
_ROUNDING = 1e-6  # relative; float32 rounds by 6e-8, other machines' float64 functions show in its last digit


class RoundedSchedule(NoiseSchedule):
    """A schedule whose arrays were computed in float64 and rounded once to float32, as the package keeps them.

    `alphas_cumprod_exact` has the digits from before the rounding. The file's buffer `loss_weight` is an attribute
    where it is known.
    """

    exact: NoiseSchedule
    loss_weight: Tensor

    @classmethod
    def of(cls, exact: NoiseSchedule, buffers: Mapping[str, Tensor] | None = None) -> RoundedSchedule:
        """The rounded form of a float64 schedule.

        Args:
            exact: The schedule.
            buffers: The arrays [T] themselves, where a file has them; the rest is rounded from `exact`.

        Raises:
            ValueError: The rounded betas are out of range.
        """
        known = dict(buffers or {})
        schedule = cls(known.get("betas", exact.betas.float()), recipe=exact.recipe)
        arrays = {name: known[name] if name in known else getattr(exact, name).float() for name in _OWN}
        # Each is computed on first use unless it is there already.
        vars(schedule).update(arrays, alphas_cumprod_exact=exact.alphas_cumprod_exact, exact=exact)
        if "loss_weight" in known:
            vars(schedule)["loss_weight"] = known["loss_weight"]
        return schedule

    def to_config(self) -> dict[str, object]:
        """The float64 schedule's: what is sampled with it comes out the same."""
        return self.exact.to_config()

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """As `NoiseSchedule.rescale_zero_terminal_snr`, in float64."""
        return self.exact.rescale_zero_terminal_snr()

    def respaced(self, timesteps: Tensor) -> NoiseSchedule:
        """As `NoiseSchedule.respaced`, in float64."""
        return self.exact.respaced(timesteps)


_OWN = tuple(name for name in _ARRAYS if hasattr(NoiseSchedule, name)) + ("alphas", "log_snr")


def named_schedule(name: str, T: int, options: Mapping[str, float]) -> NoiseSchedule:
    """A schedule of the package in float64.

    Args:
        name: linear (its ends times 1000/T), cosine or sigmoid.
        T: Training steps.
        options: The package's schedule_fn_kwargs: s of cosine; start, end and tau of sigmoid (clamp_min has no effect).

    Raises:
        TypeError: T is not an int, or an option is no number.
        ValueError: An option is unknown or out of range, or the betas are.
    """
    known = {"linear": (), "cosine": ("s",), "sigmoid": ("start", "end", "tau", "clamp_min")}[name]
    given = {option: value for option, value in options.items() if option != "clamp_min"}
    if name == "linear":
        given |= {"beta_start": 1000 / T * 1e-4, "beta_end": 1000 / T * 0.02}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"schedule_fn_kwargs must be options of the {name} schedule, got {', '.join(unknown)}; omit it"
        )
    return NoiseSchedule.by_name(name, T, **cast(ScheduleOptions, given))


def read_schedule(
    buffers: Mapping[str, Tensor], name: str | None, options: Mapping[str, float], source: str
) -> RoundedSchedule:
    """The schedule of a file's buffers.

    Args:
        buffers: Those of `BUFFERS` that the file has, betas among them.
        name: The flag beta_schedule, with which the betas are then compared; None finds it out.
        options: The flag schedule_fn_kwargs.
        source: The file and what it was taken for, for messages.

    Raises:
        CheckpointError: If an array is not [T], its numbers contradict the betas, or the betas are not those of `name`.
    """
    arrays = _checked(buffers, source)
    betas = arrays["betas"]
    T = len(betas)
    for candidate in SCHEDULES if name is None else (name,):
        try:
            exact = named_schedule(candidate, T, options)
        except (ValueError, TypeError) as error:
            if name is not None:
                raise CheckpointError(f"{source}: {error}") from error
            continue
        if torch.allclose(exact.betas.float(), betas, rtol=_ROUNDING, atol=0.0):
            break
    else:
        if name is not None:
            raise CheckpointError(
                f"{source}: beta_schedule must give the betas of the file, got {name} with {dict(options)}, which "
                "gives others; correct or leave out beta_schedule and schedule_fn_kwargs"
            )
        exact = _from_buffers(arrays, source)
    try:
        schedule = RoundedSchedule.of(exact, arrays)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    _compare(schedule, arrays, source)
    return schedule


def find_objective(loss_weight: Tensor, alphas_cumprod: Tensor) -> Objective | None:
    """What the network predicts, from the weights of its losses.

    The package weighs losses by min(snr, γ)/snr where the network predicts the noise, by min(snr, γ) for x_0, and by
    min(snr, γ)/(snr + 1) for v, with snr = ᾱ/(1 − ᾱ) and γ = ∞ unless it was trained with min-SNR weights
    (Hang et al. 2023). Which it is shows in most cases.

    Args:
        loss_weight: [T].
        alphas_cumprod: float64 [T].

    Returns:
        The package's name of the objective; None where none of them fits, or several do.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    weight = loss_weight.double()
    clipped = {"pred_noise": weight * snr, "pred_x0": weight, "pred_v": weight * (snr + 1.0)}
    found: list[Objective] = []
    for objective in OBJECTIVES:
        gamma = clipped[objective].max()
        if torch.allclose(clipped[objective], snr.clamp(max=float(gamma)), rtol=1e-4, atol=0.0):
            found.append(objective)
    return found[0] if len(found) == 1 else None


def _checked(buffers: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The buffers as float32 [T]."""
    betas = buffers["betas"]
    for name, value in buffers.items():
        if value.ndim != 1 or value.shape != betas.shape or not len(betas) or not value.is_floating_point():
            raise CheckpointError(
                f"{source}: {name} must hold one float per training step, got {list(value.shape)} of {value.dtype} "
                f"beside {list(betas.shape)} betas; give the whole checkpoint"
            )
    arrays = {name: value.to("cpu", torch.float32) for name, value in buffers.items()}
    if not bool(arrays["betas"].isfinite().all()):
        raise CheckpointError(f"{source}: betas must be finite, got NaN or infinity; fetch the file again")
    return arrays


def _from_buffers(arrays: Mapping[str, Tensor], source: str) -> NoiseSchedule:
    """A float64 schedule of betas that were rounded to float32."""
    betas = arrays["betas"].double()
    # A beta near 1 has lost the digits of 1 − β; the ratio of the ᾱ has them.
    if "alphas_cumprod" in arrays:
        bar = arrays["alphas_cumprod"].double()
        ratio = bar / torch.cat((bar.new_ones(1), bar[:-1]))
        betas = torch.where((betas > 0.5) & (ratio > 0.0), 1.0 - ratio, betas)
    try:
        return NoiseSchedule.from_betas(betas)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _compare(schedule: RoundedSchedule, arrays: Mapping[str, Tensor], source: str) -> None:
    """Refuse arrays that belong to other betas."""
    for name in ("alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_one_minus_alphas_cumprod"):
        if name not in arrays:
            continue
        expected = getattr(schedule.exact, name)
        if not torch.allclose(arrays[name].double(), expected, rtol=1e-3, atol=1e-5):
            raise CheckpointError(
                f"{source}: {name} must follow from the betas beside it, got other numbers; give the file unchanged"
            )
