"""Guidance for networks of other projects: the flag null_class, and guided loops that are written out by hand."""

import json
import math

import pytest
import torch

from fastddpm import CheckpointError, Sampler, load_checkpoint
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.tiny import save_checkpoint

OPENAI = {"use_new_attention_order": False, "class_cond": True}


def openai_file(path, *, classes=5, **structure):
    network = foreign_network("openai", num_classes=classes, **structure)
    torch.save(foreign_state("openai", network), path)
    return network


def diffusers_folder(path, **structure):
    network = foreign_network("diffusers", **structure)
    path.mkdir()
    torch.save(foreign_state("diffusers", network), path / "diffusion_pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(diffusers_config(network.config)))
    (path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    return path


def noise(steps, n=2, side=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, side, side, generator=generator), torch.randn(steps, n, 3, side, side, generator=generator)


# ------------------------------------------------------------------ which label


@pytest.mark.parametrize(("null", "classes"), [(4, 4), (0, 5), (2, 5)])
def test_the_last_row_is_no_class_of_its_own_and_others_keep_their_numbers(tmp_path, null, classes):
    openai_file(tmp_path / "model.pt")
    flags = {**FLAGS["openai"], **OPENAI, "null_class": null}
    spec = load_checkpoint(tmp_path / "model.pt", **flags).spec
    assert (spec.num_classes, spec.null_class) == (classes, null)
    spec = load_checkpoint(diffusers_folder(tmp_path / "theirs", num_classes=5), null_class=null).spec
    assert (spec.num_classes, spec.null_class) == (classes, null)


def test_without_the_flag_all_rows_are_classes(tmp_path):
    spec = load_checkpoint(diffusers_folder(tmp_path / "theirs", num_classes=5)).spec
    assert (spec.num_classes, spec.null_class) == (5, None)


@pytest.mark.parametrize(
    ("classes", "null", "message"),
    [
        (5, 5, r"null_class must be one of the network's labels, 0 … 4, got 5"),
        (5, -1, "null_class must be an integer of at least 0, got -1"),
        (5, "4", "null_class must be an integer of at least 0, got '4'"),
        (5, True, "null_class must be an integer of at least 0, got True"),
        (1, 0, "null_class must be left out: a network needs at least 2 labels for one, and this has 1"),
        (None, 0, "null_class must be left out: .* this has none"),
    ],
)
def test_labels_that_cannot_be(tmp_path, classes, null, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(diffusers_folder(tmp_path / "theirs", num_classes=classes), null_class=null)
    network = foreign_network("openai", num_classes=classes)
    torch.save(foreign_state("openai", network), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pt", **FLAGS["openai"], use_new_attention_order=False, null_class=null)


def test_dialects_without_classes_have_no_such_flag(tmp_path):
    torch.save(foreign_state("pesser", foreign_network("pesser")), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="there is no flag null_class"):
        load_checkpoint(tmp_path / "model.pt", **FLAGS["pesser"], null_class=0)


def test_an_own_checkpoint_keeps_its_null_class(tmp_path):
    folder = save_checkpoint(tmp_path / "own")
    assert load_checkpoint(folder, null_class=3).spec == load_checkpoint(folder).spec
    with pytest.raises(CheckpointError, match="null_class must be 3, as its weights have it, got 1"):
        load_checkpoint(folder, null_class=1)


# ------------------------------------------------------------------ who asks for it without


def test_guidance_without_a_null_class_names_the_flag(tmp_path):
    sampler = Sampler.from_pretrained(diffusers_folder(tmp_path / "theirs", num_classes=5), device="cpu")
    with pytest.raises(ValueError, match=r"guidance_scale must be 1.*load it with null_class=N"):
        sampler.sample(1, class_labels=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"class_labels must be given \(0 … 4\).*null_class=N"):
        sampler.sample(1)
    with pytest.raises(ValueError, match="class_labels must be in 0 … 4, got 5"):
        sampler.sample(1, class_labels=5)
    plain = Sampler.from_pretrained(diffusers_folder(tmp_path / "plain"), device="cpu")
    with pytest.raises(
        ValueError, match="guidance_scale must be 1 for this request, got 3: the network has no classes"
    ):
        plain.sample(1, guidance_scale=3.0)


def test_no_label_at_all_is_the_null_class(tmp_path):
    sampler = Sampler.from_pretrained(diffusers_folder(tmp_path / "theirs", num_classes=5), device="cpu", null_class=2)
    kept = {"steps": 3, "output": "raw", "progress": False}
    assert torch.equal(sampler.sample(2, **kept), sampler.sample(2, class_labels=2, **kept))
    assert not torch.equal(sampler.sample(2, **kept), sampler.sample(2, class_labels=1, **kept))


# ------------------------------------------------------------------ loops by hand


@pytest.mark.parametrize("learned", [False, True], ids=["fixed variance", "learned range"])
@torch.no_grad()
def test_a_guided_run_of_openais_process(tmp_path, learned):
    """Ho et al., eq. 6–7, Nichol & Dhariwal, eq. 15, with ε_∅ + w (ε_y − ε_∅); the variance is the conditional one."""
    channels = 6 if learned else 3
    network = openai_file(tmp_path / "model.pt", out_channels=channels)
    flags = {**FLAGS["openai"], **OPENAI, "null_class": 4, "rescale_timesteps": True}
    sampler = Sampler.from_pretrained(tmp_path / "model.pt", device="cpu", **flags)
    steps, y, w = 6, torch.tensor([1, 3]), 2.5
    x, z = noise(steps)
    x_T = x.clone()
    T, timesteps = 100, [99, 79, 60, 40, 20, 0]
    alpha_bar = torch.linspace(1e-3, 0.2, T, dtype=torch.float64).neg().add(1).cumprod(0)
    for i, t in enumerate(timesteps):
        fed = torch.full((2,), t * 1000.0 / T)
        out_c, out_u = network(x, fed, y), network(x, fed, torch.full_like(y, 4))
        eps = out_u[:, :3] + w * (out_c[:, :3] - out_u[:, :3])
        a = float(alpha_bar[t])
        before = float(alpha_bar[timesteps[i + 1]]) if i + 1 < steps else 1.0
        beta = 1 - a / before
        tilde = (1 - before) / (1 - a) * beta
        x_start = ((x - math.sqrt(1 - a) * eps) / math.sqrt(a)).clamp(-1, 1)
        mean = math.sqrt(before) * beta / (1 - a) * x_start + math.sqrt(a / before) * (1 - before) / (1 - a) * x
        if i + 1 == steps:
            x = mean
        elif learned:
            f = (out_c[:, 3:] + 1) / 2
            x = mean + torch.exp(0.5 * (f * math.log(beta) + (1 - f) * math.log(tilde))) * z[i]
        else:
            x = mean + math.sqrt(beta) * z[i]
    ours = sampler.sample(
        2, solver="ddpm", timesteps=timesteps, class_labels=y, guidance_scale=w, x_T=x_T, noise=z, output="raw",
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)
    plain = sampler.sample(2, solver="ddpm", timesteps=timesteps, class_labels=y, x_T=x_T, noise=z, output="raw",
                           progress=False)  # fmt: skip
    assert float((plain - ours).abs().max()) > 0.01


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("diffusers")


def pipeline_folder(library, path, learned, scheduler):
    torch.manual_seed(2)
    unet = library.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=6 if learned else 3, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=11,
    )  # fmt: skip
    unet.eval().save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(
        json.dumps({"_class_name": "ClassPipeline", "unet": ["diffusers", "UNet2DModel"],
                    "scheduler": ["diffusers", type(scheduler).__name__]})
    )  # fmt: skip
    return unet


@pytest.mark.parametrize(("solver", "learned"), [("ddpm", False), ("ddpm", True), ("ddim", False)])
@torch.no_grad()
def test_a_guided_run_of_diffusers(library, tmp_path, monkeypatch, solver, learned):
    variance = "learned_range" if learned else "fixed_large"
    classes = {"ddpm": library.DDPMScheduler, "ddim": library.DDIMScheduler}
    options = {"variance_type": variance} if solver == "ddpm" else {}
    scheduler = classes[solver](num_train_timesteps=100, **options)
    unet = pipeline_folder(library, tmp_path / "pipe", learned, scheduler)
    sampler = Sampler.from_pretrained(tmp_path / "pipe", device="cpu", null_class=10)
    assert sampler.spec.num_classes == 10
    steps, y, w = 5, torch.tensor([0, 9]), 3.0
    x, z = noise(steps)
    x_T, drawn = x.clone(), iter(z)
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *arguments, **options: next(drawn))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out_c = unet(x, t, class_labels=y).sample
        out_u = unet(x, t, class_labels=torch.full_like(y, 10)).sample
        eps = out_u[:, :3] + w * (out_c[:, :3] - out_u[:, :3])
        x = scheduler.step(torch.cat((eps, out_c[:, 3:]), dim=1), t, x).prev_sample
    ours = sampler.sample(
        2, solver=solver, steps=steps, class_labels=y, guidance_scale=w, x_T=x_T, noise=z, output="raw", progress=False
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)
