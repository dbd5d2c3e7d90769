"""Which GPU there is, or what is wrong with it, and what to do about it: one line each."""

from __future__ import annotations

import re

import torch

from fastddpm.common.wording import first_line
from fastddpm.engines.no_gpu import why_no_gpu

LEAST_FREE = 2 << 30
"""Bytes that must be free on a GPU for a network of moderate size and its pictures."""
BF16_FROM = (8, 0)
"""The first compute capability with bfloat16, and the first that Triton supports."""


class ProblemError(RuntimeError):
    """Something is not as it should be; the message is one line that says what, and what to do."""


def check_device(device: torch.device) -> str:
    """The device with what people should know about it.

    Raises:
        ProblemError: the machine has a GPU that cannot be used as it is.
    """
    if device.type == "cuda":
        return about_gpu(device)
    why = why_no_gpu()
    threads = f"cpu, {torch.get_num_threads()} threads"
    if why:
        raise ProblemError(f"{threads}, though {why}")
    if torch.cuda.is_available():
        return f"{threads}; there is a GPU, which --device cuda takes"
    return f"{threads}; there is no GPU, sampling runs on the CPU"


def about_gpu(device: torch.device) -> str:
    """A GPU's name, memory and what is special about it.

    Raises:
        ProblemError: it is full, or torch has no code for it.
    """
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    hip = torch.version.hip
    kind = f"ROCm {hip}" if hip else f"sm_{major}{minor}, CUDA {torch.version.cuda}"
    parts = [f"{device} ({name}, {kind}), {_memory(device, name)}"]
    if hip:
        parts.append("kernels are compiled by Triton for AMD; CUDA graphs are HIP's")
    else:
        _check_code(name, major, minor)
        if (major, minor) < BF16_FROM:
            parts.append(
                f"older than sm_{BF16_FROM[0]}{BF16_FROM[1]}: it has no bf16, use --precision fp32 or fp16, and Triton "
                "does not promise to support it, use --engine eager where compiling fails"
            )
    count = torch.cuda.device_count()
    if count > 1:
        parts.append(f"{count} GPUs: one is used, --device cuda:N says which")
    return "; ".join(parts)


def _memory(device: torch.device, name: str) -> str:
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        reason = first_line(error)
        raise ProblemError(f"{device} ({name}): its memory cannot be used ({reason}); {_ELSEWHERE}") from error
    if free < LEAST_FREE:
        raise ProblemError(
            f"{device} ({name}) is full: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free; {_ELSEWHERE}"
        )
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


_ELSEWHERE = "end what uses it (nvidia-smi lists it), take another one (--device cuda:N), or sample with --device cpu"


def _check_code(name: str, major: int, minor: int) -> None:
    """Whether this build of torch has code that the GPU runs: of its generation, or to be compiled by the driver."""
    codes = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", code) for code in torch.cuda.get_arch_list()]
    known = [(code[1], int(code[2]), int(code[3])) for code in codes if code]
    runs = any(
        (kind == "sm" and at == major and sub <= minor) or (kind == "compute" and (at, sub) <= (major, minor))
        for kind, at, sub in known
    )
    if known and not runs:
        raise ProblemError(
            f"torch {torch.__version__} has no code for {name} (sm_{major}{minor}); "
            "install a build of torch that names it (pytorch.org/get-started), or sample with --device cpu"
        )
