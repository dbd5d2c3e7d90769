"""The project's targets on a CPU, read off a run: ours, the other's, the ratio, the limit, met or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from fastddpm.bench.entrants import LABELS, OWN
from fastddpm.bench.figures import BatchResult, PeerResult, WorkloadResult, paired_ratio

RATIOS = (
    ("fp32", "diffusers", 1.2),
    ("fp32", "best", 1.05),
    ("bf16", "diffusers", 2.0),
)
BF16_BEST = {False: 1.0, True: 1.4}
"""Without and with AMX."""
MNIST_RATIOS = {1: 3.0, 64: 1.5}
MNIST_BEST = 1.0
CELEBAHQ_BEST = 1.05
UPDATE = "the update with its noise, [1, 3, 32, 32]"
UPDATE_RATIO = 8.0
OUTSIDE_SHARE = 0.02
PEAK_SHARE = 0.85
SECOND_START_S = 5.0
BF16_DB = 35.0


@dataclasses.dataclass(frozen=True)
class Bar:
    """One target.

    Attributes:
        what: what is compared.
        ours: our figure.
        other: the other's figure, or the limit's.
        value: the ratio or share.
        limit: what it must reach, or must not exceed.
        at_most: whether the limit is an upper one.
    """

    what: str
    ours: str
    other: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def wanted(self) -> str:
        """What the value must be, for people."""
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


def judge(results: Iterable[WorkloadResult], device: str = "cpu") -> list[Bar]:
    """All targets whose figures are there; none of another device than a CPU."""
    if device != "cpu":
        return []
    found = {result.name: result for result in results}
    bars: list[Bar] = []
    if "cifar10" in found:
        for one in found["cifar10"].batches:
            bars += _cifar10(one)
    if "mnist" in found:
        for one in found["mnist"].batches:
            place = f"mnist, B = {one.batch}"
            if one.batch in MNIST_RATIOS:
                bars += _ratio(f"{place}, fp32", one, "fp32", "diffusers", MNIST_RATIOS[one.batch])
            bars += _ratio(f"{place}, fp32", one, "fp32", "best", MNIST_BEST)
            bars += _mnist(place, one)
    if "celebahq256" in found:
        for one in found["celebahq256"].batches:
            bars += _ratio(f"celebahq256, B = {one.batch}, fp32", one, "fp32", "best", CELEBAHQ_BEST)
    if "update" in found:
        for one in found["update"].batches:
            bars += _ratio(UPDATE, one, "fp32", "diffusers", UPDATE_RATIO)
    return bars


def _mnist(place: str, one: BatchResult) -> list[Bar]:
    """The time to start again, and how near bfloat16's pictures are."""
    bars = []
    ours, low = one.find("fastddpm-compiled"), one.find("fastddpm-compiled-bf16")
    if ours is not None and ours.second_s is not None:
        what = f"{place}: from a new process to its first pictures, package found"
        bars.append(Bar(what, f"{ours.second_s:.1f} s", "", ours.second_s, SECOND_START_S, at_most=True))
    if low is not None and low.equality is not None and low.equality.value is not None:
        what = f"{place}: pictures in bf16, median PSNR"
        bars.append(Bar(what, f"{low.equality.value:.0f} dB", "", low.equality.value, BF16_DB))
    return bars


def _cifar10(one: BatchResult) -> list[Bar]:
    place = f"cifar10, B = {one.batch}"
    bars: list[Bar] = []
    for precision, other, limit in (*RATIOS, ("bf16", "best", BF16_BEST[_has_amx()])):
        bars += _ratio(f"{place}, {precision}", one, precision, other, limit)
    ours = _ours(one, "fp32")
    if ours is None or ours.ms_per_step is None:
        return bars
    if ours.outside_ms is not None and ours.outside_share is not None:
        times = (f"{ours.outside_ms:.3g} ms", f"{ours.ms_per_step.p50:.3g} ms")
        bars.append(Bar(f"{place}: share outside the network", *times, ours.outside_share, OUTSIDE_SHARE, at_most=True))
    if one.batch < 8:
        return bars
    for precision in ("fp32", "bf16"):
        best = _ours(one, precision)
        if best is not None and best.gflops is not None and best.of_peak is not None:
            peak = one.peak_gflops[precision].p50
            speeds = (f"{best.gflops.p50:.0f} GFLOP/s", f"{peak:.0f} GFLOP/s")
            what = f"{place}, {precision}: of the matrix product's speed"
            bars.append(Bar(what, *speeds, best.of_peak.p50, PEAK_SHARE))
    bars += _memory(place, one)
    return bars


def _memory(place: str, one: BatchResult) -> list[Bar]:
    theirs = one.find("diffusers")
    if theirs is None or not theirs.run_bytes:
        return []
    bars = []
    for ours in one.peers:
        if ours.peer in ("fastddpm-eager", "fastddpm-compiled") and ours.run_bytes:
            sizes = (f"{ours.run_bytes / 1e6:.0f} MB", f"{theirs.run_bytes / 1e6:.0f} MB")
            what = f"{place}: memory, {LABELS[ours.peer]}"
            bars.append(Bar(what, *sizes, ours.run_bytes / theirs.run_bytes, 1.0, at_most=True))
    return bars


def _ratio(what: str, one: BatchResult, precision: str, other: str, limit: float) -> list[Bar]:
    """Our fastest in a precision against a peer by name, or against the best of that precision.

    Against the best there is a second bar for what is all our own, where our fastest is another library's network.
    """
    ours = _ours(one, precision)
    theirs = one.fastest(precision, ours=False) if other == "best" else one.find(other)
    if ours is None or theirs is None:
        return []
    name = LABELS[theirs.peer] + (", the best" if other == "best" else "")
    if what == UPDATE:
        name = "diffusers' DDPMScheduler.step"
    runs = [("against", ours)]
    alone = _alone(one, precision)
    if other == "best" and alone is not None and alone is not ours:
        runs.append(("own engine alone against", alone))
    return [
        Bar(f"{what}: {how} {name}", _ms(mine), _ms(theirs), paired_ratio(theirs.seconds, mine.seconds).p50, limit)
        for how, mine in runs
    ]


def _ours(one: BatchResult, precision: str) -> PeerResult | None:
    """Our fastest, if the compiled engine took part: without it nothing is said about targets."""
    compiled = "fastddpm-compiled" + ("" if precision == "fp32" else f"-{precision}")
    return None if one.find(compiled) is None else one.fastest(precision, ours=True)


def _alone(one: BatchResult, precision: str) -> PeerResult | None:
    """Our fastest of those that are all our own."""
    end = "" if precision == "fp32" else f"-{precision}"
    there = [found for name in OWN if (found := one.find(f"{name}{end}")) is not None and found.ms_per_step is not None]
    return min(there, key=PeerResult.median, default=None)


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _ms(peer: PeerResult) -> str:
    return "?" if peer.ms_per_step is None else f"{peer.ms_per_step.p50:.3g} ms"


def rows(bars: Iterable[Bar]) -> list[Mapping[str, object]]:
    """As JSON-ready values."""
    return [{**dataclasses.asdict(bar), "met": bar.met} for bar in bars]
