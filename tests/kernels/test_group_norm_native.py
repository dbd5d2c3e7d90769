"""`add_group_norm` in C: every case against float64, on any number of threads, and what it must leave to PyTorch."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastddpm.kernels.group_norm import Norm, Projection, Terms, add_group_norm
from fastddpm.kernels.group_norm_native import is_there, native_norms, takes
from fastddpm.nets.fused_body import fused_body, is_fusable
from tests.kernels.norm_cases import TERMS, call, check_norm, norm_case
from tests.nets.test_unet import OPTIONS, inputs, make

pytestmark = pytest.mark.skipif(not is_there(), reason="no C compiler")


@pytest.fixture(autouse=True)
def asked():
    with native_norms(), torch.no_grad():
        yield


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 32, 7, 5), (3, 16, 24, 25), (4, 32, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_against_float64(terms, dtype, shape, number):
    """Channels in sixteens, which AVX-512 takes at a time, and, with a skip and 16 of them, in eights."""
    case = norm_case(shape, 4, terms, dtype=dtype, skip_channels=16 if shape[1] == 32 else 8)
    assert takes(case["x"], case.get("skip"))
    with threads(number):
        check_norm(case)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_large_pictures_with_a_large_mean(offset):
    x = (torch.randn(1, 16, 300, 300) + offset).contiguous(memory_format=torch.channels_last)
    norm = Norm(torch.ones(16), torch.zeros(16), 2, 1e-6)
    want = F.group_norm(x.double(), 2, eps=1e-6)
    got = add_group_norm(x, norm, silu=False)[1]
    assert (got - want).abs().max() <= 2e-6 * want.abs().max() + 2.0**-24 * offset


@pytest.mark.parametrize("channels", [8, 16])
def test_silu_at_its_ends(channels):
    x = torch.linspace(-1, 1, channels * 64).reshape(1, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    norm = Norm(torch.full((channels,), 300.0), torch.zeros(channels), 1, 1e-6)
    want = F.silu(F.group_norm(x.double(), 1, norm.weight.double(), norm.beta.double(), 1e-6))
    got = add_group_norm(x, norm)[1]
    assert want.min() < -0.2 and want.max() > 400 and (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert (got[want < -1e-3] / want[want < -1e-3] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("skip_channels", [8, 16])
def test_a_picture_is_the_same_in_any_batch(skip_channels):
    case = norm_case((4, 32, 40, 31), 8, TERMS["everything, add"], skip_channels=skip_channels)
    with threads(2):
        together = call(**case)[1]
        for i in range(4):
            one = {k: v[i : i + 1] if k in ("x", "residual", "skip", "row") else v for k, v in case.items()}
            assert torch.equal(call(**one)[1][0], together[i])


@pytest.mark.parametrize("mode", ["add", "scale_shift"])
def test_a_row_that_is_not_there_is_nan(mode):
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    projection = Projection(torch.zeros(2, 16), mode, 0, torch.tensor([1, 2, -1]))
    y = add_group_norm(x, Norm(torch.ones(8), torch.zeros(8), 2, 1e-5), Terms(), projection)[1]
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_nan_stays_in_its_picture():
    case = norm_case((2, 16, 9, 9), 4, TERMS["residual"])
    case["residual"][0, 3, 2, 2] = float("nan")
    y = call(**case)[1]
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


def test_what_it_does_not_take_goes_to_pytorch():
    for case in (norm_case((2, 12, 5, 5), 4), norm_case((2, 16, 5, 5), 4, ("skip",), skip_channels=4)):
        assert not takes(case["x"], case.get("skip"))
        check_norm(case)
    assert not takes(torch.zeros(1, 16, 4, 4, dtype=torch.float16), None)
    assert not takes(torch.zeros(1, 16, 4, 4, device="meta"), None)


def test_opcheck():
    case = norm_case((2, 16, 4, 6), 2, TERMS["everything, add"])
    arguments = (case["x"], case["bias"], case["row"], None, case["residual"], case["skip"], case["weight"])
    arguments += (case["beta"], 2, 1e-5, case["column"], False, True, True, 1)
    op = torch.ops.fastddpm.add_group_norm_native.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_fused_body_equals_body(options, dtype):
    network = make(**options)
    x, t, y = inputs(network)
    projections = network.embed(t, y)
    assert is_fusable(network, x)
    got = fused_body(network.cast(dtype), x, projections)
    with _not_asked():
        assert not is_fusable(network, x)
        want, rounded = network.body(x, projections), network.cast(dtype).body(x, projections)
    # In bfloat16 as near to float32 as PyTorch's own operations, or nearer.
    allowed = 1e-5 * want.abs().max() if dtype == torch.float32 else 1.5 * (rounded - want).abs().max()
    assert (got - want).abs().max() <= allowed


@contextlib.contextmanager
def _not_asked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastddpm.nets.fused_body.is_asked", lambda device: False)
        yield
