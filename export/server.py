"""A model repository for Triton Inference Server: a folder for the model, with its configuration and version 1."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fastddpm.export.session import OnnxSession
from fastddpm.files import atomic_path, check_writable, make_folder, write_text

if TYPE_CHECKING:
    from fastddpm.export.form import Exported

MAX_BATCH = 64
QUEUE_MICROSECONDS = 2000
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "float16": "TYPE_FP16"}


def check_repository(folder: str | os.PathLike[str]) -> None:
    """Refuse before the work what would fail after it.

    Raises:
        NotADirectoryError: something on the way is a file.
        OSError: nothing can be written there.
    """
    check_writable(Path(folder))


def write_repository(folder: str | os.PathLike[str], exported: Exported) -> Path:
    """Lay an exported model out for the server's onnxruntime backend, with dynamic batching and a warm-up.

    Args:
        folder: the model repository; made if missing. Other models in it are left alone.
        exported: what `export_onnx` returned.

    Returns:
        The model's folder.

    Raises:
        CheckpointError: the model cannot be opened.
        OSError: a file cannot be written.
    """
    model = exported.files[0]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", model.stem)
    text = config(name, OnnxSession(model, "cpu"))
    place = Path(folder) / name
    made = [part for part in (place, *place.parents) if not part.exists()]
    try:
        make_folder(place / "1")
        for file in exported.files:
            # External weights are found by the name that the model gives them.
            with atomic_path(place / "1" / ("model.onnx" if file == model else file.name)) as temporary:
                shutil.copyfile(file, temporary)
        write_text(place / "config.pbtxt", text)
    except BaseException:
        if made:  # the server would take what is there for a whole model
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may have put models there meanwhile
            for part in made[1:]:
                part.rmdir()
        raise
    return place


def config(name: str, session: OnnxSession) -> str:
    """The configuration in protobuf's text form (message inference.ModelConfig)."""
    fixed, size = session.batch, session.batch or MAX_BATCH
    outputs = {value.name: (_dtype(value.type), tuple(value.shape)) for value in session.raw.get_outputs()}
    inputs = {key: (str(dtype.__name__), shape) for key, (dtype, shape) in session.inputs.items()}
    batching = (
        [f"max_batch_size: {size}", "dynamic_batching {", f"  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}", "}"]
        if fixed is None
        else ["max_batch_size: 0"]
    )
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', *batching]
    for kind, values in (("input", inputs), ("output", outputs)):
        for key, (dtype, shape) in values.items():
            lines += [f"{kind} {{", f'  name: "{key}"', f"  data_type: {_TYPES[dtype]}", *_dims(shape, fixed), "}"]
    lines += [
        "instance_group { kind: KIND_AUTO count: 1 }",
        "model_warmup {",
        '  name: "first request"',
        "  batch_size: 1",
    ]
    for key, (dtype, shape) in inputs.items():
        dims = "".join(f" dims: {d}" for d in (shape if fixed is not None else shape[1:] or (1,)))
        lines += [f'  inputs {{ key: "{key}" value {{ data_type: {_TYPES[dtype]}{dims} zero_data: true }} }}']
    return "\n".join([*lines, "}", ""])


def _dims(shape: tuple[int | str | None, ...], fixed: int | None) -> list[str]:
    """A tensor's shape; one number per sample is a vector to the server and none to the model."""
    if fixed is not None:
        return [f"  dims: {d}" for d in shape]
    return [f"  dims: {d}" for d in shape[1:]] or ["  dims: 1", "  reshape { }"]


def _dtype(name: str) -> str:
    return {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}[name]
