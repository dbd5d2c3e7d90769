"""Packages: the pictures are those of the eager step, one package serves every run, and what is wrong is not used."""

import dataclasses

import pytest
import torch
from torch import nn

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.engines import ahead_of_time, cache
from fastddpm.engines.ahead_of_time import AheadOfTime
from fastddpm.engines.background import Background
from fastddpm.engines.choose import Engine
from fastddpm.engines.compare import CompileError
from fastddpm.engines.devices import describe_choices
from fastddpm.engines.fast_layers import Layer
from fastddpm.kernels import amx_attention, amx_conv, kept, normals
from tests.engines.common import RUNS, like
from tests.networks import SPEC, one_level_sampler, tiny_unet
from tests.steps import begin, grow

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_compiled_draws_the_same_pictures(compiled, options):
    labels = [0, 2, 1]
    expected = like(compiled, "eager").sample(3, seed=5, class_labels=labels, output="raw", **options)
    got = compiled.sample(3, seed=5, class_labels=labels, output="raw", **options)
    assert compiled.engine.used == "compiled"
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_compiled_step_calls_our_kernels_without_python(compiled, monkeypatch):
    """A norm's or a convolution's way through Python would take as long as a small layer."""
    asked = {"seed": 5, "class_labels": [0, 2, 1], "steps": 3, "output": "raw"}
    want = compiled.sample(3, **asked)
    for name in ("group_norm_native.loaded", "winograd.loaded"):
        monkeypatch.setattr(f"fastddpm.kernels.{name}", None)
    loaded, made = normals.loaded, []
    monkeypatch.setattr(normals, "loaded", lambda: made.append(1) or loaded())
    assert torch.equal(compiled.sample(3, **asked), want) and compiled.engine.used == "compiled"
    for_x_T = len(made)
    compiled.sample(3, **asked | {"steps": 6})
    assert len(made) == 2 * for_x_T > 0
    package = max(cache.packages().values(), key=lambda path: path.stat().st_mtime)
    content = package.read_bytes()
    assert all(f"aoti_torch_cpu_{name}".encode() in content for name in ("add_group_norm_native", "normals"))
    assert b"valloc" in content, "its weights do not begin with a line of the cache"


@pytest.mark.slow
@pytest.mark.skipif(not amx_conv.is_there(), reason="a processor without AMX, or no C compiler")
def test_a_compiled_step_in_bf16_runs_on_the_matrix_unit(own_cache, monkeypatch):
    traced, convolve = [], amx_conv.amx_conv
    monkeypatch.setattr(amx_conv, "amx_conv", lambda x, w, b: traced.append(w.shape[2]) or convolve(x, w, b))
    monkeypatch.setattr(Layer, "is_quicker", property(lambda self: True))
    unet = tiny_unet(channels=(32, 64), attention=(False, True))  # skips, attention's linear layers, an upsampling too
    spec = dataclasses.replace(SPEC, shape=(1, 16, 16))  # attention has 64 positions
    asked = {"seed": 5, "class_labels": [0, 2, 1], "steps": 3, "output": "raw"}
    sampler = Sampler(unet, NoiseSchedule.linear(40), spec, device="cpu", engine="compiled", precision="bf16")
    got = sampler.sample(3, **asked)
    assert set(traced) == {1, 4, 9} and sampler.engine.used == "compiled"
    assert b"aoti_torch_cpu_amx_attention" in next(iter(cache.packages().values())).read_bytes()
    for module in (amx_conv, amx_attention):
        monkeypatch.setattr(module, "loaded", None)  # what would be called through Python
    assert torch.equal(sampler.sample(3, **asked), got)
    eager = like(sampler, "eager", precision="bf16").sample(3, **asked)
    assert (got - eager).abs().mean() <= 2.0**-6 * eager.abs().mean()


def test_large_ids_and_seeds(compiled):
    asked = {"seed": 2**63 + 5, "sample_ids": [3, 2**33, 2**64 - 1], "class_labels": [0, 2, 1], "output": "raw"}
    expected = like(compiled, "eager").sample(3, solver="ddpm", steps=6, **asked)
    assert (compiled.sample(3, solver="ddpm", steps=6, **asked) - expected).abs().max() < 1e-4


def test_one_package_serves_all_solvers_steps_and_labels(compiled):
    before = set(cache.packages())
    for options in RUNS:
        compiled.sample(3, class_labels=1, **options)
    assert set(cache.packages()) == before


@pytest.mark.slow
def test_two_histories_have_a_package_of_their_own(compiled):
    """Other solvers' packages carry one history, so that they are no slower; the second serves any run of its kind."""
    before = set(cache.packages())
    for steps in (17, 5):
        asked = {"seed": 5, "class_labels": [0, 2, 1], "output": "raw", "solver": "dpmpp_3m", "steps": steps}
        expected, got = like(compiled, "eager").sample(3, **asked), compiled.sample(3, **asked)
        assert compiled.engine.used == "compiled"
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert len(set(cache.packages()) - before) == 1
    compiled.sample(3, class_labels=1, solver="dpmpp_2m", steps=5)
    assert len(set(cache.packages()) - before) == 1


