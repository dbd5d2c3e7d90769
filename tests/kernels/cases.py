"""Arguments for the kernels' tests, and a float64 evaluation of the equations that shares no code with the package."""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastddpm.kernels.operands import COLUMNS, Operands

S = 5
OPTIONS = {
    "plain": (),
    "deterministic": ("deterministic",),
    "noise": ("noise",),
    "one noise row": ("one_noise_row",),
    "guidance": ("guidance",),
    "learned": ("learned",),
    "learned, deterministic": ("learned", "deterministic"),
    "learned, noise": ("learned", "noise"),
    "history": ("history",),
    "bound": ("bound",),
    "history, bound, deterministic": ("history", "bound", "deterministic"),
    "two histories": ("history", "history2"),
    "two histories, deterministic": ("history", "history2", "deterministic"),
    "everything": ("learned", "guidance", "history", "bound"),
    "everything, noise": ("learned", "guidance", "history", "bound", "noise"),
    "everything, two histories": ("learned", "guidance", "history", "history2", "bound"),
    "known": ("known",),
    "known, noise": ("known", "noise"),
    "everything, known": ("learned", "guidance", "history", "bound", "known"),
}
CHAPTERS = {
    "noise made": ("learned", "guidance"),
    "noise supplied": ("noise", "bound"),
    "history": ("history", "deterministic"),
    "two histories": ("history", "history2", "deterministic"),
    "known": ("known",),
}
PAST = {"history": 1, "history2": 2}
"""The first so many rows of a run read none of it: it may hold NaN there."""
WEIGHTS = {"history": "c_h", "history2": "c_h2"}


@dataclass
class Case:
    """Arguments of one call of `p_sample`."""

    positional: dict[str, Tensor]
    options: dict[str, Tensor | bool] = field(default_factory=dict)

    def clone(self) -> "Case":
        def copy(values: dict) -> dict:
            return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}

        return Case(copy(self.positional), copy(self.options))

    def to(self, device: str) -> "Case":
        def move(values: dict) -> dict:
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}

        return Case(move(self.positional), move(self.options))

    @property
    def operands(self) -> Operands:
        options = {name: value for name, value in self.options.items() if name != "stochastic"}
        return Operands(**self.positional, **options)

    @property
    def stochastic(self) -> bool:
        return self.options.get("stochastic", True)

    def call(self, function):
        return function(self.operands, stochastic=self.stochastic)


