"""OnnxSession: an exported model open in ONNX Runtime, with one clear line for everything that can be wrong with it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fastddpm.checkpoints import CheckpointError
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
        self,
        path: str | os.PathLike[str],
        provider: Provider = "auto",
        *,
        device_id: int = 0,
        threads: int | None = None,
        cuda_graph: bool = False,
        fp16: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Open a model.

        Args:
            path: the .onnx file.
            provider: "auto" takes the GPU through CUDA if there is one and falls back to the CPU with a warning if that
                fails; the others are what they say, or an error.
            device_id: which GPU.
            threads: of the CPU provider; None takes as many as PyTorch uses.
            cuda_graph: capture the step into a CUDA graph and replay it; for steps and networks of a fixed batch.
            fp16: let TensorRT choose half precision where that is quicker.
            cache: folder for TensorRT's engines and timings, so that the next start need not build them again.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it is another program's.
            ValueError: the provider is missing, or an option does not fit.
        """
        self.path = Path(path)
        ort = _runtime()
        if provider not in get_args(Provider):
            raise ValueError(f"OnnxSession: provider must be auto, cpu, cuda or tensorrt, got {provider!r}; pick one")
        if not self.path.is_file():
            raise CheckpointError(f"no model at {self.path}; write one with fastddpm export")
        chosen = self._choose(ort, provider)
        options = _session_options(ort, threads)
        extra = _provider_options(chosen, device_id, cuda_graph, fp16, cache)
        try:
            self._open(ort, options, chosen, extra)
        except ValueError:
            if provider != "auto" or chosen == "cpu":
                raise
            warnings.warn(f"OnnxSession: {chosen} does not work here, running on the cpu", stacklevel=2)
            self._open(ort, options, "cpu", {})
        self.facts = read_metadata(self.raw.get_modelmeta().custom_metadata_map, str(self.path))
        self.inputs = {value.name: _signature(value) for value in self.raw.get_inputs()}
        self.outputs = [value.name for value in self.raw.get_outputs()]
        if cuda_graph and (self.facts["what"] == "chain" or self.facts.get("batch") is None):
            raise ValueError(
                f"OnnxSession: cuda_graph must be False for a {self.facts['what']} of "
                f"{'open batch' if self.facts.get('batch') is None else 'many steps'}, got True; "
                "export a step with a fixed batch"
            )
        self.cuda_graph = cuda_graph and self.provider != "cpu"

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
        ort = _runtime()
        return ort.OrtValue.ortvalue_from_numpy(self.zeros(name, batch), self.device, 0)

    def zeros(self, name: str, batch: int) -> np.ndarray:
        """An input full of zeros."""
        dtype, shape = self.inputs[name]
        return np.zeros((batch, *(size or 1 for size in shape[1:])), dtype=dtype)

    def _choose(self, ort: Any, provider: Provider) -> str:  # noqa: ANN401 - a module without types
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

    def _open(self, ort: Any, options: Any, chosen: str, extra: dict[str, str]) -> None:  # noqa: ANN401
        # TensorRT leaves what it cannot run to CUDA, and CUDA to the CPU.
        order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[chosen]
        providers = [(PROVIDERS[name], extra if name == chosen else {}) for name in order]
        try:
            self.raw = ort.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # onnxruntime's own types derive from nothing more precise
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.path}: must be a whole ONNX model, got {reason}; export it again") from error
        if self.raw.get_providers()[0] != PROVIDERS[chosen]:
            raise ValueError(
                f"OnnxSession: provider {chosen} must find its libraries, got a session without it; "
                f"install {'TensorRT' if chosen == 'tensorrt' else 'CUDA and cuDNN'}, or use cpu"
            )
        self.provider = chosen


def _runtime() -> Any:  # noqa: ANN401 - a module without types
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "OnnxSession: the package onnxruntime must be installed; run pip install 'fastddpm[onnx]'"
        ) from error
    return onnxruntime


def _session_options(ort: Any, threads: int | None) -> Any:  # noqa: ANN401
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"OnnxSession: threads must be a positive int or None, got {threads!r}; leave it out")
    torch = sys.modules.get("torch")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or (torch.get_num_threads() if torch else 0)
    # PyTorch's own threads wait in the same process; two pools that spin while they wait starve each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if torch and not threads else "1")
    return options


def _provider_options(
    chosen: str, device_id: int, cuda_graph: bool, fp16: bool, cache: str | os.PathLike[str] | None
) -> dict[str, str]:
    if fp16 and chosen != "tensorrt":
        raise ValueError(f"OnnxSession: fp16 must be False for {chosen}, got True; export with precision='fp16'")
    if chosen == "cuda":
        return {"device_id": str(device_id), "enable_cuda_graph": str(int(cuda_graph))}
    if chosen != "tensorrt":
        return {}
    options = {
        "device_id": str(device_id),
        "trt_fp16_enable": str(int(fp16)),
        "trt_cuda_graph_enable": str(int(cuda_graph)),
    }
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
        for kind in ("engine", "timing"):
            options[f"trt_{kind}_cache_enable"] = "1"
            options[f"trt_{kind}_cache_path"] = str(cache)
    return options


def _signature(value: Any) -> tuple[type[np.generic], tuple[int | None, ...]]:  # noqa: ANN401
    return _DTYPES[value.type], tuple(size if isinstance(size, int) else None for size in value.shape)
