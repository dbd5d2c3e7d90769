"""`fastddpm convert`: the copy is the original in every bit that matters, and appears whole or not at all."""

import dataclasses
import importlib
import json
import os
import sys

import pytest
import torch

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.checkpoints import native
from fastddpm.checkpoints.convert import convert_checkpoint
from fastddpm.cli import app, main
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.helpers import peers_dir
from tests.tiny import save_checkpoint

PEERS = ["diffusers_cifar_like", "diffusers_trained_default", "lucidrains_pred_v", "openai_guided",
         "openai_improved", "pesser_ho", "w86763777_ddpm"]  # fmt: skip


def peer(name):
    folder = peers_dir() / name
    flags = json.loads((folder / "flags.json").read_text())
    checkpoint = json.loads((folder / "meta.json").read_text())["checkpoint"]
    return (folder if name.startswith("diffusers") else folder / checkpoint), flags


def save(path, dialect, **structure):
    network = foreign_network(dialect, **structure)
    torch.save(foreign_state(dialect, network), path)
    return path


def pictures(sampler, solver):
    y = None if sampler.spec.num_classes is None else [0, 1]
    return sampler.sample(2, seed=3, solver=solver, steps=3, class_labels=y, output="raw", progress=False)


@pytest.mark.parametrize("name", PEERS)
def test_the_copy_of_a_peers_checkpoint_is_the_same_bit_for_bit(tmp_path, name):
    path, flags = peer(name)
    convert_checkpoint(path, tmp_path / "copy", flags)
    before = Sampler.from_pretrained(path, device="cpu", **flags)
    after = Sampler.from_pretrained(tmp_path / "copy", device="cpu")
    assert after.spec == before.spec
    assert after.schedule.betas.dtype == before.schedule.betas.dtype
    assert torch.equal(after.schedule.betas, before.schedule.betas)
    assert torch.equal(after.schedule.alphas_cumprod, before.schedule.alphas_cumprod)
    x = torch.randn((2, *before.spec.shape), generator=torch.Generator().manual_seed(0))
    y = None if before.spec.num_classes is None else torch.tensor([0, 1])
    assert torch.equal(after.network(x, torch.tensor([3, 99]), y), before.network(x, torch.tensor([3, 99]), y))
    for solver in ("ddpm", "ddim", "dpmpp_2m"):
        assert torch.equal(pictures(after, solver), pictures(before, solver))
    origin = after.checkpoint.training["converted_from"]
    assert (origin["dialect"], origin["name"]) == (before.checkpoint.dialect, path.name)
    assert origin["flags"] == {name: value for name, value in flags.items() if not name.startswith("_")}


SPECS = [
    ("openai", {"num_classes": 5, "out_channels": 6}, {"null_class": 4, "sigma_small": True, "predict_xstart": True}),
    ("openai", {"num_classes": 5}, {"null_class": 0, "timestep_respacing": "ddim25", "rescale_timesteps": True}),
    ("w86763777", {}, {"mean_type": "xprev", "var_type": "fixedlarge"}),
    ("pesser", {}, {"beta_schedule": "jsd", "num_diffusion_timesteps": 50}),
]


@pytest.mark.parametrize(("dialect", "structure", "flags"), SPECS)
def test_conventions_survive(tmp_path, dialect, structure, flags):
    path, flags = save(tmp_path / "model.pt", dialect, **structure), {**FLAGS[dialect], **flags}
    convert_checkpoint(path, tmp_path / "copy", flags)
    before, after = load_checkpoint(path, **flags), load_checkpoint(tmp_path / "copy")
    assert dataclasses.asdict(after.spec) == dataclasses.asdict(before.spec)
    assert torch.equal(after.schedule.betas, before.schedule.betas)
    assert after.network.config == before.network.config


def test_an_own_checkpoint_is_copied_too(tmp_path):
    source = save_checkpoint(tmp_path / "own", training={"data": "made up"})
    convert_checkpoint(source, tmp_path / "copy")
    after = load_checkpoint(tmp_path / "copy")
    assert after.training["data"] == "made up"
    assert torch.equal(after.network.stem.weight, load_checkpoint(source).network.stem.weight)


