"""fastddpm's own checkpoints: what is saved comes back, and what is damaged or foreign is refused in one sentence."""

import copy
import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from fastddpm.checkpoints import CheckpointError, load_checkpoint, native
from fastddpm.checkpoints.base import load_weights
from fastddpm.process.schedule import NoiseSchedule
from tests.tiny import SPEC, UNET, T, network, save_checkpoint, unconditional


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("saved"), training={"data": "made up"})


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# ---------------------------------------------------------------------- what is whole


def test_what_is_saved_comes_back(saved):
    back = load_checkpoint(saved)
    expected = network().state_dict()
    assert (back.spec, back.network.config, back.dialect, back.path) == (SPEC, UNET, "fastddpm", saved)
    assert back.training == {"data": "made up"}
    assert not back.network.training
    assert torch.equal(back.schedule.betas, NoiseSchedule.linear(T).betas)
    assert back.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.network.state_dict().items())
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]


def test_half_precision_weights(tmp_path):
    save_checkpoint(tmp_path, weights={name: value.half() for name, value in network().state_dict().items()})
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    back = load_checkpoint(tmp_path).network.state_dict()
    assert all(value.dtype == torch.float32 for value in back.values())
    assert all(torch.equal(value.half(), stored[name]) for name, value in back.items())


def test_other_weights_than_the_networks_own(tmp_path):
    others = {name: value + 1 for name, value in network().state_dict().items()}
    save_checkpoint(tmp_path, weights=others)
    assert torch.equal(load_checkpoint(tmp_path).network.conv_out.bias, others["conv_out.bias"])


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.cosine(7), NoiseSchedule.from_betas([0.1, 0.2, 0.3]), NoiseSchedule.linear(9, dtype=torch.float32)],
    ids=["cosine", "custom", "float32"],
)
def test_schedules_come_back_bit_for_bit(tmp_path, schedule):
    native.save(tmp_path, network(), schedule, SPEC)
    assert torch.equal(load_checkpoint(tmp_path).schedule.betas, schedule.betas)


def test_learned_variance_comes_back(tmp_path):
    unet, spec = unconditional(variance="learned_range", prediction="v", clip=None, time_scale=50.0)
    back = load_checkpoint(save_checkpoint(tmp_path, unet, spec))
    assert back.spec == spec and back.network.config.out_channels == 2


def test_saving_again_replaces(tmp_path):
    save_checkpoint(tmp_path)
    native.save(tmp_path, network(seed=5), NoiseSchedule.linear(T), SPEC)
    assert torch.equal(load_checkpoint(tmp_path).network.stem.weight, network(seed=5).stem.weight)


# ---------------------------------------------------------------------- what is missing


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere; give a folder, or one of.*mnist"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint("x" * 5000)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint.*expected a folder with config.json.*got nothing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_the_folder(folder, name):
    with pytest.raises(CheckpointError, match=f"{name} is a file of a checkpoint; give its folder"):
        load_checkpoint(folder / name)


def test_a_folder_in_place_of_a_file(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(folder)


# ---------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, -1000, -1])
def test_truncated_weights(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 2, 100, -2])
def test_truncated_config(folder, length):
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="config.json: not readable JSON"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    ["[]", "[1, 2]", "7", "null", '"format"', "{}", "nonsense", "\udcff\udcfe", "[" * 100_000, "9" * 5000],
    ids=["list", "numbers", "number", "null", "string", "object", "nonsense", "binary", "deep", "huge number"],
)  # fmt: skip
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(folder)


def write_png(path):
    Image.new("L", (64, 64)).save(path, "PNG")


