"""`p_sample` on the CPU: its reference against float64, what it refuses, and how it can be traced."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.kernels import COLUMNS, Operands, p_sample, p_sample_reference
from tests.kernels.cases import CHAPTERS, OPTIONS, S, make_case, pretend_on_gpu
from tests.kernels.checks import check_chapters, check_chapters_noise, check_identity, check_nan, check_p_sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_against_float64(options, dtype):
    check_p_sample(make_case((7, 3, 4, 4), dtype, options))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 3), (2, 1, 2, 2), (1, 1, 3, 341), (7, 1, 28, 28)], ids=str)
def test_odd_sizes(shape):
    check_p_sample(make_case(shape, torch.bfloat16, ("learned", "history")))


@given(
    options=st.sets(
        st.sampled_from(["learned", "guidance", "history", "history2", "bound", "noise", "deterministic", "known"])
    )
)
def test_any_combination_of_options(options):
    options |= {"history"} if "history2" in options else set()
    options -= {"deterministic"} if "known" in options else set()
    check_p_sample(make_case((6, 2, 3, 3), torch.float32, tuple(options), seed=len(options)))


def test_nan_of_the_network_is_not_clipped_away():
    check_nan()


def test_finished_samples_are_left_alone():
    check_identity()


@pytest.mark.parametrize("options", CHAPTERS.values(), ids=CHAPTERS.keys())
def test_chapters_are_runs_of_their_own(options):
    check_chapters(options)


def test_chapters_count_supplied_noise_from_their_end():
    check_chapters_noise()


def test_reference_changes_nothing_and_answers_what_the_op_writes():
    case = make_case(options=("history", "guidance"))
    before = case.clone()
    new, x0 = case.call(p_sample_reference)
    assert torch.equal(case.positional["x"], before.positional["x"])
    assert torch.equal(case.options["history"].isnan(), before.options["history"].isnan())
    case.call(p_sample)
    assert torch.equal(case.positional["x"], new)
    assert torch.equal(case.options["history"], x0)


def test_negative_steps_count_as_the_first_row():
    case, first = make_case(), make_case()
    case.positional["step"][:] = -3
    first.positional["step"][:] = 0
    assert torch.equal(case.call(p_sample_reference)[0], first.call(p_sample_reference)[0])


def test_other_memory_layouts_of_out_give_the_same():
    case, other = make_case(dtype=torch.bfloat16), make_case(dtype=torch.bfloat16)
    other.positional["out"] = other.positional["out"].contiguous(memory_format=torch.channels_last)
    other.positional["seed"] = other.positional["seed"].repeat_interleave(2)[::2]
    case.call(p_sample)
    other.call(p_sample)
    assert torch.equal(case.positional["x"], other.positional["x"])


def test_inputs_that_need_gradients_are_not_tracked():
    case = make_case()
    case.positional["out"].requires_grad_(True)
    case.call(p_sample)
    assert not case.positional["x"].requires_grad


def test_reference_is_differentiable():
    case = make_case(options=("noise",))
    case.positional["out"].requires_grad_(True)
    case.call(p_sample_reference)[0].sum().backward()
    assert case.positional["out"].grad.abs().sum() > 0


@pytest.mark.parametrize("options", [("history",), ("history", "history2")], ids=["one history", "two"])
def test_compiles_without_graph_breaks(options):
    case, plain = make_case(options=options), make_case(options=options)
    case.call(torch.compile(p_sample, fullgraph=True, backend="aot_eager"))
    plain.call(p_sample)
    torch.testing.assert_close(case.positional["x"], plain.positional["x"], rtol=0, atol=0)
    for name in options:
        torch.testing.assert_close(case.options[name], plain.options[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [(), ("learned", "guidance", "history", "bound"), ("history", "history2")],
    ids=["plain", "everything", "two histories"],
)
def test_reference_exports_with_any_batch_size(options):
    case = make_case(options=options)

    class Step(torch.nn.Module):
        def forward(self, positional, options):
            return p_sample_reference(Operands(**positional, **options))

    batch = torch.export.Dim("batch", min=2)
    free = {"table": None, "timesteps": None}
    dynamic = (
        {name: free.get(name, {0: batch}) if name not in free else None for name in case.positional},
        {name: {0: batch} for name in case.options},
    )
    exported = torch.export.export(Step(), (case.positional, case.options), dynamic_shapes=dynamic, strict=False)
    other = make_case((4, 3, 8, 8), options=options)
    got = exported.module()(other.positional, other.options)
    torch.testing.assert_close(got, other.call(p_sample_reference), equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_op_on_a_pretended_gpu(options):
    """The branch that CUDA tensors take, and the op's schema and shape propagation, without running the kernel."""
    pytest.importorskip("triton")
    case = make_case(options=options)
    fakes = {k: pretend_on_gpu(v) for k, v in (case.positional | case.options).items() if isinstance(v, torch.Tensor)}
    stochastic = case.options.get("stochastic", True)
    given = Operands(**fakes)
    assert p_sample(given, stochastic=stochastic) is None
    arguments = (*given, stochastic)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastddpm.p_sample.default, arguments, test_utils=tests)


