"""Features: TorchScript, the user's own classes, inception; what they are called, and what they refuse."""

import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastddpm.evaluate import inception, load_features
from fastddpm.evaluate.features import INCEPTION_SHA256
from fastddpm.files import sha256
from tests.evaluate.common import Pooled, scripted

BATCH = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HERE = "tests.evaluate.common"

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


# ---------------------------------------------------------------------- TorchScript, module:Class


def test_torchscript(tmp_path):
    path = scripted(tmp_path / "pooled.pt")
    features = load_features(str(path))
    assert torch.equal(features(BATCH), Pooled()(BATCH))
    assert (features.name, features.digest, features.distance) == ("pooled.pt", sha256(path), "FD (pooled.pt)")
    assert features(BATCH).dtype == torch.float32


def test_a_file_called_inception_is_not_the_network_of_the_fid(place):
    scripted(place / "inception")
    assert load_features("./inception").distance == "FD (inception)"


class Detector(nn.Module):
    """Returns classes unless asked for features, as NVIDIA's networks do."""

    def forward(self, pictures: Tensor, return_features: bool = False) -> Tensor:
        units = pictures.float().flatten(1)
        return units if return_features else units[:, :1]


def test_torchscript_that_returns_features_when_asked(tmp_path):
    assert load_features(str(scripted(tmp_path / "d.pt", Detector())))(BATCH).shape == (3, 64)


class Tupled(nn.Module):
    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures.double().flatten(1), pictures


def test_the_first_of_several_outputs_is_taken(tmp_path):
    assert load_features(str(scripted(tmp_path / "t.pt", Tupled())))(BATCH).shape == (3, 64)


@pytest.mark.parametrize("kind", ["Pooled", "Plain"])
def test_a_class_of_one_s_own(kind):
    features = load_features(f"{HERE}:{kind}")
    assert torch.equal(features(BATCH), Pooled()(BATCH))
    assert features.distance == f"FD ({HERE}:{kind})" and len(features.digest) == 64


def test_a_class_in_the_working_folder(place):
    (place / "my_own.py").write_text("class F:\n    def __call__(self, x):\n        return x.float().flatten(1)\n")
    path = list(sys.path)
    first = load_features("my_own:F")
    assert first(BATCH).shape == (3, 64) and sys.path == path
    del sys.modules["my_own"]
    (place / "my_own.py").write_text("class F:\n    def __call__(self, x):\n        return x.float().flatten(1) + 1\n")
    assert load_features("my_own:F").digest != first.digest
    del sys.modules["my_own"]


REFUSED = {
    "nothing": "inception, a TorchScript file that exists or module:Class, got 'nothing'",
    "missing.pt": "TorchScript file that exists",
    "no_such_module:F": "raised ModuleNotFoundError: No module named 'no_such_module'",
    f"{HERE}:Absent": "raised AttributeError",
    f"{HERE}:NeedsArguments": "made without arguments.*raised TypeError",
    f"{HERE}:pictures": "raised TypeError",
    ":F": "must be inception",
    "a b:F": "must be inception",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_features_is_refused(name, place):
    with pytest.raises(ValueError, match=REFUSED[name]):
        load_features(name)


def test_files_that_are_no_torchscript_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no archive")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(ValueError, match=f"{name}: must be a TorchScript file, but is none"):
            load_features(str(tmp_path / name))
    with pytest.raises(ValueError, match="got a folder"):
        load_features(str(tmp_path))
    with pytest.raises(ValueError, match="weights must be left out"):
        load_features(f"{HERE}:Plain", weights="w.pth")


def test_outputs_that_are_no_features_are_refused():
    with pytest.raises(ValueError, match=r"features must be numbers \[3, D\], got torch.uint8 \(3, 1, 8, 8\)"):
        load_features(f"{HERE}:Wrong")(BATCH)
    with pytest.raises(ValueError, match=r"must take uint8 pictures \(3, 1, 8, 8\), but it raised .*: and what is w"):
        load_features(f"{HERE}:Raises")(BATCH)


def test_pixels_are_features_too():
    assert torch.equal(load_features("torch.nn:Flatten")(BATCH), BATCH.flatten(1).float())


# ---------------------------------------------------------------------- inception


def test_without_torch_fidelity_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torch-fidelity must be installed; run pip install 'fastddpm\[evaluate\]'"):
        load_features("inception")


@pytest.fixture(scope="module")
def extractor():
    """torch-fidelity's module, with a constructor that needs no file when the weights are random."""
    if not any((Path(path) / "torch_fidelity").is_dir() for path in sys.path):
        pytest.skip("needs torch-fidelity")
    return inception.extractor()


@pytest.fixture(scope="module")
def random_weights(extractor, tmp_path_factory):
    """A file with random weights, and the network that has them."""
    kind = type("Random", (extractor.FeatureExtractorInceptionV3,), {"load_state_dict": lambda *_: None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        network = kind("random", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path, network


def test_the_package_s_other_parts_are_not_imported(extractor):
    assert not any(name.startswith("torch_fidelity") for name in sys.modules)
    assert extractor.FeatureExtractorInceptionV3.get_default_feature_layer_for_metric("fid") == inception.LAYER


def test_other_weights_are_refused_before_they_are_read(random_weights, tmp_path):
    path, _ = random_weights
    with pytest.raises(ValueError, match=f"must have the SHA-256 {INCEPTION_SHA256}, got {sha256(path)}"):
        load_features("inception", weights=path)
    with pytest.raises(ValueError, match=r"none.pth: inception's weights must be a file, got none"):
        load_features("inception", weights=tmp_path / "none.pth")


def test_inception_is_torch_fidelity_s(random_weights, monkeypatch):
    path, network = random_weights
    for module in (inception, sys.modules["fastddpm.evaluate.features"]):
        monkeypatch.setattr(module, "INCEPTION_SHA256", sha256(path))
    features = load_features("inception", weights=path, device="cpu")
    batch = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features(batch)
    assert found.shape == (1, 2048) and float(found.std()) > 1e-3
    assert torch.equal(found, network(batch)[0])
    assert (features.distance, features.channels, features.digest) == ("FID", 3, sha256(path))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_weights_are_taken_from_pytorch_s_cache(random_weights, cache, extractor):
    name = extractor.URL_INCEPTION_V3.rpartition("/")[2]
    cache.mkdir()
    (cache / name).write_bytes(random_weights[0].read_bytes())
    with pytest.raises(ValueError, match=f"{name}: inception's weights must have the SHA-256"):
        load_features("inception")  # found, and refused by its digest


def test_without_a_network_a_line_says_what_to_do(cache, monkeypatch, extractor):
    def fails(url, path, **_):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(ValueError, match=r"must be downloaded from https://github.com/toshas/.*\(no route to host\)"):
        load_features("inception")


def test_what_is_downloaded_is_checked_by_its_whole_digest(cache, monkeypatch, extractor):
    asked = {}
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **options: asked.update(options))
    with pytest.raises(ValueError, match="must be a file, got none"):
        load_features("inception")
    assert asked == {"hash_prefix": INCEPTION_SHA256}
