"""The fused updates of diffusion sampling and training: Triton kernels and their PyTorch references.

- `p_sample`: one reverse step, with its noise, in place; `Operands` are the tensors that it is given.
- `q_sample`: the forward noising of a training batch by its `Levels`, with noise given or to be drawn (`Draw`).
- `normals_reference`, `philox4x32_reference`: the noise itself, in PyTorch.

On CPU tensors, and where Triton is not installed, the ops run their references. Elsewhere an op's first call imports
Triton and registers it: `torch.ops.fastddpm.p_sample` is there from then on.
"""

import sys
from importlib.util import find_spec

if __name__ != "fastddpm.kernels":
    # Under a second name every op would be registered a second time, and nothing would say so.
    raise ImportError(f"kernels: must be imported as fastddpm.kernels, got {__name__}; import fastddpm.kernels")
if (_first := find_spec("kernels")) and _first.origin == __file__.replace("/fastddpm/kernels/", "/kernels/"):
    # Where this tree is on the path, its folder is not the package of that name that transformers looks for.
    sys.modules["kernels"] = None  # type: ignore[assignment]

from .operands import COLUMNS, Operands
from .p_sample import p_sample, p_sample_reference
from .philox import X_T_COUNTER, normals_reference, philox4x32_reference
from .q_sample import Draw, Levels, q_sample, q_sample_reference

__all__ = [
    "COLUMNS",
    "Draw",
    "Levels",
    "Operands",
    "X_T_COUNTER",
    "normals_reference",
    "p_sample",
    "p_sample_reference",
    "philox4x32_reference",
    "q_sample",
    "q_sample_reference",
]
