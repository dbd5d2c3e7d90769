"""Files of other projects: every structure that their names allow, and all that can be wrong with a file or a flag."""

import dataclasses
import json
import pickle
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.checkpoints import diffusers_unet, native, openai, openai_presets, pesser, w86763777
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.helpers import peers_dir
from tests.tiny import save_checkpoint

WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
OPENAI = {"use_new_attention_order": False}
STRUCTURES = [
    ("openai", {}, {}),
    ("openai", {"attention": (True, False), "layers": 2}, {"attention_resolutions": "8", "num_res_blocks": 2}),
    ("openai", {"channels": (64, 32), "stem_channels": 64, "embedding_channels": 32}, {"channel_mult": "2,1"}),
    ("openai", {"channels": (32,), "attention": (False,), "layers": 3}, {}),
    ("openai", {"conv_resample": False}, {}),
    ("openai", {"num_classes": 7, "out_channels": 6}, {"class_cond": True, "learn_sigma": True}),
    ("openai", {"num_heads": 4, "up_num_heads": 2}, {"num_heads": 4, "num_heads_upsample": 2, **OPENAI}),
    (
        "openai",
        {"resblock_updown": True, "scale_shift": True, "head_channels": 16, "attention_order": "qkv_heads"},
        {"num_head_channels": 16, "use_new_attention_order": True, "resblock_updown": True},
    ),
    (
        "openai",
        {"resblock_updown": True, "channels": (32, 32, 32), "attention": (True, True, True), "layers": 2},
        OPENAI,
    ),
    ("openai", {"resblock_updown": True, "channels": (32, 32, 64), "attention": (False,) * 3, "layers": 3}, OPENAI),
    ("pesser", {}, {"attn_resolutions": [4]}),
    ("pesser", {"channels": (64, 32, 32), "stem_channels": 32, "attention": (True, False, True)}, {"ch": 32}),
    ("pesser", {"conv_resample": False, "attention": (False, False), "in_channels": 1, "out_channels": 1}, {}),
    ("pesser", {"channels": (32,), "attention": (True,), "layers": 3}, {"ch_mult": [1]}),
    ("w86763777", {}, {"attn": [1], "T": 1000}),
    ("w86763777", {"channels": (64, 32, 32), "stem_channels": 32, "attention": (True, False, True), "layers": 2}, {}),
    ("w86763777", {"channels": (32,), "attention": (False,), "layers": 3}, {"num_res_blocks": 3, "ch_mult": [1]}),
]


def save(path, dialect, **structure):
    network = foreign_network(dialect, **structure)
    torch.save(foreign_state(dialect, network), path)
    return network


def inputs(network):
    shape = (2, network.config.in_channels, *network.config.sample_size)
    y = None if network.config.num_classes is None else torch.tensor([0, network.config.num_classes - 1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 99]), y


@torch.no_grad()
def same(checkpoint, network):
    return torch.equal(checkpoint.network(*inputs(network)), network(*inputs(network)))


# ------------------------------------------------------------------ what is right


@pytest.mark.parametrize(("dialect", "structure", "flags"), STRUCTURES)
def test_structure_follows_from_the_weights(tmp_path, dialect, structure, flags):
    network = save(tmp_path / "model.pt", dialect, **structure)
    checkpoint = load_checkpoint(tmp_path / "model.pt", **{**FLAGS[dialect], **flags})
    assert checkpoint.dialect == dialect
    assert not checkpoint.network.training
    assert same(checkpoint, network)
    assert checkpoint.spec.learned_variance == (network.config.out_channels == 6)


