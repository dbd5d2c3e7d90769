"""The choice between two ways to run a layer, and attention as two products."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fastddpm.engines.fast_layers import Layer, PackedLayer, changed_layers, measured_layers
from fastddpm.kernels import amx_conv, winograd
from fastddpm.kernels.group_norm_native import native_norms
from fastddpm.kernels.native import NativeError
from fastddpm.kernels.winograd import fits
from fastddpm.nets import lucidrains_blocks
from fastddpm.nets.blocks import Attention, attention_by_products
from tests.networks import CONFIG, tiny_unet

try:
    fits(32, 32)
except NativeError as error:
    pytest.skip(f"no C compiler: {error}", allow_module_level=True)


def conv(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.down = conv(3, 64), conv(64, 64), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.last = conv(64, 3)

    def forward(self, x):
        return self.last(self.down(self.wide(self.stem(x))))


def with_fast_layers(network, run):
    layers = measured_layers(network, run)
    return changed_layers(network, [layer.name for layer in layers if layer.is_quicker]), layers


def test_choice_is_by_measurement_and_leaves_the_network_alone(monkeypatch):
    net, x = Net().eval(), torch.randn(2, 3, 24, 24)
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    changed, layers = with_fast_layers(net, lambda network: network(x))
    assert [layer.name for layer in layers] == ["wide"] and layers[0].usual_ms > 0 < layers[0].other_ms
    assert isinstance(changed.wide, PackedLayer) and isinstance(net.wide, nn.Conv2d)
    assert changed.stem.weight is net.stem.weight and not net.wide._forward_pre_hooks
    assert (changed(x) - net(x)).abs().max() < 1e-4
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: False))
    assert with_fast_layers(net, lambda network: network(x))[0] is net
    small = torch.randn(1, 3, 6, 6)
    assert with_fast_layers(net, lambda network: network(small)) == (net, [])


def test_layers_are_measured_as_compiled_steps_call_them_without_python_around(monkeypatch):
    net, x = Net().eval(), torch.randn(2, 3, 24, 24)
    for module, name in ((winograd, "_winograd_conv"), (amx_conv, "_amx_conv")):
        calls = []
        checked = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, run=checked, calls=calls: calls.append(1) or run(*given))
        if module is amx_conv and not amx_conv.is_there():
            continue
        kind = net if module is winograd else net.bfloat16()
        with torch.no_grad():
            layers = measured_layers(kind, lambda network: network(x.to(network.stem.weight.dtype)))
        assert [layer.name for layer in layers] == ["wide"] and calls == [1]  # checked once, called many times


def test_other_types_are_left_alone():
    net = Net().double()
    assert with_fast_layers(net, lambda network: network(torch.randn(2, 3, 24, 24).double())) == (net, [])


@pytest.mark.parametrize("shape", [(1, 1, 64, 32), (3, 2, 49, 16), (2, 4, 1, 8)])
def test_products_are_attention(shape):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for _ in range(3))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (attention_by_products(q, k, v) - exact).abs().max() <= 1e-6
    q, k, v = (part.bfloat16() for part in (q, k, v))
    ours, theirs = attention_by_products(q, k, v), scaled_dot_product_attention(q, k, v)
    assert ours.dtype == torch.bfloat16
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    # The scores are rounded once more than in PyTorch's form.
    assert (ours - exact).abs().mean() <= 3 * (theirs - exact).abs().mean() + 1e-4


def test_products_take_large_scores_and_pass_nan_on():
    q = torch.full((1, 1, 4, 8), 300.0)
    v = torch.randn(1, 1, 4, 8)
    assert torch.allclose(attention_by_products(q, q, v), v.mean(2, keepdim=True).expand_as(v), atol=1e-6)
    v[0, 0, 2, 3] = float("nan")
    out = attention_by_products(q, q, v)
    assert out[..., 3].isnan().all() and out[..., :3].isfinite().all()


@pytest.mark.parametrize("order", ["qkv_heads", "heads_qkv"])
def test_attention_is_chosen_by_measurement_too(monkeypatch, order):
    torch.manual_seed(0)
    net = nn.Sequential(Attention(dataclasses.replace(CONFIG, attention_order=order), 32, heads=2)).eval()
    x = torch.randn(2, 32, 6, 6)
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    with torch.no_grad():
        changed, layers = with_fast_layers(net, lambda network: network(x))
        assert [layer.name for layer in layers] == ["0"]
        assert changed[0].otherwise and not net[0].otherwise
        assert changed[0].qkv.weight is net[0].qkv.weight
        assert (changed(x) - net(x)).abs().max() < 1e-5


@pytest.mark.skipif(not amx_conv.is_there(), reason="a processor without AMX, or no C compiler")
def test_in_bf16_small_maps_too_may_run_on_the_matrix_unit(monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False)).bfloat16(), torch.randn(1, 32, 4, 4).bfloat16()
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    with torch.no_grad():
        changed, layers = with_fast_layers(net, lambda network: network(x))
        assert [layer.name for layer in layers] == ["0"] and changed[0].tiled
        assert (changed(x) - net(x).double()).abs().max() <= 2.0**-7 * net(x).abs().max()
        assert not PackedLayer(nn.Conv2d(32, 32, 3, padding=1)).tiled


@pytest.mark.skipif(not amx_conv.is_there(), reason="a processor without AMX, or no C compiler")
@pytest.mark.parametrize(("in_resblock", "name"), [(False, "up.0.resample.conv"), (True, "up.0.resample.conv1")])
def test_in_bf16_what_is_behind_an_upsampling_may_double_by_itself(monkeypatch, in_resblock, name):
    net = tiny_unet(channels=(32, 64), norm_groups=8, resblock_updown=in_resblock).cast(torch.bfloat16)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 20]), torch.tensor([0, 2])
    called, measured = amx_conv.as_called, []
    monkeypatch.setattr(amx_conv, "as_called", lambda x, *w: measured.append((w[0].shape[2], x.shape)) or called(x, *w))
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: self.name == name))
    with torch.no_grad():
        changed, layers = with_fast_layers(net, lambda network: network(x, t, y))
        assert {layer.name: layer.shape for layer in layers}[name] == (2, 64, 8, 8)
        assert [shape for taps, shape in measured if taps == 4] == [(2, 64, 4, 4)]
        assert [n for n, m in changed.named_modules() if getattr(m, "doubles", False)] == [name]
        want = net(x, t, y)
        with native_norms():
            fused = changed(x, t, y)
        for got in (changed(x, t, y), fused):
            assert (got - want.double()).abs().max() <= 2.0**-5 * want.abs().max()


@pytest.mark.skipif(not amx_conv.is_there(), reason="a processor without AMX, or no C compiler")
def test_so_it_may_in_lucidrains_networks(monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(lucidrains_blocks.Upsample(32, 64)).bfloat16(), torch.randn(2, 32, 8, 8).bfloat16()
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    with torch.no_grad():
        changed, layers = with_fast_layers(net, lambda network: network(x))
        assert [(layer.name, layer.shape) for layer in layers] == [("0.1", (2, 32, 16, 16))] and changed[0][1].doubles
        got, want = changed(x), net(x)
        assert got.shape == want.shape == (2, 64, 16, 16)
        assert (got - want.double()).abs().max() <= 2.0**-6 * want.abs().max()


class Adapted(nn.Conv2d):
    """As fine-tuning puts it in the place of a layer: it does more than its weights say."""

    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True)


@pytest.mark.skipif(not amx_conv.is_there(), reason="a processor without AMX, or no C compiler")
def test_in_bf16_linear_layers_and_1x1_convolutions_may_run_there_too(monkeypatch):
    torch.manual_seed(0)
    attention = Attention(dataclasses.replace(CONFIG, norm_groups=8), 64, heads=2)
    others = Adapted(64, 64, 1), nn.Flatten(2), nn.Linear(64, 32)  # a linear layer that others call is theirs
    net = nn.Sequential(nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 1, stride=2), attention, *others)
    net, x = net.bfloat16(), torch.randn(2, 32, 16, 16).bfloat16()
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    with torch.no_grad():
        changed, layers = with_fast_layers(net, lambda network: network(x))
        assert [layer.name for layer in layers] == ["0", "2", "2.qkv", "2.out"]
        assert changed[0].tiled and changed[2].qkv.tiled and changed[2].out.tiled and changed[2].otherwise
        got, want = changed(x), net(x)
        assert got.shape == want.shape and got.is_contiguous()
        assert (got - want.double()).abs().max() <= 2.0**-6 * want.abs().max()