class Evil:
    """Leaves a folder behind if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_never_executed(folder, tmp_path, save):
    for place in (folder / "model.safetensors", folder / "config.json", tmp_path / "model.pt"):
        place.unlink(missing_ok=True)
        save(Evil(tmp_path / "trace"), place)
        for path in (folder, place):
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
        assert not (tmp_path / "trace").exists()


def test_a_png_is_no_safetensors(folder):
    write_png(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(folder)


def changed(tensors, **changes):
    return {**tensors, **changes}


WRONG_WEIGHTS = {
    "NaN": (lambda w: changed(w, **{"conv_out.bias": torch.tensor([float("nan")])}), "NaN or infinity"),
    "infinity": (lambda w: changed(w, **{"conv_out.bias": torch.tensor([float("inf")])}), "NaN or infinity"),
    "shape": (lambda w: changed(w, **{"conv_out.bias": torch.zeros(2)}), r"must have shape \[1\], got \[2\]"),
    "missing": (lambda w: {k: v for k, v in w.items() if k != "stem.bias"}, "stem.bias is missing"),
    "unknown": (lambda w: changed(w, extra=torch.zeros(1)), "extra is left over"),
    "integers": (
        lambda w: changed(w, **{"conv_out.bias": torch.zeros(1, dtype=torch.int64)}),
        "floats, got torch.int64",
    ),
    "none": (lambda w: {}, "are missing|is missing"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS.keys())
def test_weights_that_do_not_fit(folder, change, message):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_refused_file_leaves_the_network_alone():
    net = network()
    before = copy.deepcopy(net.state_dict())
    wrong = {name: torch.full_like(value, float("nan")) for name, value in before.items()}
    with pytest.raises(CheckpointError):
        load_weights(net, wrong, "weights")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


WRONG_CONFIGS = {
    "version": (lambda c: c.update(format_version=99), "format_version must be 1, got 99; update"),
    "no version": (lambda c: c.pop("format_version"), "format_version"),
    "other format": (lambda c: c.update(format="diffusers"), "is not a checkpoint that fastddpm reads"),
    "no unet": (lambda c: c.pop("unet"), "'unet' is missing"),
    "unet is a list": (lambda c: c.update(unet=[]), "UNetConfig"),
    "unknown option": (lambda c: c["unet"].update(heads=4), "heads"),
    "channels at odds": (lambda c: c["unet"].update(in_channels=3), "unet and spec must agree"),
    "size at odds": (lambda c: c["spec"].update(shape=[1, 16, 16]), "unet and spec must agree"),
    "variance at odds": (lambda c: c["spec"].update(variance="learned_range"), "unet and spec must agree"),
    "classes at odds": (lambda c: c["spec"].update(num_classes=9, class_names=None), "class rows"),
    "null class at odds": (lambda c: c["spec"].update(null_class=9), "class rows"),
    "classes unsaid": (lambda c: c["spec"].update(num_classes=None, null_class=None, class_names=None), "class rows"),
    "million layers": (lambda c: c["unet"].update(layers=10**6), "layers"),
    "wide network": (lambda c: c["unet"].update(channels=[2**16, 2**16]), "weights do not fit"),
    "endless schedule": (lambda c: c["schedule"].update(T=10**15), "T must be in"),
    "no steps": (lambda c: c["schedule"].update(T=0), "T must be"),
    "unknown schedule": (lambda c: c["schedule"].update(name="quadratic"), "quadratic"),
    "beta over 1": (lambda c: c["schedule"].update(beta_end=2.0), "beta"),
    "infinite beta": (lambda c: c["schedule"].update(beta_end=float("inf")), "beta"),
    "empty betas": (lambda c: c.update(schedule={"name": "betas", "betas": [], "dtype": "float64"}), "T ≥ 1|betas"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_configs_at_odds(folder, change, message):
    change_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_training_record_of_another_kind_does_no_harm(folder):
    change_config(folder, lambda c: c.update(training=["a", "list"]))
    assert load_checkpoint(folder).training == {}


# ---------------------------------------------------------------------- what nobody thought of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.integers(0, 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = {
    "unet": [field.name for field in dataclasses.fields(UNET)],
    "spec": [field.name for field in dataclasses.fields(SPEC)],
    "schedule": ["name", "T", "beta_start", "beta_end", "dtype", "betas", "s", "max_beta", "zero_terminal_snr", "tau"],
}
QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def load_or_refuse(folder):
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error)) > 20
        return None


@QUIET
@given(value=JSON)
def test_any_json_is_refused_politely(folder, value):
    (folder / "config.json").write_text(json.dumps(value))
    assert load_or_refuse(folder) is None


@QUIET
@given(section=st.sampled_from(sorted(FIELDS)), data=st.data(), value=JSON)
def test_any_value_in_any_field_is_used_or_refused(folder, saved, section, data, value):
    config = json.loads((saved / "config.json").read_text())
    name = data.draw(st.sampled_from(FIELDS[section]))
    config[section][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = load_or_refuse(folder)
    if checkpoint is not None:  # then it can be sampled from, too
        labels = torch.zeros(1, dtype=torch.int64)
        out = checkpoint.network(torch.zeros(1, *SPEC.shape), torch.zeros(1, dtype=torch.int64), labels)
        assert out.shape == (1, *SPEC.shape)


@QUIET
@given(key=st.sampled_from(["format", "format_version", "unet", "spec", "schedule", "training"]), value=JSON)
def test_any_value_of_any_section_is_used_or_refused(folder, saved, key, value):
    config = json.loads((saved / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    load_or_refuse(folder)


@QUIET
@given(place=st.integers(0, 3000), value=st.binary(min_size=1, max_size=8))
def test_any_damage_to_the_header_is_refused_or_harmless(folder, saved, place, value):
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[place : place + len(value)] = value
    (folder / "model.safetensors").write_bytes(data)
    load_or_refuse(folder)
