"""Measuring: what `fastddpm evaluate` was asked for, checked before any work, then measured and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fastddpm import __version__
from fastddpm.checkpoints import SHIPPED
from fastddpm.cli.classes import class_cycle
from fastddpm.engines.options import SampleOptions
from fastddpm.evaluate import (
    Evaluation,
    Evaluator,
    Metric,
    PictureSet,
    SampledPictures,
    check_sets,
    compare_statistics,
    load_features,
    lowest,
    open_set,
    write_statistics,
)
from fastddpm.files import check_replaceable, check_writable, write_json
from fastddpm.process.method import Method
from fastddpm.process.table import DynamicThreshold
from fastddpm.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is drawn before it is measured; see `fastddpm evaluate`."""

    model: str
    n: int
    repeats: int
    seed: int
    method: Mapping[str, Any]
    run: Mapping[str, Any]
    flags: Mapping[str, Any]

    def sets(self, device: str | None, batch_size: int | None, quiet: bool) -> list[PictureSet]:
        """A set of pictures for each repetition, not drawn yet.

        Raises:
            ValueError: an option is out of range or does not fit the network.
        """
        if not 1 <= self.repeats <= 100:
            raise ValueError(f"--repeats must be in 1 … 100, got {self.repeats}; EDM takes 3")
        engine, precision = self.run["engine"], self.run["precision"]
        sampler = Sampler.from_pretrained(
            self.model, device=device, engine=engine, precision=precision, flags=self.flags
        )
        rest = dict(self.method)
        threshold = rest.pop("threshold")
        method = Method(**rest, clip="spec" if threshold is None else DynamicThreshold(threshold))
        options = SampleOptions(method=method, guidance_scale=self.run["guidance"])
        if batch_size is not None:
            options["batch_size"] = batch_size
        if quiet:
            options["progress"] = False
        cycle = class_cycle(sampler.spec, self.run["classes"], self.model)
        drawn = [SampledPictures(sampler, self.n, self.seed + i, cycle, options) for i in range(self.repeats)]
        for pictures in drawn:
            pictures.check()
        return [PictureSet(f"{self.model}, seed {pictures.seed}", pictures) for pictures in drawn]

    def to_dict(self) -> dict[str, object]:
        """All that the pictures depend on."""
        return {"model": self.model, "n": self.n, "seed": self.seed, **self.method, **self.run, "flags": self.flags}


@dataclasses.dataclass(frozen=True)
class Measuring:
    """The options of one `fastddpm evaluate`; see there."""

    generated: str
    reference: str
    features: str
    weights: Path | None
    metrics: Sequence[str] | None
    k: int
    size: int | None
    channels: int | None
    batch_size: int | None
    device: str | None
    quiet: bool
    sampling: Sampling | None

    def run(self, json: Path | None, statistics: Path | None) -> tuple[list[Evaluation], Evaluation]:
        """Measure, and write what is asked for.

        Args:
            json: where the numbers go, or None.
            statistics: where the reference's mean and covariance go, or None.

        Returns:
            An evaluation for each repetition, and the one to report.

        Raises:
            ValueError: an option is out of range, or the two sides cannot be compared.
            OSError: a file cannot be read or written.
        """
        for path in filter(None, (json, statistics)):
            check_replaceable(path)
            check_writable(path.parent)
        evaluations = list(self._measured(statistics))
        best = evaluations[0] if len(evaluations) == 1 else lowest(evaluations)
        if json is not None:
            values = {"fastddpm": __version__, **best.to_dict()}
            if self.sampling is not None:
                values["sampling"] = self.sampling.to_dict()
                values["repeats"] = [evaluation.to_dict() for evaluation in evaluations]
            write_json(json, values)
        return evaluations, best

    def _measured(self, statistics: Path | None) -> Iterator[Evaluation]:
        reference = open_set(self.reference, size=self.size)
        metrics = cast("Sequence[Metric] | None", self.metrics)
        if self.sampling is None:
            if self.generated in SHIPPED and not Path(self.generated).exists():
                raise ValueError(
                    f"--n must be given with a checkpoint ({self.generated}), got none; say how many to draw"
                )
            sets = [open_set(self.generated, size=self.size)]
        else:
            sets = self.sampling.sets(self.device, self.batch_size, self.quiet)
        asked = check_sets(sets[0], reference, metrics, self.k)
        if "fd" not in asked and (statistics is not None or len(sets) > 1):
            what = "--save-statistics" if statistics is not None else "--repeats"
            raise ValueError(f"--metrics must have fd with {what}, got {', '.join(asked)}; add it")
        if sets[0].pictures is None and reference.pictures is None:
            yield compare_statistics(sets[0], reference)
            return
        evaluator = Evaluator(
            reference,
            load_features(self.features, weights=self.weights, device=self.device).seeing(self.channels),
            metrics=metrics,
            batch_size=self.batch_size,
            k=self.k,
            progress=False if self.quiet else None,
        )
        for side in sets:
            yield evaluator.measure(side)
        if statistics is not None and evaluator.statistics is not None:
            write_statistics(statistics, evaluator.statistics)
