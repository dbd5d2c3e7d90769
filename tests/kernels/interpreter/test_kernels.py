"""The Triton kernels, interpreted, against float64 and against the CPU's reference."""

import pytest
import torch

from fastddpm.kernels import dispatch, p_sample, p_sample_reference, p_sample_triton, q_sample, q_sample_triton
from tests.kernels import checks
from tests.kernels.cases import CHAPTERS, OPTIONS, PAST, S, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 3), (1, 1, 2, 2), (3, 1, 3, 341), (7, 1, 28, 28), (2, 3, 32, 32)]
SIZES = [
    pytest.param(shape, dtype, id=f"{shape}-{str(dtype)[6:]}") for shape, dtype in zip(SHAPES, 2 * DTYPES, strict=True)
]
"""The dtype is that of one operand as it is read, so each shape is seen with one of them."""


FORMULAS = ("hardware's formulas", "portable formulas")


@pytest.fixture(params=FORMULAS)
def formulas(request, monkeypatch):
    """Both ways to make normals: NVIDIA's (with NumPy in the place of its instructions) and the portable one."""
    nvidia = request.param == FORMULAS[0]
    for module in (p_sample_triton, q_sample_triton):
        monkeypatch.setattr(module, "approximations", lambda: nvidia)


def makes_noise(options):
    """Whether the kernel makes the noise itself: only then is there more than one formula."""
    return not {"deterministic", "noise", "one_noise_row"} & set(options)


def test_cpu_tensors_reach_the_kernels():
    assert dispatch.INTERPRETED
    assert dispatch.runs_triton("cpu")


@pytest.mark.parametrize(
    ("formulas", "options"),
    [
        pytest.param(formulas, options, id=f"{formulas}-{name}")
        for name, options in OPTIONS.items()
        for formulas in (FORMULAS if makes_noise(options) else FORMULAS[:1])
    ],
    indirect=["formulas"],
)
def test_p_sample_options(formulas, options):
    checks.check_p_sample(make_case((7, 3, 4, 4), torch.bfloat16, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_p_sample_types(dtype):
    checks.check_p_sample(make_case((7, 3, 4, 4), dtype, OPTIONS["everything"]))


@pytest.mark.parametrize(("shape", "dtype"), SIZES)
def test_p_sample_sizes(shape, dtype):
    checks.check_p_sample(make_case(shape, dtype, ("learned", "history")))


@pytest.mark.parametrize(("shape", "dtype"), SIZES)
def test_p_sample_sizes_with_two_histories(shape, dtype):
    checks.check_p_sample(make_case(shape, dtype, ("history", "history2", "deterministic")))


def test_p_sample_writes_nothing_beyond_the_state():
    """The state is a slice of a larger buffer of NaN: what surrounds it must be as before."""
    for numel in (1, 3, 7, 1023):
        case = make_case((2, 1, 1, numel), torch.bfloat16)
        buffer = torch.full((4 * numel,), torch.nan)
        state = buffer[numel : 3 * numel].view(2, 1, 1, numel)
        state.copy_(case.positional["x"])
        case.positional["x"] = state
        case.call(p_sample)
        assert state.isfinite().all()
        assert buffer[:numel].isnan().all() and buffer[3 * numel :].isnan().all()


@pytest.mark.parametrize("options", CHAPTERS.values(), ids=CHAPTERS.keys())
def test_chapters_are_runs_of_their_own(options):
    checks.check_chapters(options)


def test_chapters_count_supplied_noise_from_their_end():
    checks.check_chapters_noise()


def test_p_sample_nan():
    checks.check_nan()


def test_p_sample_identity():
    checks.check_identity()


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["float", "uint8"])
def test_q_sample(shape, source):
    checks.check_q_sample(shape, source, False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["float", "uint8"])
def test_q_sample_with_noise_given(shape, source):
    checks.check_q_sample(shape, source, True)


def test_q_sample_gradients():
    checks.check_gradients()


@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_q_sample_gives_nan_for_unknown_timesteps(given):
    x, t, *rest = checks.q_arguments((3, 1, 2, 5), "uint8", given)
    t[:] = torch.tensor([-1, 10, 4])

    x_t, _ = q_sample(x, t, *rest)
    assert x_t[:2].isnan().all() and x_t[2].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_p_sample_schema(options):
    """That the op changes what its schema says, and nothing else."""
    case = make_case((2, 1, 2, 3), torch.float16, options)
    for name in case.options.keys() & PAST.keys():
        case.options[name].nan_to_num_()
    arguments = (*case.operands, case.stochastic)
    torch.library.opcheck(torch.ops.fastddpm.p_sample.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_q_sample_schema(given):
    x, t, alphas, noise = checks.q_arguments((2, 1, 2, 3), "float", given)
    x.requires_grad_(True)
    arguments = (x, t, *alphas, *((noise, None, None, 0) if given else (None, *noise)))
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastddpm.q_sample.default, arguments, test_utils=tests)


@pytest.mark.parametrize("options", [("history",), ("history", "history2")], ids=["one history", "two"])
def test_a_whole_run_with_the_same_arguments(options):
    case, expected = (make_case((3, 2, 3, 3), options=options) for _ in range(2))

    for _ in range(S + 1):
        expected.positional["x"], *past = expected.call(p_sample_reference)
        expected.options |= dict(zip(options, past, strict=True))
        expected.positional["step"] += 1
        case.call(p_sample)
        case.positional["step"] += 1
    torch.testing.assert_close(case.positional["x"], expected.positional["x"], rtol=1e-4, atol=1e-4)
