"""What the tests of the CPU, of the interpreter and of a GPU all ask of the ops."""

import warnings

import numpy as np
import torch

from fastddpm.kernels import COLUMNS, Draw, Levels, p_sample, q_sample, q_sample_reference
from fastddpm.kernels.p_sample import P_SAMPLE_RTOL
from fastddpm.kernels.philox import LIKELIHOOD, NORMALS_ATOL
from fastddpm.kernels.q_sample import Q_SAMPLE_RTOL
from tests.kernels.cases import PAST, Case, S, make_case, make_chapters, p_sample_float64


def assert_within(have, want, size, rtol, what):
    """|have − want| ≤ rtol·size + the noise's own tolerance, and NaN nowhere."""
    have, want = np.asarray(have, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert np.isfinite(have).all(), f"{what}: {np.isnan(have).sum()} NaN"
    excess = np.abs(have - want) - rtol * size
    assert excess.max() <= NORMALS_ATOL, (
        f"{what}: off by {np.abs(have - want).max():.2e}, allowed {rtol * size.max():.2e}"
    )


def check_p_sample(case: Case, device: str = "cpu") -> None:
    """The op against float64: the state, the history, finished samples bit for bit, and no other argument changed."""
    want, want_history, size = p_sample_float64(case)
    after = case.to(device).clone()
    assert after.call(p_sample) is None
    after = after.to("cpu")
    done = case.positional["step"] >= case.positional["end"]
    got = after.positional["x"]
    assert torch.equal(got[done].view(torch.int32), case.positional["x"][done].view(torch.int32))
    assert_within(got, want, size, P_SAMPLE_RTOL, "x")
    if "history" in case.options:
        assert_within(after.options["history"], want_history, size, P_SAMPLE_RTOL, "history")
    if "history2" in case.options:
        handed_on = torch.where(done[:, None, None, None], case.options["history2"], case.options["history"])
        assert torch.equal(after.options["history2"].view(torch.int32), handed_on.view(torch.int32))
    for name, value in (case.positional | case.options).items():
        if isinstance(value, torch.Tensor) and name not in ("x", *PAST):
            changed = (after.positional | after.options)[name]
            assert torch.equal(changed, value), f"{name} was changed"


def check_chapters(options: tuple[str, ...], device: str = "cpu") -> None:
    """Samples of two chapters of one table, each bit for bit as in its own run alone, from first to last."""
    check_p_sample(make_chapters(options)[2], device)
    first, second, both = (case.to(device).clone() for case in make_chapters(options))
    written = ("x", *(name for name in PAST if name in options))
    finished = both.clone()
    for _ in range(4):
        for case in (first, second, both):
            case.call(p_sample)
            case.positional["step"] += 1
        for name in written:
            got, *alone = ((case.positional | case.options)[name].view(torch.int32) for case in (both, first, second))
            assert torch.equal(got[0::2], alone[0][0::2]), f"{name} of the first chapter"
            assert torch.equal(got[1::2], alone[1][1::2]), f"{name} of the second chapter"
    assert finished.positional["end"][-2] < finished.positional["step"][-2] < len(finished.positional["table"]) - 1
    for name in written:
        got, before = ((case.positional | case.options)[name].view(torch.int32) for case in (both, finished))
        assert torch.equal(got[-2], before[-2]), f"{name} of a finished sample of the first chapter"


def check_chapters_noise(device: str = "cpu") -> None:
    """Rows of supplied noise count from a chapter's end, wherever it begins, and the first row serves all before it."""
    for rows in (1, 2, S):
        _, _, case = make_chapters(("noise",))
        noise = case.options["noise"] = case.options["noise"][:rows].contiguous()
        at = case.positional
        at["table"][:, :] = 0.0
        at["table"][:, COLUMNS.index("sigma")] = 1.0
        for _ in range(3):
            left = at["end"] - at["step"]
            moved = case.to(device).clone()
            moved.call(p_sample)
            for b in (left > 0).nonzero().flatten().tolist():
                want = noise[max(rows - int(left[b]), 0), b]
                assert torch.equal(moved.positional["x"][b].cpu(), want), (rows, b, int(left[b]))
            at["step"] += 1


def check_nan(device: str = "cpu") -> None:
    """A NaN of the network shows in exactly that element, clipped or not, and not in a finished sample."""
    for options in ((), ("bound",), ("guidance",), ("learned", "noise")):
        case = make_case((7, 3, 4, 4), torch.bfloat16, options)
        case.positional["out"][:, 1, 2, 3] = torch.nan
        after = case.to(device).clone()
        after.call(p_sample)
        got = after.positional["x"].cpu()
        active = case.positional["step"] < S
        assert got[active, 1, 2, 3].isnan().all(), options
        got[:, 1, 2, 3] = 0
        assert got.isfinite().all(), options
        done = ~active
        expected = case.positional["x"][done].clone()
        expected[:, 1, 2, 3] = 0
        assert torch.equal(got[done], expected), options


def check_identity(device: str = "cpu") -> None:
    """At row S nothing changes, not even the sign of zero, infinities or NaN payloads; nor do the histories."""
    for options in (("history",), ("history", "history2")):
        case = make_case((2, 3, 4, 4), torch.float16, options)
        case.positional["step"][:] = S
        case.positional["x"].view(-1)[:4] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan])
        after = case.to(device).clone()
        after.call(p_sample)
        after = after.to("cpu")
        assert torch.equal(after.positional["x"].view(torch.int32), case.positional["x"].view(torch.int32))
        for name in options:
            assert torch.equal(after.options[name].view(torch.int32), case.options[name].view(torch.int32))


