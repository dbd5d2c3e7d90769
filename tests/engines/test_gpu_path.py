"""The GPU's engine, its own code, on the CPU: one compiled graph, no recompilation, replay of what was captured once.

What stands in for the GPU: a recorder for CUDA graphs, and Inductor's C++ back end (or Dynamo alone) for its CUDA one.
"""

import contextlib
import functools

import pytest
import torch

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.engines import contest
from fastddpm.engines.choose import Engine
from fastddpm.engines.compare import CompileError
from fastddpm.engines.gpu import Gpu, compile_in_place
from fastddpm.step.request import RunOptions, make_request
from fastddpm.step.step import StepForm
from tests.engines.common import like
from tests.engines.recorder import Recorder, Untouched
from tests.networks import tiny_sampler
from tests.steps import grow

CPU = torch.device("cpu")
K = 4
RUNS = [
    {"solver": "dpmpp_2m", "steps": 9},
    {"solver": "ddpm", "steps": 13},
    {"solver": "ddim", "steps": 8, "eta": 0.5},
    {"solver": "ddim", "timesteps": [30, 11, 2]},
    {"solver": "ddpm", "steps": 1},
    {"solver": "ddpm"},
]


def uncompiled(step, arguments):
    """The step itself in a compiled one's place: its operations can be recorded one by one."""
    return step


by_dynamo = functools.partial(compile_in_place, backend="eager")


FORMS: list[StepForm] = []
"""Of the steps that were compiled in this test."""


def gpu_sampler(sampler=None, *, graphs=True, compile_step=uncompiled, capture=Recorder, **engine) -> Sampler:
    """A sampler whose engine is the GPU's, on the CPU."""

    def counted(step, arguments):
        FORMS.append(step.form)
        return compile_step(step, arguments)

    copy = like(sampler or tiny_sampler(), "eager")
    quick = Gpu(graphs=graphs, graph_steps=K, compile_step=counted, capture=capture)
    copy.stepper.engine = Engine(engine.get("name", "cuda_graph"), CPU, quick=quick)
    return copy


@pytest.fixture(autouse=True)
def captures():
    """The graphs that were captured in this test."""
    Recorder.captures.clear()
    FORMS.clear()
    return Recorder.captures


@pytest.fixture
def compiling_again_is_an_error():
    """A function: from its call on, to the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))


# --- one graph -----------------------------------------------------------------------------------------------------


def check_every_run(sampler, **options):
    """All solvers, step counts, seeds, ids and labels at one batch shape, against the eager engine."""
    eager = like(sampler, "eager")
    for number, run in enumerate(RUNS):
        asked = {
            "seed": 2**63 + number,
            "sample_ids": [number, 2**40 + number, 2**64 - 1 - number],
            "class_labels": [number % 3, (number + 1) % 3, 2],
            "output": "raw",
            **run,
            **options,
        }
        expected = eager.sample(3, **asked)
        got = sampler.sample(3, **asked)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), run


@pytest.mark.slow
def test_the_compiled_step_is_one_graph_and_is_never_compiled_again(compiling_again_is_an_error):
    """Inductor compiles the engine's own step, in place, as on a GPU; from then on a recompilation is an error."""
    sampler = gpu_sampler(graphs=False, compile_step=compile_in_place, name="compiled")
    sampler.sample(3, class_labels=0, solver="dpmpp_2m", steps=4)  # a step with a history serves the others too
    compiling_again_is_an_error()
    check_every_run(sampler)
    assert sampler.engine.used == "compiled" and len(FORMS) == 1


@pytest.mark.parametrize(
    ("noise", "guidance"),
    [(False, 2.0), (True, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 1.0), (True, 2.0)))],
    ids=["noise made, guided", "noise supplied, plain", "noise made, plain", "noise supplied, guided"],
)
def test_each_form_is_one_graph_without_recompilation(guidance, noise, compiling_again_is_an_error):
    """The same with Dynamo alone, for steps with and without history."""
    torch._dynamo.reset()
    sampler = gpu_sampler(graphs=False, compile_step=by_dynamo, name="compiled")
    options = {"guidance_scale": guidance}
    if noise:
        options["noise"] = lambda i, t, ids: torch.full((len(ids), 1, 8, 8), 0.25)
    for run in ({"solver": "ddim", "eta": 1.0}, {"solver": "dpmpp_2m"}, {"solver": "dpmpp_3m"}):  # 0, 1, 2 histories
        sampler.sample(3, class_labels=0, steps=3, **run, **options)
    compiled = len(FORMS)
    compiling_again_is_an_error()
    check_every_run(sampler, **options)
    assert len(FORMS) == compiled


