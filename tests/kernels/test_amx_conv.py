"""The convolution on the matrix unit against a direct one in float64."""

import pytest
import torch
from torch import nn

from fastddpm.kernels.amx_conv import amx_conv, as_called, fits, is_there, pack, weights_behind_upsampling

pytestmark = pytest.mark.skipif(not is_there(), reason="a processor without AMX, or no C compiler")


def conv(c_in, c_out):
    torch.manual_seed(c_in + c_out)
    return nn.Conv2d(c_in, c_out, 3, padding=1).requires_grad_(False).bfloat16()


def pictures(*shape):
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def convolved(layer, x):
    return amx_conv(x, pack(layer.weight), layer.bias.float())


def allowed(layer, x, exact):
    """The result is rounded once to 8 bits; the sums of exact products have 24 bits."""
    sizes = nn.functional.conv2d(x.double().abs(), layer.weight.double().abs(), padding=1)
    terms = 9 * layer.in_channels
    return 2.0**-8 * exact.abs() + terms * 2.0**-24 * sizes


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("c_in, c_out", [(32, 32), (96, 64)])
@pytest.mark.parametrize(
    "height, width", [(1, 1), (4, 4), (7, 7), (8, 8), (14, 14), (16, 16), (5, 3), (3, 32), (9, 40)]
)
def test_equals_the_direct_convolution(batch, c_in, c_out, height, width):
    layer, x = conv(c_in, c_out), pictures(batch, c_in, height, width)
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    y = convolved(layer, x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - exact).abs() <= allowed(layer, x, exact)).all()


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("c_in, c_out", [(32, 32), (96, 64), (64, 160)])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (4, 4), (1, 17), (7, 7), (16, 16), (9, 40)])
def test_one_tap_is_a_product_with_any_number_of_threads(batch, c_in, c_out, height, width):
    torch.manual_seed(c_in)
    layer = nn.Conv2d(c_in, c_out, 1).requires_grad_(False).bfloat16()
    room = pictures(batch + 1, c_in, height, width)
    x = room[:batch]
    room[batch] = torch.nan  # what lies behind the pictures is none of theirs
    exact = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    sizes = nn.functional.conv2d(x.double().abs(), layer.weight.double().abs())
    packed, bias = pack(layer.weight), layer.bias.float()
    assert torch.equal(pack(layer.weight[:, :, 0, 0]), packed)
    y = amx_conv(x, packed, bias)
    assert ((y - exact).abs() <= 2.0**-8 * exact.abs() + c_in * 2.0**-24 * sizes).all()
    for threads in (1, 2, 3, 5):
        assert torch.equal(torch.ops.fastddpm.amx_conv(x, packed, bias, threads), y)
        alone = [torch.ops.fastddpm.amx_conv(x[i : i + 1], packed, bias, threads) for i in range(batch)]
        assert torch.equal(torch.cat(alone), y)


@pytest.mark.parametrize("batch", [1, 2, 7, 8])
@pytest.mark.parametrize("c_in, c_out", [(32, 32), (96, 64)])
@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (7, 7), (8, 8), (16, 16), (5, 3), (3, 32)])
def test_behind_an_upsampling_with_any_number_of_threads(batch, c_in, c_out, height, width):
    layer, x = conv(c_in, c_out), pictures(batch, c_in, height, width)
    layer.weight.copy_(torch.randint(-16, 17, layer.weight.shape))  # the sums of four of them are exact as well
    layer.weight.div_(64)
    doubled = nn.functional.interpolate(x.double(), scale_factor=2)
    exact = nn.functional.conv2d(doubled, layer.weight.double(), layer.bias.double(), padding=1)
    packed, bias = pack(weights_behind_upsampling(layer.weight)), layer.bias.float()
    y = amx_conv(x, packed, bias)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - exact).abs() <= allowed(layer, doubled, exact)).all()
    for threads in (1, 2, 3, 5):
        assert torch.equal(torch.ops.fastddpm.amx_conv(x, packed, bias, threads), y)
        alone = [torch.ops.fastddpm.amx_conv(x[i : i + 1], packed, bias, threads) for i in range(batch)]
        assert torch.equal(torch.cat(alone), y)


@pytest.mark.parametrize("batch, channels, size", [(71, 64, 16), (150, 256, 4)], ids=["own", "shared"])
def test_of_pictures_to_be_doubled_too_more_than_a_cache_holds_take_rounds(batch, channels, size):
    layer, x = conv(channels, 32), pictures(batch, channels, size, size)
    packed, bias = pack(weights_behind_upsampling(layer.weight)), layer.bias.float()
    y = torch.ops.fastddpm.amx_conv(x, packed, bias, 2)
    for i in range(0, batch, 7):
        assert torch.equal(y[i : i + 1], torch.ops.fastddpm.amx_conv(x[i : i + 1], packed, bias, 1))


