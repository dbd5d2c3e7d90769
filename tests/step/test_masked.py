"""Steps that hold what is known of pictures: beside plain samples in one batch, in place, and as one graph."""

import contextlib
import dataclasses

import pytest
import torch

from fastddpm.editing.plans import Plan
from fastddpm.engines.runner import StepRunner
from fastddpm.process.method import Method
from fastddpm.sampler import Sampler
from fastddpm.step.request import RunOptions, make_request
from fastddpm.step.state import State
from fastddpm.step.step import Call, StepForm
from tests.networks import tiny_sampler

RUN = RunOptions(seed=5, class_labels=1)


def plans(sampler: Sampler) -> list[Plan]:
    """A plain run, one from pictures, and two with jumps, three samples each; all in a form that knows of masks."""
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = Method("dpmpp_2m", steps=7)
    made = [
        Plan(sampler.table(plain), make_request(sampler.spec, sampler.device, 3, RUN), RUN),
        sampler.planner(Method("ddpm", steps=12), RUN).img2img(images, 0.6),
        sampler.planner(Method(steps=6), RUN).inpaint(images, "left", "repaint", 2, 3),
        sampler.planner(Method("ddpm", steps=8), RUN).inpaint(images, "middle", "repaint", 3, 2),
    ]
    empty = {"known": torch.full((3, 1, 8, 8), 7.0), "mask": torch.ones(3, 1, 8, 8)}
    for i in (0, 1):
        made[i] = dataclasses.replace(made[i], request=dataclasses.replace(made[i].request, **empty))
    return made


def joined(states: list[State]) -> State:
    names = [name for name, _ in states[0].tensors()]
    return State(**{name: torch.cat([getattr(state, name) for state in states]) for name in names})


@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in place"])
def test_edits_and_plain_samples_share_a_batch(in_place):
    sampler = tiny_sampler()
    sampler = Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="eager")
    made = plans(sampler)
    alone = [sampler.drawn(plan, "raw") for plan in made]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(sampler.stepper.undisturbed())
        calls = [
            stack.enter_context(sampler.stepper.call(plan.table, plan.request)).formed(history=1, in_place=in_place)
            for plan in made
        ]
        call = dataclasses.replace(calls[0], state=joined([call.state for call in calls]))
        runner = StepRunner(call.step, call)
        while bool((runner.state.step < runner.state.end).any()):
            runner.run(1)
        final = runner.state.copy()
        runner.run(1)
    torch.testing.assert_close(final.x, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert torch.equal(runner.state.x, final.x)
    assert torch.equal(final.x[6:9, :, :, 4:], made[2].request.known[:, :, :, 4:])


def test_a_masked_step_is_one_graph():
    sampler = tiny_sampler()
    plan = plans(sampler)[2]
    with torch.no_grad(), sampler.stepper.undisturbed(), sampler.stepper.call(plan.table, plan.request) as call:
        expected = call.step(*call.arguments())
        torch._dynamo.reset()
        got = torch.compile(call.step, fullgraph=True, backend="eager")(*call.arguments())
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_a_masked_step_has_two_arguments_more_and_makes_noise():
    sampler = tiny_sampler()
    ddim = sampler.table(steps=4)
    assert not StepForm.of(sampler.spec, ddim).stochastic
    form = StepForm.of(sampler.spec, ddim, masked=True, noise=True)
    assert form.stochastic and form.names[-3:] == ("known", "mask", "noise")
    with pytest.raises(ValueError, match=r"^StepForm: stochastic must be True for a masked step, got False; "):
        StepForm(masked=True, stochastic=False)


def test_states_with_and_without_masks_do_not_mix():
    sampler = tiny_sampler()
    masked = plans(sampler)[2]
    plain = dataclasses.replace(masked, request=dataclasses.replace(masked.request, known=None, mask=None))

    def state(plan: Plan) -> Call:
        with sampler.stepper.undisturbed(), sampler.stepper.call(plan.table, plan.request) as call:
            return call.state

    with pytest.raises(ValueError, match="both states must have known or neither"):
        state(masked).put(slice(None), state(plain))
