"""`fastddpm bench`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.terminal import clean, say

if TYPE_CHECKING:
    from fastddpm.bench.figures import WorkloadResult
    from fastddpm.bench.live import View
    from fastddpm.bench.memory import MemoryCurve
    from fastddpm.bench.runner import Settings
    from fastddpm.bench.workloads import Workload

PICTURES = {"full": 10_000, "quick": 1_000}
MEMORY_S = 90.0


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, as for `fastddpm sample`. [default: the project's own workloads]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of up to fifteen.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for JSON, tables and plots.")] = Path("bench"),
    workloads: Annotated[
        str | None,
        typer.Option(help="Some of `update,mnist,cifar10,celebahq256,memory`. [default: all; --quick fewer]"),
    ] = None,
    batches: Annotated[str | None, typer.Option(help="With MODEL: batch sizes, as in `1,8`.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every peer. [default: all cores]")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the networks run.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="About how long the run may take. [default: 15; --quick 2; --cold twice that]")
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Start compilers with empty caches, for compile times; takes twice as long.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead: write a Chrome trace and show the ten dearest kernels.")
    ] = False,
    engine: Annotated[
        Literal["auto", "eager", "compiled", "cuda_graph"], typer.Option(help="With --profile: what runs.")
    ] = "eager",
    flag: FlagOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No tables, only files.")] = False,
) -> None:
    """Measure fastddpm beside the libraries that it can replace, on this machine.

    Every peer draws the same pictures from the same noise before it is timed; a missing package is skipped with a line.

    Examples:
    - `fastddpm bench --quick`

    - `fastddpm bench google/ddpm-cifar10-32 --batches 1,8 --out bench-cifar10`

    - `fastddpm bench mnist --profile`
    """
    from fastddpm.bench.runner import Settings, default_threads  # late, for --help: see `sample`
    from fastddpm.files import check_writable

    flags = parse_flags(flag)
    sizes = _integers(batches)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}; leave it out for all cores")
    if minutes is not None and not 0.1 <= minutes <= 24 * 60:
        raise ValueError(f"--minutes must be in 0.1 … 1440, got {minutes:g}; leave it out for the usual time")
    if model is None and (flags or sizes):
        raise ValueError("--flag and --batches must come with a MODEL, got none; name one")
    if model is not None and workloads is not None:
        raise ValueError("--workloads must be left out with a MODEL, got both; leave one out")
    check_writable(out)
    if profile:
        _profile(model or "mnist", flags, out, sizes[0] if sizes else 1, engine, device, threads)
        return
    chosen, with_memory = _choose(model, flags, sizes, workloads, quick)
    settings = Settings.of(quick, threads or default_threads(), device, cold, minutes)
    _measure(chosen, settings, out, PICTURES["quick" if quick else "full"] if with_memory else 0, quiet)


def _choose(
    model: str | None, flags: dict[str, object], sizes: list[int], workloads: str | None, quick: bool
) -> tuple[list[Workload], bool]:
    """The workloads, and whether memory is watched too."""
    from fastddpm.bench import workloads as known
    from fastddpm.checkpoints import load_checkpoint

    if model is not None:
        load_checkpoint(model, **flags)  # before anything else: what is wrong with it is said in one line
        return [known.for_model(model, flags, sizes, quick)], False
    names = [] if workloads is None else [name.strip() for name in workloads.split(",")]
    others = [name for name in names if name != "memory"]
    return ([] if names and not others else known.choose(others, quick)), not names or "memory" in names


def _measure(chosen: list[Workload], settings: Settings, out: Path, pictures: int, quiet: bool) -> None:
    from rich.console import Console

    from fastddpm.bench import bars, plots, report, runner
    from fastddpm.bench.live import WIDE, View
    from fastddpm.bench.machine import describe

    machine = describe(settings.threads)
    facts: dict[str, Any] = {**dataclasses.asdict(settings), "workloads": [workload.name for workload in chosen]}
    results: list[WorkloadResult] = []
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    with View(console, quiet) as view:
        view.say(f"{machine['processor']}, {settings.threads} threads; commit {machine['commit'] or 'unknown'}")
        for result in runner.run(chosen, settings, view.on_event, view.on_result):
            results.append(result)
            if result.note:
                view.say(f"skipped {result.name}: {result.note}")
            report.write(out, results, machine, facts)  # a run that is stopped leaves what was measured
        curve = _memory(pictures, view) if pictures else None
        written = report.write(out, results, machine, facts, curve)
        try:
            written += plots.draw_all(out, results, curve)
        except ImportError as error:
            view.say(f"skipped plots: {error}")
        view.bars(bars.judge(results))
        view.say(f"wrote {', '.join(path.name for path in written)} to {out}/")


def _memory(pictures: int, view: View) -> MemoryCurve | None:
    from fastddpm.bench import memory

    with tempfile.TemporaryDirectory(prefix="fastddpm-bench-") as scratch:
        model = memory.tiny_model(Path(scratch) / "tiny")
        try:
            curve = memory.watch(
                model, Path(scratch) / "pictures", pictures, timeout_s=MEMORY_S,
                on_sample=lambda n, size: view.on_event("memory", 0, "pictures", f"{n:,}: {size / 1e6:.0f} MB"),
            )  # fmt: skip
        except (ImportError, RuntimeError) as error:
            view.say(f"skipped memory: {error}")
            return None
    view.say(curve.sentence())
    return curve


def _profile(
    model: str, flags: dict[str, object], out: Path, batch: int, engine: str, device: str, threads: int | None
) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from fastddpm.bench.profiling import trace
    from fastddpm.sampler import Sampler

    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"engine": engine, **flags}
    sampler = Sampler.from_pretrained(model, device=device, **options)
    path = out / "trace.json"
    kernels = trace(sampler, path, batch=batch, steps=10)
    table = Table("kernel", "calls per step", "ms per step", "share", title=clean(f"{model}, B = {batch}, {engine}"))
    for kernel in kernels:
        table.add_row(kernel.name, f"{kernel.calls:g}", f"{kernel.ms:.3g}", f"{kernel.share:.1%}")
    Console(highlight=False, markup=False).print(table)
    say(f"wrote {path}; open it in ui.perfetto.dev or chrome://tracing")


def _integers(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 4096 for part in parts):
        raise ValueError(f"--batches must be whole numbers in 1 … 4096 with commas, got {text!r}; write 1,8, say")
    return [int(part) for part in parts]
