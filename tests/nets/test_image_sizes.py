"""Pictures that are not square, odd, or of another size than the network was trained on, in every dialect."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.bench.lucidrains_package import package_module
from fastddpm.checkpoints import convert
from fastddpm.nets.unet import UNet
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.tiny import save_checkpoint, unconditional

LUCIDRAINS = {"timesteps": 50, "beta_schedule": "linear", "objective": "pred_v"}
DIALECTS = [*FLAGS, "diffusers", "fastddpm", "lucidrains"]
OWN_NAMES = {"openai": "image_size", "pesser": "resolution", "w86763777": "img_size", "lucidrains": "image_size"}
SIZES = [(8, 16), (16, 6), (2, 10)]
PAIRS = [(dialect, SIZES[(i + j) % 3]) for i, dialect in enumerate(DIALECTS) for j in range(2)]
"""Each dialect with two sizes, each size with four dialects."""


def without_size(dialect):
    flags = {"lucidrains": LUCIDRAINS}.get(dialect, FLAGS.get(dialect, {}))
    return {name: value for name, value in flags.items() if name != OWN_NAMES.get(dialect)}


def save(folder, dialect, **structure):
    """A small network that was trained at 8 × 8, and the path of its checkpoint."""
    if dialect == "lucidrains":
        pytest.importorskip("einops")
        if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
            pytest.skip("denoising-diffusion-pytorch is not installed")
        torch.manual_seed(0)
        mults = (1, 2) if len(structure.get("channels", (1, 1))) > 1 else (1,)
        unet = package_module("denoising_diffusion_pytorch").Unet(8, dim_mults=mults, attn_heads=1, attn_dim_head=4)
        torch.save(unet.state_dict(), folder / "model.pt")
        return unet.eval(), folder / "model.pt"
    if dialect == "fastddpm":
        unet, spec = unconditional()
        unet = dataclasses.replace(unet, **structure)
        path = save_checkpoint(folder, unet, spec)
        return load_checkpoint(path).network, path
    network = foreign_network(dialect, **structure)
    state = foreign_state(dialect, network)
    if dialect != "diffusers":
        torch.save(state, folder / "model.pt")
        return network, folder / "model.pt"
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(diffusers_config(network.config)))
    (folder / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler", "num_train_timesteps": 50}')
    return network, folder


@torch.no_grad()
def check(sampler, network, size):
    """The checkpoint's shape, its network's output, and that samples are those of batches of one."""
    channels = sampler.spec.shape[0]
    assert sampler.spec.shape == (channels, *size)
    x, t = torch.randn(2, *sampler.spec.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 40])
    torch.testing.assert_close(sampler.network(x, t), network(x, t), rtol=1e-5, atol=1e-5)
    pictures = sampler.sample(2, steps=2, batch_size=1, progress=False)
    assert pictures.shape == (2, *sampler.spec.shape) and bool(pictures.isfinite().all())


@pytest.mark.parametrize(("dialect", "size"), PAIRS, ids=[f"{dialect}-{size[0]}x{size[1]}" for dialect, size in PAIRS])
def test_any_size_that_the_network_can_halve(tmp_path, dialect, size):
    network, path = save(tmp_path, dialect)
    height, width = size
    sampler = Sampler.from_pretrained(path, device="cpu", **without_size(dialect), image_size=size)
    check(sampler, network, size)
    for same in (f"{height},{width}", f" {height} , {width}", list(size)):
        again = load_checkpoint(path, **without_size(dialect), image_size=same)
        assert again.spec == sampler.spec
    convert.convert_checkpoint(path, tmp_path / "copy", {**without_size(dialect), "image_size": size})
    assert load_checkpoint(tmp_path / "copy").spec.shape == sampler.spec.shape


@pytest.mark.parametrize("size", [(7, 9), (1, 27), (3, 8)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_odd_sizes_of_networks_with_one_resolution(tmp_path, dialect, size):
    network, path = save(tmp_path, dialect, channels=(32,), attention=(True,))
    check(Sampler.from_pretrained(path, device="cpu", **without_size(dialect), image_size=size), network, size)


@pytest.mark.parametrize("dialect", OWN_NAMES)
def test_the_dialects_own_names(tmp_path, dialect):
    network, path = save(tmp_path, dialect)
    for size in ((8, 16), "8,16"):
        flags = {**without_size(dialect), OWN_NAMES[dialect]: size}
        check(Sampler.from_pretrained(path, device="cpu", **flags), network, (8, 16))
    flags[OWN_NAMES[dialect]] = "8"
    assert load_checkpoint(path, **flags).spec.shape[1:] == (8, 8)


@pytest.mark.parametrize(("dialect", "trained"), [("pesser", "resolution"), ("w86763777", "img_size")])
def test_the_size_of_training_beside_that_of_the_pictures(tmp_path, dialect, trained):
    _, path = save(tmp_path, dialect)
    checkpoint = load_checkpoint(path, **FLAGS[dialect], image_size=(12, 16))
    assert checkpoint.spec.shape == (3, 12, 16) and checkpoint.network.config.sample_size == (12, 16)
    assert checkpoint.settings[trained] == (8, "flag") and checkpoint.settings["image_size"] == ((12, 16), "flag")
    if dialect == "pesser":  # counted by the size of training
        assert load_checkpoint(path, **FLAGS[dialect], image_size=16, attn_resolutions=[4]).spec.shape == (3, 16, 16)


def test_attention_of_pictures_that_are_not_square_may_be_counted_by_either_side(tmp_path):
    _, path = save(tmp_path, "openai")
    for resolutions in ("4", "8"):
        assert load_checkpoint(path, **without_size("openai"), image_size=(8, 16), attention_resolutions=resolutions)
    with pytest.raises(CheckpointError, match="attention_resolutions must be"):
        load_checkpoint(path, **without_size("openai"), image_size=(8, 16), attention_resolutions="16")


def test_diffusers_sizes(tmp_path):
    _, path = save(tmp_path, "diffusers", sample_size=(8, 16))
    assert load_checkpoint(path).spec.shape == (3, 8, 16)
    assert load_checkpoint(path, sample_size=(8, 16)).spec.shape == (3, 8, 16)
    assert load_checkpoint(path, sample_size="8,16", image_size=32).spec.shape == (3, 32, 32)
    with pytest.raises(CheckpointError, match=r"sample_size must be \[8, 16\], as config.json has it \(image_size="):
        load_checkpoint(path, sample_size=16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "sample_size": None}))
    for flags in ({"sample_size": (4, 6)}, {"image_size": "4,6"}, {"sample_size": 8, "image_size": (4, 6)}):
        assert load_checkpoint(path, **flags).spec.shape == (3, 4, 6)


@pytest.mark.parametrize("size", [7, (8, 9), "8,7", 0, -8, (8, 8, 8), (), "8,", "eight", 8.0, True, (8.0, 8)], ids=repr)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_sizes_that_cannot_be(tmp_path, dialect, size):
    _, path = save(tmp_path, dialect)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **without_size(dialect), image_size=size)
    text = str(caught.value)
    wanted = "one integer or two, (height, width)" if size not in (7, (8, 9), "8,7") else "divisible by 2"
    assert f"image_size must be {wanted}" in text and repr(size) in text


def test_the_shipped_network_draws_larger_pictures(tmp_path):
    from fastddpm.cli import app

    sampler = Sampler.from_pretrained("mnist", device="cpu", image_size=(28, 56))
    assert isinstance(sampler.model, UNet) and sampler.spec.shape == (1, 28, 56)
    words = ["sample", "mnist", "-n", "1", "--steps", "1", "--npz", str(tmp_path / "out.npz")]
    app([*words, "--flag", "image_size=28,56"], standalone_mode=False)
    with np.load(tmp_path / "out.npz") as data:
        assert data[data.files[0]].shape[1:3] == (28, 56)
