"""`add_group_norm`, interpreted, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fastddpm.kernels import group_norm, group_norm_triton
from fastddpm.kernels.group_norm import add_group_norm_reference
from fastddpm.kernels.group_norm_tiles import Plan
from fastddpm.kernels.group_norm_triton import add_group_norm_op
from tests.kernels.norm_cases import TERMS, call, check_norm, norm_case, norm_float64
from tests.nets.test_unet import inputs, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = ["everything, add", "everything, scale-shift"]
# The sixth is 12 channels to a group, and groups in which own channels and the skip's meet.
SHAPES = [
    pytest.param((1, 1, 1, 2), 1, 0, id="one channel"),
    pytest.param((2, 4, 3, 5), 2, 0, id="odd pictures"),
    pytest.param((2, 64, 4, 4), 32, 0, id="two channels to a group"),
    pytest.param((1, 6, 31, 33), 3, 0, id="1023 pixels"),
    pytest.param((3, 20, 2, 2), 4, 0, id="five channels to a group"),
    pytest.param((2, 16, 4, 4), 2, 8, id="twelve channels to a group, of two sources"),
    pytest.param((2, 40, 2, 3), 5, 20, id="five groups"),
    pytest.param((1, 8, 64, 64), 4, 0, id="64 x 64, shared out"),
    pytest.param((1, 6, 90, 100), 3, 0, id="90 x 100, shared out"),
]


@pytest.fixture(autouse=True)
def on_the_kernel(monkeypatch):
    """The reference must not stand in for the kernel here."""

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(group_norm, "add_group_norm_reference", refuse)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_terms(terms):
    check_norm(norm_case((3, 24, 4, 5), 4, terms, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("terms", EVERYTHING)
def test_types(terms, dtype):
    check_norm(norm_case((3, 24, 4, 5), 4, TERMS[terms], dtype=dtype))


@pytest.mark.parametrize(("shape", "groups", "skip"), SHAPES)
@pytest.mark.parametrize("terms", EVERYTHING)
def test_shapes(shape, groups, skip, terms):
    wanted = TERMS[terms] if skip else tuple(term for term in TERMS[terms] if term != "skip")
    check_norm(norm_case(shape, groups, wanted, skip_channels=skip))


@pytest.mark.parametrize(
    ("name", "plan", "channels", "groups", "skip"),
    [
        *(pytest.param(name, Plan(8, 1, 16, 3, 3, 2), 12, 2, 4, id=f"a group to a program-{name}") for name in TERMS),
        *(
            pytest.param(name, *planned, id=f"{what}-{name}")
            for name in ("alone", *EVERYTHING)
            for what, *planned in (
                ("four groups to a program", Plan(8, 4, 64, 2, 2, 1), 24, 4, 8),
                ("one program to a group, tile after tile", Plan(8, 1, 32, 5, 1, 2), 12, 2, 4),
                ("five channels to a group", Plan(5, 2, 16, 2, 5, 4), 6, 2, 4),
            )
        ),
    ],
)
def test_groups_are_shared_out(monkeypatch, name, plan, channels, groups, skip):
    """Several tiles to a program, the last one partly or not at all there."""

    def planned(_, channels, groups, *__):
        return plan._replace(size=channels // groups)

    monkeypatch.setattr(group_norm_triton, "plan_for", planned)
    check_norm(norm_case((2, channels, 9, 15), groups, TERMS[name], skip_channels=skip))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_float32_norms_on_lower_types(dtype):
    check_norm(norm_case((2, 16, 4, 4), 4, ("bias", "residual"), dtype=dtype, norm_dtype=torch.float32))


def test_other_memory_layouts():
    case = norm_case((2, 8, 4, 6), 4, ("bias", "residual", "skip"))
    case |= {name: case[name].contiguous() for name in ("x", "residual")}
    case["skip"] = case["skip"].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    check_norm(case)


@pytest.mark.parametrize(("side", "groups"), [(16, 2), (64, 4)], ids=["in one launch", "in two"])
def test_a_large_mean_costs_no_more_than_in_pytorch(side, groups):
    case = norm_case((1, 8, side, side), groups)
    case["x"] = (case["x"] + 1000.0).contiguous(memory_format=torch.channels_last)
    _, want = norm_float64(case)
    plain = F.silu(F.group_norm(case["x"], groups, case["weight"], case["beta"], case["eps"]))
    errors = [(y.double() - torch.from_numpy(want)).abs().max() for y in (call(**case)[1], plain)]
    assert 0 < errors[0] <= 2 * errors[1]


def test_results_are_channels_last_and_the_sum_may_be_left_out():
    case = norm_case((2, 8, 4, 4), 4, ("bias",))
    total, y = call(**case)
    assert total.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    none, same = call(**case, keep=False)
    assert none.numel() == 0 and torch.equal(same, y)
    case.pop("bias")
    assert call(**case)[0] is case["x"]


def test_nothing_is_read_or_written_outside():
    """Pictures that are slices of buffers of NaN; a NaN of one picture stays in its group."""
    case = norm_case((1, 12, 3, 3), 3, ("residual",))
    for name in ("x", "residual"):
        buffer = torch.full((3 * 108,), torch.nan)
        part = buffer[108:216].view(1, 3, 3, 12).permute(0, 3, 1, 2)
        part.copy_(case[name])
        case[name] = part
    check_norm(case)
    case["x"] = case["x"].clone()
    case["x"][0, 5, 1, 1] = torch.nan
    _, y = call(**case)
    assert y[:, 4:8].isnan().all() and y[:, :4].isfinite().all() and y[:, 8:].isfinite().all()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_schema(terms):
    case = norm_case((2, 8, 2, 2), 4, terms)
    arguments = (case["x"], *(case.get(name) for name in ("bias", "row", "index", "residual", "skip")))
    arguments += (
        case["weight"],
        case["beta"],
        4,
        1e-5,
        case.get("column", 0),
        case.get("mode") == "scale_shift",
        case["silu"],
        True,
    )
    torch.library.opcheck(add_group_norm_op, arguments, test_utils="test_schema")


@pytest.mark.parametrize("terms", [("add", "index"), ("scale_shift", "index")], ids=["add", "scale-shift"])
def test_rows_that_are_not_there_give_nan(terms):
    case = norm_case((3, 8, 2, 2), 4, terms)
    case["index"] = torch.tensor([4, 5, -1])
    y = call(**case)[1]
    assert y[0].isfinite().all() and y[1:].isnan().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_shift": True, "resblock_updown": True, "num_heads": 2}, {"channels": (8, 24), "num_classes": 5}],
    ids=["ho", "adm", "groups across a concatenation"],
)
def test_a_whole_network(options):
    network = make(**options)
    x, t, y = inputs(network)
    want = network(x, t, y).detach()  # with gradients it runs without the kernel
    with torch.no_grad():
        got = network(x, t, y)
    assert not torch.equal(got, want)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_reference_agrees():
    case = norm_case((2, 24, 5, 4), 4, TERMS["everything, add"])
    want = call(add_group_norm_reference, **case)
    for have, value in zip(call(**case), want, strict=True):
        torch.testing.assert_close(have, value, rtol=1e-5, atol=1e-5)
