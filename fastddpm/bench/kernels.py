"""The cases of the kernels: `p_sample`, `q_sample` and `add_group_norm`, each with what it replaces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.bench.cases import LOW_TOLERANCE, OTHERS_TOLERANCE, Case, Contender, compiled
from fastddpm.bench.twins import import_diffusers
from fastddpm.kernels import Draw, Operands, normals_reference, p_sample, q_sample
from fastddpm.kernels.group_norm import Norm, Terms, add_group_norm
from fastddpm.process.ddpm import ddpm_table
from fastddpm.process.schedule import NoiseSchedule

T = 1000
STEP = 500
"""Halfway: clipping, both means and the noise all take part."""
BUFFERS = {"cpu": 2, "cuda": 4}
PICTURES = {"cpu": ((64, 3, 32, 32), (4, 3, 256, 256)), "cuda": ((512, 3, 32, 32), (64, 3, 256, 256))}
HIDDEN = {"cpu": ((8, 128, 32, 32),), "cuda": ((512, 128, 32, 32), (512, 256, 16, 16), (512, 512, 8, 8))}
DRY = {"pictures": ((2, 3, 8, 8),), "hidden": ((2, 8, 4, 4),)}
GROUPS = 32
EPS = 1e-6
_COEFFICIENTS = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1",
                 "posterior_mean_coef2", "posterior_log_variance_clipped")  # fmt: skip
_RANDN = "diffusers.schedulers.scheduling_ddpm.randn_tensor"


def makers(device: str, dry: bool = False) -> dict[str, Callable[[], Case]]:
    """What makes the cases of a kind of device, by their ids; on a CPU without `torch.compile`, which takes long there.

    Args:
        device: "cpu" or "cuda".
        dry: tiny ones, compiled ones only traced: for tests.
    """
    pictures = DRY["pictures"] if dry else PICTURES[device]
    hidden = DRY["hidden"] if dry else HIDDEN[device]
    noises = {"noise given": True, "noise made": False}
    found: dict[str, Callable[[], Case]] = {}
    for shape in pictures:
        size = "x".join(map(str, shape))
        for noise, given in noises.items():
            found[f"p_sample, {noise}, {size}"] = functools.partial(update_case, shape, given, device, dry)
            for kind, uint8 in {"floats": False, "bytes": True}.items():
                case = functools.partial(noising_case, shape, given, uint8, device, dry)
                found[f"q_sample, {kind}, {noise}, {size}"] = case
    for shape in hidden:
        size = "x".join(map(str, shape))
        for kind, adds in {"alone": False, "bias and residual": True}.items():
            found[f"add_group_norm, {kind}, {size}"] = functools.partial(norm_case, shape, adds, device, dry)
    return found


def _compiles(device: str, dry: bool) -> bool:
    return dry or device == "cuda"


def _diffusers() -> tuple[ModuleType | None, tuple[str, ...]]:
    """The library or None, and why it is not there."""
    try:
        return import_diffusers(), ()
    except ImportError as error:
        return None, (f"diffusers {error}",)


def _randn(
    shape: tuple[int, ...], device: str, count: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def _low(device: str) -> torch.dtype:
    """What a network's tensors are on a kind of device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


# ------------------------------------------------------------------ the update

