"""OpenAI's classifiers and upsamplers: files that its own code wrote and ran, and all that can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import CheckpointError, Sampler, load_checkpoint, load_classifier, low_res
from fastddpm.checkpoints.openai_classifier import PRESETS
from fastddpm.checkpoints.openai_presets import PRESETS as NETWORKS
from tests.foreign import FLAGS, foreign_network, foreign_state

FOLDER = Path(__file__).parent / "openai_guidance"
CLASSIFIERS = {
    "attention": {"image_size": 16, "classifier_depth": 1, "num_head_channels": 16},
    "adaptive": {"image_size": 8, "num_head_channels": 16},
}
SUPER_RES = {
    "large_size": 16, "small_size": 4, "diffusion_steps": 50, "noise_schedule": "linear", "rescale_timesteps": False,
    "predict_xstart": False, "num_heads": 2, "use_new_attention_order": False,
}  # fmt: skip


def fixture(name, path):
    """The state dict written as their training does, and the other arrays."""
    with np.load(FOLDER / f"{name}.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    state = {key[6:]: value.float() / 64 for key, value in arrays.items() if key.startswith("state/")}
    torch.save(state, path)
    return state, arrays


# ------------------------------------------------------------------ classifiers


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_and_gradients_are_theirs(tmp_path, name):
    _, arrays = fixture(name, tmp_path / "c.pt")
    classifier = load_classifier(tmp_path / "c.pt", **CLASSIFIERS[name])
    x, t, y = arrays["x"], arrays["t"], arrays["y"]
    torch.testing.assert_close(classifier(x, t), arrays["logits"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        gradient = classifier.cond_fn(3.0)(x, t, y)
    torch.testing.assert_close(gradient, 3.0 * arrays["gradient"], rtol=1e-4, atol=1e-6)
    assert not gradient.requires_grad and not classifier.training


def test_a_loaded_classifier_guides(tmp_path):
    fixture("attention", tmp_path / "c.pt")
    classifier = load_classifier(tmp_path / "c.pt", **CLASSIFIERS["attention"])
    fixture("super_res", tmp_path / "s.pt")
    sampler = Sampler.from_pretrained(tmp_path / "s.pt", device="cpu", **SUPER_RES)
    asked = {"steps": 3, "solver": "ddpm", "class_labels": [0, 2], "condition": torch.zeros(3, 16, 16)}
    plain = sampler.sample(2, output="raw", **asked)
    guided = sampler.sample(2, output="raw", cond_fn=classifier.cond_fn(30.0), **asked)
    assert not torch.equal(plain, guided)


def test_flags_that_the_weights_show_are_compared(tmp_path):
    fixture("attention", tmp_path / "c.pt")
    known = {"classifier_attention_resolutions": "8", "classifier_use_scale_shift_norm": True}
    known |= {"classifier_width": 32, "classifier_pool": "attention", "classifier_resblock_updown": True}
    load_classifier(tmp_path / "c.pt", **CLASSIFIERS["attention"], **known, classifier_use_fp16=True)
    for flag, value in {
        "classifier_width": 64,
        "classifier_pool": "adaptive",
        "classifier_resblock_updown": False,
        "classifier_attention_resolutions": "16",
        "classifier_use_scale_shift_norm": False,
    }.items():
        with pytest.raises(CheckpointError, match=f"{flag} must be .*, as its weights have it"):
            load_classifier(tmp_path / "c.pt", **CLASSIFIERS["attention"], **{flag: value})


def test_what_is_missing_or_wrong_is_one_clear_line(tmp_path):
    state, _ = fixture("attention", tmp_path / "c.pt")
    given = CLASSIFIERS["attention"]
    for flags, message in [
        ({}, r"does not say image_size, classifier_depth; .*or preset= one of 64x64_classifier"),
        ({**given, "classifier_depth": 2}, "classifier_depth must be one less than a divisor of the weights' 4"),
        ({**given, "classifier_depth": 3}, "1 levels of 16×16 pictures must leave 256 positions, got weights for 64"),
        ({**given, "image_size": 32}, "2 levels of 32×32 pictures must leave 256 positions, got weights for 64"),
        ({**given, "num_head_channels": 24}, "head_channels must divide"),
        ({**given, "classifier_scale": 1.0}, "classifier_scale is no flag"),
        ({"preset": "64x64_diffusion"}, "preset must be one of 64x64_classifier"),
    ]:
        with pytest.raises(CheckpointError, match=message) as error:
            load_classifier(tmp_path / "c.pt", **flags)
        assert "\n" not in str(error.value) and "c.pt" in str(error.value)
    with pytest.raises(CheckpointError, match="No such file"):
        load_classifier(tmp_path / "none.pt", **given)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="must be a PyTorch or safetensors file"):
        load_classifier(tmp_path / "text.pt", **given)
    for change, message in [
        ({"out.2.c_proj.weight": None}, "classifier_pool must be attention or adaptive"),
        ({"mid": torch.zeros(1)}, "weights do not fit: mid is left over"),
        ({"out.2.qkv_proj.bias": None}, r"out\.2\.qkv_proj\.bias is missing"),
        ({"out.0.weight": torch.full((64,), torch.nan)}, "NaN or infinity"),
        ({"time_embed.0.weight": None}, "must hold time_embed.0.weight and input_blocks.0.0.weight, got neither"),
    ]:
        broken = {**state, **change}
        torch.save({name: value for name, value in broken.items() if value is not None}, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match=message):
            load_classifier(tmp_path / "b.pt", **given)
    torch.save(foreign_state("openai", foreign_network("openai")), tmp_path / "unet.pt")
    with pytest.raises(CheckpointError, match="got a U-Net; give it to fastddpm.load_checkpoint"):
        load_classifier(tmp_path / "unet.pt", **given)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_tensor_may_be_missing_or_odd(tmp_path, name):
    """Each in turn: a classifier of another kind is a classifier, all else is one clear line."""
    state, _ = fixture(name, tmp_path / "c.pt")
    odd = {"none": None, "a number": torch.tensor(1.0), "empty": torch.zeros(0, 3), "whole": torch.ones(2).int()}
    for i, key in enumerate(state):
        value = list(odd.values())[i % len(odd)]
        broken = {name: tensor for name, tensor in {**state, key: value}.items() if tensor is not None}
        torch.save(broken, tmp_path / "b.pt")
        try:
            load_classifier(tmp_path / "b.pt", **CLASSIFIERS[name])
        except CheckpointError as error:
            assert "b.pt" in str(error) and "\n" not in str(error)
        else:
            pytest.fail(f"{key} does not count")


def test_a_classifier_says_what_it_knows(tmp_path):
    _, arrays = fixture("adaptive", tmp_path / "c.pt")
    classifier = load_classifier(tmp_path / "c.pt", **CLASSIFIERS["adaptive"])
    x, t, gradient = arrays["x"], arrays["t"], classifier.cond_fn()
    with pytest.raises(ValueError, match="y must be classes in 0 … 4, got None"):
        gradient(x, t, None)
    with pytest.raises(ValueError, match=r"y must be classes in 0 … 4, got \[1, 5\]"):
        gradient(x, t, torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, 8, 8\], got \(2, 3, 4, 4\)"):
        gradient(x[..., :4, :4], t, torch.tensor([1, 2]))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_flags(preset):
    size = int(preset.partition("x")[0])
    assert PRESETS[preset] == {"image_size": size, "classifier_depth": 4 if size == 64 else 2}


# ------------------------------------------------------------------ upsamplers


@torch.no_grad()
def test_an_upsamplers_output_is_theirs(tmp_path):
    _, arrays = fixture("super_res", tmp_path / "s.pt")
    checkpoint = load_checkpoint(tmp_path / "s.pt", **SUPER_RES)
    spec = checkpoint.spec
    assert (spec.shape, spec.condition_channels, spec.condition_scale) == ((3, 16, 16), 3, 4)
    assert spec.learned_variance and spec.num_classes == 3
    small = ((arrays["low_res"] + 1) * 127.5).round().to(torch.uint8)
    enlarged = low_res(small, (3, 16, 16))
    out = checkpoint.network(torch.cat((arrays["x"], enlarged), 1), arrays["t"], arrays["y"])
    torch.testing.assert_close(out, arrays["out"], rtol=1e-4, atol=1e-4)


def test_an_upsampler_takes_small_pictures(tmp_path):
    _, arrays = fixture("super_res", tmp_path / "s.pt")
    sampler = Sampler.from_pretrained(tmp_path / "s.pt", device="cpu", **SUPER_RES)
    small = ((arrays["low_res"] + 1) * 127.5).round().to(torch.uint8)
    asked = {"steps": 2, "class_labels": [1, 2], "output": "raw"}
    by_itself = sampler.sample(2, condition=small, **asked)
    assert torch.equal(by_itself, sampler.sample(2, condition=low_res(small, (3, 16, 16)), **asked))
    with pytest.raises(ValueError, match="condition must be 16×16 pixels, got 5×4"):
        sampler.sample(2, condition=torch.zeros(2, 3, 4, 5, dtype=torch.uint8), **asked)


def test_an_upsamplers_flags(tmp_path):
    state, _ = fixture("super_res", tmp_path / "s.pt")
    for change, message in [
        ({"small_size": None}, "does not say small_size"),
        ({"large_size": None}, "does not say large_size"),
        ({"small_size": 5}, "small_size must be a part of large_size, 16, got 5"),
        (
            {"large_size": None, "small_size": None, "image_size": 16},
            "give large_size and small_size if it is the form",
        ),
        ({"learn_sigma": False}, "learn_sigma must be True, as its weights have it"),
    ]:
        flags = {name: value for name, value in {**SUPER_RES, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "s.pt", **flags)
    fixed = {**state, "out.2.weight": state["out.2.weight"][:3], "out.2.bias": state["out.2.bias"][:3]}
    torch.save(fixed, tmp_path / "fixed.pt")
    spec = load_checkpoint(tmp_path / "fixed.pt", **SUPER_RES, sigma_small=True).spec
    assert (spec.shape[0], spec.condition_channels, spec.variance) == (3, 3, "fixed_small")
    with pytest.raises(CheckpointError, match="does not say large_size, small_size"):
        load_checkpoint(tmp_path / "fixed.pt", **FLAGS["openai"])


@pytest.mark.parametrize("preset", [name for name in NETWORKS if "upsampl" in name])
def test_upsamplers_presets_leave_nothing_open(tmp_path, preset):
    network = foreign_network(
        "openai", in_channels=6, out_channels=6, channels=(64,), attention=(False,), num_classes=2
    )
    torch.save(foreign_state("openai", network), tmp_path / "m.pt")
    spec = load_checkpoint(tmp_path / "m.pt", preset=preset).spec
    large = NETWORKS[preset]["large_size"]
    assert (spec.shape, spec.condition_channels, spec.condition_scale) == ((3, large, large), 3, 4)
