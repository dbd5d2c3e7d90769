"""ONNX export and the sessions that run what was exported; import it as ``fastddpm.export``."""

import importlib
from typing import TYPE_CHECKING

if __name__ != "fastddpm.export":
    # The folder stands at the top of the repository, so a bare `import export` finds it there by accident.
    raise ImportError(
        f"export: the package must be imported as fastddpm.export, got {__name__}; write `from fastddpm import export`"
    )

if TYPE_CHECKING:
    from fastddpm.export.exporter import export_onnx as export_onnx
    from fastddpm.export.form import Exported as Exported
    from fastddpm.export.onnx_sampler import OnnxSampler as OnnxSampler
    from fastddpm.export.session import OnnxSession as OnnxSession

# Names are imported when first used, like the package's own: torch and onnxruntime take seconds.
_HOME = {
    "Exported": "form",
    "OnnxSampler": "onnx_sampler",
    "OnnxSession": "session",
    "export_onnx": "exporter",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastddpm.export' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastddpm.export.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
