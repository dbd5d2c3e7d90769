"""Batches of a sampler's network at the start of a run, for tests that drive `Step` themselves."""

import contextlib
from collections.abc import Sequence

import torch

from fastddpm.engines.runner import StepRunner
from fastddpm.process.table import StepTable
from fastddpm.sampler import Sampler
from fastddpm.step.state import State
from fastddpm.step.step import Call, Step, StepForm


def begin(
    sampler: Sampler,
    table: StepTable,
    ids: Sequence[int],
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    *,
    seed: int = 5,
    **form: bool,
) -> Call:
    """A call at the start of a run; keyword arguments change the form of the step that the run needs."""
    stepper, spec = sampler.stepper, sampler.spec
    book, guided = stepper.book, guidance is not None
    told = labels is not None and not book.holds_classes
    rows = [None] * len(ids) if told or labels is None else list(labels)
    uncond = spec.null_class if guided and book.holds_classes else None
    with stepper.undisturbed(), book.open(table, rows, uncond) as places:
        state = State.create(spec.shape, torch.tensor(ids), seed, places)
        state.labels = torch.tensor(labels) if told else None
        state.guidance = torch.full((len(ids),), guidance) if guided else None
    wanted = StepForm.of(spec, table, guided=guided, labelled=told)
    return Call(Step(stepper.network, wanted), state, book).formed(**form)


@torch.no_grad()
def finish(call: Call, function=None) -> torch.Tensor:
    """Drive all samples to their ends; returns x."""
    runner = StepRunner(call.step if function is None else function, call)
    while bool((runner.state.step < runner.state.end).any()):
        runner.run(1)
    return runner.state.x


def grow(sampler: Sampler, capacity: int = 4096) -> None:
    """Let the sampler's book get room for so many rows, as that many runs at once do."""
    book = sampler.stepper.book
    with contextlib.ExitStack() as runs:
        for solver in ("ddpm", "ddim"):
            for steps in range(15, 41):
                runs.enter_context(book.open(sampler.table(solver=solver, steps=steps), [0, 1, 2]))
    assert book.capacity >= capacity
