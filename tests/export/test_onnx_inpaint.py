"""Steps and chains in ONNX that take known pictures and a mask."""

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from fastddpm import OnnxSampler, Sampler, export_onnx
from tests.networks import tiny_sampler, two_layers_sampler

ASKED = {"seed": 3, "class_labels": [0, 2, 1], "output": "raw"}
MAKE = {"two layers": two_layers_sampler, "U-Net": tiny_sampler}


@pytest.fixture(scope="module", params=["two layers", pytest.param("U-Net", marks=pytest.mark.slow)])
def sampler(request):
    """Of a network of two layers, because tracing a U-Net takes long."""
    made = MAKE[request.param]()
    return Sampler(made.model, made.schedule, made.spec, device="cpu", engine="eager")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        pytest.param("step", {"noise": "philox"}, marks=pytest.mark.slow, id="step"),
        pytest.param("step", {"noise": "input", "guidance": False}, marks=pytest.mark.slow, id="step, noise an input"),
        pytest.param("chain", {"output": "raw"}, id="chain"),
    ],
)
def test_the_pictures_are_the_sampler_s(sampler, images, tmp_path, what, options):
    run = {"solver": "ddpm", "steps": 6}
    jumps = {"jump_length": 2, "resamplings": 2}
    export_onnx(sampler, tmp_path / "a.onnx", what=what, inpaint=True, **jumps, **options, **run)
    onnx = OnnxSampler(tmp_path / "a.onnx", "cpu")
    expected = sampler.inpaint(images, "left", **jumps, **run, **ASKED)
    got = onnx.inpaint(images, "left", **ASKED)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[..., 4:], (2 * images - 1)[..., 4:])
    assert {"known", "mask"} <= set(onnx.session.inputs)


def test_what_cannot_be_is_refused(sampler, tmp_path):
    for options, match in (
        ({"what": "network", "inpaint": True}, "what must be step or chain for inpainting, got network"),
        ({"what": "step", "resamplings": 3}, "resamplings and jump_length must be left out, got one"),
        ({"what": "step", "inpaint": True, "solver": "dpmpp_2m", "resamplings": 2}, "solver must be ddpm or ddim"),
    ):
        with pytest.raises(ValueError, match=rf"^export: {match}"):
            export_onnx(sampler, tmp_path / "a.onnx", **options)


@pytest.mark.slow
def test_a_file_without_a_mask_does_not_inpaint(sampler, images, tmp_path):
    export_onnx(sampler, tmp_path / "plain.onnx", what="network")
    with pytest.raises(ValueError, match=r"^inpaint: the file must take a mask, got one that does not; export it with"):
        OnnxSampler(tmp_path / "plain.onnx", "cpu").inpaint(images, "left", class_labels=1)
