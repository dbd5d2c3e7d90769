"""What a program has set for all of PyTorch must not change pictures: it is put aside while samples are drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastddpm.engines.modules import modules_of
from fastddpm.engines.precision import Precision


@contextlib.contextmanager
def undisturbed(network: nn.Module, precision: Precision, device: torch.device) -> Iterator[None]:
    """In the block, neither gradients, inference mode, autocast, a default device or dtype nor training mode count.

    Float32 on GPUs means float32, or TF32 where `precision` says so. Afterwards all is as before.

    Args:
        network: put in evaluation mode.
        precision: the network's arithmetic.
        device: where it runs.
    """
    training = [module for module in modules_of(network) if module.training]
    with settings_aside(precision, device):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def settings_aside(precision: Precision, device: torch.device) -> Iterator[None]:
    """The same but for training mode, where no network runs: to look at all its modules takes a while."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        # What is made in inference mode could not be changed outside, and the book's rows outlive a call.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if device.type == "cuda":
            stack.enter_context(float32_kernels(precision))
        yield


@contextlib.contextmanager
def float32_kernels(precision: Precision) -> Iterator[None]:
    """In the block, float32 on GPUs means float32, or TF32 where `precision` says so; afterwards all is as before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
