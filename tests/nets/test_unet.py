"""The U-Net: its options, its embeddings, its tabulated time, and the sizes of the published networks."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.nets.blocks import Attention, Downsample, ResBlock, timestep_embedding
from fastddpm.nets.unet import UNet, UNetConfig

SMALL = UNetConfig(
    sample_size=(8, 8),
    in_channels=2,
    out_channels=2,
    channels=(8, 16),
    layers=1,
    attention=(False, True),
    norm_groups=4,
)

OPTIONS = {
    "ho": {},
    "scale-shift": {"scale_shift": True},
    "resblock-updown": {"resblock_updown": True},
    "pooling": {"conv_resample": False},
    "asymmetric": {"downsample_padding": "asymmetric"},
    "heads": {"num_heads": 4},
    "head-channels": {"head_channels": 4, "attention": (True, True)},
    "up-heads": {"num_heads": 2, "up_num_heads": 4},
    "old-order": {"num_heads": 2, "attention_order": "heads_qkv"},
    "up-attention": {"up_attention": (True, False)},
    "no-mid-attention": {"mid_attention": False},
    "no-mid-norm": {"mid_attention_norm": False},
    "mid-scale": {"mid_scale": 1.7},
    "classes": {"num_classes": 5},
    "stem": {"stem_channels": 12},
    "learned-variance": {"out_channels": 4},
    "odd-embedding": {"embedding": "interleaved", "embedding_shift": 0.0},
}


def make(seed: int = 0, **options) -> UNet:
    """A small network whose every parameter is random, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    network = UNet(dataclasses.replace(SMALL, **options))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