def test_a_book_that_has_grown_is_served_by_the_same_package(compiled):
    before = set(cache.packages())
    grow(compiled)
    asked = {"class_labels": [0, 2, 1], "solver": "ddpm", "steps": 5, "output": "raw"}
    got = compiled.sample(3, **asked)
    assert set(cache.packages()) == before
    assert (got - like(compiled, "eager").sample(3, **asked)).abs().max() < 1e-4


def test_short_batches_are_filled_up(compiled):
    assert compiled.compile(3) is None  # there already
    before = set(cache.packages())
    expected = like(compiled, "eager").sample(4, class_labels=1, steps=3, batch_size=3, output="raw")
    got = compiled.sample(4, class_labels=1, steps=3, batch_size=3, output="raw")
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-4
    assert compiled.engine.used == "compiled" and set(cache.packages()) == before


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_at_one_batch_size_a_sample_is_the_same_bit_for_bit(compiled, options):
    options = {"output": "raw", "batch_size": 3, **options}
    expected = compiled.sample(6, class_labels=[0, 1, 2, 0, 1, 2], **options)
    assert torch.equal(compiled.sample(1, sample_ids=[4], class_labels=[1], **options)[0], expected[4])
    ids = [5, 0, 3, 2]
    assert torch.equal(compiled.sample(4, sample_ids=ids, class_labels=[i % 3 for i in ids], **options), expected[ids])
    assert compiled.engine.used == "compiled"


def test_previews_are_those_of_the_samples(compiled):
    seen: dict[str, list] = {"eager": [], "compiled": []}
    for name in seen:
        sampler = compiled if name == "compiled" else like(compiled, name)
        sampler.sample(2, class_labels=1, steps=3, batch_size=3, callback=seen[name].append)
    for ours, theirs in zip(seen["compiled"], seen["eager"], strict=True):
        assert (ours.step, ours.timestep, ours.x.shape) == (theirs.step, theirs.timestep, theirs.x.shape)
        assert (ours.x - theirs.x).abs().max() < 1e-4 and (ours.x_start - theirs.x_start).abs().max() < 1e-3


def test_a_later_process_finds_the_package_and_what_was_measured(compiled):
    again = like(compiled, "auto")
    again.sample(3, class_labels=1, steps=2)
    # Which of the two is quicker depends on the machine; that the choice follows the measurement does not.
    [choice] = [
        text for label, text in describe_choices(compiled.stepper.weights).items() if label.startswith("batch 3 ")
    ]
    assert again.engine.used == choice.split(":")[0]


def key_of(sampler: Sampler, n: int = 3, **changes) -> str:
    table = dataclasses.replace(sampler.table(steps=4), **changes)
    quick = AheadOfTime(lambda: sampler.stepper.weights)
    return quick.key(quick.formed(begin(sampler, table, range(n), [0] * n)))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_package_is_made_anew(compiled, monkeypatch, damage):
    path = cache.find(key_of(compiled))
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        whole[:middle] if damage == "cut" else whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :]
    )
    built = []
    monkeypatch.setattr(kept, "SAID", set())  # what was said once is not said again
    monkeypatch.setattr(ahead_of_time, "compile_step", lambda call, path, layers: built.append(path.write_bytes(whole)))
    sampler = like(compiled, "compiled")
    with pytest.warns(cache.CacheWarning, match="damaged"):
        sampler.sample(3, class_labels=1, steps=1)
    assert len(built) == 1 and sampler.engine.used == "compiled"


def test_a_good_package_that_does_not_load_stays(compiled, monkeypatch):
    """Packages are unpacked among temporary files: where there is no room for them, the package is not at fault."""
    key = key_of(compiled)

    def no_room(*arguments):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", no_room)
    with pytest.raises(CompileError, match="must load, got No space left on device; see that .* has room"):
        like(compiled, "compiled").sample(3, class_labels=1, steps=1)
    auto = like(compiled, "auto")
    with pytest.warns(RuntimeWarning, match="goes on eagerly"):
        auto.sample(3, class_labels=1, steps=1)
    assert auto.engine.used == "eager" and "No space left" in auto.engine.why
    assert key in cache.packages()


@pytest.mark.slow
def test_weights_that_change_are_compiled_anew(compiled):
    """Else a package would go on with the old ones, or old rows with new layers: a network that never was."""
    sampler = like(one_level_sampler(), "compiled")
    asked = {"class_labels": [0, 2, 1], "steps": 3, "output": "raw"}
    before = sampler.sample(3, **asked)
    with torch.no_grad():
        sampler.model.time_projection.weight.mul_(1.5)
    expected = like(sampler, "eager").sample(3, **asked)
    assert (expected - before).abs().max() > 1e-3
    assert (sampler.sample(3, **asked) - expected).abs().max() < 1e-4


