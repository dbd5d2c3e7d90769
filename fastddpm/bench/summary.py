"""The tables of the README as files: a row for each network, batch size and precision, and a line on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastddpm.bench.entrants import LABELS
from fastddpm.bench.figures import BatchResult, PeerResult, WorkloadResult, paired_ratio, short
from fastddpm.bench.hardware import Machine
from fastddpm.files import write_text

ROWS = (
    ("mnist", 1, "fp32", "shipped digits (1.9 M), fp32, 1 picture"),
    ("mnist", 64, "fp32", "the same, 64 pictures"),
    ("cifar10", 1, "fp32", "CIFAR-10 U-Net (35.7 M), fp32, 1 picture"),
    ("cifar10", 8, "fp32", "the same, 8 pictures"),
    ("cifar10", 1, "bf16", "bf16, 1 picture"),
    ("cifar10", 8, "bf16", "the same, 8 pictures"),
    ("celebahq256", 1, "fp32", "CelebA-HQ-256 U-Net (113.7 M), fp32, 1 picture"),
    ("update", 1, "fp32", "the update alone, noise made inside, 1×3×32×32"),
)
COLUMNS = ("ms per step, medians", "fastddpm", "diffusers", "best other library", "against diffusers",
           "against the best")  # fmt: skip
GPU_COLUMNS = ("ms per step, medians", "fastddpm", "diffusers", "the same, reduce-overhead", "textbook",
               "against diffusers", "against reduce-overhead", "images/s at 1000 DDPM, 50 DDIM steps",
               "TFLOP/s (of the peak)")  # fmt: skip
NETWORKS = {"cifar10": "CIFAR-10 U-Net (35.7 M)", "celebahq256": "CelebA-HQ-256 U-Net (113.7 M)"}
_NAMES = {"torch": "PyTorch", "triton": "Triton", "diffusers": "diffusers", "onnxruntime": "ONNX Runtime",
          "onnxruntime-gpu": "ONNX Runtime", "openvino": "OpenVINO"}  # fmt: skip


def write(folder: Path, results: Sequence[WorkloadResult], machine: Machine, device: str) -> list[Path]:
    """Write table-cpu.md or table-gpu.md, if there is a row for it.

    Args:
        folder: where.
        results: of the workloads.
        machine: as `fastddpm.bench.hardware.describe` gives it.
        device: "cpu" or "cuda".

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    table = text(results, machine, device)
    if not table:
        return []
    path = folder / f"table-{'gpu' if device == 'cuda' else 'cpu'}.md"
    write_text(path, table)
    return [path]


def text(results: Sequence[WorkloadResult], machine: Machine, device: str) -> str:
    """The table and the line about the machine; "" where there is no row."""
    rows = gpu_rows(results) if device == "cuda" else cpu_rows(results)
    if not rows:
        return ""
    columns = GPU_COLUMNS if device == "cuda" else COLUMNS
    lines = [_row(columns), f"|{'---|' * len(columns)}", *map(_row, rows), "", sentence(results, machine, device)]
    return "\n".join(lines) + "\n"


def cpu_rows(results: Sequence[WorkloadResult]) -> list[tuple[str, ...]]:
    """A row for each of `ROWS` whose figures are there."""
    found = {result.name: result for result in results}
    rows: list[tuple[str, ...]] = []
    for name, batch, precision, title in ROWS:
        one = found[name].at(batch) if name in found else None
        ours = None if one is None else one.fastest(precision, ours=True)
        theirs = None if one is None else one.find("diffusers")
        if one is None or ours is None or theirs is None:
            continue
        best = None if name == "update" else _best(one, precision)
        note = " (`DDPMScheduler.step`)" if name == "update" else "" if precision == "fp32" else " in fp32"
        best_name = "" if best is None else f"{_ms(best)} ({LABELS[best.peer].removesuffix(', bf16')})"
        against_best = "" if best is None else _times(best, ours)
        engine = LABELS[ours.peer].split(", ")[1]  # a table of compiled steps: what is another says so
        mine = _ms(ours) if engine == "compiled" else f"{_ms(ours)} ({engine})"
        rows.append((title, mine, _ms(theirs) + note, best_name, _times(theirs, ours), against_best))
    return rows


def _best(one: BatchResult, precision: str) -> PeerResult | None:
    """The fastest other library with the same network; the pipeline of the next column and the textbook are none."""
    others = [peer for peer in one.peers if peer.peer not in ("diffusers", "diffusers-bf16", "reference")]
    return BatchResult(one.batch, one.steps, peers=others).fastest(precision, ours=False)


def gpu_rows(results: Sequence[WorkloadResult]) -> list[tuple[str, ...]]:
    """A row for each network, batch size and precision that ours was timed in."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        for one in result.batches:
            for precision in ("tf32", "bf16"):
                ours = one.fastest(precision, ours=True)
                if ours is None:
                    continue
                plain, reduced = (one.find(f"diffusers{mode}-{precision}") for mode in ("", "-reduced"))
                textbook = one.find(f"reference-{precision}")
                speeds = ", ".join(f"{speed:.3g}" for speed in ours.images_per_s.values())
                share = f" ({ours.of_peak.p50:.0%})" if ours.of_peak else ""
                rows.append((
                    f"{NETWORKS.get(result.name, result.name)}, {precision}, {one.batch}",
                    f"{_ms(ours)} ({LABELS[ours.peer].split(', ')[1]})", _ms(plain), _ms(reduced), _ms(textbook),
                    _times(plain, ours), _times(reduced, ours), speeds,
                    f"{ours.gflops.p50 / 1e3:.3g}{share}" if ours.gflops else "",
                ))  # fmt: skip
    return rows


def sentence(results: Sequence[WorkloadResult], machine: Machine, device: str) -> str:
    """The machine, the versions and the commit that the table holds for, in one line."""
    versions = ", ".join(f"{_NAMES[name]} {version}" for name, version in machine["versions"].items() if name in _NAMES)
    where = f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"
    more = "ratios are medians of pairs within the run"
    if device == "cuda":
        where = f"One {machine['gpu'] or machine['processor']}"
        peaks = [one for result in results for one in result.batches if one.peak_gflops]
        if peaks:
            products = ", ".join(f"{name} {v.p50 / 1e3:.3g} TFLOP/s" for name, v in peaks[-1].peak_gflops.items())
            copy = f", copy {peaks[-1].copy_gb_s.p50:.0f} GB/s" if peaks[-1].copy_gb_s else ""
            more += f"; matrix products in it: {products}{copy}"
        more += "; images per second are arithmetic from the time of a step"
    return f"{where}, {versions}; {machine['date'][:10]}, commit {machine['commit'] or 'unknown'}; {more}."


def _row(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _ms(peer: PeerResult | None) -> str:
    return "" if peer is None or peer.ms_per_step is None else short(peer.ms_per_step.p50)


def _times(theirs: PeerResult | None, ours: PeerResult) -> str:
    return "" if theirs is None else f"{paired_ratio(theirs.seconds, ours.seconds).p50:.2f}×"
