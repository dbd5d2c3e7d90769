"""`add_group_norm` on the CPU, compiled ahead of time, and on a GPU; and `fused_body`, the network made of it."""

import functools
import re

import pytest
import torch

from fastddpm.kernels.group_norm import add_group_norm_reference
from fastddpm.kernels.group_norm_tiles import MOST_ELEMENTS, Plan, next_power, plan_for
from fastddpm.kernels.machine_code import read_amdgcn, read_cubin
from fastddpm.nets.fused_body import Pending, fused_body, is_fusable
from tests.kernels.cases import pretend_on_gpu
from tests.kernels.norm_cases import TERMS, call, check_norm, norm_case, norm_float64
from tests.nets.test_unet import OPTIONS, inputs, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_reference_against_float64(terms):
    case = norm_case((3, 24, 4, 5), 4, terms)
    # Float64 through the reference itself: it has the equations right, whatever float32 rounds.
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    total, y = call(add_group_norm_reference, **double)
    want_total, want = norm_float64(case)
    torch.testing.assert_close(total, torch.from_numpy(want_total))
    torch.testing.assert_close(y, torch.from_numpy(want))


@pytest.mark.parametrize("terms", ["everything, add", "everything, scale-shift"])
def test_cpu(terms):
    check_norm(norm_case((3, 24, 4, 5), 4, TERMS[terms]))


def test_reference_is_differentiable():
    case = norm_case((2, 8, 3, 3), 4, ("bias", "residual"))
    case["x"].requires_grad_(True)
    call(**case)[1].square().sum().backward()
    assert case["x"].grad.abs().sum() > 0


