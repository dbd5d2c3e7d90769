"""`Step`: batches in which every sample has its own clock, and the properties that capturing it needs."""

import dataclasses

import pytest
import torch
from torch import nn

from fastddpm.engines.runner import StepRunner
from fastddpm.sampler import Sampler
from fastddpm.step.network import as_network
from fastddpm.step.request import RunOptions, make_request
from fastddpm.step.state import State
from fastddpm.step.step import Step, StepForm
from tests.networks import tiny_sampler
from tests.steps import begin, finish

GUIDANCE = pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
SOLVERS = pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])


def told_of_classes() -> Sampler:
    """A sampler whose network is told the class in each step, because its rows cannot hold all classes' projections."""
    sampler = tiny_sampler()
    sampler.stepper.network.row_numbers = lambda: 1 << 40
    return Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="eager")


SAMPLERS = pytest.mark.parametrize("make", [tiny_sampler, told_of_classes], ids=["classes in rows", "classes told"])


@SAMPLERS
@GUIDANCE
@SOLVERS
def test_samples_join_a_running_batch(solver, guidance, make):
    sampler = make()
    table = sampler.table(solver=solver, steps=9)
    expected = {i: finish(begin(sampler, table, [i], [i % 3], guidance)).clone() for i in range(7)}
    runner = StepRunner(*_step_and_call(begin(sampler, table, [0, 1, 2, 3], [0, 1, 2, 0], guidance)))
    done, waiting = {}, [4, 5, 6]
    for tick in range(100):
        state = runner.state
        is_over = state.step == state.end
        if tick in (2, 5) or bool(is_over.all()):
            for slot in is_over.nonzero().flatten().tolist() or ([1] if tick == 2 else []):
                ended = int(state.sample_id[slot])
                if is_over[slot]:
                    done[ended] = state.x[slot : slot + 1].clone()
                else:  # thrown out half-way: it starts again later
                    waiting.append(ended)
                if waiting:
                    new = waiting.pop(0)
                    state.put(torch.tensor([slot]), begin(sampler, table, [new], [new % 3], guidance).state)
        if len(done) == 7:
            break
        with torch.no_grad():
            runner.run(1)
    assert sorted(done) == list(range(7))
    for i, x in done.items():
        torch.testing.assert_close(x, expected[i], rtol=1e-5, atol=1e-5)


def _step_and_call(call):
    return call.step, call


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in place"])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "dpmpp_3m"])
def test_a_finished_sample_stays_bit_for_bit(solver, in_place):
    sampler = tiny_sampler()
    depth = 2 if solver == "dpmpp_3m" else 1
    call = begin(sampler, sampler.table(solver=solver, steps=5), [0, 1], [0, 1], history=depth, in_place=in_place)
    runner = StepRunner(call.step, call)
    with torch.no_grad():
        for _ in range(5):
            runner.run(1)
        final = runner.state.copy()
        for _ in range(3):
            runner.run(1)
    for name in ("x", "history", "history2")[: 1 + depth]:
        assert torch.equal(getattr(runner.state, name), getattr(final, name)), name
    assert torch.equal(runner.state.step, runner.state.end)


def test_in_place_the_same_tensors_give_the_whole_trajectory():
    """What a CUDA graph does: the same call on the same memory, again and again, with nothing from the host."""
    sampler = tiny_sampler()
    call = begin(sampler, sampler.table(solver="ddpm", steps=6), [3, 4], [1, 2], guidance=1.5, in_place=True)
    arguments = call.arguments()
    addresses, start = [tensor.data_ptr() for tensor in arguments], call.state.step.clone()
    seen = [call.state.x.clone()]
    with torch.no_grad():
        for i in range(6):
            changed = call.step(*arguments)
            assert changed[0] is call.state.x and changed[1] is call.state.step
            assert [tensor.data_ptr() for tensor in call.arguments()] == addresses
            assert torch.equal(call.state.step, start + i + 1)
            seen.append(call.state.x.clone())
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    asked = {"seed": 5, "sample_ids": [3, 4], "class_labels": [1, 2], "guidance_scale": 1.5, "output": "raw"}
    torch.testing.assert_close(call.state.x, sampler.sample(2, solver="ddpm", steps=6, **asked))


