"""Each kernel against its equation in float64, over dtypes, with the tolerance that stands beside the op."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.bench.cases import LOW_TOLERANCE
from fastddpm.doctor.surroundings import ProblemError
from fastddpm.kernels import (
    COLUMNS,
    Draw,
    Levels,
    Operands,
    amx_attention,
    amx_conv,
    normals_reference,
    p_sample,
    philox4x32_reference,
    q_sample,
    winograd,
)
from fastddpm.kernels.checks import OUT_DTYPES
from fastddpm.kernels.group_norm import GROUP_NORM_RTOL, Norm, Projection, Terms, add_group_norm
from fastddpm.kernels.group_norm_native import native_norms
from fastddpm.kernels.normals import native_normals, normals
from fastddpm.kernels.p_sample import P_SAMPLE_RTOL
from fastddpm.kernels.philox import NORMALS_ATOL
from fastddpm.kernels.q_sample import Q_SAMPLE_RTOL
from fastddpm.kernels.winograd import WINOGRAD_RTOL

SHAPE = (5, 3, 9, 7)
"""[B, C, H, W], odd, so that the last quads are not whole."""
ROWS = 4
_ALWAYS = ("x", "out", "table", "timesteps", "step", "end", "sample_id", "seed")
KNOWN_ANSWERS = (
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)  # fmt: skip
"""Counter and key, and what Philox4x32-10 makes of them, from Random123's kat_vectors."""


def check_noise(device: torch.device) -> str:
    """Philox's known answers on the device, and the moments of the normals."""
    for words, expected in KNOWN_ANSWERS:
        given = [torch.tensor([word], device=device) for word in words]
        got = tuple(int(word) for word in torch.cat(philox4x32_reference(*given)).cpu())
        if got != expected:
            raise ProblemError(f"Philox must give {expected[0]:08x} …, got {got[0]:08x} …")
    ids = torch.arange(64, device=device)
    z = normals_reference(torch.zeros_like(ids), ids, torch.full_like(ids, 7), 4096).double()
    mean, std = float(z.mean()), float(z.std())
    if abs(mean) > 0.01 or abs(std - 1) > 0.01:
        raise ProblemError(f"normals must have mean 0 and deviation 1, got {mean:.3g} and {std:.4g}")
    if device.type == "cpu":  # compiled steps make theirs in C
        with native_normals():
            made = normals(torch.zeros_like(ids), ids, torch.full_like(ids, 7), 4096)
        worst_error(made, z, torch.full_like(z, NORMALS_ATOL), "normals in C")
    return f"{len(KNOWN_ANSWERS)} known answers; {z.numel()} normals of mean {mean:.4f}, deviation {std:.4f}"


def check_p_sample(device: torch.device) -> str:
    """Rows with the bare least and with all that solvers of one and of two histories ask for, for each dtype."""
    worst = 0.0
    wanted = {"no options": (False, ""), "one history": (True, "history2"), "all options": (True, "")}
    for dtype in OUT_DTYPES:
        for name, (full, left_out) in wanted.items():
            case = {key: value for key, value in _update_case(dtype, full).items() if key != left_out}
            want, size = _update_float64(case)
            given = {key: value.to(device) for key, value in case.items()}
            p_sample(Operands(**given))
            what = f"p_sample, {_name(dtype)}, {name}"
            worst = max(worst, worst_error(given["x"], want, P_SAMPLE_RTOL * size + NORMALS_ATOL, what))
    return _passed(worst, OUT_DTYPES)


