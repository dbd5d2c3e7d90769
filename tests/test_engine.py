"""Engines: the same pictures, and the choice between them."""

import dataclasses

import pytest
import torch
from torch import nn

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm import engine as engine_module
from fastddpm.compiled import CompileError, package_path, weights_hash
from fastddpm.cuda_graph import StepGraph
from fastddpm.denoiser import bind
from fastddpm.engine import Engine
from fastddpm.kernels._native import cache_folder
from fastddpm.machine import describe_choices
from fastddpm.measured import Measured, remember, remembered
from fastddpm.precision import check_precision
from fastddpm.state import State
from fastddpm.step_call import StepCall
from tests.networks import tiny_sampler, tiny_unet

CPU = torch.device("cpu")
RUNS = [
    {"solver": "ddpm", "steps": 7},
    {"solver": "ddim", "steps": 5, "eta": 0.5},
    {"solver": "dpmpp_2m", "steps": 12},
    {"solver": "ddpm", "steps": 1},
]


def like(sampler: Sampler, engine: str, **options: object) -> Sampler:
    """A sampler on the same network with another engine."""
    return Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine=engine, **options)


@pytest.fixture(scope="module")
def compiled(own_cache) -> Sampler:
    """A sampler whose step for three samples is compiled."""
    sampler = like(tiny_sampler(), "compiled")
    assert sampler.compile(3) > 0
    return sampler


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_compiled_draws_the_same_pictures(compiled, options):
    labels = [0, 2, 1]
    expected = like(compiled, "eager").sample(3, seed=5, class_labels=labels, output="raw", **options)
    got = compiled.sample(3, seed=5, class_labels=labels, output="raw", **options)
    assert compiled.engine.used == "compiled"
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_large_ids_and_seeds(compiled):
    asked = {"seed": 2**63 + 5, "sample_ids": [3, 2**33, 2**64 - 1], "class_labels": [0, 2, 1], "output": "raw"}
    expected = like(compiled, "eager").sample(3, solver="ddpm", steps=6, **asked)
    assert (compiled.sample(3, solver="ddpm", steps=6, **asked) - expected).abs().max() < 1e-4


def test_one_package_serves_all_solvers_steps_and_labels(compiled):
    names = {file.name for file in cache_folder().glob("*.pt2")}
    for options in RUNS:
        compiled.sample(3, class_labels=1, **options)
    assert {file.name for file in cache_folder().glob("*.pt2")} == names


def test_smaller_batches_are_filled_up(compiled):
    assert compiled.compile(3) is None  # there already
    expected = like(compiled, "eager").sample(4, class_labels=1, steps=3, batch_size=3, output="raw")
    got = compiled.sample(4, class_labels=1, steps=3, batch_size=3, output="raw")
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-4
    assert compiled.engine.used == "compiled"


def test_previews_are_those_of_the_samples(compiled):
    seen: dict[str, list] = {"eager": [], "compiled": []}
    for name in seen:
        sampler = compiled if name == "compiled" else like(compiled, name)
        sampler.sample(2, class_labels=1, steps=3, batch_size=3, callback=seen[name].append)
    for ours, theirs in zip(seen["compiled"], seen["eager"], strict=True):
        assert (ours.step, ours.timestep, ours.x.shape) == (theirs.step, theirs.timestep, theirs.x.shape)
        assert (ours.x - theirs.x).abs().max() < 1e-4 and (ours.x_start - theirs.x_start).abs().max() < 1e-3


def test_a_later_process_finds_the_package(compiled):
    again = like(compiled, "auto")
    again.sample(3, class_labels=1, steps=2)
    measured = remembered()
    assert len(measured) >= 1 and all(m.compiled_ms > 0 and m.eager_ms > 0 for m in measured.values())
    # Which of the two is quicker depends on the machine; that the choice follows the measurement does not.
    fast = [m.compiled_ms < m.eager_ms for m in measured.values() if m.label.startswith("batch 3 ")]
    assert again.engine.used == ("compiled" if fast[0] else "eager")
    assert describe_choices(weights_hash(compiled.model))