def test_op_declares_what_it_writes():
    pytest.importorskip("triton")
    import fastddpm.kernels.p_sample_triton  # noqa: F401 - registers the op

    schema = torch.ops.fastddpm.p_sample.default._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["x", "history", "history2"]


def _wrong(name, value, error, match):
    return pytest.param(name, value, error, match, id=f"{name}: {match}")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        _wrong("x", 3, TypeError, r"x must be a tensor, got int"),
        _wrong("x", torch.zeros(2, 3, 4, 4).half(), TypeError, r"x must be float32, got float16"),
        _wrong("x", torch.zeros(2, 3, 4), ValueError, r"x must be of shape \[B, C, H, W\], got \[2, 3, 4\]"),
        _wrong("x", torch.zeros(0, 3, 4, 4), ValueError, r"x must be of shape .* got \[0, 3, 4, 4\]"),
        _wrong("x", torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2), ValueError, r"x must be contiguous, got strides"),
        _wrong("out", torch.zeros(2, 3, 4, 4).double(), TypeError, r"out must be float32 \| bfloat16 \| float16"),
        _wrong("out", torch.zeros(2, 4, 4, 4), ValueError, r"out must be of 3 channels .* or 6 .* got 4"),
        _wrong("out", torch.zeros(2, 3, 4, 5), ValueError, r"out must be of shape"),
        _wrong("out", torch.zeros(2, 3, 4, 4, device="meta"), ValueError, r"out must be on cpu, got meta; move it"),
        _wrong("table", torch.zeros(6, 9), ValueError, r"table must be of shape \[R, 13\], got \[6, 9\]"),
        _wrong("timesteps", torch.zeros(5).long(), ValueError, r"timesteps must be of shape \[6\], got \[5\]"),
        _wrong("timesteps", torch.zeros(6), TypeError, r"timesteps must be int64, got float32"),
        _wrong("step", torch.zeros(2).int(), TypeError, r"step must be int64, got int32"),
        _wrong("step", 3, TypeError, r"step must be a tensor, got int"),
        _wrong("end", torch.zeros(2).int(), TypeError, r"end must be int64, got int32"),
        _wrong("end", 5, TypeError, r"end must be a tensor, got int"),
        _wrong("end", torch.zeros(3).long(), ValueError, r"end must be of shape \[2\], got \[3\]"),
        _wrong("end", torch.zeros(2, device="meta").long(), ValueError, r"end must be on cpu, got meta; move it"),
        _wrong("sample_id", torch.zeros(1).long(), ValueError, r"sample_id must be of shape \[2\], got \[1\]"),
        _wrong("seed", torch.zeros(2, 1).long(), ValueError, r"seed must be of shape \[2\], got \[2, 1\]"),
        _wrong("noise", torch.zeros(2, 3, 4, 4), ValueError, r"noise must be of shape \[N, 2, 3, 4, 4\]"),
        _wrong("noise", torch.zeros(5, 2, 3, 4, 4).mT, ValueError, r"noise must be contiguous"),
        _wrong("guidance", torch.ones(2), ValueError, r"out_uncond must be given with guidance, got None"),
        _wrong("out_uncond", torch.zeros(2, 3, 4, 4), ValueError, r"guidance must be given with out_uncond, got None"),
        _wrong("history", torch.zeros(2, 3, 4, 5), ValueError, r"history must be of shape \[2, 3, 4, 4\]"),
        _wrong("history", torch.zeros(2, 3, 4, 4).mT, ValueError, r"history must be contiguous"),
        _wrong("history2", torch.zeros(2, 3, 4, 4), ValueError, r"history must be given with history2, got None"),
        _wrong("bound", torch.ones(3), ValueError, r"bound must be of shape \[2\], got \[3\]"),
        _wrong("bound", 1.0, TypeError, r"bound must be a tensor, got float"),
        _wrong("known", torch.zeros(2, 3, 4, 4), ValueError, r"mask must be given with known, got None"),
        _wrong("mask", torch.zeros(2, 3, 4, 4), ValueError, r"known must be given with mask, got None"),
    ],
)
def test_refuses(name, value, error, match):
    case = make_case((2, 3, 4, 4))
    before = case.positional["x"].clone()
    arguments = case.positional | case.options | {name: value}
    with pytest.raises(error, match=rf"^p_sample: {match}") as raised:
        p_sample(Operands(**arguments))
    assert "; " in str(raised.value), "the line must say how to mend it"
    assert torch.equal(case.positional["x"], before)