def inputs(network: UNet, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    classes = network.config.num_classes
    return x, t, None if classes is None else torch.randint(0, classes, (batch,), generator=generator)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
class TestOptions:
    def test_output_and_gradients(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        out = network(x, t, y)
        assert out.shape == (3, network.config.out_channels, 8, 8)
        out.square().mean().backward()
        without = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
        # A bias of attention keys shifts all logits of a query alike, which softmax undoes: it is inside qkv.bias.
        assert without == []

    def test_every_sample_stands_alone(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        alone = network(x[1:2], t[1:2], None if y is None else y[1:2])
        torch.testing.assert_close(network(x, t, y)[1:2], alone, rtol=1e-5, atol=1e-5)

    def test_tabulated_time_gives_the_same_output(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        times, step = torch.tensor([999, 500, 3, 0]), torch.tensor([2, 0, 3])
        if y is None:
            conditions, index = network.tabulate(times), step
        else:  # a table for each class
            conditions = torch.cat([network.tabulate(times, label) for label in (4, 1)])
            y = torch.tensor([4, 1, 1])
            index = step + torch.tensor([0, 4, 4])
        assert conditions.shape[1] == network.row_numbers()
        expected = network(x, times[step], y)
        torch.testing.assert_close(network.body(x, conditions, index), expected, rtol=1e-5, atol=1e-5)
        if y is not None:  # or one for all, and the class in each step
            told = network.body(x, network.tabulate(times), step, y)
            torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)

    def test_body_has_no_linear_layer_for_time(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        projections = network.embed(t, y)
        called: list[str] = []
        for name, module in network.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.register_forward_hook(lambda *_, name=name: called.append(name))
        network.body(x, projections)
        assert all(name.endswith((".qkv", ".out")) for name in called)
        assert len(called) == 2 * sum(isinstance(m, Attention) for m in network.modules())

    def test_channels_last_changes_nothing(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        expected = network(x, t, y)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(x, t, y), expected, rtol=1e-5, atol=1e-5)

    def test_config_round_trip(self, options):
        config = dataclasses.replace(SMALL, **options)
        assert (
            UNetConfig.from_dict({k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()})
            == config
        )


TRACED = {
    "old": {"conv_resample": False, "num_heads": 2, "attention_order": "heads_qkv", "downsample_padding": "asymmetric"},
    "new": {"scale_shift": True, "resblock_updown": True, "head_channels": 4, "mid_scale": 1.7, "num_classes": 5},
    **{name: pytest.param(options, marks=pytest.mark.slow) for name, options in OPTIONS.items()},
}
"""Options by themselves are slow tests; the first two have all whose code differs."""


@pytest.mark.parametrize("options", TRACED.values(), ids=TRACED.keys())
def test_body_is_one_graph(options):
    network = make(**options)
    x, t, y = inputs(network)
    projections = network.embed(t, y)
    torch._dynamo.reset()
    compiled = torch.compile(network.body, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, projections), network.body(x, projections))


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [6, 7, 32])
def test_timestep_embedding_is_the_formula(order, shift, dim):
    t = torch.tensor([0.0, 0.75, 3.0, 999.0])
    half = dim // 2
    angle = t.numpy()[:, None] * 10_000.0 ** (-np.arange(half) / (half - shift))[None]
    sin, cos = np.sin(angle), np.cos(angle)
    columns = {"sin_cos": [*sin.T, *cos.T], "cos_sin": [*cos.T, *sin.T]}.get(order)
    if columns is None:
        columns = [column for pair in zip(sin.T, cos.T, strict=True) for column in pair]
    expected = np.stack([*columns, *[np.zeros(4)] * (dim - 2 * half)], axis=1)
    got = timestep_embedding(t, dim, order=order, shift=shift)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)  # float32 angles up to 999


def test_attention_orders_differ_by_a_permutation_of_rows():
    old = make(num_heads=2, attention_order="heads_qkv")
    new = make(num_heads=2)
    state = old.state_dict()
    for name, value in state.items():
        if ".qkv." in name:
            per_head = value.shape[0] // 6
            state[name] = value.reshape(2, 3, per_head, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    x, t, y = inputs(old)
    assert not torch.allclose(old(x, t, y), new(x, t, y), atol=1e-3)
    new.load_state_dict(state)
    torch.testing.assert_close(old(x, t, y), new(x, t, y), rtol=1e-5, atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, num_heads=2)
    attention = Attention(config, 16, 2).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    rows = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(rows).chunk(3, dim=2)
    heads = []
    for head in range(2):
        cut = slice(8 * head, 8 * head + 8)
        weights = torch.softmax(q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(8), dim=-1)
        heads.append(weights @ v[..., cut])
    expected = x + attention.out(torch.cat(heads, dim=2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_scale_shift_is_adaptive_group_normalisation():
    torch.manual_seed(0)
    block = ResBlock(dataclasses.replace(SMALL, scale_shift=True), 8, 8).double()
    x, projection = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    torch.nn.init.normal_(block.conv2.weight)
    scale, shift = projection[:, :8, None, None], projection[:, 8:, None, None]
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, projection), x + block.conv2(F.silu(h)))


def test_asymmetric_padding_pads_right_and_bottom():
    torch.manual_seed(0)
    asymmetric = Downsample(dataclasses.replace(SMALL, downsample_padding="asymmetric"), 8)
    x = torch.randn(1, 8, 6, 6)
    padded = torch.zeros(1, 8, 7, 7)
    padded[..., :6, :6] = x
    assert asymmetric.conv is not None
    torch.testing.assert_close(asymmetric(x), F.conv2d(padded, asymmetric.conv.weight, asymmetric.conv.bias, stride=2))
    symmetric = Downsample(SMALL, 8)
    symmetric.load_state_dict(asymmetric.state_dict())
    assert not torch.allclose(symmetric(x), asymmetric(x), atol=1e-2)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(
            UNetConfig(downsample_padding="asymmetric"), 35.746307, id="ddpm-cifar10-32"
        ),
        pytest.param(
            UNetConfig(
                sample_size=(256, 256), channels=(128, 128, 256, 256, 512, 512), downsample_padding="asymmetric",
                attention=(False, False, False, False, True, False),
            ),
            113.673219,
            id="ddpm-celebahq-256",
        ),
        pytest.param(
            UNetConfig(
                sample_size=(64, 64), out_channels=6, channels=(128, 256, 384, 512), layers=3, num_heads=4,
                attention=(False, False, True, True), scale_shift=True, norm_eps=1e-5, embedding="cos_sin",
                embedding_shift=0.0,
            ),
            121.063942,
            id="improved-imagenet-64",
        ),
    ],
)  # fmt: skip
def test_published_networks_have_their_number_of_parameters(config, millions):
    with torch.device("meta"):
        network = UNet(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=1e-7)


def test_a_new_network_predicts_zero():
    torch.manual_seed(0)
    network = UNet(SMALL)
    x, t, y = inputs(network)
    assert bool((network(x, t, y) == 0).all())


def test_gradient_checkpointing_gives_the_same_gradients():
    network = make().train()
    x, t, y = inputs(network)
    gradients = []
    for network.gradient_checkpointing in (False, True):
        network.zero_grad()
        network(x, t, y).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_labels_must_match_the_network():
    plain, classes = make(), make(num_classes=5)
    x, t, _ = inputs(plain)
    with pytest.raises(ValueError, match="y must be no labels"):
        plain(x, t, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="y must be labels"):
        classes(x, t)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": (9, 8)}, "sample_size must be divisible by 2"),
        ({"channels": (8, 18)}, "multiples of norm_groups"),
        ({"attention": (True,)}, "one entry per level"),
        ({"head_channels": 5}, "head_channels must divide the width"),
        ({"layers": 0}, "layers must be an integer"),
        ({"layers": True}, "layers must be an integer"),
        ({"embedding": "fourier"}, "embedding must be one of"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number"),
        ({"channels": ()}, "channels must be a list"),
        ({"num_classes": 0}, "num_classes must be an integer"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(UNetConfig)] + ["other"]), json_values))
def test_any_json_gives_a_configuration_or_a_documented_error(values):
    try:
        config = UNetConfig.from_dict(values)
    except (ValueError, TypeError):
        return
    assert config.to_dict()