@pytest.mark.parametrize("name", ["model.pt", "old.pt", "model.safetensors", "parallel.pt", "parameters.pt"])
def test_ways_of_storing(tmp_path, name):
    network = foreign_network("openai")
    state, path = foreign_state("openai", network), tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    elif name == "parallel.pt":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif name == "parameters.pt":
        torch.save({key: torch.nn.Parameter(value) for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "model.pt")
    checkpoint = load_checkpoint(path, **FLAGS["openai"])
    assert same(checkpoint, network)


def save_folder(path, network, *, scheduler=True, weights="diffusion_pytorch_model.bin", old_names=False, **changes):
    state = foreign_state("diffusers", network)
    if old_names:
        new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for today, then in new.items():
            state = {key.replace(today, then): value for key, value in state.items()}
    path.mkdir(exist_ok=True, parents=True)
    save_file(state, path / weights) if weights.endswith("safetensors") else torch.save(state, path / weights)
    (path / "config.json").write_text(json.dumps({**diffusers_config(network.config), **changes}))
    if scheduler:
        (path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", "clip_sample": False}))
    return path


@pytest.mark.parametrize("weights", WEIGHTS_NAMES)
@pytest.mark.parametrize("old_names", [False, True], ids=["names of today", "old names"])
def test_diffusers_network_beside_its_scheduler(tmp_path, weights, old_names):
    network = foreign_network("diffusers", num_classes=5, resblock_down=(True, False), resblock_up=(False, False))
    folder = save_folder(tmp_path, network, weights=weights, old_names=old_names)
    checkpoint = load_checkpoint(folder)
    assert same(checkpoint, network)
    assert (checkpoint.spec.num_classes, checkpoint.spec.clip, checkpoint.schedule.T) == (5, None, 1000)


def test_diffusers_network_alone_asks_for_the_scheduler(tmp_path):
    folder = save_folder(tmp_path / "unet", foreign_network("diffusers"), scheduler=False)
    with pytest.raises(CheckpointError, match="does not say num_train_timesteps, beta_start, beta_end, beta_schedule"):
        load_checkpoint(folder)
    options = {"num_train_timesteps": 50, "beta_start": 1e-4, "beta_end": 0.03, "beta_schedule": "linear"}
    options |= {"variance_type": "fixed_large", "clip_sample": True, "prediction_type": "sample"}
    checkpoint = load_checkpoint(folder, **options)
    assert (checkpoint.schedule.T, checkpoint.schedule.betas.dtype) == (50, torch.float32)
    assert (checkpoint.spec.variance, checkpoint.spec.prediction) == ("fixed_large", "x_start")
    (tmp_path / "other.json").write_text(json.dumps({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}))
    assert load_checkpoint(folder, scheduler=tmp_path / "other.json").spec.final_alpha_to_one is False
    with pytest.raises(CheckpointError, match=r"beta_end stand in .*other\.json"):
        load_checkpoint(folder, scheduler=tmp_path / "other.json", beta_end=0.01)


def test_omitted_head_dim_is_eight_channels_per_head_and_null_is_one_head(tmp_path):
    network = foreign_network("diffusers", head_channels=8)
    assert same(load_checkpoint(save_folder(tmp_path / "given", network)), network)
    folder = save_folder(tmp_path / "omitted", network)
    config = json.loads((folder / "config.json").read_text())
    del config["attention_head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    assert same(load_checkpoint(folder), network)
    assert not same(load_checkpoint(save_folder(tmp_path / "null", network, attention_head_dim=None)), network)


@pytest.mark.parametrize("preset", [name for name in openai.PRESETS if "image_size" in openai.PRESETS[name]])
def test_openai_presets_leave_nothing_open(tmp_path, preset):
    size = openai.PRESETS[preset]["image_size"]
    heads = {"channels": (64, 64), "attention": (False, False), "out_channels": 6}
    save(tmp_path / "model.pt", "openai", **heads)
    checkpoint = load_checkpoint(tmp_path / "model.pt", preset=preset)
    assert checkpoint.spec.shape == (3, size, size)
    assert checkpoint.schedule.T == openai.PRESETS[preset]["diffusion_steps"]


@pytest.mark.parametrize("preset", pesser.PRESETS)
def test_pesser_presets_leave_nothing_open(tmp_path, preset):
    save(tmp_path / "model.ckpt", "pesser")
    spec = load_checkpoint(tmp_path / "model.ckpt", preset=preset).spec
    assert spec.variance == ("fixed_large" if preset.endswith("cifar10") else "fixed_small")


def test_a_flag_wins_over_the_preset(tmp_path):
    save(tmp_path / "model.ckpt", "pesser")
    assert load_checkpoint(tmp_path / "model.ckpt", preset="cifar10", num_diffusion_timesteps=10).schedule.T == 10


@pytest.mark.parametrize("kind", ["quad", "warmup10", "warmup50", "const", "jsd"])
def test_pesser_schedules(tmp_path, kind):
    save(tmp_path / "model.ckpt", "pesser")
    flags = {**FLAGS["pesser"], "num_diffusion_timesteps": 100, "beta_schedule": kind}
    betas = load_checkpoint(tmp_path / "model.ckpt", **flags).schedule.betas
    expected = {
        "quad": lambda i: (0.01 + i / 99 * (0.02**0.5 - 0.01)) ** 2,
        "warmup10": lambda i: 1e-4 + i / 9 * 0.0199 if i < 10 else 0.02,
        "warmup50": lambda i: 1e-4 + i / 49 * 0.0199 if i < 50 else 0.02,
        "const": lambda i: 0.02,
        "jsd": lambda i: 1 / (100 - i),
    }[kind]
    torch.testing.assert_close(betas, torch.tensor([expected(i) for i in range(100)], dtype=torch.float64))


# ------------------------------------------------------------------ flags


@pytest.mark.parametrize("dialect", FLAGS)
def test_missing_flags_are_all_named(tmp_path, dialect):
    save(tmp_path / "model.pt", dialect)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pt")
    assert all(flag in str(caught.value) for flag in FLAGS[dialect])
    assert f"taken for {dialect}" in str(caught.value)
    for flag in FLAGS[dialect]:
        rest = {name: value for name, value in FLAGS[dialect].items() if name != flag}
        with pytest.raises(CheckpointError, match=f"does not say .*{flag}"):
            load_checkpoint(tmp_path / "model.pt", **rest)


def test_attention_order_is_asked_for_where_it_matters(tmp_path):
    save(tmp_path / "model.pt", "openai", head_channels=16)
    flags = {name: value for name, value in FLAGS["openai"].items() if name not in ("num_heads", "sigma_small")}
    with pytest.raises(CheckpointError, match="does not say use_new_attention_order"):
        load_checkpoint(tmp_path / "model.pt", num_head_channels=16, **flags)
    orders = [
        load_checkpoint(tmp_path / "model.pt", num_head_channels=16, use_new_attention_order=new, **flags).network
        for new in (False, True)
    ]
    x, t, _ = inputs(orders[0])
    assert not torch.allclose(orders[0](x, t), orders[1](x, t))


WRONG_FLAGS = [
    ("openai", {"noise_shedule": "linear"}, "no flag noise_shedule for it; did you mean noise_schedule"),
    ("openai", {"noise_schedule": "sigmoid"}, "noise_schedule must be one of linear, cosine, got 'sigmoid'"),
    ("openai", {"diffusion_steps": "100"}, "diffusion_steps must be an integer of at least 1, got '100'"),
    ("openai", {"rescale_timesteps": 1}, "rescale_timesteps must be True or False, got 1"),
    ("openai", {"num_channels": 64}, "num_channels must be 32, as its weights have it, got 64"),
    ("openai", {"channel_mult": "1,1"}, r"channel_mult must be \(1.0, 2.0\)"),
    ("openai", {"channel_mult": "1,x"}, "channel_mult must be a list of numbers"),
    ("openai", {"class_cond": True}, "class_cond must be False"),
    ("openai", {"attention_resolutions": "8"}, r"attention_resolutions must be \[4.0\]"),
    ("openai", {"num_heads": 5, **OPENAI}, "num_heads must divide the width"),
    ("openai", {"num_head_channels": 0}, "num_head_channels must be −1 or at least 1"),
    ("openai", {"timestep_respacing": "ddim33"}, "respace: spec must name a count"),
    ("openai", {"preset": "imagenet"}, "preset must be one of imagenet64_uncond_100M_1500K"),
    ("openai", {"image_size": 9}, "image_size must be divisible by 2 .the network has 2 resolutions., got 9"),
    ("pesser", {"model_var_type": "learned"}, "model_var_type must be one of fixedlarge, fixedsmall"),
    ("pesser", {"beta_start": float("nan")}, "beta_start must be a finite number"),
    ("pesser", {"beta_end": 2.0}, r"must be in \(0, 1\)"),
    ("pesser", {"num_heads": 1}, "there is no flag num_heads"),
    ("w86763777", {"mean_type": "x"}, "mean_type must be one of epsilon, xstart, xprev, got 'x'"),
    ("w86763777", {"T": 999}, "T must be 1000, as its weights have it, got 999"),
    ("w86763777", {"model": "net_model"}, "model must be a network of the file .one without a name., got 'net_model'"),
]


@pytest.mark.parametrize(
    ("written", "plain"),
    [("timestep_respacing=15", {"timestep_respacing": "15"}),
     ("timestep_respacing=10,15", {"timestep_respacing": "10,15"}),
     ("timestep_respacing=ddim25", {"timestep_respacing": "ddim25"}), ("attention_resolutions=4", {}),
     ("attention_resolutions=4,2", {}), ("channel_mult=1,2", {}), ("learn_sigma=false", {}), ("class_cond=no", {}),
     ("rescale_timesteps=yes", {"rescale_timesteps": True}), ("predict_xstart=T", {"predict_xstart": True})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_openais_own_spelling_on_the_command_line(tmp_path, written, plain):
    from fastddpm.cli.flags import parse_flags

    save(tmp_path / "model.pt", "openai")
    flags = {**FLAGS["openai"], **parse_flags([written])}
    assert load_checkpoint(tmp_path / "model.pt", **flags).spec == (
        load_checkpoint(tmp_path / "model.pt", **{**FLAGS["openai"], **plain}).spec
    )


def test_a_list_of_one_number_is_written_as_the_number(tmp_path):
    save(tmp_path / "model.pt", "openai", channels=(64,), stem_channels=64, embedding_channels=32, attention=(True,))
    load_checkpoint(tmp_path / "model.pt", **FLAGS["openai"], channel_mult=2, attention_resolutions=8)
    with pytest.raises(CheckpointError, match=r"channel_mult must be \(2.0,\), as its weights have it, got 1"):
        load_checkpoint(tmp_path / "model.pt", **FLAGS["openai"], channel_mult=1)
    save(tmp_path / "ckpt.pt", "w86763777")
    load_checkpoint(tmp_path / "ckpt.pt", **FLAGS["w86763777"], attn=1)


@pytest.mark.parametrize(("dialect", "flags", "message"), WRONG_FLAGS)
def test_wrong_flags(tmp_path, dialect, flags, message):
    save(tmp_path / "model.pt", dialect)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pt", **{**FLAGS[dialect], **flags})


def test_own_checkpoints_and_diffusers_refuse_foreign_flags(tmp_path):
    with pytest.raises(CheckpointError, match="take no flags but null_class, image_size, got num_heads"):
        Sampler.from_pretrained(save_checkpoint(tmp_path / "own"), device="cpu", num_heads=4)
    folder = save_folder(tmp_path / "theirs", foreign_network("diffusers"))
    with pytest.raises(CheckpointError, match="no flag schedulers for it; did you mean scheduler"):
        load_checkpoint(folder, schedulers="ddim")


def test_notes_are_not_flags(tmp_path):
    save(tmp_path / "model.pt", "pesser")
    assert load_checkpoint(tmp_path / "model.pt", _note="from a file of flags", **FLAGS["pesser"])


# ------------------------------------------------------------------ files


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.marker)],)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_file_that_runs_code_is_refused(tmp_path, zipped):
    state = {"time_embed.0.weight": torch.zeros(1), "evil": RunsCode(tmp_path / "ran")}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused, because .* run code of its own \(\w+\.call\)"):
        load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "plain.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, zipped, share):
    torch.save(foreign_state("pesser", foreign_network("pesser")), tmp_path / "model.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pt", **FLAGS["pesser"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "got list"),
        ({"weight": torch.zeros(1)}, "got keys weight"),
        ({"model": {}, "ema": {}, "step": 3}, "a file of denoising-diffusion-pytorch without its 2-D U-Net"),
        ({}, "of no kind that fastddpm reads"),
        ({"down_blocks.0.x": torch.zeros(1)}, "weights of diffusers without their config.json"),
        ({"model.diffusion_model.x": torch.zeros(1)}, "holds a latent diffusion model, which is not supported"),
        ({"state_dict": {"model.diffusion_model.time_embed.0.weight": torch.zeros(1)}}, "a latent diffusion model"),
        (
            {"model.vit.layers.0.0.norm.g": torch.zeros(1), "model.time_mlp.1.weight": torch.zeros(1)},
            "UViT .simple_dif",
        ),
        (
            {"model.input_block.weight": torch.zeros(1), "model.to_time_emb.1.weight": torch.zeros(1)},
            "KarrasUnet, which",
        ),
        ({"denoise_fn.noise_level_mlp.1.weight": torch.zeros(1), "denoise_fn.downs.0.weight": torch.zeros(1)}, "SR3"),
        (
            {"denoise_fn.cond_embed.0.weight": torch.zeros(1), "denoise_fn.input_blocks.0.0.weight": torch.zeros(1)},
            "Palette, a network conditioned on pictures, which is not supported",
        ),
        ({"x_embedder.proj.weight": torch.zeros(1), "t_embedder.mlp.0.weight": torch.zeros(1)}, "DiT, a transformer"),
        ({"model": {"module.all_modules.0.weight": torch.zeros(1)}, "step": 3}, "a score-SDE network"),
        ({"unet": {"down_blocks.0.x": torch.zeros(1)}}, "weights of diffusers without their config.json"),
        (torch.zeros(3), "got Tensor"),
    ],
)
def test_foreign_contents(tmp_path, values, message):
    torch.save(values, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"\x89PNG...", b"PK", b"\x80\x02", b"\x80\x02}q\x00."])
