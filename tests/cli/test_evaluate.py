"""`fastddpm evaluate`: what it prints and writes, and what it refuses in one line."""

import json

import numpy as np
import pytest

from fastddpm.evaluate import Evaluator, load_features, open_set
from tests import tiny
from tests.command_line import refused
from tests.evaluate.common import pictures, scripted

POOLED = "tests.evaluate.common:Pooled"

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture
def sides(place):
    """Two archives in the working folder."""
    np.savez("generated.npz", arr_0=pictures(60, bright=0.8))
    np.savez("reference.npz", arr_0=pictures(90, seed=1))
    return "generated.npz", "reference.npz"


def measured(result):
    """The output of a command that ended well; warnings stand on standard error."""
    assert result.code == 0, result.err
    return result.out


def test_numbers_with_all_that_they_depend_on(fastddpm, sides, place):
    path = scripted(place / "pooled.pt")
    done = fastddpm("evaluate", *sides, "--features", path, "--json", "out.json", "--device", "cpu", "-q")
    values = json.loads((place / "out.json").read_text())
    features = load_features(str(path), device="cpu")
    found = Evaluator(open_set(sides[1]), features).measure(open_set(sides[0]))
    assert values["fd"] == pytest.approx(found.fd) and values["prdc"]["density"] == found.prdc.density
    assert (values["generated_n"], values["reference_n"], values["features"]) == (60, 90, "pooled.pt")
    out = measured(done)
    for words in (
        "FD (pooled.pt)", f"{found.fd:.6g}", "KD (pooled.pt)", "precision (k = 5)", "coverage", "60 pictures",
        "90 pictures", features.digest[:16], "8×8 pixels, gray; not resized",
    ):  # fmt: skip
        assert words in out, words
    assert "FID" not in out and "KID" not in out
    assert done.err == "fastddpm: warning: KID from subsets of 30 pictures instead of 1,000: its spread is larger\n"


def test_on_narrow_terminals_there_are_lines(fastddpm, sides, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    out = measured(fastddpm("evaluate", *sides, "--features", POOLED, "--metrics", "fd", "-q"))
    assert out.startswith(f"numbers:\n- FD ({POOLED}): ") and "│" not in out


def test_a_checkpoint_is_sampled_first(fastddpm, sides, place):
    tiny.save_checkpoint(place / "model")
    before = sorted(place.rglob("*"))
    out = measured(fastddpm(
        "evaluate", "model", sides[1], "--n", 30, "--repeats", 3, "--seed", 4, "--steps", 2, "--features", POOLED,
        "--metrics", "fd", "--json", "out.json", "--engine", "eager", "--batch-size", 16, "-q",
    ))  # fmt: skip
    values = json.loads((place / "out.json").read_text())
    distances = [each["fd"] for each in values["repeats"]]
    assert len(set(distances)) == 3 and values["fd"] == min(distances)
    assert values["sampling"]["seed"] == 4 and values["sampling"]["steps"] == 2 and values["generated_n"] == 30
    assert [each["generated"][-6:] for each in values["repeats"]] == ["seed 4", "seed 5", "seed 6"]
    assert "the lowest of" in out and all(f"{distance:.6g}" in out for distance in distances)
    assert sorted(place.rglob("*")) == sorted([*before, place / "out.json"])  # no picture was written
    fastddpm("sample", "model", "--n", 30, "--seed", 5, "--steps", 2, "--npz", "s.npz", "--engine", "eager",
             "--batch-size", 16, "-q")  # fmt: skip
    fastddpm("evaluate", "s.npz", sides[1], "--features", POOLED, "--metrics", "fd", "--json", "again.json", "-q")
    assert json.loads((place / "again.json").read_text())["fd"] == pytest.approx(distances[1], rel=1e-9)


def test_statistics_are_kept_for_the_next_time(fastddpm, sides, place):
    options = ("--features", POOLED, "--metrics", "fd", "-q", "--json", "out.json")
    measured(fastddpm("evaluate", *sides, *options, "--save-statistics", "s.npz"))
    first = json.loads((place / "out.json").read_text())["fd"]
    measured(fastddpm("evaluate", sides[0], "s.npz", *options))
    assert json.loads((place / "out.json").read_text())["fd"] == pytest.approx(first, rel=1e-9)
    out = measured(fastddpm("evaluate", "s.npz", "s.npz", "-q"))  # two statistics need no features
    assert "FD (statistics)" in out and "FID" not in out


REFUSED = {
    "missing": ("absent.npz reference.npz", "absent.npz do not exist"),
    "missing reference": ("generated.npz absent/", "do not exist"),
    "metrics": ("generated.npz reference.npz --metrics fid", "metrics must be of fd, kid, prdc, got 'fid'"),
    "features": ("generated.npz reference.npz --features absent.pt", "a TorchScript file that exists or module:Class"),
    "weights": (f"generated.npz reference.npz --features {POOLED} --weights w.pth", "weights must be left out"),
    "a checkpoint without n": ("mnist reference.npz", "--n must be given with a checkpoint (mnist)"),
    "options of sampling": ("generated.npz reference.npz --repeats 3", "--n must be given"),
    "steps without n": ("generated.npz reference.npz --steps 3", "--n must be given"),
    "repeats": ("model reference.npz --n 4 --repeats 0", "--repeats must be in 1 … 100, got 0"),
    "n": ("model reference.npz --n 0", "n must be at least 1"),
    "class labels": ("model reference.npz --n 9 --class-labels 9", "--class-labels must be"),
    "repeats without fd": ("model reference.npz --n 9 --repeats 2 --metrics kid", "--metrics must have fd with --rep"),
    "statistics without fd": ("generated.npz reference.npz --metrics kid --save-statistics s.npz", "must have fd with"),
    "place": ("generated.npz reference.npz --json generated.npz/out.json", "must be a folder"),
    "size": ("generated.npz reference.npz --size 4", "must be 4×4 pixels, got 8×8"),
    "k": (f"generated.npz reference.npz --features {POOLED} --k 70", "at least 71 on either side"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line(fastddpm, sides, place, name):
    command, message = REFUSED[name]
    if command.startswith("model"):
        tiny.save_checkpoint(place / "model")
    before = sorted(place.rglob("*"))
    assert refused(fastddpm("evaluate", *command.split(), "-q"), message)
    assert sorted(place.rglob("*")) == before


def test_help_says_what_runs_code(fastddpm):
    text = " ".join(measured(fastddpm("evaluate", "--help")).replace("│", " ").split())
    assert "runs no Python" in text and "runs the code that you name" in text
