"""What the machine offers, and what is known of it: the device, where compiled steps are kept, what they take."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform

import torch

from fastddpm.engines.cache import cache_folder, no_cache, packages
from fastddpm.engines.measured import remembered
from fastddpm.engines.no_gpu import why_no_gpu
from fastddpm.kernels.dispatch import runs_triton


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device to sample on.

    Args:
        device: a device or its name; None takes the first GPU, or the CPU if there is none.

    Returns:
        The device.

    Raises:
        ValueError: the name is unknown or the device is not there; says why, where that is known.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}; see `fastddpm info`") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}; see `fastddpm info`")
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if (chosen.index or 0) >= count:
        fix = (why_no_gpu() if count == 0 else "") or "use cpu"
        raise ValueError(f"device must be there, got {device!r}, but this machine has {count} GPUs; {fix}")
    return chosen


@dataclasses.dataclass(frozen=True)
class Machine:
    """What sampling would use here.

    Attributes:
        device: the device that `pick_device(None)` takes, with its name.
        precision: the arithmetic of the network, unless another is asked for.
        engine: how steps run, unless another is asked for.
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
    wanted = ("fastddpm", "torch", "triton")
    return Machine(
        device=name,
        precision="fp32",
        engine="auto: the quickest that is there, or that the run earns the time for",
        cache=_describe_cache(),
        update="Triton kernel" if runs_triton(device.type) else "PyTorch",
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), **dict.fromkeys(wanted, "not installed"), **versions(*wanted)},
    )


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _describe_cache() -> str:
    problem = no_cache()
    if problem:
        return f"none: {problem}"
    sizes = [file.stat().st_size for file in packages().values()]
    return f"{cache_folder()} ({len(sizes)} compiled steps, {sum(sizes) / 1e6:.0f} MB)"


def describe_choices(weights: str) -> dict[str, str]:
    """What `auto` knows of a network: for each batch and device that was measured, what it takes and why.

    Args:
        weights: the network's `weights_hash`.
    """
    times: dict[str, dict[str, float]] = {}
    gone, there = set(), packages()
    for name, measured in remembered().items():
        if name.startswith(weights[:8]) and measured.compiled_ms is not None:
            times.setdefault(measured.label, {}).update(
                {"eager": measured.eager_ms, measured.engine: measured.compiled_ms}
            )
            if measured.engine == "compiled" and name not in there:
                gone.add(measured.label)
    return {label: _choice(known, label in gone) for label, known in times.items()}


def _choice(times: dict[str, float], is_gone: bool) -> str:
    (first, ms), *others = sorted(times.items(), key=lambda item: item[1])
    text = ", ".join([f"{ms:.3g} ms a step {first}", *(f"{ms:.3g} {name}" for name, ms in others)])
    return f"{first}: {text}{', not compiled at present' if is_gone else ''}"