def q_arguments(shape, source, given, device="cpu", seed=0):
    """x₀, t, levels and noise of `q_sample`: `source` is float or uint8, ε is given or made."""
    g = torch.Generator().manual_seed(seed)
    batch = shape[0]
    if source == "uint8":
        x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    else:
        x = torch.randn(shape, generator=g)
    t = (torch.arange(batch) * 7 + 9) % 10
    angles = torch.linspace(0, torch.pi / 2, 10)
    levels = Levels(angles.cos().to(device), angles.sin().to(device))
    numbers = torch.arange(batch, device=device)
    noise = torch.randn(shape, generator=g).to(device) if given else Draw(numbers - 2**63, numbers + 2**33, LIKELIHOOD)
    return x.to(device), t.to(device), levels, noise


def check_q_sample(shape, source, given, device="cpu") -> None:
    """The op against its reference, which is itself checked against float64."""
    arguments, (x, t, levels, noise) = q_arguments(shape, source, given, device), q_arguments(shape, source, given)
    want, want_eps = q_sample_reference(x, t, levels, noise)
    got, eps = q_sample(*arguments)
    assert got.dtype == eps.dtype == torch.float32 and got.shape == eps.shape == shape
    x = x.double() / 127.5 - 1 if source == "uint8" else x.double()
    signal, spread = (table[t].double().reshape(-1, 1, 1, 1) for table in levels)
    size = (signal * x).abs() + (spread * want_eps).abs() + signal
    assert_within(eps.cpu(), want_eps, np.zeros(shape), 0.0, "eps")
    assert_within(got.cpu(), want, size.numpy(), Q_SAMPLE_RTOL, "x_t")
    assert_within(got.cpu(), signal * x + spread * eps.cpu().double(), size.numpy(), Q_SAMPLE_RTOL, "x_t of its ε")
    if given:
        assert eps is arguments[-1]


def check_gradients(device: str = "cpu") -> None:
    """Gradients of a float x₀ and a given ε are √ᾱ and √(1−ᾱ) times what comes in; ε's own is passed on."""
    x, t, levels, eps = q_arguments((3, 2, 5, 5), "float", True, device)
    x.requires_grad_(True)
    eps.requires_grad_(True)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    x_t, same = q_sample(x, t, levels, eps)
    ((x_t * weight).sum() + (same * 3).sum()).backward()
    torch.testing.assert_close(x.grad, levels.signal[t].reshape(-1, 1, 1, 1) * weight)
    torch.testing.assert_close(eps.grad, levels.spread[t].reshape(-1, 1, 1, 1) * weight + 3)

    x.grad = None
    x_t, made = q_sample(x, t, levels, Draw(t, t))
    (x_t * weight).sum().backward()
    torch.testing.assert_close(x.grad, levels.signal[t].reshape(-1, 1, 1, 1) * weight)

    part, given = (value.detach()[..., :2, :2].clone() for value in (x, eps))  # each element costs two calls

    def once(argument: torch.Tensor) -> torch.Tensor:
        return q_sample(argument, t, levels, given)[0]

    # The op is linear in x₀, so a wide step of the finite differences costs no accuracy in float32.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input #0 requires gradient and is not a double precision")
        assert torch.autograd.gradcheck(once, part.requires_grad_(True), eps=0.5, atol=1e-3, rtol=1e-3)
