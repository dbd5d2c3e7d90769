import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.process.schedule import SCHEDULE_NAMES, NoiseSchedule
from tests.helpers import oracle

F32, F64 = torch.float32, torch.float64

# Each peer's schedule from its own configuration and arithmetic.
PEERS = {
    "diffusers_cifar_like": lambda: NoiseSchedule.linear(1000, dtype=F32),
    "diffusers_trained_default": lambda: NoiseSchedule.by_name("squaredcos_cap_v2", 1000, dtype=F32),
    "lucidrains_pred_v": lambda: NoiseSchedule.sigmoid(1000),
    "openai_guided": lambda: NoiseSchedule.linear(1000),
    "openai_improved": lambda: NoiseSchedule.cosine(4000),
    "pesser_ho": lambda: NoiseSchedule.linear(1000),
    "w86763777_ddpm": lambda: NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000).double()),
}
OWN_NAMES = {
    "posterior_var": "posterior_variance",
    "posterior_log_var_clipped": "posterior_log_variance_clipped",
    "sqrt_alphas_bar": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_bar": "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_bar": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_bar": "sqrt_recipm1_alphas_cumprod",
}
NOT_OURS = {"timestep_map", "loss_weight", "logvar"}  # of the peer's sampler or loss, not of the process


@pytest.mark.parametrize("peer", PEERS)
def test_tables_equal_the_peers(peer):
    schedule, data = PEERS[peer](), oracle(peer)
    names = [key.removeprefix("sched_full/") for key in data if key.startswith("sched_full/")]
    compared = [name for name in names if name not in NOT_OURS]
    assert "betas" in compared
    for name in compared:
        theirs = data[f"sched_full/{name}"]
        ours = getattr(schedule, OWN_NAMES.get(name, name)).to(theirs.dtype)
        # The log-variance at t = 0 is each peer's own placeholder: no sampler uses it.
        skip = 1 if "log" in name else 0
        torch.testing.assert_close(ours[skip:], theirs[skip:], rtol=1e-7, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "pesser_ho"])
def test_forward_process_equals_the_peers(peer):
    schedule, data = PEERS[peer](), oracle(peer)
    x_start, eps = data["fwd/x_start"], data["fwd/noise"].float()
    for k, step in enumerate(data["fwd/t"].tolist()):
        t = torch.full((x_start.shape[0],), step)
        x_t = schedule.q_sample(x_start, t, eps)
        close(x_t, data["fwd/x_t"][k])
        for key in ("fwd/v", "fwd/velocity"):
            if key in data:
                close(schedule.v_from(x_start, eps, t), data[key][k])
        mean, variance, log_variance = schedule.q_posterior(x_start, x_t, t)
        if "fwd/post_mean" in data:
            close(mean, data["fwd/post_mean"][k])
        if "fwd/post_var" in data:
            close(variance.flatten(), data["fwd/post_var"][k])
        if "fwd/post_logvar" in data and step > 0:
            close(log_variance.flatten(), data["fwd/post_logvar"][k])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_one_step_of_the_forward_process_equals_pesser():
    schedule, data = PEERS["pesser_ho"](), oracle("pesser_ho")
    x_prev, eps = data["fwd1/x_prev"], data["fwd1/noise"].float()
    for k, step in enumerate(data["fwd1/t"].tolist()):
        mean, variance = schedule.q_step(x_prev, torch.full((x_prev.shape[0],), step))
        close(mean + variance.sqrt() * eps, data["fwd1/x_next"][k])


# ------------------------------------------------------------------ formulas

NAMES = sorted(set(SCHEDULE_NAMES))


@given(name=st.sampled_from(NAMES), T=st.integers(1, 4000), dtype=st.sampled_from([F32, F64]))
def test_every_schedule_is_valid_and_survives_json(name, T, dtype):
    schedule = NoiseSchedule.by_name(name, T, dtype=dtype)
    assert schedule.T == T
    assert schedule.dtype == dtype
    assert bool(((schedule.betas > 0) & (schedule.betas < 1)).all())
    assert bool((schedule.alphas_cumprod.diff() < 0).all())
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again.dtype == dtype
    assert torch.equal(again.betas, schedule.betas)


@given(betas=st.lists(st.floats(1e-6, 0.999), min_size=1, max_size=40), dtype=st.sampled_from([F32, F64]))
def test_explicit_betas_survive_json(betas, dtype):
    schedule = NoiseSchedule.from_betas(betas, dtype=dtype)
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert torch.equal(again.betas, schedule.betas)


