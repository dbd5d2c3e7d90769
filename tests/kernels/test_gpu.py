"""The kernels on a real GPU, where there is one."""

import pytest
import torch

from fastddpm.kernels import COLUMNS, X_T_COUNTER, Operands, normals_reference, p_sample, q_sample
from fastddpm.kernels.philox import NORMALS_ATOL
from tests.kernels import checks
from tests.kernels.cases import CHAPTERS, OPTIONS, S, make_case

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 3), (1, 1, 2, 2), (3, 1, 3, 341), (7, 1, 28, 28), (64, 3, 32, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_p_sample_options(options, dtype):
    checks.check_p_sample(make_case((7, 3, 8, 8), dtype, options), "cuda")


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_p_sample_sizes(shape):
    checks.check_p_sample(make_case(shape, torch.bfloat16, ("learned", "history")), "cuda")


def test_normals():
    """What p_sample adds when only σ = 1 is left, over 12 million draws: this device's instructions, judged."""
    batch, shape = 64, (3, 256, 256)
    table = torch.zeros(2, len(COLUMNS))
    table[0, COLUMNS.index("sigma")] = 1.0
    table[0, COLUMNS.index("bound")] = 1.0
    x = torch.zeros(batch, *shape, device="cuda")
    ids, seed = torch.arange(batch) + 2**33, torch.arange(batch) - 2**63
    timesteps = torch.tensor([X_T_COUNTER, 0])
    step, end = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)
    rest = (table, timesteps, step, end, ids, seed)
    p_sample(Operands(x, torch.zeros_like(x), *(tensor.cuda() for tensor in rest)))
    expected = normals_reference(seed, ids, torch.full((batch,), X_T_COUNTER), x[0].numel())
    assert (x.cpu().reshape(batch, -1) - expected).abs().max() <= NORMALS_ATOL


@pytest.mark.parametrize("options", CHAPTERS.values(), ids=CHAPTERS.keys())
def test_chapters_are_runs_of_their_own(options):
    checks.check_chapters(options, "cuda")


def test_chapters_count_supplied_noise_from_their_end():
    checks.check_chapters_noise("cuda")


def test_nan():
    checks.check_nan("cuda")


def test_identity():
    checks.check_identity("cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("source", ["float", "uint8"])
@pytest.mark.parametrize("given", [False, True], ids=["eps made", "eps given"])
def test_q_sample(shape, source, given):
    checks.check_q_sample(shape, source, given, "cuda")


def test_q_sample_gradients():
    checks.check_gradients("cuda")


def test_q_sample_gives_nan_for_unknown_timesteps():
    x, t, *rest = checks.q_arguments((3, 1, 2, 5), "float", True, "cuda")
    t[:] = torch.tensor([-1, 10, 4])
    x_t, _ = q_sample(x, t, *rest)
    assert x_t[:2].isnan().all() and x_t[2].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [("history",), ("history", "noise"), ("history", "history2")],
    ids=["made", "supplied", "two histories"],
)
def test_a_captured_graph_replays_the_whole_run(options):
    case, eager = (make_case((5, 3, 8, 8), torch.bfloat16, options).to("cuda") for _ in range(2))
    case.clone().call(p_sample)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(p_sample)
        case.positional["step"] += 1
    # Capturing runs nothing: the state is as it was.
    for _ in range(S + 1):
        graph.replay()
        eager.call(p_sample)
        eager.positional["step"] += 1
    assert torch.equal(case.positional["x"], eager.positional["x"])


def test_compiled_step_agrees():
    case, eager = (make_case((5, 3, 8, 8), torch.bfloat16, ("history",)).to("cuda") for _ in range(2))
    case.call(torch.compile(p_sample, fullgraph=True))
    eager.call(p_sample)
    torch.testing.assert_close(case.positional["x"], eager.positional["x"], rtol=1e-5, atol=1e-5)
