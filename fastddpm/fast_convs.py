"""Which of a network's convolutions run quicker by Winograd's algorithm here: found out by measuring each."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.kernels._native import NativeError
from fastddpm.kernels.winograd import fits, pack, winograd_conv

_LEAST_PIXELS = 256
"""Pixels of all pictures together, below which reading the larger weights costs more than is saved."""
_MARGIN = 0.95  # Winograd must take at most this part of the direct time
_PASSES = 5
_DTYPES = (torch.float32, torch.bfloat16)


class WinogradConv2d(nn.Module):
    """A 3×3 convolution with stride 1 and padding 1 by Winograd's F(4×4, 3×3)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take the weights of a convolution."""
        super().__init__()
        self.register_buffer("packed", pack(conv.weight))
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, O, H, W]."""
        return winograd_conv(x, self.get_buffer("packed"), self.get_buffer("bias"))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution that could run either way, and what it took.

    Attributes:
        name: the module's name.
        shape: of its input.
        direct_ms: the direct convolution, weights packed.
        winograd_ms: Winograd's.
    """

    name: str
    shape: tuple[int, ...]
    direct_ms: float
    winograd_ms: float

    @property
    def use_winograd(self) -> bool:
        """Whether Winograd's is clearly quicker."""
        return self.winograd_ms < _MARGIN * self.direct_ms


def with_fast_convs(network: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[nn.Module, list[Layer]]:
    """A network whose convolutions run the quicker way for one batch size.

    Args:
        network: float32 or bfloat16, on the CPU; it stays as it is, and the result shares its weights.
        run: calls a network once with a batch of the size that it is meant for.

    Returns:
        The network to use, which is `network` itself where nothing is gained, and what was measured.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and _is_candidate(module):
            hooks.append(module.register_forward_pre_hook(_note(shapes, name)))
    try:
        if hooks:
            run(network)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = {name: shape for name, shape in shapes.items() if shape[0] * shape[2] * shape[3] >= _LEAST_PIXELS}
    layers = _measure(network, shapes)
    chosen = [layer.name for layer in layers if layer.use_winograd]
    if not chosen:
        return network, layers
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    changed = copy.deepcopy(network, shared)
    for name in chosen:
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        changed.set_submodule(name, WinogradConv2d(conv))
    return changed, layers


def _is_candidate(conv: nn.Conv2d) -> bool:
    plain = (conv.kernel_size, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
    if not plain or conv.padding != (1, 1) or conv.weight.dtype not in _DTYPES or conv.weight.device.type != "cpu":
        return False
    try:
        return fits(conv.in_channels, conv.out_channels)
    except NativeError:  # without a C compiler the direct convolutions do
        return False


def _note(shapes: dict[str, tuple[int, ...]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape)

    return hook


def _measure(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
    """Time all layers one after the other, as in a step, so that the weights are as cold as they are there."""
    inputs: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
    direct: dict[str, Callable[[], Any]] = {}
    winograd: dict[str, Callable[[], Any]] = {}
    for name, shape in shapes.items():
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        key = (shape, conv.weight.dtype)
        if key not in inputs:
            inputs[key] = torch.randn(shape).to(conv.weight.dtype, memory_format=torch.channels_last)
        direct[name] = _direct(conv, inputs[key])
        winograd[name] = _winograd(WinogradConv2d(conv), inputs[key])
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in shapes}
    with torch.no_grad():
        for i in range(_PASSES + 1):
            for kind, functions in enumerate((direct, winograd)):
                for name, function in functions.items():
                    began = time.perf_counter()
                    function()
                    if i > 0:
                        times[name][kind].append(1000 * (time.perf_counter() - began))
    return [Layer(name, shape, *(_median(kind) for kind in times[name])) for name, shape in shapes.items()]


def _direct(conv: nn.Conv2d, x: Tensor) -> Callable[[], Any]:
    """The direct convolution as compiled code calls it, with weights in the processor's own layout."""
    same, one = [1, 1], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), same, one, one, 1, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise
    bias = None if conv.bias is None else conv.bias.detach()
    return lambda: call(x, packed, bias, same, one, one, 1, "none", [], "")


def _winograd(conv: WinogradConv2d, x: Tensor) -> Callable[[], Any]:
    return lambda: conv(x)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
