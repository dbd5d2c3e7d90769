"""The checks: what is looked at, where, and how one that fails is told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator

import torch

from fastddpm.common.wording import first_line, named
from fastddpm.doctor import engines, gpu, installation, kernels
from fastddpm.doctor.surroundings import ProblemError, check_device
from fastddpm.kernels import amx_conv


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_matrix_unit(device: torch.device) -> bool:
    return _on_cpu(device) and amx_conv.is_there()


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that is looked at.

    Attributes:
        name: for people and programs.
        function: is given the device; returns what it found, in one line, or raises.
        applies: whether there is something to look at on a device.
    """

    name: str
    function: Callable[[torch.device], str]
    applies: Callable[[torch.device], bool] = lambda _: True


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a check.

    Attributes:
        check: its name.
        ok: whether all was well.
        seconds: that it took.
        detail: what was found, in one line.
    """

    check: str
    ok: bool
    seconds: float
    detail: str


CHECKS = (
    Check("versions", installation.check_versions),
    Check("device", check_device),
    Check("compilers", installation.check_compilers),
    Check("cache", installation.check_cache),
    Check("noise", kernels.check_noise),
    Check("p_sample", kernels.check_p_sample),
    Check("q_sample", kernels.check_q_sample),
    Check("add_group_norm", kernels.check_add_group_norm),
    Check("winograd", kernels.check_winograd, _on_cpu),
    Check("amx_conv", kernels.check_amx_conv, _on_matrix_unit),
    Check("amx_attention", kernels.check_amx_attention, _on_matrix_unit),
    Check("engine eager", engines.check_eager),
    Check("one graph", engines.check_one_graph, _on_cpu),
    Check("engine compiled", engines.check_compiled),
    Check("engine openvino", functools.partial(engines.check_library, "openvino"), _on_cpu),
    Check("engine onnx", functools.partial(engines.check_library, "onnx"), _on_cpu),
    Check("engine cuda_graph", gpu.check_cuda_graph, _on_gpu),
    Check("no waiting", gpu.check_no_waiting, _on_gpu),
    Check("launches", gpu.check_launches, _on_gpu),
    Check("copy", gpu.check_copy, _on_gpu),
    *(
        Check(f"speed of {name}", functools.partial(gpu.check_speed, name), _on_gpu)
        for name in ("p_sample", "q_sample", "add_group_norm")
    ),
)
"""In the order in which they are made; what they need of each other comes first."""


def examine(
    device: torch.device, *, leave_out: Collection[str] = (), say: Callable[[str], None] = lambda _: None
) -> Iterator[Result]:
    """Make the checks that apply to a device, one after the other; one that fails stops no other.

    Args:
        device: where.
        leave_out: names of checks that are not made.
        say: is told the name of each check before it is made.

    Yields:
        What came of each.
    """
    for check in CHECKS:
        if check.name not in leave_out and check.applies(device):
            say(check.name)
            yield _result(check, device)


def _result(check: Check, device: torch.device) -> Result:
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    began = time.perf_counter()
    try:
        with here, torch.no_grad():
            ok, detail = True, check.function(device)
    except Exception as error:  # whatever a compiler, a driver or a library raises is what is looked for
        ok, detail = False, _reason(error)
    return Result(check.name, ok, round(time.perf_counter() - began, 3), detail)


def _reason(error: Exception) -> str:
    return first_line(error, 300) if isinstance(error, ProblemError) else named(error, 300)
