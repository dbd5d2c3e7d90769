"""Model files: what they say about themselves, and how they get to the disk: checked, whole, always the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastddpm.checkpoints import CheckpointError
from fastddpm.files import atomic_path

if TYPE_CHECKING:
    import onnx

KEY = "fastddpm"
"""The metadata entry that holds everything as JSON; the others are for people and tools that list metadata."""
FORMAT = 1
LIMIT = 2**31 - 2**20
"""A protobuf file ends at 2 GiB: larger models keep their weights in a file of their own."""
_INLINE = 1024
_ALIGNMENT = 4096


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(dtype=_bytes_dtype()).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _bytes_dtype() -> Any:  # noqa: ANN401 - torch.dtype, imported late with the rest of torch
    import torch

    return torch.uint8


def licence_of(path: Path | None) -> str | None:
    """The licence that a checkpoint's own card names (`license:` at the top of README.md), or None."""
    if path is None:
        return None
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        lines = card.read_text(encoding="utf-8").splitlines()[:60]
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines if lines[:1] == ["---"] else []:
        name, _, value = line.partition(":")
        if name.strip() == "license" and value.strip():
            return value.strip().strip("'\"")
    return None


def set_metadata(model: onnx.ModelProto, facts: Mapping[str, Any], version: str) -> None:
    """Write `facts` into a model: all of them as JSON under `KEY`, the plain ones under their own names too."""
    model.producer_name, model.producer_version = "fastddpm", version
    model.domain, model.model_version = "", FORMAT
    entries = {KEY: json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}
    entries |= {f"{KEY}.{name}": str(value) for name, value in facts.items() if isinstance(value, (str, int, float))}
    del model.metadata_props[:]
    for name in sorted(entries):
        model.metadata_props.add(key=name, value=entries[name])


def read_metadata(values: Mapping[str, str], source: str) -> dict[str, Any]:
    """What `set_metadata` wrote.

    Raises:
        CheckpointError: the model is another program's, or of a later format.
    """
    try:
        facts = dict(json.loads(values[KEY]))
        version = int(facts["format"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{source}: must be a model that fastddpm export wrote, got one without its metadata; export it again"
        ) from error
    if version > FORMAT:
        raise CheckpointError(f"{source}: format must be at most {FORMAT}, got {version}; renew fastddpm")
    return facts


def write_model(path: str | os.PathLike[str], model: onnx.ModelProto, *, external: bool | None = None) -> list[Path]:
    """Check a model and write it, atomically; the same model gives the same bytes.

    Args:
        path: the .onnx file.
        model: the model; with external weights its constants are emptied.
        external: whether large constants go to `path`.data; None decides by size.

    Returns:
        The files, the model's first.

    Raises:
        ValueError: the model is not valid ONNX, or too large for one file.
        OSError: a file cannot be written.
    """
    import onnx

    target = Path(path)
    large = sum(len(tensor.raw_data) for tensor in _tensors(model)) > LIMIT
    if large and external is False:
        raise ValueError(f"{target}: weights of 2 GB and more must go to a file of their own, got external=False")
    written = [target]
    data = target.with_name(target.name + ".data")
    if external or large:
        with atomic_path(data) as temporary:
            _move_out(model, temporary, data.name)
        written.append(data)
    else:
        _check(model, target)
    with atomic_path(target) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        if len(written) > 1:
            # Names of external files are relative to the model: the temporary one lies in the same folder.
            _check(str(temporary), target)
        else:
            onnx.load_model_from_string(temporary.read_bytes())
    if len(written) == 1 and data.exists() and _ours(data):
        data.unlink()
    return written


def _check(model: onnx.ModelProto | str, target: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{target}: the model must pass ONNX's checker, got {reason}; try another opset") from error


def _ours(data: Path) -> bool:
    """Whether a file of weights is a left-over of ours, beside a model that no longer needs it."""
    with open(data, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


_MAGIC = b"fastddpm weights\n"


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants, those of subgraphs included."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)


def _move_out(model: onnx.ModelProto, path: Path, name: str) -> None:
    """Write the large constants to `path` and leave references to `name` in the model."""
    import onnx

    with open(path, "wb") as file:
        file.write(_MAGIC)
        for tensor in _tensors(model):
            raw = tensor.raw_data
            if len(raw) < _INLINE:
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            where = {"location": name, "offset": str(file.tell()), "length": str(len(raw))}
            file.write(raw)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in where.items():
                tensor.external_data.add(key=key, value=value)