def check_q_sample(device: torch.device) -> str:
    """Floats and bytes, noise given and made."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    angles = torch.linspace(0.1, 1.5, 10)
    tables, t, ids = (angles.cos(), angles.sin()), torch.arange(SHAPE[0]) * 2, torch.arange(SHAPE[0])
    made = normals_reference(ids, ids, t, _numel()).reshape(SHAPE)
    signal, spread = (table[t].double()[:, None, None, None] for table in tables)
    for dtype in (torch.float32, torch.uint8):
        x = torch.randn(SHAPE, generator=generator)
        x = (x * 40 + 128).clamp(0, 255).to(torch.uint8) if dtype == torch.uint8 else x
        exact = x.double() / 127.5 - 1 if dtype == torch.uint8 else x.double()
        for given in (True, False):
            eps = torch.randn(SHAPE, generator=generator) if given else made
            noise = eps.to(device) if given else Draw(ids.to(device), ids.to(device))
            levels = Levels(*(table.to(device) for table in tables))
            got, _ = q_sample(x.to(device), t.to(device), levels, noise)
            # The map of bytes to [-1, 1] rounds too, by up to a unit of 1.
            size = (signal * exact).abs() + (spread * eps).abs() + signal
            what = f"q_sample, {_name(dtype)}, noise {'given' if given else 'made'}"
            allowed = Q_SAMPLE_RTOL * size + NORMALS_ATOL
            worst = max(worst, worst_error(got, signal * exact + spread * eps, allowed, what))
    return _passed(worst, (torch.float32, torch.uint8))


def check_add_group_norm(device: torch.device) -> str:
    """With a bias, a projection, a residual branch and SiLU, on channels-last pictures of each dtype; on CPUs in C."""
    worst, (B, H, W), groups, eps = 0.0, (3, 6, 5), 4, 1e-5
    for dtype, C in itertools.product(OUT_DTYPES, (16, 24)):  # in C sixteen channels at a time are another way
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        x, residual = (draw(B, C, H, W).contiguous(memory_format=torch.channels_last) for _ in range(2))
        weight, beta, bias, row = draw(C), draw(C), draw(C), draw(B, C).float()
        total = x.double() + bias.double()[:, None, None] + row.double()[:, :, None, None] + residual.double()
        want = F.silu(F.group_norm(total, groups, weight.double(), beta.double(), eps))
        norm = Norm(weight.to(device), beta.to(device), groups, eps)
        terms = Terms(bias.to(device), residual.to(device))
        with native_norms():
            _, got = add_group_norm(x.to(device), norm, terms, Projection(row.to(device), "add"))
        low = 0.0 if dtype == torch.float32 else LOW_TOLERANCE
        allowed = (GROUP_NORM_RTOL + low) * want.abs().max() + 0 * want
        worst = max(worst, worst_error(got, want, allowed, f"add_group_norm, {_name(dtype)}"))
    return _passed(worst, OUT_DTYPES)


def check_winograd(device: torch.device) -> str:
    """The C kernel, compiled for this processor, against the direct convolution in float64."""
    worst, dtypes = 0.0, (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        x, weight, bias, want = _convolution_case(dtype)
        low = 0.0 if dtype == torch.float32 else 2.0**-8 * want.abs()
        got = winograd.winograd_conv(x, winograd.pack(weight), bias)
        worst = max(worst, worst_error(got, want, WINOGRAD_RTOL * x.double().abs().max() + low + 0 * want,
                                f"winograd, {_name(dtype)}"))  # fmt: skip
    return _passed(worst, dtypes)


def check_amx_conv(device: torch.device) -> str:
    """The matrix unit's convolution likewise; the weights are of its type too."""
    x, weight, bias, _ = _convolution_case(torch.bfloat16)
    one, sums, worst = weight[:, :, 1:2, 1:2], amx_conv.weights_behind_upsampling(weight), 0.0
    doubled = F.interpolate(x, scale_factor=2)
    # Sums of weights are rounded to bfloat16 as well.
    cases = (("3x3", x, weight, weight, 0.0), ("1x1", x, one, one, 0.0), ("doubled", doubled, weight, sums, 2.0**-8))
    for what, seen, kernel, given, rounding in cases:
        seen, kernel, padding = seen.double(), kernel.double(), kernel.shape[2] // 2
        want = F.conv2d(seen, kernel, bias.double(), padding=padding)
        size = F.conv2d(seen.abs(), kernel.abs(), padding=padding)
        got = amx_conv.amx_conv(x, amx_conv.pack(given), bias)
        allowed = 2.0**-8 * want.abs() + rounding * size + 2.0**-18
        worst = max(worst, worst_error(got, want, allowed, f"amx_conv, {what}"))
    return _passed(worst, (torch.bfloat16,))


