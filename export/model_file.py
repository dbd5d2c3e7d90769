"""Model files: what they say about themselves, and how they get to the disk: checked, whole, always the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from fastddpm.checkpoints import CheckpointError
from fastddpm.common.interrupts import hold_interrupt
from fastddpm.files import check_replaceable, sync, temporary_folder
from fastddpm.process.table import Solver

if TYPE_CHECKING:
    import onnx

KEY = "fastddpm"
"""The metadata entry that holds everything as JSON; the others are for people and tools that list metadata."""
FORMAT = 1
NEEDED = ("what", "noise", "guidance", "output", "schedule", "spec")
LIMIT = 2**31 - 2**20
"""A protobuf file ends at 2 GiB: larger models keep their weights in a file of their own."""
_INLINE = 1024
_ALIGNMENT = 4096


class Facts(TypedDict, total=False):
    """What a model says about itself; what does not apply to it is left out."""

    format: int
    what: Literal["network", "step", "chain"]
    precision: Literal["fp32", "fp16", "int8"]
    opset: int
    batch: int | None
    noise: Literal["philox", "input"]
    guidance: bool
    output: Literal["unit", "raw"]
    tensorrt: bool
    inpaint: bool
    weights_sha256: str
    source: str
    licence: str
    schedule: Mapping[str, object]
    spec: Mapping[str, object]
    value_range: str
    solver: Solver
    steps: int
    timesteps: list[int]
    counters: list[int]
    noisy_rows: list[int]
    uses_noise: bool
    keeps_history: bool
    meaning: Mapping[str, str]


def licence_of(path: Path | None) -> str | None:
    """The licence that a checkpoint's own card names (`license:` at the top of README.md), or None."""
    if path is None:
        return None
    card = (path if path.is_dir() else path.parent) / "README.md"
    if not card.is_file():
        return None
    try:
        lines = card.read_text(encoding="utf-8").splitlines()[:60]
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines if lines[:1] == ["---"] else []:
        name, _, value = line.partition(":")
        if name.strip() == "license" and value.strip():
            return value.strip().strip("'\"")
    return None


def set_metadata(model: onnx.ModelProto, facts: Facts, version: str) -> None:
    """Write `facts` into a model: all of them as JSON under `KEY`, the plain ones under their own names too."""
    model.producer_name, model.producer_version = "fastddpm", version
    model.domain, model.model_version = "", FORMAT
    entries = {KEY: json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}
    entries |= {f"{KEY}.{name}": str(value) for name, value in facts.items() if isinstance(value, (str, int, float))}
    del model.metadata_props[:]
    for name in sorted(entries):
        model.metadata_props.add(key=name, value=entries[name])


def read_metadata(values: Mapping[str, str], source: str) -> Facts:
    """What `set_metadata` wrote.

    Raises:
        CheckpointError: the model is another program's, or of a later format.
    """
    try:
        facts = dict(json.loads(values[KEY]))
        version = int(facts["format"])
        missing = [name for name in NEEDED if name not in facts and version <= FORMAT]
        if missing:
            raise KeyError(missing[0])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{source}: must be a model that fastddpm export wrote, got one without its metadata; export it again"
        ) from error
    if version > FORMAT:
        raise CheckpointError(f"{source}: format must be at most {FORMAT}, got {version}; renew fastddpm")
    return cast(Facts, facts)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a model's constants are too large for one protobuf message."""
    return sum(len(tensor.raw_data) for tensor in _tensors(model)) > LIMIT


def detach(model: onnx.ModelProto) -> list[bytes]:
    """Take the large constants' values out of a model, so that it can be copied and put into a subgraph.

    Protobuf cannot copy a message of 2 GB and more. Each constant keeps a reference to its place in the list.

    Args:
        model: the model; it is changed.

    Returns:
        The values, for `write_model`.
    """
    values: list[bytes] = []
    for tensor in _tensors(model):
        if len(tensor.raw_data) >= _INLINE:
            values.append(tensor.raw_data)
            _refer(tensor, location=str(len(values) - 1))
    return values


def infer_types(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Types and shapes of inner values, as far as ONNX can tell; works for models of 2 GB and more, too."""
    import onnx

    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    for field in ("node", "input", "output"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < _INLINE:
            light.graph.initializer.append(tensor)
        else:
            stub = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            _refer(stub, location="elsewhere")
            light.graph.initializer.append(stub)
    return list(onnx.shape_inference.infer_shapes(light).graph.value_info)


def write_model(
    path: str | os.PathLike[str],
    model: onnx.ModelProto,
    *,
    external: bool | None = None,
    detached: Sequence[bytes] = (),
) -> list[Path]:
    """Check a model and write it, atomically; the same model gives the same bytes.

    Args:
        path: the .onnx file.
        model: the model; with external weights its constants are emptied.
        external: whether large constants go to `path`.data; None decides by size.
        detached: what `detach` took out of it.

    Returns:
        The files, the model's first.

    Raises:
        ValueError: the model is not valid ONNX, or too large for one file.
        OSError: a file cannot be written.
    """
    import onnx

    target = Path(path)
    data = target.with_name(target.name + ".data")
    large = bool(detached) or is_large(model)
    if large and external is False:
        raise ValueError(f"{target}: weights of 2 GB and more must go to a file of their own, got external=False")
    with _written_together(target) as folder:
        if external or large:
            _move_out(model, folder / data.name, data.name, detached)
        else:
            _check(model, target)
        (folder / target.name).write_bytes(model.SerializeToString(deterministic=True))
        if external or large:
            _check(str(folder / target.name), target)  # with its weights, which are found beside it
        else:
            onnx.load_model_from_string((folder / target.name).read_bytes())
    return [target, data] if external or large else [target]


@contextlib.contextmanager
def _written_together(target: Path) -> Iterator[Path]:
    """A folder beside `target` whose files take their places together when the block ends; it vanishes in any case.

    A model and its weights belong together: whoever else writes to the same path at that moment waits, and Ctrl-C does.

    Raises:
        OSError: a file cannot be written; it names the one that was asked for.
    """
    check_replaceable(target)
    with temporary_folder(target) as folder:
        yield folder
        for file in folder.iterdir():
            sync(file)
        with hold_interrupt(), _locked(target.parent):
            _put(folder, target)


def _put(folder: Path, target: Path) -> None:
    """Move a model and the weights beside it to where they belong; weights that it no longer needs go."""
    data = target.with_name(target.name + ".data")
    if (folder / data.name).exists():
        os.replace(folder / data.name, data)
    elif data.exists() and _ours(data):
        data.unlink()
    os.replace(folder / target.name, target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only one who moves models in `folder`, as far as its file system knows locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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


def _move_out(model: onnx.ModelProto, path: Path, name: str, detached: Sequence[bytes]) -> None:
    """Write the large constants to `path` and leave references to `name` in the model."""
    with open(path, "wb") as file:
        file.write(_MAGIC)
        for tensor in _tensors(model):
            raw = detached[int(tensor.external_data[0].value)] if tensor.external_data else tensor.raw_data
            if len(raw) < _INLINE:
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            file.write(raw)
            _refer(tensor, location=name, offset=str(offset), length=str(len(raw)))


def _refer(tensor: onnx.TensorProto, **where: str) -> None:
    """Let a constant's value lie elsewhere."""
    import onnx

    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)
