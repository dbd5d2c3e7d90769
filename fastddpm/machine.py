"""What the machine offers, and what is known of it: the device, where compiled steps are kept, what they take."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastddpm.compiled import packages
from fastddpm.kernels._dispatch import runs_triton
from fastddpm.kernels._native import cache_folder
from fastddpm.measured import remembered


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device to sample on.

    Args:
        device: a device or its name; None takes the first GPU, or the CPU if there is none.

    Returns:
        The device.

    Raises:
        ValueError: the name is unknown or the device is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}; see `fastddpm info`") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}; see `fastddpm info`")
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if (chosen.index or 0) >= count:
        raise ValueError(f"device must be there, got {device!r}, but this machine has {count} GPUs; use cpu")
    return chosen


@dataclasses.dataclass(frozen=True)
class Machine:
    """What sampling would use here.

    Attributes:
        device: the device that `pick_device(None)` takes, with its name.
        precision: the arithmetic of the network, unless another is asked for.
        engine: how `advance` runs, unless another is asked for.
        cache: where compiled steps are kept, and how many there are.
        update: which implementation of the fused update runs.
        threads: CPU threads that PyTorch uses.
        versions: of what the result depends on.
    """

    device: str
    precision: str
    engine: str
    cache: str
    update: str
    threads: int
    versions: dict[str, str]


def describe_machine() -> Machine:
    """What sampling would use on this machine."""
    device = pick_device(None)
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        name = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    versions = {"python": platform.python_version()}
    for package in ("fastddpm", "torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Machine(
        device=name,
        precision="fp32",
        engine="auto: compiled steps, where they are there or the run earns the time to compile",
        cache=_describe_cache(),
        update="Triton kernel" if runs_triton(device.type) else "PyTorch",
        threads=torch.get_num_threads(),
        versions=versions,
    )


def _describe_cache() -> str:
    files = packages(cache_folder())
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{cache_folder()} ({len(files)} compiled steps, {size:.0f} MB)"


def describe_choices(weights: str) -> dict[str, str]:
    """What `auto` knows of a network: for each batch and device that was measured, what it takes and why.

    Args:
        weights: the network's `weights_hash`.
    """
    lines = {}
    for name, measured in remembered().items():
        if name.startswith(weights[:8]) and measured.compiled_ms is not None:
            choice = "compiled" if measured.compiled_ms < measured.eager_ms else "eager"
            kept = "" if Path(cache_folder(), f"{name}.pt2").exists() else ", not compiled at present"
            lines[measured.label] = (
                f"{choice}: {measured.compiled_ms:.3g} ms a step compiled, {measured.eager_ms:.3g} eager{kept}"
            )
    return lines
