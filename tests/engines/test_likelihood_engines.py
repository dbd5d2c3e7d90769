"""Steps of bounds on every engine: what the eager step finds, one graph, and nothing prepared twice."""

import functools

import pytest
import torch

from fastddpm.engines import cache
from fastddpm.engines.compare import CompileError
from fastddpm.engines.gpu import compile_in_place
from tests.engines.common import like
from tests.engines.recorder import Recorder
from tests.engines.test_gpu_path import gpu_sampler
from tests.networks import tiny_sampler

RUNS = [{"steps": 5}, {"timesteps": [30, 11, 2], "seed": 2**63 + 1}, {"timesteps": [0]}]
VARIANTS = [{}, {"variance": "learned_range"}, {"threshold": (0.9, 2.0), "clip": None}, {"to_unit": "identity"}]


@pytest.fixture(autouse=True)
def captures():
    """The graphs that were captured in this test."""
    Recorder.captures.clear()
    return Recorder.captures


def images_of(n=3):
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


def asked(run, noise=False):
    rows = len(run["timesteps"]) if "timesteps" in run else run["steps"]
    supplied = torch.full((rows, 3, 1, 8, 8), 0.25) if noise else None
    ids = [3, 2**33, 2**64 - 1]
    return {"class_labels": [0, 2, 1], "sample_ids": ids, "noise": supplied, "progress": False, **run}


def check_every_run(sampler, noise=False, rtol=0.0):
    eager = like(sampler, "eager")
    for run in RUNS:
        expected = eager.likelihood(images_of(), **asked(run, noise))
        got = sampler.likelihood(images_of(), **asked(run, noise))
        for name in ("vlb", "x_start_mse", "eps_mse"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("noise", [False, True], ids=["noise made", "noise supplied"])
@pytest.mark.parametrize("spec", VARIANTS, ids=["plain", "learned", "threshold", "unit range"])
def test_replay_finds_what_the_step_finds_and_captures_once(spec, noise, captures):
    sampler = gpu_sampler(tiny_sampler(**spec))
    check_every_run(sampler, noise)
    assert len(captures) == (1 if noise else 2) and sampler.engine.used == "cuda_graph"


def test_bounds_and_samples_share_a_book_and_not_a_graph(captures):
    sampler = gpu_sampler()
    sampler.sample(3, class_labels=0, steps=5)
    check_every_run(sampler)
    assert len(captures) == 4
    sampler.sample(3, class_labels=0, steps=6)
    assert len(captures) == 4


def test_the_step_is_one_graph_and_is_never_compiled_again():
    torch._dynamo.reset()
    compile_step = functools.partial(compile_in_place, backend="eager")
    sampler = gpu_sampler(graphs=False, compile_step=compile_step, name="compiled")
    sampler.likelihood(images_of(), class_labels=0, steps=2, progress=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_every_run(sampler, rtol=1e-5)
    assert len(sampler.engine.quick.steps) == 1


@pytest.mark.parametrize("row", ["middle", "last"])
def test_a_compiled_step_that_errs_is_refused(row):
    """In the middle of the bound and in its last row, which decodes."""

    def wrong(step, arguments):
        def function(*tensors):
            at, end = tensors[1].clone(), tensors[2]
            later, terms = step(*tensors)
            errs = (at == end - 1) if row == "last" else (at < end - 1)
            terms[:, 0] *= 1 + (0.1 if row == "last" else 0.01) * errs
            return later, terms

        return function

    sampler = gpu_sampler(graphs=False, compile_step=wrong, name="compiled")
    with pytest.raises(CompileError, match="must give what an eager one gives"):
        sampler.likelihood(images_of(), class_labels=0, steps=8, progress=False)


@pytest.mark.slow
def test_a_package_serves_every_bound_of_a_batch_size():
    sampler = like(tiny_sampler(), "compiled")
    assert sampler.compile(3, likelihood=True) > 0
    before = set(cache.packages())
    check_every_run(sampler, rtol=1e-4)
    assert sampler.engine.used == "compiled" and set(cache.packages()) == before
    assert sampler.compile(3, likelihood=True) is None
