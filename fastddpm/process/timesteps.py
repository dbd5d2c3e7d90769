"""Which of the T training timesteps a sampler visits, and in which order: descending, counted from 0."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastddpm.common.arguments import integers, whole

Spacing = Literal["leading", "trailing", "linspace", "linspace_x0"]


def check_timesteps(function: str, T: int, timesteps: Tensor | Sequence[int]) -> Tensor:
    """Validate the timesteps of a run.

    Args:
        function: name that starts the error messages.
        T: training steps.
        timesteps: S integers in 0 … T−1, strictly descending.

    Returns:
        int64 [S] on the CPU, a copy.

    Raises:
        TypeError: the entries are not integers.
        ValueError: there are none, they are not 1-D, out of range, repeated or not descending.
    """
    given = integers(function, "timesteps", timesteps)
    if given.numel() == 0 or given.ndim != 1:
        raise ValueError(
            f"{function}: timesteps must be 1-D with at least one entry, got shape {tuple(given.shape)}; "
            "make them with spaced_timesteps or respace"
        )
    steps = given.clone()
    lowest, highest = int(steps.min()), int(steps.max())
    if lowest < 0 or highest >= T:
        raise ValueError(
            f"{function}: timesteps must be in 0 … {T - 1}, got {lowest if lowest < 0 else highest}; they count from 0"
        )
    rising = (steps[1:] >= steps[:-1]).nonzero()
    if rising.numel():
        i = int(rising[0, 0])
        raise ValueError(
            f"{function}: timesteps must be strictly descending, got {int(steps[i])} followed by "
            f"{int(steps[i + 1])}; sort them from high to low without repeats"
        )
    return steps


def spaced_timesteps(T: int, S: int, spacing: Spacing = "trailing", *, steps_offset: int = 0) -> Tensor:
    """Choose S of T timesteps at even distances (Lin et al. 2024, table 2; the rules and names of diffusers).

    - leading: (T // S) · i + steps_offset for i = S−1 … 0. Ends at steps_offset, and starts below T−1.
    - trailing: round(T − i · T/S) − 1 for i = 0 … S−1. Starts at T−1, and ends above 0.
    - linspace: S rounded points of [0, T−1], both ends included.
    - linspace_x0: S+1 points of [−1, T−1] in float32, cut to integers, of which the lowest, −1, is x_0 itself and no
      step (denoising-diffusion-pytorch). Starts at T−1.

    Halves are rounded to even. diffusers' DPM-Solver spaces S+1 points and leaves out the last one:
    `spaced_timesteps(T, S + 1, spacing)[:-1]` for leading and linspace.

    Args:
        T: training steps, at least 1.
        S: sampling steps, 1 … T.
        spacing: one of the three rules.
        steps_offset: added to every timestep of "leading"; the other rules ignore it, as in diffusers.

    Returns:
        int64 [S], strictly descending.

    Raises:
        TypeError: T, S or steps_offset is not an int.
        ValueError: S is not in 1 … T, the rule is unknown, or steps_offset leads out of 0 … T−1.
    """
    T, S = whole("spaced_timesteps", "T", T), whole("spaced_timesteps", "S", S)
    steps_offset = whole("spaced_timesteps", "steps_offset", steps_offset)
    if not 1 <= S <= T:
        raise ValueError(
            f"spaced_timesteps: S must be in 1 … T = {T}, got {S}; ask for at most as many steps as were trained"
        )
    if spacing == "leading":
        stride, largest = T // S, largest_offset(T, S)
        if not 0 <= steps_offset <= largest:
            raise ValueError(
                f"spaced_timesteps: steps_offset must be in 0 … {largest} for {S} leading steps of {T}, got "
                f"{steps_offset}; choose one of these, or another S"
            )
        steps = [i * stride + steps_offset for i in range(S - 1, -1, -1)]
    elif spacing == "trailing":
        # The stride after rounding at T's magnitude, as NumPy's arange has it: it decides which halves are exact.
        stride_f = T - (T - T / S)
        steps = [round(T - i * stride_f) - 1 for i in range(S)]
    elif spacing == "linspace":
        stride_f = (T - 1) / (S - 1) if S > 1 else 0.0
        steps = [round(i * stride_f) for i in range(S - 1, -1, -1)]
    elif spacing == "linspace_x0":
        # In float32, as the peer has it: its rounding decides on which side of an integer a point falls.
        steps = torch.linspace(-1, T - 1, S + 1).int().flip(0)[:-1].tolist()
    else:
        raise ValueError(
            "spaced_timesteps: spacing must be leading, trailing, linspace or linspace_x0, got "
            f"{spacing!r}; pick one of them"
        )
    return torch.tensor(steps, dtype=torch.int64)


def largest_offset(T: int, S: int) -> int:
    """The largest steps_offset with which S "leading" steps stay within T."""
    return T - 1 - (S - 1) * (T // S)


def respace(T: int, spec: str | int) -> Tensor:
    """Choose timesteps by OpenAI's respacing string (Nichol & Dhariwal 2021, sec. 4).

    - "250": 250 steps at a fractional stride, from 0 to T−1, halves rounded to even;
    - "10,15,20": the T steps are cut into three sections of equal size, of which 10, 15 and 20 steps are
    taken
      in the same way (a remainder of T goes to the first sections, one step each);
    - "ddim25": the smallest integer stride that gives exactly 25 steps, from 0 (Song et al. 2021);
    - "": all T steps.

    Args:
        T: training steps, at least 1.
        spec: the string, or an int for a single section.

    Returns:
        int64 [S], strictly descending.

    Raises:
        TypeError: spec is neither a string nor an int.
        ValueError: the string has another form, or asks for more steps than there are, or for none.
    """
    if isinstance(spec, bool) or not isinstance(spec, str | int):
        raise TypeError(f"respace: spec must be a string or an int, got {type(spec).__name__}; pass e.g. '250'")
    if T < 1:
        raise ValueError(f"respace: T must be at least 1, got {T}; pass the number of training steps")
    text = str(spec).strip() or str(T)
    if text.startswith("ddim"):
        steps = _integer_stride(T, _counts(text, text[len("ddim") :])[0])
    else:
        steps = _sections(T, _counts(text, text))
    if not steps:
        raise ValueError(f"respace: spec must ask for at least one step, got {text!r}; pass e.g. '250'")
    return torch.tensor(sorted(steps, reverse=True), dtype=torch.int64)


def _counts(spec: str, numbers: str) -> list[int]:
    parts = [part.strip() for part in numbers.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong or (spec.startswith("ddim") and len(parts) > 1):
        raise ValueError(
            f"respace: spec must be like '250', '10,15,20' or 'ddim25', got {spec!r}; write counts of steps"
        )
    return [int(part) for part in parts]


def _integer_stride(T: int, count: int) -> set[int]:
    for stride in range(1, T):
        if len(range(0, T, stride)) == count:
            return set(range(0, T, stride))
    raise ValueError(
        f"respace: spec must name a count that an integer stride over {T} steps reaches, got "
        f"'ddim{count}'; "
        f"use '{count}' for a fractional stride"
    )


def _sections(T: int, counts: list[int]) -> set[int]:
    base, extra = divmod(T, len(counts))
    taken: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = base + (1 if i < extra else 0)
        if count > size:
            raise ValueError(f"respace: spec must ask for at most {size} steps in section {i}, got {count}; T is {T}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed up, not multiplied: the rounding of the sum decides some halves
        for _ in range(count):
            taken.add(start + round(position))
            position += stride
        start += size
    return taken
