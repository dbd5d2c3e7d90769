"""Packages made beside a run: the run changes over between two steps, and no process or file is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastddpm.engines import background, cache, contest
from fastddpm.engines.ahead_of_time import AheadOfTime
from fastddpm.engines.background import Background, Job, Order
from fastddpm.engines.choose import Engine
from fastddpm.engines.contest import Contestant
from tests.engines.common import like
from tests.helpers import wait_until
from tests.networks import tiny_sampler
from tests.steps import begin

CPU = torch.device("cpu")


def contestant(sampler) -> Contestant:
    way = AheadOfTime(lambda: sampler.stepper.weights)
    return Contestant.of(way, begin(sampler, sampler.table(steps=4), [0, 1], [0, 0]), {})


def pretend(monkeypatch, script: str) -> None:
    """Let the process run a script, which finds the order's path in `order`."""
    monkeypatch.setattr(background, "command", lambda path: [sys.executable, "-c", f"order = {str(path)!r}\n{script}"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def order() -> Order:
    sampler = tiny_sampler()
    return Order.of(contestant(sampler), sampler.stepper.weights)


def test_a_job_that_is_stopped_leaves_nothing(monkeypatch, order):
    pretend(monkeypatch, "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)")
    job = Job(order)
    folder, pid = job.folder, job.process.pid
    assert not job.is_done() and folder.exists() and os.getpgid(pid) == pid
    job.stop()
    assert job.is_done() and job.failure == "it was stopped" and not folder.exists()
    assert wait_until(lambda: not any_of_group(pid))
    job.stop()  # twice does no harm


def any_of_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_why_a_job_failed_is_its_last_line(monkeypatch, order):
    pretend(monkeypatch, "raise SystemExit('first\\nno space left')")
    job = Job(order)
    assert wait_until(job.is_done) and job.failure == "no space left"


def test_one_package_at_a_time(monkeypatch):
    pretend(monkeypatch, "import time; time.sleep(60)")
    sampler = tiny_sampler()
    made = Background(lambda: sampler.stepper.weights)
    one = contestant(sampler)
    other = Contestant(one.way, one.call, "other", None, False)
    assert made.takes([one]) == [one.key]
    assert made.begin(one) == "" and made.begin(one) == ""
    assert "another one" in made.begin(other) and not made.is_done(one.key) and made.is_done("other")
    made.stop()
    assert made.is_done(one.key) and made.failure(one.key)


ORPHAN = '''
import sys, time
from fastddpm.engines import background
from tests.engines.test_background import contestant
from tests.networks import tiny_sampler
waits = """
import sys, threading, time
from pathlib import Path
from fastddpm.engines.background import end_with
arguments = int(sys.argv[1]), Path(sys.argv[2]).parent
threading.Thread(target=end_with, args=arguments, daemon=True).start()
time.sleep(600)
"""
real = background.command
background.command = lambda path: [sys.executable, "-P", "-c", waits, *real(path)[-2:]]
sampler = tiny_sampler()
job = background.Job(background.Order.of(contestant(sampler), sampler.stepper.weights))
print(job.process.pid, job.folder, flush=True)
time.sleep(600)
'''


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_nothing_outlives_the_program(end, request):
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], cwd=request.config.rootpath, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        pid, folder = parent.stdout.readline().split()
        assert is_alive(int(pid))
        parent.send_signal(end)
        parent.wait(60)
    assert wait_until(lambda: not any_of_group(int(pid))) and wait_until(lambda: not Path(folder.decode()).exists())


def test_a_run_goes_on_meanwhile_and_changes_over(monkeypatch, tmp_path):
    """The package is a pretended one, which appears in the middle of the run."""
    monkeypatch.setattr(contest, "race", lambda ways: [1.0 + i for i in range(len(ways))])
    monkeypatch.setattr(AheadOfTime, "cost_s", 0.0)
    go = tmp_path / "go"
    pretend(monkeypatch, f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)")
    sampler, seen = tiny_sampler(), []
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.01)  # weights that no other test has
    engine = sampler.stepper.engine = Engine("auto", CPU, weights=lambda: sampler.stepper.weights)
    monkeypatch.setattr(AheadOfTime, "is_there", lambda self, call: go.exists())
    monkeypatch.setattr(AheadOfTime, "prepare", lambda way, call, _: way.steps.update({way.key(call): call.step}))

    def watch(preview):
        seen.append((engine.used, "meanwhile" in engine.why))
        if preview.step == 5:
            go.touch()
            assert wait_until(lambda: engine.background.job.is_done())

    asked = {"class_labels": 1, "solver": "ddpm", "steps": 8, "output": "raw"}
    got = sampler.sample(2, callback=watch, **asked)
    assert seen == [("eager", False)] + [("eager", True)] * 4 + [("compiled", False)] * 3
    assert torch.equal(got, like(sampler, "eager").sample(2, **asked))


def test_an_interrupted_run_ends_what_is_made_beside_it(monkeypatch):
    monkeypatch.setattr(AheadOfTime, "cost_s", 0.0)
    pretend(monkeypatch, "import time; time.sleep(60)")
    sampler = tiny_sampler()
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.02)
    engine = sampler.stepper.engine = Engine("auto", CPU, weights=lambda: sampler.stepper.weights)

    def interrupt(preview):
        if preview.step == 4:
            assert not engine.background.job.is_done()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(2, class_labels=1, solver="ddpm", steps=8, callback=interrupt)
    assert engine.background.job.is_done()


@pytest.mark.slow
def test_the_package_is_the_one_that_the_run_looks_for():
    sampler = tiny_sampler()
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.03)
    sampler.stepper.refresh()
    made, one = Background(lambda: sampler.stepper.weights), contestant(sampler)
    assert made.begin(one) == ""
    assert wait_until(lambda: made.is_done(one.key), 600) and made.failure(one.key) == ""
    assert one.key in cache.packages() and one.way.prepare(one.call, lambda _: None) is None
