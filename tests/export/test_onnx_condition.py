"""Exported networks, steps and chains that take a condition."""

import pytest
import torch

pytest.importorskip("onnx", reason="needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from fastddpm import ModelSpec, NoiseSchedule, Sampler  # noqa: E402
from fastddpm.export import OnnxSampler, export_onnx  # noqa: E402
from tests.networks import TwoLayers, tiny_unet  # noqa: E402

TIGHT = 2e-6
METHOD = {"solver": "ddpm", "steps": 5}
SPEC = ModelSpec((1, 8, 8), num_classes=3, null_class=3, condition_channels=2, condition_scale=2)


NETWORKS = {"two layers": TwoLayers, "U-Net": tiny_unet}


@pytest.fixture(scope="module", params=["two layers", pytest.param("U-Net", marks=pytest.mark.slow)])
def sampler(request):
    """Of a network of two layers, because tracing a U-Net takes long."""
    network = NETWORKS[request.param](in_channels=3)
    return Sampler(network, NoiseSchedule.linear(40), SPEC, device="cpu", engine="eager")


@pytest.fixture(scope="module")
def exported(sampler, tmp_path_factory):
    """A function: level → what was exported, each made once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(what):
        if what not in made:
            method = {} if what == "network" else METHOD
            made[what] = export_onnx(sampler, folder / f"{what}.onnx", what=what, **method)
        return made[what], OnnxSampler(made[what].files[0], "cpu")

    return get


def condition(n=3):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize("what", ["network", "step", "chain"])
def test_each_level_takes_it(sampler, exported, what):
    written, model = exported(what)
    assert model.spec == SPEC and "picture enlarged 2 times" in written.facts["meaning"]["condition"]
    assert ("condition" in model.session.inputs) == (what != "network")
    assert model.session.inputs.get("x", (None, (3, 1)))[1][1] == (3 if what == "network" else 1)
    asked = {"class_labels": [0, 2, 1], "guidance_scale": [1.0, 2.0, 1.5], "condition": condition(), "progress": False}
    expected = sampler.sample(3, **METHOD, **asked)
    more = METHOD if what == "network" else {}
    assert (model.sample(3, **more, **asked) - expected).abs().max() < TIGHT
    with pytest.raises(ValueError, match="condition must be given"):
        model.sample(3, **more, **{**asked, "condition": None})


def gradient(x, t, y):
    return torch.sin(x)


def test_a_classifier_guides_a_network_and_no_step(sampler, exported):
    asked = {"class_labels": 1, "condition": condition(), "cond_fn": gradient, "progress": False}
    network, step = exported("network")[1], exported("step")[1]
    assert (network.sample(3, steps=4, **asked) - sampler.sample(3, steps=4, **asked)).abs().max() < TIGHT
    with pytest.raises(ValueError, match="cond_fn must be left out for a step, got one"):
        step.sample(3, **asked)


def test_int8_has_nothing_to_be_calibrated_on(sampler, tmp_path):
    with pytest.raises(ValueError, match="precision must be fp32 or fp16 for a network with a condition, got 'int8'"):
        export_onnx(sampler, tmp_path / "m.onnx", precision="int8")


@pytest.mark.slow
def test_the_onnx_engine(sampler):
    engine = Sampler(sampler.model, sampler.schedule, SPEC, device="cpu", engine="onnx")
    asked = {"steps": 3, "class_labels": 1, "condition": condition(), "progress": False}
    assert (engine.sample(3, **asked) - sampler.sample(3, **asked)).abs().max() < TIGHT
    assert engine.engine.used == "onnx"
    guided = {**asked, "cond_fn": gradient}
    assert (engine.sample(3, **guided) - sampler.sample(3, **guided)).abs().max() < TIGHT
