"""NoiseSchedule: the betas of the forward process, by name, by value or from a configuration.

Symbols as in Ho et al. 2020, with t counted from 0: q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t I),
α_t = 1 − β_t, ᾱ_t = α_0 ⋯ α_t. A schedule whose last β is 1 has zero terminal SNR (Lin et al. 2024):
ᾱ_{T−1} = 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from fastddpm.common.arguments import number, whole
from fastddpm.common.records import Record, Within
from fastddpm.process.betas import (
    cosine_betas,
    laplace_betas,
    linear_betas,
    logistic_betas,
    scaled_linear_betas,
    sigmoid_betas,
)
from fastddpm.process.forward import ForwardProcess

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "logistic": logistic_betas,
    "laplace": laplace_betas,
}
_ALIASES = {"squaredcos_cap_v2": "cosine"}
SCHEDULE_NAMES = (*_SCHEDULES, *_ALIASES)
"""Names that `NoiseSchedule.by_name` knows."""


@dataclass(frozen=True, kw_only=True)
class _Config(Record):
    """What all configurations hold."""

    name: str
    dtype: Literal["float32", "float64"] = "float64"
    zero_terminal_snr: bool = False


@dataclass(frozen=True, kw_only=True)
class BetaList(_Config):
    """The configuration of a schedule of which only the betas are known."""

    betas: tuple[Annotated[float, Within(0, 1, above=True)], ...]


@dataclass(frozen=True, kw_only=True)
class NamedSchedule(_Config):
    """The configuration of a schedule by name, with the options of `NoiseSchedule.by_name`."""

    T: Annotated[int, Within(1)]
    beta_start: float | None = None
    beta_end: float | None = None
    s: float | None = None
    max_beta: float | None = None
    start: float | None = None
    end: float | None = None
    tau: float | None = None


class ScheduleOptions(TypedDict, total=False):
    """The options of `NoiseSchedule.by_name`; None is the schedule's own default."""

    beta_start: float | None
    beta_end: float | None
    s: float | None
    max_beta: float | None
    start: float | None
    end: float | None
    tau: float | None


