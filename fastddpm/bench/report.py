"""The results as files: results.json, results.md and the plots, each whole or absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastddpm.bench import bars
from fastddpm.bench.entrants import COMPILES, LABELS
from fastddpm.bench.figures import BatchResult, PeerResult, Quantiles, WorkloadResult, as_json, short
from fastddpm.bench.hardware import Machine
from fastddpm.bench.memory import MemoryCurve
from fastddpm.files import write_json, write_text

FORMAT_VERSION = 2
COLUMNS = ("peer", "ms per step (p20 … p80)", "× ours", "× ours in bf16", "GFLOP/s", "of peak", "images/s at 1000, 50",
           "outside", "ready", "compile", "memory", "pictures")  # fmt: skip


def write(
    folder: Path,
    results: Sequence[WorkloadResult],
    machine: Machine,
    settings: Mapping[str, object],
    memory: MemoryCurve | None = None,
) -> list[Path]:
    """Write what is there so far.

    Args:
        folder: where.
        results: of the workloads.
        machine: as `fastddpm.bench.hardware.describe` gives it.
        settings: of the run.
        memory: the curve of a long run into a folder.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    values = {
        "format": "fastddpm-bench",
        "format_version": FORMAT_VERSION,
        "machine": dict(machine),
        "settings": dict(settings),
        "workloads": as_json(list(results)),
        "memory": None if memory is None else as_json(memory),
        "bars": bars.rows(bars.judge(results, str(settings.get("device", "cpu")))),
    }
    write_json(folder / "results.json", values)
    write_text(folder / "results.md", markdown(results, machine, settings, memory))
    written = [folder / "results.json", folder / "results.md"]
    if memory is not None:
        write_text(folder / "memory.csv", memory.csv())
        written.append(folder / "memory.csv")
    return written


def markdown(
    results: Sequence[WorkloadResult],
    machine: Machine,
    settings: Mapping[str, object],
    memory: MemoryCurve | None = None,
) -> str:
    """All tables, with the hardware they hold for."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    lines = [
        "# Benchmark",
        "",
        f"{machine['date']}, commit {machine['commit'] or 'unknown'}. {machine['processor']}, {machine['threads']} "
        f"threads of {machine['cores']} cores, {machine['instructions']}, {machine['memory_gb']} GB{gpu}. "
        f"Python {machine['python']}; {versions}.",
        "",
        "Each peer in a process of its own, in turn, the others stopped; same weights, steps and noise, pictures "
        "compared before anything is timed. Times are medians over the rounds; × is the median of (its time / our "
        "fastest time in its precision, or in bf16) within a round, so above 1 means that ours is faster. Ready: from "
        "the start of its process to its second run. Compile: how much longer the first run took than the next, caches "
        f"{'empty' if settings.get('cold') else 'as found'}. Images per second at 1000 DDPM and 50 DDIM steps are "
        "arithmetic from the time of a step.",
    ]
    found = bars.judge(results, str(settings.get("device", "cpu")))
    if found:
        lines += ["", "## Targets", "", *bar_table(found)]
    for result in results:
        lines += ["", f"## {result.name}: {result.title}", ""]
        if result.flop:
            lines += [f"{result.flop / 1e9:.3g} GFLOP a picture and step, attention included.", ""]
        if result.note:
            lines += [result.note, ""]
        for one in result.batches:
            lines += batch_table(one)
    if memory is not None:
        lines += ["", "## Memory of a long run", "", memory.sentence()]
    return "\n".join(lines) + "\n"


def bar_table(found: Sequence[bars.Bar]) -> list[str]:
    """The targets as a Markdown table."""
    lines = ["| target | ours | other | ratio | limit | met |", "|---|---|---|---|---|---|"]
    for bar in found:
        met = "yes" if bar.met else "**no**"
        lines.append(f"| {bar.what} | {bar.ours} | {bar.other} | {bar.value:.3g} | {bar.wanted} | {met} |")
    return lines


def batch_table(one: BatchResult) -> list[str]:
    """One batch size as a Markdown table, the fastest first."""
    gemm = ", ".join(f"{name} {value.p50:.0f} GFLOP/s" for name, value in sorted(one.peak_gflops.items()))
    copy = f", copy {one.copy_gb_s.p50:.0f} GB/s" if one.copy_gb_s else ""
    peaks = f"matrix product: {gemm or 'not measured'}{copy}"
    lines = [f"### B = {one.batch}", "", f"{one.rounds} rounds of {one.steps} steps; {peaks}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(one, peer))} |" for peer in in_order(one)]
    return [*lines, ""]


def in_order(one: BatchResult) -> list[PeerResult]:
    """The fastest first, then those that were not timed."""
    return sorted(one.peers, key=PeerResult.median)


def cells(one: BatchResult, peer: PeerResult) -> list[str]:
    """A peer's row."""
    label = LABELS.get(peer.peer, peer.peer)
    if peer.ms_per_step is None:
        return [label, peer.note or "not measured", *[""] * (len(COLUMNS) - 2)]
    return [
        label,
        _range(peer.ms_per_step),
        _against(one, peer, peer.precision),
        "" if peer.precision == "bf16" else _against(one, peer, "bf16"),
        f"{peer.gflops.p50:.0f}" if peer.gflops else "",
        f"{peer.of_peak.p50:.0%}" if peer.of_peak else "",
        ", ".join(f"{speed:.3g}" for speed in peer.images_per_s.values()),
        "" if peer.outside_ms is None else f"{peer.outside_ms:.3g} ms ({peer.outside_share or 0:.1%})",
        "" if peer.ready_s is None else f"{peer.ready_s:.0f} s",
        f"{peer.compile_s:.0f} s" if peer.compile_s is not None and peer.peer in COMPILES else "",
        f"{peer.run_bytes / 1e6:.0f} MB" if peer.run_bytes else "",
        str(peer.equality or ""),
    ]


def _against(one: BatchResult, peer: PeerResult, precision: str) -> str:
    ours = one.fastest(precision, ours=True)
    if ours is None or ours is peer or peer.peer not in one.ratios.get(ours.peer, {}):
        return ""
    return f"{one.ratios[ours.peer][peer.peer].p50:.2f}"


def _range(value: Quantiles) -> str:
    return f"{short(value.p50)} ({short(value.p20)} … {short(value.p80)})"
