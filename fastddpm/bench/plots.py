"""Plots of a run, with matplotlib: throughput over batch size, ratios to peers, cost over steps, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from fastddpm.bench.entrants import LABELS, PEERS, is_ours
from fastddpm.bench.figures import BatchResult, WorkloadResult
from fastddpm.bench.memory import MemoryCurve
from fastddpm.common.packages import require
from fastddpm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Subject = TypeVar("Subject", WorkloadResult, MemoryCurve)


class Style(TypedDict):
    """How a peer is drawn."""

    color: str
    linewidth: float
    linestyle: str


def draw_all(folder: Path, results: Sequence[WorkloadResult], memory: MemoryCurve | None = None) -> list[Path]:
    """Write all plots for which there are figures.

    Args:
        folder: where.
        results: of the workloads.
        memory: the curve of a long run.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    require("matplotlib", "bench").use("Agg")
    networks = [result for result in results if result.flop and any(one.rounds for one in result.batches)]
    written: list[Path] = []
    if networks:
        written.append(_plot(folder / "throughput.png", networks, _throughput))
        written.append(_plot(folder / "ratios.png", networks, _ratios, height=4.5))
    costs = [result for result in networks if any(one.over_steps for one in result.batches)]
    if costs:
        written.append(_plot(folder / "steps.png", costs, _over_steps))
    if memory is not None and memory.bytes:
        written.append(_plot(folder / "memory.png", [memory], _memory))
    return written


def _plot(path: Path, subjects: Sequence[Subject], draw: Callable[[Axes, Subject], None], height: float = 3.6) -> Path:
    """One panel for each subject, written as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(subjects), height), layout="constrained")
    axes = figure.subplots(1, len(subjects), squeeze=False)[0]
    for panel, subject in zip(axes, subjects, strict=True):
        draw(panel, subject)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _style(peer: str) -> Style:
    """The same colour for a peer in all panels; ours are drawn thicker."""
    ours = is_ours(peer)
    colour = f"C{list(PEERS).index(peer) % 10}" if peer in PEERS else "0.5"
    return {"color": colour, "linewidth": 2.4 if ours else 1.2, "linestyle": "--" if peer.endswith("bf16") else "-"}


def _throughput(panel: Axes, result: WorkloadResult) -> None:
    for peer in dict.fromkeys(peer.peer for one in result.batches for peer in one.peers):
        points = [(one.batch, found.ms_per_step.p50) for one in result.batches if (found := one.find(peer))
                  and found.ms_per_step]  # fmt: skip
        if points:
            speeds = [batch / ms * 1e3 for batch, ms in points]
            panel.plot([batch for batch, _ in points], speeds, marker="o", label=LABELS.get(peer, peer), **_style(peer))
    panel.set(title=result.name, xlabel="batch size", ylabel="pictures · steps per second", xscale="log", yscale="log")
    sizes = [one.batch for one in result.batches]
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    panel.legend(fontsize=6)


def _ratios(panel: Axes, result: WorkloadResult) -> None:
    """Our fastest in float32 against everybody, with p20 and p80."""
    compared = [one for one in result.batches if any(one.ratios.values())]
    one: BatchResult = (compared or result.batches)[-1]
    ours = one.fastest("fp32", ours=True)
    entries = sorted((one.ratios.get(ours.peer, {}) if ours else {}).items(), key=lambda entry: entry[1].p50)
    values = [ratio.p50 for _, ratio in entries]
    spread = [[ratio.p50 - ratio.p20 for _, ratio in entries], [ratio.p80 - ratio.p50 for _, ratio in entries]]
    names = [LABELS.get(name, name) for name, _ in entries]
    colours = [_style(name)["color"] for name, _ in entries]
    panel.barh(names, values, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
    panel.axvline(1.0, color="0.2", linewidth=0.8)
    panel.tick_params(axis="y", labelsize=6)
    name = LABELS.get(ours.peer, ours.peer) if ours else "ours"
    panel.set(title=f"{result.name}, B = {one.batch}", xlabel=f"time of a step over that of {name}")


def _over_steps(panel: Axes, result: WorkloadResult) -> None:
    one = next(one for one in result.batches if one.over_steps)
    for peer, costs in one.over_steps.items():
        steps = [int(count) for count in costs]
        panel.plot(steps, list(costs.values()), marker="o", label=LABELS.get(peer, peer), **_style(peer))
    panel.set(title=f"{result.name}, B = {one.batch}", xlabel="steps", ylabel="seconds of a whole run", ylim=(0, None))
    panel.legend(fontsize=6)


def _memory(panel: Axes, curve: MemoryCurve) -> None:
    panel.plot(curve.pictures, [size / 1e6 for size in curve.bytes], color="C0")
    panel.set(title=f"{curve.n:,} pictures into a folder", xlabel="pictures written", ylabel="resident memory, MB")
    panel.set_ylim(0, None)
