"""Which networks a file holds: weights alone, or among a trainer's other state and behind a wrapper's prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from fastddpm.checkpoints.base import CheckpointError
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.reading import as_state_dict

_DEPTH = 3
_LIST = ("model", "optimizer", "epoch", "step", "ema")  # ermongroup/ddim's ckpt.pth, which is a list
_STEPS = ("step", "global_step")

Network = TypeVar("Network")


def state_dicts(values: object) -> dict[str, dict[str, Tensor]]:
    """All state dicts in a file's contents, by where they stand.

    Args:
        values: What the file holds.

    Returns:
        The keys that lead to it, joined by dots, → a state dict. The file itself stands under the empty name.
    """
    return dict(_walk(values, "", _DEPTH))


def _walk(values: object, where: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    state = as_state_dict(values)
    if state is not None:
        yield where, state
        return
    if isinstance(values, (list, tuple)):
        names = _LIST if len(values) in (len(_LIST) - 1, len(_LIST)) else tuple(map(str, range(len(values))))
        values = dict(zip(names, values, strict=False))
    if isinstance(values, Mapping) and depth > 0:
        for name, value in values.items():
            yield from _walk(value, f"{where}.{name}" if where else str(name), depth - 1)


def prefixes(state: Mapping[str, Tensor], entry: str) -> list[str]:
    """What stands before `entry` in a state dict's keys: "", "model.", … once for each network that has such a key."""
    return [key.removesuffix(entry) for key in state if key == entry or key.endswith(f".{entry}")]


def behind(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def find_networks(values: object, *entries: str) -> dict[str, dict[str, Tensor]]:
    """The networks of one dialect in a file, by where they stand.

    Args:
        values: What the file holds.
        entries: Keys that every network of the dialect has.

    Returns:
        Name → state dict without prefix. A name is made of the keys and the prefix that lead to the network: "ema",
        "state_dict.model"; it is empty for weights that are all that the file holds.
    """
    found = {}
    for where, state in state_dicts(values).items():
        for prefix in prefixes(state, entries[0]):
            network = behind(state, prefix)
            if all(entry in network for entry in entries):
                found[".".join(filter(None, (where, prefix[:-1])))] = network
    return found


def choose_network(found: Mapping[str, Network], flags: Flags) -> tuple[str, Network]:
    """The network that is asked for (the flag `model`), the only one, or else the one with averaged weights.

    What is wrong with it afterwards is said of its place in the file too.

    Args:
        found: At least one network, by name.
        flags: May hold `model`.

    Returns:
        Its name, and what is found under it.

    Raises:
        CheckpointError: If there is no such network, or nothing says which of several is meant.
    """
    named = ", ".join(name for name in found if name) or "one without a name"
    asked = flags.given(("model",)).get("model")
    if asked is None:
        averaged = [name for name in found if "ema" in re.split(r"[._]", name)]
        chosen = list(found) if len(found) == 1 else averaged
        if len(chosen) != 1:
            flags.require(f"model (one of {named})")
        asked = chosen[0]
        if asked:
            flags.note("model", asked, "file" if len(found) == 1 else "default")
    elif not isinstance(asked, str) or not asked or asked not in found:
        raise CheckpointError(
            f"{flags.source}: model must be a network of the file ({named}), got {asked!r}; change it"
        )
    if asked:
        flags.source += f", under {asked}"
    return asked, found[asked]


def training_of(values: object, name: str) -> dict[str, object]:
    """What a file says of its training: the network's name in it, and the steps that were done."""
    training: dict[str, object] = {"model": name} if name else {}
    if isinstance(values, (list, tuple)):
        values = dict(zip(_LIST, values, strict=False))
    if isinstance(values, Mapping):
        steps = [values[key] for key in _STEPS if isinstance(values.get(key), int)]
        training |= {"steps": steps[0]} if steps else {}
    return training
