"""The bound on the likelihood as OpenAI's `calc_bpd_loop` goes about it, by the textbook and in float64: an oracle."""

import math

import torch

from fastddpm.process.likelihood import prior_bits, vlb_terms
from fastddpm.process.reference import p_mean_variance
from fastddpm.sampler import Sampler

F64 = torch.float64


@torch.no_grad()
def bound_by_the_textbook(
    sampler: Sampler, images: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The bound over some timesteps (descending) for images uint8 [N, C, H, W] and noise [S, N, C, H, W]."""
    spec, S = sampler.spec, len(timesteps)
    spaced = sampler.schedule.respaced(timesteps.flip(0))
    x_start = images.to(F64) / 127.5 - 1
    how = {"prediction": spec.prediction, "variance": spec.variance, "clip": spec.clip}
    columns = {"vlb": [], "x_start_mse": [], "eps_mse": []}
    for i, step in enumerate(timesteps.tolist()):
        t, fed = (torch.full((len(images),), value) for value in (S - 1 - i, step))
        eps = noise[i].to(F64)
        x_t = spaced.q_sample(x_start, t, eps)
        out = sampler.network(x_t.float(), spec.times_fed(fed), y).to(F64)
        p = p_mean_variance(spaced, out, x_t, t, **how)
        # Far from the mean, Φ's differences vanish in float32 and meet the floor of 1e-12, there as here.
        wide = F64 if i < S - 1 else torch.float32
        as_wide = p_mean_variance(spaced, out.to(wide), x_t.to(wide), t, **how)
        columns["vlb"].append(vlb_terms(spaced, x_start.to(wide), x_t.to(wide), t, as_wide).to(F64))
        columns["x_start_mse"].append((p.x_start - x_start).square().flatten(1).mean(1))
        again = spaced.predict_eps_from_x_start(x_t, t, p.x_start)
        columns["eps_mse"].append((again - eps).square().flatten(1).mean(1))
    found = {name: torch.stack(column, 1) for name, column in columns.items()}
    found["prior_bpd"] = prior_bits(sampler.schedule, x_start, int(timesteps[0]))
    return found | {"total_bpd": found["vlb"].sum(1) + found["prior_bpd"]}


def discretised_normal_bits(x: torch.Tensor, mean: float, scale: float) -> torch.Tensor:
    """−log₂ of the mass that a normal puts on x's bin of 256, exactly, per element."""
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=F64), scale)
    return -(normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)).log() / math.log(2)
