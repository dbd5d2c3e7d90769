"""LikelihoodRun: what `fastddpm likelihood` was asked for, checked before any work, then measured batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

from torch import Tensor

from fastddpm.cli.errors import Stopped
from fastddpm.cli.likelihood_folder import LikelihoodFolder
from fastddpm.cli.picture_folder import checksums
from fastddpm.common.progress import StepProgress
from fastddpm.pictures.labelled import LabelledPictures
from fastddpm.process.likelihood import Likelihood
from fastddpm.process.method import Method
from fastddpm.process.rate_distortion import LikelihoodSums
from fastddpm.sampler import Sampler
from fastddpm.step.request import default_batch_size

Part = tuple[int, int]
"""A batch: its first picture, and the one after its last."""


@dataclasses.dataclass(frozen=True)
class LikelihoodRun:
    """The options of one `fastddpm likelihood`; see there."""

    sampler: Sampler
    model: str
    flags: Mapping[str, object]
    data: LabelledPictures
    n: int | None
    steps: int | None
    timesteps: str | None
    classes: bool
    seed: int
    batch_size: int | None
    engine: str
    precision: str
    quiet: bool

    def run(self, out: Path | None) -> LikelihoodSums:
        """Measure the pictures.

        Args:
            out: A folder that keeps what was found of each batch; what it holds of the same run is not measured again.

        Returns:
            The sums over all pictures.

        Raises:
            ValueError: If an option is out of range, or the folder holds a run with other settings.
            OSError: If the folder is not writable.
            Stopped: On Ctrl-C; says how to go on where that is possible.
        """
        labels = self.check()
        folder = None if out is None else LikelihoodFolder(out, self._settings(labels))
        if folder is not None:
            folder.check()
        parts = [(first, min(first + self._size(), self.count)) for first in range(0, self.count, self._size())]
        there = set() if folder is None else set(folder.kept())
        missing = [part for part in parts if part not in there]
        if folder is not None and missing:
            folder.begin()
        try:
            with self._bar(missing):
                measured = self.measured(missing, labels)
                return functools.reduce(operator.add, self._found(parts, there, measured, folder))
        except KeyboardInterrupt:
            raise Stopped("; the same command continues" if folder is not None else "") from None

    @property
    def count(self) -> int:
        """How many pictures are measured."""
        return len(self.data) if self.n is None else self.n

    def check(self) -> Tensor | None:
        """Refuse before the work what would fail after it.

        Returns:
            The labels of the pictures as the network knows them, int64 [n], or None.

        Raises:
            ValueError: If an option is out of range or does not fit the data.
        """
        if not 1 <= self.count <= len(self.data):
            raise ValueError(f"--n must be in 1 … {len(self.data):,}, the pictures of {self.data.source}, got {self.n}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}; leave it out")
        spec = self.sampler.spec
        labels = self.data.labels_for(spec.num_classes, spec.class_names) if self.classes else None
        Method("ddpm", self.steps, self.timesteps).likelihood_table(self.sampler.schedule, spec)
        return None if labels is None else labels[: self.count]

    def _size(self) -> int:
        """Pictures that run together."""
        return self.batch_size or default_batch_size(self.sampler.device)

    def _settings(self, labels: Tensor | None) -> dict[str, object]:
        """What determines a picture's bound besides its number."""
        mine = ("model", "flags", "steps", "timesteps", "seed", "precision", "engine")
        data = {"data": self.data.source, "pictures": self.data.checksum()}
        more = {"classes": labels is not None, "batch_size": self._size()}
        return {name: getattr(self, name) for name in mine} | data | more | checksums(self.sampler)

    def _bar(self, missing: Sequence[Part]) -> StepProgress:
        """A bar for the rows of all batches that are measured."""
        table = Method("ddpm", self.steps, self.timesteps).likelihood_table(self.sampler.schedule, self.sampler.spec)
        pictures = sum(end - first for first, end in missing)
        return StepProgress(table.S * len(missing), pictures, False if self.quiet else None, doing="measuring")

    def _found(
        self, parts: Sequence[Part], there: Set[Part], measured: Iterator[Likelihood], folder: LikelihoodFolder | None
    ) -> Iterator[LikelihoodSums]:
        """What is found of each batch, in order: kept before, or measured now and kept."""
        for part in parts:
            if folder is not None and part in there:
                yield folder.read(*part)
                continue
            sums = LikelihoodSums.of(next(measured))
            if folder is not None:
                folder.keep(part[0], sums)
            yield sums

    def measured(self, missing: Sequence[Part], labels: Tensor | None) -> Iterator[Likelihood]:
        """Measure the batches that are missing, each when it is asked for."""
        if not missing:
            return iter(())
        numbers = [i for first, end in missing for i in range(first, end)]
        # A run that is one short batch is not filled up.
        size = self._size() if self.batch_size is not None or self.count > self._size() else None
        return self.sampler.stream_likelihood(
            [self.data.pictures[i] for i in numbers],
            steps=self.steps,
            timesteps=self.timesteps,
            seed=self.seed,
            sample_ids=numbers,
            class_labels=None if labels is None else labels[numbers],
            batch_size=size,
        )
