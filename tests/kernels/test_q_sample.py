"""`q_sample` on the CPU: against float64, its gradients, its sub-normal cases, and what it refuses."""

import pytest
import torch

from fastddpm.kernels import Draw, Levels, normals_reference, q_sample
from fastddpm.kernels.philox import LIKELIHOOD, TRAINING
from tests.kernels.cases import pretend_on_gpu
from tests.kernels.checks import check_gradients, check_q_sample, q_arguments

SHAPES = [(1, 1, 1, 1), (1, 1, 1, 3), (2, 1, 2, 2), (1, 1, 3, 341), (5, 1, 28, 28), (3, 3, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["float", "uint8"])
@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_against_float64(shape, source, given):
    check_q_sample(shape, source, given)


def test_gradients():
    check_gradients()


def test_made_noise_is_that_of_the_sample_and_its_timestep():
    x, t, levels, draw = q_arguments((3, 2, 4, 4), "uint8", False)
    for domain in (0, TRAINING, LIKELIHOOD):
        _, eps = q_sample(x, t, levels, draw._replace(domain=domain))
        expected = normals_reference(draw.seed, draw.sample_id, t + domain, 32)
        assert torch.equal(eps.reshape(3, 32), expected)


def test_bytes_span_minus_one_to_one():
    x = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    levels = Levels(torch.ones(1), torch.zeros(1))
    x_t, _ = q_sample(x, torch.zeros(2, dtype=torch.int64), levels, torch.ones(2, 1, 1, 1))
    assert x_t.flatten().tolist() == [-1.0, 1.0]


def test_unknown_timesteps_are_an_error_on_the_cpu():
    x, t, *rest = q_arguments((2, 1, 2, 2), "float", True)
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            q_sample(x, t * 0 + wrong, *rest)


def test_compiles_without_graph_breaks():
    arguments = q_arguments((3, 2, 4, 4), "uint8", False)
    got = torch.compile(q_sample, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, q_sample(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["float", "uint8"])
@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_op_on_a_pretended_gpu(source, given):
    """The op's shapes and dtypes, without running it: the branch that CUDA tensors take."""
    pytest.importorskip("triton")
    x, t, levels, noise = q_arguments((3, 2, 4, 4), source, given)
    x, t, signal, spread = (pretend_on_gpu(tensor) for tensor in (x, t, *levels))
    eps, seed, sample_id = (
        None if tensor is None else pretend_on_gpu(tensor)
        for tensor in ((noise, None, None) if given else (None, noise.seed, noise.sample_id))
    )
    x_t, made = q_sample(x, t, Levels(signal, spread), eps if given else Draw(seed, sample_id))
    assert x_t.shape == made.shape == (3, 2, 4, 4)
    assert x_t.dtype == made.dtype == torch.float32
    assert x_t.device.type == made.device.type == "cuda"
    arguments = (x, t, signal, spread, eps, seed, sample_id, 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastddpm.q_sample.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x_start": torch.zeros(2, 1, 2, 2).half()}, TypeError, r"x_start must be float32 \| uint8, got float16"),
        ({"x_start": torch.zeros(2, 4)}, ValueError, r"x_start must be of shape \[B, C, H, W\], got \[2, 4\]"),
        ({"t": torch.zeros(2)}, TypeError, r"t must be int64, got float32"),
        ({"t": torch.zeros(3).long()}, ValueError, r"t must be of shape \[2\], got \[3\]"),
        ({"signal": torch.ones(10).double()}, TypeError, r"levels.signal must be float32"),
        ({"spread": torch.ones(9)}, ValueError, r"levels.spread must be of shape \[10\], got \[9\]"),
        ({"noise": torch.zeros(2, 1, 2, 3)}, ValueError, r"noise must be of shape \[2, 1, 2, 2\]"),
        ({"noise": None}, TypeError, r"noise must be a tensor or a Draw, got NoneType"),
        ({"noise": Draw(torch.zeros(2), torch.zeros(2))}, TypeError, r"noise.seed must be int64"),
        ({"noise": Draw(torch.zeros(2).long(), None)}, TypeError, r"noise.sample_id must be a tensor, got NoneType"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_refuses(changes, error, match):
    x, t, levels, noise = q_arguments((2, 1, 2, 2), "float", True)
    given = {"x_start": x, "t": t, **levels._asdict(), "noise": noise} | changes
    levels = Levels(given.pop("signal"), given.pop("spread"))
    with pytest.raises(error, match=rf"^q_sample: {match}.*; "):
        q_sample(levels=levels, **given)
