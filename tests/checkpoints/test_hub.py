"""Names on the Hugging Face Hub: what is fetched, what the cache serves, and what is said where there is neither."""

import fnmatch
import json
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.checkpoints import hub
from fastddpm.checkpoints.hub import HubId, parse_id
from fastddpm.cli import main
from tests.checkpoints.test_diffusers_folders import STEM, folder, same, shard
from tests.foreign import FLAGS, diffusers_config, foreign_network, foreign_state
from tests.tiny import save_checkpoint


class FakeHub:
    """Repositories in a folder, served as the library would, into a cache as the library lays it out."""

    def __init__(self, root):
        self.repositories, self.cache, self.fetched, self.asked = root / "hub", root / "cache", [], []
        self.error = None

    def add(self, repo):
        path = self.repositories / repo
        path.mkdir(parents=True)
        return path

    def model_info(self, repo, *, revision=None, timeout=None):
        self.asked.append((repo, revision))
        if self.error is not None:
            raise self.error
        root = self.repositories / repo
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files], sha="0" * 40)

    def snapshot_download(self, repo, *, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            return self.real(repo, revision=revision, local_files_only=True)
        root, snapshot = self.repositories / repo, self.snapshot(repo, revision or "main")
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name = str(path.relative_to(root))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                if name not in self.fetched:
                    self.fetched.append(name)
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    def snapshot(self, repo, revision):
        place = self.cache / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text("0" * 40)
        snapshot = place / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        return snapshot


@pytest.fixture
def fake(tmp_path, monkeypatch):
    made = FakeHub(tmp_path)
    made.real = huggingface_hub.snapshot_download
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda api, *given, **options: made.model_info(*given, **options)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def http(kind, code):
    """An error as the library raises it, whatever its release takes to make one."""
    made = kind.__new__(kind)
    Exception.__init__(made, f"{code} for url: https://example\n\nmore lines")
    return made


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/ddpm-cifar10-32", HubId("google/ddpm-cifar10-32")),
        ("a/b@v1.0", HubId("a/b", None, "v1.0")),
        ("a/b@refs/pr/1", HubId("a/b", None, "refs/pr/1")),
        ("a/b/model.pt", HubId("a/b", "model.pt")),
        ("a/b/c/ema_0.9999.pt@main", HubId("a/b", "c/ema_0.9999.pt", "main")),
        *((name, None) for name in (
            "mnist2", "./a/b", "../a/b", "/a/b", "a/b/c", "runs/model.pt", "runs/best.ckpt", "a/", "a//b", "a b/c",
            "a/b@", "a/../b", "x" * 5000, "a/" + "b" * 200, "", "ä/b/c", "a/b/c/",
        )),
    ],
)  # fmt: skip
def test_what_may_be_a_name_on_the_hub(name, expected):
    assert parse_id(name) == expected
    assert expected is None or str(expected) == name


def test_what_is_on_disk_is_not_asked_for(fake, tmp_path):
    save_checkpoint(tmp_path / "owner" / "name")
    assert load_checkpoint("owner/name").dialect == "fastddpm"
    with pytest.raises(CheckpointError, match="no checkpoint at .*give a folder"):
        load_checkpoint(tmp_path / "owner" / "other")
    with pytest.raises(CheckpointError, match="no checkpoint at runs/model.pt; give a folder"):
        load_checkpoint("runs/model.pt")
    assert fake.asked == []


# ------------------------------------------------------------------ what is fetched


