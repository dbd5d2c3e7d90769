"""DDIM upwards: the same way as DDIM downwards to first order in the steps, whatever the network predicts."""

import pytest
import torch

from fastddpm.process.ddim import ddim_table
from fastddpm.process.inversion import inversion_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.timesteps import spaced_timesteps
from tests.helpers import run_table
from tests.process.test_exactness import MU, SCALE, exact_model

T = 1000
SCHEDULE = NoiseSchedule.linear(T)


def there_and_back(S, prediction, schedule=SCHEDULE, **options):
    """How far a picture that is inverted and drawn again is off, root mean square, and the state between."""
    model = exact_model(schedule, prediction)
    timesteps = spaced_timesteps(schedule.T, S)
    x = MU + SCALE * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    up = inversion_table(schedule, timesteps, prediction=prediction, **options)
    down = ddim_table(schedule, timesteps, prediction=prediction, clip=None, **options)
    latent = run_table(up, model, x)
    return (run_table(down, model, latent) - x).square().mean().sqrt().item(), latent, x


@pytest.mark.parametrize("prediction", ["eps", "v", "x_start"])
def test_the_error_is_of_first_order_in_the_steps(prediction):
    errors = [there_and_back(S, prediction)[0] for S in (25, 50, 100, 200)]
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < ratio < 2.4 for ratio in ratios), (errors, ratios)


def test_the_state_is_that_of_the_exact_flow():
    """Data from N(μ, s²) goes to N(√ᾱ μ, ᾱ s² + 1 − ᾱ) by scaling the deviation from the mean."""
    _, latent, x = there_and_back(200, "eps")
    a = float(SCHEDULE.alphas_cumprod_exact[-1])
    exact = a**0.5 * MU + ((a * SCALE**2 + 1 - a) / SCALE**2) ** 0.5 * (x - MU)
    assert (latent - exact).square().mean().sqrt() < 0.02


def test_the_last_row_ends_where_the_run_begins_and_a_picture_is_at_its_end():
    timesteps = torch.tensor([90, 40, 7])
    table = inversion_table(SCHEDULE, timesteps)
    assert table.timesteps.tolist() == [0, 7, 40, 0] and not table.uses_noise and table.history == 0
    a = SCHEDULE.alphas_cumprod_exact
    row = table.row(0)  # from ᾱ = 1, with the network's ε at t = 0
    assert row["c_x"] == pytest.approx(float(a[7].sqrt()), rel=1e-6)
    assert row["c_o"] == pytest.approx(float((1 - a[7]).sqrt()), rel=1e-6)
    other = inversion_table(SCHEDULE, timesteps, final_alpha_to_one=False).row(0)  # from ᾱ_0
    assert other["c_x"] == pytest.approx(float((a[7] / a[0]).sqrt()), rel=1e-6)


def test_the_mean_of_the_step_before_is_a_prediction_like_the_others():
    timesteps = spaced_timesteps(T, 20)
    model = exact_model(SCHEDULE, "x_start")

    def mean(x, t):
        return SCHEDULE.q_posterior(model(x, t).double(), x.double(), t)[0].float()

    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    by_mean = run_table(inversion_table(SCHEDULE, timesteps, prediction="x_prev"), mean, x)
    by_start = run_table(inversion_table(SCHEDULE, timesteps, prediction="x_start"), model, x)
    torch.testing.assert_close(by_mean, by_start, rtol=0, atol=2e-2)


def test_it_reaches_a_level_without_signal():
    schedule = NoiseSchedule.linear(50).rescale_zero_terminal_snr()
    table = inversion_table(schedule, list(range(49, -1, -1)), prediction="v")
    assert table.rows[:-1, :6].isfinite().all() and table.row(49)["c_x"] ** 2 <= 1


def test_timesteps_that_do_not_descend_are_refused():
    with pytest.raises(
        ValueError, match=r"^inversion_table: timesteps must be strictly descending, got 3 followed by 7"
    ):
        inversion_table(SCHEDULE, [3, 7])
