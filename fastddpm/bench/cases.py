"""Cases: contenders that compute the same, compared before they are timed.

Calls go round several buffers, so that caches do not hold them; on a GPU what can be captured is replayed, so that a
kernel's time is not that of calling it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor

from fastddpm.bench.figures import Quantiles, paired_ratio
from fastddpm.bench.timing import Clock, in_turn, replayed

TOLERANCE = 1e-5
"""Largest difference from the textbook over the largest magnitude, or over 1: float32 rounding in another order."""
OTHERS_TOLERANCE = 1e-4
"""The same for another library, which computes its coefficients in float32."""
LOW_TOLERANCE = 2.0**-6
"""The same where results are bfloat16: a few units in the last place."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case's result.

    Attributes:
        name: for people.
        call: computes it from buffer i and returns it; it may work in place.
        compared: the same in a form that can be compared, where `call` draws noise of its own; None is `call`.
        tolerance: what the difference from the first contender must keep.
        captured: whether a GPU's time is that of replayed launches; without, it is that of calls as users make them.
    """

    name: str
    call: Callable[[int], Tensor]
    compared: Callable[[int], Tensor] | None = None
    tolerance: float = TOLERANCE
    captured: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: of the kernel and the variant.
        shape: of its input.
        contenders: ours is the first; all are compared with the second.
        moved: bytes that must move at the least.
        buffers: how many there are to go round.
        reset: fills them anew.
        missing: why a contender is not there, a line for each.
    """

    name: str
    shape: tuple[int, ...]
    contenders: tuple[Contender, ...]
    moved: int
    buffers: int = 1
    reset: Callable[[], object] = lambda: None
    missing: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Name and shape."""
        return f"{self.name}, {'x'.join(map(str, self.shape))}"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a case is measured.

    Attributes:
        rounds: in which each contender takes its turn.
        calls: in a row, timed as one.
    """

    rounds: int
    calls: int

    @classmethod
    def of(cls, device: str, dry: bool) -> Effort:
        """On a GPU many calls in a row, because one takes microseconds."""
        if dry:
            return cls(3, 2)
        return cls(20, 20) if device == "cuda" else cls(15, 4)


class ContenderResult(TypedDict):
    """What was measured of a contender; quantiles are those of `Quantiles`."""

    name: str
    ms: dict[str, float]
    samples_ms: list[float]
    gb_s: float
    of_copy: float | None
    difference: float
    first_s: float
    replayed: bool
    times_ours: dict[str, float]


class CaseResult(TypedDict):
    """A case that was measured."""

    case: str
    shape: list[int]
    bytes: int
    clock: str
    calls: int
    rounds: int
    contenders: list[ContenderResult]
    missing: list[str]


def measure(case: Case, device: str, effort: Effort, copy_gb_s: float = 0.0) -> CaseResult:
    """Compare a case's contenders, then time them in turn.

    Args:
        case: the case, on that device.
        device: "cpu" or "cuda".
        effort: how long.
        copy_gb_s: GB/s of a large copy in this run, to which the kernels' are related; 0 leaves that out.

    Returns:
        JSON-ready: the case, and for each contender its difference, time, GB/s and ratio to ours.

    Raises:
        ValueError: a contender computes something else; nothing is timed then.
    """
    clock = Clock.of(device)
    first = {contender.name: _first_call(case, contender) for contender in case.contenders}
    differences = compare(case)
    runs = {contender.name: _runnable(case, contender, device, effort.calls) for contender in case.contenders}

    def take(name: str) -> float:
        return clock.spent(runs[name][0]) / effort.calls

    measures = {name: functools.partial(take, name) for name in runs}
    with torch.no_grad():
        for warm_up in measures.values():
            warm_up()
        taken = in_turn(measures, effort.rounds)
    ours = taken[case.contenders[0].name]
    rows: list[ContenderResult] = []
    for name, ms in taken.items():
        times = Quantiles.of(ms)
        speed = case.moved / times.p50 / 1e6
        rows.append({
            "name": name, "ms": dataclasses.asdict(times), "samples_ms": ms, "gb_s": speed,
            "of_copy": speed / copy_gb_s if copy_gb_s else None, "difference": differences[name],
            "first_s": first[name], "replayed": runs[name][1],
            "times_ours": dataclasses.asdict(paired_ratio(ms, ours)),
        })  # fmt: skip
    return {
        "case": case.name, "shape": list(case.shape), "bytes": case.moved, "clock": clock.name, "calls": effort.calls,
        "rounds": effort.rounds, "contenders": rows, "missing": list(case.missing),
    }  # fmt: skip


def compare(case: Case) -> dict[str, float]:
    """Each contender's largest difference from the second one's result, over that one's largest magnitude or 1.

    Raises:
        ValueError: one is too large, or not a number.
    """
    results = {}
    for contender in case.contenders:
        case.reset()
        with torch.no_grad():
            results[contender.name] = (contender.compared or contender.call)(0).detach().float().clone()
    expected = results[case.contenders[1].name]
    found: dict[str, float] = {}
    for contender in case.contenders:
        difference = float((results[contender.name] - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not difference <= contender.tolerance:
            raise ValueError(
                f"{case.id}: {contender.name} must compute what {case.contenders[1].name} does, got a difference of "
                f"{difference:.2g}; nothing is timed"
            )
        found[contender.name] = difference
    return found


def _first_call(case: Case, contender: Contender) -> float:
    """Seconds of a first call: compilation is in it."""
    case.reset()
    began = time.perf_counter()
    with torch.no_grad():
        contender.call(0)
    return time.perf_counter() - began


def _runnable(case: Case, contender: Contender, device: str, calls: int) -> tuple[Callable[[], object], bool]:
    """Several calls as one function, and whether they are replayed."""

    def call(i: int) -> object:
        return contender.call(i % case.buffers)

    if device == "cuda" and not contender.captured:
        return replayed(call, calls, "cpu"), False
    with torch.no_grad():
        return replayed(call, calls, device), device == "cuda"


Given = ParamSpec("Given")
Made = TypeVar("Made")


def compiled(function: Callable[Given, Made], dry: bool) -> Callable[Given, Made]:
    """The function under `torch.compile`; it is only traced where `dry`."""
    result: Callable[Given, Made] = torch.compile(function, backend="eager") if dry else torch.compile(function)
    return result


def table(results: Sequence[CaseResult]) -> str:
    """Cases as a Markdown table."""
    lines = [
        "| case | contender | ms (p20 … p80) | GB/s | of the copy | × ours | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        size = "×".join(map(str, result["shape"]))
        for row in result["contenders"]:
            called = "" if row["replayed"] or result["clock"] == "wall" else ", as called"
            spread = "{p50:.3g} ({p20:.3g} … {p80:.3g})".format(**row["ms"])
            cells = (
                f"{result['case']} {size}", row["name"] + called, spread,
                f"{row['gb_s']:.0f}", "" if row["of_copy"] is None else f"{row['of_copy']:.0%}",
                f"{row['times_ours']['p50']:.2f}", f"{row['difference']:.1e}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {result['case']} {size} | {line} | | | | | |" for line in result["missing"]]
    return "\n".join(lines) + "\n"
