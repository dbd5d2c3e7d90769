"""`fastddpm likelihood`: its numbers are the sampler's, it goes on where it stopped, and what is wrong is one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.cli import likelihood_run
from fastddpm.cli.errors import Stopped
from fastddpm.process.likelihood import Likelihood
from fastddpm.process.rate_distortion import LikelihoodSums
from fastddpm.sampler import Sampler
from tests.command_line import good as is_good
from tests.command_line import refused as is_refused
from tests.tiny import CLASSES, SPEC, T, pictures, save_checkpoint, unconditional

N = 7


def good(done):
    is_good(done)
    return done


def refused(done):
    is_refused(done)
    return done.err


@pytest.fixture
def unplotted(monkeypatch):
    """Plots are empty files: drawing one takes longer than all the rest."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).write_bytes(b"plot"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures with classes, as .npz."""
    path, made = tmp_path_factory.mktemp("data") / "pictures.npz", pictures(N)
    np.savez(path, images=made.images.permute(0, 2, 3, 1).numpy(), labels=made.labels.numpy())
    return path


@pytest.fixture(scope="module")
def expected(model):
    """What the sampler itself says of them."""
    made = pictures(N)
    return Sampler.from_pretrained(model).likelihood(made.images, class_labels=made.labels, progress=False)


def numbers(folder, name="likelihood.json"):
    return json.loads((folder / name).read_text())


def test_the_numbers_are_the_samplers(fastddpm, place, model, data, expected):
    done = good(fastddpm("likelihood", model, data, "--out", "bits"))
    found = numbers(place / "bits")
    assert found["pictures"] == N and found["timesteps"] == list(range(T - 1, -1, -1))
    assert found["bits_per_dim"] == pytest.approx(float(expected.total_bpd.mean()), rel=1e-6)
    for name in ("vlb", "x_start_mse", "eps_mse"):
        assert found[name] == pytest.approx(getattr(expected, name).mean(0).tolist(), rel=1e-5)
    assert found["bits_per_dim_of_each"] == pytest.approx(expected.total_bpd.tolist(), rel=1e-5)
    assert f"{found['bits_per_dim']:.4f} ± {found['standard_error']:.4f} bits per dimension" in done.out
    assert (place / "bits" / "likelihood.png").is_file()


def test_classes_may_be_left_out_and_names_count_before_numbers(fastddpm, place, unplotted, model, data, expected):
    made = pictures(N)
    good(fastddpm("likelihood", model, data, "--no-classes", "--out", "none"))
    plain = Sampler.from_pretrained(model).likelihood(made.images, progress=False)
    assert numbers(place / "none")["bits_per_dim"] == pytest.approx(float(plain.total_bpd.mean()), rel=1e-6)
    for picture, label in zip(made.images, made.labels, strict=True):
        folder = place / "folders" / SPEC.class_names[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0].numpy()).save(folder / f"{len(list(folder.iterdir()))}.png")
    good(fastddpm("likelihood", model, "folders", "--out", "named"))
    # In the order of the folders' names, so that each has other noise.
    assert numbers(place / "named")["bits_per_dim"] == pytest.approx(float(expected.total_bpd.mean()), rel=0.1)
    assert numbers(place / "named")["classes_told"] is True


def test_a_stopped_run_goes_on(fastddpm, place, unplotted, model, data, monkeypatch):
    whole = good(fastddpm("likelihood", model, data, "--batch-size", 2, "--out", "whole"))
    of, made = LikelihoodSums.of, []

    def stopping(found: Likelihood) -> LikelihoodSums:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(found))
        return of(found)

    monkeypatch.setattr(LikelihoodSums, "of", staticmethod(stopping))
    stopped = fastddpm("likelihood", model, data, "--batch-size", 2, "--out", "parts")
    assert stopped.code == 130 and "the same command continues" in stopped.err
    assert len(list((place / "parts" / "parts").iterdir())) == 2
    monkeypatch.setattr(LikelihoodSums, "of", staticmethod(lambda found: made.append(len(found)) or of(found)))
    again = good(fastddpm("likelihood", model, data, "--batch-size", 2, "--out", "parts"))
    assert made == [2, 2, 2, 1] and again.out.splitlines()[0] == whole.out.splitlines()[0]
    assert numbers(place / "parts") == numbers(place / "whole")
    good(fastddpm("likelihood", model, data, "--batch-size", 2, "-n", 4, "--out", "parts"))  # fewer are there too
    assert made == [2, 2, 2, 1] and numbers(place / "parts")["pictures"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", 1], "seed was 0, is 1"),
        (["--steps", 5], "steps was None, is 5"),
        (["--batch-size", 2], "batch_size was 64, is 2"),
        (["--no-classes"], "classes was True, is False"),
    ],
    ids=["seed", "steps", "batch", "classes"],
)
def test_other_settings_are_refused_by_name(fastddpm, place, unplotted, model, data, change, message):
    good(fastddpm("likelihood", model, data, "-n", 1, "--out", "run"))
    assert message in refused(fastddpm("likelihood", model, data, "-n", 1, "--out", "run", *change))


