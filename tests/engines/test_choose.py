"""The choice between engines: by measurement, remembered, said, and the same rule for every kind."""

import pytest
import torch

from fastddpm import Sampler
from fastddpm.engines import choose
from fastddpm.engines.choose import Engine
from fastddpm.engines.compare import CompileError
from fastddpm.engines.measured import Measured
from fastddpm.engines.precision import check_precision
from fastddpm.engines.runner import StepRunner
from fastddpm.kernels.kept import CACHE_VARIABLE
from tests.engines.common import like
from tests.networks import tiny_sampler

CPU = torch.device("cpu")


class Pretended:
    """A quick way whose step is the eager one; it counts what it is asked for."""

    name = "compiled"

    def __init__(self):
        self.prepared, self.ready, self.error = 0, False, None

    def formed(self, call):
        return call.formed(history=1)

    def key(self, call):
        return f"batch-{len(call.state.x)}"

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

    def runner(self, call):
        return StepRunner(call.step, call)


@pytest.fixture
def quick(monkeypatch, tmp_path) -> tuple[Sampler, Pretended]:
    """An automatic sampler that may take a pretended quick way, and that way; nothing is remembered yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(choose, "milliseconds", lambda make, call: 1.0)
    sampler, way = tiny_sampler(), Pretended()
    sampler.stepper.engine = Engine("auto", CPU, quick=way)
    return sampler, way


def run(sampler, steps=10, **options):
    return sampler.sample(2, class_labels=1, steps=steps, output="raw", **options)


def test_short_runs_are_not_compiled_for(quick):
    sampler, way = quick
    run(sampler, steps=2)
    assert sampler.engine.used == "eager" and "too few" in sampler.engine.why
    run(sampler)
    assert sampler.engine.used == "eager" and "would take" in sampler.engine.why
    assert way.prepared == 0


def test_long_runs_are_compiled_for_once_under_way(quick, monkeypatch):
    sampler, way = quick
    monkeypatch.setattr(choose, "COMPILE_S", 1e-9)
    monkeypatch.setattr(choose, "milliseconds", lambda make, call: 1e-9)
    expected = run(like(sampler, "eager"))
    for _ in range(2):
        assert torch.equal(run(sampler), expected)  # the change-over is no break
        assert sampler.engine.used == "compiled" and "ms a step compiled" in sampler.engine.why
    assert way.prepared == 1


def test_slower_compiled_steps_are_not_used(quick, monkeypatch):
    sampler, way = quick
    monkeypatch.setattr(choose, "COMPILE_S", 1e-9)
    monkeypatch.setattr(choose, "milliseconds", lambda make, call: 1e9)
    for _ in range(2):
        run(sampler)
        assert sampler.engine.used == "eager" and "ms a step compiled" in sampler.engine.why
    assert way.prepared == 1


def test_what_was_measured_decides_in_the_next_process(quick):
    sampler, way = quick
    choose.remember("batch-2", Measured(eager_ms=1.0, compiled_ms=2.0))
    way.ready = True
    run(sampler)
    assert sampler.engine.used == "eager" and sampler.engine.why == "2 ms a step compiled, 1 eager"
    sampler.stepper.engine = Engine("auto", CPU, quick=way)
    choose.remember("batch-2", Measured(eager_ms=2.0, compiled_ms=1.0))
    run(sampler)
    assert sampler.engine.used == "compiled"


@pytest.mark.parametrize("error", [CompileError("no graph"), OSError("disk full")], ids=["compiler", "disk"])
def test_auto_goes_on_eagerly_and_warns_once(quick, monkeypatch, error):
    sampler, way = quick
    way.error = error
    monkeypatch.setattr(choose, "COMPILE_S", 1e-9)
    expected = run(like(sampler, "eager"))
    with pytest.warns(RuntimeWarning, match="goes on eagerly") as warned:
        assert torch.equal(run(sampler), expected)
        run(sampler)
    assert len(warned) == 1 and str(error) in sampler.engine.why and way.prepared == 1


def test_what_is_asked_for_by_name_must_work(quick):
    sampler, way = quick
    way.error = CompileError("no graph")
    sampler.stepper.engine = Engine("compiled", CPU, quick=way)
    with pytest.raises(CompileError, match="no graph"):
        run(sampler, steps=2)
    assert issubclass(CompileError, ValueError)  # what commands report in one line


@pytest.mark.parametrize("noise", ["function", "generator", "tensor"])
def test_a_change_over_keeps_supplied_noise_in_step(quick, monkeypatch, noise):
    sampler, _ = quick
    monkeypatch.setattr(choose, "COMPILE_S", 1e-9)
    z = torch.randn(10, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    make = {
        "function": lambda: lambda i, t, ids: z[i],
        "generator": lambda: torch.Generator().manual_seed(3),
        "tensor": lambda: z,
    }[noise]
    got = run(sampler, solver="ddpm", noise=make())
    assert sampler.engine.used in ("compiled", "eager")
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
    sampler.engine.settle("compiled")
    run(sampler, steps=2)
    assert (sampler.engine.used, sampler.engine.why) == ("compiled", "as in the run that this one joins")


def test_what_settles_an_engine_on_its_own_choice_is_why_it_was_made(quick):
    sampler, _ = quick
    run(sampler, steps=2)
    why = sampler.engine.why
    sampler.engine.settle("eager")
    run(sampler, steps=2)
    assert sampler.engine.why == why and "too few" in why


@pytest.mark.parametrize(("name", "asked"), [("auto", "cuda_graph"), ("auto", "onnx"), ("eager", "compiled")])
def test_an_engine_is_not_settled_on_what_was_not_to_be_chosen(name, asked):
    with pytest.raises(ValueError, match=f"engine must be {asked}, got {name} on a cpu; ask for {asked}"):
        Engine(name, CPU).settle(asked)
