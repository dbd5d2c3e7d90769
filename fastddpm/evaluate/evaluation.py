"""Evaluation: how near a set of generated pictures is to a reference, in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from fastddpm.evaluate.features import Features
from fastddpm.evaluate.frechet import frechet_distance
from fastddpm.evaluate.kernel import SUBSET_SIZE, KernelDistance, kernel_distance
from fastddpm.evaluate.neighbours import Neighbourhood, prdc
from fastddpm.evaluate.sets import PictureSet
from fastddpm.evaluate.side import Gatherer, Side
from fastddpm.evaluate.statistics import Statistics
from fastddpm.pictures.streams import FolderStream
from fastddpm.step.request import default_batch_size

Metric = Literal["fd", "kid", "prdc"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_COLOURS = {1: "gray", 3: "in colour"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers, and all that they depend on.

    Args:
        generated: what was measured.
        reference: against what.
        generated_n: how many pictures; None of statistics whose file does not say.
        reference_n: likewise.
        features: the features' name.
        digest: SHA-256 of their weights.
        preprocessing: what was done to the pictures before.
        distance: what the Fréchet distance is called: FID, or FD with the features' name.
        fd: the squared Fréchet distance, where it was asked for.
        kid: the kernel distance, likewise.
        prdc: precision, recall, density and coverage, likewise.
        notes: what should be known about the numbers, a line each.
    """

    generated: str
    reference: str
    generated_n: int | None
    reference_n: int | None
    features: str
    digest: str
    preprocessing: str
    distance: str
    fd: float | None
    kid: KernelDistance | None
    prdc: Neighbourhood | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The numbers and the rest as JSON-ready values."""
        return dataclasses.asdict(self)


class Evaluator:
    """Measures sets of generated pictures against one reference, whose features are computed once.

    Memory is that of one batch and, for the Fréchet distance, of a few D × D matrices; the other metrics need all
    features at once, 4 n D bytes for either side.
    """

    def __init__(
        self,
        reference: PictureSet,
        features: Features,
        *,
        metrics: Sequence[Metric] | None = None,
        batch_size: int | None = None,
        k: int = 5,
        progress: bool | None = None,
    ) -> None:
        """Say against what is measured, and how.

        Args:
            reference: pictures, or statistics of the same features.
            features: what of a picture is compared; where it takes pictures of any channels they are those of the first
                picture of either side, and colour where these differ (see `Features.seeing`).
            metrics: any of "fd", "kid" and "prdc"; None takes all where both sides have pictures, else "fd".
            batch_size: pictures that are in memory at a time; None is 64, on a GPU 256.
            k: of precision, recall, density and coverage.
            progress: whether to show a bar; None shows it on terminals.

        Raises:
            ValueError: a metric is unknown, or a number is out of range.
        """
        check_metrics(metrics)
        for name, value in (("batch_size", batch_size), ("k", k)):
            if value is not None and value < 1:
                raise ValueError(f"evaluate: {name} must be at least 1, got {value}; leave it out")
        self.reference, self.features, self._asked, self._k = reference, features, metrics, k
        self._batch_size, self._progress = batch_size or default_batch_size(features.device), progress
        self._gathered: tuple[Gatherer, Side] | None = None

    @property
    def statistics(self) -> Statistics | None:
        """The reference's mean and covariance, once something was measured; None where no distance needed them."""
        return None if self._gathered is None else self._gathered[1].statistics

    def measure(self, generated: PictureSet) -> Evaluation:
        """Compare a set with the reference.

        Args:
            generated: pictures, or statistics of the same features.

        Returns:
            The numbers.

        Raises:
            ValueError: see `check_sets`; or the statistics are those of other features, or a picture is damaged or has
                channels that the features do not take.
            OSError: a file cannot be read.
        """
        metrics = check_sets(generated, self.reference, self._asked, self._k)
        each = "kid" in metrics or "prdc" in metrics
        channels = self.features.channels or common_channels(generated, self.reference)
        how = Gatherer(self.features, channels, "fd" in metrics, each, self._batch_size, self._progress)
        if self._gathered is None or self._gathered[0] != how:
            self._gathered = how, how.gather(self.reference)
        reference = self._gathered[1]
        side = how.gather(generated, _dimension(reference))
        fd = kid = neighbourhood = None
        if side.statistics is not None and reference.statistics is not None:
            fd = frechet_distance(side.statistics, reference.statistics)
        if side.features is not None and reference.features is not None:
            kid = kernel_distance(side.features, reference.features) if "kid" in metrics else None
            if "prdc" in metrics:
                neighbourhood = prdc(side.features, reference.features, k=self._k, device=self.features.device)
        notes = (*side.notes, *reference.notes, *_left_out(self._asked, metrics), *_subset_note(kid))
        preprocessing = f"{_seen(generated, self.reference, channels)}; {self.features.preprocessing}"
        return Evaluation(
            generated.source, self.reference.source, side.n, reference.n, self.features.name, self.features.digest,
            preprocessing, self.features.distance, fd, kid, neighbourhood, notes,
        )  # fmt: skip