@given(betas=st.lists(st.floats(1e-4, 0.5), min_size=2, max_size=40))
def test_repeated_single_steps_give_the_closed_form(betas):
    # Eq. 2 applied t times must be eq. 4.
    schedule = NoiseSchedule.from_betas(betas)
    mean, variance = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    for step in range(schedule.T):
        t = torch.tensor([step])
        mean, added = schedule.q_step(mean, t)
        variance = variance * (1.0 - added) + added
        expected_mean, expected_variance = schedule.q_mean_variance(torch.ones(1, 1, dtype=F64), t)
        torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, expected_variance, rtol=1e-10, atol=0)


@given(betas=st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=40))
def test_posterior_is_bayes_rule(betas):
    # Multiply N(x_{t-1}; √ᾱ_{t-1} x_0, 1 − ᾱ_{t-1}) by N(x_t; √α_t x_{t-1}, β_t): precisions add.
    schedule = NoiseSchedule.from_betas(betas)
    t = torch.arange(1, schedule.T)
    x_start, x_t = torch.full((len(t), 1), 0.7, dtype=F64), torch.full((len(t), 1), -0.4, dtype=F64)
    prior_mean, prior_variance = schedule.q_mean_variance(x_start, t - 1)
    alpha, beta = schedule.alphas[t, None], schedule.betas[t, None]
    precision = 1.0 / prior_variance + alpha / beta
    expected = (prior_mean / prior_variance + alpha.sqrt() * x_t / beta) / precision
    mean, variance, log_variance = schedule.q_posterior(x_start, x_t, t)
    torch.testing.assert_close(variance, 1.0 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log_variance, variance.log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 5, 7)], ids=str)
