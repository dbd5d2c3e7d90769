"""Stepper: one network with all that makes its steps: its arithmetic, its book of rows, its engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.engines.choose import Engine, Settled
from fastddpm.engines.precision import DTYPES, Precision
from fastddpm.engines.runner import Runner
from fastddpm.engines.surroundings import settings_aside, undisturbed
from fastddpm.engines.weights import Weights
from fastddpm.process.likelihood_table import LikelihoodTable
from fastddpm.process.spec import ModelSpec
from fastddpm.process.table import StepTable
from fastddpm.step.book import Book, Table
from fastddpm.step.guided import Guide, GuidedStep
from fastddpm.step.likelihood import TERMS, LikelihoodForm, LikelihoodStep
from fastddpm.step.network import Network, as_network
from fastddpm.step.request import Request
from fastddpm.step.state import Places, State
from fastddpm.step.step import Call, Step, StepForm


class Stepper:
    """Starts batches of one network.

    Attributes:
        source: the network as it was given.
        network: as steps ask for it, in its precision.
        book: the rows of its runs.
        engine: what runs its steps.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        spec: ModelSpec,
        T: int,
        device: torch.device,
        precision: Precision,
        make_engine: Callable[[Callable[[], str]], Engine],
    ) -> None:
        """Bind a network.

        Args:
            model: a network, on the device.
            spec: its conventions.
            T: training steps.
            device: where it runs.
            precision: its arithmetic.
            make_engine: is handed what tells the digest of the weights.
        """
        self.spec, self.device, self.precision = spec, device, precision
        self.source = as_network(model)
        self.network = self._cast()
        self._weights = Weights(self.source)
        self._lock = threading.Lock()
        self.engine = make_engine(lambda: self._weights.digest)
        with self.undisturbed():
            self.book = Book(cast(Network, self.network), spec, T, device)

    @classmethod
    def eager(cls, model: Callable[..., Tensor], spec: ModelSpec, T: int) -> Stepper:
        """What makes a network's steps eagerly on the CPU, in float32; arguments as above."""
        cpu = torch.device("cpu")
        return cls(model, spec, T, cpu, "fp32", lambda weights: Engine("eager", cpu, weights=weights))

    def undisturbed(self) -> contextlib.AbstractContextManager[None]:
        """See `fastddpm.engines.surroundings.undisturbed`."""
        return undisturbed(self.network, self.precision, self.device)

    def settings_aside(self) -> contextlib.AbstractContextManager[None]:
        """See `fastddpm.engines.surroundings.settings_aside`."""
        return settings_aside(self.precision, self.device)

    @property
    def weights(self) -> str:
        """The digest of the network's weights."""
        return self._weights.digest

    def refresh(self) -> None:
        """Take notice of changed weights; called before each run."""
        with self._lock, self.settings_aside():
            if not self._weights.have_changed():
                return
            with self.undisturbed():
                if self.network is not self.source:
                    # Copied in place: what was captured or compiled reads the same memory.
                    self.network.load_state_dict(self.source.state_dict())
                self.book.forget(cast(Network, self.network))

    @contextlib.contextmanager
    def begin(
        self,
        table: Table,
        batch: Request,
        *,
        noise: bool = False,
        to_come: int = 0,
        on_compile: Callable[[bool], None] = lambda _: None,
        settled: Settled | None = None,
    ) -> Iterator[Runner]:
        """A batch at its start, and what drives it.

        Args:
            table: the run, or the rows of a bound: then the samples are pictures in the network's range, as the batch's
                x_T, and after each step the state's `terms` are what it found.
            batch: the samples.
            noise: whether each step will be handed its z, or ε.
            to_come: steps of such batches that are to be made; 0 is this batch's.
            on_compile: called with True before and False after compiling.
            settled: the choice of the run that the batch belongs to, where one engine must make all of its steps.

        Yields:
            The runner, until the end of the block; what is to outlive it must be copied.

        Raises:
            CompileError: the engine is not "auto" and the step does not compile.
        """
        with self.call(table, batch, noise=noise) as call:
            runner = self.engine.runner(call, to_come=to_come or table.S, on_compile=on_compile, settled=settled)
            try:
                yield runner
            except BaseException:
                self.engine.stop()  # nobody waits any more for what is compiled beside the run
                raise
            finally:
                runner.close()

    def compile(self, table: Table, batch: Request) -> float | None:
        """Compile the step for such batches; see `Engine.compile`."""
        with self.call(table, batch) as call:
            return self.engine.compile(call)

    @contextlib.contextmanager
    def call(self, table: Table, batch: Request, *, noise: bool = False) -> Iterator[Call]:
        """A batch's call, with its samples at their start; its rows are in the book until the context ends."""
        guided, labelled = batch.guidance is not None, batch.labels is not None and not self.book.holds_classes
        with self._places(table, batch, guided) as places:
            state = State.create(self.spec.shape, batch.ids, batch.seed, places, x_T=batch.x_T)
            if labelled and batch.labels is not None:
                state.labels = batch.labels.to(self.device)
            for name in ("guidance", "known", "mask", "condition"):
                if (told := getattr(batch, name)) is not None:
                    setattr(state, name, told.to(self.device, torch.float32, copy=True).contiguous())
            example = torch.zeros_like(state.x)[None] if noise else None
            if isinstance(table, LikelihoodTable):
                state.terms = torch.zeros(len(state.x), len(TERMS), device=self.device)
                bound = LikelihoodForm.of(self.spec, table, labelled=labelled, noise=noise)
                yield Call(LikelihoodStep(self.network, bound), state, self.book, example)
                return
            form = StepForm.of(
                self.spec, table, guided=guided, labelled=labelled, noise=noise, masked=batch.mask is not None
            )
            call = Call(self._step(form, table, batch), state, self.book, example)
            yield call.formed(history=max(form.history, int(batch.previews)))

    def _step(self, form: StepForm, table: StepTable, batch: Request) -> Step:
        """The step of a batch: of the one form, or with a classifier's gradient behind it."""
        if batch.cond_fn is None:
            return Step(self.network, form)
        guide = Guide.of(batch.cond_fn, batch.classifier_labels, table, self.spec, self.device)
        return GuidedStep(self.network, form, guide)

    def _places(self, table: Table, batch: Request, guided: bool) -> contextlib.AbstractContextManager[Places]:
        labels: Sequence[int | None] = [None] * len(batch.ids)
        uncond = None
        if batch.labels is not None and self.book.holds_classes:
            labels, uncond = batch.labels.tolist(), self.spec.null_class if guided else None
        return self.book.open(table, labels, uncond)

    def _cast(self) -> nn.Module:
        """The network in its precision; the given one stays as it is."""
        if self.precision not in DTYPES:
            return self.source
        return cast(nn.Module, cast(Network, self.source).cast(DTYPES[self.precision]))
