"""The switches ``--benchmark`` (or ``--benchmark-only``) and ``--device``, and what the results say of a machine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import tape
from fastddpm.bench.hardware import describe
from fastddpm.engines.devices import pick_device

_HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register ``--benchmark`` and ``--device``."""
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks, and only them (skipped otherwise)")
    parser.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where benchmarks run; auto, the default, is the GPU if there is one",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there, before anything is collected."""
    try:
        device_of(config)
    except ValueError as error:
        raise pytest.UsageError(f"--device: {error}") from error


def device_of(config: pytest.Config) -> str:
    """Where benchmarks run: "cpu" or "cuda"."""
    wanted: str = config.getoption("--device")
    return pick_device(None if wanted == "auto" else wanted).type


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the benchmarks without either switch; with one, leave out everything else."""
    timed = [item for item in items if _HERE in item.path.parents]
    if config.getoption("--benchmark") or config.getoption("--benchmark-only", default=False):
        others = [item for item in items if item not in timed]
        config.hook.pytest_deselected(items=others)
        items[:] = timed
        return
    for item in timed:
        item.add_marker(pytest.mark.skip(reason="a benchmark; run it with --benchmark"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where benchmarks run: "cpu" or "cuda"."""
    return device_of(request.config)


@pytest.fixture
def record(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Enters seconds that `fastddpm.bench` has measured, and whatever else belongs to them, into the results."""

    def enter(seconds: Sequence[float], **extra: Any) -> None:  # noqa: ANN401
        tape.TAPE.load(seconds)
        benchmark.extra_info.update(extra)
        benchmark.pedantic(tape.TAPE.play, rounds=len(seconds))  # type: ignore[no-untyped-call]

    return enter


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what a figure depends on: versions, threads, the GPU if there is one to the results file."""
    machine_info["fastddpm"] = {**describe(torch.get_num_threads()), "device": device_of(config)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add p20, p50 and p80 (seconds) to each result: with other work about, they say more than a mean."""
    for result in output_json["benchmarks"]:
        p20, p50, p80 = np.percentile(result["stats"]["data"], [20, 50, 80])
        result["stats"].update(p20=float(p20), p50=float(p50), p80=float(p80))
