"""A compiled step against an eager one: a compiler's mistake must not pass unseen."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastddpm.common.wording import named
from fastddpm.engines.runner import StepFunction, StepRunner
from fastddpm.kernels.operands import COLUMNS
from fastddpm.step.likelihood import LikelihoodStep
from fastddpm.step.network import Network
from fastddpm.step.state import State
from fastddpm.step.step import Call

_TOLERANCE, _LOW_TOLERANCE = 1e-3, 5e-2  # relative to the samples, or to the terms
_LEAST_TERM = 1e-4  # bits and squares below this are compared with it


class CompileError(ValueError):
    """A step could not be compiled; the message says why and what to do."""


def not_one_graph(error: Exception) -> CompileError:
    """The error for a network that an exporter or compiler stumbled over, in one line."""
    return CompileError(f"engine: the network must compile as one graph, got {named(error)}; use engine='eager'")


@torch.no_grad()
def check_step(function: StepFunction, call: Call) -> None:
    """Compare one step from the middle of a run.

    Args:
        function: the compiled step.
        call: what it was compiled for; its samples stay as they are.

    Raises:
        CompileError: the two differ by more than the arithmetic explains.
    """
    if isinstance(call.step, LikelihoodStep):
        _check_terms(function, call)
        return
    # At the first rows a network's rounding grows a hundredfold, at the last there is no noise.
    place = (call.state.step + call.state.end) // 2
    eager, compiled = _both(function, call, place)
    if not bool(eager.x.isfinite().all()):
        return  # the run itself will say so
    a_o, c_0, c_o = (call.book.rows[place][:, COLUMNS.index(name)] for name in ("a_o", "c_0", "c_o"))
    tolerance = (1.0 + (a_o * c_0).abs() + c_o.abs()) * _tolerance(call)
    # Per sample, root mean square: single values may jump from one clipping bound to the other.
    off = (eager.x - compiled.x).flatten(1).square().mean(1).sqrt()
    off = off / eager.x.flatten(1).square().mean(1).sqrt().clamp(min=1.0)
    _agree(off, tolerance, eager, compiled)


def _check_terms(function: StepFunction, call: Call) -> None:
    """Compare a bound's step in the middle and at its last row, which decodes."""
    state = call.state
    # Where the mean is far off, the decoder's differences of Φ are as small as their rounding, and single ones jump.
    decoded = torch.tensor([_LOW_TOLERANCE, _tolerance(call), _tolerance(call)], device=state.x.device)
    for place, tolerance in (((state.step + state.end) // 2, decoded.amin()), (state.end - 1, decoded)):
        eager, compiled = _both(function, call, place)
        one, other = torch.as_tensor(eager.terms), torch.as_tensor(compiled.terms)
        if not bool(one.isfinite().all()):
            return  # the run itself will say so
        _agree((one - other).abs() / one.abs().clamp(min=_LEAST_TERM), tolerance, eager, compiled)


def _both(function: StepFunction, call: Call, place: Tensor) -> tuple[State, State]:
    """The samples after an eager and after a compiled step from these rows."""
    eager, compiled = call.copy(), call.copy()
    for samples, made_by in ((eager, eager.step), (compiled, function)):
        samples.state.step.copy_(place)
        StepRunner(made_by, samples).run(1, call.noise)
    return eager.state, compiled.state


def _agree(off: Tensor, tolerance: Tensor, eager: State, compiled: State) -> None:
    if not bool((off <= tolerance).all()) or not torch.equal(eager.step, compiled.step):
        raise CompileError(
            "engine: a compiled step must give what an eager one gives, got a difference of "
            f"{float(off.amax()):.2g}; use engine='eager'"
        )


def _tolerance(call: Call) -> float:
    network = call.step.network
    is_float32 = all(p.dtype == torch.float32 for p in network.parameters() if p.is_floating_point())
    return _TOLERANCE if is_float32 and cast(Network, network).dtype in (None, torch.float32) else _LOW_TOLERANCE
