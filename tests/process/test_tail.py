"""The rows of a run from a level on."""

import pytest
import torch

from fastddpm.process.method import Method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.process.tail import tail_table

SCHEDULE, SPEC = NoiseSchedule.linear(100), ModelSpec(shape=(1, 8, 8))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
def test_the_rows_are_the_run_s_and_begin_without_a_history(solver):
    method = Method(solver, steps=20)
    whole, tail = method.table(SCHEDULE, SPEC), tail_table(method, SCHEDULE, SPEC, 0.5)
    first = whole.S - tail.S
    assert whole.timesteps[first - 1] > 50 >= tail.timesteps[0]
    for name in ("timesteps", "counters"):
        assert torch.equal(getattr(tail, name), getattr(whole, name)[first:])
    assert torch.equal(tail.rows[whole.history :], whole.rows[first + whole.history :])
    assert tail.row(0)["c_h"] == tail.row(0)["c_h2"] == tail.row(1)["c_h2"] == 0
    alone = Method(solver, timesteps=tail.timesteps[:-1]).table(SCHEDULE, SPEC)
    assert torch.equal(tail.rows, alone.rows)


def test_rows_lead_where_the_method_says():
    method = Method(timesteps=[90, 60, 30, 10], prev_timesteps=[60, 30, 10, 5])
    tail = tail_table(method, SCHEDULE, SPEC, 0.3)
    assert tail.timesteps.tolist() == [30, 10, 0] and torch.equal(tail.rows, method.table(SCHEDULE, SPEC).rows[2:])


def test_all_of_it_is_the_run():
    method = Method("dpmpp_2m", steps=7)
    assert torch.equal(tail_table(method, SCHEDULE, SPEC, 1).rows, method.table(SCHEDULE, SPEC).rows)


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"^tail_table: strength must be above 0 and at most 1, got .*; "):
        tail_table(Method(), SCHEDULE, SPEC, strength)


def test_a_strength_that_no_step_is_below_is_refused():
    with pytest.raises(ValueError, match=r"^a: level must be at least 0\.19 for these 5 steps, got 0\.1; take more"):
        tail_table(Method(steps=5), SCHEDULE, SPEC, 0.1, function="a", name="level")
    with pytest.raises(TypeError, match=r"^a: strength must be a number, got 'half'"):
        tail_table(Method(steps=5), SCHEDULE, SPEC, "half", function="a")
