"""Who can be compared: the peers by name, where their classes are, and what people read."""

from __future__ import annotations

from fastddpm.engines.precision import processor_has_bf16

_ENGINES = {
    "eager": "eager",
    "compiled": "compiled",
    "graph": "cuda_graph",
    "openvino": "openvino",
    "onnx": "onnx",
}
OWN = ("fastddpm-eager", "fastddpm-compiled")
"""Ours that run on CPUs without another library."""
LOW = ("bf16", "tf32")
"""Precisions of networks besides float32."""

PEERS: dict[str, tuple[str, str, tuple[str | None, ...]]] = {
    "reference": ("peers", "ReferencePeer", ("fp32",)),
    "reference-tf32": ("peers", "ReferencePeer", ("tf32",)),
    "fastddpm-auto": ("peers", "EnginePeer", ("auto", "fp32")),
    "diffusers": ("foreign", "DiffusersPeer", ("fp32", None)),
    "diffusers-compiled": ("foreign", "DiffusersPeer", ("fp32", "default")),
    "diffusers-compiled-bf16": ("foreign", "DiffusersPeer", ("bf16", "default")),
    "lucidrains": ("foreign", "LucidrainsPeer", ()),
    "onnxruntime": ("sessions", "OnnxRuntimePeer", ()),
    "openvino": ("sessions", "OpenVinoPeer", ("fp32",)),
    "openvino-bf16": ("sessions", "OpenVinoPeer", ("bf16",)),
    "limits": ("peers", "LimitsPeer", ()),
}
"""Name → module, class and its arguments."""

LABELS = {
    "reference": "textbook loop",
    "reference-tf32": "textbook loop, tf32",
    "fastddpm-auto": "fastddpm, auto",
    "diffusers": "diffusers DDPMPipeline",
    "diffusers-compiled": "diffusers, torch.compile",
    "diffusers-compiled-bf16": "diffusers, torch.compile, bf16",
    "lucidrains": "lucidrains GaussianDiffusion (own U-Net)",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO, bf16",
}
"""Name → what people read."""

for _name, _engine in _ENGINES.items():
    PEERS[f"fastddpm-{_name}"] = ("peers", "EnginePeer", (_engine, "fp32"))
    LABELS[f"fastddpm-{_name}"] = f"fastddpm, {_engine.replace('_', ' ')}"
    for _low in LOW:
        PEERS[f"fastddpm-{_name}-{_low}"] = ("peers", "EnginePeer", (_engine, _low))
        LABELS[f"fastddpm-{_name}-{_low}"] = f"{LABELS[f'fastddpm-{_name}']}, {_low}"
for _low in LOW:
    PEERS[f"diffusers-{_low}"] = ("foreign", "DiffusersPeer", (_low, None))
    LABELS[f"diffusers-{_low}"] = f"diffusers DDPMPipeline, {_low}"
    PEERS[f"diffusers-reduced-{_low}"] = ("foreign", "DiffusersPeer", (_low, "reduce-overhead"))
    LABELS[f"diffusers-reduced-{_low}"] = f"diffusers, torch.compile, reduce-overhead, {_low}"

COMPILES = frozenset(
    name for name in PEERS if any(word in name for word in ("compiled", "graph", "reduced", "openvino"))
)
"""Those whose first run has a compiler in it."""
PACKAGED = frozenset(name for name in PEERS if name.startswith("fastddpm-compiled"))
"""Those whose compiled form another process finds on disk, on a CPU."""


def cannot(name: str, device: str) -> str:
    """Why a peer cannot be measured on this machine, or nothing."""
    if device == "cpu" and precision_of(name) == "bf16" and not processor_has_bf16():
        return "left out: this processor has no instructions for bfloat16"
    return ""


def precision_of(name: str) -> str:
    """The precision of a peer's network."""
    return next((low for low in LOW if name.endswith(f"-{low}")), "fp32")


def is_ours(name: str) -> bool:
    """Whether a peer is this package."""
    return name.startswith("fastddpm")
