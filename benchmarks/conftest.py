"""The ``--benchmark`` switch (``--benchmark-only`` does the same), and what the results say besides seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastddpm.bench.machine import describe

_HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register ``--benchmark``."""
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks, and only them (skipped otherwise)")


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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what a figure depends on: versions, threads, the GPU if there is one to the results file."""
    machine_info["fastddpm"] = describe(torch.get_num_threads())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add p20, p50 and p80 (seconds) to each result: with other work about, they say more than a mean."""
    for result in output_json["benchmarks"]:
        p20, p50, p80 = np.percentile(result["stats"]["data"], [20, 50, 80])
        result["stats"].update(p20=float(p20), p50=float(p50), p80=float(p80))