def make_case(shape=(7, 3, 8, 8), dtype=torch.float32, options=(), seed=0) -> Case:
    """Mixed clocks (finished samples too), seeds beyond 2⁶³, ids beyond 2³², and NaN wherever nothing may look."""
    g = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    table = torch.rand(S + 1, len(COLUMNS), generator=g) * 2 - 1
    column = {name: index for index, name in enumerate(COLUMNS)}
    table[:, column["sigma"]] = torch.rand(S + 1, generator=g)
    table[S - 1, column["sigma"]] = 0.0
    table[:, column["bound"]] = torch.tensor([1.0, 0.5, torch.inf, 1.0, 2.0, torch.inf])
    table[:, column["log_beta"]] = -4 * torch.rand(S + 1, generator=g)
    table[:, column["log_beta_tilde"]] = table[:, column["log_beta"]] - 1
    table[0, column["c_h"]] = 0.0
    table[:2, column["c_h2"]] = 0.0
    table[S] = 0.0
    table[S, column["c_x"]] = 1.0
    table[S, column["bound"]] = torch.inf
    step = (torch.arange(batch) * 3) % (S + 1)
    if batch > 3:
        step[-1] = S + 4
    out_channels = channels * 2 if "learned" in options else channels

    def normals(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    case = Case(
        {
            "x": normals(*shape),
            "out": normals(batch, out_channels, height, width).to(dtype),
            "table": table,
            "timesteps": torch.tensor([999, 500, 250, 1, 0, 0]),
            "step": step,
            "end": torch.full((batch,), S),
            "sample_id": torch.arange(batch) * 7 + 2**33,
            "seed": torch.arange(batch) * 11 - 2**63 + 5,
        }
    )
    if "deterministic" in options:
        case.options["stochastic"] = False
    if "noise" in options:
        case.options["noise"] = normals(S, *shape)
    if "one_noise_row" in options:
        case.options["noise"] = normals(1, *shape)
    if "guidance" in options:
        case.options["out_uncond"] = normals(batch, out_channels, height, width).to(dtype)
        case.options["guidance"] = torch.rand(batch, generator=g) * 3
    if "bound" in options:
        case.options["bound"] = 1 + torch.rand(batch, generator=g)
    if "known" in options:
        case.options["known"] = normals(*shape)
        case.options["mask"] = torch.rand(*shape, generator=g)  # soft, and hard in two thirds of the elements
        case.options["mask"].view(-1)[::3] = 1.0
        case.options["mask"].view(-1)[1::3] = 0.0
    for name, rows in PAST.items():
        if name in options:
            case.options[name] = normals(*shape)
            case.options[name][step < rows] = torch.nan
    return case


def make_chapters(options=(), shape=(4, 2, 3, 3)) -> tuple[Case, Case, Case]:
    """Two runs, the second of S − 2 steps, and the case that holds both as chapters of one table.

    Even samples are those of the first, odd ones those of the second. The first's last sample is finished, with a clock
    that stands among the second's rows; the others have three steps to go at the most. Where noise is supplied, all
    three have the same: it counts from the end.
    """
    first, second = (make_case(shape, options=options, seed=seed) for seed in (0, 1))
    for name in ("table", "timesteps"):
        second.positional[name] = second.positional[name][2:].clone()
    second.positional["table"][0, COLUMNS.index("c_h")] = 0.0
    second.positional["table"][:2, COLUMNS.index("c_h2")] = 0.0
    first.positional["step"] = torch.tensor([2, 0, S + 2, 0])
    second.positional["step"] = torch.tensor([0, 0, 0, 1])
    second.positional["end"] -= 2
    first.positional["x"][2, 0, 0, 0] = -0.0  # which the identity row would turn into +0
    for case in (first, second):
        for name in case.options.keys() & PAST.keys():
            case.options[name].nan_to_num_()[case.positional["step"] < PAST[name]] = torch.nan
    if "noise" in first.options:
        second.options["noise"] = first.options["noise"].clone()
    odd = torch.arange(shape[0]) % 2 == 1

    def join(name: str, a: Tensor, b: Tensor) -> Tensor:
        if name in ("table", "timesteps"):
            return torch.cat([a, b])
        if name == "noise":
            return a
        if name in ("step", "end"):
            b = b + S + 1
        return torch.where(odd.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    def joined(mine: dict, theirs: dict) -> dict:
        return {k: join(k, v, theirs[k]) if isinstance(v, Tensor) else v for k, v in mine.items()}

    both = Case(joined(first.positional, second.positional), joined(first.options, second.options))
    return first, second, both


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's own integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@functools.cache
def normals_float64(seed: int, sample_id: int, t: int, numel: int) -> np.ndarray:
    """One sample's normals, word by word; u is rounded to float32 as specified, all else is float64."""
    lanes: list[float] = []
    for q in range(-(-numel // 4)):
        words = philox_words(
            (q, t % 2**32, sample_id % 2**32, sample_id // 2**32 % 2**32), (seed % 2**32, seed // 2**32 % 2**32)
        )
        u = [float(np.float32(word) * np.float32(2**-32) + np.float32(2**-33)) for word in words]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            r = np.sqrt(-2 * np.log(radius))
            lanes += [r * np.cos(2 * np.pi * angle), r * np.sin(2 * np.pi * angle)]
    return np.array(lanes[:numel])


def p_sample_float64(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The new state, what the history becomes, and the sum of all terms' magnitudes, sample by sample in float64."""
    values = {k: v.double().numpy() if v.is_floating_point() else v.numpy() for k, v in case.positional.items()}
    options = {
        k: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.options.items()
    }
    x = values["x"]
    channels = x.shape[1]
    new, x0s, size = x.copy(), np.zeros_like(x), np.abs(x)
    if "history" in options:
        x0s = options["history"].copy()
    for b in range(x.shape[0]):
        end = int(values["end"][b])
        row = max(min(int(values["step"][b]), end), 0)
        if row == end:
            continue
        c = dict(zip(COLUMNS, values["table"][row], strict=True))
        o, v = values["out"][b, :channels], values["out"][b, channels:]
        if "guidance" in options:
            u = options["out_uncond"][b, :channels]
            o = u + options["guidance"][b] * (o - u)
        x0 = c["a_x"] * x[b] + c["a_o"] * o
        limit = options["bound"][b] if "bound" in options else c["bound"]
        x0 = np.clip(x0, -limit, limit)
        if "bound" in options:
            x0 = x0 / limit
        terms = [c["c_0"] * x0, c["c_x"] * x[b], c["c_o"] * o]
        terms += [c[weight] * options[past][b] for past, weight in WEIGHTS.items() if past in options and c[weight]]
        if options.get("stochastic", True):
            if "noise" in options:
                rows = len(options["noise"])
                z = options["noise"][min(max(rows - (end - row), 0), rows - 1), b]
            else:
                t = int(values["timesteps"][row])
                z = normals_float64(int(values["seed"][b]), int(values["sample_id"][b]), t, x[b].size).reshape(x0.shape)
            sd = c["sigma"]
            if v.size:
                f = (v + 1) / 2
                sd = sd * np.exp(0.5 * (f * c["log_beta"] + (1 - f) * c["log_beta_tilde"]))
            terms.append(sd * z)
            if "known" in options:
                m = options["mask"][b]
                held = [c["k_0"] * options["known"][b], c["k_z"] * z]
                terms = [*(m * term for term in terms), *((1 - m) * term for term in held)]
        new[b], x0s[b] = sum(terms), x0
        size[b] = sum(np.abs(term) for term in terms) + np.abs(c["a_x"] * x[b]) + np.abs(c["a_o"] * o)
    return new, x0s, size


def pretend_on_gpu(tensor: Tensor) -> FakeTensor:
    """The tensor's shape and dtype on a CUDA device, which even a CPU build of torch can pretend."""
    return FakeTensor(_FAKES, tensor.to("meta"), torch.device("cuda", 0))


_FAKES = FakeTensorMode(allow_non_fake_inputs=True)
