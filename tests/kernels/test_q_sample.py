"""`q_sample` on the CPU: against float64, its gradients, its sub-normal cases, and what it refuses."""

import pytest
import torch

from fastddpm.kernels import normals_reference, q_sample
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
    (x, t, signals, spreads), options = q_arguments((3, 2, 4, 4), "uint8", False)
    for domain in (0, TRAINING, LIKELIHOOD):
        _, eps = q_sample(x, t, signals, spreads, **options, domain=domain)
        expected = normals_reference(options["seed"], options["sample_id"], t + domain, 32)
        assert torch.equal(eps.reshape(3, 32), expected)


def test_bytes_span_minus_one_to_one():
    x = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    one, zero = torch.ones(1), torch.zeros(1)
    x_t, _ = q_sample(x, torch.zeros(2, dtype=torch.int64), one, zero, eps=torch.ones(2, 1, 1, 1))
    assert x_t.flatten().tolist() == [-1.0, 1.0]


def test_unknown_timesteps_are_an_error_on_the_cpu():
    (x, t, signals, spreads), options = q_arguments((2, 1, 2, 2), "float", True)
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            q_sample(x, t * 0 + wrong, signals, spreads, **options)


def test_compiles_without_graph_breaks():
    positional, options = q_arguments((3, 2, 4, 4), "uint8", False)
    got = torch.compile(q_sample, fullgraph=True, backend="aot_eager")(*positional, **options)
    torch.testing.assert_close(got, q_sample(*positional, **options), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["float", "uint8"])
@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_op_on_a_pretended_gpu(source, given):
    """The op's shapes and dtypes, without running it: the branch that CUDA tensors take."""
    pytest.importorskip("triton")
    positional, options = q_arguments((3, 2, 4, 4), source, given)
    fakes = [pretend_on_gpu(tensor) for tensor in positional]
    rest = {name: pretend_on_gpu(tensor) for name, tensor in options.items()}
    x_t, eps = q_sample(*fakes, **rest)
    assert x_t.shape == eps.shape == (3, 2, 4, 4)
    assert x_t.dtype == eps.dtype == torch.float32
    assert x_t.device.type == eps.device.type == "cuda"
    arguments = (*fakes, *(rest.get(name) for name in ("eps", "seed", "sample_id")), 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastddpm.q_sample.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x_start": torch.zeros(2, 1, 2, 2).half()}, TypeError, r"x_start must be float32 \| uint8, got float16"),
        ({"x_start": torch.zeros(2, 4)}, ValueError, r"x_start must be of shape \[B, C, H, W\], got \[2, 4\]"),
        ({"t": torch.zeros(2)}, TypeError, r"t must be int64, got float32"),
        ({"t": torch.zeros(3).long()}, ValueError, r"t must be of shape \[2\], got \[3\]"),
        ({"sqrt_alphas_cumprod": torch.ones(10).double()}, TypeError, r"sqrt_alphas_cumprod must be float32"),
        (
            {"sqrt_one_minus_alphas_cumprod": torch.ones(9)},
            ValueError,
            r"sqrt_one_minus_alphas_cumprod must be of shape \[10\], got \[9\]",
        ),
        ({"eps": torch.zeros(2, 1, 2, 3)}, ValueError, r"eps must be of shape \[2, 1, 2, 2\]"),
        ({"eps": None}, ValueError, r"seed and sample_id must be given without eps, got None"),
        ({"eps": None, "seed": torch.zeros(2).long()}, ValueError, r"seed and sample_id must be given without eps"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed and sample_id must be None with eps"),
        ({"eps": None, "seed": torch.zeros(2), "sample_id": torch.zeros(2)}, TypeError, r"seed must be int64"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_refuses(changes, error, match):
    (x, t, signals, spreads), options = q_arguments((2, 1, 2, 2), "float", True)
    names = {"x_start": x, "t": t, "sqrt_alphas_cumprod": signals, "sqrt_one_minus_alphas_cumprod": spreads}
    with pytest.raises(error, match=rf"^q_sample: {match}.*; "):
        q_sample(**(names | options | changes))
