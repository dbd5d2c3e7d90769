"""A CUDA graph's semantics on the CPU: the operations that were made once are made again, on the same tensors."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` is to launches, for the CPU's operations.

    No Python of the recorded function runs in a replay, so whatever it took from the host is what it was then, and
    every result lands in the tensor that held it when it was recorded.

    Attributes:
        captures: all recorders that were made, for counting.
    """

    captures: list["Recorder"] = []
    replaying = False

    def __init__(self, launches: Callable[[], object]) -> None:
        super().__init__()
        self.operations = []
        self.replays = 0
        Recorder.captures.append(self)
        with self:
            launches()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Make the operations again."""
        self.replays += 1
        Recorder.replaying = True
        try:
            for func, args, kwargs, out in self.operations:
                returns = func._schema.returns
                if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                    continue  # a view of memory that is there already
                again = func(*args, **kwargs)
                if not func._schema.is_mutable:
                    for old, new in zip(_tensors(out), _tensors(again), strict=True):
                        old.copy_(new)
        finally:
            Recorder.replaying = False


class Untouched(TorchDispatchMode):
    """Raises where an operation is made that is no part of a replay: on a GPU it would be a launch of its own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not Recorder.replaying:
            raise AssertionError(f"{func} is launched between replays")
        return func(*args, **(kwargs or {}))


def _tensors(value):
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]
