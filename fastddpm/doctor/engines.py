"""Each engine on a small network: eager steps against the textbook, the others against eager ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.bench.figures import Equality
from fastddpm.bench.twins import random_unet
from fastddpm.doctor.surroundings import ProblemError
from fastddpm.engines.choose import Engine, EngineName
from fastddpm.engines.gpu import Gpu, compile_in_place
from fastddpm.export.library import libraries
from fastddpm.nets.config import UNetConfig
from fastddpm.process.method import MethodOptions
from fastddpm.process.reference import p_sample_loop
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler

T = 1000
PICTURES = 2
UNET = UNetConfig(sample_size=(16, 16), channels=(32,), layers=1, attention=(False,), norm_groups=8)
"""One of each kind of layer and no more: compilers take their time for each."""
SPEC = ModelSpec(shape=(3, 16, 16), variance="fixed_large")
RUNS: tuple[MethodOptions, ...] = (
    {"solver": "dpmpp_2m", "steps": 7}, {"solver": "ddpm", "steps": 12}, {"solver": "ddim", "steps": 9, "eta": 0.5},
)  # fmt: skip
"""The first keeps a history, and a compiled step that does serves the others too."""


def small_sampler(device: torch.device, name: str = "eager", quick: Gpu | None = None) -> Sampler:
    """A sampler of a small random network.

    Args:
        device: where.
        name: of the engine.
        quick: what prepares its steps, instead of the device's own.
    """
    sampler = Sampler(random_unet(UNET, T), NoiseSchedule.linear(T), SPEC, device=device, engine="eager")
    sampler.stepper.engine = Engine(name, device, weights=lambda: sampler.stepper.weights, quick=quick)  # type: ignore[arg-type]
    return sampler


def check_eager(device: torch.device) -> str:
    """Pictures of eager steps against the textbook's loop, from the same noise."""
    sampler, steps = small_sampler(device), 10
    generator = torch.Generator().manual_seed(0)
    x_T, noise = (torch.randn(size, generator=generator).to(device) for size in _noise_sizes(steps))
    got = sampler.sample(PICTURES, solver="ddpm", steps=steps, x_T=x_T, noise=noise, progress=False)

    def network(x: Tensor, t: Tensor, y: Tensor | None = None, /) -> Tensor:
        return sampler.network(x, t)

    table = sampler.table(solver="ddpm", steps=steps)
    timesteps = table.timesteps[:-1].cpu()
    with sampler.stepper.undisturbed():
        want = p_sample_loop(
            network, sampler.schedule, x_T, lambda i: noise[i], timesteps=timesteps, variance=SPEC.variance
        )
    return f"as the textbook's: {_equal(got, want / 2 + 0.5, 'the textbook draws')}"


def check_compiled(device: torch.device) -> str:
    """Compiled steps against eager ones; on a CPU through the package that the cache keeps."""
    sampler = small_sampler(device, "compiled")
    if device.type != "cpu":
        return compare_runs(sampler, "compiled")
    seconds = sampler.compile(PICTURES)
    found = "its package was in the cache" if seconds is None else f"compiled in {seconds:.0f} s"
    return f"{found}; {compare_runs(sampler, 'compiled')}"


def check_library(name: EngineName, device: torch.device) -> str:
    """Steps whose network another library runs, against eager ones; one that is not installed is no fault."""
    found = libraries("auto", device, "fp32", lambda: "")
    absent = [text for text in found.missing if text.startswith(f"{name} ")]
    if absent:
        return f"{absent[0]}: pip install 'fastddpm[{name}]' adds it to what auto chooses from"
    sampler = Sampler(random_unet(UNET, T), NoiseSchedule.linear(T), SPEC, device=device, engine=name)
    return compare_runs(sampler, name)


def check_one_graph(device: torch.device) -> str:
    """A GPU's engine on the CPU: its step is traced as one graph, once for all solvers, and runs without a compiler."""
    torch._dynamo.reset()
    compile_step = functools.partial(compile_in_place, backend="eager")
    sampler = small_sampler(device, "compiled", Gpu(graphs=False, compile_step=compile_step))
    try:
        sampler.sample(PICTURES, progress=False, **RUNS[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            return f"one graph, traced once; {compare_runs(sampler, 'compiled')}"
    finally:
        torch._dynamo.reset()


def compare_runs(sampler: Sampler, used: str, after_first: Callable[[], object] = lambda: None) -> str:
    """All solvers against eager steps of the same network; says how far they are apart.

    Args:
        sampler: of `small_sampler`.
        used: the engine that must have run.
        after_first: called when the first run is over.

    Raises:
        ProblemError: pictures differ, or another engine ran.
    """
    eager, worst = small_sampler(sampler.device), ""
    for number, run in enumerate(RUNS):
        got, want = (
            either.sample(PICTURES, seed=2**63 + number, sample_ids=[7, 2**40], progress=False, **run)
            for either in (sampler, eager)
        )
        worst = max(worst, _equal(got, want, f"eager steps draw with {run['solver']}"), key=_exponent)
        if sampler.engine.used != used:
            raise ProblemError(f"the engine must be {used}, got {sampler.engine.used} ({sampler.engine.why})")
        if number == 0:
            after_first()
    return f"{len(RUNS)} solvers as eager: {worst}"


def _equal(got: Tensor, want: Tensor, who: str) -> str:
    """The largest difference of two batches of pictures in [0, 1]; raises where it is too large."""
    judged = Equality.judge(got.cpu().numpy(), want.clamp(0, 1).cpu().numpy(), "fp32", True)
    if not judged.holds:
        raise ProblemError(f"pictures must be as {who}, got a difference of {judged}, more than {judged.bound:g}")
    return str(judged)


def _exponent(text: str) -> float:
    return float(text) if text else -1.0


def _noise_sizes(steps: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (PICTURES, *SPEC.shape), (steps, PICTURES, *SPEC.shape)
