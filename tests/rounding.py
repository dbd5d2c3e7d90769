"""How far two runs may be apart that differ in rounding alone: measured, not tuned to a machine."""

import dataclasses
from collections.abc import Sequence

import torch

from fastddpm.engines.runner import StepRunner
from fastddpm.sampler import Sampler
from fastddpm.step.state import State
from tests.steps import begin

SAFETY = 4.0
"""Between the largest of a few random deviations and one that is not random."""


@torch.no_grad()
def rounding_bound(sampler: Sampler, labels: Sequence[int], sizes: Sequence[int], **run: object) -> float:
    """Bound on |x_0 − x_0'| of the same samples in batches of different sizes.

    What one step rounds is the difference between a step of the whole batch and one of fewer samples from the same
    state. How the run amplifies it is seen by disturbing the state after each step by so much, at random.

    Args:
        sampler: whose step; eager.
        labels: the samples' classes; their number is the whole batch.
        sizes: the other batch sizes.
        run: the method, as in `Sampler.table`.
    """
    table = sampler.table(**run)
    roundings: list[float] = []
    call = begin(sampler, table, range(len(labels)), labels, seed=0)
    runner = StepRunner(call.step, call)
    for _ in range(table.S):
        before = runner.state.copy()
        runner.run(1)
        worst = 0.0
        for size in sizes:
            part = State(**{name: value[:size].clone() for name, value in before.tensors()})
            fewer = StepRunner(call.step, dataclasses.replace(call, state=part))
            fewer.run(1)
            worst = max(worst, float((fewer.state.x - runner.state.x[:size]).abs().max()))
        roundings.append(worst)
    spread = 0.0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        call = begin(sampler, table, range(len(labels)), labels, seed=0)
        disturbed = StepRunner(call.step, call)
        for rounding in roundings:
            disturbed.run(1)
            x = disturbed.state.x
            x.add_(rounding * (2 * torch.rand(x.shape, generator=generator) - 1))
        spread = max(spread, float((disturbed.state.x - runner.state.x).abs().max()))
    return SAFETY * spread
