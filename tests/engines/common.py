"""Samplers and runs for the tests of the engines."""

from fastddpm import Sampler

RUNS = [
    {"solver": "ddpm", "steps": 7},
    {"solver": "ddim", "steps": 5, "eta": 0.5},
    {"solver": "dpmpp_2m", "steps": 12},
    {"solver": "ddpm", "steps": 1},
]


def like(sampler: Sampler, engine: str, **options: object) -> Sampler:
    """A sampler on the same network with another engine."""
    return Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine=engine, **options)
