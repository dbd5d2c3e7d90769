"""U-Nets of denoising-diffusion-pytorch 1.x: what its own code of those versions returned."""

import importlib.util
import re
import zlib

import pytest
import torch

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.bench.lucidrains_package import package_module
from fastddpm.checkpoints.convert import convert_checkpoint

pytest.importorskip("einops")
if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
    pytest.skip("denoising-diffusion-pytorch is not installed", allow_module_level=True)

# Unet(dim=8, dim_mults=(1, 2), channels=1) of each version with `values` for weights, at linspace(−1, 1, 16) and t = 7;
# from 1.8 on with full_attn=(False, True). Of each pair of neighbours the later one computes something else.
OUTPUTS = {
    "1.0.0": "1.59214 0.15306 -0.87206 -0.33971 -0.06231 -0.34684 0.75801 -0.54111 "
             "-0.53204 0.14059 0.30965 -0.31725 0.75404 -0.36158 -0.31902 0.21597",
    "1.7.0": "1.70214 0.13779 -0.99168 -0.58235 -0.073 -0.97425 0.33768 -0.81931 "
             "-0.76143 -0.42096 0.03128 -0.60793 0.61723 -0.3078 -0.21153 -0.00666",
    "1.7.1": "1.70211 0.13774 -0.99167 -0.58233 -0.07307 -0.97429 0.33771 -0.81931 "
             "-0.76145 -0.42091 0.03128 -0.60796 0.61722 -0.30778 -0.21154 -0.00668",
    "1.7.2": "1.91646 0.42005 -0.95098 -0.19167 0.2519 -0.91364 -0.07612 -0.64808 "
             "-0.5186 -0.72573 -0.05171 -0.49365 0.85404 -0.4621 -0.08906 0.19181",
    "1.7.4": "0.9002 -0.81153 -1.77719 -0.71395 0.57485 -0.86341 0.09169 -1.0236 "
             "0.28767 -0.27757 -0.12206 -0.62959 0.90969 -0.62164 -0.13803 0.16019",
    "1.8.0": "0.21776 0.36903 -0.59903 -0.0471 0.07458 0.45153 1.48265 0.19219 "
             "-0.62624 -0.31961 -0.08669 0.09931 0.93166 -0.06178 -0.86716 0.72936",
    "1.11.1": "0.60216 0.62217 -0.70634 -0.05926 -0.23765 -0.09427 1.09063 0.15784 "
              "-0.34702 0.02924 -0.16192 0.17172 1.17521 -0.18899 -1.01394 0.56719",
}  # fmt: skip
EXPECTED = {version: torch.tensor([float(number) for number in text.split()]) for version, text in OUTPUTS.items()}
FLAGS = {"image_size": 4, "timesteps": 50, "beta_schedule": "linear", "objective": "pred_noise"}


def numbers(version):
    return tuple(map(int, version.split(".")))


