"""The parity matrix: other projects' checkpoints, and the shipped one, at each level and several batches."""

import functools
import json

import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from fastddpm import Sampler  # noqa: E402
from fastddpm.export import OnnxSampler, export_onnx  # noqa: E402
from fastddpm.export.half import FP16_PSNR  # noqa: E402
from fastddpm.export.int8 import picture_psnr  # noqa: E402
from tests.helpers import peers_dir  # noqa: E402

NETWORK_RTOL = 1e-4
"""Relative to the largest output; ONNX Runtime sums convolutions in another order."""
CHAIN_ATOL = 1e-3
BATCHES = (1, 2, 5)
FIXTURES = (
    "diffusers_cifar_like",
    "diffusers_trained_default",
    "lucidrains_pred_v",
    "openai_guided",
    "openai_improved",
    "pesser_ho",
    "w86763777_ddpm",
)
QUICK = {("openai_improved", "network")}
"""Learned variance, fractional times, scale-shift: the case with the most in it. The others are slow."""


@functools.cache
def sampler(name):
    folder = peers_dir() / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    meta = json.loads((folder / "meta.json").read_text())
    flags = json.loads((folder / "flags.json").read_text())
    path = folder if (folder / "model_index.json").is_file() else folder / meta["checkpoint"]
    return Sampler.from_pretrained(path, device="cpu", engine="eager", **flags)


def matrix():
    cases = []
    for name in FIXTURES:
        for what in ("network", "step", "chain"):
            marks = () if (name, what) in QUICK else pytest.mark.slow
            cases.append(pytest.param(name, what, marks=marks, id=f"{name}-{what}"))
    return cases


@pytest.mark.parametrize(("name", "what"), matrix())
def test_parity(name, what, tmp_path):
    ours = sampler(name)
    method = {} if what == "network" else {"solver": "ddpm", "steps": 12}
    path = export_onnx(ours, tmp_path / "m.onnx", what=what, **method).files[0]
    model = OnnxSampler(path, "cpu")
    assert model.spec == ours.spec
    for batch in BATCHES:
        if what == "network":
            x = torch.randn(batch, *ours.spec.shape, generator=torch.Generator().manual_seed(batch))
            t = ours.spec.times_fed(torch.arange(batch) * (ours.schedule.T // 6))
            y = None if ours.spec.num_classes is None else torch.arange(batch) % ours.spec.num_classes
            wanted = ours.network(x, t, y)
            error = float((model.network(x, t, y) - wanted).abs().max() / wanted.abs().max())
            assert error < NETWORK_RTOL, (batch, error)
            continue
        labels = None if ours.spec.num_classes is None else [i % ours.spec.num_classes for i in range(batch)]
        options = {"seed": 5, "class_labels": labels, "progress": False}
        error = float((model.sample(batch, **options) - ours.sample(batch, **method, **options)).abs().max())
        assert error < CHAIN_ATOL, (batch, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_parity_of_dpm_solver(name, tmp_path):
    ours, method = sampler(name), {"solver": "dpmpp_2m", "steps": 10, "clip": 1.0}
    path = export_onnx(ours, tmp_path / "m.onnx", what="chain", **method).files[0]
    theirs = OnnxSampler(path, "cpu").sample(3, progress=False)
    assert float((theirs - ours.sample(3, progress=False, **method)).abs().max()) < CHAIN_ATOL


@pytest.mark.slow
def test_a_thousand_ancestral_steps_on_the_shipped_model(tmp_path):
    ours, method = Sampler.from_pretrained("mnist", device="cpu", engine="eager"), {"solver": "ddpm"}
    exported = export_onnx(ours, tmp_path / "m.onnx", what="chain", **method)
    assert exported.facts["steps"] == 1000
    options = {"class_labels": [7, 0, 3], "guidance_scale": [1.5, 1.0, 2.0], "seed": 11, "progress": False}
    theirs = OnnxSampler(exported.files[0], "cpu").sample(3, **options)
    assert float((theirs - ours.sample(3, **method, **options)).abs().max()) < CHAIN_ATOL


@pytest.mark.slow
def test_half_precision_of_the_shipped_model(tmp_path):
    ours = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    exported = export_onnx(ours, tmp_path / "m.onnx", what="chain", steps=20, precision="fp16")
    decibels = picture_psnr(exported, ours, 8)
    assert decibels.min() > FP16_PSNR
    assert decibels.max() < 100  # it is half precision that was measured
