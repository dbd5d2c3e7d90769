"""What was measured, and what follows from it: quantiles, ratios within a round, arithmetic per second, equality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastddpm.bench.entrants import is_ours

ATOL = 1e-3
"""Largest difference of a pixel, in [0, 1], between a float32 peer and the textbook after a whole run."""
PSNR_DB = 30.0
"""Least PSNR of a bfloat16 or TF32 peer's pictures, in the median over the pictures."""
RUNS = {"ddpm_1000": 1000, "ddim_50": 50}
"""Runs of the usual lengths, by their numbers of steps."""


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """p20, p50 and p80 of a sample: with other work about, they say more than a mean."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Of at least one value."""
        low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), [20, 50, 80])
        return cls(float(low), float(middle), float(high))


def psnr(pictures: np.ndarray, reference: np.ndarray) -> float:
    """The median PSNR in dB over pictures [B, C, H, W] in [0, 1]; infinite where they are equal."""
    error = np.square(pictures.astype(np.float64) - reference).mean(axis=(1, 2, 3))
    return float(np.median([math.inf if e == 0 else -10 * math.log10(e) for e in error]))


@dataclasses.dataclass(frozen=True)
class Equality:
    """How far a peer's pictures are from the textbook's.

    Attributes:
        measure: "largest difference" (of a pixel in [0, 1]), "psnr" (dB), or "none" for another network.
        value: the measured value; an infinite PSNR is None.
        bound: what it must keep.
        holds: whether it does.
    """

    measure: str
    value: float | None
    bound: float | None
    holds: bool

    @classmethod
    def judge(cls, pictures: np.ndarray, reference: np.ndarray | None, precision: str, compares: bool) -> Equality:
        """Compare; without a reference, or for a network of its own, pictures must be finite and that is all."""
        finite = bool(np.isfinite(pictures).all())
        if reference is None or not compares:
            return cls("none", None, None, finite)
        if not finite or pictures.shape != reference.shape:
            return cls("largest difference", None, ATOL, False)
        if precision == "fp32":
            worst = float(np.abs(pictures - reference).max())
            return cls("largest difference", worst, ATOL, worst <= ATOL)
        value = psnr(pictures, reference)
        return cls("psnr", None if math.isinf(value) else value, PSNR_DB, value >= PSNR_DB)

    def __str__(self) -> str:
        if self.measure == "none":
            return "own network" if self.holds else "not finite"
        if self.value is None:
            return "equal" if self.holds else "not finite"
        return f"{self.value:.1f} dB" if self.measure == "psnr" else f"{self.value:.1e}"


@dataclasses.dataclass
class PeerResult:
    """One peer at one batch size.

    Attributes:
        peer: its name.
        precision: of its network.
        equality: of its pictures.
        ready_s: seconds from the start of its process to its second run, all of what follows included.
        export_s: of these, what went into a file that others read too.
        load_s: seconds to load the network.
        first_s: seconds of its first run, which has compilation in it.
        again_s: seconds of the run after that.
        how: what turned out to run, where the peer chooses.
        seconds: of each timed run, in order of the rounds.
        ms_per_step: from these.
        gflops: GFLOP/s of the network's arithmetic over the whole step, where its FLOPs are known.
        of_peak: median over the rounds of GFLOP/s over the matrix product's in the same round and precision.
        outside_ms: milliseconds of a step around a network that costs nothing.
        outside_share: those over `ms_per_step`.
        second_s: seconds from starting a second process, which finds what was compiled, to its first pictures.
        images_per_s: at 1000 DDPM and 50 DDIM steps; arithmetic from `ms_per_step`, not runs of that many steps.
        run_bytes: peak memory during one run, resident or a GPU's; of what we compile, in that second process.
        whole_bytes: peak memory of the process, loading included.
        note: why it was not timed, if it was not.
    """

    peer: str
    precision: str
    equality: Equality | None = None
    ready_s: float | None = None
    export_s: float | None = None
    load_s: float | None = None
    first_s: float | None = None
    again_s: float | None = None
    how: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    ms_per_step: Quantiles | None = None
    gflops: Quantiles | None = None
    of_peak: Quantiles | None = None
    outside_ms: float | None = None
    outside_share: float | None = None
    second_s: float | None = None
    images_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    run_bytes: int | None = None
    whole_bytes: int | None = None
    note: str = ""

    def median(self) -> float:
        """Milliseconds per step; infinite where it was not timed."""
        return math.inf if self.ms_per_step is None else self.ms_per_step.p50

    @property
    def compile_s(self) -> float | None:
        """What the first run took more than the second."""
        return None if self.first_s is None or self.again_s is None else max(0.0, self.first_s - self.again_s)

    def summarise(self, steps: int, batch: int, flop: float, peaks: Sequence[float]) -> None:
        """Fill in what follows from the timed runs.

        Args:
            steps: of one run.
            batch: pictures at a time.
            flop: of one step of one picture; 0 where unknown.
            peaks: GFLOP/s of the matrix product in each round.
        """
        if not self.seconds:
            return
        self.ms_per_step = Quantiles.of([s / steps * 1e3 for s in self.seconds])
        self.images_per_s = images_per_s(batch, self.ms_per_step.p50)
        if flop:
            speeds = [flop * batch * steps / s / 1e9 for s in self.seconds]
            self.gflops = Quantiles.of(speeds)
            shares = [speed / peak for speed, peak in zip(speeds, peaks, strict=False) if peak]
            self.of_peak = Quantiles.of(shares) if shares else None
        if self.outside_ms is not None:
            self.outside_share = self.outside_ms / self.ms_per_step.p50


