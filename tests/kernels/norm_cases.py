"""Arguments for the tests of `add_group_norm`, and a float64 evaluation that shares no code with the package."""

import numpy as np
import torch

from fastddpm.kernels.dispatch import INTERPRETED
from fastddpm.kernels.group_norm import GROUP_NORM_RTOL, Norm, Projection, Terms, add_group_norm

TERMS = {
    "alone": (),
    "no silu": ("plain",),
    "bias": ("bias",),
    "add": ("add",),
    "scale-shift": ("scale_shift",),
    "add, by index": ("add", "index"),
    "scale-shift, by index": ("scale_shift", "index"),
    "residual": ("bias", "residual"),
    "skip": ("skip",),
    "everything, add": ("bias", "add", "residual", "skip"),
    "everything, scale-shift": ("bias", "scale_shift", "residual", "skip", "plain"),
}
# Half a unit in the last place; Triton's interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}


def norm_case(shape, groups, terms=(), *, skip_channels=8, dtype=torch.float32, norm_dtype=None, seed=0):
    """Keyword arguments of one call; the pictures have a mean far from zero, the row is wider than what is used."""
    g = torch.Generator().manual_seed(seed)
    batch, own, height, width = shape
    channels = own + (skip_channels if "skip" in terms else 0)

    def normals(*size, offset=0.0):
        return torch.randn(*size, generator=g) + offset

    def pictures(count):
        return normals(batch, count, height, width, offset=3.0).to(dtype, memory_format=torch.channels_last)

    norm_dtype = norm_dtype or dtype
    case = {"x": pictures(own), "weight": normals(channels).to(norm_dtype), "beta": normals(channels).to(norm_dtype)}
    case |= {"groups": groups, "eps": 1e-5, "silu": "plain" not in terms}
    if "bias" in terms:
        case["bias"] = normals(own).to(dtype)
    if "residual" in terms:
        case["residual"] = pictures(own)
    if "skip" in terms:
        case["skip"] = pictures(skip_channels)
    for mode, size in (("add", own), ("scale_shift", 2 * channels)):
        if mode in terms:
            case |= {"mode": mode, "row": normals(batch, size + 7), "column": 3}
    if "index" in terms:
        case |= {"row": normals(5, case["row"].shape[1]), "index": torch.arange(batch) * 3 % 5}
    return case


def call(function=add_group_norm, **case):
    """A call of `add_group_norm`, or of one like it, with the arguments of `norm_case`."""
    norm, terms = (kind(*(case.pop(name, None) for name in kind._fields)) for kind in (Norm, Terms))
    if "index" in case:
        case["row_of"] = case.pop("index")
    given = {name: case.pop(name) for name in Projection._fields if name in case}
    return function(case.pop("x"), norm, terms, Projection(**given) if given else None, **case)


def norm_float64(case):
    """The sum and its norm in float64, and the rounding that the sum alone may bring to the norm."""
    v = {k: t.double().numpy() for k, t in case.items() if isinstance(t, torch.Tensor)}
    total, at = v["x"], case.get("column", 0)
    if "index" in v:
        v["row"] = v["row"][case["index"].numpy()]
    if "bias" in v:
        total = total + v["bias"][:, None, None]
    if case.get("mode") == "add":
        total = total + v["row"][:, at : at + total.shape[1], None, None]
    if "residual" in v:
        total = total + v["residual"]
    if "skip" in v:
        total = np.concatenate((total, v["skip"]), axis=1)
    batch, channels, height, width = total.shape
    parts = total.reshape(batch, case["groups"], -1)
    mean, variance = parts.mean(axis=2, keepdims=True), parts.var(axis=2, keepdims=True)
    y = ((parts - mean) / np.sqrt(variance + case["eps"])).reshape(total.shape)
    y = y * v["weight"][:, None, None] + v["beta"][:, None, None]
    if case.get("mode") == "scale_shift":
        scale, shift = (v["row"][:, i : i + channels, None, None] for i in (at, at + channels))
        y = y * (1 + scale) + shift
    return total, y / (1 + np.exp(-y)) if case["silu"] else y


def check_norm(case, device="cpu"):
    """The op against float64, both results, and the norm without the sum; no argument may have changed."""
    moved = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in case.items()}
    got_total, got = call(**moved)
    total, y = norm_float64(case)
    dtype = case["x"].dtype
    assert got.dtype == got_total.dtype == dtype and got.shape == got_total.shape == total.shape
    alone = call(**moved, keep=False)[1]
    for have, want, rtol in ((got_total, total, 2.0**-22), (got, y, GROUP_NORM_RTOL), (alone, y, GROUP_NORM_RTOL)):
        have = have.double().cpu().numpy()
        assert np.isfinite(have).all()
        allowed = rtol * np.abs(want).max() + ROUNDING[dtype] * np.abs(want)
        assert (np.abs(have - want) <= allowed).all(), f"off by {np.abs(have - want).max():.2e}"
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(moved[name].cpu(), value), f"{name} was changed"
