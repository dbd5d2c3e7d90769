"""`advance`: batches in which every sample has its own clock, and the properties that capturing it needs."""

import pytest
import torch

from fastddpm.denoiser import bind
from fastddpm.state import State, advance
from tests.networks import tiny_sampler

SHAPE = (1, 8, 8)
CPU = torch.device("cpu")


def start(ids, labels, guidance=None, seed=5, history=False):
    scale = None if guidance is None else torch.full((len(ids),), guidance)
    return State.create(
        SHAPE, torch.tensor(ids), seed, device=CPU, labels=torch.tensor(labels), guidance=scale, history=history
    )


def finish(denoiser, table, state):
    for _ in range(table.S):
        advance(denoiser, table, state)
    return state.x


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_samples_join_a_running_batch(solver, guidance):
    sampler = tiny_sampler()
    table = sampler.table(solver=solver, steps=9)
    denoiser = bind(sampler.model, sampler.spec, table)
    expected = {
        i: finish(denoiser, table, start([i], [i % 3], guidance, history=table.uses_history)).clone() for i in range(7)
    }
    running = start([0, 1, 2, 3], [0, 1, 2, 0], guidance, history=table.uses_history)
    done = {}
    waiting = [4, 5, 6]
    for tick in range(100):
        if tick in (2, 5) or not bool((running.step < table.S).any()):
            for slot in (running.step == table.S).nonzero().flatten().tolist() or ([1] if tick == 2 else []):
                ended = int(running.sample_id[slot])
                if int(running.step[slot]) == table.S:
                    done[ended] = running.x[slot : slot + 1].clone()
                else:  # thrown out half-way: it starts again later
                    waiting.append(ended)
                if waiting:
                    new = waiting.pop(0)
                    running.put(torch.tensor([slot]), start([new], [new % 3], guidance, history=table.uses_history))
        if len(done) == 7:
            break
        advance(denoiser, table, running)
    assert sorted(done) == list(range(7))
    for i, x in done.items():
        torch.testing.assert_close(x, expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_a_finished_sample_stays_bit_for_bit(solver):
    sampler = tiny_sampler()
    table = sampler.table(solver=solver, steps=5)
    denoiser = bind(sampler.model, sampler.spec, table)
    state = start([0, 1], [0, 1], history=True)
    final = finish(denoiser, table, state).clone()
    for _ in range(3):
        advance(denoiser, table, state)
    assert torch.equal(state.x, final)
    assert state.step.tolist() == [5, 5]


def test_the_same_objects_give_the_whole_trajectory():
    """What a CUDA graph does: the same call on the same memory, again and again, with nothing from the host."""
    sampler = tiny_sampler()
    table = sampler.table(solver="ddpm", steps=6)
    denoiser = bind(sampler.model, sampler.spec, table)
    state = start([3, 4], [1, 2], guidance=1.5)
    tensors = {name: value for name, value in vars(state).items() if value is not None}
    addresses = {name: value.data_ptr() for name, value in tensors.items()}
    seen = [state.x.clone()]
    for i in range(table.S):
        advance(denoiser, table, state)
        assert {name: getattr(state, name).data_ptr() for name in tensors} == addresses
        assert all(getattr(state, name) is value for name, value in tensors.items())
        assert state.step.tolist() == [i + 1, i + 1]
        seen.append(state.x.clone())
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    expected = sampler.sample(
        2, seed=5, sample_ids=[3, 4], class_labels=[1, 2], guidance_scale=1.5, solver="ddpm", steps=6, output="raw"
    )
    torch.testing.assert_close(state.x, expected)


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_advance_is_one_graph(solver, guidance):
    sampler = tiny_sampler()
    table = sampler.table(solver=solver, steps=4)
    denoiser = bind(sampler.model, sampler.spec, table)
    expected = finish(denoiser, table, start([0, 1], [0, 1], guidance, history=True))

    def step(x, clock, ids, seed, labels, history, scale):
        state = State(x, clock, ids, seed, labels, scale, history)
        advance(denoiser, table, state)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = start([0, 1], [0, 1], guidance, history=True)
    for _ in range(table.S):
        compiled(state.x, state.step, state.sample_id, state.seed, state.labels, state.history, state.guidance)
    assert state.step.tolist() == [4, 4]
    torch.testing.assert_close(state.x, expected, rtol=1e-5, atol=1e-5)


def test_put_refuses_states_of_another_kind():
    with pytest.raises(ValueError, match="both states must have history or neither"):
        start([0, 1], [0, 1]).put(torch.tensor([0]), start([2], [2], history=True))


def test_seeds_may_differ_within_a_batch():
    sampler = tiny_sampler()
    table = sampler.table(solver="ddpm", steps=4)
    denoiser = bind(sampler.model, sampler.spec, table)
    mixed = start([0, 0], [1, 1], seed=1)
    mixed.put(torch.tensor([1]), start([0], [1], seed=2))
    both = finish(denoiser, table, mixed)
    for slot, seed in enumerate((1, 2)):
        alone = finish(denoiser, table, start([0], [1], seed=seed))
        torch.testing.assert_close(both[slot : slot + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=0.1)
