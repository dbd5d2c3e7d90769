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
from collections.abc import Sequence
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
from fastddpm.export.tracing import DEFAULT_OPSET
from fastddpm.files import atomic_path


class _Bare(nn.Module):
    """A UNet2DModel with tensors in and out, for exporters."""

    def __init__(self, network: nn.Module, classes: int | None) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, t, class_labels=y, return_dict=False)[0]
        return out


def exported(job: Job, batch: int) -> Path:
    """The pipeline's network as an ONNX file for a batch; for all of the job they are made at once, for all workers.

    A process of its own makes them: an exporter's memory must not count as that of whoever comes first.

    Raises:
        ImportError: the exporter's packages are not installed.
        RuntimeError: it cannot be made.
    """
    path = _file(job, batch)
    with FileLock(Path(job.scratch) / "onnx.lock"):
        if not path.exists():
            require("onnx", "onnx")
            command = [sys.executable, "-m", "fastddpm.bench.sessions", *map(str, {batch, *job.batches})]
            done = subprocess.run(command, input=json.dumps(dataclasses.asdict(job)), text=True, capture_output=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise RuntimeError(f"the network's export to ONNX failed: {last}")
    return path


def _file(job: Job, batch: int) -> Path:
    return Path(job.scratch) / f"network-{batch}.onnx"


def export(job: Job, batches: Sequence[int]) -> None:
    """Write the pipeline's network as an ONNX file for each batch; each is whole or absent.

    By PyTorch's older exporter, which takes a tenth of the newer one's time. With a fixed batch the runtimes are as
    quick with its files; with an open one ONNX Runtime would compute shapes in each call.
    """
    diffusers = import_diffusers()
    network = _Bare(diffusers.UNet2DModel.from_pretrained(job.folder, subfolder="unet").eval(), job.classes)
    for batch in batches:
        example: tuple[Tensor, ...] = (torch.randn(batch, *job.shape), torch.arange(batch))
        labels = job.labels(batch)
        example = example if labels is None else (*example, labels)
        with atomic_path(_file(job, batch)) as partial, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network, example, str(partial), input_names=["x", "t", "y"][: len(example)], output_names=["out"],
                dynamo=False, opset_version=DEFAULT_OPSET,
            )  # fmt: skip


class SessionPeer(Peer):
    """The exported network in another runtime, with diffusers' scheduler."""

    package = ("", "")
    """The runtime's package, and with which of fastddpm's extras it comes."""

    def load(self, job: Job) -> None:
        """Export the network unless that is done."""
        super().load(job)
        if job.device != "cpu":
            raise MissingError("measured on CPUs only")
        diffusers = import_diffusers()
        self.runtime = require(*self.package)
        if not job.folder:
            raise MissingError(job.why_no_folder)
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(job.folder, subfolder="scheduler")
        began = time.perf_counter()
        exported(job, job.batches[0])
        self.export_s = time.perf_counter() - began

    def prepare(self, batch: int, steps: int) -> None:
        """Make the session for this batch."""
        if batch != self.batch:
            self._open(exported(self.job, batch))
        super().prepare(batch, steps)

    def _open(self, path: Path) -> None:
        raise NotImplementedError

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

    def _open(self, path: Path) -> None:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.job.threads
        self.session = self.runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _run_model(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.session.run(None, feeds)[0])


class OpenVinoPeer(SessionPeer):
    """OpenVINO's CPU plugin."""

    package = ("openvino", "bench")

    def _open(self, path: Path) -> None:
        hint = {"fp32": "f32", "bf16": "bf16"}[self.precision]
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": str(self.job.threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = self.runtime.Core()
        self.model = core.compile_model(core.read_model(str(path)), "CPU", settings)

    def _run_model(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return np.array(self.model(feeds)[0])


if __name__ == "__main__":
    export(Job.from_dict(json.load(sys.stdin)), [int(batch) for batch in sys.argv[1:]])
