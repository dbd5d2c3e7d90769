"""The bound on the likelihood against OpenAI's loop, on the same network: equality first, then paired times.

    python -m benchmarks.likelihood mnist --batch 16 --rows 20
    python -m benchmarks.likelihood cifar --batch 16 --rows 5

The peer is `GaussianDiffusion.calc_bpd_loop` of openai/guided-diffusion, written anew: float64 tables that every use
takes to a tensor, one eager call of the network a timestep. "cifar" is Ho et al.'s CIFAR-10 U-Net with random weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.engines.choose import EngineName
from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.likelihood import discretized_gaussian_log_likelihood
from fastddpm.process.timesteps import respace

Model = Callable[..., Tensor]


class OpenAILoop:
    """`calc_bpd_loop` over a respaced process, for ε-prediction and a fixed small variance."""

    def __init__(self, alphas_cumprod: NDArray[np.float64], timesteps: list[int]) -> None:
        """Make the tables of the process that visits some timesteps, ascending."""
        kept = alphas_cumprod[timesteps]
        before = np.append(1.0, kept[:-1])
        betas = 1 - kept / before
        self.timesteps, self.alphas_cumprod = torch.tensor(timesteps), kept
        variance = betas * (1 - before) / (1 - kept)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.coef1 = betas * np.sqrt(before) / (1 - kept)
        self.coef2 = (1 - before) * np.sqrt(1 - betas) / (1 - kept)

    def terms(self, model: Model, x_start: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        """Vb, mean squares of x_0 and of ε for each timestep, descending: [3, N, S]."""
        found = []
        for i in range(len(self.timesteps) - 1, -1, -1):
            t = torch.full((len(x_start),), i)
            eps = torch.randn_like(x_start) if noise.numel() == 0 else noise[len(self.timesteps) - 1 - i]
            x_t = _at(np.sqrt(self.alphas_cumprod), t, x_start) * x_start
            x_t = x_t + _at(np.sqrt(1 - self.alphas_cumprod), t, x_start) * eps
            with torch.no_grad():
                out = model(x_t, self.timesteps[t], *(() if y is None else (y,)))
            recip = _at(np.sqrt(1 / self.alphas_cumprod), t, x_start)
            recipm1 = _at(np.sqrt(1 / self.alphas_cumprod - 1), t, x_start)
            estimate = (recip * x_t - recipm1 * out).clamp(-1, 1)
            vb = self._vb(x_start, x_t, estimate, t)
            again = (recip * x_t - estimate) / recipm1
            found.append(torch.stack((vb, _mean((estimate - x_start) ** 2), _mean((again - eps) ** 2))))
        return torch.stack(found, 2)

    def _vb(self, x_start: Tensor, x_t: Tensor, estimate: Tensor, t: Tensor) -> Tensor:
        log_variance = _at(self.log_variance, t, x_start)
        true = _at(self.coef1, t, x_start) * x_start + _at(self.coef2, t, x_start) * x_t
        mean = _at(self.coef1, t, x_start) * estimate + _at(self.coef2, t, x_start) * x_t
        ratio = torch.exp(log_variance - log_variance)
        kl = 0.5 * (-1.0 + log_variance - log_variance + ratio + (true - mean) ** 2 * torch.exp(-log_variance))
        nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2.0)


def _at(table: NDArray[np.float64], t: Tensor, like: Tensor) -> Tensor:
    values = torch.from_numpy(table).to(t.device)[t].float()
    return values[:, None, None, None].expand(like.shape)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def make_sampler(name: str, engine: EngineName) -> Sampler:
    """The network that is measured."""
    if name != "cifar":
        return Sampler.from_pretrained(name, device="cpu", engine=engine)
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=(32, 32), in_channels=3, out_channels=3, channels=(128, 256, 256, 256), layers=2,
        attention=(False, True, False, False), norm_groups=32,
    )  # fmt: skip
    network = UNet(config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return Sampler(network, NoiseSchedule.linear(1000), ModelSpec(shape=(3, 32, 32)), device="cpu", engine=engine)


def main() -> None:
    """Compare, then time both, one after the other in each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    ours = make_sampler(asked.model, "compiled")
    model = make_sampler(asked.model, "eager").model
    labels = None if ours.spec.num_classes is None else torch.arange(asked.batch) % ours.spec.num_classes
    images = torch.randint(0, 256, (asked.batch, *ours.spec.shape), dtype=torch.uint8)
    timesteps = respace(ours.schedule.T, asked.rows)
    noise = torch.randn(len(timesteps), *images.shape)
    loop = OpenAILoop(ours.schedule.alphas_cumprod.numpy(), timesteps.flip(0).tolist())
    x_start = images.float() / 127.5 - 1

    def peer(noise: Tensor) -> Tensor:
        return loop.terms(model, x_start, noise, labels)

    def measured(noise: Tensor | None) -> Tensor:
        found = ours.likelihood(images, timesteps=timesteps, noise=noise, class_labels=labels, batch_size=asked.batch,
                                progress=False)  # fmt: skip
        return torch.stack((found.vlb, found.x_start_mse, found.eps_mse))

    expected, got = peer(noise)[0].sum(1), measured(noise)[0].sum(1)
    off = float(((got - expected) / expected).abs().max())
    if off > 1e-4:
        raise SystemExit(f"the bounds must be equal, got a relative difference of {off:.2g}")
    print(f"largest relative difference of the bound: {off:.2g}; engine: {ours.engine.used}")
    measured(None)
    ratios = []
    for _ in range(asked.rounds):
        times = []
        for is_ours in (False, True):
            began = time.perf_counter()
            if is_ours:
                measured(None)
            else:
                peer(torch.empty(0))
            times.append((time.perf_counter() - began) / asked.rows * 1e3)
        ratios.append(times[0] / times[1])
        print(f"OpenAI's loop {times[0]:.1f} ms a row, ours {times[1]:.1f}: {ratios[-1]:.2f} x", flush=True)
    print(f"median of {asked.rounds}: {statistics.median(ratios):.2f} x, on {asked.threads} threads")


if __name__ == "__main__":
    main()
