"""A network's body as an ONNX file: all that a step asks of a network, for the libraries that run such files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.engines import cache
from fastddpm.engines.compare import CompileError
from fastddpm.export.model_file import write_model
from fastddpm.export.modules import EXAMPLE_BATCH
from fastddpm.export.tracing import DEFAULT_OPSET, quiet, trace
from fastddpm.step.network import Network

SUFFIX = ".onnx"
OUT = "out"
_ONE_FILE_BYTES = 1_900_000_000


class Body(nn.Module):
    """(x, rows[, labels][, past]) → output: `Network.body` with each sample's own row."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network."""
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, rows: Tensor, labels: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        """The raw output; rows [B, …] are what `Network.tabulate` gives of each sample's row."""
        return cast(Network, self.network).body(x, rows, None, labels, past)


@contextlib.contextmanager
def body_file(network: nn.Module, feeds: Mapping[str, Tensor], weights: str) -> Iterator[Path]:
    """The file of a network's body, for the length of the block; it is kept on disk where the network is known.

    Args:
        network: float32, on the CPU or a GPU, where it stays.
        feeds: an example of what it is fed. Only the batch stays open, and of a network that is not ours not even that.
        weights: the digest of its weights.

    Yields:
        The file; above 2 GB the weights are in another one beside it.

    Raises:
        CompileError: the network cannot be traced.
        OSError: the file cannot be written.
        ValueError: a package is missing.
    """
    identity = cast(Network, network).identity()
    # Another network's code is not known to us, so its file is for this process alone; the cache keeps single files.
    keep = identity is not None and _bytes(network) < _ONE_FILE_BYTES
    key = cache.key_of(weights[:8], body=_signature(feeds), network=identity, weights=weights)
    path = cache.find_or_make(
        key, lambda new: _export(network, feeds, new, is_open=identity is not None), keep=keep, suffix=SUFFIX
    )
    try:
        yield path
    finally:
        if not keep:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def _signature(feeds: Mapping[str, Tensor]) -> dict[str, list[object]]:
    return {name: [str(value.dtype), list(value.shape[1:])] for name, value in feeds.items()}


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _export(network: nn.Module, feeds: Mapping[str, Tensor], path: Path, *, is_open: bool) -> None:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if is_open:
        examples = {name: _repeated(value.cpu(), EXAMPLE_BATCH) for name, value in feeds.items()}
    else:
        examples = {name: value.cpu().clone() for name, value in feeds.items()}
    try:
        body = Body(network.cpu()).eval()
        if not _exported_by_tracing(body, examples, path, is_open=is_open):
            write_model(path, trace(body, examples, (OUT,), dynamic=is_open))
    except ValueError as error:
        raise CompileError(f"engine: {error}; or use engine='eager'") from error
    finally:
        network.to(device)


def _exported_by_tracing(body: nn.Module, examples: Mapping[str, Tensor], path: Path, *, is_open: bool) -> bool:
    """Write the file by PyTorch's older exporter, if that can: it takes a tenth of the time of the newer one."""
    axes = {name: {0: "batch"} for name in (*examples, OUT)} if is_open else None
    with contextlib.suppress(Exception), quiet(), torch.no_grad():
        torch.onnx.export(
            body, (dict(examples),), str(path), dynamo=False, dynamic_axes=axes, opset_version=DEFAULT_OPSET,
            input_names=list(examples), output_names=[OUT],
        )  # fmt: skip
        return True
    path.unlink(missing_ok=True)
    return False


def _repeated(value: Tensor, batch: int) -> Tensor:
    """The first sample of a tensor, `batch` times, in memory of its own."""
    return value[:1].expand(batch, *value.shape[1:]).clone()
