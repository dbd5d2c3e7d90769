"""What every dialect's loader returns, and the one way in which weights enter a network."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.nets.rows import RowNetwork
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec

_LONGEST = 3000


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, foreign or inconsistent; the message says how to mend it.

    The message is one printable line, whatever names and values a file brings into it.
    """

    def __init__(self, message: str) -> None:
        """Replace what would break the line or steer a terminal, and shorten what would flood it."""
        text = "".join(character if character.isprintable() else "�" for character in message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}")


@contextlib.contextmanager
def blamed_on(source: str) -> Iterator[None]:
    """Values in the block are a file's: what is wrong with them is said of it.

    Args:
        source: What messages start with.

    Raises:
        CheckpointError: If the block raises one, or an error of values: something is missing, or out of range.
    """
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{source}: {error} is missing; give the whole file") from error
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def check_file(path: Path) -> None:
    """Check that `path`, if there is anything, is a file: to open a pipe would mean to wait for its writer.

    Raises:
        CheckpointError: If it is something else.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path} must be a file, got a folder, a pipe or a device; give the file itself")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained network with all that is needed to sample from it.

    Args:
        network: (x, t[, y]) → output, one of our own, in evaluation mode.
        schedule: The noise schedule it was trained with.
        spec: The conventions it was trained with.
        dialect: Whose format it was read from.
        path: Where it was read.
        training: How it came about, as far as the file says.
        reason: What showed that it is of this dialect.
        settings: Name → (value, where it comes from: "file", "flag", "preset …" or "default"), for people.
    """

    network: RowNetwork
    schedule: NoiseSchedule
    spec: ModelSpec
    dialect: str
    path: Path
    training: Mapping[str, object]
    reason: str = ""
    settings: Mapping[str, tuple[object, str]] = dataclasses.field(default_factory=dict)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put `weights` into `network` as float32, all or none.

    Args:
        network: A module whose parameters may still be on the meta device.
        weights: One tensor for each parameter and buffer, of the same shape.
        source: The file's name for messages.

    Raises:
        CheckpointError: If names or shapes differ, or a value is not a finite number.
    """
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict(check_weights(shapes, weights, source), strict=True, assign=True)


def check_weights(
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
    source: str,
    remedy: Callable[[list[str]], str] = lambda names: "take both files from the same checkpoint",
) -> dict[str, Tensor]:
    """The weights as float32, in the order of `shapes`.

    Args:
        shapes: Which tensors there must be, and their shapes.
        weights: Tensors of any floating-point type; those of 1×1 convolutions may stand for linear layers'.
        source: The file's name for messages.
        remedy: The names of the first tensors that do not fit → how to mend it.

    Raises:
        CheckpointError: If names or shapes differ, or a value is not a finite number.
    """
    odd = {name: "is missing" for name in shapes if name not in weights}
    odd |= {name: "is left over" for name in weights if name not in shapes}
    for name, shape in shapes.items():
        if name in weights:
            found = tuple(weights[name].shape)
            if found != (*shape, *(1,) * (len(found) - len(shape))):
                odd[name] = f"must have shape {list(shape)}, got {list(found)}"
            elif not weights[name].is_floating_point():
                odd[name] = f"must hold floats, got {weights[name].dtype}"
    if odd:
        first, more = list(odd)[:3], f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        named = "; ".join(f"{name} {odd[name]}" for name in first)
        raise CheckpointError(f"{source}: weights do not fit: {named}{more}; {remedy(first)}")
    converted = {name: weights[name].to(torch.float32).reshape(shape) for name, shape in shapes.items()}
    broken = [name for name, value in converted.items() if not bool(torch.isfinite(value).all())]
    if broken:
        noun = "tensor holds" if len(broken) == 1 else "tensors hold"
        raise CheckpointError(f"{source}: {len(broken)} {noun} NaN or infinity, first {broken[0]}; fetch it again")
    return converted


def check_channels(source: str, into: int, out: int, *allowed: int) -> None:
    """Check how many channels a network returns for those that it takes.

    Args:
        source: The file's name for messages.
        into: Channels of the input, x_t's if the network sees nothing else.
        out: Channels of the output.
        allowed: How many it may have.

    Raises:
        CheckpointError: If it is another number; a network that takes more than it returns is said to be conditioned
            on pictures.
    """
    if out in allowed:
        return
    wanted = " or ".join(map(str, allowed))
    if into > out:
        raise CheckpointError(
            f"{source}: the network takes {into} channels and returns {out}: it is conditioned on pictures "
            "(super-resolution, inpainting, translation), which is not supported for files of this kind; give an "
            "unconditional or class-conditional one"
        )
    raise CheckpointError(
        f"{source}: the output must have {wanted} channels for an input of {into}, got {out}; give another network"
    )
