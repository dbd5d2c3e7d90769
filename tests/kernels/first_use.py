"""For `test_lazy.py`: in a process of its own, ops whose kernels nothing has imported yet, called or traced.

The argument says how `p_sample` is; the other ops are traced in the ways that follow, so that all are tried at once.

python -m tests.kernels.first_use compile | make_fx | export | interpreter
"""

import sys
from functools import partial

import torch
from torch import Tensor

from fastddpm.kernels import Draw, Levels, Operands, p_sample, q_sample
from tests.kernels.cases import make_case
from tests.kernels.checks import check_p_sample, check_q_sample, q_arguments
from tests.kernels.norm_cases import TERMS, call, check_norm, norm_case


def all_calls():
    """Each op's name, the function and its arguments by name."""
    case = make_case((3, 2, 4, 4), torch.bfloat16, ("history",))
    yield "p_sample", lambda **given: p_sample(Operands(**given)), case.positional | case.options
    x, t, levels, draw = q_arguments((3, 2, 4, 4), "uint8", False)
    tensors = {"x_start": x, "t": t, **levels._asdict(), "seed": draw.seed, "sample_id": draw.sample_id}
    yield "q_sample", noised, tensors
    yield "add_group_norm", call, norm_case((2, 16, 4, 6), 2, TERMS["everything, add"])


def noised(x_start, t, signal, spread, seed, sample_id):
    return q_sample(x_start, t, Levels(signal, spread), Draw(seed, sample_id))


def by_compile(function, tensors) -> str:
    graphs = []

    def keep(module, example):
        graphs.append(str(module.graph))
        return module.forward

    torch.compile(function, fullgraph=True, backend=keep)(**tensors)
    return "\n".join(graphs)


def by_make_fx(function, tensors) -> str:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda *values: function(**dict(zip(tensors, values, strict=True))))(*tensors.values())
    return str(traced.graph)


def by_export(function, tensors) -> str:
    class Step(torch.nn.Module):
        def forward(self, **values):
            return function(**values)

    exported = torch.export.export(Step(), (), tensors, strict=False)
    return exported.graph_module.print_readable(print_output=False)


def kernels_module(name: str) -> str:
    return f"fastddpm.kernels.{name.removeprefix('add_')}_triton"


WAYS = {"compile": by_compile, "make_fx": by_make_fx, "export": by_export}


def trace(first: str) -> None:
    """Every op is first reached while it is traced on a pretended GPU, each in another way, and is in the graph."""
    from tests.pretend import Fakes, pretended_h100

    fakes, ways = Fakes(), [*WAYS.values()] * 2
    at = list(WAYS).index(first)
    with pretended_h100(), fakes.mode:
        for way, (name, function, arguments) in zip(ways[at : at + len(WAYS)], all_calls(), strict=True):
            assert kernels_module(name) not in sys.modules
            tensors = {key: fakes.like(value) for key, value in arguments.items() if isinstance(value, Tensor)}
            rest = {key: value for key, value in arguments.items() if key not in tensors}
            graph = way(partial(function, **rest), tensors)
            assert kernels_module(name) in sys.modules
            assert f"fastddpm.{name}.default" in graph, graph


def run_on_the_cpu() -> None:
    check_p_sample(make_case((1, 1, 1, 3), torch.bfloat16, ("history",)))
    check_q_sample((1, 1, 1, 3), "uint8", False)
    check_norm(norm_case((1, 4, 1, 3), 2, TERMS["everything, add"]))


if __name__ == "__main__":
    if sys.argv[1] in WAYS:
        trace(sys.argv[1])
    else:
        run_on_the_cpu()
        assert all(kernels_module(name) in sys.modules for name, _, _ in all_calls())