@dataclass(frozen=True, eq=False)
class NoiseSchedule(ForwardProcess):
    """A discrete variance-preserving noise schedule.

    All arithmetic runs in the dtype of `betas`: float64 by default, float32 to reproduce peers that use it.
    The arrays in Ho et al.'s names and the equations on batches are inherited from `ForwardProcess`.

    Attributes:
        betas: [T], float32 or float64 on the CPU, all in (0, 1); the last may be 1 (zero terminal SNR).
        recipe: name and options of the constructor that made the betas; None where only betas are known.

    Raises:
        TypeError: betas is not a float32 or float64 tensor.
        ValueError: betas is not 1-D, is empty, on another device than the CPU, not finite or out of range.
    """

    betas: Tensor
    recipe: Mapping[str, object] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Validate the betas; a schedule that exists is usable."""
        betas = self.betas
        if not isinstance(betas, Tensor) or betas.dtype not in _DTYPES.values():
            got = betas.dtype if isinstance(betas, Tensor) else type(betas).__name__
            raise TypeError(
                f"NoiseSchedule: betas must be a float32 or float64 tensor, got {got}; use NoiseSchedule.from_betas"
            )
        if betas.ndim != 1 or betas.numel() == 0 or betas.device.type != "cpu":
            raise ValueError(
                f"NoiseSchedule: betas must be 1-D with T ≥ 1 entries on the CPU, got shape {tuple(betas.shape)} on "
                f"{betas.device}; pass one beta per training step"
            )
        inside = (betas > 0) & (betas < 1)
        inside[-1] |= betas[-1] == 1
        if not bool(inside.all()):
            first = int((~inside).nonzero()[0, 0])
            raise ValueError(
                f"NoiseSchedule: betas must be in (0, 1), or 1 at the last step, got {betas[first].item()} at "
                f"t={first}; check the schedule's parameters"
            )
        eps = torch.finfo(betas.dtype).eps
        if bool(betas[0] < eps):
            raise ValueError(
                f"NoiseSchedule: betas[0] must be at least {eps:.2g} in {betas.dtype}, got {betas[0].item()}; below it "
                "1 − ᾱ_0 rounds to 0: use float64 or a larger beta"
            )

    # ------------------------------------------------------------------ constructors

    @classmethod
    def linear(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
    ) -> NoiseSchedule:
        """Linear betas (Ho et al. 2020, sec. 4); see `fastddpm.process.betas.linear_betas`."""
        return cls.by_name("linear", T, dtype=dtype, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
    ) -> NoiseSchedule:
        """Betas linear in √β (Rombach et al. 2022); see `fastddpm.process.betas.scaled_linear_betas`."""
        return cls.by_name("scaled_linear", T, dtype=dtype, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def cosine(
        cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999, *, dtype: torch.dtype = torch.float64
    ) -> NoiseSchedule:
        """Cosine ᾱ (Nichol & Dhariwal 2021, eq. 17); see `fastddpm.process.betas.cosine_betas`."""
        return cls.by_name("cosine", T, dtype=dtype, s=s, max_beta=max_beta)

    @classmethod
    def sigmoid(
        cls,
        T: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> NoiseSchedule:
        """Sigmoid ᾱ (Jabri et al. 2022, Algorithm 1); see `fastddpm.process.betas.sigmoid_betas`."""
        return cls.by_name("sigmoid", T, dtype=dtype, start=start, end=end, tau=tau, max_beta=max_beta)

    @classmethod
    def logistic(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
    ) -> NoiseSchedule:
        """Logistic betas (Xu et al. 2022; diffusers' "sigmoid"); see `fastddpm.process.betas.logistic_betas`."""
        return cls.by_name("logistic", T, dtype=dtype, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def laplace(cls, T: int = 1000, max_beta: float = 0.999, *, dtype: torch.dtype = torch.float64) -> NoiseSchedule:
        """Laplace log-SNR (Hang et al. 2024); see `fastddpm.process.betas.laplace_betas`."""
        return cls.by_name("laplace", T, dtype=dtype, max_beta=max_beta)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], *, dtype: torch.dtype | None = None) -> NoiseSchedule:
        """Schedule of explicit betas [T].

        Args:
            betas: tensor or sequence of numbers, [T]; copied.
            dtype: float32 or float64; default the tensor's own, float64 for a sequence.

        Raises:
            TypeError: the dtype is neither float32 nor float64.
            ValueError: the betas are out of range; see the class.
        """
        source = betas.detach().cpu() if isinstance(betas, Tensor) else torch.tensor(betas, dtype=torch.float64)
        return cls(source.to(dtype or source.dtype, copy=True))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, betas: Tensor | None = None) -> NoiseSchedule:
        """Schedule of explicit ᾱ [T], which stays as it is given, though products of 1 − β may round to others.

        Args:
            alphas_cumprod: ᾱ_t, [T], float32 or float64, descending, in (0, 1); the last may be 0.
            betas: β_t, [T], where they are known apart; default 1 − ᾱ_t/ᾱ_{t−1} (Nichol & Dhariwal 2021, eq. 19).

        Raises:
            TypeError: the dtype is neither float32 nor float64.
            ValueError: there is not one ᾱ for each β, or the betas are out of range; see the class.
        """
        alpha_bar = alphas_cumprod.detach().to("cpu", copy=True)
        if betas is None:
            betas = 1.0 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        schedule = cls.from_betas(betas)
        if alpha_bar.shape != schedule.betas.shape:
            raise ValueError(
                f"NoiseSchedule.from_alphas_cumprod: alphas_cumprod must be [{schedule.T}], as betas, got "
                f"{list(alpha_bar.shape)}; pass one for each training step"
            )
        vars(schedule)["alphas_cumprod"] = alpha_bar  # where the cached property looks first
        return schedule

    @classmethod
    def by_name(
        cls,
        name: str,
        T: int = 1000,
        *,
        dtype: torch.dtype = torch.float64,
        **given: Unpack[ScheduleOptions],
    ) -> NoiseSchedule:
        """Schedule by its published name; an option left at None takes the schedule's own default.

        Args:
            name: one of `SCHEDULE_NAMES`.
            T: training steps, at least 1.
            dtype: float64 or float32.
            given: the schedule's options. linear, scaled_linear and logistic have `beta_start`, β_0 (default 1e-4), and
                `beta_end`, β_{T−1} (0.02); cosine has the offset `s` (0.008) and, as sigmoid and laplace, `max_beta`,
                the upper limit of β (0.999); sigmoid has its ends `start` (−3) and `end` (3), and the temperature
                `tau` (1).

        Raises:
            TypeError: dtype is neither float32 nor float64, T is not an int, or an option is not a number.
            ValueError: unknown name, an option that the schedule does not have, or a value out of range.
        """
        function, defaults = _lookup(name)
        if dtype not in _DTYPES.values():
            raise TypeError(f"NoiseSchedule.by_name: dtype must be float32 or float64, got {dtype}; use torch.float64")
        told = {
            option: number("NoiseSchedule.by_name", option, value)
            for option, value in given.items()
            if value is not None
        }
        T = whole("NoiseSchedule.by_name", "T", T)
        if foreign := sorted(told.keys() - defaults.keys()):
            raise ValueError(
                f"NoiseSchedule.by_name: options of {name!r} must be among {sorted(defaults)}, got {foreign}; leave "
                "the others out"
            )
        options = {**defaults, **told}
        canonical = _ALIASES.get(name, name)
        recipe = {"name": canonical, "T": T, **options, "dtype": _dtype_name(dtype)}
        return cls(function(T, **options, dtype=dtype), recipe=recipe)

    # ------------------------------------------------------------------ configuration

    def to_config(self) -> dict[str, object]:
        """Plain JSON data that `from_config` turns back into the same betas, bit for bit."""
        if self.recipe is not None:
            return dict(self.recipe)
        return {"name": "betas", "betas": self.betas.tolist(), "dtype": _dtype_name(self.betas.dtype)}

    @classmethod
    def from_config(cls, config: object) -> NoiseSchedule:
        """Schedule from what `to_config` returned.

        Raises:
            TypeError: config is no mapping, or a value has the wrong type.
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        if isinstance(config, Mapping) and config.get("name") == "betas":
            listed = BetaList.from_dict(config)
            schedule, rescaled = cls.from_betas(listed.betas, dtype=_DTYPES[listed.dtype]), listed.zero_terminal_snr
        else:
            options = dict(vars(NamedSchedule.from_dict(config)))
            dtype, rescaled = _DTYPES[options.pop("dtype")], options.pop("zero_terminal_snr")
            schedule = cls.by_name(**options, dtype=dtype)
        return schedule.rescale_zero_terminal_snr() if rescaled else schedule

    # ------------------------------------------------------------------ derived schedules

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule with √ᾱ shifted and scaled so that ᾱ_{T−1} = 0 and ᾱ_0 stays.

        Lin et al. 2024, Algorithm 1.

        Raises:
            ValueError: T is 1: its only ᾱ cannot both stay and vanish.
        """
        if self.T < 2:
            raise ValueError(
                f"rescale_zero_terminal_snr: T must be at least 2, got {self.T}; one step has no terminal SNR to "
                "rescale"
            )
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alpha_bar = root**2
        alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
        recipe = None if self.recipe is None else {**self.recipe, "zero_terminal_snr": True}
        return NoiseSchedule(1.0 - alphas, recipe=recipe)

    def respaced(self, timesteps: Tensor) -> NoiseSchedule:
        """Schedule of the sub-process that visits only some timesteps: β_i = 1 − ᾱ(t_i)/ᾱ(t_{i−1}).

        Nichol & Dhariwal 2021, sec. 4 (eq. 19). Step i of the result is step `timesteps[i]` of this schedule.

        Args:
            timesteps: int64 [S], strictly ascending, in 0 … T−1.

        Raises:
            ValueError: timesteps are not of that form.
        """
        steps = timesteps.tolist()
        ascending = all(a < b for a, b in zip(steps, steps[1:], strict=False))
        if timesteps.ndim != 1 or not steps or not ascending or steps[0] < 0 or steps[-1] >= self.T:
            raise ValueError(
                f"NoiseSchedule.respaced: timesteps must be strictly ascending in 0 … {self.T - 1}, got {steps[:8]}…; "
                "flip a list in sampling order"
            )
        kept = self.alphas_cumprod[timesteps]
        previous = torch.cat([kept.new_ones(1), kept[:-1]])
        return NoiseSchedule(1.0 - kept / previous)


def _lookup(name: str) -> tuple[Callable[..., Tensor], dict[str, float]]:
    """The function of a schedule, and its options with their defaults."""
    canonical = _ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or canonical not in _SCHEDULES:
        raise ValueError(
            f"NoiseSchedule.by_name: name must be one of {', '.join(SCHEDULE_NAMES)}, got {name!r}; "
            "pass other schedules as betas"
        )
    function = _SCHEDULES[canonical]
    parameters = inspect.signature(function).parameters.values()
    return function, {option.name: option.default for option in parameters if option.name not in ("T", "dtype")}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