def test_weights_that_change_are_noticed(compiled, monkeypatch):
    """Whose old package, were it taken for the new one, would be refused."""
    sampler, old = like(one_level_sampler(), "compiled"), cache.find(key_of(compiled)).read_bytes()
    sampler.sample(3, class_labels=1, steps=1)
    with torch.no_grad():
        sampler.model.stem.weight.mul_(1.5)  # of the body, which the package holds
    monkeypatch.setattr(ahead_of_time, "compile_step", lambda call, path, layers: path.write_bytes(old))
    with pytest.raises(CompileError, match="must give what an eager one gives"):
        sampler.sample(3, class_labels=1, steps=1)


class Branching(nn.Module):
    """A network that looks at its values, which no graph can hold."""

    def forward(self, x, t):
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_one_graph_is_refused():
    sampler = Sampler(
        Branching(), NoiseSchedule.linear(20), ModelSpec(shape=(1, 4, 4)), device="cpu", engine="compiled"
    )
    before = set(cache.packages())
    with pytest.raises(CompileError, match="must compile as one graph.*engine='eager'"):
        sampler.sample(1, steps=3)
    assert set(cache.packages()) == before


def test_a_wrongly_compiled_step_is_refused(monkeypatch):
    def passes(x, step, end, *more):
        return x, torch.minimum(step + 1, end), more[-1]

    monkeypatch.setattr(ahead_of_time, "compile_step", lambda call, path, layers: path.write_bytes(b"0"))
    monkeypatch.setattr(ahead_of_time, "load_step", lambda path, key: passes)
    sampler = like(one_level_sampler(), "compiled")
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.125)  # weights that no other test has
    with pytest.raises(CompileError, match="must give what an eager one gives"):
        sampler.sample(2, class_labels=1, steps=6)
    assert key_of(sampler, 2) not in cache.packages()


def test_a_packages_name_depends_on_all_that_matters(monkeypatch):
    sampler = one_level_sampler()
    names = [key_of(sampler), key_of(sampler, n=2), key_of(sampler, variance="learned_range")]
    names.append(key_of(like(sampler, "eager", precision="bf16")))
    monkeypatch.setattr(cache, "source_digest", lambda: "other sources")
    names.append(key_of(sampler))
    with torch.no_grad():
        sampler.model.stem.bias.add_(1.0)
    sampler.stepper.refresh()
    names.append(key_of(sampler))
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert key_of(one_level_sampler()) == names[0] == key_of(one_level_sampler())


def test_a_missing_compiler_is_one_line_and_auto_goes_on(monkeypatch):
    def fail(call, path, layers):
        raise CompileError("no compiler here")

    monkeypatch.setattr(ahead_of_time, "compile_step", fail)
    monkeypatch.setattr(AheadOfTime, "cost_s", 0.0)
    monkeypatch.setattr(Background, "takes", lambda self, contestants: [])
    sampler = one_level_sampler()
    with torch.no_grad():
        sampler.model.stem.bias.add_(0.25)
    expected = like(sampler, "eager").sample(2, class_labels=1, steps=6)
    with pytest.warns(RuntimeWarning, match="goes on eagerly: no compiler here"):
        assert torch.equal(sampler.sample(2, class_labels=1, steps=6), expected)
    assert "no compiler here" in sampler.engine.why
    sampler.sample(2, class_labels=1, steps=6)  # warned once
    with pytest.raises(CompileError, match="no compiler here"):
        like(sampler, "compiled").sample(2, class_labels=1, steps=6)


def test_an_engine_needs_no_weights_until_it_compiles():
    def weights():
        raise AssertionError("a digest takes time")

    assert Engine("eager", CPU, weights=weights).used == ""


@pytest.mark.slow
def test_steps_that_know_of_a_mask_have_a_package_of_their_own(compiled):
    """It serves every mask, order of rows and solver; edits without a mask take the plain one."""
    images, before = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), set(cache.packages())
    eager = like(compiled, "eager")
    asked = {"seed": 5, "class_labels": [0, 2, 1], "output": "raw"}
    for mask, run in (
        ("left", {"steps": 5, "resamplings": 2}),
        ("top", {"solver": "ddpm", "steps": 7, "fill": "replace"}),
    ):
        got, expected = compiled.inpaint(images, mask, **run, **asked), eager.inpaint(images, mask, **run, **asked)
        assert compiled.engine.used == "compiled"
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert len(set(cache.packages()) - before) == 1
    got, expected = (s.img2img(images, 0.5, steps=8, **asked) for s in (compiled, eager))
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() and len(set(cache.packages()) - before) == 1