def foreign(shape, T=50) -> Sampler:
    """A sampler of a function, which compiles in a moment."""
    network = lambda x, t: x / (1 + t.view(-1, 1, 1, 1) / 100)  # noqa: E731
    return Sampler(network, NoiseSchedule.linear(T), ModelSpec(shape=shape), device="cpu", engine="eager")


@pytest.mark.parametrize(
    "compile_step", [by_dynamo, pytest.param(compile_in_place, marks=pytest.mark.slow)], ids=["dynamo", "inductor"]
)
def test_foreign_networks_are_one_graph_too(compile_step, compiling_again_is_an_error):
    torch._dynamo.reset()
    plain = foreign((3, 5, 7))
    sampler = gpu_sampler(plain, graphs=False, compile_step=compile_step, name="compiled")
    sampler.sample(2, solver="ddpm", steps=3)
    compiling_again_is_an_error()
    for steps in (4, 7, 50):
        got = sampler.sample(2, solver="ddpm", steps=steps, seed=steps)
        torch.testing.assert_close(got, plain.sample(2, solver="ddpm", steps=steps, seed=steps), rtol=1e-4, atol=1e-4)
    assert sampler.engine.used == "compiled" and len(FORMS) == 1


def test_a_book_that_grows_is_no_recompilation(compiling_again_is_an_error):
    torch._dynamo.reset()
    sampler = gpu_sampler(graphs=False, compile_step=by_dynamo)
    sampler.sample(3, class_labels=1, solver="ddpm", steps=3)
    compiling_again_is_an_error()
    grow(sampler)
    expected = like(sampler, "eager").sample(3, class_labels=1, solver="ddpm", steps=5)
    torch.testing.assert_close(sampler.sample(3, class_labels=1, solver="ddpm", steps=5), expected)


def test_a_batch_of_another_size_is_compiled_by_itself():
    sampler = gpu_sampler(foreign((1, 4, 4)), graphs=False, compile_step=by_dynamo)
    for n in range(1, 11):  # more than Dynamo would allow one function by itself
        assert sampler.sample(n, solver="ddpm", steps=2).shape[0] == n
    assert len(FORMS) == 10


def test_what_is_no_one_graph_is_refused():
    def branches(x, t):
        return x if float(x.sum()) > 0 else -x

    plain = Sampler(branches, NoiseSchedule.linear(50), ModelSpec(shape=(1, 4, 4)), device="cpu", engine="eager")
    sampler = gpu_sampler(plain, compile_step=by_dynamo)
    with pytest.raises(CompileError, match="must compile as one graph.*engine='eager'"):
        sampler.sample(1, steps=3)


# --- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_replay_makes_the_whole_trajectory(run, guidance, captures):
    """Also of runs whose steps are no multiple of what a graph holds."""
    sampler = gpu_sampler()
    asked = {"seed": 7, "class_labels": [0, 2, 1], "guidance_scale": guidance, "output": "raw", **run}
    expected = like(sampler, "eager").sample(3, **asked)
    assert torch.equal(sampler.sample(3, **asked), expected)
    steps = sampler.table(**run).S
    one, many = captures
    assert (many.replays, one.replays) == divmod(steps, K)
    assert sampler.engine.used == "cuda_graph"


def test_a_second_sample_replays_without_a_new_capture(captures):
    """Other labels, solver, steps, seed and ids: rows are copied into the book, and nothing else is made."""
    sampler = gpu_sampler()
    sampler.sample(3, class_labels=0, solver="dpmpp_2m", steps=5)
    assert len(captures) == 2
    check_every_run(sampler)
    assert len(captures) == 2


def test_a_graph_with_a_history_serves_runs_without_and_the_leanest_is_taken(captures):
    sampler = gpu_sampler()
    sampler.sample(3, class_labels=0, solver="ddim", steps=5)
    assert [form.history for form in FORMS] == [0]
    sampler.sample(3, class_labels=0, solver="dpmpp_2m", steps=5)
    assert len(captures) == 4
    replays = captures[0].replays
    sampler.sample(3, class_labels=0, solver="ddim", steps=5)
    assert len(captures) == 4 and captures[0].replays > replays