def test_refuses_what_are_no_operands():
    with pytest.raises(TypeError, match=r"^p_sample: it must be given Operands, got Tensor; "):
        p_sample(torch.zeros(2, 3, 4, 4))


def test_refuses_unlike_halves_of_guidance():
    case = make_case((2, 3, 4, 4), options=("guidance",))
    case.options["out_uncond"] = case.options["out_uncond"].half()
    with pytest.raises(TypeError, match=r"^p_sample: out_uncond must be float32, got float16; "):
        case.call(p_sample)


def test_refuses_known_pixels_that_do_not_fit():
    case = make_case((2, 3, 4, 4), options=("known",))
    wrong = case.clone()
    wrong.options["mask"] = wrong.options["mask"][:, :1]
    with pytest.raises(
        ValueError, match=r"^p_sample: mask must be of shape \[2, 3, 4, 4\], got \[2, 1, 4, 4\]; expand"
    ):
        wrong.call(p_sample)
    case.options["stochastic"] = False
    with pytest.raises(ValueError, match=r"^p_sample: stochastic must be True with known, got False; "):
        case.call(p_sample)


def test_what_is_known_stays_to_the_last_bit_and_the_rest_is_as_without():
    """Where a row lands at x_0 (k_0 = 1, k_z = 0)."""
    case = make_case((5, 1, 4, 4), options=("known",))
    case.positional["step"][:] = torch.arange(5)
    table = case.positional["table"]
    table[:S, COLUMNS.index("k_0")], table[:S, COLUMNS.index("k_z")] = 1.0, 0.0
    mask = case.options["mask"] = case.options["mask"].round()
    plain = case.clone()
    del plain.options["known"], plain.options["mask"]
    got, free = case.call(p_sample_reference)[0], plain.call(p_sample_reference)[0]
    assert torch.equal(got, torch.where(mask == 1, free, case.options["known"])) and 0 < mask.mean() < 1


def test_refuses_histories_of_unlike_shapes():
    case = make_case((2, 3, 4, 4), options=("history", "history2"))
    case.options["history2"] = case.options["history2"][:, :, :3]
    with pytest.raises(ValueError, match=r"^p_sample: history2 must be of shape \[2, 3, 4, 4\], got \[2, 3, 3, 4\]; "):
        case.call(p_sample)


@pytest.mark.parametrize("options", [("history",), ("history", "history2")], ids=["one history", "two"])
def test_steps_of_a_run_follow_each_other_with_the_same_arguments(options):
    """Called again and again with the same objects, as a CUDA graph is replayed, it walks down the table."""
    case = make_case((3, 2, 3, 3), options=options)
    case.positional["step"][:] = torch.tensor([0, 1, S])
    expected = case.clone()
    for _ in range(S + 1):
        expected.positional["x"], *past = expected.call(p_sample_reference)
        expected.options |= dict(zip(options, past, strict=True))
        expected.positional["step"] = expected.positional["step"] + 1
        case.call(p_sample)
        case.positional["step"] += 1
    assert torch.equal(case.positional["x"], expected.positional["x"])
    for name in options:
        torch.testing.assert_close(case.options[name], expected.options[name], rtol=0, atol=0, equal_nan=True)
