"""Other runtimes around the same weights: ONNX Runtime and OpenVINO, with diffusers' scheduler in the loop.

Their packages are imported here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from fastddpm.bench.foreign import common_noise, scheduler_loop, to_pictures
from fastddpm.bench.job import Job
from fastddpm.bench.peers import MissingError, Peer
from fastddpm.bench.twins import import_diffusers
from fastddpm.common.packages import require
from fastddpm.files import atomic_path


class _Bare(nn.Module):
    """A UNet2DModel with tensors in and out, for exporters."""

    def __init__(self, network: nn.Module, classes: int | None) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, t, class_labels=y, return_dict=False)[0]
        return out


def exported(job: Job) -> Path:
    """The pipeline's network as an ONNX file with an open batch, made once for all workers.

    A process of its own makes it: an exporter's memory must not count as that of whoever comes first.

    Raises:
        ImportError: the exporter's packages are not installed.
        RuntimeError: it cannot be made.
    """
    path = Path(job.scratch) / "network.onnx"
    with FileLock(Path(job.scratch) / "onnx.lock"):
        if not path.exists():
            for package in ("onnx", "onnxscript"):
                require(package, "onnx")
            command = [sys.executable, "-m", "fastddpm.bench.sessions", str(path)]
            done = subprocess.run(command, input=json.dumps(dataclasses.asdict(job)), text=True, capture_output=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise RuntimeError(f"the network's export to ONNX failed: {last}")
    return path


def export(job: Job, path: Path) -> None:
    """Write the pipeline's network as an ONNX file; it is whole or absent."""
    diffusers = import_diffusers()
    network = _Bare(diffusers.UNet2DModel.from_pretrained(job.folder, subfolder="unet").eval(), job.classes)
    example: tuple[Tensor, ...] = (torch.randn(2, *job.shape), torch.tensor([5, 7]))
    names = ["x", "t"]
    if job.classes is not None:
        example, names = (*example, torch.tensor([0, 1])), ["x", "t", "y"]
    batch = torch.export.Dim("batch", min=1, max=4096)
    with atomic_path(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, example, str(partial), input_names=names, output_names=["out"], dynamo=True, verbose=False,
            external_data=False, dynamic_shapes={name: {0: batch} for name in names},
        )  # fmt: skip


class SessionPeer(Peer):
    """The exported network in another runtime, with diffusers' scheduler."""

    package = ("", "")
    """The runtime's package, and with which of fastddpm's extras it comes."""

    def load(self, job: Job) -> None:
        """Export the network unless that is done, and make the session."""
        super().load(job)
        if job.device != "cpu":
            raise MissingError("measured on CPUs only")
        diffusers = import_diffusers()
        self.runtime = require(*self.package)
        if not job.folder:
            raise MissingError(job.why_no_folder)
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(job.folder, subfolder="scheduler")
        began = time.perf_counter()
        self.path = exported(job)
        self.export_s = time.perf_counter() - began

    def _run_model(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        raise NotImplementedError

    def _network(self, x: Tensor, t: Tensor) -> Tensor:
        feeds = {"x": x.numpy(), "t": np.full(self.batch, int(t), dtype=np.int64)}
        y = self._labels()
        if y is not None:
            feeds["y"] = y.numpy()
        return torch.from_numpy(self._run_model(feeds))

    def pictures(self) -> Tensor:
        """The loop with the common noise."""
        with common_noise(self.job, self.batch, self.steps):
            return to_pictures(self._steps())

    def run(self) -> None:
        """The same loop."""
        to_pictures(self._steps())

    def _steps(self) -> Tensor:
        return scheduler_loop(self.scheduler, self._network, self.job, self.batch, self.steps)


class OnnxRuntimePeer(SessionPeer):
    """ONNX Runtime's CPU provider."""

    package = ("onnxruntime", "onnx")

    def load(self, job: Job) -> None:
        """Make the session."""
        super().load(job)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = job.threads
        self.session = self.runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def _run_model(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.session.run(None, feeds)[0])


class OpenVinoPeer(SessionPeer):
    """OpenVINO's CPU plugin, compiled for a fixed batch."""

    package = ("openvino", "bench")

    def prepare(self, batch: int, steps: int) -> None:
        """Compile for this batch."""
        if batch != self.batch:
            core = self.runtime.Core()
            model = core.read_model(str(self.path))
            shapes = {"x": [batch, *self.job.shape], "t": [batch]}
            model.reshape(shapes if self.job.classes is None else {**shapes, "y": [batch]})
            hint = {"fp32": "f32", "bf16": "bf16"}[self.precision]
            settings = {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": str(self.job.threads),
                "PERFORMANCE_HINT": "LATENCY",
            }
            self.model = core.compile_model(model, "CPU", settings)
        super().prepare(batch, steps)

    def _run_model(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return np.array(self.model(feeds)[0])


if __name__ == "__main__":
    export(Job.from_dict(json.load(sys.stdin)), Path(sys.argv[1]))
