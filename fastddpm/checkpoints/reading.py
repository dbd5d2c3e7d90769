"""Reading other projects' weight files without running any code that they may hold."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.checkpoints import native
from fastddpm.checkpoints.base import CheckpointError, check_file
from fastddpm.common.wording import first_line

_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REFUSED = ("Unsupported global", "Unsupported operand", "Unsupported class", "not allowed", "Trying to")


def read_file(path: Path) -> object:
    """Read a PyTorch file (zip or the older pickle format), or a safetensors file by its suffix.

    Only tensors, numbers, strings and containers of them are built; nothing that the file asks for is called.

    Args:
        path: The file.

    Returns:
        What it holds, on the CPU.

    Raises:
        CheckpointError: If it is missing, truncated, foreign, or would run code.
    """
    if path.suffix == ".safetensors":
        return native.read_safetensors(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        got = "an empty file" if not start else f"a file that starts with {start!r}"
        raise CheckpointError(f"{path}: must be a PyTorch or safetensors file, got {got}; give the file of weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that were once written with other defaults
            values: object = torch.load(path, map_location="cpu", weights_only=True)
            return values
    except pickle.UnpicklingError as error:
        text = str(error)
        if any(phrase in text for phrase in _REFUSED):
            found = _GLOBAL.search(text)
            what = f" ({found[1]})" if found else ""
            raise CheckpointError(
                f"{path}: refused, because to read it would mean to run code of its own{what}; "
                "save only the state dict, and give that file"
            ) from error
        raise CheckpointError(f"{path}: not a whole PyTorch file; fetch or write it again") from error
    except Exception as error:  # damaged archives surface as errors of many types
        raise CheckpointError(f"{path}: not a whole PyTorch file ({first_line(error)}); fetch it again") from error


def as_state_dict(values: object) -> dict[str, Tensor] | None:
    """The values as a state dict, or None if they are something else.

    The prefixes that data parallelism and torch.compile put before every name are left out, and so are gradients.
    """
    if not isinstance(values, Mapping) or not values:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()):
        return None
    state = {key: value.detach() for key, value in values.items()}
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def highest_index(state: Mapping[str, Tensor], prefix: str) -> int:
    """The largest n for which a key starts with `prefix`n., or −1.

    Raises:
        CheckpointError: If n is larger than the number of keys, which no network's is.
    """
    numbers = [key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)]
    largest = max((int(number) for number in numbers if number.isdecimal() and len(number) < 9), default=-1)
    if largest > len(state):
        raise CheckpointError(f"a key starts with {prefix}{largest}, but there are only {len(state)}; the file is odd")
    return largest