def test_two_histories_are_kept_for_who_reads_them(captures):
    """DPM-Solver++(3M) has graphs of its own; they serve other solvers too, but only where those have none."""
    sampler = gpu_sampler()
    asked = {"class_labels": [0, 2, 1], "output": "raw"}
    for run in ({"solver": "dpmpp_3m", "steps": 4 * K + 1}, {"solver": "dpmpp_3m", "steps": 7}, *RUNS):
        expected = like(sampler, "eager").sample(3, **asked, **run)
        assert torch.equal(sampler.sample(3, **asked, **run), expected)
    assert len(captures) == 2
    FORMS.clear()
    lean = gpu_sampler()
    for solver in ("dpmpp_2m", "dpmpp_3m"):
        lean.sample(3, solver=solver, steps=5, **asked)
    assert [form.history for form in FORMS] == [1, 2] and len(captures) == 6


def test_nothing_is_launched_between_replays():
    sampler = gpu_sampler()
    sampler.sample(3, class_labels=0, solver="ddpm", steps=5)
    request = make_request(sampler.spec, CPU, 3, RunOptions(class_labels=[0, 1, 2], batch_size=3))
    table = sampler.table(solver="ddpm", steps=11)
    with sampler.stepper.undisturbed(), sampler.stepper.begin(table, request) as runner:
        before = {name: value.data_ptr() for name, value in runner.state.tensors()}
        left = table.S
        with Untouched():
            while left:
                left -= runner.run(left)
        assert {name: value.data_ptr() for name, value in runner.state.tensors()} == before
        assert torch.equal(runner.state.step, runner.state.end)


@pytest.mark.parametrize("kind", ["tensor", "function", "generator"])
def test_replay_with_noise_of_every_kind(kind, captures):
    sampler = gpu_sampler()
    z = torch.randn(9, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    make = {
        "tensor": lambda: z,
        "function": lambda: lambda i, t, ids: z[i, : len(ids)],
        "generator": lambda: torch.Generator().manual_seed(3),
    }[kind]
    asked = {"class_labels": [0, 2, 1], "solver": "ddpm", "steps": 9, "output": "raw"}
    expected = like(sampler, "eager").sample(3, noise=make(), **asked)
    for _ in range(2):
        assert torch.equal(sampler.sample(3, noise=make(), **asked), expected)
    assert len(captures) == 1  # each step is handed its noise, so there is no graph of many


def test_previews_are_made_step_by_step():
    seen, expected = [], []
    sampler = gpu_sampler()
    options = {"class_labels": [0, 2, 1], "solver": "ddim", "steps": 6}
    like(sampler, "eager").sample(3, callback=expected.append, **options)
    sampler.sample(3, callback=seen.append, **options)
    assert len(seen) == 6
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.x_start, theirs.x_start)


def test_a_run_within_a_run_has_memory_of_its_own(captures):
    sampler, inner = gpu_sampler(), []
    options = {"class_labels": [0, 2, 1], "solver": "ddim", "steps": 4, "output": "raw"}

    def callback(preview):
        inner.append(sampler.sample(3, callback=lambda _: None, seed=9, **options))

    outer = sampler.sample(3, callback=callback, seed=8, **options)
    eager = like(sampler, "eager")
    assert torch.equal(outer, eager.sample(3, seed=8, **options))
    assert all(torch.equal(x, eager.sample(3, seed=9, **options)) for x in inner)
    assert len(captures) == 4  # two batches at a time, each with its graphs, used again and again


