"""A CUDA graph of several steps: one launch from the host for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastddpm.state import State

_WARM_UPS = 3  # as PyTorch's documentation has it: libraries allocate their workspaces in the first calls


class StepGraph:
    """K steps of one batch, captured once and replayed.

    Nothing in a step depends on a value that the host knows: the samples' clocks, seeds and ids and the table's rows
    all live in device memory, and a step changes the state in place. So replaying the same launches again and again
    makes the whole trajectory, and a replay past the end changes nothing, because row S is the identity.
    """

    def __init__(self, step: Callable[[], object], state: State, steps: int) -> None:
        """Capture.

        Args:
            step: makes one step of `state`, in place.
            state: the samples; they are as before afterwards.
            steps: K.

        Raises:
            RuntimeError: the step cannot be captured (it waits for the GPU, or allocates outside of PyTorch).
        """
        self.steps = steps
        before = state.copy()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(steps):
                step()
        state.put(torch.arange(len(state.x), device=state.x.device), before)

    def replay(self) -> None:
        """Make K steps."""
        self._graph.replay()
