"""Loop: the one loop around a step. It drives each batch of a request to its end and looks after the noise."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastddpm.engines.runner import Runner
from fastddpm.kernels.operands import COLUMNS
from fastddpm.process.noise import NoiseFunction, NoiseSource
from fastddpm.process.table import StepTable
from fastddpm.step.request import Preview, Request


@dataclasses.dataclass(frozen=True)
class Course:
    """The steps of a run, as a loop must know them.

    Attributes:
        timesteps: the training timestep of each step.
        draws: for each step, whether noise that somebody supplies is asked for.
        takes_noise: whether the step can be handed any.
        counters: the counter of each step's seeded noise.
    """

    timesteps: Sequence[int]
    draws: Sequence[bool]
    takes_noise: bool
    counters: Sequence[int]

    @classmethod
    def of(cls, table: StepTable, draws: Sequence[bool] | None = None, *, masked: bool = False) -> Course:
        """The steps of a table; noise is asked for where a row adds it, unless `draws` says otherwise.

        Where a part of the pictures is known (`masked`), it is noised in every row that does not lead to x_0.
        """
        # Peers draw nothing where nothing is used, and so their generators stay in step with ours.
        adding = [COLUMNS.index(name) for name in (("sigma", "k_z") if masked else ("sigma",))]
        adds = (table.rows[:-1, adding] != 0).any(1).tolist()
        takes = table.uses_noise or masked
        return cls(table.timesteps[:-1].tolist(), adds if draws is None else draws, takes, table.counters[:-1].tolist())

    @property
    def S(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


class Begin(Protocol):
    """Starts a batch; `Stepper.begin` explains the arguments."""

    def __call__(
        self,
        batch: Request,
        *,
        noise: bool = False,
        to_come: int = 0,
        on_compile: Callable[[bool], None] = ...,
    ) -> contextlib.AbstractContextManager[Runner]:
        """The batch at its start, for the length of the block."""


class Watch(Protocol):
    """Is told how far a run is, and decides nothing."""

    def advance_to(self, step: int) -> None:
        """So many steps of the batch under way are done."""

    def batch_done(self) -> None:
        """The next step is the first of another batch."""

    def compiling(self, under_way: bool) -> None:
        """The step is being compiled, or no longer is."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """Drives the batches of one run.

    Attributes:
        begin: starts a batch.
        course: its steps.
        shape: (C, H, W).
        device: where states are.
        noise: z of the steps as the caller supplies it, or None for seeded noise.
        callback: is shown each step.
        undisturbed: what is around a batch's work, and not around what the consumer does with it.
    """

    begin: Begin
    course: Course
    shape: tuple[int, int, int]
    device: torch.device
    noise: NoiseSource | None = None
    callback: Callable[[Preview], None] | None = None
    undisturbed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def batches(self, request: Request, watch: Watch) -> Iterator[tuple[Request, Tensor, float]]:
        """Each batch with its final states, float32 [B, C, H, W], and the seconds that it took.

        Args:
            request: what is asked for.
            watch: is told how far it is.

        Raises:
            FloatingPointError: the samples ran into NaN or infinity; says at which step.
        """
        batches = list(request.batches())
        for i, batch in enumerate(batches):
            began = time.perf_counter()
            with self.undisturbed():
                final = self._finished(batch, (len(batches) - i) * self.course.S, watch)
            yield batch, final, time.perf_counter() - began

    def _finished(self, batch: Request, to_come: int, watch: Watch) -> Tensor:
        """The final states of one batch."""
        rewind = self.noise.get_state() if isinstance(self.noise, torch.Generator) else None
        n, start = len(batch.ids), self._start(batch)
        with self.begin(start, noise=self.hands_noise, to_come=to_come, on_compile=watch.compiling) as runner:
            watch.advance_to(0)
            for i in self.driven(runner, batch, one_by_one=batch.previews):
                state = runner.state
                if self.callback is not None and state.history is not None:
                    x, x_start, t = state.x[:n].clone(), state.history[:n].clone(), self.course.timesteps[i - 1]
                    self.callback(Preview(i, self.course.S, t, state.sample_id[:n], x, x_start))
                watch.advance_to(i)
            final = runner.state.x[:n].clone()
        watch.batch_done()
        if not bool(torch.isfinite(final).all()):
            if isinstance(self.noise, torch.Generator) and rewind is not None:
                self.noise.set_state(rewind)
            raise self._where_it_broke(batch)
        return final

    def driven(self, runner: Runner, batch: Request, *, one_by_one: bool) -> Iterator[int]:
        """Advance all samples to the end, handing each step the noise that somebody supplies for it.

        Args:
            runner: drives the filled batch.
            batch: the samples.
            one_by_one: whether to stop after each step.

        Yields:
            i where i steps are done.
        """
        i, S = 0, self.course.S
        source = self._source(batch)
        while i < S:
            noise = None if source is None else source(i)
            i += runner.run(1 if one_by_one or source is not None else S - i, noise)
            yield i

    def _where_it_broke(self, batch: Request) -> FloatingPointError:
        """Run a batch again, which noise as a pure function allows, and name the step where the trouble began."""
        S = self.course.S
        # One step to come is none to measure or compile for.
        with self.begin(self._start(batch), noise=self.hands_noise, to_come=1) as runner:
            for i in self.driven(runner, batch, one_by_one=True):
                bad = ~torch.isfinite(runner.state.x[: len(batch.ids)]).flatten(1).all(1)
                if bool(bad.any()):
                    ids, t = batch.ids[bad.cpu()].tolist(), self.course.timesteps[i - 1]
                    return FloatingPointError(
                        f"sample: the state must stay finite, got NaN or infinity from step {i} of {S} (t = {t}) in "
                        f"{len(ids)} samples, first id {ids[0]}; the weights or the supplied noise are not usable"
                    )
        return FloatingPointError(
            "sample: the final state must be finite, got NaN or infinity that a second run does not show"
        )

    # ------------------------------------------------------------------ noise

    @property
    def hands_noise(self) -> bool:
        """Whether each step is handed its z."""
        return self.noise is not None and self.course.takes_noise

    def _start(self, batch: Request) -> Request:
        """The batch filled, with its x_T where a generator draws that."""
        if batch.x_T is None and isinstance(self.noise, torch.Generator):
            shape = (len(batch.ids), *self.shape)
            x_T = torch.randn(shape, generator=self.noise, device=self.noise.device)
            batch = dataclasses.replace(batch, x_T=x_T)
        return batch.filled()

    def _source(self, batch: Request) -> Callable[[int], Tensor | None] | None:
        """What gives z of a loop step, float32 [1, B, C, H, W] of a filled batch; None where nothing is asked for."""
        noise, takes, draws = self.noise, self.hands_noise, self.course.draws
        if noise is None or not (takes or any(draws)):
            return None
        if isinstance(noise, Tensor):
            rows = batch.filled().noise
            return (lambda i: torch.as_tensor(rows)[i : i + 1]) if takes else None
        shape = (len(batch.ids), *self.shape)

        def draw(i: int) -> Tensor | None:
            z = self._draw(noise, i, batch, shape) if draws[i] else torch.zeros(shape)
            return batch.fill(z.to(self.device, torch.float32)).contiguous()[None] if takes else None

        return draw

    def _draw(self, noise: NoiseFunction | torch.Generator, i: int, batch: Request, shape: tuple[int, ...]) -> Tensor:
        """The caller's noise for loop step i, [B, C, H, W]."""
        if isinstance(noise, torch.Generator):
            return torch.randn(shape, generator=noise, device=noise.device)
        z = noise(i, self.course.timesteps[i], batch.ids)
        if not isinstance(z, Tensor) or tuple(z.shape) != shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"sample: noise must return a tensor {shape}, got {got}")
        return z
