"""A compiled step against an eager one: a compiler's mistake must not pass unseen."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.common.wording import first_line
from fastddpm.engines.runner import StepFunction, StepRunner
from fastddpm.kernels.p_sample import COLUMNS
from fastddpm.step.likelihood import LikelihoodStep
from fastddpm.step.state import State
from fastddpm.step.step import Call

_TOLERANCE, _LOW_TOLERANCE = 1e-3, 5e-2  # relative to the samples, or to the terms
_LEAST_TERM = 1e-4  # bits and squares below this are compared with it


class CompileError(ValueError):
    """A step could not be compiled; the message says why and what to do."""


def not_one_graph(error: Exception) -> CompileError:
    """The error for a network that an exporter or compiler stumbled over, in one line."""
    got = f"{type(error).__name__}: {first_line(error)}"
    return CompileError(f"engine: the network must compile as one graph, got {got}; use engine='eager'")


@torch.no_grad()
def check_step(function: StepFunction, call: Call) -> None:
    """Compare one step from the middle of a run, and of bounds the last one too, which decodes.

    Args:
        function: the compiled step.
        call: what it was compiled for; its samples stay as they are.

    Raises:
        CompileError: the two differ by more than the arithmetic explains.
    """
    measures = isinstance(call.step, LikelihoodStep)
    # At the first rows a network's rounding grows a hundredfold, at the last there is no noise.
    middle = (call.state.step + call.state.end) // 2
    for place in (middle, call.state.end - 1) if measures else (middle,):
        eager, compiled = call.copy(), call.copy()
        for samples in (eager.state, compiled.state):
            samples.step.copy_(place)
        StepRunner(eager.step, eager).run(1, call.noise)
        StepRunner(function, compiled).run(1, call.noise)
        if not _is_finite(eager.state):
            return  # the run itself will say so
        off = _off_in_terms(eager.state, compiled.state) if measures else _off(eager.state, compiled.state)
        tolerance = _TOLERANCE if _is_float32(call) else _LOW_TOLERANCE
        allowed = tolerance if measures else tolerance * _amplification(call.book.rows[place])
        if not bool((off <= allowed).all()) or not torch.equal(eager.state.step, compiled.state.step):
            raise CompileError(
                "engine: a compiled step must give what an eager one gives, got a difference of "
                f"{float(off.amax()):.2g}; use engine='eager'"
            )


def _is_finite(state: State) -> bool:
    return bool((state.x if state.terms is None else state.terms).isfinite().all())


def _off(eager: State, compiled: State) -> Tensor:
    """How far apart samples are, [B]: root mean squares, for single values may jump from one bound to the other."""
    off = (eager.x - compiled.x).flatten(1).square().mean(1).sqrt()
    return off / eager.x.flatten(1).square().mean(1).sqrt().clamp(min=1.0)


def _off_in_terms(eager: State, compiled: State) -> Tensor:
    """How far apart the terms of bounds are, [B, 3], relative to what they are."""
    one, other = torch.as_tensor(eager.terms), torch.as_tensor(compiled.terms)
    return (one - other).abs() / one.abs().clamp(min=_LEAST_TERM)


def _amplification(rows: Tensor) -> Tensor:
    """By how much a row may amplify the network's rounding, [B]."""
    a_o, c_0, c_o = (rows[:, COLUMNS.index(name)] for name in ("a_o", "c_0", "c_o"))
    return 1.0 + (a_o * c_0).abs() + c_o.abs()


def _is_float32(call: Call) -> bool:
    return all(p.dtype == torch.float32 for p in call.step.network.parameters() if p.is_floating_point()) and not (
        getattr(call.step.network, "dtype", None)
    )
