"""The command line: every option once, every bad input in one line, and nothing left half-done."""

import dataclasses
import importlib.metadata
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastddpm.cli.classes import class_cycle
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler
from tests.command_line import Result, files, good, refused
from tests.tiny import CLASSES, SPEC, T, command, environment, pictures, save_checkpoint, unconditional


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", training={"data": "made up", "step": 7})


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    """A checkpoint without classes."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "plain", *unconditional())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures to train on, as .npz."""
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    made = pictures(32)
    np.savez(path, images=made.images.permute(0, 2, 3, 1).numpy(), labels=made.labels.numpy())
    return path


def expected_pictures(model, n, **options):
    labels = [i % CLASSES for i in range(n)]
    return Sampler.from_pretrained(model).sample(n, class_labels=labels, output="uint8", progress=False, **options)


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["sample", "train", "info"])
def test_help_names_every_option(fastddpm, name):
    import inspect

    text = good(fastddpm(name, "--help"))
    parameters = inspect.signature(getattr(sys.modules[f"fastddpm.cli.{name}"], name)).parameters
    special = {
        "T": "--timesteps",
        "as_json": "--json",
        "conditional": "--classes",
        "classes": "--class-labels",
        "guidance": "--guidance-scale",
        "model": "model",
        "data": "data",
    }
    for parameter in parameters:
        assert special.get(parameter, "--" + parameter.replace("_", "-")) in text
    assert "…" not in "".join(re.findall(r"--[\w-]*…", text))


def test_help_lists_the_commands_also_when_none_is_given(fastddpm):
    assert good(fastddpm()).strip() == good(fastddpm("-h")).strip()
    assert all(f" {name} " in good(fastddpm("--help")) for name in ("sample", "train", "info"))


def test_version(fastddpm):
    assert good(fastddpm("--version")) == f"fastddpm {importlib.metadata.version('fastddpm')}\n"


def test_help_needs_no_torch():
    code = "import sys; from fastddpm.cli import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


# ---------------------------------------------------------------------- sample


def test_the_grid_is_the_default_output(fastddpm, place, model):
    out = good(fastddpm("sample", model, "-n", 5))
    assert out == "wrote samples/grid.png\n"
    with Image.open(place / "samples" / "grid.png") as image:
        assert image.mode == "L" and max(image.size) >= 480
    assert files(place) == ["samples", "samples/grid.png"]


def test_it_says_which_engine_ran_and_why(fastddpm, place, model):
    assert fastddpm("sample", model, "-n", 2, "--engine", "eager").err == "engine: eager (asked for)\n"
    assert (
        fastddpm("sample", model, "-n", 2, "--steps", 2).err == "engine: eager (2 steps are too few to compile for)\n"
    )
    assert fastddpm("sample", model, "-n", 2, "--steps", 2, "--quiet").err == ""


def test_the_folder_holds_the_samplers_pictures(fastddpm, place, model):
    assert good(fastddpm("sample", model, "--n", 4, "--folder", "out")) == "wrote 4 pictures to out/\n"
    for i, picture in enumerate(expected_pictures(model, 4)):
        assert np.array_equal(np.array(Image.open(place / "out" / f"{i:06d}.png")), picture[0].numpy())
    assert files(place / "out") == [*(f"{i:06d}.png" for i in range(4)), "run.json"]


def test_a_folder_is_continued(fastddpm, place, model):
    good(fastddpm("sample", model, "-n", 3, "--folder", "out"))
    (place / "out" / "000001.png").unlink()
    Image.new("L", (8, 8), 77).save(place / "out" / "000000.png")
    out = good(fastddpm("sample", model, "-n", 6, "--folder", "out", "--batch-size", 2))
    assert out == "wrote 4 pictures to out/ (2 were there already)\n"
    assert Image.open(place / "out" / "000000.png").getpixel((0, 0)) == 77  # it was not drawn again
    for i, picture in list(enumerate(expected_pictures(model, 6)))[1:]:
        difference = np.array(Image.open(place / "out" / f"{i:06d}.png")).astype(int) - picture[0].numpy()
        assert abs(difference).max() <= 1  # a rounding, where batches differ
    assert good(fastddpm("sample", model, "-n", 6, "--folder", "out")) == "out/ holds all 6 already\n"
    assert good(fastddpm("sample", model, "-n", 1, "--folder", "out")) == "out/ holds the picture already\n"


@pytest.mark.parametrize(
    ("options", "name"),
    [(["--seed", 1], "seed was 0, is 1"), (["--steps", 3], "steps was None, is 3"), (["--solver", "ddpm"], "solver"),
     (["--guidance-scale", 2], "guidance was 1.0, is 2.0"), (["--class-labels", "1"], "classes was 'all', is '1'"),
     (["--precision", "bf16"], "precision was 'fp32', is 'bf16'")],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(fastddpm, place, model, options, name):
    good(fastddpm("sample", model, "-n", 2, "--folder", "out"))
    before = files(place)
    assert refused(fastddpm("sample", model, "-n", 4, "--folder", "out", *options), "other settings", name)
    assert files(place) == before


def test_a_folder_of_other_weights_is_refused_and_of_moved_ones_not(fastddpm, place, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    good(fastddpm("sample", model, "-n", 2, "--folder", "out"))
    good(fastddpm("sample", copy, "-n", 3, "--folder", "out"))
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "conv_out.bias": weights["conv_out.bias"] + 1}, copy / "model.safetensors")
    refused(fastddpm("sample", copy, "-n", 4, "--folder", "out"), "other settings", "weights")


