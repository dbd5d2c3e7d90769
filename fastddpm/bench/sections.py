"""The measurements of a GPU in sections, each a function that returns JSON-ready values and a text for people.

`dry` runs a section in miniature on any machine: the same code on tiny sizes, compilers only tracing. Its figures say
nothing; that it runs is what it is for.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from fastddpm.bench import cases, kernels, profiling, report, runner, summary
from fastddpm.bench.entrants import COMPILES, LOW, precision_of
from fastddpm.bench.figures import PeerResult, WorkloadResult, as_json
from fastddpm.bench.hardware import describe
from fastddpm.bench.job import make_job
from fastddpm.bench.lineup import Lineup
from fastddpm.bench.peaks import Peaks
from fastddpm.bench.settings import Settings
from fastddpm.bench.workloads import ON_GPU, Workload
from fastddpm.common.wording import named
from fastddpm.engines.choose import EngineName
from fastddpm.sampler import Sampler

MINUTES = 5.0
ROUNDS = 9
SHARED_BY = 4
"""So many processes have a core at a time, of all that get ready: each begins with reading, and ends with waiting."""
TRACED = {"batch": 16, "steps": 50}
_DRY_UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8], "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "norm_num_groups": 4,
    "attention_head_dim": None,
}  # fmt: skip
_DRY_PEERS = ("reference", "fastddpm-eager", "fastddpm-eager-bf16", "diffusers", "diffusers-bf16",
              "diffusers-reduced-bf16", "fastddpm-graph-bf16")  # fmt: skip
DRY = (
    Workload("tiny", "a tiny network", (1, 2), (4, 2), _DRY_PEERS, unet=_DRY_UNET),
    Workload("tiny again", "in the second one's place", (1,), (2,), _DRY_PEERS[:3], unet=_DRY_UNET),
)
Say = Callable[[str], None]


class PeaksFound(TypedDict):
    """What `measure_peaks` finds."""

    device: str
    copy_gb_s: float
    product_gflop_s: dict[str, float]
    text: str


class KernelsFound(TypedDict):
    """What `measure_kernels` finds; a line for each case that failed."""

    device: str
    copy_gb_s: float
    cases: list[cases.CaseResult]
    failed: list[str]
    text: str


class StepsFound(TypedDict):
    """What `measure_steps` finds: results as JSON, a line for each peer that was left out, the README's table."""

    device: str
    networks: list[dict[str, Any]]
    left_out: list[str]
    table: str
    text: str


class CompiledAhead(TypedDict):
    """What `compile_ahead` did; `error` is "" where it compiled."""

    network: str
    peer: str
    batch: int
    seconds: float | None
    error: str


def networks(dry: bool = False, precisions: Sequence[str] = LOW) -> list[Workload]:
    """The networks whose steps are measured, with their peers of these precisions and of float32."""
    return [
        dataclasses.replace(one, peers=tuple(name for name in one.peers if precision_of(name) in ("fp32", *precisions)))
        for one in (DRY if dry else ON_GPU)
    ]


def measure_peaks(device: str, dry: bool = False) -> PeaksFound:
    """The fastest matrix products and a large copy."""
    precisions = ("fp32", "bf16") if torch.device(device).type == "cpu" else ("fp32", "tf32", "bf16")
    found = Peaks(device, dry).measure(precisions)
    copy = found.pop("copy")
    products = ", ".join(f"{name} {speed / 1e3:.3g} TFLOP/s" for name, speed in found.items())
    text = f"copy {copy:.0f} GB/s; matrix products: {products}\n"
    return {"device": device, "copy_gb_s": copy, "product_gflop_s": found, "text": text}


def measure_kernels(
    device: str, dry: bool = False, say: Say = lambda _: None, on_case: Callable[[KernelsFound], None] = lambda _: None
) -> KernelsFound:
    """The kernels beside what they replace; one that fails stops no other, and `on_case` is given what is known."""
    copy, found, failed = Peaks(device, dry).copy(), list[cases.CaseResult](), list[str]()

    def known() -> KernelsFound:
        text = f"copy {copy:.0f} GB/s\n\n{cases.table(found)}" + "".join(f"\nfailed: {line}" for line in failed)
        return {"device": device, "copy_gb_s": copy, "cases": found, "failed": failed, "text": text}

    for name, make in kernels.makers(device, dry).items():
        say(name)
        try:
            found.append(cases.measure(make(), device, cases.Effort.of(device, dry), copy))
        except Exception as error:  # whatever a compiler or a driver raises is a line in the report
            failed.append(f"{name}: {named(error)}")
        on_case(known())
    return known()


