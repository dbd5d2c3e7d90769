"""RePaint's order of rows, and rows that jump back up, against the two steps that they stand for."""

import pytest
import torch

from fastddpm.kernels.operands import COLUMNS
from fastddpm.kernels.philox import TRAINING, VISIT
from fastddpm.process.ddim import ddim_table
from fastddpm.process.ddpm import ddpm_table
from fastddpm.process.dpmpp import dpmpp_2m_table
from fastddpm.process.repaint import resampled
from fastddpm.process.schedule import NoiseSchedule

T = 20
SCHEDULE = NoiseSchedule.linear(T)
FULL = list(range(T - 1, -1, -1))


def rows_in_order(table):
    """The timesteps of a table and where it jumps."""
    timesteps = table.timesteps[:-1].tolist()
    return timesteps, [i for i, (a, b) in enumerate(zip(timesteps, timesteps[1:], strict=False)) if b >= a]


@pytest.mark.parametrize(("length", "resamplings"), [(1, 2), (3, 4), (10, 10), (7, 3)])
def test_the_order_is_that_of_diffusers(length, resamplings):
    scheduler = pytest.importorskip("diffusers").RePaintScheduler(num_train_timesteps=T)
    scheduler.set_timesteps(T, length, resamplings)
    theirs, made = scheduler.timesteps.tolist(), []
    for last, t in zip([T, *theirs], theirs, strict=False):
        if t < last:
            made.append(t)
    ours, _ = rows_in_order(
        resampled(ddpm_table(SCHEDULE, FULL), SCHEDULE, jump_length=length, resamplings=resamplings)
    )
    assert ours == made


@pytest.mark.parametrize("make", [ddpm_table, ddim_table], ids=["ddpm", "ddim"])
def test_a_row_that_jumps_is_a_step_and_the_way_back(make):
    """Mean and variance of x_to given x_t and the output are those of two steps, at every jump."""
    options = {"clipped_eps": "raw", "eta": 0.5} if make is ddim_table else {"variance": "fixed_large"}
    table = make(SCHEDULE, FULL[::2], **options)
    longer = resampled(table, SCHEDULE, jump_length=3, resamplings=2)
    timesteps, jumps = rows_in_order(longer)
    a_bar = SCHEDULE.alphas_cumprod_exact
    plain = {int(t): i for i, t in enumerate(table.timesteps[:-1])}
    assert jumps == [3, 9, 15]
    for i in jumps:
        here, there = table.row(plain[timesteps[i]]), float(a_bar[timesteps[i + 1]])
        at = timesteps[i] - 2
        landing = float(a_bar[at]) if at >= 0 else 1.0
        r2, got = there / landing, longer.row(i)
        for name in ("c_0", "c_x", "c_o"):
            assert got[name] == pytest.approx(here[name] * r2**0.5, rel=1e-6)
        assert got["sigma"] ** 2 == pytest.approx(r2 * here["sigma"] ** 2 + 1 - r2, rel=2e-6)
        assert (got["k_0"], got["k_z"]) == pytest.approx((there**0.5, (1 - there) ** 0.5), rel=1e-6)
        for name in ("a_x", "a_o", "bound"):
            assert got[name] == here[name]
    for i in set(range(longer.S)) - set(jumps):
        assert longer.row(i) == table.row(plain[timesteps[i]])


def test_with_a_learned_variance_a_jump_is_a_row_of_its_own():
    table = ddpm_table(SCHEDULE, FULL[::2], variance="learned_range")
    longer = resampled(table, SCHEDULE, jump_length=3, resamplings=2)
    assert longer.S == 10 + 3 * 3 + 3
    a_bar = SCHEDULE.alphas_cumprod_exact
    assert longer.timesteps[3:6].tolist() == [13, 17, 17]
    row, there = longer.row(4), float(a_bar[17])
    r2 = there / float(a_bar[11])
    expected = dict.fromkeys(COLUMNS, 0.0) | {
        "a_x": 1.0, "c_x": r2**0.5, "sigma": (1 - r2) ** 0.5, "bound": 1.0, "k_0": there**0.5, "k_z": (1 - there) ** 0.5
    }  # fmt: skip
    assert row == pytest.approx(expected, rel=2e-6)
    assert longer.row(3) == table.row(3) and longer.row(5) == table.row(1)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_no_two_rows_have_the_same_noise(variance):
    table = ddpm_table(SCHEDULE, FULL, variance=variance)
    longer = resampled(table, SCHEDULE, jump_length=4, resamplings=128)
    counters = longer.counters[:-1]
    assert len(set(counters.tolist())) == longer.S and int(counters.max()) < TRAINING
    assert torch.equal(counters % VISIT, longer.timesteps[:-1])
    assert torch.equal(table.counters, table.timesteps)


def test_one_resampling_is_the_table_itself():
    multistep = dpmpp_2m_table(SCHEDULE, FULL)
    assert resampled(multistep, SCHEDULE, resamplings=1) is multistep


def test_the_usual_jump_is_a_fifth_and_at_most_ten():
    for S, jump in ((20, 4), (3, 1)):
        table = ddim_table(SCHEDULE, FULL[-S:])
        usual, given = (resampled(table, SCHEDULE, jump_length=length, resamplings=2) for length in (None, jump))
        assert torch.equal(usual.timesteps, given.timesteps)
    long = NoiseSchedule.linear(200)
    table = ddim_table(long, list(range(199, -1, -1)))
    usual, given = (resampled(table, long, jump_length=length, resamplings=2) for length in (None, 10))
    assert torch.equal(usual.timesteps, given.timesteps)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"resamplings": 0}, ValueError, r"resamplings must be in 1 … 128, got 0; "),
        ({"resamplings": 129}, ValueError, r"resamplings must be in 1 … 128, got 129; "),
        ({"resamplings": 2.5}, TypeError, r"resamplings must be an int, got float; "),
        ({"jump_length": 20}, ValueError, r"jump_length must be in 1 … 19 for 20 steps, got 20; jump a shorter way"),
        ({"jump_length": 0}, ValueError, r"jump_length must be in 1 … 19 for 20 steps, got 0; "),
        ({"jump_length": True}, TypeError, r"jump_length must be an int, got bool; "),
    ],
)
def test_what_is_out_of_range_is_refused(options, error, match):
    with pytest.raises(error, match=f"^resampled: {match}"):
        resampled(ddim_table(SCHEDULE, FULL), SCHEDULE, **options)


def test_solvers_that_look_back_and_single_steps_are_refused():
    with pytest.raises(ValueError, match=r"^resampled: solver must be ddpm or ddim .* got dpmpp_2m, which looks back"):
        resampled(dpmpp_2m_table(SCHEDULE, FULL), SCHEDULE)
    with pytest.raises(ValueError, match=r"^resampled: jump_length must be .* for 1 steps, got 1; take more steps"):
        resampled(ddim_table(SCHEDULE, [19]), SCHEDULE)