def test_a_folder_continued_with_another_engine_says_so(fastddpm, place, model):
    good(fastddpm("sample", model, "-n", 1, "--folder", "out"))
    out = good(fastddpm("sample", model, "-n", 2, "--folder", "out", "--engine", "eager"))
    assert out.splitlines() == [
        "engine was auto, is eager: pictures differ by rounding", "wrote 1 picture to out/ (1 were there already)"
    ]  # fmt: skip


def test_a_folder_of_other_conventions_is_refused(fastddpm, place, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    good(fastddpm("sample", copy, "-n", 1, "--folder", "out"))
    config = json.loads((copy / "config.json").read_text())
    for part, change in (("spec", {"clip": 0.5}), ("schedule", {"beta_end": 0.03})):
        (copy / "config.json").write_text(json.dumps({**config, part: {**config[part], **change}}))
        refused(fastddpm("sample", copy, "-n", 2, "--folder", "out"), "other settings: conventions was")


def test_a_folder_that_older_versions_began_is_continued(fastddpm, place, model):
    good(fastddpm("sample", model, "-n", 1, "--folder", "out"))
    settings = json.loads((place / "out" / "run.json").read_text())
    old = {name: value for name, value in settings.items() if name not in ("precision", "engine", "conventions")}
    (place / "out" / "run.json").write_text(json.dumps(old))
    refused(fastddpm("sample", model, "-n", 2, "--folder", "out", "--precision", "bf16"), "precision was 'fp32'")
    assert good(fastddpm("sample", model, "-n", 2, "--folder", "out")).startswith("wrote 1 picture to out/")


def test_somebodys_pictures_are_no_run(fastddpm, place, model):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").touch()
    good(fastddpm("sample", model, "-n", 1, "--folder", "out"))
    (place / "out" / "run.json").unlink()
    before = files(place)
    refused(
        fastddpm("sample", model, "-n", 2, "--folder", "out"), "out must be a run's, got 000000.png without run.json"
    )
    assert files(place) == before


def test_what_killed_runs_left_is_removed(fastddpm, place, model):
    good(fastddpm("sample", model, "-n", 1, "--folder", "out", "--grid", "grids/a.png"))
    left = ["out/.000001.12345678.tmp.png", "out/.fastddpm.12345678.tmp.png", "grids/.fastddpm.12345678.tmp.png"]
    for name in left:
        (place / name).touch()
    good(fastddpm("sample", model, "-n", 1, "--folder", "out", "--grid", "grids/a.png"))
    assert files(place) == ["grids", "grids/a.png", "out", "out/000000.png", "out/run.json"]


@pytest.mark.parametrize("option", ["--grid", "--npz", "--gif"])
def test_links_are_not_written_through(fastddpm, place, model, option):
    name = "a.npz" if option == "--npz" else f"a.{option.removeprefix('--').replace('grid', 'png')}"
    (place / "precious").write_text("precious")
    (place / name).symlink_to("precious")
    refused(fastddpm("sample", model, "-n", 1, option, name), f"cannot write {name}: it is a symbolic link")
    assert (place / "precious").read_text() == "precious" and (place / name).is_symlink()


@pytest.mark.parametrize("name", ["x" * 245 + ".png", "ä" * 124 + ".png"], ids=["ascii", "two bytes each"])
def test_long_names(fastddpm, place, model, name):
    assert good(fastddpm("sample", model, "-n", 1, "--grid", name)) == f"wrote {name}\n"
    refused(fastddpm("sample", model, "-n", 1, "--grid", "xxxxxxx" + name), "file name too long; choose a shorter name")
    assert files(place) == [name]


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "7", '"x"', "{}", "[" * 10**5])
def test_a_damaged_run_file(fastddpm, place, model, text):
    good(fastddpm("sample", model, "-n", 1, "--folder", "out"))
    (place / "out" / "run.json").write_text(text)
    refused(fastddpm("sample", model, "-n", 2, "--folder", "out"), "run")


def test_npz_layout(fastddpm, place, model):
    assert good(fastddpm("sample", model, "-n", 5, "--npz", "a.npz", "--batch-size", 5)) == "wrote a.npz\n"
    with np.load(place / "a.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_0"].shape == (5, 8, 8, 1)
        assert archive["arr_1"].tolist() == [0, 1, 2, 0, 1]
        assert np.array_equal(archive["arr_0"], expected_pictures(model, 5).permute(0, 2, 3, 1).numpy())


def test_npz_without_classes(fastddpm, place, plain_model):
    good(fastddpm("sample", plain_model, "-n", 2, "--npz", "a.npz"))
    with np.load(place / "a.npz") as archive:
        assert archive.files == ["arr_0"]


