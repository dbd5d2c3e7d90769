"""Data drawn from N(μ, s² I) has an exact ε, so every sampler has an exact answer to be held against.

The noised data is N(√ᾱ μ, (ᾱ s² + 1 − ᾱ) I), and E[x_0 | x_t] is linear in x_t. A stochastic sampler then is a chain
of affine maps and added noise, whose mean and variance follow in closed form; a deterministic one approximates the
probability-flow ODE (Song et al. 2021, sec. 4.3), whose solution only scales the deviation from the mean.
"""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from fastddpm.process.ddim import ddim_table
from fastddpm.process.ddpm import ddpm_table
from fastddpm.process.dpmpp import dpmpp_2m_table, dpmpp_3m_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import make_table
from fastddpm.process.timesteps import respace, spaced_timesteps
from tests.helpers import run_table

F64 = torch.float64
MU, SCALE = 0.3, 0.4
# Chance that a right sampler fails one statistical comparison. There are 2 in each of the 9 cases below, so the chance
# that any fails is below 2e-5; the seeds are fixed, so a result that passes once passes always.
ERROR_RATE = 1e-6
SHAPE = (192, 1, 8, 8)


def expected_x_start(schedule, x, t):
    a = schedule.at(schedule.alphas_cumprod, t, x)
    gain = a.sqrt() * SCALE**2 / (a * SCALE**2 + 1 - a)
    return MU + gain * (x - a.sqrt() * MU)


def exact_model(schedule, prediction="eps"):
    """The network that a perfect training would give, in float64 inside."""

    def model(x, t, y=None):
        wide = x.double()
        x_start = expected_x_start(schedule, wide, t)
        if prediction == "x_start":
            return x_start.float()
        eps = schedule.predict_eps_from_x_start(wide, t, x_start)
        return (eps if prediction == "eps" else schedule.v_from(x_start, eps, t)).float()

    return model


def chain_moments(schedule, steps, variance):
    """Mean and variance of x_0 under the exact chain: Ho et al. 2020, eq. 6–7 with E[x_0 | x_t] for x̂_0."""
    spaced = schedule.respaced(torch.as_tensor(steps).flip(0))
    mean, var = 0.0, 1.0
    for i in range(spaced.T - 1, -1, -1):
        a = spaced.alphas_cumprod[i].item()
        gain = math.sqrt(a) * SCALE**2 / (a * SCALE**2 + 1 - a)
        c1, c2 = spaced.posterior_mean_coef1[i].item(), spaced.posterior_mean_coef2[i].item()
        slope = c1 * gain + c2
        offset = c1 * (MU - gain * math.sqrt(a) * MU)
        noise = {"fixed_small": spaced.posterior_variance, "fixed_large": spaced.betas}[variance][i].item()
        mean, var = slope * mean + offset, slope**2 * var + (noise if i > 0 else 0.0)
    return mean, var


def assert_normal(x, mean, var):
    """z-test of the mean and χ²-test of the variance, each with ERROR_RATE, two-sided."""
    x, n = x.double().flatten(), x.numel()
    z = (x.mean().item() - mean) / math.sqrt(var / n)
    assert abs(z) < norm.isf(ERROR_RATE / 2), f"mean {x.mean().item()} instead of {mean}: z = {z:.2f}"
    ratio = ((x - x.mean()) ** 2).sum().item() / var
    low, high = chi2.ppf(ERROR_RATE / 2, n - 1), chi2.isf(ERROR_RATE / 2, n - 1)
    assert low < ratio < high, f"variance {x.var().item()} instead of {var}"


CASES = [
    ("full", "fixed_small", "philox"),
    ("full", "fixed_large", "generator"),
    *[(spec, variance, "generator") for spec in ("50", "5,10,20", "7") for variance in ("fixed_small", "fixed_large")],
    ("trailing", "fixed_small", "generator"),
]


@pytest.mark.parametrize(("steps", "variance", "noise"), CASES, ids=["-".join(case) for case in CASES])
def test_ddpm_samples_have_the_theorys_mean_and_variance(steps, variance, noise):
    schedule = NoiseSchedule.linear(1000)
    if steps == "full":
        chosen = torch.arange(999, -1, -1)
    else:
        chosen = spaced_timesteps(1000, 20, "trailing") if steps == "trailing" else respace(1000, steps)
    table = ddpm_table(schedule, chosen, variance=variance, clip=None)
    generator = torch.Generator().manual_seed(len(chosen))
    # Philox in plain PyTorch is slow: a third of the samples, still 4096 numbers.
    x_T = torch.randn(SHAPE, generator=generator)[: 64 if noise == "philox" else None]
    z = None if noise == "philox" else torch.randn(len(chosen), *SHAPE, generator=generator)
    mean, var = chain_moments(schedule, chosen, variance)
    assert_normal(run_table(table, exact_model(schedule), x_T, z, seed=7), mean, var)


def test_the_theory_of_the_full_chain_is_the_data():
    # Otherwise the test above could hold a wrong sampler against an equally wrong theory.
    schedule = NoiseSchedule.linear(1000)
    for variance in ("fixed_small", "fixed_large"):
        mean, var = chain_moments(schedule, torch.arange(999, -1, -1), variance)
        assert mean == pytest.approx(MU, abs=1e-3)
        assert var == pytest.approx(SCALE**2, rel=0.02)


