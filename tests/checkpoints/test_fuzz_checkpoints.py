"""Anything in a checkpoint's place loads whole or is refused in one line, quickly and without filling the memory."""

import copy
import json
import os
import resource
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastddpm import CheckpointError, load_checkpoint
from fastddpm.checkpoints import native
from fastddpm.checkpoints.diffusers_scheduler import SCHEDULERS
from fastddpm.checkpoints.diffusers_unet import UNet2DConfig
from fastddpm.cli.flags import parse_flags
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.tiny import save_checkpoint

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SCALE = int(os.environ.get("FASTDDPM_FUZZ", "1"))
"""How many times as many examples: FASTDDPM_FUZZ=20 for a long night."""

LONGEST = 5.0
MOST_MEMORY = 1 << 30
"""Seconds of the processor and bytes that one refusal may take: an absurd size would take far more."""

ABSURD = st.sampled_from([0, -1, 10**9, 2**31, 2**63, 10**40, 1e308, float("inf"), float("nan"), -0.0, 1e-300])
SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | ABSURD | st.floats() | st.text(max_size=4)
WORDS = st.sampled_from(
    ["conv", "resnet", "DownBlock2D", "linear", "cosine", "betas", "v_prediction", "../x", "\x00", "é"]
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


def load(path, **flags):
    """The checkpoint, or None if it is refused in one line; neither may take long or much memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        checkpoint = load_checkpoint(path, **flags)
    except CheckpointError as error:
        assert str(error) and str(error).isprintable()
        assert len(str(error)) < 4000
        checkpoint = None
    assert time.process_time() - started < LONGEST
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
    if checkpoint is not None:  # whole: nothing is left on the meta device, nothing unset
        assert not any(
            value.is_meta or not bool(value.isfinite().all()) for value in checkpoint.network.state_dict().values()
        )
        assert checkpoint.schedule.T >= 1 and bool(checkpoint.schedule.alphas_cumprod.isfinite().all())
    return checkpoint


@st.composite
def mutated(draw, values):
    """A JSON object with some of its entries, at any depth, replaced, dropped or added to."""
    result = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        place = result
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON)
            break
        if isinstance(place, dict) and draw(st.integers(0, 5)) == 0:
            place[draw(st.text(max_size=5))] = draw(JSON)
    return result


def write(path, values):
    path.write_text(json.dumps(values))


# ------------------------------------------------------------------ configurations


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("own"))
    return folder, json.loads((folder / "config.json").read_text())


@given(data=st.data())
@settings(QUICK, max_examples=40 * SCALE)
def test_own_configurations(own, data):
    folder, config = own
    write(folder / "config.json", data.draw(mutated(config)))
    load(folder)


LUCIDRAINS = {"dim": 8, "init_dim": 8, "dim_mults": [1, 2], "full_attn": [False, True], "attn_heads": [4, 4, 4],
              "attn_dim_head": [32, 32, 32], "channels": 1, "num_classes": 3}  # fmt: skip


@given(entry=JSON | mutated(LUCIDRAINS))
@settings(QUICK, max_examples=40 * SCALE)
def test_own_configurations_of_lucidrains_networks(own, entry):
    folder, config = own
    write(folder / "config.json", {**config, "lucidrains": entry})
    assert load(folder) is None


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("theirs"), foreign_network("diffusers", num_classes=3)
    save_file(foreign_state("diffusers", network), folder / "diffusion_pytorch_model.safetensors")
    return folder, {**json.loads(json.dumps(UNet2DConfig().to_dict())), **diffusers_config(network.config)}


@given(data=st.data())
@settings(QUICK, max_examples=60 * SCALE)
def test_diffusers_configurations(theirs, data):
    folder, config = theirs
    write(folder / "config.json", data.draw(mutated(config)))
    write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    load(folder)


@given(data=st.data(), kind=st.sampled_from(list(SCHEDULERS)))
@settings(QUICK, max_examples=60 * SCALE)
@pytest.mark.filterwarnings("ignore")
def test_diffusers_schedulers(theirs, data, kind):
    folder, config = theirs
    write(folder / "config.json", config)
    write(folder / "scheduler_config.json", data.draw(mutated({"_class_name": kind, **SCHEDULERS[kind]().to_dict()})))
    load(folder)


@given(index=JSON | st.dictionaries(st.sampled_from(["_class_name", "unet", "scheduler", "vqvae"]), JSON, max_size=4))
@settings(QUICK, max_examples=30 * SCALE)
def test_pipelines(theirs, index):
    folder, config = theirs
    write(folder / "config.json", config)
    write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    try:
        write(folder / "model_index.json", index)
        load(folder)
    finally:
        (folder / "model_index.json").unlink()


@given(
    weight_map=JSON | st.dictionaries(st.text(max_size=5), st.sampled_from(["a.bin", "b.safetensors", "/etc/passwd"]))
)
@settings(QUICK, max_examples=30 * SCALE)
def test_indices_of_shards(tmp_path_factory, weight_map):
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "config.json", diffusers_config(foreign_network("diffusers").config))
    write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    write(folder / "diffusion_pytorch_model.bin.index.json", {"weight_map": weight_map})
    torch.save({"x": torch.zeros(1)}, folder / "a.bin")
    assert load(folder) is None


@pytest.mark.parametrize("name", ["block_out_channels", "layers_per_block", "norm_num_groups", "time_embedding_dim",
                                  "num_class_embeds", "sample_size", "in_channels", "out_channels",
                                  "attention_head_dim"])  # fmt: skip
@pytest.mark.parametrize("number", [10**9, 2**20, 2**63, 10**30, 0, -1, 1e308])
def test_absurd_sizes(theirs, name, number):
    folder, config = theirs
    wrong = [number] * 2 if name == "block_out_channels" else number
    write(folder / "config.json", {**config, name: wrong, "norm_num_groups": 1} | ({name: wrong}))
    write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    checkpoint = load(folder)
    assert checkpoint is None or name == "sample_size" or (name, number) == ("time_embedding_dim", 0)  # 0 is null there


@pytest.mark.parametrize("entries", [2**16, 5])
def test_absurdly_many_levels(theirs, entries):
    folder, config = theirs
    levels = {"block_out_channels": [32] * entries, "down_block_types": ["DownBlock2D"] * entries}
    write(folder / "config.json", {**config, **levels, "up_block_types": ["UpBlock2D"] * entries})
    write(folder / "scheduler_config.json", {"_class_name": "DDPMScheduler"})
    assert load(folder) is None


@given(flags=st.dictionaries(st.sampled_from(sorted({*(name for flags in FLAGS.values() for name in flags), "preset",
    "null_class", "attn", "ch_mult", "channel_mult", "attention_resolutions", "timestep_respacing", "num_head_channels",
    "num_heads_upsample", "model"})), JSON, min_size=1, max_size=4), dialect=st.sampled_from(list(FLAGS)))  # fmt: skip
@settings(QUICK, max_examples=40 * SCALE)
def test_flags(files, flags, dialect):
    load(files[dialect], **{**FLAGS[dialect], **flags})


@given(
    texts=st.lists(st.text(max_size=12) | st.builds("{}={}".format, st.text("ab_", min_size=1, max_size=3), st.text()))
)
@settings(QUICK, max_examples=60 * SCALE)
def test_flags_on_the_command_line(texts):
    try:
        parsed = parse_flags(texts)
    except ValueError as error:
        assert "--flag" in str(error)
    else:
        assert all(name.isidentifier() for name in parsed)


# ------------------------------------------------------------------ state dicts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("files"), {}
    for dialect in FLAGS:
        paths[dialect] = folder / f"{dialect}.pt"
        torch.save(foreign_state(dialect, foreign_network(dialect)), paths[dialect])
    return paths


STATES = {dialect: foreign_state(dialect, foreign_network(dialect)) for dialect in FLAGS}
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (4, 4, 3, 3), (0, 3, 3, 3), (1,) * 7])
TYPES = st.sampled_from([torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float64])


HOWS = ["drop", "drop part", "rename", "number", "shape", "type", "value", "add", "mix", "prefix"]
CHANGES = st.fixed_dictionaries(
    {
        "how": st.sampled_from(HOWS),
        "which": st.integers(0, 199),
        "name": st.text(max_size=10) | st.sampled_from(["temb.dense.0.weight", "conv_in.weight", "label_emb.weight"]),
        "number": st.sampled_from(["0", "7", "99999999", "-1", "1" * 30, "x", "²"]),
        "shape": SHAPES,
        "type": TYPES,
        "value": st.sampled_from([0.0, float("nan"), float("inf"), 1e30]),
        "other": st.sampled_from(list(FLAGS)),
        "prefix": st.sampled_from(["module.", "model.", "_orig_mod.", "ema."]),
    }
)


def change(state, recipe):
    """A state dict with keys dropped, renamed, reshaped, retyped, or those of another dialect added."""
    if not state:
        return state
    how, name = recipe["how"], sorted(state)[recipe["which"] % len(state)]
    state = dict(state)
    if how == "drop":
        del state[name]
    elif how == "drop part":
        part = name.rsplit(".", 1 + recipe["which"] % 3)[0]
        state = {key: value for key, value in state.items() if not key.startswith(part)}
    elif how == "rename":
        state[recipe["name"]] = state.pop(name)
    elif how == "number":
        old = f".{recipe['which'] % 4}."
        state = {key.replace(old, f".{recipe['number']}."): value for key, value in state.items()}
    elif how == "shape":
        state[name] = torch.zeros(recipe["shape"])
    elif how == "type":
        state[name] = torch.zeros(state[name].shape, dtype=recipe["type"])
    elif how == "value":
        state[name] = torch.full(state[name].shape, recipe["value"])
    elif how == "add":
        state[recipe["name"]] = torch.zeros(recipe["shape"])
    elif how == "mix":
        state |= dict(list(STATES[recipe["other"]].items())[:: 1 + recipe["which"] % 9])
    else:
        state = {recipe["prefix"] + key: value for key, value in state.items()}
    return state


WRAPPED = st.sampled_from([None, None, None, "net_model", "ema_model", "model", "state_dict", "ema"])


@given(dialect=st.sampled_from(list(FLAGS)), changes=st.lists(CHANGES, min_size=1, max_size=4), wrapped=WRAPPED)
@settings(QUICK, max_examples=60 * SCALE)
def test_changed_state_dicts(tmp_path_factory, dialect, changes, wrapped):
    state, path = STATES[dialect], tmp_path_factory.mktemp("changed") / "model.pt"
    for recipe in changes:
        state = change(state, recipe)
    torch.save(state if wrapped is None else {wrapped: state}, path)
    load(path, **FLAGS[dialect])


@given(dialect=st.sampled_from(list(FLAGS)), changes=st.lists(CHANGES, min_size=1, max_size=2))
@settings(QUICK, max_examples=30 * SCALE)
def test_changed_safetensors(tmp_path_factory, dialect, changes):
    state, path = STATES[dialect], tmp_path_factory.mktemp("changed") / "model.safetensors"
    for recipe in changes:
        state = change(state, recipe)
    save_file({key: value.clone() for key, value in state.items() if "\x00" not in key}, path)
    load(path, **FLAGS[dialect])


# ------------------------------------------------------------------ bytes


STARTS = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x08" + b"\0" * 7])


@given(content=st.binary(max_size=200), start=STARTS, suffix=st.sampled_from([".pt", ".safetensors", ".ckpt"]))
@example(content=b"", start=b"\x80\x02", suffix=".pt")
@settings(QUICK, max_examples=40 * SCALE)
def test_random_bytes(tmp_path_factory, content, start, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"model{suffix}"
    path.write_bytes(start + content)
    assert load(path) is None


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder, state = tmp_path_factory.mktemp("contents"), STATES["pesser"]
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "pickle.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "tensors.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(name=st.sampled_from(["zip.pt", "pickle.pt", "tensors.safetensors"]), flips=st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6), near=st.booleans())  # fmt: skip
@settings(QUICK, max_examples=40 * SCALE)
def test_flipped_bits(tmp_path_factory, contents, name, flips, near):
    """Near the start is the pickle's program or the header; elsewhere are mostly numbers, which nothing can check."""
    content = bytearray(contents[name])
    for place, bit in flips:
        at = int(place * (min(len(content), 3000) - 1 if near else len(content) - 1))
        content[at] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / name
    path.write_bytes(content)
    load(path, **FLAGS["pesser"])


@given(name=st.sampled_from(["zip.pt", "pickle.pt", "tensors.safetensors"]), share=st.floats(0, 0.9999))
@settings(QUICK, max_examples=30 * SCALE)
def test_cut_files(tmp_path_factory, contents, name, share):
    path = tmp_path_factory.mktemp("cut") / name
    path.write_bytes(contents[name][: int(share * len(contents[name]))])
    assert load(path, **FLAGS["pesser"]) is None


def test_a_header_that_promises_too_much(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    for length in (len(header), 2**62, 2**40):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        assert load(tmp_path / "model.safetensors") is None


def test_a_stride_that_promises_too_much(tmp_path):
    """A file of a few bytes may hold a tensor of any size with strides of zero."""
    state = dict(STATES["pesser"])
    state["conv_in.weight"] = torch.zeros(1).expand(2**30, 2**10, 3, 3)
    torch.save(state, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", **FLAGS["pesser"]) is None


def test_the_native_version_is_checked_before_anything_else(tmp_path):
    write(tmp_path / "config.json", {"format": native.FORMAT, "format_version": [1]})
    assert load(tmp_path) is None
