"""Inductor's and Triton's CUDA code for a pretended H100, on any machine: the third proof of the design.

Tensors are fake ones on device "cuda", which even a CPU build of torch can have; Inductor is told that device 0 is an
H100 and stopped once it has written its code. All that this patches is private to torch and may move between versions;
it is patched here, for the length of a block, and nowhere else.
"""

import ast
import contextlib
import dataclasses
import functools
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    gcnArchName="", uuid="pretended",
)  # fmt: skip


class Fakes:
    """Makes fake tensors on the pretended GPU, all of one mode."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor's sizes and strides on the GPU."""
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="meta")
        with self.mode:
            return FakeTensor(self.mode, meta, CUDA)


@dataclasses.dataclass(frozen=True)
class Generated:
    """What Inductor made of a step.

    Attributes:
        code: the Python module that it wrote: kernels, and `call`, which launches them.
        graph: the operations that it was given, after functionalisation.
        bytes_moved: bytes that the kernels and library calls read and write, by Inductor's own count.
    """

    code: str
    graph: torch.fx.Graph
    bytes_moved: int

    @property
    def call(self) -> str:
        """The body of `call`."""
        start = self.code.index("def call(")
        return self.code[start : self.code.index("def benchmark_compiled_module", start)]

    def launches(self) -> Counter[str]:
        """Launches of one call: each Triton kernel under its name, libraries under the function called."""
        found: Counter[str] = Counter()
        for line in self.call.splitlines():
            line = line.strip()
            if kernel := re.match(r"(\w+?)(?:_\d+)?\.run\(", line):
                found[kernel[1]] += 1
            elif library := re.match(r"(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", line):
                found[library[1]] += 1
        return found

    def by_kind(self) -> dict[str, int]:
        """The same by kind."""
        kinds = Counter({"triton": 0, "attention": 0, "convolution": 0, "matrix product": 0, "other": 0})
        for name, count in self.launches().items():
            if name.startswith("torch.ops"):
                kinds["attention" if "attention" in name else "other"] += count
            elif name.startswith("extern_kernels"):
                kinds["convolution" if name.endswith("convolution") else "matrix product"] += count
            else:
                kinds["triton"] += count
        return dict(kinds)


def cuda_code(
    step: Callable[..., object], network: nn.Module, weights: dict[str, Tensor], arguments: list[Tensor]
) -> Generated:
    """Inductor's CUDA code for `step(network, *arguments)`.

    Args:
        step: changes its arguments in place; it is traced as a whole, under `torch.no_grad`.
        network: a module on the meta device.
        weights: fakes that replace its parameters and buffers.
        arguments: fakes of the same mode.
    """
    captured: list[Generated] = []

    def flat(*values: Tensor) -> tuple[()]:
        with _reparametrize_module(network, dict(zip(weights, values, strict=False))):
            step(network, *values[len(weights) :])
        return ()

    def stop_after_codegen(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        captured.append(Generated(getattr(code, "value", code), graph.module.graph, graph.count_bytes()[0]))
        raise _Stopped

    values = [*weights.values(), *arguments]
    mode = values[0].fake_mode
    with pretended_h100(), torch.no_grad(), mode, _CudaAttention():
        traced = make_fx(flat)(*values)
        with mock.patch.object(GraphLowering, "compile_to_module", stop_after_codegen):
            try:
                compile_fx.compile_fx(traced, values)
            except Exception:  # Inductor wraps the exception that stops it
                if not captured:
                    raise
    return captured[-1]


def _forget_what_triton_can_do() -> None:
    """torch asks once per process whether Triton works, and keeps the answer."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Make torch, Inductor and Triton believe that CUDA device 0 is an H100."""
    import triton

    device_interface.init_device_reg()
    # Some of torch's Python bindings pick a device before they dispatch, which a CPU build cannot do for "cuda".
    detours = {
        "__getitem__": _indexed,
        "contiguous": lambda x, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
            x, memory_format=memory_format
        ),
        "copy_": lambda x, other, non_blocking=False: torch.ops.aten.copy_(x, other, non_blocking),
    }
    cuda = {
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *a, **k: True,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        _forget_what_triton_can_do()
        stack.callback(_forget_what_triton_can_do)
        for name, detour in detours.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, _on_cuda(getattr(torch.Tensor, name), detour)))
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _cudnn_memory_format))
        stack.enter_context(
            mock.patch.dict(device_interface.device_interfaces, {"cuda": _Interface, "cuda:0": _Interface})
        )
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        stack.enter_context(config.patch({"compile_threads": 1, "fx_graph_cache": False}))
        stack.enter_context(config.patch({"triton.autotune_at_compile_time": False, "use_static_cuda_launcher": False}))
        yield


class _Interface(device_interface.CudaInterface):
    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: H100)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)

    get_device_properties = staticmethod(lambda device=None: H100)
    get_compute_capability = staticmethod(lambda device=None: 90)
    get_raw_stream = staticmethod(lambda index: 0)
    is_available = staticmethod(lambda: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_dtype_supported = staticmethod(lambda dtype, including_emulation=False: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)


class _Driver:
    """As much of Triton's driver as compiling needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda *a, **k: [1.0, 1.0, 1.0]


class _Stopped(Exception):
    """The code is written; nothing can be run."""


class _CudaAttention(TorchFunctionMode):
    """Attention as CUDA has it for lower precision: a CPU build does not know which kernel a GPU would pick."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], 0.0, False, False)[0]
        if func is torch.as_tensor:
            return args[0]
        return func(*args, **kwargs or {})


def _cudnn_memory_format(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """cuDNN's rule: channels-last as soon as one of the two is. A build without cuDNN would always say contiguous."""
    either = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if either else torch.contiguous_format


def _on_cuda(plain: Callable[..., Any], detour: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (detour if self.device.type == "cuda" else plain)(self, *args, **kwargs)

    return method


def _indexed(x: Tensor, key: Any) -> Tensor:
    """x[key] in operations of the dispatcher, for the keys that the package uses."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            x = torch.unsqueeze(x, dim)
        elif isinstance(part, Tensor):
            x = torch.ops.aten.index(x, [None] * dim + [part])
        elif isinstance(part, int):
            x, dim = torch.select(x, dim, part), dim - 1
        elif isinstance(part, slice):
            if part != slice(None):
                x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            raise NotImplementedError(f"_indexed: keys must be integers, slices, tensors or None, got {part!r}")
        dim += 1
    return x


def compiled_kernels(generated: Generated) -> list[tuple[str, bytes]]:
    """Each Triton kernel of the code, compiled for sm_90 in every configuration that would be tried, as a cubin."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    found = []
    with pretended_h100(), mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        for name, source in _triton_sources(generated.code):
            [function] = [node.name for node in ast.parse(source).body if _is_kernel(node)]
            kernel = getattr(PyCodeCache.load(source), function)
            for configuration in kernel.configs:
                found.append((name, kernel._precompile_config(configuration).kernel.asm["cubin"]))
    return found


def _triton_sources(code: str) -> Iterator[tuple[str, str]]:
    """Name and module of every kernel: `name = async_compile.triton(function, source, …)`."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.triton("):
            yield ast.unparse(node.targets[0]), ast.literal_eval(node.value.args[1])


def _is_kernel(node: ast.stmt) -> bool:
    """A Triton function with a launcher's decorator above its own; others are called by it."""
    return isinstance(node, ast.FunctionDef) and len(node.decorator_list) > 1
