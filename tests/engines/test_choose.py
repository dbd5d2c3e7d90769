"""The choice between engines: by measurement, remembered, said, and the same rule for every kind."""

import pytest
import torch

from fastddpm import Sampler
from fastddpm.engines import contest
from fastddpm.engines.choose import Engine
from fastddpm.engines.compare import CompileError
from fastddpm.engines.measured import Measured, remember
from fastddpm.engines.precision import check_precision
from fastddpm.engines.quick import Libraries
from fastddpm.engines.runner import StepRunner
from fastddpm.kernels.kept import CACHE_VARIABLE
from tests.engines.common import like
from tests.networks import tiny_sampler

CPU = torch.device("cpu")


EAGER_MS = 2.0


class Pretended:
    """A quick way whose step is the eager one; it counts what it is asked for."""

    cost_s, gain = 45.0, 1 / 3

    def __init__(self, name="compiled", ms=1.0):
        self.name, self.ms = name, ms
        self.prepared, self.ready, self.error = 0, False, None

    def formed(self, call):
        return call.formed(history=1)

    def key(self, call):
        return f"{self.name}-{len(call.state.x)}"

    def is_kept(self, call):
        return True

    def is_ready(self, call):
        return self.ready

    is_there = is_ready

    def prepare(self, call, on_compile):
        if self.ready:
            return None
        self.prepared += 1
        if self.error is not None:
            raise self.error
        self.ready = True
        return 1.0

    def forget(self, call):
        self.ready = False

    def runner(self, call):
        runner = StepRunner(call.step, call)
        runner.ms = self.ms
        return runner