def test_op_on_a_pretended_gpu():
    """The branch that CUDA tensors take, and the op's shapes and layouts, without running the kernel."""
    pytest.importorskip("triton")
    case = norm_case((2, 16, 4, 6), 2, TERMS["everything, add"], dtype=torch.bfloat16)
    fakes = {k: pretend_on_gpu(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    total, y = call(**fakes)
    for result in (total, y):
        assert result.shape == (2, 24, 4, 6) and result.dtype == torch.bfloat16 and result.device.type == "cuda"
        assert result.is_contiguous(memory_format=torch.channels_last)
    arguments = (fakes["x"], *(fakes.get(name) for name in ("bias", "row", "index", "residual", "skip")))
    arguments += (fakes["weight"], fakes["beta"], 2, 1e-5, fakes["column"], False, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastddpm.add_group_norm.default, arguments, test_utils=tests)


@pytest.mark.parametrize("channels", [32, 96, 256, 384, 1024])
@pytest.mark.parametrize("side", [1, 7, 16, 28, 100, 256])
@pytest.mark.parametrize("groups", [1, 8, 32])
@pytest.mark.parametrize("batch", [1, 16, 512])
@pytest.mark.parametrize("keep", [True, False])
def test_plans_hold_whole_groups_and_every_pixel(batch, channels, side, groups, keep):
    plan, pixels = plan_for(batch, channels, groups, side * side, keep, 2), side * side
    assert plan.size * groups == channels and groups % plan.together == 0
    assert plan.width == next_power(plan.together * plan.size)
    assert plan.width * plan.rows <= MOST_ELEMENTS
    assert plan.rows * plan.tiles * (plan.splits - 1) < pixels <= plan.rows * plan.tiles * plan.splits
    assert plan.at_once == (plan.rows >= pixels) and 1 <= plan.splits <= 64
    assert 1 <= plan.later <= 4 and plan.rows % plan.apart() == plan.rows % plan.apart(64) == 0
    assert 4 <= plan.warps() <= 16 and 2 <= plan.warps(64) <= 8
    for tiles in (None, plan.later):
        taken = plan.rows * (plan.tiles if tiles is None else tiles)
        programs = -(-pixels // taken)
        assert plan.is_full(pixels, tiles) == (plan.width * taken * programs == plan.together * plan.size * pixels)


def _wrong(change, error, match):
    return pytest.param(change, error, match, id=match)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        _wrong({"x": 1.0}, TypeError, "x must be a tensor, got float"),
        _wrong({"x": torch.zeros(2, 8, 4)}, ValueError, r"x must be of shape \[B, C, H, W\]"),
        _wrong({"x": torch.zeros(2, 8, 4, 4).double()}, TypeError, "x must be float32"),
        _wrong({"groups": 5}, ValueError, r"groups must divide the channels \(12\), got 5; choose"),
        _wrong({"groups": 0}, ValueError, "groups must divide"),
        _wrong({"weight": torch.ones(8)}, ValueError, r"weight must be of shape \[12\], got \[8\]"),
        _wrong({"beta": torch.ones(12, device="meta")}, ValueError, "beta must be on cpu"),
        _wrong({"bias": torch.ones(12)}, ValueError, r"bias must be of shape \[8\]"),
        _wrong({"residual": torch.ones(2, 12, 4, 4)}, ValueError, r"residual must be of shape \[2, 8, 4, 4\]"),
        _wrong({"residual": torch.ones(2, 8, 4, 4).half()}, TypeError, "residual must be float32, got float16"),
        _wrong({"skip": torch.ones(2, 4, 4, 5)}, ValueError, "skip must be of shape"),
        _wrong({"mode": "film"}, ValueError, "mode must be one of add, scale_shift, got 'film'; pick one"),
        _wrong({"row": None}, TypeError, "row must be a tensor, got NoneType"),
        _wrong({"row": torch.ones(3, 20)}, ValueError, r"row must be of shape \[2, D\]"),
        _wrong({"column": 8}, ValueError, "column must leave 8 entries of the row's 15, got 8; pass all"),
        _wrong({"column": -1}, ValueError, "column must leave 8 entries"),
        _wrong({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"row_of must be of shape \[2\]"),
        _wrong({"index": torch.zeros(2)}, TypeError, "row_of must be int64, got float32"),
    ],
)
def test_refuses(change, error, match):
    case = norm_case((2, 8, 4, 4), 4, TERMS["everything, add"], skip_channels=4)
    with pytest.raises(error, match=f"^add_group_norm: {match}") as raised:
        call(**case | change)
    assert "; " in str(raised.value), "the line must say how to mend it"


# --- the machine code ---

AOT = {
    "finest level": ((128, 0), 32, 1024, ("residual",)),
    "three to one, twelve channels to a group": ((256, 128), 32, 1024, ("residual", "skip")),
    "with time": ((256, 0), 32, 256, ("add",)),
    "scale-shift": ((256, 0), 32, 256, ("scale_shift",)),
    "two halves": ((256, 256), 32, 256, ("residual", "skip")),
    "coarsest level": ((256, 256), 32, 16, ("residual", "skip")),
    "the largest tile": ((128, 128), 32, 1024, ("residual", "skip")),
    "narrow padded groups": ((256, 128), 32, 256, ("residual", "skip")),
    "shared out, not kept": ((128, 0), 32, 256 * 256, ("add",)),
    "shared out, both sources": ((128, 128), 32, 256 * 256, ("residual", "skip")),
    "shared out": ((128, 0), 32, 256 * 256, ("residual",)),
    "MNIST": ((32, 0), 8, 784, ("scale_shift",)),
}


def aot_plan(name, dtype="bf16") -> Plan:
    """The plan of one of them, in a large batch."""
    (own, more), groups, pixels, terms = AOT[name]
    return plan_for(512, own + more, groups, pixels, keeps(terms), 4 if dtype == "fp32" else 2)


def keeps(terms) -> bool:
    """Whether the sum is written too."""
    return not {"add", "scale_shift"} & set(terms)


KERNELS = ("add_group_norm_kernel", "group_moments_kernel", "normalise_kernel")


def kernels_of(name, dtype="bf16"):
    """Those that a norm is made by."""
    return KERNELS[:1] if aot_plan(name, dtype).at_once else KERNELS[1:]


@functools.cache
def compiled(name, target, dtype="bf16", which=KERNELS[0]):
    """Machine instructions, registers, stack bytes of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastddpm.kernels import group_norm_triton

    kernel = getattr(group_norm_triton, which)
    (own, more), groups, pixels, terms = AOT[name]
    cuda, channels = target.startswith("sm_"), own + more
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    plan, later = aot_plan(name, dtype), which == "normalise_kernel"
    tiles = plan.later if later else plan.tiles
    types = dict.fromkeys(("x", "bias", "residual", "skip", "weight", "beta", "total", "out"), f"*{dtype}")
    types |= {"row": "*fp32", "index": "*i64", "eps": "fp32", "moments": "*fp32"}
    numbers = {"pixels": pixels, "own": own, "channels": channels, "row_width": 4992, "column": 128, "rows": 1001}
    numbers |= {"share": plan.rows * plan.tiles}
    constants = {
        "SCALE_SHIFT": "scale_shift" in terms, "SILU": True, "APPROX": cuda,
        "GROUP": plan.size, "GROUPS": plan.together, "WIDTH": plan.width, "PIXELS": plan.rows, "TILES": tiles,
        "APART": plan.apart(gpu.warp_size), "SPLITS": next_power(plan.splits), "FULL": plan.is_full(pixels, tiles),
    }  # fmt: skip
    given = {"row": not keeps(terms), "index": not keeps(terms), "total": keeps(terms)}
    given |= {"residual": "residual" in terms, "skip": more > 0}
    constants |= {argument: None for argument, there in given.items() if not there}
    types |= dict.fromkeys(numbers, "i32")
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or numbers.get(name, 1) % 16 == 0
    }
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    asm = triton.compile(source, target=gpu, options={"num_warps": plan.warps(gpu.warp_size)}).asm
    instructions, registers, spill = read_cubin(asm["cubin"]) if cuda else read_amdgcn(asm["amdgcn"])
    return instructions, registers, spill


ELSEWHERE = ("finest level", "three to one, twelve channels to a group", "scale-shift", "the largest tile")
"""On other GPUs; but for the one that takes the most registers, A100's and B200's compilations are slow tests."""


def slow_unless(quick):
    return () if quick else pytest.mark.slow


def test_what_is_shared_out_takes_two_launches_in_any_batch():
    assert {kernels_of(name) for name in AOT if name.startswith("shared out")} == {KERNELS[1:]}
    assert not any(plan_for(batch, 128, 32, 256 * 256, False, 2).at_once for batch in (0, 1, 64, 265, 4096))


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "sm_90") for name in AOT]
    + [(name, "gfx942") for name in ELSEWHERE]
    + [
        pytest.param(name, target, marks=slow_unless(name == "the largest tile"))
        for name in ELSEWHERE
        for target in ("sm_80", "sm_100")
    ],
)
def test_no_spills(name, target):
    pytest.importorskip("triton")
    assert {which: compiled(name, target, which=which)[2] for which in kernels_of(name)} == dict.fromkeys(
        kernels_of(name), 0
    )


def test_float32_does_not_spill():
    pytest.importorskip("triton")
    for name in ("the largest tile", "three to one, twelve channels to a group", "narrow padded groups"):
        for which in kernels_of(name, "fp32"):
            assert compiled(name, "sm_90", "fp32", which)[2] == 0, (name, which)


@pytest.mark.parametrize("name", ["finest level", "two halves", "with time"])
def test_pictures_are_read_once_in_wide_accesses(name):
    pytest.importorskip("triton")
    (own, more), groups, pixels, terms = AOT[name]
    instructions, _, _ = compiled(name, "sm_90")
    plan = aot_plan(name)
    per_thread = plan.width * pixels // (32 * plan.warps())
    loads = sum("LDG.E.128" in line for line in instructions)
    stores = sum("STG.E.128" in line for line in instructions)
    pictures = 1 + ("residual" in terms) + (more > 0)
    written = 1 if "add" in terms else 2
    # Eight elements to an access; weight, beta, bias and row are a few more per thread.
    assert stores == written * per_thread // 8
    assert loads <= pictures * per_thread // 8 + 6
    assert not [line for line in instructions if re.search(r"\bSTG\.E(\.64|\.U16)?\s", line)]


def test_arithmetic_stays_in_float32():
    """A float64 ε, which is what Inductor makes of a Python number, must not turn the arithmetic into float64."""
    pytest.importorskip("triton")
    instructions, _, _ = compiled("finest level", "sm_90")
    assert not [line for line in instructions if re.match(r"D(ADD|MUL|FMA)\b", line)]


# --- the network ---


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
class TestFusedBody:
    @torch.no_grad()
    def test_equals_body(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        projections = network.embed(t, y)
        want = network.body(x, projections)
        assert (fused_body(network, x, projections) - want).abs().max() <= 1e-5 * want.abs().max()

    @torch.no_grad()
    def test_rows_by_index(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        projections, index = network.embed(t, y), torch.tensor([2, 0, 2])
        want = network.body(x, projections[index])
        torch.testing.assert_close(network.body(x, projections, index), want, rtol=0, atol=0)
        assert (fused_body(network, x, projections, index) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "resblock_updown": True}], ids=["ho", "adm"])
@torch.no_grad()
def test_fused_body_is_one_graph(options, monkeypatch):
    """As a GPU would trace it: the choice of the way and the way itself, without a break."""
    network = make(**options)
    x, t, y = inputs(network)
    projections = network.embed(t, y)
    want = network.body(x, projections)
    monkeypatch.setattr("fastddpm.nets.fused_body.runs_triton", lambda device: True)
    assert is_fusable(network, x)
    torch._dynamo.reset()
    got = torch.compile(network.body, fullgraph=True, backend="eager")(x, projections)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_fused_body_in_bfloat16_is_no_less_exact_than_body():
    network = make(num_heads=2)
    x, t, y = inputs(network, batch=8)
    projections = network.embed(t, y)
    want = network.body(x, projections)
    network = network.cast(torch.bfloat16)
    errors = [(f(x, projections).float() - want).square().mean().sqrt() for f in (network.body, network_fused(network))]
    assert 0 < errors[1] <= 1.2 * errors[0]


def network_fused(network):
    return functools.partial(fused_body, network)


def test_it_is_used_on_gpus_for_inference_only(monkeypatch):
    network = make()
    x, gpu = torch.zeros(1, 2, 8, 8), pretend_on_gpu(torch.zeros(1, 2, 8, 8))
    with torch.no_grad():
        assert not is_fusable(network, x)
        assert is_fusable(network, gpu)
        assert not is_fusable(network.train(), gpu)
        assert is_fusable(network.eval(), gpu)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not is_fusable(network, gpu)
        monkeypatch.undo()
    assert not is_fusable(network, gpu)


def test_a_pending_sum_is_made_once_and_alike():
    case = norm_case((2, 8, 4, 4), 4, ("bias", "residual", "skip"), skip_channels=4)
    norm = torch.nn.GroupNorm(4, 12)
    terms = [case[name] for name in ("x", "bias", "residual", "skip")]
    by_itself, by_norm = Pending(*terms), Pending(*terms)
    y = by_norm.normed(norm)
    assert by_itself.total is by_itself.total and by_norm.total is by_norm.total
    torch.testing.assert_close(by_itself.total, by_norm.total)
    torch.testing.assert_close(by_itself.normed(norm), y)
    torch.testing.assert_close(torch.cat((terms[0] + terms[1][:, None, None] + terms[2], terms[3]), 1), by_norm.total)


# --- on a GPU ---


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
    def test_terms(self, terms, dtype):
        check_norm(norm_case((3, 24, 4, 5), 4, terms, dtype=dtype), "cuda")

    @pytest.mark.parametrize(
        ("shape", "groups"),
        [
            ((16, 128, 32, 32), 32),
            ((16, 384, 32, 32), 32),
            ((2, 256, 64, 64), 32),
            ((1, 128, 256, 256), 32),
            ((2, 384, 100, 100), 32),
            ((64, 256, 16, 16), 32),
            ((300, 128, 66, 64), 32),
            ((1, 1, 1, 2), 1),
            ((3, 12, 31, 33), 3),
        ],
        ids=str,
    )
    def test_shapes(self, shape, groups):
        check_norm(norm_case(shape, groups, ("bias", "add", "residual"), dtype=torch.bfloat16), "cuda")

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
    @torch.no_grad()
    def test_network(self, options):
        network = make(**options)
        x, t, y = inputs(network)
        want = network(x, t, y)
        gpu = network.cuda().to(memory_format=torch.channels_last)
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            got = gpu(x.cuda(), t.cuda(), None if y is None else y.cuda())
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
        assert (got.cpu() - want).abs().max() <= 1e-5 * want.abs().max()