def compare_statistics(generated: PictureSet, reference: PictureSet) -> Evaluation:
    """The Fréchet distance of two sets of which there are only statistics, whatever features they are of.

    Raises:
        ValueError: a side has none, or they are of different features.
    """
    first, second = generated.statistics, reference.statistics
    if first is None or second is None:
        raise ValueError("compare_statistics: both sides must have mu and sigma, got pictures; use an Evaluator")
    if None not in (first.digest, second.digest) and first.digest != second.digest:
        raise ValueError(f"{generated.source}: statistics must be of the features of {reference.source}, got others")
    fd = frechet_distance(first, second)
    digest = first.digest or second.digest or ""
    return Evaluation(
        generated.source, reference.source, first.n, second.n, "those of the statistics", digest,
        "as the statistics were made", "FD (statistics)", fd, None, None, (),
    )  # fmt: skip


def lowest(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the lowest Fréchet distance, which is what Karras et al. 2022 (EDM) report of three.

    Raises:
        ValueError: there are none, or one has no Fréchet distance.
    """
    measured = [(evaluation.fd, i) for i, evaluation in enumerate(evaluations) if evaluation.fd is not None]
    if not measured or len(measured) < len(evaluations):
        raise ValueError("lowest: evaluations must each have a Fréchet distance, got one without; ask for fd")
    return evaluations[min(measured)[1]]


def check_metrics(metrics: Sequence[str] | None) -> None:
    """Check the names of metrics.

    Raises:
        ValueError: there are none, or one is unknown.
    """
    wrong = [metric for metric in metrics or () if metric not in METRICS]
    if wrong or metrics is not None and not metrics:
        got = ", ".join(map(repr, wrong)) or "none"
        raise ValueError(f"evaluate: metrics must be of {', '.join(METRICS)}, got {got}; leave them out for all")


def check_sets(
    generated: PictureSet, reference: PictureSet, metrics: Sequence[Metric] | None = None, k: int = 5
) -> tuple[Metric, ...]:
    """Refuse before the work what would fail after it.

    Args:
        generated: one side.
        reference: the other.
        metrics: what is asked for; None takes all where both sides have pictures, else "fd".
        k: of precision, recall, density and coverage.

    Returns:
        The metrics that are computed.

    Raises:
        ValueError: a metric is unknown, pictures of both sides differ in size or are too few, or there are only
            statistics where a metric needs pictures.
    """
    check_metrics(metrics)
    bare = next((side for side in (reference, generated) if side.pictures is None), None)
    chosen = tuple(metrics) if metrics is not None else METRICS if bare is None else METRICS[:1]
    if bare is not None and chosen != ("fd",):
        asked = ", ".join(metric for metric in chosen if metric != "fd")
        raise ValueError(f"{bare.source}: must hold pictures for {asked}, got mu and sigma alone; ask for fd alone")
    sides = [side.pictures for side in (generated, reference) if side.pictures is not None]
    if len({side.shape[1:] for side in sides}) > 1:
        got = " and ".join(f"{side.shape[2]}×{side.shape[1]}" for side in sides)
        raise ValueError(f"evaluate: pictures of both sides must have one size, got {got}; resize them (size)")
    needed = max({"fd": 2, "kid": 4, "prdc": k + 1}[metric] for metric in chosen)
    fewest = min(map(len, sides), default=needed)
    if fewest < needed:
        raise ValueError(
            f"evaluate: pictures must be at least {needed} on either side for {', '.join(chosen)}, got {fewest}; "
            "give more pictures or leave metrics out"
        )
    return chosen


def common_channels(generated: PictureSet, reference: PictureSet) -> int:
    """The channels of both sides' first pictures; colour where one is gray and the other in colour."""
    return max(side.pictures.shape[0] for side in (generated, reference) if side.pictures is not None)


def _seen(generated: PictureSet, reference: PictureSet, channels: int) -> str:
    """As what the pictures go into the features."""
    streams = [side.pictures for side in (generated, reference) if side.pictures is not None]
    _, height, width = streams[0].shape
    resized = any(isinstance(stream, FolderStream) and stream.size for stream in streams)
    how = " (those of folders by a crop of the centre square and Lanczos)" if resized else ""
    return f"{width}×{height} pixels{how}, {_COLOURS.get(channels, f'{channels} channels')}"


def _dimension(side: Side) -> int | None:
    if side.statistics is not None:
        return side.statistics.dimension
    return None if side.features is None else side.features.shape[1]


def _left_out(asked: Sequence[Metric] | None, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Which metrics were not computed though nobody said so."""
    left = [metric for metric in METRICS if metric not in metrics] if asked is None else []
    return (f"{' and '.join(left)} left out: they need the pictures of both sides, not statistics",) if left else ()


def _subset_note(kid: KernelDistance | None) -> tuple[str, ...]:
    if kid is None or kid.subset_size == SUBSET_SIZE:
        return ()
    return (f"KID from subsets of {kid.subset_size:,} pictures instead of {SUBSET_SIZE:,}: its spread is larger",)
