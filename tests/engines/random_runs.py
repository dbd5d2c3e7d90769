"""Random valid runs, what the textbook makes of them, and how far float32 may be from it."""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st

from fastddpm.process import reference
from fastddpm.process.noise import id_bits, initial_noise, normals, seed_bits
from fastddpm.process.table import DynamicThreshold
from fastddpm.sampler import Sampler

SAFETY = 8.0
ROUNDING = 2.0**-21
"""Relative error of a network's float32 output that is taken for rounding: some units in the last place."""
STATE_ROUNDING = 2.0**-24
"""Relative error of each element of a step's state, which is float32: half a unit in the last place."""
DISTURBED = 2
"""Runs with such errors, at random."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `Sampler.sample`."""

    options: dict[str, Any]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    seed: int
    guidance: float

    def asked(self, order: list[int] | None = None) -> dict[str, Any]:
        """The keyword arguments, for some of the samples."""
        order = list(range(len(self.ids))) if order is None else order
        return {
            **self.options,
            "seed": self.seed,
            "sample_ids": [self.ids[i] for i in order],
            "class_labels": [self.labels[i] for i in order],
            "guidance_scale": self.guidance,
            "output": "raw",
        }


@st.composite
def runs(draw, T: int, n: int | None = None, guided: bool = True) -> Run:
    """A valid run of a network with three classes and T training steps."""
    solver = draw(st.sampled_from(["ddpm", "ddim", "dpmpp_2m"]))
    options: dict[str, Any] = {"solver": solver}
    if draw(st.booleans()):
        options["steps"] = draw(st.integers(1, 12) | st.just(T))
    else:
        chosen = draw(st.sets(st.integers(0, T - 1), min_size=1, max_size=9))
        options["timesteps"] = sorted(chosen, reverse=True)
    clips: list[Any] = [None, 1.0, 0.5]
    if solver == "ddpm":
        options["variance"] = draw(st.sampled_from(["fixed_small", "fixed_large"]))
        clips.append(DynamicThreshold(draw(st.sampled_from([0.9, 0.995])), 2.0))
    if solver == "ddim":
        options["eta"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
        options["clipped_eps"] = draw(st.sampled_from(["rederive", "raw"]))
    options["clip"] = draw(st.sampled_from(clips))
    n = n or draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=n, max_size=n, unique=True))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    guidance = draw(st.sampled_from([1.0, 0.0, 2.5])) if guided else 1.0
    return Run(options, tuple(ids), tuple(labels), draw(st.integers(0, 2**64 - 1)), guidance)


def textbook(sampler: Sampler, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The run by the plain loops in float64, and again with errors in what each step reads: the state and the output.

    Returns:
        The pictures [n, C, H, W], and those of the disturbed runs [DISTURBED, n, C, H, W]; they are one batch.
    """
    generator, n, copies = torch.Generator().manual_seed(0), len(run.ids), 1 + DISTURBED
    ids, labels = id_bits(run.ids).repeat(copies), torch.tensor(run.labels).repeat(copies)
    seeds = torch.full_like(ids, seed_bits(run.seed))
    timesteps = sampler.table(**run.options).timesteps[:-1]

    def noise(t: int) -> torch.Tensor:
        return normals(seeds, ids, torch.full_like(ids, t), sampler.spec.shape).double()

    def error(size: torch.Tensor) -> torch.Tensor:
        drawn = size * (2 * torch.rand(size.shape, generator=generator) - 1)
        drawn[:n] = 0.0
        return drawn

    def network(x, t, y):
        out = sampler.network(x.float(), t, y).double()
        return out + error(out.abs().amax().expand_as(out) * ROUNDING)

    exact = network
    if run.guidance != 1.0:
        exact = reference.classifier_free_guidance(network, run.guidance, sampler.spec.null_class)

    def model(x, t, y):
        x += error(x.abs() * STATE_ROUNDING)  # in place: the loop goes on from it
        return exact(x, t, y)

    x_T = initial_noise(seeds, ids, sampler.spec.shape).double()  # as it was drawn: in C it is rounded otherwise
    x_0 = loop(sampler, run, model, x_T, lambda i: noise(int(timesteps[i])), timesteps, labels)
    return x_0[:n], x_0[n:].unflatten(0, (DISTURBED, n))


def loop(sampler, run, model, x_T, noise, timesteps, labels) -> torch.Tensor:
    """The plain loop of the run's solver; returns x_0."""
    clip = run.options["clip"]
    threshold = dataclasses.astuple(clip) if isinstance(clip, DynamicThreshold) else None
    bound = None if threshold is not None else clip
    if run.options["solver"] == "ddpm":
        return reference.p_sample_loop(
            model, sampler.schedule, x_T, noise, timesteps=timesteps, y=labels,
            variance=run.options["variance"], clip=bound, threshold=threshold,
        )  # fmt: skip
    if run.options["solver"] == "ddim":
        return reference.ddim_sample_loop(
            model, sampler.schedule, x_T, timesteps, eta=run.options["eta"], noise=noise, y=labels, clip=bound,
            clipped_eps=run.options["clipped_eps"],
        )  # fmt: skip
    return reference.dpmpp_2m_sample_loop(model, sampler.schedule, x_T, timesteps, y=labels, clip=bound)


def check(sampler: Sampler, plain: Sampler, run: Run, order: list[int], batch_size: int | None) -> None:
    """The sampler's pictures, in any order and batch size, against the textbook's.

    The bound is what rounding in the network makes of the run's end, with the textbook's loop as the amplifier.
    """
    want, disturbed = textbook(plain, run)
    bound = SAFETY * float((disturbed - want).abs().max()) + 2.0**-20 * float(want.abs().max())
    got = sampler.sample(len(order), batch_size=batch_size, **run.asked(order))
    assert float((got.double() - want[order]).abs().max()) <= bound