def test_gif_shows_the_way_to_the_pictures(fastddpm, place, model):
    good(fastddpm("sample", model, "-n", 4, "--gif", "a.gif", "--steps", 7))
    with Image.open(place / "a.gif") as movie:
        assert movie.n_frames == 7 and max(movie.size) >= 240
        movie.seek(6)
        last = movie.convert("L")
    good(fastddpm("sample", model, "-n", 4, "--grid", "a.png", "--steps", 7))
    grid = Image.open(place / "a.png").resize(last.size, Image.Resampling.NEAREST)
    assert abs(np.array(last).astype(int) - np.array(grid)).max() <= 2


def test_long_runs_make_short_gifs(fastddpm, place, plain_model, tmp_path):
    from fastddpm.cli.drawing import GIF_FRAMES, evenly

    assert len(set(evenly(1000, GIF_FRAMES))) == GIF_FRAMES and max(evenly(1000, GIF_FRAMES)) == 1000
    assert evenly(3, GIF_FRAMES) == [1, 2, 3]


def test_all_outputs_together_show_the_same_pictures(fastddpm, place, model):
    outputs = ["--grid", "deep/down/g.png", "--folder", "f", "--npz", "a.npz", "--gif", "m.gif"]
    out = good(fastddpm("sample", model, "-n", 5, "--batch-size", 2, "--first-id", 1, *outputs))
    assert out.splitlines() == ["wrote 5 pictures to f/", "wrote deep/down/g.png", "wrote a.npz", "wrote m.gif"]
    with np.load(place / "a.npz") as archive:
        for i in range(5):
            assert np.array_equal(np.array(Image.open(place / "f" / f"{i + 1:06d}.png")), archive["arr_0"][i, :, :, 0])


def test_a_large_grid_draws_only_what_it_shows(fastddpm, place, model):
    out = good(fastddpm("sample", model, "-n", 401, "--steps", 1, "--grid", "g.png", "--gif", "m.gif"))
    assert out == "wrote g.png (the first 400 of 401)\nwrote m.gif (the first 64 of 401)\n"


@pytest.mark.parametrize(
    ("classes", "labels"),
    [("all", [0, 1, 2, 0]), ("2", [2] * 4), ("2,0", [2, 0, 2, 0]), ("dot, bar", [1, 0, 1, 0]), ("none", [3] * 4)],
)
def test_classes(fastddpm, place, model, classes, labels):
    good(fastddpm("sample", model, "-n", 4, "--class-labels", classes, "--folder", "out"))
    expected = Sampler.from_pretrained(model).sample(4, class_labels=labels, output="uint8", progress=False)
    for i in range(4):
        assert np.array_equal(np.array(Image.open(place / "out" / f"{i:06d}.png")), expected[i, 0].numpy())


