"""Folders of diffusers: every option of UNet2DModel against the library itself, and every way of storing weights."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.checkpoints.diffusers import network_from
from fastddpm.checkpoints.diffusers_unet import unet_config
from fastddpm.nets.unet import UNet
from tests.foreign import diffusers_config, foreign_network, foreign_state

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("diffusers")


# ------------------------------------------------------------------ structure, against the library

BASE = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
OPTIONS = {
    "defaults": {},
    "ho": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
           "attention_head_dim": None},
    "input centred": {"center_input_sample": True},
    "classes": {"num_class_embeds": 7},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, attention norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "attention norm": {"attn_norm_num_groups": 16},
    "middle divided": {"mid_block_scale_factor": 1.7},
    "middle divided, no attention": {"mid_block_scale_factor": 2**0.5, "add_attention": False},
    "no attention in the middle": {"add_attention": False},
    "attention changes resolution in a block": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet", "upsample_type": "resnet",
    },
    "resnet blocks": {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
                      "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D")},
    "three uneven levels": {
        "block_out_channels": (64, 32, 96), "layers_per_block": 2, "attention_head_dim": 16,
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    },
    "time channels": {"time_embedding_dim": 48},
    "one channel": {"in_channels": 1, "out_channels": 1},
    "a rectangle": {"sample_size": (8, 16)},
    "silu by its other name": {"act_fn": "swish"},
}  # fmt: skip


def library_network(library, **options):
    torch.manual_seed(3)
    network = library.UNet2DModel(**{**BASE, **options}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_every_option_says_what_the_library_says(library, options):
    network = library_network(library, **options)
    ours = network_from(network.config, network.state_dict())
    height, width = ours.config.sample_size
    x = torch.randn(2, ours.config.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([3, 870]), None if ours.config.num_classes is None else torch.tensor([0, 6])
    theirs = network(x, t, class_labels=y).sample
    assert float((ours(x, t, y) - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"time_embedding_type": "learned"},
            "time_embedding_type must be 'positional', got 'learned'; nothing else is",
        ),
        ({"class_embed_type": "identity"}, "class_embed_type must be null, got 'identity'"),
        ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2D', got None"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "down_block_types must be among .* got 'SkipDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D", "AttnSkipUpBlock2D"]}, "up_block_types .* got 'AttnSkipUpBlock2D'"),
        ({"norm_num_groups": None}, "norm_num_groups must be an integer, got None"),
        ({"sample_size": None}, "sample_size must be an integer or two, got null"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim must be an integer or null, got"),
    ],
)
def test_what_is_not_supported_is_named(options, message):
    with pytest.raises(CheckpointError, match=message):
        network_from({**BASE, **options}, {}, "unet")


def test_a_size_where_the_configuration_has_none(library):
    network = library_network(library, sample_size=None)
    assert network_from(network.config, network.state_dict(), sample_size=8).config.sample_size == (8, 8)


# ------------------------------------------------------------------ ways of storing


def folder(path, network, *, scheduler=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(diffusers_config(network.config)))
    if scheduler is not False:
        values = {"_class_name": "DDPMScheduler", **(scheduler or {})}
        (path / "scheduler_config.json").write_text(json.dumps(values))
    return path


def shard(path, state, suffix="safetensors", middle="", parts=3):
    """Write a state dict as the library does: an index, and the tensors in several files."""
    names, weight_map = sorted(state), {}
    for i in range(parts):
        file = f"{STEM}{middle}-{i + 1:05}-of-{parts:05}.{suffix}"
        part = {name: state[name] for name in names[i::parts]}
        save_file(part, path / file) if suffix == "safetensors" else torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = path / f"{STEM}.{suffix}.index{middle}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def same(checkpoint, network):
    ours = checkpoint.network.state_dict()
    return all(torch.equal(value, ours[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    network = foreign_network("diffusers")
    shard(folder(tmp_path, network), foreign_state("diffusers", network), suffix)
    checkpoint = load_checkpoint(tmp_path)
    assert same(checkpoint, network)
    assert checkpoint.settings["weights"] == (f"{STEM}.{suffix}.index.json", "file")


def test_shards_that_the_library_wrote(library, tmp_path):
    network = library_network(library)
    network.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    ours, x, t = load_checkpoint(tmp_path).network, torch.randn(1, 3, 8, 8), torch.tensor([5])
    torch.testing.assert_close(ours(x, t), network(x, t).sample, rtol=1e-5, atol=1e-5)


def test_damaged_shards(tmp_path):
    network = foreign_network("diffusers")
    state = foreign_state("diffusers", network)
    index = shard(folder(tmp_path, network), state)
    whole = index.read_text()

    def refused(message):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)

    second = tmp_path / f"{STEM}-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.unlink()
    refused("1 of 3 shards are missing, first .*00002-of-00003")
    second.write_bytes(content[:-5])
    refused("00002-of-00003.safetensors: not a whole safetensors file")
    part = load_file(tmp_path / f"{STEM}-00001-of-00003.safetensors")
    save_file(part, second)
    refused("00002-of-00003.safetensors: (lacks|also holds) .*, unlike")
    second.write_bytes(content)
    for weight_map in (None, {}, [], {"a": 3}, {"a": "../x.bin"}, {"a": "/etc/x.bin"}, {"a": "config.json"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused("weight_map must give each tensor's file")
    values = json.loads(whole)
    del values["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(values))
    refused("also holds conv_in.bias")


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_variants(tmp_path, shards, dtype):
    network = foreign_network("diffusers")
    state = {name: value.to(dtype) for name, value in foreign_state("diffusers", network).items()}
    folder(tmp_path, network)
    if shards:
        shard(tmp_path, state, middle=".fp16")
    else:
        save_file(state, tmp_path / f"{STEM}.fp16.safetensors")
    with pytest.raises(CheckpointError, match="got the variants fp16; give variant=fp16"):
        load_checkpoint(tmp_path)
    checkpoint = load_checkpoint(tmp_path, variant="fp16")
    assert {value.dtype for value in checkpoint.network.state_dict().values()} == {torch.float32}
    assert torch.equal(checkpoint.network.stem.weight, state["conv_in.weight"].float())
    assert checkpoint.settings["variant"] == ("fp16", "flag")


def test_wrong_variants(tmp_path):
    network = foreign_network("diffusers")
    save_file(foreign_state("diffusers", network), folder(tmp_path, network) / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match=r"must be .*\.ema\.safetensors or .*; leave variant out"):
        load_checkpoint(tmp_path, variant="ema")
    for variant in ("../x", 16, "a.b"):
        with pytest.raises(CheckpointError, match="variant must be a part of a file's name like fp16"):
            load_checkpoint(tmp_path, variant=variant)


def test_averaged_weights_beside_the_raw_ones(tmp_path):
    networks = {"unet": foreign_network("diffusers"), "unet_ema": foreign_network("diffusers")}
    networks["unet_ema"].conv_out.bias.data += 1
    for name, network in networks.items():
        place = folder(tmp_path / name, network, scheduler=False)
        save_file(foreign_state("diffusers", network), place / f"{STEM}.safetensors")
    folder(tmp_path / "scheduler", networks["unet"])
    with pytest.raises(CheckpointError, match=r"does not say subfolder \(unet or unet_ema"):
        load_checkpoint(tmp_path)
    for name, network in networks.items():
        assert same(load_checkpoint(tmp_path, subfolder=name), network)
        assert same(load_checkpoint(tmp_path / name, scheduler=tmp_path / "scheduler"), network)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    assert same(load_checkpoint(tmp_path), networks["unet"])
    shutil.rmtree(tmp_path / "unet_ema")
    with pytest.raises(CheckpointError, match="subfolder must be one that there is, got unet_ema"):
        load_checkpoint(tmp_path, subfolder="unet_ema")


# ------------------------------------------------------------------ pipelines and schedulers


def pipeline(path, index, scheduler):
    network = foreign_network("diffusers")
    save_file(foreign_state("diffusers", network), folder(path, network, scheduler=scheduler) / f"{STEM}.safetensors")
    (path / "model_index.json").write_text(json.dumps(index))
    return path


PARTS = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}


@pytest.mark.parametrize(
    "index",
    [{"_class_name": "DDPMPipeline"}, {"_class_name": "PNDMPipeline"}, {"_class_name": "MyPipeline", **PARTS},
     {"_class_name": ["pipeline", "Mine"], **PARTS},
     {"_class_name": "DDIMPipeline", "_diffusers_version": "0.1", **PARTS}],
)  # fmt: skip
def test_pipelines_of_a_network_and_a_scheduler(tmp_path, index):
    assert load_checkpoint(pipeline(tmp_path, index, {})).dialect == "diffusers"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "LDMPipeline"}, "pictures need its decoder; load it with diffusers .* fastddpm.accelerate"),
        ({"_class_name": "DDPMPipeline2", **PARTS, "vae": ["diffusers", "VQModel"]}, "got DDPMPipeline2, which is not"),
        ({}, "got None, which is not supported"),
    ],
)
def test_pipelines_with_other_parts(tmp_path, index, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(pipeline(tmp_path, index, {}))


def test_another_way_through_the_same_process_is_read_as_ddim_and_says_so(library, tmp_path):
    library.PNDMScheduler(num_train_timesteps=50, beta_end=0.03, steps_offset=1).save_pretrained(tmp_path)
    theirs = library.PNDMScheduler.from_pretrained(tmp_path)
    path = pipeline(tmp_path / "pndm", {"_class_name": "PNDMPipeline"}, None)
    shutil.copy(tmp_path / "scheduler_config.json", path)
    with pytest.warns(UserWarning, match="PNDMScheduler is no solver of fastddpm.*choose solver ddim"):
        ours = load_checkpoint(path)
    as_ddim = library.DDIMScheduler.from_config(theirs.config)
    as_ddim.save_pretrained(tmp_path / "ddim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = load_checkpoint(path, scheduler=tmp_path / "ddim")
    assert ours.spec == expected.spec and ours.spec.steps_offset == 1 and not ours.spec.final_alpha_to_one
    assert torch.equal(ours.schedule.alphas_cumprod, as_ddim.alphas_cumprod)
    assert ours.settings["scheduler"] == ("PNDMScheduler", "file")


@pytest.mark.parametrize(("parallel", "plain"), [("DDPMParallelScheduler", "DDPMScheduler"),
                                                ("DDIMParallelScheduler", "DDIMScheduler")])  # fmt: skip
def test_parallel_schedulers_are_the_plain_ones(tmp_path, parallel, plain):
    specs = [
        load_checkpoint(pipeline(tmp_path / name, {"_class_name": "DDPMPipeline"},
                                 {"_class_name": name, "set_alpha_to_one": False})).spec
        for name in (parallel, plain)
    ]  # fmt: skip
    assert specs[0] == specs[1]


def test_origins_of_the_settings(tmp_path):
    path = pipeline(tmp_path, {"_class_name": "DDPMPipeline"}, {"clip_sample": False})
    settings = load_checkpoint(path).settings
    assert settings["clip_sample"] == (False, "file")
    assert settings["beta_end"] == (0.02, "default")
    assert settings["norm_num_groups"] == (32, "file")
    assert settings["norm_eps"] == (1e-5, "default")


def test_a_folder_of_the_hubs_oldest_layout(tmp_path):
    """google/ddpm-cifar10-32 and its like have network and scheduler beside model_index.json."""
    path = pipeline(tmp_path, {"_class_name": "DDPMPipeline", **PARTS}, {})
    assert Sampler.from_pretrained(path, device="cpu").sample(1, steps=2, progress=False).shape == (1, 3, 8, 8)


# ------------------------------------------------------------------ what is published

OLD = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "center_input_sample": False, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3,
    "time_embedding_type": "positional",
}  # fmt: skip
PUBLISHED = {
    "google/ddpm-cifar10-32": (32, [128, 256, 256, 256], 1, 35_746_307),
    "google/ddpm-*-256": (256, [128, 128, 256, 256, 512, 512], 4, 113_673_219),
}


@pytest.mark.parametrize(("size", "channels", "attends", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_need_no_flags(size, channels, attends, parameters):
    """What the JSON of the published networks says, which is less than today's; sizes as the model cards have them."""
    levels = range(len(channels))
    down = ["AttnDownBlock2D" if level == attends else "DownBlock2D" for level in levels]
    up = [block.replace("Down", "Up") for block in reversed(down)]
    values = {
        **OLD,
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
    }
    config = unet_config(values, "config.json")
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(config).parameters()) == parameters
    assert (config.sample_size, config.downsample_padding, config.norm_eps) == ((size, size), "asymmetric", 1e-6)
    assert config.head_channels is None and config.num_heads == 1