def measure_steps(
    device: str,
    chosen: Sequence[Workload],
    dry: bool = False,
    minutes: float = MINUTES,
    say: Say = lambda _: None,
    on_batch: Callable[[StepsFound], None] = lambda _: None,
) -> StepsFound:
    """A step of each network in all engines and precisions, beside the others.

    Peers get ready side by side; what is compiled anew is compiled then, unless `compile_ahead` has filled the caches.

    Args:
        device: "cpu" or "cuda".
        chosen: some of `networks`.
        dry: whether they are tiny.
        minutes: what has not begun by then is left out, with a line.
        say: is told what goes on.
        on_batch: is given what is known after each batch size, in the form of the result.
    """
    settings = _settings(device, dry, minutes)

    def on_event(workload: str, batch: int, peer: str, what: str) -> None:
        say(f"{workload}, B = {batch}: {peer or 'all'}: {what}")

    machine, results = describe(settings.threads), list[WorkloadResult]()

    def known(found: list[WorkloadResult]) -> StepsFound:
        text = report.markdown(found, machine, dataclasses.asdict(settings))
        rows = summary.text(found, machine, "cuda")
        return {
            "device": device, "networks": as_json(found), "left_out": runner.left_out(found), "table": rows,
            "text": f"{rows}\n{text}",
        }  # fmt: skip

    for result in runner.run(chosen, settings, on_event, lambda so_far, _: on_batch(known([*results, so_far]))):
        results.append(result)
    return known(results)


def compilations(dry: bool = False, precisions: Sequence[str] = LOW) -> list[tuple[str, str, int]]:
    """(network, peer, batch) of all that `measure_steps` compiles, for processes that compile side by side."""
    return [
        (workload.name, peer, batch)
        for workload in networks(dry, precisions)
        for batch in workload.batches
        for peer in workload.peers
        if peer in COMPILES
    ]


def compile_ahead(device: str, network: str, peer: str, batch: int, dry: bool = False) -> CompiledAhead:
    """Fill the compilers' caches with one of `compilations`."""
    (workload,) = (workload for workload in networks(dry) if workload.name == network)
    steps = workload.steps[workload.batches.index(batch)]
    settings = dataclasses.replace(_settings(device, dry), local=True)
    result = PeerResult(peer, precision_of(peer))
    with tempfile.TemporaryDirectory(prefix="fastddpm-bench-") as scratch:
        job = make_job(workload, Path(scratch), threads=settings.threads, device=device, steps_only=True, dry=dry)
        with Lineup(job, Path(scratch), settings) as lineup:
            lineup.make_ready(result, batch, steps, settings.allowance_s)
    return {"network": network, "peer": peer, "batch": batch, "seconds": result.ready_s, "error": result.note}


def take_apart(device: str, folder: Path, dry: bool = False) -> dict[str, object]:
    """Profile steps of the first network in bf16, on a GPU a graph's replays; the trace is folder/chrome_trace.json.

    Returns:
        The fields of `Profile`, "engine" and "text".
    """
    on_gpu = torch.device(device).type == "cuda"
    batch, steps = (2, 4) if dry else (TRACED["batch"], TRACED["steps"])
    with tempfile.TemporaryDirectory(prefix="fastddpm-bench-") as scratch:
        job = make_job(networks(dry)[0], Path(scratch), threads=torch.get_num_threads(), device=device)
        engine: EngineName = "cuda_graph" if on_gpu else "eager"
        sampler = Sampler.from_pretrained(job.model, device=device, engine=engine, precision="bf16")
        found = profiling.trace(sampler, folder / "chrome_trace.json", batch=batch, steps=steps, steps_only=True)
    lines = [f"| {kernel.name} | {kernel.calls:g} | {kernel.ms:.3g} | {kernel.share:.1%} |" for kernel in found.kernels]
    text = "\n".join((
        f"{sampler.engine.used}, B = {batch}: {found.launches:g} launches and {found.busy_ms:.3g} ms of kernels in a "
        f"step of {found.wall_ms:.3g} ms; convolutions are {found.convolutions:.0%} of them; the host is done after "
        f"{found.host_ms:.3g} ms a step.", "",
        "| kernel | calls per step | ms per step | share |", "|---|---|---|---|", *lines, "",
    ))  # fmt: skip
    return {**dataclasses.asdict(found), "engine": sampler.engine.used, "batch": batch, "text": text}


def _settings(device: str, dry: bool, minutes: float = MINUTES) -> Settings:
    cores = torch.get_num_threads()
    return Settings(
        60 * minutes, 3 if dry else ROUNDS, max(1, cores // SHARED_BY), device, rounds_s=8.0, looks=False,
        side_by_side=cores, steps_only=True, dry=dry,
    )  # fmt: skip
