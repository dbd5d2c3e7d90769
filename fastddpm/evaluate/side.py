"""One side of a comparison, reduced to what the metrics need of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastddpm.common.progress import progress_bar
from fastddpm.common.terminal import on_terminal
from fastddpm.evaluate.features import Features
from fastddpm.evaluate.sets import PictureSet, SampledPictures
from fastddpm.evaluate.statistics import RunningStatistics, Statistics
from fastddpm.pictures.streams import PictureStream


@dataclasses.dataclass(frozen=True)
class Side:
    """What a set comes to.

    Args:
        n: how many pictures; None of statistics whose file does not say.
        statistics: of their features, where the Fréchet distance is asked for.
        features: float32 [n, D] on the CPU, where a metric needs each of them.
        notes: what should be known about it, a line each.
    """

    n: int | None
    statistics: Statistics | None
    features: Tensor | None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gatherer:
    """How sets are reduced.

    Args:
        network: what of a picture is compared.
        channels: of the pictures that it sees.
        gaussian: whether mean and covariance are wanted.
        each: whether the features of each picture are.
        batch_size: pictures that are in memory at a time.
        progress: whether to show a bar; None shows it on terminals.
    """

    network: Features
    channels: int
    gaussian: bool
    each: bool
    batch_size: int
    progress: bool | None = None

    def gather(self, side: PictureSet, dimension: int | None = None) -> Side:
        """Reduce a set.

        Args:
            side: the set.
            dimension: D of the other side, where that is known.

        Returns:
            What the metrics need of it.

        Raises:
            ValueError: the statistics are those of other features, or a picture is damaged or refused.
            OSError: a file cannot be read.
        """
        given, notes = self._usable(side)
        if side.pictures is None or (given is not None and not self.each):
            _check_dimension(side.source, given, dimension)
            return Side(given.n if given else None, given, None, (*notes, *self._rank_note(side, given)))
        made, features = self._read(side.pictures, dimension, gaussian=self.gaussian and given is None)
        statistics = given if self.gaussian and given is not None else made
        return Side(len(side.pictures), statistics, features, (*notes, *self._rank_note(side, statistics)))

    def _usable(self, side: PictureSet) -> tuple[Statistics | None, tuple[str, ...]]:
        """The set's own statistics where they are of these features; else a note."""
        given = side.statistics
        if given is None:
            return None, ()
        if given.digest is not None and given.digest != self.network.digest:
            raise ValueError(
                f"{side.source}: statistics must be of the features {self.network.name}, got those of others "
                f"({given.digest[:12]} instead of {self.network.digest[:12]}); make them anew"
            )
        if side.pictures is not None and given.digest is None and not self.network.is_inception:
            return None, (
                f"{side.source}: mu and sigma are left out: beside pictures they are of inception's features",
            )
        return given, ()

    def _read(
        self, pictures: PictureStream, dimension: int | None, *, gaussian: bool
    ) -> tuple[Statistics | None, Tensor | None]:
        """One pass over the pictures."""
        running: RunningStatistics | None = None
        kept: Tensor | None = None
        done = 0
        visible = on_terminal() if self.progress is None else self.progress
        own_bar = isinstance(pictures, SampledPictures)
        with progress_bar("{task.description}", visible=visible and not own_bar, unit="pictures") as bar:
            task = bar.add_task("looking at", total=len(pictures))
            for batch in pictures.batches(self.batch_size, self.channels):
                features = self.network(batch)
                if running is None:
                    D = features.shape[1]
                    _check_equal(pictures.source, D, dimension)
                    running = RunningStatistics(D if gaussian else 0)
                    kept = torch.empty(len(pictures), D) if self.each else None
                if gaussian:
                    running.add(features)
                if kept is not None:
                    kept[done : done + len(features)] = features
                done += len(features)
                bar.update(task, completed=done)
        return running.finish(self.network.digest) if running is not None and gaussian else None, kept

    def _rank_note(self, side: PictureSet, statistics: Statistics | None) -> tuple[str, ...]:
        """A warning where there are too few pictures for a covariance."""
        if statistics is None or statistics.n is None or statistics.n > statistics.dimension:
            return ()
        return (
            f"{side.source}: {statistics.n:,} pictures are too few for {statistics.dimension:,} features: the "
            f"covariance is singular, and {self.network.distance} too large to be compared with others",
        )


def _check_dimension(source: str, statistics: Statistics | None, dimension: int | None) -> None:
    if statistics is not None:
        _check_equal(source, statistics.dimension, dimension)


def _check_equal(source: str, found: int, dimension: int | None) -> None:
    """See that both sides have features of one dimension."""
    if dimension is not None and found != dimension:
        raise ValueError(
            f"{source}: features must have {dimension} dimensions as the other side's, got {found}; "
            "its statistics are of other features"
        )