@pytest.mark.parametrize(("solver", "histories"), [("ddpm", 0), ("dpmpp_2m", 1), ("dpmpp_3m", 2)])
def test_otherwise_its_arguments_stay_as_they_are(solver, histories):
    sampler = tiny_sampler()
    call = begin(sampler, sampler.table(solver=solver, steps=6), [3, 4], [1, 2], guidance=1.5)
    before = [tensor.clone() for tensor in call.arguments()]
    with torch.no_grad():
        changed = call.step(*call.arguments())
    assert len(changed) == 2 + histories and not torch.equal(changed[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(call.arguments(), before, strict=True))


ROWS, TOLD = (tiny_sampler, 2.0), (told_of_classes, None)


@pytest.mark.parametrize(
    ("solver", "make", "guidance"),
    [("ddpm", *ROWS), ("ddim", *TOLD), ("dpmpp_2m", *TOLD), ("dpmpp_3m", *ROWS)],
    ids=["ddpm, rows, guided", "ddim, told, plain", "dpmpp_2m, told, plain", "dpmpp_3m, rows, guided"],
)
def test_a_step_is_one_graph(solver, guidance, make):
    sampler = make()
    table = sampler.table(solver=solver, steps=4)
    expected = finish(begin(sampler, table, [0, 1], [0, 1], guidance))
    call = begin(sampler, table, [0, 1], [0, 1], guidance)
    torch._dynamo.reset()
    compiled = torch.compile(call.step, fullgraph=True, backend="eager")
    torch.testing.assert_close(finish(call, compiled), expected, rtol=1e-5, atol=1e-5)


def test_a_history_is_kept_only_where_somebody_reads_it():
    sampler, conditioned = tiny_sampler(), dataclasses.replace(tiny_sampler().spec, self_condition=True)
    ddim, multistep = sampler.table(solver="ddim", steps=4), sampler.table(solver="dpmpp_2m", steps=4)
    assert not StepForm.of(sampler.spec, ddim).history
    assert StepForm.of(sampler.spec, multistep).history
    assert StepForm.of(conditioned, ddim).history
    looked_at = make_request(sampler.spec, sampler.device, 1, RunOptions(class_labels=0, callback=print))
    for table, depth in ((ddim, 1), (multistep, 1), (sampler.table(solver="dpmpp_3m", steps=4), 2)):
        with sampler.stepper.undisturbed(), sampler.stepper.call(table, looked_at) as call:
            assert call.step.form.history == depth
    for depth, kept in enumerate(((), ("history",), ("history", "history2"))):
        assert [name for name in StepForm(history=depth).names if "history" in name] == list(kept)
    with pytest.raises(ValueError, match="history must be at least 1 for a self-conditioned network, got 0"):
        StepForm(self_condition=True)
    with pytest.raises(ValueError, match="history must be 0, 1 or 2, got 3"):
        StepForm(history=3)


def test_each_step_hands_its_estimate_on():
    """What a step knew of x_0 is the next one's history and the next but one's history2."""
    sampler = tiny_sampler()
    call = begin(sampler, sampler.table(solver="dpmpp_3m", steps=6), [3, 4], [1, 2])
    runner, seen = StepRunner(call.step, call), []
    with torch.no_grad():
        for _ in range(6):
            runner.run(1)
            seen.append((runner.state.history.clone(), runner.state.history2.clone()))
    assert all(torch.equal(newer[1], older[0]) for older, newer in zip(seen, seen[1:], strict=False))
    assert not torch.equal(seen[-1][0], seen[-1][1])


def test_put_refuses_states_of_another_kind():
    sampler = tiny_sampler()
    table = sampler.table(steps=4)
    with_history = begin(sampler, table, [2], [2], history=1).state
    with pytest.raises(ValueError, match="both states must have history or neither"):
        begin(sampler, table, [0, 1], [0, 1]).state.put(torch.tensor([0]), with_history)


def test_seeds_may_differ_within_a_batch():
    sampler = tiny_sampler()
    table = sampler.table(solver="ddpm", steps=4)
    mixed = begin(sampler, table, [0, 0], [1, 1], seed=1)
    mixed.state.put(torch.tensor([1]), begin(sampler, table, [0], [1], seed=2).state)
    both = finish(mixed)
    for slot, seed in enumerate((1, 2)):
        alone = finish(begin(sampler, table, [0], [1], seed=seed))
        torch.testing.assert_close(both[slot : slot + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_too_many_or_too_few_tensors_are_refused():
    sampler = tiny_sampler()
    call = begin(sampler, sampler.table(steps=4), [0], [0])
    with pytest.raises(ValueError):
        call.step(*call.arguments()[:-1])


def test_a_learned_variance_needs_twice_the_channels():
    sampler = tiny_sampler()
    call = begin(sampler, sampler.table(solver="ddpm", steps=4), [0], [0])
    step = Step(sampler.stepper.network, dataclasses.replace(call.step.form, learned=True))
    with torch.no_grad(), pytest.raises(ValueError, match="must return 2 channels for learned_range, got 1"):
        step(*call.arguments())


def test_a_state_names_what_it_has():
    sampler = tiny_sampler()
    state: State = begin(sampler, sampler.table(steps=4), [0], [0], 2.0).state
    assert [name for name, _ in state.tensors()] == [
        "x", "step", "end", "sample_id", "seed", "uncond", "guidance"
    ]  # fmt: skip


def test_a_network_that_offers_most_is_told_what_it_lacks():
    """Wrapped in silence it would lose its rows."""

    class Most(nn.Module):
        tabulate = body = cast = identity = lambda self, *arguments: None

    with pytest.raises(TypeError, match="got one without dtype, row_numbers; add it"):
        as_network(Most())
