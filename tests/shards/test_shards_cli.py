import json
import os

import numpy as np
import pytest
import torch

from fastddpm.sampler import Sampler
from tests.command_line import files, good, refused
from tests.tiny import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def usual(model, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return ["sample", model, "-n", 7, "--steps", 2, "--shards", "out", "--shard-size", 3]


def test_shards_hold_the_pictures_of_a_plain_command(fastddpm, place, model, usual):
    assert good(fastddpm(*usual)) == "wrote 3 shards (7 pictures) to out; all 3 are there\n"
    assert files(place / "out") == sorted(
        ["run.json", *(f"shard-0000{k}.{suffix}" for k in range(3) for suffix in ("json", "npz"))]
    )
    good(fastddpm("sample", model, "-n", 7, "--steps", 2, "--npz", "plain.npz", "--batch-size", 3, "--engine", "eager"))
    assert good(fastddpm("shards", "gather", "out", "all.npz")) == "wrote all.npz (7 pictures)\n"
    with np.load("plain.npz") as plain, np.load("all.npz") as gathered:
        assert gathered.files == plain.files
        assert all(np.array_equal(gathered[name], plain[name]) for name in plain.files)
    assert good(fastddpm(*usual)) == "out holds all 3 shards already\n"


@pytest.mark.parametrize("form", ["tar", "png"])
def test_other_formats(fastddpm, place, usual, form):
    good(fastddpm(*usual, "--format", form))
    assert good(fastddpm("shards", "verify", "out")) == "out: 3 of 3 shards are whole\n"
    assert good(fastddpm("shards", "gather", "out", "all.npz")) == "wrote all.npz (7 pictures)\n"


def test_the_engine_is_chosen_once_and_told(fastddpm, place, usual):
    assert fastddpm(*usual).err.startswith("engine: eager (")
    assert fastddpm(*usual).err == ""  # nothing was drawn
    os.remove("out/shard-00001.json")
    assert fastddpm(*usual).err == "engine: eager (as in the run that this one joins)\n"
    assert json.loads((place / "out" / "run.json").read_text())["engine"] == "eager"


def test_what_is_missing_and_damaged_is_listed(fastddpm, place, usual):
    good(fastddpm(*usual))
    (place / "out" / "shard-00000.json").unlink()
    archive = place / "out" / "shard-00002.npz"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    assert good(fastddpm("shards", "status", "out")) == "out: 2 of 3 shards, 4 of 7 pictures\n"
    done = fastddpm("shards", "verify", "out")
    assert (done.code, done.out.splitlines()) == (
        1,
        ["shard-00000 is missing", "shard-00002 is damaged: shard-00002.npz has another SHA-256 than its record says",
         "out: 1 of 3 shards are whole"],
    )  # fmt: skip
    done = fastddpm("shards", "gather", "out", "all.npz")
    assert done.code == 1 and done.out.splitlines()[-1] == "wrote nothing: 2 of 3 shards are not whole"
    assert not (place / "all.npz").exists()
    assert good(fastddpm(*usual)) == "wrote 2 shards (4 pictures; 1 had been damaged) to out; all 3 are there\n"


def test_status_says_who_is_at_what(fastddpm, place, usual):
    good(fastddpm(*usual))
    os.remove("out/shard-00002.json")
    (place / "out" / "shard-00002.claim").write_text('{"drawn": 1}')
    assert good(fastddpm("shards", "status", "out")).splitlines() == [
        "out: 2 of 3 shards, 6 of 7 pictures", "shard-00002 is claimed (1 pictures drawn when it last told)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "phrase"),
    [(["--seed", 1], "seed was 0, is 1"), (["--solver", "ddpm"], "solver was 'ddim', is 'ddpm'"),
     (["--class-labels", "1"], "classes was [0, 1, 2], is [1]"), (["--precision", "bf16"], "precision was 'fp32', is"),
     (["-n", 9], "n was 7, is 9"), (["--format", "png"], "format was 'npz', is 'png'"),
     (["--threshold", 0.9], "clip was 'spec', is {"), (["--eta", 0.5], "eta was None, is 0.5")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_another_run_in_the_same_place_is_refused_by_name(fastddpm, place, usual, options, phrase):
    good(fastddpm(*usual))
    before = files(place)
    refused(fastddpm(*usual, *options), "out holds a run with other settings", phrase, "use another place")
    assert files(place) == before


@pytest.mark.parametrize(
    ("options", "phrase"),
    [(["--grid", "a.png"], "--shards must be given without --grid"), (["--folder", "f"], "without --folder"),
     (["--shard-size", 0], "shard_size must be in 1"), (["--part", "2/2"], "--part must be I/N"),
     (["--part", "x"], "--part must be I/N, got 'x'"), (["-n", 0], "--n must be in 1"),
     (["--cpus-per-worker", 2], "--cpus-per-worker must be at least 1, and given with --ray"),
     (["--ray", "auto", "--part", "0/2"], "--part must be left out with --ray"),
     (["--shards", "nowhere://x"], "nowhere://x: must be a folder"), (["--class-labels", "9"], "--class-labels must")],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_written(fastddpm, place, usual, options, phrase):
    refused(fastddpm(*usual, *options), phrase)
    assert files(place) == []


def test_options_of_shards_need_shards(fastddpm, place, model):
    refused(fastddpm("sample", model, "-n", 2, "--part", "0/2"), "--part must be given with --shards, got it alone")
    assert files(place) == []


def test_a_folder_of_pictures_is_no_set_of_shards(fastddpm, place, model, usual):
    good(fastddpm("sample", model, "-n", 2, "--folder", "out"))
    refused(fastddpm(*usual), "out: run.json must be of a run with shards")
    refused(fastddpm("shards", "verify", "out"), "out: run.json must be of a run with shards")


@pytest.mark.parametrize("command", ["verify", "status"])
def test_a_place_without_shards(fastddpm, place, command):
    refused(fastddpm("shards", command, "nowhere"), "nowhere must hold a run's shards, got no run.json there")


def test_help_is_given_to_whoever_names_no_command(fastddpm):
    assert good(fastddpm("shards")).strip() == good(fastddpm("shards", "-h")).strip()
    assert all(f" {name} " in good(fastddpm("shards")) for name in ("verify", "gather", "status"))


def test_gathering_into_a_file_of_another_kind(fastddpm, place, usual):
    good(fastddpm(*usual))
    refused(fastddpm("shards", "gather", "out", "all.zip"), "all.zip: the name must end in .npz, got '.zip'; rename it")


@pytest.mark.parametrize(
    "environment", [{"RANK": "1", "WORLD_SIZE": "3"}, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}]
)
def test_the_launcher_says_where_to_begin(fastddpm, place, usual, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    drawn = []
    stream = Sampler.stream
    monkeypatch.setattr(
        Sampler, "stream", lambda self, n, **o: drawn.append(o["sample_ids"][0]) or stream(self, n, **o)
    )
    good(fastddpm(*usual))
    assert drawn[0] == 3 and sorted(drawn) == [0, 3, 6]


def test_the_local_rank_picks_the_gpu(fastddpm, place, usual, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = {}

    def look(name, **options):
        seen.update(options)
        raise ValueError("that will do for a test of where it is looked")

    monkeypatch.setattr(Sampler, "from_pretrained", look)
    refused(fastddpm(*usual), "that will do")
    assert seen["device"] == "cuda:1"
    refused(fastddpm(*usual, "--device", "cpu"), "that will do")
    assert seen["device"] == "cpu"


def test_a_place_that_is_no_folder(fastddpm, place, usual):
    (place / "out").write_text("precious")
    refused(fastddpm(*usual), "out: it must be a folder" if os.geteuid() else "out")
    assert (place / "out").read_text() == "precious"


def test_a_package_that_is_not_there(fastddpm, place, usual, monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    refused(fastddpm(*usual, "--shards", "s3://b/x"), "s3://b/x: needs a package (Install s3fs", "pip install s3fs")
    assert files(place) == []