def check_amx_attention(device: torch.device) -> str:
    """Its attention, beside PyTorch's in float64; weights and result are rounded once."""
    qkv = torch.randn(3, 64, 3 * 2 * 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = torch.unflatten(qkv.double(), 2, (3, 2, 32)).transpose(1, 3).unbind(2)
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    got = amx_attention.amx_attention(qkv, 2)
    return _passed(worst_error(got, want, 2.0**-9 * (v.abs().amax() + want.abs()), "amx_attention"), (torch.bfloat16,))


def _convolution_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and float32 weights of a layer, that bfloat16 holds too, its bias, and the result in float64."""
    generator, channels = torch.Generator().manual_seed(0), 32
    weight = (torch.rand(64, channels, 3, 3, generator=generator) * 2 - 1) / (9 * channels) ** 0.5
    bias, weight = torch.randn(64, generator=generator), weight.bfloat16().float()
    x = torch.randn(2, channels, 13, 6, generator=generator).to(dtype)
    return x, weight, bias, F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


def _update_case(dtype: torch.dtype, full: bool) -> dict[str, Tensor]:
    """Arguments of `p_sample`: samples at all rows, the last of them finished."""
    generator, (B, C, H, W) = torch.Generator().manual_seed(0), SHAPE
    table = torch.rand(ROWS + 1, len(COLUMNS), generator=generator) * 2 - 1
    column = {name: i for i, name in enumerate(COLUMNS)}
    table[:, column["sigma"]] = table[:, column["sigma"]].abs()
    table[:, column["bound"]] = torch.tensor([1.0, 0.5, torch.inf, 1.0, torch.inf])
    table[ROWS] = torch.tensor([float(name == "c_x") or (torch.inf if name == "bound" else 0.0) for name in COLUMNS])
    outputs = 2 * C if full else C

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    case = {
        "x": draw(*SHAPE), "out": draw(B, outputs, H, W).to(dtype), "table": table,
        "timesteps": torch.tensor([999, 500, 3, 1, 0]), "step": torch.arange(B) % (ROWS + 1),
        "end": torch.full((B,), ROWS), "sample_id": torch.arange(B) + 2**33, "seed": torch.arange(B) - 2**63,
    }  # fmt: skip
    if full:
        case |= {
            "out_uncond": draw(B, outputs, H, W).to(dtype), "guidance": 1 + draw(B).abs(), "history": draw(*SHAPE),
            "history2": draw(*SHAPE), "bound": 1 + draw(B).abs(), "known": draw(*SHAPE),
            "mask": draw(*SHAPE).clamp(0, 1),
        }  # fmt: skip
    return case


def _update_float64(case: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The equations of `p_sample`, and the sum of all terms' magnitudes, to which its tolerance is relative."""
    x, out, table, timesteps, step, end, sample_id, seed = (case[name] for name in _ALWAYS)

    def each(values: Tensor) -> Tensor:
        return values.double()[:, None, None, None]

    channels = x.shape[1]
    c = {name: each(table[step, i]) for i, name in enumerate(COLUMNS)}
    z = normals_reference(seed, sample_id, timesteps[step], x[0].numel()).reshape(x.shape).double()
    state, o, v = x.double(), out[:, :channels].double(), out[:, channels:].double()
    if "guidance" in case:
        base = case["out_uncond"][:, :channels].double()
        o = base + each(case["guidance"]) * (o - base)
    inside = (c["a_x"] * state, c["a_o"] * o)
    limit = each(case["bound"]) if "bound" in case else c["bound"]
    x0 = (inside[0] + inside[1]).clamp(-limit, limit) / (limit if "bound" in case else 1.0)
    sigma = c["sigma"]
    if v.shape[1]:
        part = (v + 1) / 2
        sigma = sigma * torch.exp(0.5 * (part * c["log_beta"] + (1 - part) * c["log_beta_tilde"]))
    terms = [c["c_0"] * x0, c["c_x"] * state, c["c_o"] * o, sigma * z]
    for name, past in (("c_h", "history"), ("c_h2", "history2")):
        if past in case:
            terms.append(c[name] * case[past].double())
    if "known" in case:
        mask, known = case["mask"].double(), case["known"].double()
        held = [c["k_0"] * known, c["k_z"] * z]
        terms = [*(mask * term for term in terms), *((1 - mask) * term for term in held)]
    new = torch.stack(terms).sum(0)
    size = torch.stack([*terms, *inside]).abs().sum(0)
    finished = (step >= end)[:, None, None, None]
    return torch.where(finished, state, new), torch.where(finished, 0.0, size)


def worst_error(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> float:
    """The largest error as a part of what is allowed.

    Raises:
        ProblemError: it is more, or not a number.
    """
    error = (got.cpu().double() - want).abs()
    worst = float((error / allowed).nan_to_num(nan=torch.inf).max())
    if not worst <= 1:
        raise ProblemError(f"{what}: off by up to {float(error.max()):.2e}, {worst:.3g} times what is allowed")
    return worst


def _passed(worst: float, dtypes: tuple[torch.dtype, ...]) -> str:
    return f"{', '.join(map(_name, dtypes))}: the largest error is {worst:.2g} of what is allowed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numel() -> int:
    return SHAPE[1] * SHAPE[2] * SHAPE[3]
