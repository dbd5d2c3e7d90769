"""Attention on the matrix unit against PyTorch's in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastddpm.kernels.amx_attention import amx_attention, fits, is_there

pytestmark = pytest.mark.skipif(not is_there(), reason="a processor without AMX, or no C compiler")


def projected(batch, positions, heads, channels, size=1.5):
    torch.manual_seed(positions + channels)
    return (size * torch.randn(batch, positions, 3 * heads * channels)).bfloat16()


def exact(qkv, heads, heads_first=False):
    axes = (heads, 3) if heads_first else (3, heads)
    parts = torch.unflatten(qkv.double(), 2, (*axes, qkv.shape[2] // (3 * heads)))
    q, k, v = (part.transpose(1, 2) for part in (parts.transpose(2, 3) if heads_first else parts).unbind(2))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), v.abs().amax()


@pytest.mark.parametrize("heads_first", [False, True], ids=["qkv of heads", "heads of qkv"])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("positions", "heads", "channels"), [(32, 1, 32), (64, 2, 96), (256, 1, 256), (224, 3, 32)])
def test_equals_attention(batch, positions, heads, channels, heads_first):
    qkv = projected(batch, positions, heads, channels)
    want, largest = exact(qkv, heads, heads_first)
    y = amx_attention(qkv, heads, heads_first=heads_first)
    assert y.dtype == torch.bfloat16 and y.is_contiguous() and y.shape == want.shape
    # Each weight is rounded once, by at most half of 2^-8 of itself, and so is the result.
    assert ((y - want).abs() <= 2.0**-9 * (largest + want.abs()) + 1e-5).all()
    assert abs((y * want).sum() / (want * want).sum() - 1) <= 2.0**-11, "roundings go both ways"


@pytest.mark.parametrize("heads", [1, 3])
def test_each_picture_is_as_if_alone_with_any_number_of_threads(heads):
    qkv, run = projected(7, 96, heads, 32), torch.ops.fastddpm.amx_attention
    alone = torch.cat([run(qkv[i : i + 1], heads, False, 1) for i in range(7)])
    for threads in (1, 2, 3, 5):
        for batch in (1, 4, 7):
            assert torch.equal(run(qkv[:batch], heads, False, threads), alone[:batch])


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_scores_of_all_sizes(size):
    qkv = projected(1, 64, 1, 64, size)
    qkv[..., 128:] = projected(1, 64, 1, 64)[..., 128:]
    want, largest = exact(qkv, 1)
    assert ((amx_attention(qkv, 1) - want).abs() <= 2.0**-9 * (largest + want.abs()) + 1e-3).all()


def test_infinities_and_nan_stay_in_their_rows():
    qkv = projected(1, 64, 1, 32)
    qkv[0, 5, 3] = torch.nan  # of a query
    qkv[0, 9, :32] = torch.finfo(torch.bfloat16).max  # its scores run over, to infinities of both signs
    y = amx_attention(qkv, 1)
    rows = torch.ones(64, dtype=torch.bool)
    rows[[5, 9]] = False
    assert y[0, 5].isnan().all() and y[0, rows].isfinite().all()
    qkv = projected(1, 64, 1, 32)
    qkv[0, 7, 32 + 3] = torch.nan  # of a key: all queries look at it
    assert amx_attention(qkv, 1).isnan().all()
    qkv = projected(1, 64, 1, 32)
    qkv[0, 7, 64 + 3] = torch.nan  # of a value: all queries mix it in
    bad = amx_attention(qkv, 1).isnan()
    assert bad[..., 3].all() and bad.sum() == 64


def test_nothing_behind_is_read_and_what_was_there_before_does_not_show():
    room = projected(3, 32, 1, 64)
    before = amx_attention(room[:1], 1)
    room[1:] = torch.nan
    assert torch.equal(amx_attention(room[:1], 1), before)
    amx_attention(torch.full((2, 256, 3 * 128), torch.nan).bfloat16(), 1)
    assert torch.equal(amx_attention(room[:1], 1), before)
    spread = torch.stack((room[:1], room[:1]), dim=3)[..., 0]  # in another layout
    assert not spread.is_contiguous() and torch.equal(amx_attention(spread, 1), before)


def test_what_fits_and_what_is_refused():
    assert fits(projected(1, 32, 2, 32), 2) and not fits(projected(1, 16, 2, 32), 2)
    assert not fits(projected(1, 32, 2, 32), 4) and not fits(projected(1, 32, 2, 32).float(), 2)
    for qkv in (projected(1, 16, 1, 32), projected(1, 32, 1, 32).float()):
        with pytest.raises(ValueError, match="qkv must be contiguous bfloat16"):
            amx_attention(qkv, 1)


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastddpm.amx_attention.default, (projected(1, 32, 2, 32), 2, True, 1), test_utils=tests
    )
