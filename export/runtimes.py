"""The libraries that run a network's body: ONNX Runtime and OpenVINO, each on buffers that are allocated once.

Their threads never work beside PyTorch's, which has one while a step of theirs is made (see `fastddpm.export.library`),
and neither keeps spinning when a call is over.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastddpm.common.wording import first_line
from fastddpm.engines.compare import CompileError
from fastddpm.engines.devices import versions
from fastddpm.engines.precision import processor_has_bf16
from fastddpm.export.body import OUT

Feeds = Mapping[str, Tensor]
_NEEDED = ("onnx", "onnxscript")
_HINTS = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names of precisions."""


class Opened(Protocol):
    """A body that is ready for feeds of one form."""

    def __call__(self, feeds: Feeds) -> Tensor:
        """The output, float32 [B, C or 2C, H, W], in memory of its own."""


class Runtime(Protocol):
    """A library.

    Attributes:
        name: of the engine.
        package: that must be installed for it, beside those of the export.
    """

    name: str
    package: str

    def takes(self, precision: str, device: torch.device) -> str:
        """Why it cannot run a network in this precision on this device; "" if it can."""

    def open(self, path: Path, feeds: Feeds, *, precision: str, threads: int) -> Opened:
        """Open a file for feeds like these.

        Raises:
            CompileError: the library refuses it.
        """


def missing_packages(runtime: Runtime) -> tuple[str, ...]:
    """The packages that are not installed; nothing is imported."""
    return tuple(name for name in (runtime.package, *_NEEDED) if importlib.util.find_spec(name) is None)


@functools.cache
def version(package: str) -> str:
    """The version of a library, for keys; to look it up takes as long as a step of a small network."""
    return str(versions(package, f"{package}-gpu"))


class _Buffers:
    """Memory for what a body is fed, and looks at: a library is told of it once."""

    def __init__(self, feeds: Feeds, names: Collection[str]) -> None:
        self.tensors = {
            name: torch.empty(value.shape, dtype=value.dtype) for name, value in feeds.items() if name in names
        }

    def fill(self, feeds: Feeds) -> None:
        for name, buffer in self.tensors.items():
            buffer.copy_(feeds[name])


class OnnxRuntime:
    """ONNX Runtime, on the CPU or through its CUDA provider."""

    name = "onnx"
    package = "onnxruntime"

    def takes(self, precision: str, device: torch.device) -> str:
        """See `Runtime.takes`."""
        return "" if precision == "fp32" else f"precision must be fp32 for the onnx engine, got {precision}; use that"

    def open(self, path: Path, feeds: Feeds, *, precision: str, threads: int) -> Opened:
        """See `Runtime.open`."""
        ort: Any = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # Its threads may spin between the operators of a call, and must not when it is over: PyTorch's work then.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_free_dimension_override_by_name("batch", len(feeds["x"]))  # or shapes are computed in each call
        on_gpu = feeds["x"].device.type == "cuda"
        providers = ["CUDAExecutionProvider"] if on_gpu else []
        with refused(self.name):
            session = ort.InferenceSession(str(path), options, providers=[*providers, "CPUExecutionProvider"])
            return _OnnxBody(session, feeds)


class _OnnxBody:
    def __init__(self, session: Any, feeds: Feeds) -> None:  # noqa: ANN401 - a class without types
        self._session = session
        self._buffers = _Buffers(feeds, {value.name for value in session.get_inputs()})
        self._binding = session.io_binding()
        for name, buffer in self._buffers.tensors.items():
            dtype = buffer.numpy().dtype
            self._binding.bind_input(name, "cpu", 0, dtype, list(buffer.shape), buffer.data_ptr())
        self._binding.bind_output(OUT, "cpu")

    def __call__(self, feeds: Feeds) -> Tensor:
        self._buffers.fill(feeds)
        self._session.run_with_iobinding(self._binding)
        found = self._binding.copy_outputs_to_cpu()[0]
        return torch.from_numpy(found).to(feeds["x"].device)


class OpenVino:
    """OpenVINO's CPU plugin, compiled for one batch."""

    name = "openvino"
    package = "openvino"

    def takes(self, precision: str, device: torch.device) -> str:
        """See `Runtime.takes`."""
        if device.type != "cpu":
            return f"engine must be another one on a {device.type}, got openvino; it is for CPUs here"
        if precision in _HINTS and (precision == "fp32" or processor_has_bf16()):
            return ""
        return f"precision must be fp32 for the openvino engine on this processor, got {precision}; it has no bfloat16"

    def open(self, path: Path, feeds: Feeds, *, precision: str, threads: int) -> Opened:
        """See `Runtime.open`."""
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": "NO",
        }
        with refused(self.name), signal_stack_kept():
            model = _core().read_model(str(path))
            model.reshape({name: list(value.shape) for name, value in feeds.items() if name in _inputs(model)})
            return _OpenVinoBody(_core().compile_model(model, "CPU", settings), feeds)


class _OpenVinoBody:
    def __init__(self, model: Any, feeds: Feeds) -> None:  # noqa: ANN401 - a class without types
        ov: Any = importlib.import_module("openvino")
        self._buffers = _Buffers(feeds, _inputs(model))
        self._request = model.create_infer_request()
        for name, buffer in self._buffers.tensors.items():
            self._request.set_tensor(name, ov.Tensor(buffer.numpy(), shared_memory=True))

    def __call__(self, feeds: Feeds) -> Tensor:
        self._buffers.fill(feeds)
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy())


def _inputs(model: Any) -> set[str]:  # noqa: ANN401 - a class without types
    """All names of the inputs of a model of OpenVINO, which gives them more than one when it compiles."""
    return {name for value in model.inputs for name in value.names}


@functools.cache
def _core() -> Any:  # noqa: ANN401 - a class without types
    """OpenVINO, once per process."""
    ov: Any = importlib.import_module("openvino")
    return ov.Core()


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux: where this thread's signal handlers run if not on its own stack."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack(new: SignalStack | None = None) -> SignalStack:
    """This thread's stack for signals, and another one from now on if it is given."""
    before = SignalStack()
    ctypes.CDLL(None).sigaltstack(None if new is None else ctypes.byref(new), ctypes.byref(before))
    return before


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread its stack for signals back after the block.

    OpenVINO sets one of its own, which leaves 8 KiB where a processor has a matrix unit, and Python's handler with what
    the dynamic linker does in it may need more: a Ctrl-C then ends the process.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        signal_stack(before)


@contextlib.contextmanager
def refused(name: str) -> Iterator[None]:
    """In the block, whatever a library raises is a CompileError of one line."""
    try:
        yield
    except Exception as error:  # their own types derive from nothing more precise
        raise CompileError(
            f"engine: {name} must run the network, got {first_line(error)}; use engine='eager'"
        ) from error
