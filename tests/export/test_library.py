"""Other libraries as engines: their steps draw eager pictures, whatever the run; what is missing or fails is said."""

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.engines import contest
from fastddpm.engines.compare import CompileError
from fastddpm.export import library, runtimes
from fastddpm.export.library import Library, libraries, one_thread
from fastddpm.export.runtimes import OnnxRuntime, OpenVino
from tests.engines.common import RUNS, like
from tests.networks import tiny_sampler
from tests.steps import begin

CPU = torch.device("cpu")


def needs(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package}, which is not installed"
    )


ENGINES = [pytest.param("onnx", marks=needs("onnxruntime")), pytest.param("openvino", marks=needs("openvino"))]
pytestmark = needs("onnx")


@pytest.fixture(scope="module", params=ENGINES)
def other(own_cache, request) -> Sampler:
    """A sampler whose steps another library runs."""
    return like(tiny_sampler(), request.param)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_the_pictures_are_those_of_eager_steps(other, options, guidance):
    asked = {"seed": 5, "class_labels": [0, 2, 1], "guidance_scale": guidance, "output": "raw", **options}
    expected = like(other, "eager").sample(3, **asked)
    got = other.sample(3, **asked)
    assert other.engine.used == other.engine.name and other.engine.why == "asked for"
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


_SIGNALS = """
import faulthandler, signal
faulthandler.enable()
from fastddpm.export.runtimes import signal_stack
from tests.networks import tiny_sampler
from tests.engines.common import like
before = signal_stack()
like(tiny_sampler(), "openvino").sample(2, class_labels=1, steps=2)
after = signal_stack()
assert before.size > 0 and (before.address, before.size, before.flags) == (after.address, after.size, after.flags)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@needs("openvino")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is put back")
def test_signals_are_handled_where_they_were_before():
    done = subprocess.run([sys.executable, "-c", _SIGNALS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_one_network_serves_all_solvers_and_steps(other, monkeypatch):
    other.sample(3, class_labels=1, steps=2)
    opened = []
    monkeypatch.setattr(library, "body_file", lambda *arguments: opened.append(1))
    other.sample(3, class_labels=1, solver="ddpm", steps=7)
    other.sample(3, class_labels=2, solver="ddpm", steps=9, seed=3)
    assert not opened


def test_at_one_batch_size_a_sample_is_the_same_bit_for_bit(other):
    options = {"output": "raw", "batch_size": 3, "solver": "ddpm", "steps": 6}
    expected = other.sample(6, class_labels=[0, 1, 2, 0, 1, 2], **options)
    assert torch.equal(other.sample(1, sample_ids=[4], class_labels=[1], **options)[0], expected[4])
    ids = [5, 0, 3, 2]
    assert torch.equal(other.sample(4, sample_ids=ids, class_labels=[i % 3 for i in ids], **options), expected[ids])


def test_previews_and_supplied_noise(other):
    z = torch.randn(5, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen: dict[str, list] = {"eager": [], other.engine.name: []}
    for name, previews in seen.items():
        sampler = other if name == other.engine.name else like(other, name)
        sampler.sample(3, class_labels=1, solver="ddpm", steps=5, noise=z, callback=previews.append)
    for ours, theirs in zip(*seen.values(), strict=True):
        assert (ours.x - theirs.x).abs().max() < 1e-4 and (ours.x_start - theirs.x_start).abs().max() < 1e-3


def test_pytorch_has_its_threads_back(other):
    before = torch.get_num_threads()
    other.sample(3, class_labels=1, steps=2)
    assert torch.get_num_threads() == before
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_weights_that_change_are_noticed(other):
    sampler = like(tiny_sampler(), other.engine.name)
    asked = {"class_labels": [0, 2, 1], "steps": 3, "output": "raw"}
    before = sampler.sample(3, **asked)
    with torch.no_grad():
        sampler.model.time_projection.weight.mul_(1.5)
    expected = like(sampler, "eager").sample(3, **asked)
    assert (expected - before).abs().max() > 1e-3
    assert (sampler.sample(3, **asked) - expected).abs().max() < 1e-4


class Anyones(nn.Module):
    """A network that is not ours."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.conv(x)) / (1 + t.view(-1, 1, 1, 1) / 100)


