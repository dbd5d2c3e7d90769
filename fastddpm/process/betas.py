"""Noise variances β_0 … β_{T−1}: one function per published schedule.

Schedules that the papers give as β are evaluated in `dtype` itself; schedules that they give as a function
ᾱ(u), u in [0, 1], are evaluated in float64 and rounded to `dtype` at the end. Peers that work in float32 do
the same, so their tables come out bit for bit.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Far above any training: a mistyped configuration should not fill the memory.
_MOST_STEPS = 1_000_000


def _check_steps(function: str, T: int) -> None:
    if isinstance(T, bool) or not isinstance(T, int):
        raise TypeError(f"{function}: T must be an int, got {type(T).__name__}; pass the number of training steps")
    if not 1 <= T <= _MOST_STEPS:
        raise ValueError(f"{function}: T must be in 1 … {_MOST_STEPS}, got {T}; pass the number of training steps")


def _check_ends(function: str, beta_start: float, beta_end: float) -> None:
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{function}: {name} must be in (0, 1), got {value}; the usual range is 1e-4 to 0.02")


def _check_max_beta(function: str, max_beta: float) -> None:
    if not 0.0 < max_beta < 1.0:
        raise ValueError(f"{function}: max_beta must be in (0, 1), got {max_beta}; the usual value is 0.999")


def betas_from_alpha_bar(
    T: int,
    alpha_bar: Callable[[float], float],
    *,
    max_beta: float = 0.999,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Turn a continuous ᾱ(u) into betas: β_i = min(1 − ᾱ((i+1)/T) / ᾱ(i/T), max_beta).

    Nichol & Dhariwal 2021, eq. 17 and the clipping described below it.

    Args:
        T: training steps, 1 … 1,000,000.
        alpha_bar: decreasing function of u in [0, 1] with values in [0, 1]; positive for u < 1.
        max_beta: upper limit of every β, in (0, 1).
        dtype: dtype of the result; the arithmetic is float64.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: T or max_beta is out of range.
    """
    _check_steps("betas_from_alpha_bar", T)
    _check_max_beta("betas_from_alpha_bar", max_beta)
    edges = [alpha_bar(i / T) for i in range(T + 1)]
    return torch.tensor([min(1.0 - b / a, max_beta) for a, b in zip(edges, edges[1:], strict=False)], dtype=dtype)


def linear_betas(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Betas that grow linearly from beta_start to beta_end (Ho et al. 2020, sec. 4).

    Args:
        T: training steps, 1 … 1,000,000.
        beta_start: β_0, in (0, 1).
        beta_end: β_{T−1}, in (0, 1).
        dtype: dtype of the arithmetic and of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """
    _check_steps("linear_betas", T)
    _check_ends("linear_betas", beta_start, beta_end)
    return torch.linspace(beta_start, beta_end, T, dtype=dtype)


def scaled_linear_betas(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Betas whose square roots grow linearly (Rombach et al. 2022, latent diffusion).

    Args:
        T: training steps, 1 … 1,000,000.
        beta_start: β_0, in (0, 1).
        beta_end: β_{T−1}, in (0, 1).
        dtype: dtype of the arithmetic and of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """
    _check_steps("scaled_linear_betas", T)
    _check_ends("scaled_linear_betas", beta_start, beta_end)
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=dtype) ** 2


def cosine_betas(T: int, s: float = 0.008, max_beta: float = 0.999, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Cosine schedule: ᾱ(u) = cos²((u + s)/(1 + s) · π/2) (Nichol & Dhariwal 2021, eq. 17).

    Args:
        T: training steps, 1 … 1,000,000.
        s: offset that keeps β_0 from vanishing, at least 0.
        max_beta: upper limit of every β, in (0, 1).
        dtype: dtype of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """
    if not 0.0 <= s < math.inf:
        raise ValueError(f"cosine_betas: s must be at least 0 and finite, got {s}; the usual value is 0.008")
    return betas_from_alpha_bar(
        T, lambda u: math.cos((u + s) / (1.0 + s) * math.pi / 2.0) ** 2, max_beta=max_beta, dtype=dtype
    )


def sigmoid_betas(
    T: int,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sigmoid schedule of ᾱ (Jabri et al. 2022, "Scalable adaptive computation", Algorithm 1).

    ᾱ(u) = (σ(end/τ) − σ((u (end − start) + start)/τ)) / (σ(end/τ) − σ(start/τ)).

    σ(start/τ) and σ(end/τ) are rounded to float32: the implementation with which such checkpoints are trained
    does so, and near u = 1, where ᾱ is a small difference, this shows in the fourth digit.

    Args:
        T: training steps, 1 … 1,000,000.
        start: left end of the piece of the sigmoid that is used.
        end: right end, above start.
        tau: temperature, above 0.
        max_beta: upper limit of every β, in (0, 1).
        dtype: dtype of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """
    _check_steps("sigmoid_betas", T)
    _check_max_beta("sigmoid_betas", max_beta)
    if not start < end:
        raise ValueError(f"sigmoid_betas: start must be below end, got start={start}, end={end}; the usual are -3, 3")
    if not tau > 0.0:
        raise ValueError(f"sigmoid_betas: tau must be above 0, got {tau}; the usual value is 1")
    u = torch.linspace(0, T, T + 1, dtype=torch.float64) / T
    v_start, v_end = torch.tensor([start / tau, end / tau], dtype=torch.float32).sigmoid().double()
    alpha_bar = (v_end - ((u * (end - start) + start) / tau).sigmoid()) / (v_end - v_start)
    alpha_bar = alpha_bar / alpha_bar[0]
    betas: Tensor = 1.0 - alpha_bar[1:] / alpha_bar[:-1]
    return betas.clamp(max=max_beta).to(dtype)


def logistic_betas(
    T: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Betas on a logistic curve: β_i = beta_start + (beta_end − beta_start) · σ(−6 + 12 i/(T−1)).

    Xu et al. 2022 (GeoDiff). diffusers calls it "sigmoid"; the sigmoid schedule of ᾱ is `sigmoid_betas`.

    Args:
        T: training steps, 1 … 1,000,000.
        beta_start: lower asymptote, in (0, 1).
        beta_end: upper asymptote, in (0, 1).
        dtype: dtype of the arithmetic and of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """
    _check_steps("logistic_betas", T)
    _check_ends("logistic_betas", beta_start, beta_end)
    return torch.sigmoid(torch.linspace(-6, 6, T, dtype=dtype)) * (beta_end - beta_start) + beta_start


def laplace_betas(T: int, max_beta: float = 0.999, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Laplace schedule of the log-SNR (Hang et al. 2024), with the constants of diffusers.

    λ(u) = −½ sgn(½ − u) ln(1 − 2|½ − u| + 1e-6) and ᾱ(u) = √(e^λ / (1 + e^λ)). The paper has no square root;
    diffusers, whose name and checkpoints this serves, does.

    Args:
        T: training steps, 1 … 1,000,000.
        max_beta: upper limit of every β, in (0, 1).
        dtype: dtype of the result.

    Returns:
        Betas [T] on the CPU.

    Raises:
        TypeError: T is not an int.
        ValueError: an argument is out of range.
    """

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1.0 + snr))

    return betas_from_alpha_bar(T, alpha_bar, max_beta=max_beta, dtype=dtype)