@pytest.fixture
def quick(monkeypatch, tmp_path) -> tuple[Sampler, Pretended]:
    """An automatic sampler that may take a pretended quick way, and that way; nothing is remembered yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(contest, "race", raced)
    sampler, way = tiny_sampler(), Pretended()
    sampler.stepper.engine = Engine("auto", CPU, quick=way)
    return sampler, way


def raced(ways):
    """What the ways pretend to take."""
    return [getattr(make(call), "ms", EAGER_MS) for make, call in ways]


def run(sampler, steps=10, **options):
    return sampler.sample(2, class_labels=1, steps=steps, output="raw", **options)


def with_library(sampler, way, library, missing=()):
    sampler.stepper.engine = Engine("auto", CPU, quick=way, libraries=Libraries((library,), missing))
    return sampler.engine


def test_short_runs_are_not_compiled_for(quick):
    sampler, way = quick
    run(sampler, steps=2)
    assert sampler.engine.used == "eager" and "too few" in sampler.engine.why
    run(sampler)
    assert sampler.engine.used == "eager" and "compiled would take about 45 s to get ready" in sampler.engine.why
    assert way.prepared == 0


def test_long_runs_are_compiled_for_once_under_way(quick):
    sampler, way = quick
    way.cost_s = 0.0
    expected = run(like(sampler, "eager"))
    for _ in range(2):
        assert torch.equal(run(sampler), expected)  # the change-over is no break
        assert sampler.engine.used == "compiled" and sampler.engine.why == "1 ms a step compiled, 2 eager"
    assert way.prepared == 1


def test_slower_compiled_steps_are_not_used(quick):
    sampler, way = quick
    way.cost_s, way.ms = 0.0, 3.0
    for _ in range(2):
        run(sampler)
        assert sampler.engine.used == "eager" and sampler.engine.why == "2 ms a step eager, 3 compiled"
    assert way.prepared == 1


def test_what_was_measured_decides_in_the_next_process(quick):
    sampler, way = quick
    remember("compiled-2", Measured(eager_ms=1.0, compiled_ms=2.0))
    way.ready = True
    run(sampler)
    assert sampler.engine.used == "eager" and sampler.engine.why == "1 ms a step eager, 2 compiled"
    sampler.stepper.engine = Engine("auto", CPU, quick=way)
    remember("compiled-2", Measured(eager_ms=2.0, compiled_ms=1.0))
    run(sampler)
    assert sampler.engine.used == "compiled"


@pytest.mark.parametrize("library_ms, used", [(0.5, "openvino"), (1.5, "compiled"), (9.0, "compiled")])
def test_the_quickest_of_all_ways_is_taken(quick, library_ms, used):
    sampler, way = quick
    library = Pretended("openvino", library_ms)
    way.cost_s = library.cost_s = 0.0
    engine = with_library(sampler, way, library, ("onnx is not installed",))
    for _ in range(2):
        run(sampler)
        assert engine.used == used and engine.why.endswith("onnx is not installed")
        assert f"{library_ms:.3g}" in engine.why and "2 eager" in engine.why
    assert (way.prepared, library.prepared) == (1, 1)
    again = with_library(sampler, Pretended(), Pretended("openvino", library_ms))
    way.ready = library.ready = False
    run(sampler)  # a later process prepares what was the quickest, and nothing else
    assert again.used == "eager" and "would take" in again.why


def test_what_cannot_save_more_than_it_costs_is_not_tried(quick):
    sampler, way = quick
    library = Pretended("openvino", 1.0)
    library.cost_s, way.cost_s = 0.0, 0.5  # at most a twentieth of a millisecond a step is hoped for beside it
    with_library(sampler, way, library)
    run(sampler, solver="ddpm", steps=40)
    assert sampler.engine.used == "openvino" and way.prepared == 0
    assert "compiled would take about 0 s to get ready" in sampler.engine.why


def test_with_a_batch_size_one_engine_makes_all_steps(quick, monkeypatch):
    """Measured and chosen before the first step, whatever gets ready during the run."""
    sampler, way = quick
    way.cost_s = 0.0
    made = []
    monkeypatch.setattr(StepRunner, "make", watched(StepRunner.make, made))
    run(sampler, steps=25, batch_size=1)
    assert sampler.engine.used == "compiled" and way.prepared == 1
    assert made == [1.0] * 50
    del made[:]
    sampler.stepper.engine = Engine("auto", CPU, quick=(late := Pretended(ms=0.5)))

    def ready(preview):
        late.ready = True

    run(sampler, steps=5, batch_size=1, callback=ready)
    assert sampler.engine.used == "eager" and len(made) == 10 and set(made) == {EAGER_MS}


def watched(make, made):
    def watch(self, *noise):
        made.append(getattr(self, "ms", EAGER_MS))
        return make(self, *noise)

    return watch


@pytest.mark.parametrize("error", [CompileError("no graph"), OSError("disk full")], ids=["compiler", "disk"])
def test_auto_goes_on_eagerly_and_warns_once(quick, error):
    sampler, way = quick
    way.error, way.cost_s = error, 0.0
    expected = run(like(sampler, "eager"))
    with pytest.warns(RuntimeWarning, match="goes on eagerly") as warned:
        assert torch.equal(run(sampler), expected)
        run(sampler)
    assert len(warned) == 1 and str(error) in sampler.engine.why and way.prepared == 1


def test_auto_goes_on_with_another_way(quick):
    sampler, way = quick
    way.error = CompileError("no graph")
    library = Pretended("onnx")
    way.cost_s = library.cost_s = 0.0
    with_library(sampler, way, library)
    with pytest.warns(RuntimeWarning, match="goes on with onnx: no graph"):
        run(sampler)
    assert sampler.engine.used == "onnx"


def test_what_is_asked_for_by_name_must_work(quick):
    sampler, way = quick
    way.error = CompileError("no graph")
    sampler.stepper.engine = Engine("compiled", CPU, quick=way)
    with pytest.raises(CompileError, match="no graph"):
        run(sampler, steps=2)
    assert issubclass(CompileError, ValueError)  # what commands report in one line


@pytest.mark.parametrize("noise", ["function", "generator", "tensor"])
def test_a_change_over_keeps_supplied_noise_in_step(quick, noise):
    sampler, way = quick
    way.cost_s = 0.0
    z = torch.randn(10, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    make = {
        "function": lambda: lambda i, t, ids: z[i],
        "generator": lambda: torch.Generator().manual_seed(3),
        "tensor": lambda: z,
    }[noise]
    got = run(sampler, solver="ddpm", noise=make())
    assert sampler.engine.used == "compiled"
    assert torch.equal(got, run(like(sampler, "eager"), solver="ddpm", noise=make()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"engine": "fast"}, "engine must be one of"),
        ({"engine": "cuda_graph"}, "it is for GPUs"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"precision": "tf32"}, "on a CPU"),
        ({"precision": "fp16"}, "on a CPU"),
        ({"graph_steps": 0}, "graph_steps must be"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        like(tiny_sampler(), **{"engine": "auto", **options})


def test_tf32_and_fp16_are_for_gpus():
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        check_precision(precision, torch.device("cuda"))


def test_an_engine_that_is_settled_chooses_no_more(quick):
    sampler, _ = quick
    run(sampler, steps=2)
    assert sampler.engine.used == "eager"
    sampler.engine.keep_to("compiled")
    run(sampler, steps=2)
    assert (sampler.engine.used, sampler.engine.why) == ("compiled", "as in the run that this one joins")


def test_what_settles_an_engine_on_its_own_choice_is_why_it_was_made(quick):
    sampler, _ = quick
    run(sampler, steps=2)
    why = sampler.engine.why
    sampler.engine.keep_to("eager")
    run(sampler, steps=2)
    assert sampler.engine.why == why and "too few" in why


@pytest.mark.parametrize(("name", "asked"), [("auto", "cuda_graph"), ("auto", "onnx"), ("eager", "compiled")])
def test_an_engine_is_not_settled_on_what_was_not_to_be_chosen(name, asked):
    with pytest.raises(ValueError, match=f"engine must be {asked}, got {name} on a cpu; ask for {asked}"):
        Engine(name, CPU).keep_to(asked)
