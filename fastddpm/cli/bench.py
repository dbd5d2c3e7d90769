"""`fastddpm bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastddpm.cli.errors import Stopped
from fastddpm.cli.flags import FlagOption, parse_flags
from fastddpm.common.terminal import clean, say

if TYPE_CHECKING:
    from fastddpm.bench.figures import BatchResult, WorkloadResult
    from fastddpm.bench.live import View
    from fastddpm.bench.memory import MemoryCurve
    from fastddpm.bench.settings import Settings
    from fastddpm.bench.workloads import Workload
    from fastddpm.engines.choose import EngineName

PICTURES = {"full": 5_000, "quick": 1_000}
MEMORY_S = 90.0
LEFT_OUT = 1
"""The exit code where --strict finds that somebody was left out."""


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, as for `fastddpm sample`. [default: the project's own workloads]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three minutes instead of up to twenty.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for JSON, tables and plots.")] = Path("bench"),
    workloads: Annotated[
        str | None,
        typer.Option(help="Some of `cifar10,mnist,update,celebahq256,memory`. [default: all; --quick, GPUs: fewer]"),
    ] = None,
    batches: Annotated[str | None, typer.Option(help="With MODEL: batch sizes, as in `1,8`.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every peer. [default: all cores]")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where the networks run; auto: on the GPU if there is one.")
    ] = "auto",
    minutes: Annotated[
        float | None, typer.Option(help="About how long the run may take. [default: 20; --quick 3]")
    ] = None,
    allowance: Annotated[
        float, typer.Option(help="Seconds that a peer gets at each batch size to start, load, compile and draw.")
    ] = 300.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 where a peer was left out, for whatever reason.")
    ] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Start compilers with empty caches, for compile times.")] = False,
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

    Every peer, in a process of its own, draws the same pictures from the same noise before it is timed. One that is
    left out, because a package is missing or the time is up, is named with the reason.

    Examples:
    - `fastddpm bench --quick`

    - `fastddpm bench google/ddpm-cifar10-32 --batches 1,8 --out bench-cifar10`

    - `fastddpm bench mnist --profile`
    """
    import torch  # late, for --help: see `sample`

    from fastddpm.bench.settings import Settings, default_threads
    from fastddpm.engines.devices import pick_device
    from fastddpm.files import check_writable

    flags = parse_flags(flag)
    sizes = _integers(batches)
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}; leave it out for all cores")
    if minutes is not None and not 0.1 <= minutes <= 24 * 60:
        raise ValueError(f"--minutes must be in 0.1 … 1440, got {minutes:g}; leave it out for the usual time")
    if not 1 <= allowance <= 24 * 3600:
        raise ValueError(f"--allowance must be in 1 … 86400 seconds, got {allowance:g}; leave it out for 300")
    if model is None and (flags or sizes):
        raise ValueError("--flag and --batches must come with a MODEL, got none; name one")
    if model is not None and workloads is not None:
        raise ValueError("--workloads must be left out with a MODEL, got both; leave one out")
    kind = pick_device(None if device == "auto" else device).type
    check_writable(out)
    if profile:
        if threads is not None:
            torch.set_num_threads(threads)
        _profile(model or "mnist", flags, out, sizes[0] if sizes else 1, engine, kind)
        return
    chosen, with_memory = _choose(model, flags, sizes, workloads, quick, kind)
    settings = Settings.of(quick, threads or default_threads(), kind, cold, minutes, allowance)
    missed = _measure(chosen, settings, out, PICTURES["quick" if quick else "full"] if with_memory else 0, quiet)
    if strict and missed:
        print(f"fastddpm: --strict: {len(missed)} left out, the first: {missed[0]}", file=sys.stderr)
        raise typer.Exit(LEFT_OUT)


def _choose(
    model: str | None, flags: dict[str, object], sizes: list[int], workloads: str | None, quick: bool, device: str
) -> tuple[list[Workload], bool]:
    """The workloads, and whether memory is watched too."""
    from fastddpm.bench import workloads as known
    from fastddpm.checkpoints import load_checkpoint

    if model is not None:
        load_checkpoint(model, **flags)  # before anything else: what is wrong with it is said in one line
        return [known.for_model(model, flags, sizes, quick, device)], False
    names = [] if workloads is None else [name.strip() for name in workloads.split(",")]
    others = [name for name in names if name != "memory"]
    with_memory = "memory" in names or not (names or quick or device != "cpu")
    return ([] if names and not others else known.choose(others, quick, device)), with_memory


def _measure(chosen: list[Workload], settings: Settings, out: Path, pictures: int, quiet: bool) -> list[str]:
    """Measure, show and write; returns a line for each peer that was left out."""
    from rich.console import Console

    from fastddpm.bench import bars, plots, report, runner, summary
    from fastddpm.bench.hardware import describe
    from fastddpm.bench.live import WIDE, View

    machine = describe(settings.threads)
    facts: dict[str, object] = {**dataclasses.asdict(settings), "workloads": [workload.name for workload in chosen]}
    results: list[WorkloadResult] = []
    kept: list[Path] = []
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    with View(console, quiet) as view:

        def on_result(workload: WorkloadResult, one: BatchResult) -> None:
            view.on_result(workload, one)
            kept.extend(report.write(out, [*results, workload], machine, facts))  # in case the run is stopped

        view.say(f"{machine['processor']}, {settings.threads} threads; commit {machine['commit'] or 'unknown'}")
        view.say(settings.sentence())
        try:
            with contextlib.closing(runner.run(chosen, settings, view.on_event, on_result)) as run:
                for result in run:
                    results.append(result)
                    if result.note:
                        view.say(f"not measured: {result.name}: {result.note}")
            curve = _memory(pictures, view) if pictures else None
        except KeyboardInterrupt:
            raise Stopped(f"; what was measured by then is in {out}/" if kept else "") from None
        written = report.write(out, results, machine, facts, curve)
        written += summary.write(out, results, machine, settings.device)
        try:
            written += plots.draw_all(out, results, curve)
        except ImportError as error:
            view.say(f"skipped plots: {error}")
        view.bars(bars.judge(results, settings.device))
        view.say(f"wrote {', '.join(path.name for path in written)} to {out}/")
    return runner.left_out(results)


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


def _profile(model: str, flags: dict[str, object], out: Path, batch: int, engine: EngineName, device: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastddpm.bench.profiling import trace
    from fastddpm.sampler import Sampler

    sampler = Sampler.from_pretrained(model, device=device, engine=engine, flags=flags)
    path = out / "trace.json"
    found = trace(sampler, path, batch=batch, steps=10)
    table = Table("kernel", "calls per step", "ms per step", "share", title=clean(f"{model}, B = {batch}, {engine}"))
    for kernel in found.kernels:
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