def short(value: float) -> str:
    """A number with three digits, or with all those before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def images_per_s(batch: int, ms_per_step: float) -> dict[str, float]:
    """Pictures per second of runs of the usual lengths, if every step takes as long."""
    return {name: batch / (count * ms_per_step / 1e3) for name, count in RUNS.items()}


@dataclasses.dataclass
class BatchResult:
    """All peers at one batch size.

    Attributes:
        batch: pictures at a time.
        steps: of a timed run.
        rounds: timed runs of each peer.
        peers: the results.
        peak_gflops: of the matrix product, by precision.
        copy_gb_s: GB/s of a copy.
        ratios: ours → another → quantiles of (its time / our time) within a round: above 1, we are faster.
        over_steps: peer → steps → seconds of a whole run.
    """

    batch: int
    steps: int
    rounds: int = 0
    peers: list[PeerResult] = dataclasses.field(default_factory=list)
    peak_gflops: dict[str, Quantiles] = dataclasses.field(default_factory=dict)
    copy_gb_s: Quantiles | None = None
    ratios: dict[str, dict[str, Quantiles]] = dataclasses.field(default_factory=dict)
    over_steps: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def find(self, peer: str) -> PeerResult | None:
        """The result of a peer that was timed."""
        return next((result for result in self.peers if result.peer == peer and result.seconds), None)

    def compare(self) -> None:
        """Fill in `ratios`."""
        timed = [result for result in self.peers if result.seconds]
        for ours in timed:
            if is_ours(ours.peer):
                others = [result for result in timed if result is not ours]
                self.ratios[ours.peer] = {other.peer: paired_ratio(other.seconds, ours.seconds) for other in others}

    def fastest(self, precision: str, ours: bool) -> PeerResult | None:
        """The fastest of ours, or of the others that run the same network, in a precision."""
        timed = [
            result
            for result in self.peers
            if result.ms_per_step is not None
            and result.precision == precision
            and is_ours(result.peer) == ours
            and (ours or (result.equality is not None and result.equality.measure != "none"))
        ]
        return min(timed, key=PeerResult.median, default=None)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> Quantiles:
    """Quantiles of their time over ours, round by round."""
    return Quantiles.of([a / b for a, b in zip(theirs, ours, strict=False)])


@dataclasses.dataclass
class WorkloadResult:
    """One network.

    Attributes:
        name: of the workload.
        title: for people.
        flop: floating-point operations of one evaluation for one picture, attention included.
        lucidrains_flop: the same of the other U-Net.
        batches: the results.
        note: why there are none, if there are none.
    """

    name: str
    title: str
    flop: float = 0.0
    lucidrains_flop: float = 0.0
    batches: list[BatchResult] = dataclasses.field(default_factory=list)
    note: str = ""

    def at(self, batch: int) -> BatchResult | None:
        """The result of a batch size."""
        return next((result for result in self.batches if result.batch == batch), None)


def as_json(value: object) -> Any:  # noqa: ANN401 - plain data
    """Dataclasses as dictionaries, properties that people look for included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        more = {"compile_s": value.compile_s} if isinstance(value, PeerResult) else {}
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)} | more
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value