def values(name, shape):
    """A tensor that depends on its name alone."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith((".g", "norm.weight")):
        return 1 + 0.1 * noise
    if name.endswith("mem_kv"):
        return noise
    return noise / noise[0].numel() ** 0.5 if len(shape) > 1 else 0.1 * noise


def old_state(version):
    """The state dict of that version's U-Net: today's names turned into those of its time."""
    module = package_module("denoising_diffusion_pytorch")
    since_1_8 = numbers(version) >= (1, 8, 0)
    unet = module.Unet(8, dim_mults=(1, 2), channels=1, full_attn=(False, since_1_8))
    shapes = {}
    for name, value in unet.state_dict().items():
        shape = tuple(value.shape)
        if re.search(r"block[12]\.norm\.g$", name):
            shapes |= {name[:-1] + kind: (shape[1],) for kind in ("weight", "bias")}
        elif name.endswith("mem_kv"):
            shapes |= {name: shape} if numbers(version) >= (1, 9, 0) else {}
        elif since_1_8:
            shapes[name] = shape
        else:
            shapes[re.sub(r"((?:downs|ups)\.\d\.2|mid_attn)\.(norm|to_)", _wrapped, name)] = shape
    return {name: values(name, shape) for name, shape in shapes.items()}


def _wrapped(found):
    return f"{found[1]}.fn.{'norm' if found[2] == 'norm' else 'fn.to_'}"


def load(tmp_path, of, state=None, said=True, **flags):
    states = {"step": 7, "model": old_state(of) if state is None else state}
    torch.save(states | ({"version": of} if said else {}), tmp_path / "model-7.pt")
    return load_checkpoint(tmp_path / "model-7.pt", **{**FLAGS, **flags})


@torch.no_grad()
def output(checkpoint):
    return checkpoint.network(torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), torch.tensor([7])).flatten()


@pytest.mark.parametrize("version", OUTPUTS)
def test_each_version_says_what_it_said(tmp_path, version):
    checkpoint = load(tmp_path, version)
    torch.testing.assert_close(output(checkpoint), EXPECTED[version], rtol=0.0, atol=1e-5)
    assert checkpoint.training["package"] == f"denoising-diffusion-pytorch {version}"
    assert checkpoint.spec.clipped_eps == ("raw" if numbers(version) < (1, 4, 2) else "rederive")
    copy = load_checkpoint(convert_checkpoint(tmp_path / "model-7.pt", tmp_path / "own", FLAGS) and tmp_path / "own")
    assert torch.equal(output(copy), output(checkpoint))


def test_a_version_that_the_file_does_not_say_is_asked_for_where_it_matters(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not say version \(of denoising-diffusion-pytorch"):
        load(tmp_path, "1.7.0", said=False)
    ours = load(tmp_path, "1.7.0", said=False, version="1.7.0")
    torch.testing.assert_close(output(ours), EXPECTED["1.7.0"], rtol=0.0, atol=1e-5)
    ours = load(tmp_path, "1.7.0", said=False, version="1.7.4")
    assert not torch.allclose(output(ours), EXPECTED["1.7.0"], atol=0.1)
    ours = load(tmp_path, "1.11.1", said=False)
    torch.testing.assert_close(output(ours), EXPECTED["1.11.1"], rtol=0.0, atol=1e-5)


def test_heads_that_do_not_show_are_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not say attn_heads \(or attn_dim_head\)"):
        load(tmp_path, "1.8.0", said=False)
    for flags in ({"attn_heads": 4}, {"attn_dim_head": 32}):
        ours = load(tmp_path, "1.8.0", said=False, **flags)
        torch.testing.assert_close(output(ours), EXPECTED["1.8.0"], rtol=0.0, atol=1e-5)
    assert not torch.allclose(output(load(tmp_path, "1.8.0", said=False, attn_heads=8)), EXPECTED["1.8.0"], atol=1e-2)
    with pytest.raises(CheckpointError, match="attn_heads must be a divisor of 128"):
        load(tmp_path, "1.8.0", said=False, attn_heads=3)


def test_groups_do_not_show(tmp_path):
    assert load(tmp_path, "1.11.1").settings["resnet_block_groups"] == (8, "default")
    assert not torch.allclose(output(load(tmp_path, "1.11.1", resnet_block_groups=4)), EXPECTED["1.11.1"], atol=1e-2)
    with pytest.raises(CheckpointError, match="resnet_block_groups must be a divisor of 8, got 3"):
        load(tmp_path, "1.11.1", resnet_block_groups=3)


@pytest.mark.parametrize(
    ("of", "said", "message"),
    [
        ("1.7.0", "0.27.0", "version must be 0.32.0 or later, got 0.27.0"),
        ("1.7.0", "latest", "version must be 0.32.0 or later, got latest"),
        ("1.7.0", "1.9.0", "that of the module guided_diffusion"),
        ("1.11.1", "1.7.0", "version must be one that has such names and norms, got 1.7.0"),
        ("1.11.1", "2.0.0", "version must be one that has such names and norms, got 2.0.0"),
    ],
)
def test_a_version_that_cannot_be(tmp_path, of, said, message):
    state = old_state(of)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, of, state, said=False, version=said)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, said, state)


def test_ddim_of_before_1_0_draws_noise(tmp_path):
    for version, eta in (("0.32.0", 1.0), ("1.0.0", 0.0)):
        spec = load(tmp_path, "1.0.0", said=False, version=version).spec
        assert (spec.ddim_eta, spec.clipped_eps) == (eta, "raw")


def test_old_prefixes(tmp_path):
    """In 0.x the network was `denoise_fn`, and the averaged diffusion had no name within "ema"."""
    state = {f"denoise_fn.{name}": value for name, value in old_state("1.0.0").items()}
    raw = {**state, "denoise_fn.final_conv.bias": state["denoise_fn.final_conv.bias"] + 1}
    torch.save({"step": 3, "model": raw, "ema": state}, tmp_path / "m.pt")
    for model, shift in (({}, 0), ({"model": "ema_model"}, 0), ({"model": "online_model"}, 1)):
        ours = load_checkpoint(tmp_path / "m.pt", version="1.0.0", **model, **FLAGS)
        torch.testing.assert_close(output(ours), EXPECTED["1.0.0"] + shift, rtol=0.0, atol=1e-5)


def test_samples_do_not_depend_on_the_engines_batch(tmp_path):
    load(tmp_path, "1.7.0")
    sampler = Sampler.from_pretrained(tmp_path / "model-7.pt", device="cpu", **FLAGS)
    together = sampler.sample(2, steps=3, progress=False)
    assert together.shape == (2, 1, 4, 4)
    torch.testing.assert_close(
        sampler.sample(1, sample_ids=[1], steps=3, progress=False), together[1:], atol=1e-5, rtol=0
    )