def test_eps_x_start_and_v_convert_into_each_other(shape):
    schedule, t = NoiseSchedule.cosine(100), torch.tensor([0, 1, 50, 98])
    x_start, eps = torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64)
    x_t = schedule.q_sample(x_start, t, eps)
    v = schedule.v_from(x_start, eps, t)
    for got, want in (
        (schedule.predict_x_start_from_eps(x_t, t, eps), x_start),
        (schedule.predict_eps_from_x_start(x_t, t, x_start), eps),
        (schedule.predict_x_start_from_v(x_t, t, v), x_start),
        (schedule.predict_eps_from_v(x_t, t, v), eps),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_cosine_is_the_papers_curve():
    T, s = 500, 0.008
    schedule = NoiseSchedule.cosine(T, s)
    curve = [math.cos((i / T + s) / (1 + s) * math.pi / 2) ** 2 for i in range(T + 1)]
    expected = torch.tensor([value / curve[0] for value in curve[1:T]], dtype=F64)
    torch.testing.assert_close(schedule.alphas_cumprod[: T - 1], expected, rtol=1e-10, atol=0)
    assert schedule.betas[-1] == 0.999


def test_sigmoid_is_the_papers_curve():
    T, start, end, tau = 400, -3.0, 2.0, 0.7
    schedule = NoiseSchedule.sigmoid(T, start, end, tau)

    def sigmoid(z):
        return 1.0 / (1.0 + math.exp(-z))

    top, bottom = sigmoid(end / tau), sigmoid(start / tau)
    points = [((i + 1) / T * (end - start) + start) / tau for i in range(T - 1)]
    expected = torch.tensor([(top - sigmoid(z)) / (top - bottom) for z in points], dtype=F64)
    # The end points are single precision (see sigmoid_betas), hence an absolute tolerance.
    torch.testing.assert_close(schedule.alphas_cumprod[: T - 1], expected, rtol=0, atol=2e-7)


def test_laplace_is_diffusers_curve():
    # λ = −½ sgn(½ − u) ln(1 − 2|½ − u|) away from the ends, ᾱ(u) = √sigmoid(λ) relative to ᾱ(0).
    T = 100
    schedule = NoiseSchedule.laplace(T)

    def alpha_bar(lam):
        return math.sqrt(1.0 / (1.0 + math.exp(-lam)))

    start = alpha_bar(-0.5 * math.log(1e-6))
    for u, lam in ((0.25, -0.5 * math.log(0.5)), (0.5, 0.0), (0.75, 0.5 * math.log(0.5)), (0.9, 0.5 * math.log(0.2))):
        got = schedule.alphas_cumprod[round(u * T) - 1].item()
        assert got == pytest.approx(alpha_bar(lam) / start, rel=1e-5)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(alpha_bar(0.5 * math.log(1e-6)) / start, rel=1e-5)


def test_scaled_linear_and_logistic_have_the_stated_ends():
    scaled = NoiseSchedule.scaled_linear(11, 1e-4, 4e-4).betas
    torch.testing.assert_close(scaled[[0, 5, 10]], torch.tensor([1e-4, 2.25e-4, 4e-4], dtype=F64))
    logistic = NoiseSchedule.logistic(11, 1e-4, 4e-4).betas
    assert logistic[5].item() == pytest.approx(2.5e-4)
    assert logistic[0].item() == pytest.approx(1e-4 + 3e-4 / (1 + math.exp(6)))


def test_log_snr_falls_and_is_the_log_odds():
    schedule = NoiseSchedule.linear(1000)
    assert bool((schedule.log_snr.diff() < 0).all())
    torch.testing.assert_close(torch.sigmoid(schedule.log_snr), schedule.alphas_cumprod)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_zero_terminal_snr_moves_the_end_to_zero_and_keeps_the_start(dtype):
    schedule = NoiseSchedule.scaled_linear(1000, 0.00085, 0.012, dtype=dtype)
    rescaled = schedule.rescale_zero_terminal_snr()
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.betas[-1] == 1
    assert rescaled.log_snr[-1] == -math.inf
    old, new = schedule.sqrt_alphas_cumprod.double(), rescaled.sqrt_alphas_cumprod.double()
    expected = (old - old[-1]) * old[0] / (old[0] - old[-1])
    tolerance = 1e-6 if dtype == F32 else 1e-12
    torch.testing.assert_close(new, expected, rtol=0, atol=tolerance)
    again = NoiseSchedule.from_config(json.loads(json.dumps(rescaled.to_config())))
    assert torch.equal(again.betas, rescaled.betas)


def test_zero_terminal_snr_of_explicit_betas_survives_json():
    rescaled = NoiseSchedule.from_betas([0.1, 0.2, 0.3]).rescale_zero_terminal_snr()
    assert torch.equal(NoiseSchedule.from_config(rescaled.to_config()).betas, rescaled.betas)


def test_posterior_with_zero_terminal_snr_is_finite():
    schedule = NoiseSchedule.linear(100).rescale_zero_terminal_snr()
    x = torch.ones(1, 1, dtype=F64)
    for value in schedule.q_posterior(x, x, torch.tensor([99])):
        assert bool(value.isfinite().all())
    assert schedule.posterior_mean_coef2[-1] == 0


def test_one_step_schedule_works():
    schedule = NoiseSchedule.from_betas([0.3])
    assert schedule.posterior_variance.tolist() == [0.0]
    assert schedule.posterior_log_variance_clipped.tolist() == pytest.approx([math.log(0.3)])
    assert schedule.posterior_mean_coef1.tolist() == pytest.approx([1.0])


@given(data=st.data())
def test_respaced_schedule_keeps_the_marginals(data):
    T = data.draw(st.integers(2, 200))
    steps = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    schedule = NoiseSchedule.linear(T)
    spaced = schedule.respaced(torch.tensor(steps))
    torch.testing.assert_close(spaced.alphas_cumprod, schedule.alphas_cumprod[steps], rtol=1e-10, atol=0)


def test_tables_are_cast_to_the_tensors_dtype_but_not_below_float32():
    schedule, t = NoiseSchedule.linear(10), torch.tensor([9])
    for dtype, expected in ((F64, F64), (F32, F32), (torch.bfloat16, F32)):
        x = torch.ones(1, 2, dtype=dtype)
        assert schedule.q_sample(x, t, x).dtype == expected


def test_schedule_is_frozen_and_caches():
    schedule = NoiseSchedule.linear(10)
    assert schedule.alphas_cumprod is schedule.alphas_cumprod
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = torch.ones(3)


def test_from_betas_copies():
    betas = torch.tensor([0.1, 0.2], dtype=F64)
    schedule = NoiseSchedule.from_betas(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_explicit_alphas_cumprod_stay_as_they_are(dtype):
    given = NoiseSchedule.cosine(50, dtype=dtype)
    alpha_bar = given.alphas_cumprod.clone()
    schedule = NoiseSchedule.from_alphas_cumprod(alpha_bar)
    torch.testing.assert_close(schedule.betas, given.betas, rtol=0, atol=2 * torch.finfo(dtype).eps)
    lifted = NoiseSchedule.from_alphas_cumprod(alpha_bar + 1e-3, given.betas)
    assert torch.equal(lifted.betas, given.betas) and torch.equal(lifted.alphas_cumprod, alpha_bar + 1e-3)
    assert torch.equal(lifted.sqrt_alphas_cumprod, (alpha_bar + 1e-3).sqrt())
    expected = alpha_bar.clone()
    alpha_bar.zero_()
    assert torch.equal(schedule.alphas_cumprod, expected)


def test_alphas_cumprod_may_end_in_zero():
    assert NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0])).betas[-1] == 1


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("betas", "match"),
    [
        ([], "T ≥ 1"),
        ([[0.1]], "1-D"),
        ([0.0, 0.1], "at t=0"),
        ([0.1, -0.1], "at t=1"),
        ([0.1, 1.0, 0.1], "at t=1"),
        ([0.1, math.nan], "got nan at t=1"),
        ([0.1, math.inf], "got inf"),
        ([0.1, 1.1], "got 1.1"),
        ([1e-20, 0.1], "rounds to 0"),
    ],
)
def test_bad_betas_are_refused(betas, match):
    with pytest.raises(ValueError, match=match):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("betas", [torch.tensor([1, 2]), torch.tensor([0.1]).half()], ids=["int64", "float16"])
