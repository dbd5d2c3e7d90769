"""`engine="onnx"`: a sampler's network, exported once, kept on disk, and run by ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm import __version__
from fastddpm.checkpoints import CheckpointError
from fastddpm.export.convert import require_onnx
from fastddpm.export.model_file import weights_hash
from fastddpm.export.session import OnnxSession, Provider
from fastddpm.kernels._native import cache_folder
from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec
from fastddpm.unet import UNet


class EngineNetwork:
    """A network in ONNX Runtime, called like the one in PyTorch that it was made from.

    Attributes:
        module: the network in PyTorch.
    """

    def __init__(
        self, module: nn.Module | Callable[..., Tensor], schedule: NoiseSchedule, spec: ModelSpec, device: torch.device
    ) -> None:
        """Remember the network; it is exported when it is first called.

        Args:
            module: the network.
            schedule: the noise schedule it was trained with.
            spec: its conventions.
            device: where states are; on a GPU, ONNX Runtime's CUDA provider runs it.
        """
        self.module, self.device = module, device
        self._schedule, self._spec = schedule, spec
        self._session: OnnxSession | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """The network's output, on x's device; arguments as the network's own."""
        session = self._session = self._session or self._open()
        given = {"x": x, "t": t, "y": y, "x_self_cond": x_self_cond}
        feeds = {}
        for name, (dtype, _) in session.inputs.items():
            value = given[name]
            if value is None:
                raise ValueError(f"engine: {name} must be given for this network, got None")
            feeds[name] = np.ascontiguousarray(value.detach().cpu().numpy().astype(dtype, copy=False))
        return torch.from_numpy(session.run(feeds)["out"]).to(x.device)

    def _open(self) -> OnnxSession:
        """The session, from the file on disk if it is there."""
        from fastddpm.export.exporter import export_onnx
        from fastddpm.sampler import Sampler

        provider: Provider = "cuda" if self.device.type == "cuda" else "cpu"
        sampler = Sampler(self.module, self._schedule, self._spec, device=self.device, engine="eager")
        # Another network's code is not known to us, so its file is for this process alone.
        keep = isinstance(self.module, UNet)
        path = cache_folder() / f"{self._key() if keep else f'onnx-{os.getpid()}-{id(self):x}'}.onnx"
        try:
            return OnnxSession(path, provider)
        except CheckpointError:  # absent, or cut short
            export_onnx(sampler, path, what="network")
        try:
            return OnnxSession(path, provider)
        finally:
            if not keep:
                path.unlink()

    def _key(self) -> str:
        network = self.module
        known = [str(network.config), weights_hash(network)] if isinstance(network, UNet) else []
        text = json.dumps([__version__, torch.__version__, self._spec.to_dict(), *known], sort_keys=True)
        return f"onnx-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def engine_network(
    model: nn.Module | Callable[..., Tensor],
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
