"""What callers give: numbers in whatever type they have them (Python's, NumPy's, PyTorch's), and names of options."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping

import torch
from torch import Tensor


def whole(function: str, name: str, value: object) -> int:
    """The int that `value` is.

    Args:
        function: name that starts the error message.
        name: of the argument.
        value: an int, a NumPy integer, or an integer tensor of one entry.

    Raises:
        TypeError: it is none of these.
    """
    try:
        if isinstance(value, (bool, Tensor)) and (isinstance(value, bool) or value.dtype == torch.bool):
            raise TypeError("a truth value")
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}; convert it") from error


def number(function: str, name: str, value: object) -> float:
    """The float that `value` is.

    Args:
        function: name that starts the error message.
        name: of the argument.
        value: a number of Python's, NumPy's or PyTorch's.

    Raises:
        TypeError: it is none.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError("a text or a truth value")
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{function}: {name} must be a number, got {reprlib.repr(value)}; convert it") from error


def integers(function: str, name: str, values: object) -> Tensor:
    """The integers as a tensor on the CPU.

    Args:
        function: name that starts the error message.
        name: of the argument.
        values: an integer or a sequence, array or tensor of them.

    Returns:
        int64, which may share its memory.

    Raises:
        TypeError: they are not integers, or do not fit into 64 bits.
    """
    try:
        given = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{function}: {name} must be integers, got {reprlib.repr(values)}; convert them") from error
    if given.numel() and (given.dtype == torch.bool or given.is_floating_point() or given.is_complex()):
        raise TypeError(f"{function}: {name} must be integers, got {given.dtype}; convert them to int64")
    return given.detach().to("cpu", torch.int64)


def numbers(function: str, name: str, values: object) -> Tensor:
    """The numbers as a float32 tensor on the CPU.

    Args:
        function: name that starts the error message.
        name: of the argument.
        values: a number or a sequence, array or tensor of them.

    Returns:
        float32.

    Raises:
        TypeError: they are not real numbers.
    """
    try:
        return torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{function}: {name} must be numbers, got {reprlib.repr(values)}; convert them") from error


def only_options(function: str, given: Mapping[str, object], kind: type) -> None:
    """Refuse keywords that a TypedDict has not; Python does so itself only where they are spelled out.

    Raises:
        TypeError: there is one.
    """
    if foreign := ", ".join(sorted(given.keys() - kind.__annotations__.keys())):
        raise TypeError(
            f"{function}: options must be among {', '.join(kind.__annotations__)}, got {foreign}; mend the name"
        )
