"""`engine="onnx"`: a sampler's network, exported once, kept on disk, and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastddpm.engines import cache
from fastddpm.engines.weights import Weights
from fastddpm.export.exporter import export_onnx
from fastddpm.export.modules import as_module
from fastddpm.export.session import OnnxSession, Provider
from fastddpm.export.source import Source
from fastddpm.export.tracing import require_onnx
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.step.network import Foreign, Network, as_network

_ONE_FILE_BYTES = 1_900_000_000


class EngineNetwork(Foreign):
    """A network in ONNX Runtime, called like the one in PyTorch that it was made from, which is its `model`."""

    def __init__(
        self, model: Callable[..., Tensor], schedule: NoiseSchedule, spec: ModelSpec, device: torch.device
    ) -> None:
        """Remember the network; it is exported when it is first called.

        Args:
            model: the network.
            schedule: the noise schedule it was trained with.
            spec: its conventions.
            device: where states are; on a GPU, ONNX Runtime's CUDA provider runs it.
        """
        super().__init__(model)
        self._network = cast(Network, as_network(model))
        self._schedule, self._spec, self._device = schedule, spec, device
        self._session: OnnxSession | None = None
        self._weights = Weights(self)

    def tabulate(self, times: Tensor, label: int | None = None) -> Tensor:
        """The times; asked again when weights have changed, and then the network is exported anew."""
        if self._weights.have_changed():
            self._session = None
        return times

    def forward(self, x: Tensor, t: Tensor, *labels: Tensor, **more: Tensor) -> Tensor:
        """The network's output, on x's device; arguments as the network's own."""
        session = self._session = self._session or self._open()
        given = {"x": x, "t": t, **dict(zip(("y",), labels, strict=False)), **more}
        feeds = {}
        for name, (dtype, _) in session.inputs.items():
            value = given.get(name)
            if value is None:
                raise ValueError(f"engine: {name} must be given for this network, got None")
            feeds[name] = np.ascontiguousarray(value.detach().cpu().numpy().astype(dtype, copy=False))
        return torch.from_numpy(session.run(feeds)["out"]).to(x.device)

    def _open(self) -> OnnxSession:
        """The session, from the file on disk if it is there."""
        provider: Provider = "cuda" if self._device.type == "cuda" else "cpu"
        source = Source(as_module(self.model), self._schedule, self._spec)
        # Another network's code is not known to us, so its file is for this process alone; above 2 GB there are two.
        size = sum(p.numel() * p.element_size() for p in self.parameters())
        keep = self._network.identity() is not None and size < _ONE_FILE_BYTES
        path = cache.find_or_make(
            self._key(), lambda new: export_onnx(source, new, what="network"), keep=keep, suffix=".onnx"
        )
        try:
            return OnnxSession(path, provider)
        finally:
            if not keep:
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.data").unlink(missing_ok=True)

    def _key(self) -> str:
        network, weights = self._network.identity(), self._weights.digest
        return cache.key_of("onnx", spec=self._spec.to_dict(), network=network, weights=weights)


def engine_network(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    spec: ModelSpec,
    device: torch.device,
    precision: str,
) -> EngineNetwork:
    """The network for `engine="onnx"`; see `EngineNetwork`.

    Raises:
        ValueError: a package is missing, or the precision is not float32.
    """
    require_onnx()
    if precision != "fp32":
        raise ValueError(f"precision must be fp32 for the onnx engine, got {precision}; export with precision='fp16'")
    return EngineNetwork(model, schedule, spec, device)
