"""OnnxSession: an exported model open in ONNX Runtime, with one clear line for everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, get_args

import numpy as np

from fastddpm.checkpoints import CheckpointError
from fastddpm.common.arguments import only_options
from fastddpm.common.wording import in_a_line
from fastddpm.export.model_file import read_metadata

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
}
GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


class SessionOptions(TypedDict, total=False):
    """The keyword arguments of `OnnxSession`."""

    device_id: int
    threads: int | None
    cuda_graph: bool
    fp16: bool
    cache: str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class _Options:
    """How a session runs, with its defaults."""

    device_id: int = 0
    threads: int | None = None
    cuda_graph: bool = False
    fp16: bool = False
    cache: str | os.PathLike[str] | None = None

    def of_session(self, ort: ModuleType) -> onnxruntime.SessionOptions:
        """ONNX Runtime's own options."""
        threads = self.threads
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"OnnxSession: threads must be a positive int or None, got {threads!r}; leave it out")
        torch = sys.modules.get("torch")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or (torch.get_num_threads() if torch else 0)
        # PyTorch's own threads wait in the same process; two pools that spin while they wait starve each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if torch and not threads else "1")
        return options

    def of_provider(self, chosen: str) -> dict[str, str]:
        """Those of a provider, "cpu", "cuda" or "tensorrt"."""
        if self.fp16 and chosen != "tensorrt":
            raise ValueError(f"OnnxSession: fp16 must be False for {chosen}, got True; export with precision='fp16'")
        if chosen == "cuda":
            return {"device_id": str(self.device_id), "enable_cuda_graph": str(int(self.cuda_graph))}
        if chosen != "tensorrt":
            return {}
        options = {
            "device_id": str(self.device_id),
            "trt_fp16_enable": str(int(self.fp16)),
            "trt_cuda_graph_enable": str(int(self.cuda_graph)),
        }
        if self.cache is not None:
            Path(self.cache).mkdir(parents=True, exist_ok=True)
            for kind in ("engine", "timing"):
                options[f"trt_{kind}_cache_enable"] = "1"
                options[f"trt_{kind}_cache_path"] = str(self.cache)
        return options