@pytest.mark.parametrize("name", ["link", "x" * 250], ids=["a link to a folder", "a long name"])
def test_destinations_that_need_care(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_checkpoint(save_checkpoint(tmp_path / "own"), tmp_path / name, {})
    assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
    assert (tmp_path / "link").is_symlink() and not [left for left in os.listdir(tmp_path) if left.startswith(".")]


def test_half_precision_is_half_as_large(tmp_path):
    source = save(tmp_path / "model.pt", "pesser")
    sizes = {}
    for dtype in ("fp32", "fp16"):
        convert_checkpoint(source, tmp_path / dtype, FLAGS["pesser"], dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    full, half = (load_checkpoint(tmp_path / dtype).network.state_dict() for dtype in ("fp32", "fp16"))
    assert all(torch.equal(value.half().float(), half[name]) for name, value in full.items())


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    network = foreign_network("pesser")
    state = foreign_state("pesser", network)
    state["conv_in.bias"] = state["conv_in.bias"] + 1e6
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"stem.bias must lie within ±65504 for fp16, got 1\.?e?\+?\d+.*use fp32"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "copy", FLAGS["pesser"], dtype="fp16")
    assert os.listdir(tmp_path) == ["model.pt"]


class TestDestination:
    def test_an_empty_folder_is_filled(self, tmp_path):
        (tmp_path / "copy").mkdir()
        convert_checkpoint(save_checkpoint(tmp_path / "own"), tmp_path / "copy")
        assert sorted(os.listdir(tmp_path / "copy")) == ["config.json", "model.safetensors"]

    def test_missing_parents_are_made_and_nothing_else_is_left(self, tmp_path):
        convert_checkpoint(save_checkpoint(tmp_path / "own"), tmp_path / "a" / "b")
        assert os.listdir(tmp_path / "a") == ["b"]

    def test_what_is_there_is_kept_unless_forced(self, tmp_path):
        source = save_checkpoint(tmp_path / "own")
        target = save_checkpoint(tmp_path / "copy")
        (target / "notes.txt").write_text("mine")
        (target / "model.safetensors").write_bytes(b"old")
        with pytest.raises(FileExistsError, match="must be empty or new.*use --force"):
            convert_checkpoint(source, target)
        assert (target / "model.safetensors").read_bytes() == b"old"
        convert_checkpoint(source, target, force=True)
        assert load_checkpoint(target).training["converted_from"]["name"] == "own"
        assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "notes.txt"]

    def test_a_folder_of_something_else_is_kept_even_if_forced(self, tmp_path):
        source = save_checkpoint(tmp_path / "own")
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(diffusers_config(foreign_network("pesser").config)))
        with pytest.raises(FileExistsError, match="holds something else than a checkpoint of fastddpm"):
            convert_checkpoint(source, tmp_path / "theirs", force=True)
        with pytest.raises(FileExistsError, match="must not be the source itself"):
            convert_checkpoint(source, source, force=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="must be a folder, got a file"):
            convert_checkpoint(source, tmp_path / "file", force=True)

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        source = save_checkpoint(tmp_path / "own")

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(native, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            convert_checkpoint(source, tmp_path / "copy")
        assert os.listdir(tmp_path) == ["own"]

    def test_an_interrupted_replacement_is_no_checkpoint(self, tmp_path, monkeypatch):
        source, target = save_checkpoint(tmp_path / "own"), save_checkpoint(tmp_path / "copy")
        replace = os.replace

        def stop(old, new):
            if str(new) == str(target / "config.json"):
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(source, target, force=True)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load_checkpoint(target)

    def test_an_unreadable_source_writes_nothing(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not say resolution"):
            convert_checkpoint(save(tmp_path / "model.pt", "pesser"), tmp_path / "copy")
        with pytest.raises(ValueError, match="dtype must be fp32 or fp16, got 'int8'"):
            convert_checkpoint(tmp_path / "model.pt", tmp_path / "copy", FLAGS["pesser"], dtype="int8")
        assert os.listdir(tmp_path) == ["model.pt"]


class TestCommand:
    def test_convert_and_describe(self, tmp_path, capsys):
        path = save(tmp_path / "model.pt", "pesser")
        flags = [f"--flag={name}={value}" for name, value in FLAGS["pesser"].items()]
        app(["convert", str(path), str(tmp_path / "copy"), *flags], standalone_mode=False)
        assert "from pesser" in capsys.readouterr().out
        app(["info", str(tmp_path / "copy"), "--json"], standalone_mode=False)
        facts = json.loads(capsys.readouterr().out)["checkpoint"]
        assert facts["training"]["converted_from"]["dialect"] == "pesser"
        assert facts["format"] == "fastddpm"

    def test_errors_are_one_line_and_exit_code_two(self, tmp_path, capsys, monkeypatch):
        save_checkpoint(tmp_path / "own")
        monkeypatch.setattr(sys, "argv", ["fastddpm", "convert", str(tmp_path / "own"), str(tmp_path / "own")])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err.count("\n") == 1


class TestLucidrains:
    """Networks of denoising-diffusion-pytorch, which have a structure of their own."""

    @pytest.fixture
    def lucid(self):
        return importlib.import_module("tests.checkpoints.test_lucidrains")  # skips where the package is missing

    @pytest.mark.parametrize("name", ["v, sigmoid", "noise, linear, self-conditioned", "x0, cosine, min-SNR",
                                      "own sigmoid, unit range"])  # fmt: skip
    def test_any_configuration(self, lucid, tmp_path, name):
        unet, diffusion = lucid.CONFIGS[name]
        lucid.trainer_file(tmp_path / "model-1.pt", lucid.make(unet, diffusion))
        self.same(tmp_path / "model-1.pt", tmp_path / "copy", lucid.flags_of(unet, diffusion))

    def test_classes(self, lucid, tmp_path):
        diffusion = lucid.make({"num_classes": 3}, source="classifier_free_guidance")
        torch.save(diffusion.state_dict(), tmp_path / "model.pt")
        flags = {"image_size": 8, "attn_heads": 2, "objective": "pred_noise", "beta_schedule": "cosine"}
        copy = self.same(tmp_path / "model.pt", tmp_path / "copy", flags)
        assert (copy.spec.num_classes, copy.spec.null_class) == (3, 3)

    def test_betas_of_no_named_schedule(self, lucid, tmp_path):
        state = lucid.make(*lucid.CONFIGS["v, sigmoid"]).state_dict()
        beta = (state["betas"].double() * 0.9).float()
        bar = (1 - beta.double()).cumprod(0)
        before = torch.cat((torch.ones(1).double(), bar[:-1]))
        tilde = beta.double() * (1 - before) / (1 - bar)
        state |= {"betas": beta, "alphas_cumprod": bar, "alphas_cumprod_prev": before,
                  "sqrt_alphas_cumprod": bar.sqrt(),
                  "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(), "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
                  "log_one_minus_alphas_cumprod": (1 - bar).log(), "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
                  "posterior_variance": tilde, "posterior_log_variance_clipped": tilde.clamp(min=1e-20).log(),
                  "posterior_mean_coef1": beta * before.sqrt() / (1 - bar),
                  "posterior_mean_coef2": (1 - before) * (1 - beta.double()).sqrt() / (1 - bar),
                  "loss_weight": bar / (1 - bar) / (bar / (1 - bar) + 1)}  # fmt: skip
        torch.save({name: value.float() for name, value in state.items()}, tmp_path / "model.pt")
        copy = self.same(tmp_path / "model.pt", tmp_path / "copy", {"image_size": 8, "objective": "pred_v"})
        assert "betas" in json.loads((copy.path / "config.json").read_text())["schedule"]

    @staticmethod
    def same(path, target, flags):
        """Convert, and compare networks, schedules and pictures bit for bit; returns the copy."""
        convert_checkpoint(path, target, flags)
        before = Sampler.from_pretrained(path, device="cpu", **flags)
        after = Sampler.from_pretrained(target, device="cpu")
        assert after.spec == before.spec
        for name in ("betas", "alphas_cumprod", "posterior_variance"):
            ours, theirs = getattr(after.schedule, name), getattr(before.schedule, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert torch.equal(after.schedule.alphas_cumprod_exact, before.schedule.alphas_cumprod_exact)
        for solver in ("ddpm", "ddim", "dpmpp_2m"):
            assert torch.equal(pictures(after, solver), pictures(before, solver))
        return after.checkpoint

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"nonsense": 1}, "must hold nothing but dim, .*, got nonsense"),
            ({"dim": "x"}, r"dim must be an integer in \[1, 65536\], got 'x'"),
            ({"dim": 7}, "dim must be an even number of at least 4, got 7"),
            ({"dim_mults": [1, 2, 2]}, r"full_attn must be a list of 3, got \(False, True\)"),
            ({"attn_heads": [1, 1]}, "attn_heads must be a list of 3"),
            ({"groups": 3}, r"groups must be a divisor of all widths \(8, 8, 16\), got 3"),
            ({"memory": 1}, "memory must be true or false, got 1"),
            ({"sinusoidal_pos_emb_theta": 1}, r"sinusoidal_pos_emb_theta must be a number in \(1, 1e\+30\], got 1"),
            ({"channels": 1}, "lucidrains and spec must agree, got 1→1 channels"),
            ({"learned_variance": True}, "lucidrains and spec must agree, got 3→6 channels"),
            ({"num_classes": 3}, "lucidrains and spec must agree, got 3→3 channels, 3 classes"),
            ({"self_condition": True}, "lucidrains and spec must agree, .* and self_condition True but"),
            ({"dim": 16}, "weights do not fit: "),
        ],
    )
    def test_damaged_entries(self, lucid, tmp_path, change, message):
        unet, diffusion = lucid.CONFIGS["v, sigmoid"]
        lucid.trainer_file(tmp_path / "model-1.pt", lucid.make(unet, diffusion))
        convert_checkpoint(tmp_path / "model-1.pt", tmp_path / "copy", lucid.flags_of(unet, diffusion))
        config = json.loads((tmp_path / "copy" / "config.json").read_text())
        config["lucidrains"] |= change
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(tmp_path / "copy")
        assert str(caught.value).isprintable()

    def test_networks_of_the_users_own_cannot_be_written(self, tmp_path):
        checkpoint = load_checkpoint(save_checkpoint(tmp_path / "own"))
        with pytest.raises(TypeError, match="network must be a UNet, got Identity"):
            native.save(tmp_path / "copy", torch.nn.Identity(), checkpoint.schedule, checkpoint.spec)
        assert not (tmp_path / "copy").exists()