ANSWERS = {
    "number": (SPEC, "11", "all, none, numbers in 0 … 2 or names (bar, dot, 2), with commas between several, got '11'"),
    "no names": ({"class_names": None}, "3", "must be all, none or numbers in 0 … 2, with commas between several"),
    "no null class": ({"class_names": None, "null_class": None}, "3", "must be all or numbers in 0 … 2, with commas"),
    "names are the numbers": ({"class_names": ("0", "1", "2")}, "11", "must be all, none or numbers in 0 … 2, with"),
    "names are other numbers": ({"class_names": ("3", "1", "0")}, "2", "must be all, none or names (3, 1, 0), with"),
    "many names": (
        {"class_names": tuple("abcdefg"), "num_classes": 7, "null_class": 7}, "h",
        "names (a, b, c, d, e …), with commas between several, got 'h'; fastddpm info MODEL lists them",
    ),
    "empty": (SPEC, "1,", "got ''; pick some of these"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_said_of_classes_that_are_not_there(case):
    changes, text, answer = case
    spec = SPEC if changes is SPEC else dataclasses.replace(SPEC, **changes)
    with pytest.raises(ValueError, match=re.escape(answer)):
        class_cycle(spec, text, "MODEL")


@pytest.mark.parametrize(
    ("names", "text", "labels"),
    [(("bar", "dot", "2"), "02,bar", [2, 0]), (("3", "1", "0"), "1,0,3", [1, 2, 0]), (None, "2, 0", [2, 0])],
)
def test_names_count_before_numbers(names, text, labels):
    assert class_cycle(dataclasses.replace(SPEC, class_names=names), text, "MODEL") == labels


@pytest.mark.parametrize(
    ("shape", "option", "phrases"),
    [((5, 8, 8), "--grid=a.png", ("1, 3 or 4 channels to be shown, got 5", "--npz")),
     ((2, 8, 8), "--folder=out", ("got 2; write them with --npz",)), ((5, 8, 8), "--quiet", ("got 5",)),
     ((2, 8, 8), "--gif=a.gif", ("got 2",)), ((4, 8, 8), "--grid=a.jpg", ("with an alpha must be written as .png",)),
     ((1, 8192, 8), "--grid=a.webp", (".webp must have at most 16,383 pixels a side, got 81,942",)),
     ((1, 16384, 8), "--grid=a.jpg", (".jpg must have at most 65,500",)),
     ((1, 16384, 8), "--gif=a.gif", (".gif must have at most 65,535",))],
    ids=str,
)  # fmt: skip
def test_what_a_file_cannot_hold_is_refused_before_the_first_step(fastddpm, place, monkeypatch, shape, option, phrases):
    def network(x, t):
        raise AssertionError("a step was made")

    sampler = Sampler(network, NoiseSchedule.linear(T), ModelSpec(shape=shape), engine="eager", device="cpu")
    monkeypatch.setattr(Sampler, "from_pretrained", lambda *_, **__: sampler)
    refused(fastddpm("sample", "any", "-n", 100, option), *phrases)
    assert files(place) == []


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_what_a_file_can_hold_is_written(fastddpm, place, monkeypatch, channels, name):
    spec = ModelSpec(shape=(channels, 8, 8))
    sampler = Sampler(lambda x, t: x, NoiseSchedule.linear(T), spec, engine="eager", device="cpu")
    monkeypatch.setattr(Sampler, "from_pretrained", lambda *_, **__: sampler)
    good(fastddpm("sample", "any", "-n", 2, "--steps", 2, "--gif" if name == "a.gif" else "--grid", name))
    with Image.open(place / name) as image:
        image.load()


@pytest.mark.parametrize(
    "options",
    [["--solver", "ddpm"], ["--solver", "ddpm", "--steps", 5], ["--solver", "dpmpp_2m", "--steps", 4],
     ["--timesteps", "5"], ["--timesteps", "ddim5"], ["--timesteps", "1,2,3"], ["--eta", 0.5],
     ["--guidance-scale", 2.5], ["--threshold", 0.9], ["--seed", 2**64 - 1], ["--device", "cpu"],
     ["--first-id", 2**63 - 2]],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_options_reach_the_sampler(fastddpm, place, model, options):
    """Each option changes the picture, in the same way as the sampler's argument of that name does."""
    from fastddpm.process.table import DynamicThreshold

    good(fastddpm("sample", model, "-n", 2, "--npz", "a.npz", *options))
    arguments = {
        name.lstrip("-").replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)
    }
    first = arguments.pop("first_id", 0)
    if "threshold" in arguments:
        arguments["clip"] = DynamicThreshold(arguments.pop("threshold"))
    sampler = Sampler.from_pretrained(model, device=arguments.pop("device", None))
    ids = [first, first + 1]
    labels = [i % CLASSES for i in ids]
    expected = sampler.sample(2, sample_ids=ids, class_labels=labels, output="uint8", progress=False, **arguments)
    with np.load(place / "a.npz") as archive:
        assert np.array_equal(archive["arr_0"], expected.permute(0, 2, 3, 1).numpy())


def test_quiet_is_silent(fastddpm, place, model):
    assert good(fastddpm("sample", model, "-n", 1, "--quiet")) == ""
    assert files(place) == ["samples", "samples/grid.png"]


# ---------------------------------------------------------------------- info


def test_info(fastddpm, model, plain_model):
    text = good(fastddpm("info", model))
    assert all(word in text for word in ("fastddpm", "eps", "bar, dot, 2", "linear", "made up", "1 × 8 × 8", "cpu"))
    assert "none" in good(fastddpm("info", plain_model))
    assert "mnist" in good(fastddpm("info"))


def test_info_as_json(fastddpm, model):
    facts = json.loads(good(fastddpm("info", model, "--json")))
    assert facts["checkpoint"]["class names"] == list(SPEC.class_names)
    assert facts["checkpoint"]["training"] == {"data": "made up", "step": 7}
    assert facts["machine"]["versions"]["fastddpm"]
    assert json.loads(good(fastddpm("info", "--json")))["shipped checkpoints"] == ["mnist"]


# ---------------------------------------------------------------------- train

TINY = ["--channels", "8,8", "--layers", 1, "--norm-groups", 4, "--batch-size", 16, "--timesteps", 20]


def test_train_then_sample(fastddpm, place, data):
    result = fastddpm("train", data, "--out", "run", "--epochs", 2, *TINY)
    assert result.code == 0
    assert result.out.splitlines()[0].startswith("32 pictures (1, 8, 8) from pictures.npz, 3 classes; ")
    assert result.out.splitlines()[-1] == "wrote run; sample from it with: fastddpm sample run"
    assert [line.split(":")[0] for line in result.err.splitlines()] == [
        "epoch 1", "wrote run/samples/epoch_0001.png", "epoch 2", "wrote run/samples/epoch_0002.png"
    ]  # fmt: skip
    assert files(place / "run") == [
        "config.json", "metrics.jsonl", "model.safetensors", "samples", "samples/epoch_0001.png",
        "samples/epoch_0002.png", "train_state.safetensors",
    ]  # fmt: skip
    good(fastddpm("sample", "run", "-n", 2, "--guidance-scale", 2))
    lines = good(fastddpm("train", data, "--out", "run", "--epochs", 2, *TINY)).splitlines()
    assert lines[1:] == ["run is trained already: step 4 of 4", "sample from it with: fastddpm sample run"]


@pytest.mark.parametrize("channels", [4, 5])
def test_pictures_of_many_channels_train_and_sample(fastddpm, place, channels):
    values = np.random.default_rng(0).integers(0, 256, (16, 8, 8, channels), dtype=np.uint8)
    np.savez(place / "bands.npz", images=values)
    result = fastddpm("train", "bands.npz", "--out", "run", "--epochs", 1, *TINY)
    assert result.code == 0 and f"16 pictures ({channels}, 8, 8) from bands.npz, no classes" in result.out
    said = "no grids of samples: pictures of 5 channels cannot be shown" in result.out
    assert said == (channels == 5) and (place / "run" / "samples").exists() == (channels == 4)
    good(fastddpm("sample", "run", "-n", 2, "--steps", 2, "--npz", "a.npz"))
    with np.load(place / "a.npz") as archive:
        assert archive["arr_0"].shape == (2, 8, 8, channels)


def test_train_says_what_was_decided_about_the_pictures(fastddpm, place):
    for i in range(16):
        shade = np.random.default_rng(i).integers(0, 256, (8, 8) if i else (8, 8, 3), dtype=np.uint8)
        (place / "data" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade).save(place / "data" / "one" / f"{i}.png")
    result = fastddpm("train", "data", "--out", "run", "--epochs", 1, "--stop-after", 1, "--no-grids", *TINY)
    lines = result.out.splitlines()
    assert lines[0].startswith("16 pictures (3, 8, 8) from data, 1 class; ")
    assert lines[1] == "pictures: 15 gray, 1 in colour: all become in colour"


def test_every_option_of_train_once(fastddpm, place, data):
    options = [
        "--no-classes", "--lr", 1e-4, "--lr-schedule", "constant", "--warmup", 1, "--weight-decay", 0.01, "--ema", 0.5,
        "--grad-clip", 0.5, "--label-dropout", 0.2, "--hflip", "--attention", "8,4", "--head-channels", 4,
        "--scale-shift", "--dropout", 0.1, "--schedule", "cosine", "--prediction", "v", "--variance", "learned_range",
        "--seed", 3, "--save-every", 1, "--bf16", "--weights", "fp16", "--gradient-checkpointing", "--no-grids",
        "--stop-after", 1, "--device", "cpu",
    ]  # fmt: skip
    assert fastddpm("train", data, "--out", "run", *TINY, *options).code == 0
    assert not (place / "run" / "samples").exists()
    facts = json.loads((place / "run" / "config.json").read_text())
    assert facts["unet"]["attention"] == [True, True] and facts["unet"]["head_channels"] == 4
    assert facts["unet"]["scale_shift"] is True and facts["unet"]["dropout"] == 0.1
    assert facts["unet"]["out_channels"] == 2 and facts["unet"]["num_classes"] is None
    assert facts["schedule"]["name"] == "cosine" and facts["schedule"]["T"] == 20
    assert facts["spec"]["prediction"] == "v" and facts["spec"]["variance"] == "learned_range"
    wanted = {
        "learning_rate": 1e-4, "lr_schedule": "constant", "warmup": 1, "weight_decay": 0.01, "ema_decay": 0.5,
        "grad_clip": 0.5, "label_dropout": 0.2, "hflip": True, "seed": 3, "save_every": 1, "autocast": "bf16",
        "weights_dtype": "fp16", "gradient_checkpointing": True, "step": 1, "epochs": 10, "batch_size": 16,
    }  # fmt: skip
    assert {name: facts["training"][name] for name in wanted} == wanted
    good(fastddpm("sample", "run", "-n", 1, "--solver", "ddpm"))


def test_without_label_dropout_there_is_no_guidance(fastddpm, place, data):
    assert fastddpm("train", data, "--out", "run", *TINY, "--label-dropout", 0, "--stop-after", 1).code == 0
    facts = json.loads((place / "run" / "config.json").read_text())
    assert facts["spec"]["null_class"] is None and facts["unet"]["num_classes"] == CLASSES
    refused(fastddpm("sample", "run", "--guidance-scale", 2), "guidance_scale", "trained without dropping labels")


def test_train_on_a_folder_of_images(fastddpm, place):
    for i in range(4):
        path = place / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (60 * i, 0, 0)).save(path)
    options = ["--size", 8, *TINY[:-4], "--batch-size", 2, "--timesteps", 5, "--stop-after", 1]
    assert fastddpm("train", "pictures", "--out", "run", *options).code == 0
    facts = json.loads((place / "run" / "config.json").read_text())
    assert facts["spec"]["shape"] == [3, 8, 8] and facts["spec"]["class_names"] == ["a", "b"]


def test_train_resumes_with_the_same_command_only(fastddpm, place, data):
    assert fastddpm("train", data, "--out", "run", *TINY, "--stop-after", 1).code == 0
    refused(fastddpm("train", data, "--out", "run", *TINY, "--lr", 1), "config.learning_rate was 0.001, is 1.0")
    result = fastddpm("train", data, "--out", "run", *TINY, "--stop-after", 1)
    assert result.code == 0 and "run goes on at step 1 of 20" in result.out


# ---------------------------------------------------------------------- bad input

BAD_SAMPLE = {
    "no model": ([], "Missing argument"),
    "unknown option": (["{model}", "--nope"], "--nope"),
    "unknown solver": (["{model}", "--solver", "euler"], "euler"),
    "missing": (["nowhere"], "no checkpoint at nowhere"),
    "empty name": ([""], "not a checkpoint"),
    "a file": (["{model}/model.safetensors"], "is a file of a checkpoint; give its folder"),
    "n 0": (["{model}", "-n", "0"], "--n must be in 1"),
    "n negative": (["{model}", "-n", "-3"], "--n must be in 1"),
    "n absurd": (["{model}", "-n", str(10**15)], "--n must be in 1", "--first-id"),
    "n absurd, folder": (["{model}", "-n", str(10**15), "--folder", "f"], "--n must be in 1"),
    "n no number": (["{model}", "-n", "many"], "--n", "valid integer"),
    "n no integer": (["{model}", "-n", "1.5"], "--n", "valid integer"),
    "steps 0": (["{model}", "--steps", "0"], "steps must be in 1 … 20", "got 0"),
    "steps negative": (["{model}", "--steps", "-1"], "steps must be in 1"),
    "steps > T": (["{model}", "--steps", "21"], "steps must be in 1 … 20", "got 21"),
    "steps enormous": (["{model}", "--steps", str(10**30)], "steps must be in 1"),
    "steps and timesteps": (["{model}", "--steps", "5", "--timesteps", "5"], "both"),
    "timesteps empty": (["{model}", "--timesteps", ""], "--timesteps must be like"),
    "timesteps blank": (["{model}", "--timesteps", " "], "--timesteps must be like"),
    "timesteps commas": (["{model}", "--timesteps", ",,"], "respace"),
    "timesteps 0": (["{model}", "--timesteps", "0"], "at least one step"),
    "timesteps > T": (["{model}", "--timesteps", "21"], "at most 20"),
    "timesteps enormous": (["{model}", "--timesteps", "9" * 5000], ""),
    "timesteps words": (["{model}", "--timesteps", "ddim"], "respace"),
    "timesteps negative": (["{model}", "--timesteps=-5"], "respace"),
    "eta high": (["{model}", "--eta", "1.5"], "eta"),
    "eta for ddpm": (["{model}", "--eta", "0.5", "--solver", "ddpm"], "eta"),
    "eta nan": (["{model}", "--eta", "nan"], "eta"),
    "class too high": (["{model}", "--class-labels", "3"], "0 … 2", "'3'"),
    "class negative": (["{model}", "--class-labels=-1"], "0 … 2"),
    "class enormous": (["{model}", "--class-labels", "9" * 40], "0 … 2"),
    "class unknown": (["{model}", "--class-labels", "cat"], "'cat'", "bar"),
    "class empty": (["{model}", "--class-labels", ""], "0 … 2"),
    "classes of none": (["{plain}", "--class-labels", "1"], "no classes"),
    "guidance of none": (["{plain}", "--guidance-scale", "2"], "guidance_scale"),
    "guidance nan": (["{model}", "--guidance-scale", "nan"], "guidance_scale"),
    "guidance without class": (["{model}", "--guidance-scale", "2", "--class-labels", "none"], "guidance_scale"),
    "threshold 0": (["{model}", "--threshold", "0"], "ratio must be in (0, 1]"),
    "threshold nan": (["{model}", "--threshold", "nan"], "ratio"),
    "seed negative": (["{model}", "--seed", "-1"], "seed must be in [0, 2**64)"),
    "seed high": (["{model}", "--seed", str(2**64)], "seed must be in"),
    "seed no number": (["{model}", "--seed", "x"], "x"),
    "first id negative": (["{model}", "--first-id", "-1"], "--first-id must be in"),
    "first id high": (["{model}", "--first-id", str(2**63)], "--first-id must be in"),
    "batch size 0": (["{model}", "--batch-size", "0"], "batch_size must be a positive int"),
    "batch size 0, folder": (["{model}", "--batch-size", "0", "--folder", "f"], "batch_size"),
    "batch size negative": (["{model}", "--batch-size", "-4"], "batch_size"),
    "steps, folder": (["{model}", "--steps", "0", "--folder", "f"], "steps must be in 1"),
    "device unknown": (["{model}", "--device", "toaster"], "device must be cpu, cuda or cuda:N"),
    "device meta": (["{model}", "--device", "meta"], "device must be cpu"),
    "grid suffix": (["{model}", "--grid", "a.txt"], "must end in .png"),
    "grid no suffix": (["{model}", "--grid", "a"], "no suffix"),
    "npz suffix": (["{model}", "--npz", "a.npy"], "must end in .npz"),
    "gif suffix": (["{model}", "--gif", "a.png"], "must end in .gif"),
    "grid is a folder": (["{model}", "--grid", "{dir}"], "give a file name"),
    "folder is a file": (["{model}", "--folder", "{file}"], "must be a folder"),
    "grid below a file": (["{model}", "--grid", "{file}/a/b.png"], "must be a folder"),
    "npz below a file": (["{model}", "--npz", "{file}/b.npz"], "must be a folder"),
    "folder below a file": (["{model}", "--folder", "{file}/b"], "must be a folder"),
    "name too long": (["{model}", "--folder", "x" * 300], "too long"),
    "npz of terabytes": (["{large}", "-n", "10000000", "--npz", "a.npz"], "--npz must hold at most 64 GiB"),
}  # fmt: skip


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    unet, spec = unconditional()
    unet = dataclasses.replace(unet, sample_size=(256, 256))
    return save_checkpoint(
        tmp_path_factory.mktemp("models") / "large", unet, dataclasses.replace(spec, shape=(1, 256, 256))
    )


@pytest.mark.parametrize("case", BAD_SAMPLE.values(), ids=BAD_SAMPLE.keys())
def test_bad_input_to_sample(fastddpm, place, model, plain_model, large_model, tmp_path, case):
    arguments, *phrases = case
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "file").write_text("a file")
    names = {"model": model, "plain": plain_model, "large": large_model}
    names |= {"dir": tmp_path / "dir.png", "file": tmp_path / "file"}
    before = files(tmp_path)
    refused(fastddpm("sample", *(argument.format(**names) for argument in arguments)), *phrases)
    assert files(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fastddpm, place, model):
    refused(fastddpm("sample", model, "--device", "cuda"), "0 GPUs; use cpu")