class OnnxSession:
    """A model that `export_onnx` wrote, loaded.

    Attributes:
        path: the file.
        facts: its metadata.
        inputs: name → (dtype, shape with the batch first); an open batch is None.
        outputs: names of the results.
        provider: where it runs: "cpu", "cuda" or "tensorrt".
    """

    def __init__(
        self, path: str | os.PathLike[str], provider: Provider = "auto", **options: Unpack[SessionOptions]
    ) -> None:
        """Open a model.

        Args:
            path: the .onnx file.
            provider: "auto" takes the GPU through CUDA if there is one and falls back to the CPU with a warning if that
                fails; the others are what they say, or an error.
            options: `device_id`, which GPU (0); `threads` of the CPU provider (as many as PyTorch uses); `cuda_graph`,
                to capture the step into a CUDA graph and replay it, for steps and networks of a fixed batch; `fp16`, to
                let TensorRT choose half precision where that is quicker; and `cache`, a folder for TensorRT's engines
                and timings, so that the next start need not build them again.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it is another program's.
            TypeError: an option is unknown.
            ValueError: the provider is missing, or an option does not fit.
        """
        only_options("OnnxSession", options, SessionOptions)
        self.path, wanted = Path(path), _Options(**options)
        ort = import_onnxruntime()
        if provider not in get_args(Provider):
            raise ValueError(f"OnnxSession: provider must be auto, cpu, cuda or tensorrt, got {provider!r}; pick one")
        if not self.path.is_file():
            raise CheckpointError(f"no model at {self.path}; write one with fastddpm export")
        chosen = self._choose(ort, provider)
        given, extra = wanted.of_session(ort), wanted.of_provider(chosen)
        try:
            self._open(ort, given, chosen, extra)
        except ValueError:
            if provider != "auto" or chosen == "cpu":
                raise
            warnings.warn(f"OnnxSession: {chosen} does not work here, running on the cpu", stacklevel=2)
            self._open(ort, given, "cpu", {})
        self.facts = read_metadata(self.raw.get_modelmeta().custom_metadata_map, str(self.path))
        self.inputs = {value.name: _signature(value) for value in self.raw.get_inputs()}
        self.outputs = [value.name for value in self.raw.get_outputs()]
        if wanted.cuda_graph and (self.facts["what"] == "chain" or self.facts.get("batch") is None):
            raise ValueError(
                f"OnnxSession: cuda_graph must be False for a {self.facts['what']} of "
                f"{'open batch' if self.facts.get('batch') is None else 'many steps'}, got True; "
                "export a step with a fixed batch"
            )
        self.cuda_graph = wanted.cuda_graph and self.provider != "cpu"

    @property
    def batch(self) -> int | None:
        """The batch that the model was exported for; None if any will do."""
        batch = self.facts.get("batch")
        return None if batch is None else int(batch)

    @property
    def device(self) -> str:
        """Where its buffers lie, in ONNX Runtime's words: cpu or cuda."""
        return "cpu" if self.provider == "cpu" else "cuda"

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One run; buffers are allocated anew.

        Args:
            feeds: the inputs by name, of the dtypes and shapes that `inputs` states.

        Returns:
            The outputs by name.

        Raises:
            TypeError: an input has another dtype.
            ValueError: an input is missing, unknown or of another shape.
        """
        self.check(feeds)
        results = self.raw.run(None, {name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return dict(zip(self.outputs, results, strict=True))

    def check(self, feeds: Mapping[str, np.ndarray]) -> int:
        """Check inputs; returns their batch.

        Raises:
            TypeError: an input has another dtype.
            ValueError: an input is missing, unknown or of another shape.
        """
        if set(feeds) != set(self.inputs):
            raise ValueError(
                f"{self.path}: inputs must be {', '.join(self.inputs)}, got {', '.join(feeds) or 'none'}; give those"
            )
        batch = self.batch or (np.shape(next(iter(feeds.values()))) or (0,))[0]
        for name, value in feeds.items():
            dtype, shape = self.inputs[name]
            if not isinstance(value, np.ndarray) or value.dtype != dtype:
                got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                raise TypeError(f"{self.path}: {name} must be an array of {np.dtype(dtype)}, got {got}; convert it")
            wanted = (batch, *shape[1:])
            if value.shape != wanted or batch < 1:
                raise ValueError(f"{self.path}: {name} must have shape {wanted}, got {value.shape}; mend it")
        return int(batch)

    def buffer(self, name: str, batch: int) -> onnxruntime.OrtValue:
        """Room for an input, or for the output `name`_next that becomes it, on the session's device."""
        ort = import_onnxruntime()
        return ort.OrtValue.ortvalue_from_numpy(self.zeros(name, batch), self.device, 0)

    def zeros(self, name: str, batch: int) -> np.ndarray:
        """An input full of zeros."""
        dtype, shape = self.inputs[name]
        return np.zeros((batch, *(size or 1 for size in shape[1:])), dtype=dtype)

    def _choose(self, ort: ModuleType, provider: Provider) -> str:
        available = ort.get_available_providers()
        has_gpu = any(os.path.exists(file) for file in GPU_FILES)
        if provider == "auto":
            return "cuda" if has_gpu and PROVIDERS["cuda"] in available else "cpu"
        if PROVIDERS[provider] not in available:
            there = ", ".join(name for name, full in PROVIDERS.items() if full in available)
            raise ValueError(
                f"OnnxSession: provider must be one of this onnxruntime's ({there}), got {provider!r}; "
                "install onnxruntime-gpu, or use cpu"
            )
        if provider != "cpu" and not has_gpu:
            raise ValueError(f"OnnxSession: provider must be cpu, got {provider!r}: this machine has no NVIDIA GPU")
        return provider

    def _open(self, ort: ModuleType, options: onnxruntime.SessionOptions, chosen: str, extra: dict[str, str]) -> None:
        # TensorRT leaves what it cannot run to CUDA, and CUDA to the CPU.
        order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[chosen]
        providers = [(PROVIDERS[name], extra if name == chosen else {}) for name in order]
        try:
            self.raw = ort.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # onnxruntime's own types derive from nothing more precise
            reason = in_a_line(error, 200)
            raise CheckpointError(f"{self.path}: must be a whole ONNX model, got {reason}; export it again") from error
        if self.raw.get_providers()[0] != PROVIDERS[chosen]:
            raise ValueError(
                f"OnnxSession: provider {chosen} must find its libraries, got a session without it; "
                f"install {'TensorRT' if chosen == 'tensorrt' else 'CUDA and cuDNN'}, or use cpu"
            )
        self.provider = chosen


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime; raises ImportError, saying how to install it, where it is not."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            "OnnxSession: the package onnxruntime must be installed; run pip install 'fastddpm[onnx]'"
        ) from error


def _signature(value: onnxruntime.NodeArg) -> tuple[type[np.generic], tuple[int | None, ...]]:
    return _DTYPES[value.type], tuple(size if isinstance(size, int) else None for size in value.shape)