CHANGES = {
    "in place": (lambda net: net.time_projection.weight.mul_(1.5), 2),
    "replaced": (lambda net: net.load_state_dict({k: 1.25 * v for k, v in net.state_dict().items()}, assign=True), 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_see_changed_weights(change, captures):
    """What changes in place is read by the same graphs; where weights have moved they are captured anew."""
    sampler = gpu_sampler()
    options = {"class_labels": [0, 2, 1], "solver": "ddim", "steps": 5, "output": "raw"}
    before = sampler.sample(3, **options)
    alter, graphs = CHANGES[change]
    with torch.no_grad():
        alter(sampler.model)
    expected = like(sampler, "eager").sample(3, **options)
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(sampler.sample(3, **options), expected)
    assert len(captures) == graphs


def test_a_book_that_grows_is_captured_anew(captures):
    sampler = gpu_sampler()
    options = {"class_labels": [0, 2, 1], "solver": "ddpm", "steps": 6, "output": "raw"}
    expected = sampler.sample(3, **options)
    grow(sampler)
    assert torch.equal(sampler.sample(3, **options), expected)
    assert len(captures) == 4


def cannot_capture(launches):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_captured_is_refused_and_auto_says_so(monkeypatch):
    with pytest.raises(CompileError, match="a CUDA graph can hold, got operation not permitted.*engine='compiled'"):
        gpu_sampler(capture=cannot_capture).sample(2, class_labels=1, steps=4)
    monkeypatch.setattr(Gpu, "cost_s", 0.0)
    automatic = gpu_sampler(capture=cannot_capture, name="auto")
    with pytest.warns(RuntimeWarning, match="goes on eagerly"):
        got = automatic.sample(2, class_labels=1, steps=8)
    assert torch.equal(got, like(automatic, "eager").sample(2, class_labels=1, steps=8))


def test_auto_changes_over_to_graphs_in_the_middle_of_a_run(monkeypatch, captures):
    monkeypatch.setattr(Gpu, "cost_s", 0.0)
    monkeypatch.setattr(contest, "race", lambda ways: [1.0 + i for i in range(len(ways))])
    sampler = gpu_sampler(name="auto")
    asked = {"class_labels": [0, 2, 1], "solver": "dpmpp_2m", "steps": 12, "output": "raw"}
    expected = like(sampler, "eager").sample(3, **asked)
    assert torch.equal(sampler.sample(3, **asked), expected)
    assert sampler.engine.used == "cuda_graph" and captures


# --- on a real one -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["compiled", "cuda_graph"])
def test_gpu_engines_draw_the_same_pictures(engine, precision):
    plain = tiny_sampler()
    make = lambda name: Sampler(  # noqa: E731
        plain.model, plain.schedule, plain.spec, device="cuda", engine=name, graph_steps=K, precision=precision
    )
    ours, eager = make(engine), make("eager")
    for run in RUNS:
        expected = eager.sample(5, class_labels=1, batch_size=3, output="raw", **run)
        got = ours.sample(5, class_labels=1, batch_size=3, output="raw", **run)
        bound = 1e-4 if precision == "fp32" else 5e-2
        assert (got - expected).abs().max() <= bound * expected.abs().max(), run
        assert ours.engine.used == engine


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compiled", "cuda_graph"])
def test_the_loop_never_waits_for_the_gpu(engine):
    plain = tiny_sampler()
    sampler = Sampler(plain.model, plain.schedule, plain.spec, device="cuda", engine=engine, graph_steps=K)
    sampler.sample(3, class_labels=0, solver="ddpm", steps=5)
    request = make_request(sampler.spec, sampler.device, 3, RunOptions(class_labels=[0, 1, 2], batch_size=3))
    table = sampler.table(solver="ddpm", steps=11)
    with sampler.stepper.undisturbed(), sampler.stepper.begin(table, request) as runner:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            left = table.S
            while left:
                left -= runner.run(left)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if engine == "cuda_graph":
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(runner.state.step, runner.state.end)


# --- edits ---------------------------------------------------------------------------------------------------------


def test_one_capture_serves_every_edit_that_knows_of_a_mask(captures):
    """Other pictures, masks, jumps and solvers replay what was captured; without a mask another step is captured."""
    sampler, generator = gpu_sampler(), torch.Generator().manual_seed(0)
    eager = like(sampler, "eager")
    runs = (
        ("left", {"steps": 6, "jump_length": 2, "resamplings": 3}),
        ("middle", {"solver": "ddpm", "steps": 9, "jump_length": 4, "resamplings": 2}),
        (torch.rand(8, 8, generator=generator), {"fill": "replace", "steps": 5, "eta": 1.0}),
    )
    for number, (mask, run) in enumerate(runs):
        images = torch.rand(3, 1, 8, 8, generator=generator)
        asked = {"seed": number, "class_labels": [0, 2, 1], "output": "raw", **run}
        expected, got = eager.inpaint(images, mask, **asked), sampler.inpaint(images, mask, **asked)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert sampler.engine.used == "cuda_graph" and len(captures) == 2  # of one step, and of several
    pictures = torch.rand(3, 1, 8, 8, generator=generator)
    asked = {"class_labels": 1, "steps": 7, "output": "raw"}
    got, expected = sampler.img2img(pictures, 0.6, **asked), eager.img2img(pictures, 0.6, **asked)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() and len(captures) == 4
