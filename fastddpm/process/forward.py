"""ForwardProcess: the arrays and the equations that follow from the betas of a noise schedule.

Symbols as in Ho et al. 2020, with t counted from 0: q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t I),
α_t = 1 − β_t, ᾱ_t = α_0 ⋯ α_t. `fastddpm.process.schedule.NoiseSchedule` adds construction and validation.
"""

from functools import cached_property

import torch
from torch import Tensor

from fastddpm.kernels.q_sample import Levels


class ForwardProcess:
    """What follows from betas [T]: Ho et al.'s arrays, and their use on batches [B, …] with timesteps t [B].

    The arrays are computed once, on first use, in the dtype of the betas; treat them as read-only.
    """

    betas: Tensor

    # ------------------------------------------------------------------ arrays [T], in Ho et al.'s names

    @property
    def T(self) -> int:
        """Number of training steps."""
        return self.betas.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float64 or float32."""
        return self.betas.dtype

    @cached_property
    def alphas(self) -> Tensor:
        """α_t = 1 − β_t (Ho et al. 2020, below eq. 3)."""
        return 1.0 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t = α_0 ⋯ α_t (Ho et al. 2020, eq. 4)."""
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def alphas_cumprod_exact(self) -> Tensor:
        """ᾱ_t in float64: what solvers compute with. More digits than `alphas_cumprod` only where that is rounded."""
        return self.alphas_cumprod.double()

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """ᾱ_{t−1}, with ᾱ_{−1} = 1 (Ho et al. 2020, eq. 7)."""
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @cached_property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """√ᾱ_t, the signal's factor in eq. 4 of Ho et al. 2020."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """√(1 − ᾱ_t), the noise's factor in eq. 4 of Ho et al. 2020."""
        return (1.0 - self.alphas_cumprod).sqrt()

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Tensor:
        """√(1/ᾱ_t) (Ho et al. 2020, eq. 15); infinite where ᾱ_t = 0."""
        return (1.0 / self.alphas_cumprod).sqrt()

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Tensor:
        """√(1/ᾱ_t − 1) (Ho et al. 2020, eq. 15); infinite where ᾱ_t = 0."""
        return (1.0 / self.alphas_cumprod - 1.0).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) · β_t (Ho et al. 2020, eq. 7); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Log of β̃_t with β̃_0 = 0 replaced by β̃_1 (Nichol & Dhariwal 2021, sec. 3.1); by β_0 where T is 1."""
        variance = self.posterior_variance
        first = variance[1:2] if self.T > 1 else self.betas
        return torch.cat([first, variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Factor of x_0 in the posterior mean: √ᾱ_{t−1} β_t/(1 − ᾱ_t) (Ho et al. 2020, eq. 7)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Factor of x_t in the posterior mean: √α_t (1 − ᾱ_{t−1})/(1 − ᾱ_t) (Ho et al. 2020, eq. 7)."""
        return (1.0 - self.alphas_cumprod_prev) * self.alphas.sqrt() / (1.0 - self.alphas_cumprod)

    @cached_property
    def log_snr(self) -> Tensor:
        """ln(ᾱ_t/(1 − ᾱ_t)) (Kingma et al. 2021, sec. 3.1); −∞ where ᾱ_t = 0."""
        return self.alphas_cumprod.log() - (1.0 - self.alphas_cumprod).log()

    # ------------------------------------------------------------------ on tensors

    def at(self, array: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Look up array[t] and shape it [B, 1, …, 1] to broadcast against `like`.

        Args:
            array: [T], one of the schedule's arrays.
            t: int64 [B], in 0 … T−1 (checked where it costs no device synchronisation).
            like: [B, …]; gives device and dtype (at least float32).

        Raises:
            TypeError: t is not int64.
            ValueError: t is not [B] or out of range.
        """
        if t.dtype != torch.int64:
            raise TypeError(f"NoiseSchedule: t must be int64, got {t.dtype}; convert it with t.long()")
        if t.ndim != 1 or like.ndim < 1 or t.shape[0] != like.shape[0]:
            raise ValueError(
                f"NoiseSchedule: t must be [B] for a batch [B, …], got {tuple(t.shape)} for "
                f"{tuple(like.shape)}; "
                "pass one timestep per sample"
            )
        if t.device.type == "cpu" and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.T:
            raise ValueError(
                f"NoiseSchedule: t must be in 0 … {self.T - 1}, got {int(t.min())} … {int(t.max())}; t counts from 0"
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        return array.to(like.device)[t.to(like.device)].to(dtype).reshape(-1, *[1] * (like.ndim - 1))

    def q_step(self, x_prev: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, …] and variance [B, 1, …] of q(x_t | x_{t−1}) (Ho et al. 2020, eq. 2)."""
        return self.at(self.alphas.sqrt(), t, x_prev) * x_prev, self.at(self.betas, t, x_prev)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, …] and variance [B, 1, …] of q(x_t | x_0) (Ho et al. 2020, eq. 4)."""
        mean = self.at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return mean, self.at(1.0 - self.alphas_cumprod, t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise x_0 to x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4); all [B, …]."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return self.at(signal, t, x_start) * x_start + self.at(noise, t, x_start) * eps

    def levels(self, device: torch.device | str = "cpu") -> Levels:
        """√ᾱ and √(1 − ᾱ), float32 [T] on a device, as `fastddpm.kernels.q_sample` takes them."""
        exact = (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        return Levels(*(values.to(device, torch.float32) for values in exact))

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, …], variance and clipped log-variance [B, 1, …] of q(x_{t−1} | x_t, x_0).

        Ho et al. 2020, eq. 6–7; the clipped log as in `posterior_log_variance_clipped`.
        """
        mean = self.at(self.posterior_mean_coef1, t, x_t) * x_start + self.at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = self.at(self.posterior_variance, t, x_t)
        return mean, variance, self.at(self.posterior_log_variance_clipped, t, x_t)

    def predict_x_start_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = √(1/ᾱ_t) x_t − √(1/ᾱ_t − 1) ε (Ho et al. 2020, eq. 15); not defined where ᾱ_t = 0."""
        recip, recipm1 = self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        return self.at(recip, t, x_t) * x_t - self.at(recipm1, t, x_t) * eps

    def predict_eps_from_x_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0)/√(1 − ᾱ_t): eq. 4 of Ho et al. 2020 solved for ε; all [B, …]."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return (x_t - self.at(signal, t, x_t) * x_start) / self.at(noise, t, x_t)

    def v_from(self, x_start: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Velocity v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, sec. 4); all [B, …]."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return self.at(signal, t, x_start) * eps - self.at(noise, t, x_start) * x_start

    def predict_x_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = √ᾱ_t x_t − √(1 − ᾱ_t) v (Salimans & Ho 2022, appendix D); all [B, …]."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return self.at(signal, t, x_t) * x_t - self.at(noise, t, x_t) * v

    def predict_eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """ε = √(1 − ᾱ_t) x_t + √ᾱ_t v (Salimans & Ho 2022, appendix D); all [B, …]."""
        signal, noise = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return self.at(noise, t, x_t) * x_t + self.at(signal, t, x_t) * v