def test_bad_dtypes_are_refused(betas):
    with pytest.raises(TypeError, match="float32 or float64"):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: NoiseSchedule.linear(0), "T must be in 1 … 1000000, got 0"),
        (lambda: NoiseSchedule.linear(10, beta_start=0.0), "beta_start"),
        (lambda: NoiseSchedule.linear(10, beta_end=1.5), "beta_end"),
        (lambda: NoiseSchedule.cosine(10, s=-1.0), "s must be"),
        (lambda: NoiseSchedule.cosine(10, max_beta=1.0), "max_beta"),
        (lambda: NoiseSchedule.sigmoid(10, start=3.0, end=-3.0), "start must be below"),
        (lambda: NoiseSchedule.sigmoid(10, tau=0.0), "tau"),
        (lambda: NoiseSchedule.by_name("cosin"), "must be one of linear"),
        (lambda: NoiseSchedule.by_name("cosine", beta_start=0.1), r"got \['beta_start'\]"),
        (lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(), "at least 2"),
        (lambda: NoiseSchedule.from_config({"name": "linear"}), "NamedSchedule: must hold T, got name; add"),
        (lambda: NoiseSchedule.from_config({"name": "linear", "T": 10, "S": 3}), "must hold nothing but .*, got S;"),
        (lambda: NoiseSchedule.from_config({"T": 10}), "must hold name, got T"),
        (lambda: NoiseSchedule.from_config({"name": "betas"}), "BetaList: must hold betas, got name"),
        (lambda: NoiseSchedule.from_config({"name": "linear", "T": 10, "dtype": "half"}), "got 'half'"),
        (lambda: NoiseSchedule.from_alphas_cumprod(torch.tensor([0.5, 0.9])), "at t=1"),
        (
            lambda: NoiseSchedule.from_alphas_cumprod(torch.ones(3), torch.full((2,), 0.1)),
            "as betas, got .3.; pass one",
        ),
        (lambda: NoiseSchedule.linear(9).respaced(torch.tensor([3, 1])), "ascending"),
        (lambda: NoiseSchedule.linear(9).respaced(torch.tensor([3, 9])), "0 … 8"),
    ],
)
def test_bad_values_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: NoiseSchedule.linear(10.0),
        lambda: NoiseSchedule.linear(True),
        lambda: NoiseSchedule.linear(10, dtype=torch.float16),
        lambda: NoiseSchedule.from_config([1]),
        lambda: NoiseSchedule.from_config({"name": "linear", "T": "10"}),
        lambda: NoiseSchedule.from_config({"name": "linear", "T": 10, "zero_terminal_snr": 1}),
        lambda: NoiseSchedule.linear(10).q_sample(torch.ones(1, 1), torch.tensor([1.0]), torch.ones(1, 1)),
    ],
)
def test_wrong_types_are_refused(call):
    with pytest.raises(TypeError, match="must be"):
        call()


@pytest.mark.parametrize("t", [[-1, 0], [0, 10], [0], [[0, 1]]], ids=str)
def test_bad_timesteps_are_refused(t):
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="t must be"):
        NoiseSchedule.linear(10).q_sample(x, torch.tensor(t), x)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20) | st.integers(10**300, 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(
    config=st.dictionaries(
        st.sampled_from(["name", "T", "dtype", "betas", "s", "beta_start", "tau", "zero_terminal_snr", "x"]),
        _JSON | st.sampled_from([*NAMES, "betas", "float32"]),
    )
)
def test_no_config_raises_anything_undocumented(config):
    try:
        assert NoiseSchedule.from_config(config).T >= 1
    except (TypeError, ValueError) as error:
        assert "must be" in str(error) or "must hold" in str(error)


def test_numbers_of_numpy_make_the_same_schedule_and_the_same_configuration():
    ours = NoiseSchedule.linear(np.int64(50), np.float64(1e-3), torch.tensor(0.5))
    assert torch.equal(ours.betas, NoiseSchedule.linear(50, 1e-3, 0.5).betas)
    assert json.loads(json.dumps(ours.to_config())) == NoiseSchedule.linear(50, 1e-3, 0.5).to_config()


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: NoiseSchedule.linear("50"), "T must be an int, got str"),
     (lambda: NoiseSchedule.linear(50, beta_end="0.02"), "beta_end must be a number, got '0.02'"),
     (lambda: NoiseSchedule.cosine(50, [1]), r"s must be a number, got \[1\]")],
    ids=["T", "end", "list"],
)  # fmt: skip
def test_texts_are_no_numbers(make, message):
    with pytest.raises(TypeError, match=f"NoiseSchedule.by_name: {message}"):
        make()
