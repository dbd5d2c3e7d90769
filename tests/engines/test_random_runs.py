"""Solver × steps × timesteps × η × guidance × clipping × batch × order × engine, at random, against the textbook."""

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.engines.choose import Engine
from fastddpm.engines.gpu import Gpu
from fastddpm.sampler import Sampler
from tests.engines.common import like
from tests.engines.random_runs import check, runs
from tests.engines.recorder import Recorder
from tests.networks import tiny_sampler

T = 40


@pytest.fixture(scope="module")
def plain() -> Sampler:
    return like(tiny_sampler(T), "eager")


@pytest.fixture(scope="module")
def graphs() -> Sampler:
    """The GPU's engine, its graphs recorded on the CPU."""
    sampler = like(tiny_sampler(T), "eager")
    quick = Gpu(graphs=True, graph_steps=3, compile_step=lambda step, arguments: step, capture=Recorder)
    sampler.stepper.engine = Engine("cuda_graph", torch.device("cpu"), quick=quick)
    return sampler


def orders(run):
    return st.permutations(range(len(run.ids)))


@given(data=st.data())
def test_eager_runs_are_the_textbooks(plain, data):
    run = data.draw(runs(T))
    order = data.draw(orders(run))
    check(plain, plain, run, order, data.draw(st.sampled_from([None, 1, 3])))


@given(data=st.data())
def test_replayed_runs_are_the_textbooks(graphs, plain, data):
    run = data.draw(runs(T, n=2, guided=data.draw(st.booleans())))
    check(graphs, plain, run, data.draw(orders(run)), 2)


@pytest.mark.slow
@hypothesis.settings(max_examples=40)
@given(data=st.data())
def test_compiled_runs_are_the_textbooks(compiled, data):
    run = data.draw(runs(T, n=3, guided=False))
    check(compiled, like(compiled, "eager"), run, data.draw(orders(run)), 3)
    assert compiled.engine.used == "compiled"