def test_the_statistical_test_sees_small_errors():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * SCALE + MU
    assert_normal(x, MU, SCALE**2)
    for wrong in (x + 0.08 * SCALE, x * 1.06):
        with pytest.raises(AssertionError, match="instead of"):
            assert_normal(wrong, MU, SCALE**2)


# ------------------------------------------------------------------ orders of convergence

# Betas so dense that equal distances in t are smooth in ᾱ; the grid divides the range without rounding.
DENSE = NoiseSchedule.linear(8000, 1e-4 / 8, 0.02 / 8)
START, SPAN = 7900, 7680
COUNTS = (80, 160, 320, 640)


def flow(schedule, x, t_from, t_to):
    """The probability-flow ODE's exact solution from t_from to t_to."""
    (a, b) = (float(schedule.alphas_cumprod[t]) for t in (t_from, t_to))
    growth = math.sqrt((b * SCALE**2 + 1 - b) / (a * SCALE**2 + 1 - a))
    return math.sqrt(b) * MU + growth * (x.double() - math.sqrt(a) * MU)


def errors(make, prediction="eps", counts=COUNTS, start=START, span=SPAN):
    x_T = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    exact = flow(DENSE, x_T, start, start - span)
    found = []
    for S in counts:
        edges = torch.arange(start, start - span - 1, -(span // S))
        table = make(DENSE, edges[:-1], prev_timesteps=edges[1:], prediction=prediction, clip=None)
        assert table.S == S
        got = run_table(table, exact_model(DENSE, prediction), x_T)
        found.append((got.double() - exact).abs().max().item())
    return found


def order(found, counts=COUNTS):
    """Slope of log error against log step length, by least squares over all step counts."""
    x = -torch.tensor(counts, dtype=F64).log()
    y = torch.tensor(found, dtype=F64).log()
    x = x - x.mean()
    return ((x * (y - y.mean())).sum() / (x * x).sum()).item()


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
@pytest.mark.parametrize(
    ("make", "low", "high"), [(ddim_table, 0.97, 1.03), (dpmpp_2m_table, 1.93, 2.07)], ids=["ddim-1", "dpmpp_2m-2"]
)
def test_order_of_convergence(make, low, high, prediction):
    found = errors(make, prediction)
    assert low < order(found) < high, found
    assert found[-1] < (5e-3 if make is ddim_table else 1e-4)


# From where and how far: over these the error's parts of second and third order do not cancel, nor does it sink into
# float32's rounding.
THIRD = {
    "half of D2, as published: 2": ("half", (7900, 6400), 1.9, 2.1),
    "the whole of D2: 3": ("whole", (7800, 7040), 2.85, 3.1),
}


@pytest.mark.parametrize(("difference", "path", "low", "high"), THIRD.values(), ids=THIRD.keys())
@pytest.mark.parametrize("prediction", ["x_start", "v"])
def test_order_of_convergence_with_two_histories(difference, path, low, high, prediction):
    """Published code has 2: it takes half of the second difference, and all else in its rows is of third order."""
    make = functools.partial(dpmpp_3m_table, second_difference=difference)
    counts = (40, 80, 160)
    found = errors(make, prediction, counts, *path)
    assert low < order(found, counts) < high, found
    assert found[-1] < errors(dpmpp_2m_table, prediction, counts[-1:], *path)[0]


def test_final_row_lands_on_the_data():
    # Whole runs, down to x_0: the deviation from the mean ends with the data's scale.
    x_T = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    exact = flow(DENSE, x_T, 7999, 0)
    for make, limit in ((ddim_table, 2e-2), (dpmpp_2m_table, 5e-3), (dpmpp_3m_table, 5e-3)):
        table = make(DENSE, spaced_timesteps(8000, 200, "trailing"), clip=None)
        assert (run_table(table, exact_model(DENSE), x_T).double() - exact).abs().max() < limit


# ------------------------------------------------------------------ identities


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
def test_all_predictions_lead_along_the_same_path(solver):
    schedule, steps = NoiseSchedule.cosine(1000, max_beta=0.99), respace(1000, 25)
    generator = torch.Generator().manual_seed(1)
    x_T, z = torch.randn(4, 1, 4, 4, generator=generator), torch.randn(25, 4, 1, 4, 4, generator=generator)
    options = {"eta": 0.5} if solver == "ddim" else {}
    results = [
        run_table(
            make_table(schedule, steps, solver=solver, prediction=prediction, clip=1.0, **options),
            exact_model(schedule, prediction),
            x_T,
            z,
        )
        for prediction in ("eps", "x_start", "v")
    ]
    # ε amplifies its own rounding by 1/√ᾱ in the first steps.
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=5e-6)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=5e-4)


@given(data=st.data(), name=st.sampled_from(["linear", "cosine"]))
def test_any_subset_of_timesteps_keeps_the_mean_of_point_data(data, name):
    # A network that always says x_0 = MU must end there, whichever steps are taken.
    schedule = NoiseSchedule.by_name(name, 200)
    steps = sorted(data.draw(st.sets(st.integers(0, 199), min_size=1, max_size=12)), reverse=True)
    solver = data.draw(st.sampled_from(["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"]))
    table = make_table(schedule, steps, solver=solver, prediction="x_start")
    x_T = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    got = run_table(table, lambda x, t: torch.full_like(x, MU), x_T)
    torch.testing.assert_close(got, torch.full_like(got, MU), rtol=0, atol=1e-6)