Step = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def textbook_step(x: Tensor, out: Tensor, t: Tensor, z: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    """One ancestral step (Ho et al. 2020, eq. 7, 11 and 15, Algorithm 2), as everybody writes it.

    Args:
        x: float32 [B, C, H, W], x_t.
        out: like x, ε̂.
        t: int64 [B].
        z: like x, standard normal.
        coefficients: five of float32 [T]: √(1/ᾱ), √(1/ᾱ − 1), those of the posterior mean, the log of its variance.

    Returns:
        x_{t−1}.
    """
    recip, recipm1, coef1, coef2, log_variance = (array[t][:, None, None, None] for array in coefficients)
    x_start = (recip * x - recipm1 * out).clamp(-1, 1)
    return coef1 * x_start + coef2 * x + (0.5 * log_variance).exp() * z


class _Update:
    """The tensors of an update, and the ways to make it from buffer i; the textbook's can be compiled."""

    def __init__(self, shape: tuple[int, ...], noise_given: bool, device: str) -> None:
        count, B = BUFFERS[device], shape[0]
        self.shape, self.given = shape, noise_given
        self.starts, self.zs = _randn(shape, device, count, 0), _randn(shape, device, count, 1)
        self.outs = _randn(shape, device, count, 2, _low(device))
        self.states = [start.clone() for start in self.starts]
        schedule = NoiseSchedule.linear(T, dtype=torch.float32)
        self.table = ddpm_table(schedule, torch.arange(T - 1, -1, -1)).to(device)
        self.step, self.end, self.t = (torch.full((B,), value, device=device) for value in (STEP, T, T - 1 - STEP))
        self.ids, self.seed = torch.arange(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)
        self.coefficients = tuple(getattr(schedule, name).to(device) for name in _COEFFICIENTS)

    def reset(self) -> None:
        for state, start in zip(self.states, self.starts, strict=True):
            state.copy_(start)

    def ours(self, i: int) -> Tensor:
        noise = self.zs[i][None] if self.given else None
        rows, timesteps = self.table.rows, self.table.timesteps
        samples = (self.step, self.end, self.ids, self.seed)
        p_sample(Operands(self.states[i], self.outs[i], rows, timesteps, *samples, noise=noise))
        return self.states[i]

    def noise(self, i: int) -> Tensor:
        """What ours adds."""
        if self.given:
            return self.zs[i]
        return normals_reference(self.seed, self.ids, self.t, self.starts[i][0].numel()).reshape(self.shape)

    def comparable(self, i: int) -> Tensor:
        return textbook_step(self.starts[i], self.outs[i], self.t, self.noise(i), self.coefficients)

    def with_noise_of_its_own(self, x: Tensor, out: Tensor) -> Tensor:
        return textbook_step(x, out, self.t, torch.randn_like(x), self.coefficients)

    def textbook(
        self, i: int, step: Step = textbook_step, drawing: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        x, out = self.starts[i], self.outs[i]
        if self.given:
            return step(x, out, self.t, self.zs[i], self.coefficients)
        return (drawing or self.with_noise_of_its_own)(x, out)


def update_case(shape: tuple[int, ...], noise_given: bool, device: str, dry: bool = False) -> Case:
    """The update with its noise, from the network's output on: that of bfloat16 on GPUs, of float32 on CPUs."""
    update = _Update(shape, noise_given, device)
    contenders = [Contender("p_sample", update.ours), Contender("textbook", update.textbook, update.comparable)]
    if _compiles(device, dry):
        step, drawing = compiled(textbook_step, dry), compiled(update.with_noise_of_its_own, dry)
        fast = functools.partial(update.textbook, step=step, drawing=drawing)
        contenders.append(Contender("textbook, torch.compile", fast, None if noise_given else update.comparable))
    library, missing = _diffusers()
    if library is not None:
        scheduler = library.DDPMScheduler()
        scheduler.set_timesteps(T)

        def theirs(i: int) -> Tensor:
            return scheduler.step(update.outs[i], T - 1 - STEP, update.starts[i]).prev_sample  # type: ignore[no-any-return]

        def theirs_compared(i: int) -> Tensor:
            with patch(_RANDN, lambda *_, **__: update.noise(i)):
                return theirs(i)

        contenders.append(Contender("DDPMScheduler.step", theirs, theirs_compared, OTHERS_TOLERANCE, captured=False))
    moved = 2 * update.starts[0].nbytes + update.outs[0].nbytes + (update.zs[0].nbytes if noise_given else 0)
    name = f"p_sample, noise {'given' if noise_given else 'made'}"
    return Case(name, shape, tuple(contenders), moved, BUFFERS[device], update.reset, missing)


# ------------------------------------------------------------------ the forward noising

Noising = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def textbook_noising(x: Tensor, t: Tensor, eps: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
    """x_t (Ho et al. 2020, eq. 4) of float32 pictures, or of bytes [B, C, H, W]; signal and spread are float32 [T]."""
    x = x.float() / 127.5 - 1.0 if x.dtype == torch.uint8 else x
    return signal[t][:, None, None, None] * x + spread[t][:, None, None, None] * eps


def noising_case(shape: tuple[int, ...], noise_given: bool, uint8: bool, device: str, dry: bool = False) -> Case:
    """`q_sample` of a training batch; what makes its noise hands it out too."""
    count, B = BUFFERS[device], shape[0]
    epses = _randn(shape, device, count, 0)
    xs = [((x + 4) * 30).clamp(0, 255).to(torch.uint8) if uint8 else x for x in _randn(shape, device, count, 1)]
    schedule = NoiseSchedule.linear(T, dtype=torch.float32)
    signal, spread = levels = schedule.levels(device)
    ids, seed = torch.arange(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    t = torch.arange(B, device=device) * 37 % T

    def ours(i: int) -> Tensor:
        if noise_given:
            return q_sample(xs[i], t, levels, epses[i])[0]
        return q_sample(xs[i], t, levels, Draw(seed, ids))[0]

    def drawn(x: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn(x.shape, device=x.device)
        return textbook_noising(x, t, eps, signal, spread), eps

    def textbook(
        i: int, function: Callable[[Tensor], tuple[Tensor, Tensor]] = drawn, of_noise: Noising = textbook_noising
    ) -> Tensor:
        if noise_given:
            return of_noise(xs[i], t, epses[i], signal, spread)
        return function(xs[i])[0]

    def comparable(i: int) -> Tensor:
        eps = epses[i] if noise_given else normals_reference(seed, ids, t, xs[i][0].numel()).reshape(shape)
        return textbook_noising(xs[i], t, eps, signal, spread)

    contenders = [Contender("q_sample", ours), Contender("textbook", textbook, comparable)]
    if _compiles(device, dry):
        fast = functools.partial(textbook, function=compiled(drawn, dry), of_noise=compiled(textbook_noising, dry))
        contenders.append(Contender("textbook, torch.compile", fast, None if noise_given else comparable))
    library, missing = _diffusers() if noise_given and not uint8 else (None, ())
    if library is not None:
        scheduler = library.DDPMScheduler()
        contenders.append(
            Contender(
                "DDPMScheduler.add_noise", lambda i: scheduler.add_noise(xs[i], epses[i], t),
                tolerance=OTHERS_TOLERANCE, captured=False,
            )
        )  # fmt: skip
    moved = xs[0].nbytes + 2 * epses[0].nbytes
    name = f"q_sample, {'bytes' if uint8 else 'floats'}, noise {'given' if noise_given else 'made'}"
    return Case(name, shape, tuple(contenders), moved, count, missing=missing)


# ------------------------------------------------------------------ the group norm


def norm_case(shape: tuple[int, ...], adds: bool, device: str, dry: bool = False) -> Case:
    """Group norm and SiLU of channels-last pictures, with a bias and a residual branch added before where `adds`."""
    count, C = BUFFERS[device], shape[1]
    low, groups = _low(device), min(GROUPS, C // 2)
    xs, residuals = (
        [x.contiguous(memory_format=torch.channels_last) for x in _randn(shape, device, count, seed, low)]
        for seed in (0, 1)
    )
    weight, beta, bias = _randn((C,), device, 3, 2, low)
    norm = Norm(weight, beta, groups, EPS)

    def ours(i: int) -> Tensor:
        return add_group_norm(xs[i], norm, Terms(bias, residuals[i]) if adds else Terms())[1]

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + bias[:, None, None] + residual if adds else x
        return total, F.silu(F.group_norm(total, groups, weight, beta, EPS))

    def theirs(i: int, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = plain) -> Tensor:
        return function(xs[i], residuals[i])[1]

    tolerance = LOW_TOLERANCE if low == torch.bfloat16 else 1e-5
    contenders = [Contender("add_group_norm", ours, tolerance=tolerance), Contender("group_norm, silu", theirs)]
    if _compiles(device, dry):
        fast = functools.partial(theirs, function=compiled(plain, dry))
        contenders.append(Contender("group_norm, silu, torch.compile", fast, tolerance=tolerance))
    name = "add_group_norm, bias and residual" if adds else "add_group_norm, alone"
    return Case(name, shape, tuple(contenders), xs[0].nbytes * (4 if adds else 2), count)
