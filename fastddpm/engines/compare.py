"""A compiled step against an eager one: a compiler's mistake must not pass unseen."""

from __future__ import annotations

import torch

from fastddpm.common.wording import first_line
from fastddpm.engines.runner import StepFunction, StepRunner
from fastddpm.kernels.p_sample import COLUMNS
from fastddpm.step.step import Call

_TOLERANCE, _LOW_TOLERANCE = 1e-3, 5e-2  # relative to the samples


class CompileError(ValueError):
    """A step could not be compiled; the message says why and what to do."""


def not_one_graph(error: Exception) -> CompileError:
    """The error for a network that an exporter or compiler stumbled over, in one line."""
    got = f"{type(error).__name__}: {first_line(error)}"
    return CompileError(f"engine: the network must compile as one graph, got {got}; use engine='eager'")


@torch.no_grad()
def check_step(function: StepFunction, call: Call) -> None:
    """Compare one step from the middle of a run.

    Args:
        function: the compiled step.
        call: what it was compiled for; its samples stay as they are.

    Raises:
        CompileError: the two differ by more than the arithmetic explains.
    """
    eager, compiled = call.copy(), call.copy()
    # At the first rows a network's rounding grows a hundredfold, at the last there is no noise.
    for samples in (eager.state, compiled.state):
        samples.step.copy_((samples.step + samples.end) // 2)
    rows = call.book.rows[eager.state.step]
    StepRunner(eager.step, eager).run(1, call.noise)
    StepRunner(function, compiled).run(1, call.noise)
    if not bool(eager.state.x.isfinite().all()):
        return  # the run itself will say so
    a_o, c_0, c_o = (rows[:, COLUMNS.index(name)] for name in ("a_o", "c_0", "c_o"))
    tolerance = (1.0 + (a_o * c_0).abs() + c_o.abs()) * (_TOLERANCE if _is_float32(call) else _LOW_TOLERANCE)
    # Per sample, root mean square: single values may jump from one clipping bound to the other.
    off = (eager.state.x - compiled.state.x).flatten(1).square().mean(1).sqrt()
    scale = eager.state.x.flatten(1).square().mean(1).sqrt().clamp(min=1.0)
    if not bool((off / scale <= tolerance).all()) or not torch.equal(eager.state.step, compiled.state.step):
        raise CompileError(
            "engine: a compiled step must give what an eager one gives, got a difference of "
            f"{float((off / scale).amax()):.2g}; use engine='eager'"
        )


def _is_float32(call: Call) -> bool:
    return all(p.dtype == torch.float32 for p in call.step.network.parameters() if p.is_floating_point()) and not (
        getattr(call.step.network, "dtype", None)
    )