def test_no_pytorch_file(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "model.pt")


def test_two_dialects_in_one_file(tmp_path):
    state = {k: v for name in ("openai", "pesser") for k, v in foreign_state(name, foreign_network(name)).items()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="could be openai .* and pesser"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("dialect", FLAGS)
def test_names_and_shapes_that_do_not_fit(tmp_path, dialect):
    network = foreign_network(dialect)
    path, state = tmp_path / "model.pt", foreign_state(dialect, network)

    def refused(values, message):
        torch.save(values, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, **FLAGS[dialect])

    last = [name for name in state if not name.endswith("timembedding.0.weight")][-1]
    some = [name for name in state if name.endswith("weight") and state[name].ndim == 4][3]
    refused({**state, "extra.weight": torch.zeros(2)}, f"taken for {dialect}.*extra.weight is left over")
    refused({name: value for name, value in state.items() if name != some}, "missing")
    refused({**state, some: state[some][:, :1]}, f"{some} must have shape")
    refused({**state, last: torch.full_like(state[last], torch.nan)}, "NaN")
    refused({**state, last: state[last].long()}, "int64")


def test_all_that_is_odd_is_counted_and_the_first_three_are_named(tmp_path):
    state = foreign_state("pesser", foreign_network("pesser"))
    names = [name for name in state if ".norm2." in name]
    for name in names[:2]:
        del state[name]
    state |= {"a": torch.zeros(1), names[2]: torch.zeros(7), names[3]: state[names[3]].int()}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pt", **FLAGS["pesser"])
    text = str(caught.value)
    assert f"{names[0]} is missing; {names[1]} is missing; a is left over and 2 more; give the whole state dict" in text
    assert "taken for pesser (keys temb.dense and down.0.block)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 2}, r"is missing.* check layers_per_block or block_out_channels in its configuration"),
        ({"block_out_channels": [32, 96]}, "must have shape .* check .*block_out_channels"),
        ({"num_class_embeds": 5}, "class_embedding.weight is missing; check num_class_embeds"),
        ({"time_embedding_dim": 64}, "must have shape .* check .*time_embedding_dim"),
        ({"in_channels": 4, "out_channels": 4}, "conv_in.weight must have shape .* check in_channels"),
        ({"add_attention": False}, "mid_block.attentions.0.* is left over.* check .*add_attention"),
        ({"resnet_time_scale_shift": "scale_shift"}, "check .*resnet_time_scale_shift"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "left over.* check up_block_types"),
    ],
)
def test_the_option_that_would_mend_it_is_named(tmp_path, changes, message):
    folder = save_folder(tmp_path, foreign_network("diffusers"), **changes)
    with pytest.raises(CheckpointError, match=f"taken for diffusers .config.json with _class_name.*{message}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    network = foreign_network("pesser")
    torch.save({prefix + name: value for name, value in foreign_state("pesser", network).items()}, tmp_path / "m.pt")
    assert same(load_checkpoint(tmp_path / "m.pt", **FLAGS["pesser"]), network)


def test_files_of_folders_and_folders_of_files_are_told_apart(tmp_path):
    folder = save_folder(tmp_path / "theirs", foreign_network("diffusers"))
    for name in ("config.json", "diffusion_pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=f"{name} is a file of a checkpoint; give its folder, .*theirs$"):
            load_checkpoint(folder / name)
    save_folder(tmp_path / "pipe" / "unet", foreign_network("diffusers"))
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="give its folder, .*pipe$"):
        load_checkpoint(tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs" / "ema_0.9999_1000.pt", "openai")
    with pytest.raises(CheckpointError, match="give the file in it, .*runs/ema_0.9999_1000.pt"):
        load_checkpoint(tmp_path / "runs")


@pytest.mark.parametrize("preset", openai_presets.RELATIVES)
def test_openais_other_models_are_refused_by_name(tmp_path, preset):
    save(tmp_path / "model.pt", "openai", in_channels=6, out_channels=6)
    with pytest.raises(CheckpointError, match=f"{preset} is a classifier, which fastddpm.load_classifier reads"):
        load_checkpoint(tmp_path / "model.pt", preset=preset)


def test_a_published_files_name_suggests_its_preset(tmp_path):
    save(tmp_path / "64x64_diffusion.pt", "openai", out_channels=6, head_channels=16)
    with pytest.raises(CheckpointError, match="as the file's name has it, preset=64x64_diffusion$"):
        load_checkpoint(tmp_path / "64x64_diffusion.pt")


@torch.no_grad()
def test_networks_that_return_the_mean_of_the_next_state(tmp_path):
    """w86763777's sampler: the network's output is the mean, and x_0 plays no part."""
    network = save(tmp_path / "ckpt.pt", "w86763777")
    flags = {**FLAGS["w86763777"], "mean_type": "xprev", "var_type": "fixedlarge"}
    sampler = Sampler.from_pretrained(tmp_path / "ckpt.pt", device="cpu", **flags)
    assert sampler.spec.prediction == "x_prev"
    betas = torch.linspace(1e-4, 0.02, 1000).double()
    timesteps = [5, 4, 3, 2, 1, 0]
    x, z = inputs(network)[0], torch.randn(6, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ours = sampler.sample(2, solver="ddpm", timesteps=timesteps, x_T=x, noise=z, output="raw", progress=False)
    for i, t in enumerate(timesteps):
        x = network(x, torch.full((2,), t)) + (betas[t].sqrt().float() * z[i] if t else 0.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_mean_of_the_next_state_says_what_x_0_is():
    """A network that returns the posterior mean of x_0 must lead every solver where one that returns x_0 does."""
    schedule = NoiseSchedule.linear(50)
    x_start = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)

    def runs(prediction):
        def network(x, t):
            mean = schedule.q_posterior(x_start.expand_as(x), x, t)[0]
            return {"x_start": x_start.expand_as(x), "x_prev": mean.to(x.dtype)}[prediction]

        sampler = Sampler(network, schedule, ModelSpec((1, 4, 4), prediction=prediction), device="cpu")
        for solver, clipped in (("ddim", "raw"), ("ddim", "rederive"), ("ddpm", None), ("dpmpp_2m", None)):
            extra = {"clipped_eps": clipped} if clipped else {}
            yield sampler.sample(2, solver=solver, steps=7, output="raw", progress=False, **extra)

    for ours, expected in zip(runs("x_prev"), runs("x_start"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "learned"),
    [((1, 2), True), ((2, 2), False), ((4, 8), True), ((6, 12), True), ((7, 7), False), ((12, 24), True)],
)
def test_any_number_of_channels(tmp_path, channels, learned):
    network = save(tmp_path / "m.pt", "openai", in_channels=channels[0], out_channels=channels[1])
    checkpoint = load_checkpoint(tmp_path / "m.pt", **FLAGS["openai"])
    assert checkpoint.spec.shape == (channels[0], 8, 8) and checkpoint.spec.learned_variance == learned
    assert same(checkpoint, network)


def test_six_channels_that_may_be_super_resolution(tmp_path):
    network = save(tmp_path / "m.pt", "openai", in_channels=6, out_channels=6)
    for extra in ({}, {"learn_sigma": True}):
        with pytest.raises(
            CheckpointError, match="super-resolution of 3 channels .*, learn_sigma=False if it is the latter"
        ):
            load_checkpoint(tmp_path / "m.pt", **FLAGS["openai"], **extra)
    assert same(load_checkpoint(tmp_path / "m.pt", learn_sigma=False, **FLAGS["openai"]), network)


@pytest.mark.parametrize("channels", [(8, 3), (4, 3), (3, 1), (9, 4)], ids=str)
@pytest.mark.parametrize("dialect", FLAGS)
def test_networks_conditioned_on_pictures(tmp_path, dialect, channels):
    save(tmp_path / "m.pt", dialect, in_channels=channels[0], out_channels=channels[1])
    with pytest.raises(
        CheckpointError, match=f"takes {channels[0]} channels and returns {channels[1]}: it is condition"
    ):
        load_checkpoint(tmp_path / "m.pt", **FLAGS[dialect])


@pytest.mark.parametrize("channels", [(6, 3), (4, 3), (3, 1), (9, 4)], ids=str)
def test_what_a_diffusers_network_takes_behind_x(tmp_path, channels):
    into, out = channels
    network = foreign_network("diffusers", in_channels=into, out_channels=out)
    folder = save_folder(tmp_path, network)
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.spec.shape[0], checkpoint.spec.condition_channels) == (out, into - out)
    assert same(checkpoint, network)
    assert load_checkpoint(folder, condition_channels=into - out).spec == checkpoint.spec
    with pytest.raises(
        CheckpointError, match=f"condition_channels must be {into - out}, as its weights have it, got 9"
    ):
        load_checkpoint(folder, condition_channels=9)
    native.save(tmp_path / "own", checkpoint.network, checkpoint.schedule, checkpoint.spec)
    assert load_checkpoint(tmp_path / "own").spec == checkpoint.spec


def test_a_learned_variance_leaves_open_what_is_behind_x(tmp_path):
    network = foreign_network("diffusers", in_channels=6, out_channels=6)
    folder = save_folder(tmp_path, network)
    assert load_checkpoint(folder).spec.condition_channels == 0
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(CheckpointError, match="out_channels must be 12 .* got 6; .* give condition_channels=3$"):
        load_checkpoint(folder)
    spec = load_checkpoint(folder, condition_channels=3).spec
    assert (spec.shape[0], spec.condition_channels, spec.variance) == (3, 3, "learned_range")


@pytest.mark.parametrize(("dialect", "wanted"), [("openai", "3 or 6"), ("pesser", "3"), ("w86763777", "3")])
def test_other_numbers_of_channels(tmp_path, dialect, wanted):
    save(tmp_path / "m.pt", dialect, out_channels=4)
    with pytest.raises(CheckpointError, match=f"the output must have {wanted} channels for an input of 3, got 4"):
        load_checkpoint(tmp_path / "m.pt", **FLAGS[dialect])


@pytest.mark.parametrize(
    ("flag", "what"),
    [("cond_fn", "an option of Sampler.sample"), ("classifier_path", "fastddpm.load_classifier reads"),
     ("classifier_scale", "fastddpm.load_classifier reads")],
)  # fmt: skip
@pytest.mark.parametrize("dialect", FLAGS)
def test_flags_of_classifiers(tmp_path, dialect, flag, what):
    save(tmp_path / "m.pt", dialect)
    with pytest.raises(CheckpointError, match=rf"{flag} is no flag of a network: .*{what}.*; leave it out"):
        load_checkpoint(tmp_path / "m.pt", **FLAGS[dialect], **{flag: 64})


@pytest.mark.parametrize("flag", ["small_size", "large_size"])
@pytest.mark.parametrize("dialect", FLAGS)
def test_flags_of_super_resolution(tmp_path, dialect, flag):
    save(tmp_path / "m.pt", dialect)
    what = (
        "must take an even number of channels" if dialect == "openai" else rf"super-resolution \({flag}\) is not supp"
    )
    with pytest.raises(CheckpointError, match=what):
        load_checkpoint(tmp_path / "m.pt", **FLAGS[dialect], **{flag: 64})


def test_openai_relatives_are_named(tmp_path):
    state = foreign_state("openai", foreign_network("openai"))
    half = {name: value for name, value in state.items() if not name.startswith("output_blocks")}
    torch.save(half, tmp_path / "classifier.pt")
    with pytest.raises(CheckpointError, match="it is a classifier; give .* to fastddpm.load_classifier"):
        load_checkpoint(tmp_path / "classifier.pt", **FLAGS["openai"])
    torch.save({name: value for name, value in state.items() if name != "out.2.weight"}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match="it is cut short"):
        load_checkpoint(tmp_path / "half.pt", **FLAGS["openai"])


def test_other_time_tables_are_refused(tmp_path):
    state = foreign_state("w86763777", foreign_network("w86763777"))
    state[w86763777.TABLE] = state[w86763777.TABLE] + 0.01
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="must hold the sinusoids"):
        load_checkpoint(tmp_path / "ckpt.pt", **FLAGS["w86763777"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "must be a UNet2DModel, got UNet2DConditionModel"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "got 'SkipDownBlock2D', which is not supported"),
        ({"up_block_types": ["UpBlock2D"]}, "must have one entry per level, got 2, 2 and 1"),
        ({"block_out_channels": 32}, "block_out_channels must be a list"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional', got 'fourier'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be null, got 'timestep'"),
        ({"mid_block_scale_factor": 0}, "mid_scale must be a number in"),
        ({"act_fn": "gelu"}, "act_fn must be one of silu, swish, got 'gelu'"),
        ({"downsample_padding": 2}, "downsample_padding must be one of 0, 1, got 2"),
        ({"center_input_sample": 2}, "center_input_sample must be true or false, got 2; nothing else is supported"),
        ({"sample_size": None}, "does not say sample_size"),
        ({"out_channels": 6}, "out_channels must be 3 for variance fixed_small, got 6; the scheduler belongs to ano"),
        ({"out_channels": 4}, "the output must have 3 or 6 channels for an input of 3, got 4"),
        ({"norm_num_groups": 7}, "must be multiples of norm_groups=7"),
        ({"attention_head_dim": 48}, "head_channels must divide"),
        ({"layers_per_block": [1, 2]}, "layers_per_block must be an integer"),
    ],
)
def test_diffusers_configurations_that_are_not_supported(tmp_path, changes, message):
    folder = save_folder(tmp_path, foreign_network("diffusers"), **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "ScoreSdeVeScheduler"},
            "ScoreSdeVeScheduler is of score-SDE's variance-exploding models, not",
        ),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "is of consistency models, not of a DDPM: not supported$"),
        ({"_class_name": "EDMEulerScheduler"}, "is of EDM, not of a DDPM"),
        ({"_class_name": "IPNDMScheduler"}, "got IPNDMScheduler, which is not supported; give scheduler="),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type must be one of fixed_small"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "exp"}, "beta_schedule must be one of linear"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow"}, "prediction_type must be one of epsilon"),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "karras"}, "spacing must be one of"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas must be a list of 1000"),
        ({"_class_name": "DDPMScheduler", "clip_sample": "yes"}, "clip_sample must be true or false"),
        (
            {"_class_name": "DDPMScheduler", "num_train_timesteps": 2.5},
            "num_train_timesteps must be an integer, got 2.5",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, "solver_order must be one of 2, 3, got 1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas must be False"),
        ([], "must hold a JSON object"),
    ],
)
def test_schedulers_that_are_not_supported(tmp_path, values, message):
    folder = save_folder(tmp_path, foreign_network("diffusers"))
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_other_pipelines_are_named(tmp_path):
    folder = save_folder(tmp_path, foreign_network("diffusers"))
    (folder / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    with pytest.raises(CheckpointError, match="got LDMPipeline, whose pictures need its decoder.*fastddpm.accelerate"):
        load_checkpoint(folder)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ConsistencyModelPipeline", **parts}))
    with pytest.raises(CheckpointError, match="ConsistencyModelPipeline is of consistency models, not of a DDPM"):
        load_checkpoint(folder, scheduler=tmp_path)


def test_a_learned_variance_that_the_network_lacks(tmp_path):
    folder = save_folder(tmp_path, foreign_network("diffusers"))
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(
        CheckpointError, match="out_channels must be 6 .* got 3; the scheduler belongs to another network$"
    ):
        load_checkpoint(folder)


def test_folder_without_weights(tmp_path):
    folder = save_folder(tmp_path, foreign_network("diffusers"))
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="there must be diffusion_pytorch_model.safetensors or"):
        load_checkpoint(folder)