def test_weights_behind_an_upsampling_are_sums_made_in_float32():
    weight = conv(32, 32).weight
    sums = weights_behind_upsampling(weight)
    assert sums.dtype == torch.float32 and sums.shape == (128, 32, 2, 2)
    for i, taps in enumerate(sums.view(2, 2, 32, 32, 4).flatten(0, 1)):
        assert torch.allclose(taps.sum(-1), weight.float().sum((2, 3)), atol=1e-6), f"phase {i}"


@pytest.mark.parametrize("weights_of", [lambda weight: weight, weights_behind_upsampling], ids=["as large", "doubled"])
def test_a_call_as_compiled_steps_make_it_is_the_same(weights_of):
    layer, x = conv(64, 32), pictures(2, 64, 8, 8)
    packed, bias = pack(weights_of(layer.weight)), layer.bias.float()
    *_, y = as_called(x, packed, bias)()
    assert torch.equal(y, amx_conv(x, packed, bias))


@pytest.mark.parametrize("size", [4, 7, 8, 16])
def test_each_picture_is_as_if_alone_with_any_number_of_threads(size):
    layer, x = conv(64, 96), pictures(7, 64, size, size)
    packed, bias = pack(layer.weight), layer.bias.float()
    ops = torch.ops.fastddpm
    alone = torch.cat([ops.amx_conv(x[i : i + 1], packed, bias, 1) for i in range(7)])
    for threads in (1, 2, 3, 5):
        for batch in (1, 4, 7):
            assert torch.equal(ops.amx_conv(x[:batch], packed, bias, threads), alone[:batch])


@pytest.mark.parametrize(
    "batch, c_in, c_out, size, threads",
    [(71, 64, 32, 16, 2), (200, 512, 32, 4, 2), (9, 256, 32, 32, 1), (100, 512, 512, 4, 2)],
    ids=["own and one more", "own", "one thread", "shared, the weights are more"],
)
def test_more_pictures_than_a_cache_holds_take_rounds(batch, c_in, c_out, size, threads):
    layer, x = conv(c_in, c_out), pictures(batch, c_in, size, size)
    packed, bias = pack(layer.weight), layer.bias.float()
    y = torch.ops.fastddpm.amx_conv(x, packed, bias, threads)
    for i in range(0, batch, 7):
        assert torch.equal(y[i : i + 1], torch.ops.fastddpm.amx_conv(x[i : i + 1], packed, bias, 1))


def test_other_weights_are_refused():
    x, bias = pictures(1, 64, 4, 4), torch.zeros(32)
    for shape in ((32, 32, 3, 3), (64, 64, 3, 3), (32, 64, 5, 5), (32, 64, 2, 2), (128, 64, 3, 3)):
        with pytest.raises(ValueError, match="with the weights' channels"):
            amx_conv(x, pack(torch.zeros(shape)), bias)
    with pytest.raises(ValueError, match="channels-last"):
        torch.ops.fastddpm.amx_conv(x.contiguous(), pack(torch.zeros(32, 64, 3, 3)), bias, 1)


def test_what_was_there_before_does_not_show():
    """The memory that a thread keeps is used for pictures of all sizes."""
    layer, x = conv(32, 32), pictures(1, 32, 5, 5)
    before = convolved(layer, x)
    convolved(layer, torch.full((2, 32, 24, 24), torch.nan).bfloat16())
    assert torch.equal(convolved(layer, x), before)


def test_nan_stays_within_its_reach():
    layer, x = conv(32, 32), pictures(2, 32, 8, 8)
    x[0, 5, 3, 3] = torch.nan
    bad = convolved(layer, x).isnan()
    assert bad[0, :, 2:5, 2:5].all() and bad.sum() == 32 * 9


def test_another_layout_is_copied_and_other_types_are_refused():
    layer, x = conv(32, 64), torch.randn(2, 32, 9, 9).bfloat16()
    assert torch.equal(convolved(layer, x), convolved(layer, x.contiguous(memory_format=torch.channels_last)))
    with pytest.raises(TypeError, match="must be bfloat16"):
        amx_conv(x.float(), pack(layer.weight), layer.bias.float())


def test_pytorchs_products_are_undisturbed():
    """They configure the tiles for themselves, in the same threads."""
    layer, x = conv(64, 64), pictures(2, 64, 16, 16)
    a = torch.randn(200, 300).bfloat16()
    product, y = a @ a.T, nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    for _ in range(3):
        convolved(layer, x)
        assert torch.equal(a @ a.T, product)
        assert torch.equal(nn.functional.conv2d(x, layer.weight, layer.bias, padding=1), y)


def test_what_fits():
    assert fits(32, 64) and not fits(48, 64) and not fits(64, 3)


@pytest.mark.parametrize("weights_of", [lambda weight: weight, weights_behind_upsampling], ids=["as large", "doubled"])
def test_opcheck(weights_of):
    torch.library.opcheck(
        torch.ops.fastddpm.amx_conv.default,
        (pictures(1, 32, 8, 8), pack(weights_of(conv(32, 32).weight)), torch.zeros(32), 1),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