class Evil:
    """Leaves a folder behind if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def damage(checkpoint, kind):
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors = load_file(weights)
    if kind == "PNG":
        Image.new("L", (9, 9)).save(weights, "PNG")
    elif kind == "pickle":
        weights.write_bytes(pickle.dumps(Evil(checkpoint.parent / "trace")))
    elif kind == "empty config":
        config.write_bytes(b"")
    elif kind == "list":
        config.write_text("[1]")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "NaN":
        tensors["conv_out.bias"].fill_(float("nan"))
        save_file(tensors, weights)
    elif kind == "shape":
        save_file({**tensors, "conv_out.bias": torch.zeros(9)}, weights)
    elif kind == "huge numbers":
        config.write_text(config.read_text().replace('"layers": 1', f'"layers": {10**4000}'))
    else:
        weights.write_bytes(weights.read_bytes()[: int(kind)])


DAMAGES = [
    "PNG", "pickle", "empty config", "list", "no weights", "NaN", "shape", "huge numbers", "0", "7", "500", "-1"
]  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["sample", "info"])
def test_damaged_checkpoints(fastddpm, place, model, tmp_path, name, kind):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    damage(damaged, kind)
    refused(fastddpm(name, damaged), "damaged")
    assert files(place) == [] and not (tmp_path / "trace").exists()


def test_a_pickle_by_itself(fastddpm, place, tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    for name in ("sample", "info", "train"):
        refused(fastddpm(name, tmp_path / "model.pt", *(["--out", "run"] if name == "train" else [])), "model.pt")
    assert files(place) == [] and not (tmp_path / "trace").exists()


def test_a_network_that_breaks_down_says_where(fastddpm, place, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["stem.weight"].fill_(3e38)
    save_file(weights, broken / "model.safetensors")
    refused(fastddpm("sample", broken, "-n", 1), "NaN or infinity from step 1 of 20")
    assert files(place) == []


BAD_TRAIN = {
    "no out": (["{data}"], "--out"),
    "missing data": (["nowhere", "--out", "run"], "pictures nowhere do not exist"),
    "empty folder": (["{dir}", "--out", "run"], "no images found"),
    "foreign file": (["{file}", "--out", "run"], "not an idx file"),
    "missing labels": (["{idx}", "--out", "run", "--labels", "nowhere"], "nowhere: no such file"),
    "out below a file": (["{data}", "--out", "{file}/run"], "must be a folder"),
    "out is a file": (["{data}", "--out", "{file}"], "must be a folder"),
    "batch size": (["{data}", "--out", "run", "--batch-size", "33"], "at most the 32 pictures"),
    "batch size 0": (["{data}", "--out", "run", "--batch-size", "0"], "batch_size must be an integer in [1"),
    "epochs": (["{data}", "--out", "run", "--epochs", "0"], "epochs must be an integer in"),
    "lr": (["{data}", "--out", "run", "--lr", "-1"], "learning_rate must be a number in"),
    "lr nan": (["{data}", "--out", "run", "--lr", "nan"], "learning_rate must be a number in"),
    "channels": (["{data}", "--out", "run", "--channels", "8;8"], "--channels must be whole numbers"),
    "channels 0": (["{data}", "--out", "run", "--channels", "0"], "channels"),
    "channels empty": (["{data}", "--out", "run", "--channels", ""], "--channels"),
    "levels": (["{data}", "--out", "run", "--channels", "8,8,8,8,8"], "divisible by 16"),
    "layers": (["{data}", "--out", "run", "--layers", str(10**9)], "layers must be"),
    "groups": (["{data}", "--out", "run", "--norm-groups", "7"], "norm_groups=7"),
    "attention": (["{data}", "--out", "run", "--attention", "5"], "--attention must be among"),
    "heads": (["{data}", "--out", "run", "--channels", "8,8", "--head-channels", "3"], "head_channels"),
    "timesteps": (["{data}", "--out", "run", "--timesteps", "0"], "T must be in"),
    "timesteps enormous": (["{data}", "--out", "run", "--timesteps", str(10**15)], "T must be in"),
    "seed": (["{data}", "--out", "run", "--seed", str(2**63)], "seed must be an integer in"),
    "size of npz": (["{data}", "--out", "run", "--size", "8"], "--size must be left out"),
    "stop after": (["{data}", "--out", "run", "--stop-after", "0", *map(str, TINY)], "stop_after must be at least 1"),
    "device": (["{data}", "--out", "run", "--device", "toaster"], "device must be"),
    "enormous network": (["{data}", "--out", "run", "--channels", "65536,65536"], "not enough memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRAIN.values(), ids=BAD_TRAIN.keys())
def test_bad_input_to_train(fastddpm, place, data, tmp_path, case):
    arguments, *phrases = case
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "idx").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4]))
    names = {"data": data, "dir": tmp_path / "dir", "file": tmp_path / "file", "idx": tmp_path / "idx"}
    before = files(tmp_path)
    refused(fastddpm("train", *(argument.format(**names) for argument in arguments)), *phrases)
    assert files(tmp_path) == before


# ---------------------------------------------------------------------- full disks, Ctrl-C, two at once, terminals

FULL_DISK = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); from fastddpm.cli import main; main()"
)


@pytest.mark.parametrize(
    "option",
    ["--grid=a.png", *(pytest.param(other, marks=pytest.mark.slow) for other in ("--npz=a.npz", "--gif=a.gif"))],
)
def test_a_full_disk(place, model, option):
    """The largest size of a file stands in for the full disk."""
    arguments = [sys.executable, "-c", FULL_DISK, "sample", str(model), "-n", "20", "--steps", "3", option]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=place, timeout=240)
    refused(Result(done.returncode, done.stdout, done.stderr), f"{option[6:].lstrip('=')}: file too large; make room")
    assert files(place) == []


def stop(process, when):
    """Press Ctrl-C as soon as `when` holds; returns what the process said."""
    try:
        deadline = time.monotonic() + 240
        while not when():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


def start(*arguments, cwd):
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=cwd
    )


def test_ctrl_c_while_sampling_and_going_on(fastddpm, place, model):
    arguments = ["sample", model, "-n", 60, "--folder", "out", "--batch-size", 1, "--steps", 8]
    process = start(*arguments, cwd=place)
    result = stop(process, lambda: (place / "out" / "000003.png").exists())
    assert result.code == 130
    assert result.err == "fastddpm: stopped; the same command continues\n"
    names = files(place / "out")
    assert 4 < len(names) < 61 and not [name for name in names if "tmp" in name]
    good(fastddpm(*arguments))
    assert len(files(place / "out")) == 61


def test_ctrl_c_while_training_saves(fastddpm, place, data):
    arguments = ["train", data, "--out", "run", *TINY, "--epochs", 40, "--no-grids", "--save-every", 1]
    process = start(*arguments, cwd=place)
    result = stop(process, lambda: (place / "run" / "train_state.safetensors").exists())
    assert result.code == 130
    last = result.err.splitlines()[-1]
    step = int(re.fullmatch(r"fastddpm: stopped at step (\d+); the same command continues from there", last).group(1))
    assert json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
    assert not [name for name in files(place / "run") if "tmp" in name]
    assert f"goes on at step {step} of 80" in fastddpm(*arguments, "--stop-after", 1).out


@pytest.mark.slow
def test_two_processes_may_share_a_folder(place, model):
    arguments = ["sample", model, "-n", 8, "--folder", "out", "--batch-size", 2]
    processes = [start(*arguments, cwd=place) for _ in range(2)]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert files(place / "out") == [*(f"{i:06d}.png" for i in range(8)), "run.json"]
    for i, picture in enumerate(expected_pictures(model, 8)):
        difference = np.array(Image.open(place / "out" / f"{i:06d}.png")).astype(int) - picture[0].numpy()
        assert abs(difference).max() <= 1


def on_a_terminal(*arguments, cwd):
    """What a command shows on a terminal, with its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm"), cwd=cwd
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end was closed: the process has ended
            break
        if not piece:
            break
        shown += piece
    process.communicate(timeout=60)
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_progress_is_shown_on_terminals_as_one_bar(place, model):
    code, shown = on_a_terminal("sample", model, "-n", 6, "--folder", "out", "--batch-size", 2, "--steps", 5, cwd=place)
    assert code == 0
    totals = set(re.findall(r"sampling (\d+) pictures.*?(\d+)/(\d+) steps", shown))
    assert {(pictures, total) for pictures, _, total in totals} == {("6", "15")}
    assert "15/15" in shown


@pytest.mark.slow
def test_quiet_on_a_terminal(place, model):
    assert on_a_terminal("sample", model, "-n", 1, "--steps", 2, "-q", cwd=place) == (0, "")


@pytest.mark.slow
def test_training_shows_its_progress_on_terminals(place, data):
    code, shown = on_a_terminal("train", data, "--out", "run", *TINY, "--epochs", 1, "--no-grids", cwd=place)
    assert code == 0
    assert re.search(r"2/2 steps · loss \d\.\d+ · \d+ images/s", shown) and "epoch 1: loss" in shown


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(place, model):
    shell = f"{' '.join(command('info', model))} | head -c 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stderr == "" and len(done.stdout) == 1


def test_defects_of_the_program_keep_their_traceback(monkeypatch):
    from fastddpm.cli.errors import report

    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError("a defect"))
    monkeypatch.setenv("FASTDDPM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad input"):
        report(ValueError("bad input"))
