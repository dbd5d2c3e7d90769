"""What `advance` runs on: the device and, for people, what the machine offers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform

import torch

from fastddpm.kernels._triton import runs_triton


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
        precision: the arithmetic of the network.
        engine: how `advance` runs.
        update: which implementation of the fused update runs.
        threads: CPU threads that PyTorch uses.
        versions: of what the result depends on.
    """

    device: str
    precision: str
    engine: str
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
    # cuDNN's convolutions take TF32 for float32 unless PyTorch is told otherwise.
    reduced = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    versions = {"python": platform.python_version()}
    for package in ("fastddpm", "torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Machine(
        device=name,
        precision="fp32 (convolutions in TF32)" if reduced else "fp32",
        engine="eager",
        update="Triton kernel" if runs_triton(device.type) else "PyTorch",
        threads=torch.get_num_threads(),
        versions=versions,
    )
