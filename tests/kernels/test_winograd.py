"""Winograd's convolution against the direct one."""

import pytest
import torch
from torch import nn

from fastddpm.engines.fast_layers import PackedLayer
from fastddpm.kernels.native import NativeError
from fastddpm.kernels.packed_conv import call_of
from fastddpm.kernels.winograd import WINOGRAD_RTOL, as_called, fits, pack, winograd_conv

try:
    fits(32, 32)
except NativeError as error:
    pytest.skip(f"no C compiler: {error}", allow_module_level=True)


def conv(c_in, c_out, bias=True):
    torch.manual_seed(c_in + c_out)
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("batch, c_in, c_out", [(1, 32, 32), (2, 96, 64), (5, 64, 160), (3, 128, 32)])
@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (7, 5), (8, 12), (13, 3), (33, 17)])
def test_equals_the_direct_convolution(batch, c_in, c_out, height, width):
    layer = conv(c_in, c_out)
    x = torch.randn(batch, c_in, height, width).contiguous(memory_format=torch.channels_last)
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    out = winograd_conv(x, pack(layer.weight), layer.bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - exact).abs().max() <= WINOGRAD_RTOL * x.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_as_compiled_steps_make_it_is_the_same(dtype):
    layer, x = conv(64, 32), torch.randn(2, 64, 8, 8).to(dtype, memory_format=torch.channels_last)
    *_, y = as_called(x, pack(layer.weight), layer.bias)()
    assert torch.equal(y, winograd_conv(x, pack(layer.weight), layer.bias))


def test_a_call_that_fails_is_no_quick_one():
    tensors = torch.zeros(1, 2, 3, 3), torch.zeros(1), torch.zeros(4), torch.zeros(1, 4, 3, 3)
    assert call_of(lambda *_: 0, tensors, 9)() is tensors
    with pytest.raises(MemoryError):
        call_of(lambda *_: 1, tensors, 9)()


def test_many_tiles_take_several_blocks():
    layer = conv(256, 256)
    x = torch.randn(3, 256, 48, 44)
    exact = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    assert (winograd_conv(x, pack(layer.weight), layer.bias) - exact).abs().max() <= 1e-4


def test_each_picture_is_as_if_alone():
    layer, x = conv(64, 64), torch.randn(7, 64, 20, 20)
    packed = pack(layer.weight)
    together = winograd_conv(x, packed, layer.bias)
    for i in range(7):
        assert torch.equal(winograd_conv(x[i : i + 1], packed, layer.bias)[0], together[i])


def test_any_layout_and_missing_bias():
    layer, x = conv(32, 64, bias=False), torch.randn(2, 32, 9, 9)
    module = PackedLayer(layer)
    assert torch.equal(module(x), module(x.contiguous(memory_format=torch.channels_last)))
    assert (module(x) - layer(x)).abs().max() < 1e-4


def test_nan_stays_within_its_tile():
    layer, x = conv(32, 32), torch.zeros(1, 32, 16, 16)
    x[0, 0, 0, 0] = float("nan")
    out = winograd_conv(x, pack(layer.weight), layer.bias)
    assert out[..., :2, :2].isnan().all() and not out[..., 4:, 4:].isnan().any()


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="with the weights' channels"):
        winograd_conv(torch.randn(1, 64, 8, 8), pack(conv(32, 32).weight), torch.zeros(32))


def test_what_fits():
    assert fits(32, 32) and not fits(3, 32) and not fits(32, 3) and not fits(32, 40)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.fastddpm.winograd_conv.default,
        (torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last), pack(conv(32, 32).weight), torch.zeros(32), 1),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_bf16_is_rounded_once_on_the_way_out():
    layer, x = conv(64, 64), torch.randn(2, 64, 10, 10).bfloat16()
    packed = pack(layer.weight)
    assert torch.equal(winograd_conv(x, packed, layer.bias), winograd_conv(x.float(), packed, layer.bias).bfloat16())
    x[0, 0, 0, 0] = float("nan")
    out = winograd_conv(x, packed, layer.bias)
    assert out[0, :, 0, 0].isnan().all() and out[1].isfinite().all()
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        winograd_conv(x.double(), packed, layer.bias)