def test_damaged_package_is_made_anew(compiled, monkeypatch):
    slot = _slot(compiled, 3)
    whole = slot.path.read_bytes()
    slot.path.write_bytes(whole[: len(whole) // 2])
    built = []
    monkeypatch.setattr(engine_module, "compile_step", lambda call, path: built.append(path.write_bytes(whole)) or 1.0)
    sampler = like(compiled, "compiled")
    sampler.sample(3, class_labels=1, steps=1)
    assert len(built) == 1 and sampler.engine.used == "compiled"


def _slot(sampler: Sampler, n: int):
    table = sampler.table(steps=2)
    labels = torch.zeros(n, dtype=torch.int64)
    state = State.create(sampler.spec.shape, torch.arange(n), 0, device=CPU, labels=labels, history=True)
    return sampler.engine._slot(StepCall(bind(sampler.model, sampler.spec, table, labels), table, state))


# --- the choice -----------------------------------------------------------------------------------


def passes(x, step, sample_id, seed, labels, history, *more):
    """A compiled step that only counts."""
    return x, step + 1, history


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes no time and gives a step that does nothing; returns the list of what was asked for."""
    asked = []
    monkeypatch.setattr(engine_module, "compile_step", lambda call, path: asked.append(call) or 1.0)
    monkeypatch.setattr(engine_module, "load_step", lambda path: passes)
    monkeypatch.setattr(engine_module, "checked", lambda step, call, path: step)
    monkeypatch.setattr(engine_module, "_milliseconds", lambda function: 1.0)
    monkeypatch.setattr(engine_module, "remembered", dict)
    monkeypatch.setattr(engine_module, "remember", lambda name, measured: None)
    return asked


def fresh() -> Sampler:
    """A sampler whose weights no other test has."""
    sampler = tiny_sampler()
    with torch.no_grad():
        sampler.model.stem.bias.add_(float(torch.rand(())))
    return sampler


def test_short_runs_are_not_compiled_for(no_compiler):
    sampler = fresh()
    sampler.sample(2, class_labels=1, steps=2)
    assert sampler.engine.used == "eager" and "too few" in sampler.engine.why
    sampler.sample(2, class_labels=1, steps=10)
    assert sampler.engine.used == "eager" and "would take" in sampler.engine.why
    assert no_compiler == []


def test_long_runs_are_compiled_for_once_under_way(no_compiler, monkeypatch):
    monkeypatch.setattr(engine_module, "COMPILE_S", 1e-9)
    monkeypatch.setattr(engine_module, "_milliseconds", lambda function: 1e-9)
    sampler = fresh()
    sampler.sample(2, class_labels=1, steps=10)
    assert len(no_compiler) == 1 and sampler.engine.used == "compiled"
    sampler.sample(2, class_labels=1, steps=10)
    assert len(no_compiler) == 1


def test_slower_compiled_steps_are_not_used(no_compiler, monkeypatch):
    monkeypatch.setattr(engine_module, "COMPILE_S", 1e-9)
    monkeypatch.setattr(engine_module, "_milliseconds", lambda function: 1e9)
    sampler = fresh()
    for _ in range(2):
        sampler.sample(2, class_labels=1, steps=10)
        assert sampler.engine.used == "eager" and "ms a step compiled" in sampler.engine.why
    assert len(no_compiler) == 1


def test_auto_goes_on_eagerly_where_nothing_compiles(monkeypatch):
    def fail(call, path):
        raise CompileError("no compiler here")

    monkeypatch.setattr(engine_module, "COMPILE_S", 1e-9)
    monkeypatch.setattr(engine_module, "compile_step", fail)
    sampler = fresh()
    expected = like(sampler, "eager").sample(2, class_labels=1, steps=6)
    assert torch.equal(sampler.sample(2, class_labels=1, steps=6), expected)
    assert "no compiler here" in sampler.engine.why
    with pytest.raises(CompileError, match="no compiler here"):
        like(sampler, "compiled").sample(2, class_labels=1, steps=6)


def test_a_wrongly_compiled_step_is_refused(monkeypatch):
    def compile_step(call, path):
        path.write_bytes(b"")
        return 1.0

    monkeypatch.setattr(engine_module, "compile_step", compile_step)
    monkeypatch.setattr(engine_module, "load_step", lambda path: passes)
    sampler = like(fresh(), "compiled")
    with pytest.raises(CompileError, match="must give what an eager one gives"):
        sampler.sample(2, class_labels=1, steps=6)
    assert not _slot(sampler, 2).path.exists()


class Branching(nn.Module):
    """A network that looks at its values, which no graph can hold."""

    def forward(self, x, t):
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_one_graph_is_refused():
    sampler = Sampler(
        Branching(), NoiseSchedule.linear(20), ModelSpec(shape=(1, 4, 4)), device="cpu", engine="compiled"
    )
    before = set(cache_folder().glob("*"))
    with pytest.raises(CompileError, match="must compile as one graph.*engine='eager'"):
        sampler.sample(1, steps=3)
    assert set(cache_folder().glob("*")) == before


def test_memory_of_measurements_survives_damage(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDDPM_CACHE", str(tmp_path))
    remember("a", Measured(2.0, 1.0, 30.0, "x"))
    assert remembered() == {"a": Measured(2.0, 1.0, 30.0, "x")}
    (tmp_path / "measured.json").write_text("[")
    assert remembered() == {}
    remember("b", Measured(1.0))
    assert list(remembered()) == ["b"]


def test_package_name_depends_on_all_that_matters():
    sampler = tiny_sampler()

    def path(n=2, weights="w", **changes):
        table = dataclasses.replace(sampler.table(steps=4), **changes)
        labels = torch.zeros(n, dtype=torch.int64)
        state = State.create((1, 8, 8), torch.arange(n), 0, device=CPU, labels=labels, history=True)
        return package_path(StepCall(bind(sampler.model, sampler.spec, table, labels), table, state), weights)

    assert path() == path()
    assert len({path(), path(n=3), path(weights="v"), path(variance="learned_range")}) == 4


# --- arguments ------------------------------------------------------------------------------------


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


def test_graph_engine_is_for_gpus_alone():
    assert Engine("cuda_graph", torch.device("cuda")).name == "cuda_graph"


# --- precision ------------------------------------------------------------------------------------


def test_bf16_changes_the_network_alone_and_little():
    sampler = tiny_sampler()
    half = like(sampler, "eager", precision="bf16")
    assert sampler.model.stem.weight.dtype == torch.float32
    assert half.model.stem.weight.dtype == torch.bfloat16 and half.model.time_mlp[0].weight.dtype == torch.float32
    full, low = (s.sample(8, class_labels=1, steps=10) for s in (sampler, half))
    assert low.dtype == torch.float32
    psnr = -10 * ((full - low) ** 2).flatten(1).mean(1).log10()
    assert psnr.median() > 35 and not torch.equal(full, low)


def test_bf16_of_another_network_is_autocast():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = network, []

        def forward(self, x, t):
            self.seen.append(self.inner[0](x).dtype)
            return self.inner(x)

    net = Net()
    sampler = Sampler(net, NoiseSchedule.linear(20), ModelSpec(shape=(1, 4, 4)), device="cpu", precision="bf16")
    assert sampler.sample(1, steps=2).dtype == torch.float32 and net.seen[0] == torch.bfloat16
    assert network[0].weight.dtype == torch.float32


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["compiled", "cuda_graph"])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_gpu_engines_draw_the_same_pictures(engine, options):
    network = tiny_unet()
    make = lambda name: Sampler(network, NoiseSchedule.linear(40), tiny_sampler().spec, device="cuda", engine=name)  # noqa: E731
    expected = make("eager").sample(5, class_labels=1, batch_size=3, output="raw", **options)
    got = make(engine).sample(5, class_labels=1, batch_size=3, output="raw", **options)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.gpu
def test_graph_leaves_the_state_as_it_was_until_it_is_replayed():
    state = State.create((1, 8, 8), torch.arange(2), 0, device=torch.device("cuda"), history=True)
    before = state.copy()
    graph = StepGraph(lambda: state.x.add_(1.0), state, 4)
    assert torch.equal(state.x, before.x)
    graph.replay()
    assert torch.equal(state.x, before.x + 4)
