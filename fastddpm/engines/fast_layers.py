"""Which of a network's layers run quicker another way here, found out by measuring each.

Convolutions may go by Winograd's algorithm, and attention by two plain matrix products; in bfloat16 both, and linear
layers, on tiles of a matrix unit, where a convolution takes over the upsampling that it is behind.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastddpm.kernels import amx_conv, winograd
from fastddpm.kernels.native import NativeError
from fastddpm.nets.blocks import Attention

_LEAST_PIXELS = 256
"""Pixels of all pictures together, below which reading Winograd's larger weights costs more than is saved."""
_LEAST_PICTURE = 49
"""Pixels of a picture that are enough, however few pictures there are: of a 7×7 map hardly a tile is wasted."""
_MARGIN = 0.95  # the other way must take at most this part of the usual one's time
_PASSES = 25
_LONG_S = 3.0  # of measuring, after which fewer passes must do, but at least two
_DTYPES = (torch.float32, torch.bfloat16)


class PackedLayer(nn.Module):
    """A 3×3 convolution with stride 1 and padding 1, by Winograd's F(4×4, 3×3) or on tiles of a matrix unit.

    On tiles it may be a 1×1 convolution as well, a linear layer of rows, or double the pictures first.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, behind_upsampling: bool = False) -> None:
        """Take the weights of a layer that `_is_candidate`; on tiles it takes over an upsampling that it is behind."""
        super().__init__()
        self.tiled = _is_for_tiles(layer)
        self.doubles = self.tiled and behind_upsampling
        weight = amx_conv.weights_behind_upsampling(layer.weight) if self.doubles else layer.weight
        self.register_buffer("packed", amx_conv.pack(weight) if self.tiled else winograd.pack(weight))
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, O, H, W], or [B, O, 2H, 2W] if it doubles, or rows [B, N, C] to [B, N, O]."""
        if x.ndim == 3:
            return torch.as_tensor(self(as_pictures(x))).squeeze(3).transpose(1, 2)
        run = amx_conv.amx_conv if self.tiled else winograd.winograd_conv
        return run(x, self.get_buffer("packed"), self.get_buffer("bias"))

    def as_called(self, x: Tensor) -> Callable[[], object]:
        """A call for x as a compiled step makes it."""
        of_kernel = amx_conv.as_called if self.tiled else winograd.as_called
        return of_kernel(as_pictures(x) if x.ndim == 3 else x, self.get_buffer("packed"), self.get_buffer("bias"))


def as_pictures(rows: Tensor) -> Tensor:
    """Rows [B, N, C] as pictures [B, C, N, 1] in channels-last layout, in the same memory."""
    return rows.transpose(1, 2).unsqueeze(3)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that could run either way, and what it took.

    Attributes:
        name: the module's name.
        shape: of its input.
        usual_ms: PyTorch's way: the direct product with its weights packed, or its own attention.
        other_ms: the kernel of our own, or two matrix products in its place.
    """

    name: str
    shape: tuple[int, ...]
    usual_ms: float
    other_ms: float

    @property
    def is_quicker(self) -> bool:
        """Whether the other way is clearly quicker."""
        return self.other_ms < _MARGIN * self.usual_ms


def measured_layers(network: nn.Module, run: Callable[[nn.Module], object]) -> list[Layer]:
    """The layers that could run either way, with what they take for one batch size.

    Args:
        network: float32 or bfloat16, on the CPU.
        run: calls a network once with a batch of the size that it is meant for.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks, modules = [], dict(network.named_modules())
    # Of linear layers those that we call ourselves: others may be read besides, or called with anything.
    called = {id(m) for one in modules.values() if isinstance(one, Attention) for m in (one.qkv, one.out)}
    for name, module in modules.items():
        chosen = _is_candidate(module) and (isinstance(module, nn.Conv2d) or id(module) in called)
        if chosen or isinstance(module, Attention):
            hooks.append(module.register_forward_pre_hook(_note(shapes, name)))
    try:
        if hooks:
            run(network)
    finally:
        for hook in hooks:
            hook.remove()
    worth = {name: shape for name, shape in shapes.items() if _is_worth(network.get_submodule(name), shape)}
    return _measure(network, worth)