def test_any_network_is_served(other):
    spec = ModelSpec(shape=(3, 4, 4))
    sampler = Sampler(Anyones(), NoiseSchedule.linear(20), spec, device="cpu", engine=other.engine.name)
    got = sampler.sample(2, solver="ddpm", steps=5, output="raw")
    assert (got - like(sampler, "eager").sample(2, solver="ddpm", steps=5, output="raw")).abs().max() < 1e-4


class Counting(nn.Module):
    """A network that answers otherwise each time, so that no file can be right."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return x * self.calls


def test_a_step_that_differs_is_refused(other):
    sampler = Sampler(
        Counting(), NoiseSchedule.linear(20), ModelSpec(shape=(1, 4, 4)), device="cpu", engine=other.engine.name
    )
    with pytest.raises(CompileError, match="must give what an eager one gives"):
        sampler.sample(1, steps=3)


def test_a_library_that_refuses_is_one_line(other, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such operator\nand a long trace")

    way = other.engine.quick
    monkeypatch.setattr(type(way.runtime), "open", refused(refuse))
    sampler = like(tiny_sampler(), other.engine.name)
    with pytest.raises(CompileError, match="must run the network, got no such operator; use engine='eager'$"):
        sampler.sample(2, class_labels=1, steps=3)


def refused(function):
    def opened(self, *arguments, **options):
        with runtimes.refused(self.name):
            return function(*arguments, **options)

    return opened


def test_auto_takes_a_library_where_it_is_the_quickest(other, monkeypatch):
    for way in (Library, type(other.engine.contest.ways[-1])):
        monkeypatch.setattr(way, "cost_s", 0.0 if way is Library else 1e9)
    name = other.engine.name
    monkeypatch.setattr(contest, "race", lambda ways: [float(i) + 1 for i in range(len(ways))])
    monkeypatch.setattr(library, "RUNTIMES", tuple(r for r in library.RUNTIMES if r.name == name))
    sampler = tiny_sampler()
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.0625)  # weights of which nothing is remembered
    expected = like(sampler, "eager").sample(2, class_labels=1, steps=30, output="raw")
    got = sampler.sample(2, class_labels=1, steps=30, output="raw")  # DDIM: more steps than two, and no noise
    assert sampler.engine.used == name and f"1 ms a step {name}, 2 eager" in sampler.engine.why
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVino()], ids=["onnx", "openvino"])
def test_what_is_not_installed_is_said(monkeypatch, runtime):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = libraries("auto", CPU, "fp32", lambda: "")
    assert not found.ways and f"{runtime.name} is not installed" in found.missing
    advice = rf"{runtime.package}.*not installed; run pip install 'fastddpm\[{runtime.name}\]'"
    with pytest.raises(ValueError, match=advice):
        libraries(runtime.name, CPU, "fp32", lambda: "")


def test_what_a_library_cannot_do_is_refused(other, monkeypatch):
    monkeypatch.setattr(runtimes, "processor_has_bf16", lambda: False)
    name = other.engine.name
    with pytest.raises(ValueError, match=f"precision must be fp32 for the {name} engine.*, got bf16; "):
        like(other, name, precision="bf16")
    assert not libraries("auto", CPU, "bf16", lambda: "").ways
    if name == "openvino":
        with pytest.raises(ValueError, match="it is for CPUs here"):
            libraries(name, torch.device("cuda"), "fp32", lambda: "")


def test_other_forms_of_steps_have_keys_of_their_own(other):
    way, sampler = other.engine.quick, tiny_sampler()
    table = sampler.table(steps=4)
    calls = [
        begin(sampler, table, [0, 1], [0, 0]),
        begin(sampler, table, [0, 1, 2], [0, 0, 0]),
        begin(sampler, table, [0, 1], [0, 0], guidance=2.0),
        begin(sampler, dataclasses.replace(table, variance="learned_range"), [0, 1], [0, 0]),
    ]
    assert len({way.key(call) for call in calls}) == len(calls)
    assert way.key(begin(sampler, sampler.table(solver="ddpm", steps=9), [0, 1], [0, 0])) == way.key(calls[0])