def test_other_pictures_are_refused(fastddpm, place, unplotted, model, data):
    good(fastddpm("likelihood", model, data, "-n", 1, "--out", "run"))
    np.savez(place / "pictures.npz", images=np.zeros((N, 8, 8, 1), np.uint8), labels=np.arange(N) % CLASSES)
    assert "pictures was" in refused(fastddpm("likelihood", model, "pictures.npz", "-n", 1, "--out", "run"))


def test_rate_and_distortion(fastddpm, place, model, data, expected):
    good(fastddpm("likelihood", model, data, "--rate-distortion", "--out", "curve"))
    found = numbers(place / "curve", "rate_distortion.json")
    vlb, prior = expected.vlb.double().mean(0), expected.prior_bpd.double().mean()
    rates = [float(prior + vlb[:i].sum()) for i in range(T)]
    assert found["rate_bits_per_dim"] == pytest.approx(rates, rel=1e-5)
    distortions = [127.5 * float(mse) ** 0.5 for mse in expected.x_start_mse.double().mean(0)]
    assert found["distortion_rmse_of_255"] == pytest.approx(distortions, rel=1e-5)
    assert found["lossless_bits_per_dim"] == pytest.approx(rates[-1] + float(vlb[-1]), rel=1e-5)
    assert (place / "curve" / "rate_distortion.png").is_file()
    with (
        Image.open(place / "curve" / "progressive.gif") as film,
        Image.open(place / "curve" / "progressive.png") as strip,
    ):
        assert film.n_frames == T and strip.width > strip.height


def test_without_matplotlib_the_numbers_are_written_and_one_line_says_so(fastddpm, place, model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = fastddpm("likelihood", model, data, "-n", 1, "--out", "bits")
    assert done.code == 0 and done.err.count("plots need the package matplotlib") == 1
    assert numbers(place / "bits")["pictures"] == 1 and not list((place / "bits").glob("*.png"))


def test_networks_without_classes(fastddpm, place, unplotted, tmp_path, data):
    plain = save_checkpoint(tmp_path / "plain", *unconditional())
    good(fastddpm("likelihood", plain, data, "--steps", 3, "--out", "bits"))
    assert numbers(place / "bits")["classes_told"] is False


WRONG = [
    (["-n", 0], "--n must be in 1 … 7"),
    (["-n", 8], "--n must be in 1 … 7"),
    (["--steps", T + 1], f"steps must be in 1 … {T}"),
    (["--batch-size", 0], "--batch-size must be at least 1"),
    (["--rate-distortion"], "--rate-distortion must come with --out"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(map(str, options)) for options, _ in WRONG])
def test_wrong_options_are_one_line(fastddpm, place, model, data, options, message):
    assert message in refused(fastddpm("likelihood", model, data, *options))
    assert not list(place.iterdir())


def test_wrong_data_is_one_line(fastddpm, place, model, data):
    assert "pictures nowhere do not exist" in refused(fastddpm("likelihood", model, "nowhere"))
    np.savez(place / "large.npz", images=np.zeros((2, 9, 9, 1), np.uint8))
    assert "images must be 8×8 pixels" in refused(fastddpm("likelihood", model, "large.npz"))
    np.savez(place / "many.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([0, 7]))
    assert "classes must be those of the network" in refused(fastddpm("likelihood", model, "many.npz"))


def test_a_damaged_part_is_named(fastddpm, place, unplotted, model, data):
    good(fastddpm("likelihood", model, data, "-n", 2, "--out", "run"))
    [part] = (place / "run" / "parts").iterdir()
    part.write_bytes(b"nothing")
    assert f"{part.name}: not readable" in refused(fastddpm("likelihood", model, data, "-n", 2, "--out", "run"))
    shutil.rmtree(place / "run" / "parts")
    good(fastddpm("likelihood", model, data, "-n", 2, "--out", "run"))


def test_ctrl_c_without_a_folder_promises_nothing(fastddpm, model, data, monkeypatch):
    monkeypatch.setattr(likelihood_run.LikelihoodRun, "measured", _interrupted)
    stopped = fastddpm("likelihood", model, data)
    assert stopped.code == 130 and "continues" not in stopped.err
    assert issubclass(Stopped, Exception) and torch.get_num_threads() == 1


def _interrupted(*_):
    raise KeyboardInterrupt