def changed_layers(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """A network with some of its layers run the other way.

    Args:
        network: stays as it is, and the result shares its weights.
        names: of the layers.

    Returns:
        The network to use, which is `network` itself where no layer is named.
    """
    if not names:
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    changed = copy.deepcopy(network, shared)
    upsampled = _behind_upsampling(changed)
    for name in names:
        layer = changed.get_submodule(name)
        changed.set_submodule(name, _other(layer, id(layer) in upsampled))
    return changed


def _behind_upsampling(network: nn.Module) -> set[int]:
    """The ids of the convolutions whose pictures are doubled just before, as their blocks tell."""
    return {id(getattr(module, "upsampled_conv", None)) for module in network.modules()}


def _other(layer: nn.Module, behind_upsampling: bool = False) -> nn.Module:
    """The layer that runs the other way."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return PackedLayer(layer, behind_upsampling)
    other = copy.copy(layer)
    other.otherwise = True  # type: ignore[assignment]
    return other


def _is_candidate(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether there is another way for a layer that is no attention."""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or type(layer) not in (nn.Conv2d, nn.Linear):
        return False  # another type may do something else with its weights
    if layer.weight.dtype not in _DTYPES:
        return False
    if layer.weight.device.type != "cpu":
        return False
    try:
        return _is_for_tiles(layer) or (_is_plain(layer, 3) and winograd.fits(layer.in_channels, layer.out_channels))
    except NativeError:  # without a C compiler the direct convolutions do
        return False


def _is_plain(layer: nn.Conv2d | nn.Linear, side: int) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution of so many taps whose result is as large as its pictures."""
    if not isinstance(layer, nn.Conv2d):
        return False
    kind = (layer.kernel_size, layer.stride, layer.dilation, layer.groups, layer.padding)
    return kind == ((side, side), (1, 1), (1, 1), 1, (side // 2, side // 2))


def _is_for_tiles(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether the layer's other way is that of the matrix unit: Winograd's does not gain there."""
    fits = amx_conv.fits(layer.weight.shape[1], layer.weight.shape[0])
    of_a_kind = isinstance(layer, nn.Linear) or _is_plain(layer, 1) or _is_plain(layer, 3)
    return layer.weight.dtype == torch.bfloat16 and fits and of_a_kind and amx_conv.is_there()


def _is_worth(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return True
    if len(shape) != (3 if isinstance(layer, nn.Linear) else 4):
        return False
    if _is_for_tiles(layer):
        return True
    pixels = shape[2] * shape[3]
    return pixels >= _LEAST_PICTURE or shape[0] * pixels >= _LEAST_PIXELS


def _note(shapes: dict[str, tuple[int, ...]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape)

    return hook


def _measure(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[Layer]:
    """Time all layers one after the other, as in a step, so that the weights are as cold as they are there."""
    inputs: dict[tuple[object, ...], Tensor] = {}
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    upsampled = _behind_upsampling(network)
    for name, shape in shapes.items():
        layer = network.get_submodule(name)
        if isinstance(layer, Attention):
            qkv = _example(inputs, (shape[0], shape[2] * shape[3], 3 * shape[1]), layer.qkv.weight.dtype)
            ways[name] = _both_attentions(layer, qkv)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            ways[name] = _both_products(layer, _example(inputs, shape, layer.weight.dtype), id(layer) in upsampled)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    start = time.perf_counter()
    with torch.no_grad():
        for i in range(_PASSES + 1):
            for kind in (0, 1):
                for name, functions in ways.items():
                    began = time.perf_counter()
                    functions[kind]()
                    if i > 0:
                        times[name][kind].append(1000 * (time.perf_counter() - began))
            if i > 1 and time.perf_counter() - start > _LONG_S:
                break
    # The least, not the median: what else runs on the machine only ever adds, and not to both kinds alike.
    return [Layer(name, shapes[name], min(usual), min(other)) for name, (usual, other) in times.items()]


def _example(inputs: dict[tuple[object, ...], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random input, one for all layers that take such."""
    if (shape, dtype) not in inputs:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        inputs[shape, dtype] = torch.randn(shape).to(dtype, memory_format=layout)
    return inputs[shape, dtype]


def _both_attentions(layer: Attention, qkv: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    other = _other(layer)
    assert isinstance(other, Attention)
    return lambda: layer.mixed(qkv), lambda: other.mixed(qkv)


def _both_products(
    layer: nn.Conv2d | nn.Linear, x: Tensor, behind_upsampling: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Both as compiled code calls them: the usual one with weights in the processor's own layout."""
    other, weight = PackedLayer(layer, behind_upsampling), layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    ours = other.as_called(x[..., ::2, ::2].contiguous(memory_format=torch.channels_last) if other.doubles else x)
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):  # compilers take both for the same
        rows = x.contiguous() if x.ndim == 3 else x.permute(0, 2, 3, 1)
        rows, weight = rows.reshape(-1, rows.shape[-1]), weight.flatten(1)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        product = torch.ops.mkldnn._linear_pointwise
        return lambda: product(rows, packed, bias, "none", [], ""), ours
    same, one = [1, 1], [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, same, one, one, 1, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise
    return lambda: call(x, packed, bias, same, one, one, 1, "none", [], ""), ours
