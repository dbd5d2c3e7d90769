"""LikelihoodLoop: drives batches of pictures down the rows of their bound, and gathers what each row finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm.engines.choose import Settled
from fastddpm.engines.loop import Course, Loop, Watch
from fastddpm.engines.stepper import Stepper
from fastddpm.pictures.batches import PictureBatches
from fastddpm.process.likelihood import Likelihood, prior_bits
from fastddpm.process.likelihood_table import LikelihoodTable
from fastddpm.process.noise import NoiseSource
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.step.likelihood import TERMS
from fastddpm.step.request import Request


@dataclasses.dataclass(frozen=True)
class LikelihoodLoop:
    """The bound of many pictures, batch by batch.

    Attributes:
        stepper: makes the steps.
        schedule: of the network's training.
        table: the rows.
        pictures: whose likelihood is asked for.
        noise: ε of the steps as the caller supplies it, or None for seeded noise.
        settled: the choice of an engine, where one must make all steps.
    """

    stepper: Stepper
    schedule: NoiseSchedule
    table: LikelihoodTable
    pictures: PictureBatches
    noise: NoiseSource | None = None
    settled: Settled = dataclasses.field(default_factory=Settled)

    @property
    def S(self) -> int:
        """Rows of the bound."""
        return self.table.S

    def batches(self, request: Request, watch: Watch) -> Iterator[Likelihood]:
        """What is found of each batch, in order.

        Args:
            request: what is asked for, without the pictures.
            watch: is told how far it is.

        Raises:
            FloatingPointError: a term is NaN or infinite; says at which timestep.
        """
        first = 0
        for i, batch in enumerate(request.batches()):
            with self.stepper.undisturbed():
                x_start = self.pictures.read(first, first + len(batch.ids)).to(self.stepper.device)
                taken = dataclasses.replace(batch, x_T=x_start)
                terms = self._terms(taken, (request.parts - i) * self.S, watch)
                found = self._likelihood(x_start, terms)
            first += len(batch.ids)
            yield found

    def _terms(self, batch: Request, to_come: int, watch: Watch) -> Tensor:
        """Float32 [n, S, 3]."""
        stepper, timesteps = self.stepper, self.table.timesteps[:-1].tolist()
        counters = self.table.counters[:-1].tolist()
        begin, course = functools.partial(stepper.begin, self.table), Course(timesteps, [True] * self.S, True, counters)
        loop = Loop(begin, course, stepper.spec.shape, stepper.device, self.noise)
        n, hands = len(batch.ids), loop.hands_noise
        found = torch.empty(n, self.S, len(TERMS), device=stepper.device)
        settled = self.settled if batch.fills else None
        with begin(batch.filled(), noise=hands, to_come=to_come, on_compile=watch.compiling, settled=settled) as runner:
            watch.advance_to(0)
            for i in loop.driven(runner, batch, one_by_one=True):
                found[:, i - 1] = torch.as_tensor(runner.state.terms)[:n]
                watch.advance_to(i)
        watch.batch_done()
        bad = ~found.isfinite().flatten(2).all(2)
        if bool(bad.any()):
            row = int(bad.any(0).nonzero()[0])
            ids = batch.ids[bad[:, row].cpu()].tolist()
            raise FloatingPointError(
                f"likelihood: the bound must stay finite, got NaN or infinity in row {row + 1} of {self.S} "
                f"(t = {timesteps[row]}) of {len(ids)} pictures, first id {ids[0]}; the weights or the supplied noise "
                "are not usable"
            )
        return found

    def _likelihood(self, x_start: Tensor, terms: Tensor) -> Likelihood:
        timesteps = self.table.timesteps[:-1].clone()
        prior = prior_bits(self.schedule, x_start, int(timesteps[0]))
        return Likelihood(prior, terms[..., 0], terms[..., 1], terms[..., 2], timesteps)
