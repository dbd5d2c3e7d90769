"""What happens to a set of shards when its workers are killed, the disk is full, or the store cannot be reached."""

import os
import random
import signal
import time

import pytest

from tests.shards.forks import Forks
from tests.shards.runs import tree
from tests.tiny import save_checkpoint


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("place"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def command(model, out, *more):
    usual = ["sample", model, "-n", 40, "--steps", 2, "--shards", out, "--shard-size", 4, "--engine", "eager"]
    return [*usual, *more]


@pytest.fixture(scope="module")
def undisturbed(forks, model, tmp_path_factory):
    """The set of a run that nothing happens to, and the seconds that it takes, by format."""
    found = {}

    def of(form):
        if form not in found:
            out, began = tmp_path_factory.mktemp("plain") / form, time.monotonic()
            assert forks.run(command(model, out, "--format", form))[0] == 0
            found[form] = tree(out), time.monotonic() - began
        return found[form]

    return of


def kill_and_finish(forks, model, out, form, kills, seconds, rng):
    """Two workers at once, one of them killed at a random moment, so often; then one that is left alone."""
    killed = 0
    while killed < kills:
        workers = [forks.start(command(model, out, "--format", form, "--part", f"{i}/2")) for i in range(2)]
        time.sleep(rng.uniform(0, seconds))
        victim = rng.choice(workers)
        os.kill(victim, signal.SIGKILL)
        other = next(worker for worker in workers if worker != victim)
        if rng.random() < 0.5:
            os.kill(other, signal.SIGKILL)
        codes = [forks.end(worker)[0] for worker in workers]
        assert set(codes) <= {0, -signal.SIGKILL}
        killed += codes.count(-signal.SIGKILL)
        if codes.count(0) and rng.random() < 0.7 and out.exists():  # go on from a set that lacks something
            for number in rng.sample(range(10), 4):
                (out / f"shard-{number:05d}.json").unlink(missing_ok=True)
    code, text = forks.run(command(model, out, "--format", form))
    assert code == 0, text


@pytest.mark.parametrize("form", ["npz"])
def test_a_set_whose_workers_are_killed_is_that_of_an_undisturbed_run(forks, model, tmp_path, undisturbed, form):
    expected, seconds = undisturbed(form)
    kill_and_finish(forks, model, tmp_path / "out", form, 3, seconds, random.Random(0))
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npz", "tar", "png"])
def test_twenty_kills(forks, model, tmp_path, undisturbed, form):
    expected, seconds = undisturbed(form)
    kill_and_finish(forks, model, tmp_path / "out", form, 20, seconds, random.Random())
    assert tree(tmp_path / "out") == expected


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing_half_written(forks, model, tmp_path, undisturbed):
    out = tmp_path / "out"
    big = command(model, out, "--format", "npz")
    assert forks.run([*big[:3], 4000, *big[4:], "--shard-size", 2000, "--batch-size", 500], largest_file=60_000) == (
        2, f"fastddpm: error: {out}/shard-00000.npz: file too large; make room there or choose another place\n"
    )  # fmt: skip
    assert sorted(tree(out)) == ["run.json"]
    assert forks.run([*big[:3], 4000, *big[4:], "--shard-size", 2000, "--batch-size", 500])[0] == 0
    assert len(tree(out)) == 5


def test_ctrl_c_says_how_to_go_on(forks, model, tmp_path):
    child = forks.start(command(model, tmp_path / "out", "--steps", 20, "-n", 4000))
    while not list(tmp_path.glob("out/*.npz")):
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert forks.end(child) == (130, "fastddpm: stopped; the same command continues\n")
    assert not list(tmp_path.glob("out/*.claim")) and not list(tmp_path.glob("out/.*"))