# ------------------------------------------------------------------ anything

ENTRIES = [field.name for field in dataclasses.fields(diffusers_unet.UNet2DConfig)]
ENTRIES += ["_class_name", "beta_schedule", "trained_betas", "steps_offset"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.sampled_from(["conv", "DownBlock2D", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(ENTRIES), JSON, min_size=1, max_size=3))
@settings(max_examples=25)
def test_any_configuration_loads_or_is_refused(tmp_path_factory, changes):
    folder = save_folder(tmp_path_factory.mktemp("any"), foreign_network("diffusers"), **changes)
    scheduler = {"_class_name": "DDPMScheduler", **{k: v for k, v in changes.items() if k != "_class_name"}}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    try:
        load_checkpoint(folder)
    except CheckpointError as error:
        assert str(error)


SHAPES = [(3,), (2, 2), (4, 4, 3, 3), ()]
TENSORS = st.sampled_from([torch.zeros(shape) for shape in SHAPES] + [torch.ones(3).int()])
KEYS = [
    "time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.7.0.op.weight", "out.2.weight",
    "output_blocks.0.0.in_layers.0.weight", "temb.dense.0.weight", "down.0.block.0.norm1.weight", "conv_in.weight",
    "down.99999999.attn.0.q.weight", "downblocks.0.block1.0.weight", "time_embedding.timembedding.0.weight",
    "head.weight", "downblocks.x.main.weight",
]  # fmt: skip


@given(
    values=st.dictionaries(st.sampled_from(KEYS), TENSORS, max_size=8)
    | st.dictionaries(
        st.sampled_from(["net_model", "ema_model", *KEYS]), TENSORS | st.integers() | st.text(), max_size=5
    ),
    flags=st.sampled_from(list(FLAGS)),
)
@settings(max_examples=60)
def test_any_contents_are_refused(tmp_path_factory, values, flags):
    path = tmp_path_factory.mktemp("any") / "model.pt"
    torch.save(values, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **FLAGS[flags])
    assert "\n" not in str(caught.value)


class TestFlagsOnTheCommandLine:
    def test_values_are_json_or_words(self):
        from fastddpm.cli.flags import parse_flags

        texts = ["num_heads=4", "noise_schedule=cosine", "predict_xstart=False", "sigma=null", "path=a=b", 'mult="1,2"']
        texts += ["mults=1,2", "full=True,False", "beta=.5", "end=+1.", "deep=" + "[" * 10**5, "words=a,1", "odd=1,"]
        expected = {"num_heads": 4, "noise_schedule": "cosine", "predict_xstart": False, "sigma": None}
        expected |= {"path": "a=b", "mult": "1,2", "mults": [1, 2], "full": [True, False], "beta": 0.5, "end": 1.0}
        expected |= {"deep": "[" * 10**5, "words": "a,1", "odd": "1,"}
        assert parse_flags(texts) == expected
        assert parse_flags(None) == {}

    @pytest.mark.parametrize("texts", [["num_heads"], ["=4"], ["a b=1"], ["device=cpu"], ["x=1", "x=2"]])
    def test_what_is_no_flag_is_refused(self, texts):
        from fastddpm.cli.flags import parse_flags

        with pytest.raises(ValueError, match="--flag"):
            parse_flags(texts)

    def test_a_foreign_file_is_sampled_and_described(self, tmp_path, capsys):
        from fastddpm.cli import app

        folder = peers_dir() / "openai_guided"
        values = json.loads((folder / "flags.json").read_text())
        flags = [f"--flag={k}={json.dumps(v)}" for k, v in values.items() if not k.startswith("_")]
        path, grid = str(folder / "ema_0.9999_010000.pt"), tmp_path / "grid.png"
        app(["sample", path, "-n", "2", "--steps", "2", "--grid", str(grid), *flags], standalone_mode=False)
        assert grid.exists()
        capsys.readouterr()
        app(["info", path, "--json", *flags], standalone_mode=False)
        facts = json.loads(capsys.readouterr().out)["checkpoint"]
        assert (facts["format"], facts["parameters"]) == ("openai", "319,558")


class TestInfo:
    """What `fastddpm info` says of each dialect."""

    @pytest.mark.parametrize("dialect", ["openai", "pesser", "w86763777"])
    def test_where_each_setting_comes_from(self, tmp_path, capsys, dialect):
        from fastddpm.cli import app

        save(tmp_path / "model.pt", dialect)
        flags = [f"--flag={name}={json.dumps(value)}" for name, value in FLAGS[dialect].items()]
        app(["info", str(tmp_path / "model.pt"), "--json", *flags], standalone_mode=False)
        facts = json.loads(capsys.readouterr().out)
        checkpoint, told = facts["checkpoint"], facts["settings"]
        assert (checkpoint["format"], checkpoint["guidance"]) == (dialect, "not possible without classes")
        assert checkpoint["recognised by"].startswith("keys ")
        assert all(told[name]["from"] == "flag" for name in FLAGS[dialect])
        derived = {"openai": "num_channels", "pesser": "ch", "w86763777": "T"}[dialect]
        assert told[derived] == {"value": 1000 if derived == "T" else 32, "from": "file"}
        app(["info", str(tmp_path / "model.pt"), *flags], standalone_mode=False)
        table = capsys.readouterr().out
        assert all(name in table for name in (*FLAGS[dialect], derived, "recognised by"))

    def test_presets_and_defaults(self, tmp_path, capsys):
        from fastddpm.cli import app

        save(tmp_path / "model.pt", "openai", out_channels=6, num_classes=5)
        flags = ["--flag=preset=cifar10_uncond_50M_500K", "--flag=null_class=4"]
        app(["info", str(tmp_path / "model.pt"), "--json", *flags], standalone_mode=False)
        facts = json.loads(capsys.readouterr().out)
        assert facts["settings"]["num_heads"] == {"value": 4, "from": "preset cifar10_uncond_50M_500K"}
        assert facts["settings"]["null_class"] == {"value": 4, "from": "flag"}
        assert facts["settings"]["num_heads_upsample"] == {"value": -1, "from": "default"}
        assert facts["checkpoint"]["guidance"] == "possible: label 4 stands for no class"
        assert facts["checkpoint"]["classes"] == "4"

    def test_a_folder_in_shards(self, tmp_path, capsys):
        from fastddpm.cli import app
        from tests.checkpoints.test_diffusers_folders import folder, shard

        network = foreign_network("diffusers", num_classes=4)
        shard(folder(tmp_path, network), foreign_state("diffusers", network))
        app(["info", str(tmp_path), "--json"], standalone_mode=False)
        facts = json.loads(capsys.readouterr().out)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert facts["checkpoint"]["size"] == f"{size / 1e6:.2f} MB"
        assert "--flag null_class=N" in facts["checkpoint"]["guidance"]
        assert facts["checkpoint"]["recognised by"] == "config.json with _class_name"