def test_of_a_network_with_everything_only_what_is_needed_is_fetched(fake):
    network = foreign_network("diffusers")
    place, state = folder(fake.add("google/ddpm"), network), foreign_state("diffusers", network)
    (place / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    for name in ("README.md", "images/one.png", "model.onnx", f"{STEM}.msgpack", "unet.json"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("much")
    save_file(state, place / f"{STEM}.safetensors")
    save_file({name: value.half() for name, value in state.items()}, place / f"{STEM}.fp16.safetensors")
    torch.save(state, place / f"{STEM}.bin")
    sampler = Sampler.from_pretrained("google/ddpm", device="cpu")
    assert same(sampler.checkpoint, network)
    configs = ["config.json", "model_index.json", "scheduler_config.json"]
    assert fake.fetched == [*configs, f"{STEM}.safetensors"]
    fake.fetched.clear()
    assert load_checkpoint("google/ddpm@main", variant="fp16").settings["variant"] == ("fp16", "flag")
    assert fake.fetched == [*configs, f"{STEM}.fp16.safetensors"]
    assert fake.asked == [("google/ddpm", None), ("google/ddpm", "main")]


def test_a_pipeline_in_subfolders_in_shards(fake):
    network = foreign_network("diffusers")
    place = fake.add("me/pipe")
    folder(place / "unet", network, scheduler=False)
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (place / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    shard(place / "unet", foreign_state("diffusers", network), "bin")
    (place / "unet" / f"{STEM}.fp16-00001-of-00001.bin").write_text("another variant's")
    assert same(load_checkpoint("me/pipe"), network)
    shards = [f"unet/{STEM}-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    assert fake.fetched == ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", *shards,
                            f"unet/{STEM}.bin.index.json"]  # fmt: skip


def test_our_own_format(fake):
    save_checkpoint(fake.add("me/own"))
    assert load_checkpoint("me/own").dialect == "fastddpm"
    assert fake.fetched == ["config.json", "model.safetensors"]


def test_one_file_of_weights(fake):
    network = foreign_network("pesser")
    place = fake.add("me/files")
    for name in ("one.pt", "two[1].ckpt"):
        torch.save(foreign_state("pesser", network), place / name)
    with pytest.raises(
        CheckpointError, match=r"me/files, on the Hub: .*got one.pt, two\[1\].ckpt; name a file like me/files/"
    ):
        load_checkpoint("me/files", **FLAGS["pesser"])
    assert fake.fetched == []
    checkpoint = load_checkpoint("me/files/one.pt", **FLAGS["pesser"])
    assert (checkpoint.dialect, checkpoint.path.name) == ("pesser", "one.pt")
    assert fake.fetched == ["one.pt"]
    with pytest.raises(CheckpointError, match="me/files/three.pt: there is no such file on the Hub; there are one.pt"):
        load_checkpoint("me/files/three.pt", **FLAGS["pesser"])
    (place / "one.pt").unlink()
    assert load_checkpoint("me/files", **FLAGS["pesser"]).dialect == "pesser"


def test_what_cannot_be_used_is_not_fetched(fake):
    place = fake.add("big/ldm")
    (place / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    (place / f"{STEM}.bin").write_bytes(b"gigabytes")
    with pytest.raises(CheckpointError, match="got LDMPipeline, whose pictures need its decoder"):
        load_checkpoint("big/ldm")
    (fake.add("big/variants") / "config.json").write_text(
        json.dumps(diffusers_config(foreign_network("diffusers").config))
    )
    (fake.repositories / "big/variants" / f"{STEM}.fp16.bin").write_bytes(b"gigabytes")
    with pytest.raises(CheckpointError, match="big/variants, on the Hub: .*got the variants fp16; give variant=fp16"):
        load_checkpoint("big/variants")
    with pytest.raises(CheckpointError, match="variant must be a part of a file's name"):
        load_checkpoint("big/variants", variant="*")
    (fake.add("big/text") / "README.md").write_text("words")
    with pytest.raises(CheckpointError, match="got README.md, none of weights"):
        load_checkpoint("big/text")
    assert not any(STEM in name for name in fake.fetched)


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            errors.RepositoryNotFoundError,
            "no checkpoint at me/gone, and the Hub has no repository me/gone that you may",
        ),
        (errors.GatedRepoError, "access is restricted on the Hub; accept its terms"),
        (errors.RevisionNotFoundError, "the Hub has me/gone, but no revision"),
        (errors.HFValidationError, "cannot be a name on the Hub"),
        (ConnectionError, "the Hugging Face Hub cannot be reached, and the cache has no such repository"),
        (errors.HfHubHTTPError, "the Hugging Face Hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_are_one_line(fake, kind, message):
    fake.error = http(kind, 404)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint("me/gone")
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off(fake, monkeypatch):
    save_checkpoint(fake.add("me/own"))

    def broken(*arguments, **options):
        raise http(errors.HfHubHTTPError, 503)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match=r"fetching it from the Hub failed \(503 .*example\); run the same again"):
        load_checkpoint("me/own")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        load_checkpoint("me/own")


def test_the_cache_serves_without_a_network(fake):
    network = foreign_network("diffusers")
    place = folder(fake.add("google/ddpm"), network)
    save_file(foreign_state("diffusers", network), place / f"{STEM}.safetensors")
    torch.save(foreign_state("pesser", foreign_network("pesser")), fake.add("me/files") / "one.pt")
    load_checkpoint("google/ddpm")
    load_checkpoint("me/files/one.pt", **FLAGS["pesser"])
    fake.error = ConnectionError("no network")
    assert same(load_checkpoint("google/ddpm"), network)
    assert same(load_checkpoint("google/ddpm@main"), network)
    assert load_checkpoint("me/files/one.pt", **FLAGS["pesser"]).dialect == "pesser"
    assert load_checkpoint("me/files", **FLAGS["pesser"]).dialect == "pesser"
    for name in ("me/files/two.pt", "me/other", "google/ddpm@v2"):
        with pytest.raises(CheckpointError, match="cannot be reached, and the cache has no such repository"):
            load_checkpoint(name, **FLAGS["pesser"])
    with pytest.raises(CheckpointError, match="there must be diffusion_pytorch_model.fp16.safetensors"):
        load_checkpoint("google/ddpm", variant="fp16")


def test_a_copy_that_is_known_to_be_incomplete_is_used(fake, monkeypatch):
    save_checkpoint(fake.add("me/own"))
    load_checkpoint("me/own")
    fake.error, snapshot = ConnectionError("no network"), fake.snapshot("me/own", "main")

    def incomplete(*arguments, **options):
        error = http(errors.LocalEntryNotFoundError, "README.md is missing")
        error.snapshot_path = str(snapshot)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    assert load_checkpoint("me/own").dialect == "fastddpm"


def test_offline_mode_of_the_library_itself(fake, monkeypatch):
    """The library's own functions, no fakes: it refuses to ask the network, and the cache is served."""
    save_checkpoint(fake.add("me/own"))
    load_checkpoint("me/own")
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint("me/own").dialect == "fastddpm"
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the cache has no such repository: unset it"):
        load_checkpoint("me/other")
    assert hub.fetch(HubId("me/own"), {}).is_relative_to(fake.cache)


@pytest.mark.parametrize("verb", ["info", "sample", "convert"])
def test_the_command_line_says_it_in_one_line(fake, tmp_path, capsys, monkeypatch, verb):
    fake.error = ConnectionError("no network")
    arguments = [verb, "google/ddpm-cifar10-32", *(["copy"] if verb == "convert" else [])]
    monkeypatch.setattr(sys, "argv", ["fastddpm", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the Hugging Face Hub cannot be reached" in error
    assert not list(tmp_path.iterdir())
