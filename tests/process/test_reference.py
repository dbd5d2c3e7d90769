import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from fastddpm.process import likelihood, reference
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.timesteps import respace, spaced_timesteps
from fastddpm.train import losses
from tests.helpers import oracle

F64 = torch.float64
OPENAI = {"openai_guided": NoiseSchedule.linear(1000), "openai_improved": NoiseSchedule.cosine(4000)}


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def output_from(schedule, x_t, t, x_start, log_variance):
    """The 2C output of a network that says x_start and log_variance (ε-prediction, learned range)."""
    low = schedule.at(schedule.posterior_log_variance_clipped, t, x_t)
    high = schedule.at(schedule.betas.log(), t, x_t)
    v = 2.0 * (log_variance - low) / (high - low) - 1.0 if bool((high != low).all()) else torch.zeros_like(x_t)
    return torch.cat([schedule.predict_eps_from_x_start(x_t, t, x_start), v], dim=1)


# ------------------------------------------------------------------ the peers' numbers


@pytest.mark.parametrize("peer", OPENAI)
def test_reverse_gaussian_and_bound_equal_openai(peer):
    schedule, data = OPENAI[peer], oracle(peer)
    x_start = data["fwd/x_start"].double()
    for k, step in enumerate(data["fwd/t"].tolist()):
        t = torch.full((2,), step)
        x_t = data["fwd/x_t"][k].double()
        estimate, log_variance = data["fwd/vb_pred_xstart"][k].double(), data["fwd/p_logvar"][k].double()
        out = output_from(schedule, x_t, t, estimate, log_variance)
        p = reference.p_mean_variance(schedule, out, x_t, t, variance="learned_range", clip=1.0)
        close(p.mean, data["fwd/p_mean"][k].double())
        close(p.log_variance, log_variance)
        close(p.variance, log_variance.exp())
        # In float32 as there: far from the mean, differences of Φ vanish in float32 and meet the floor of 1e-12.
        p = reference.p_mean_variance(schedule, out.float(), x_t.float(), t, variance="learned_range", clip=1.0)
        bound = likelihood.vlb_terms(schedule, x_start.float(), x_t.float(), t, p)
        close(bound, data["fwd/vb"][k], rtol=1e-4)


@pytest.mark.parametrize("peer", OPENAI)
def test_prior_term_equals_openai(peer):
    data = oracle(peer)
    spaced = OPENAI[peer].respaced(respace(OPENAI[peer].T, data["bpd/vb"].shape[1]).flip(0))
    close(
        likelihood.prior_bits(spaced, data["fwd/x_start"].double()), data["bpd/prior_bpd"].double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("peer", OPENAI)
def test_bound_is_the_prior_plus_its_terms_at_openai(peer):
    # What the stored totals are made of: guards the reading of the fixture that the test above relies on.
    data = oracle(peer)
    close(data["bpd/vb"].sum(1) + data["bpd/prior_bpd"], data["bpd/total_bpd"])


@pytest.mark.parametrize("peer", OPENAI)
def test_weight_of_the_bound_in_the_hybrid_loss_equals_openai(peer):
    # rescaled_kl is T · vb; rescaled_mse adds vb · T/1000, which is λ T vb with λ = 0.001.
    data, T = oracle(peer), OPENAI[peer].T
    vb = data["train/mse/vb"]
    close(data["train/rescaled_kl/loss"], T * vb)
    close(data["train/rescaled_mse/loss"], data["train/rescaled_mse/mse"] + 1e-3 * T * vb)


@pytest.mark.parametrize(
    ("peer", "schedule", "prediction"),
    [
        ("lucidrains_pred_v", NoiseSchedule.sigmoid(1000), "v"),
        ("diffusers_cifar_like", NoiseSchedule.linear(1000, dtype=torch.float32), "eps"),
        ("diffusers_trained_default", NoiseSchedule.cosine(1000, dtype=torch.float32), "v"),
    ],
)
def test_targets_equal_the_peers(peer, schedule, prediction):
    data = oracle(peer)
    key = {"lucidrains_pred_v": "fwd/v", "diffusers_trained_default": "fwd/velocity"}.get(peer)
    x_start, eps = data["fwd/x_start"], data["fwd/noise"].float()
    for k, step in enumerate(data["fwd/t"].tolist()):
        target = losses.target_of(schedule, x_start, eps, torch.full((2,), step), prediction)
        close(target, eps if key is None else data[key][k])


# ------------------------------------------------------------------ losses


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_normal_kl_is_torchs(values):
    m1, l1, m2, l2 = torch.tensor(values, dtype=F64)
    expected = kl_divergence(Normal(m1, (l1 / 2).exp()), Normal(m2, (l2 / 2).exp()))
    torch.testing.assert_close(likelihood.normal_kl(m1, l1, m2, l2), expected, rtol=1e-9, atol=1e-12)


@given(mean=st.floats(-1.2, 1.2), log_scale=st.floats(-5, 2))
def test_decoder_is_a_distribution_over_the_256_levels(mean, log_scale):
    levels = torch.arange(256, dtype=F64) / 127.5 - 1.0
    mass = likelihood.discretized_gaussian_log_likelihood(
        levels, torch.tensor(mean, dtype=F64), torch.tensor(log_scale, dtype=F64)
    ).exp()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)


def test_decoder_is_close_to_the_exact_normal():
    levels, mean, scale = torch.arange(256, dtype=F64) / 127.5 - 1.0, 0.13, 0.2
    exact = Normal(mean, scale)
    mass = exact.cdf(levels[1:-1] + 1 / 255) - exact.cdf(levels[1:-1] - 1 / 255)
    ours = likelihood.discretized_gaussian_log_likelihood(
        levels[1:-1], torch.tensor(mean, dtype=F64), torch.tensor(math.log(scale), dtype=F64)
    ).exp()
    assert (ours - mass).abs().max() < 0.01 * mass.max()


def batch(schedule, C=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_start, eps = torch.randn(2, 4, C, 3, 3, generator=generator, dtype=F64).clamp(-1, 1)
    t = torch.tensor([0, 1, schedule.T // 2, schedule.T - 1])
    return x_start, eps, t, schedule.q_sample(x_start, t, eps)


def vlb(schedule, x_start, x_t, t, out):
    p = reference.p_mean_variance(schedule, out, x_t, t, variance="learned_range", clip=None)
    return likelihood.vlb_terms(schedule, x_start, x_t, t, p)


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_a_perfect_network_has_no_simple_loss_and_a_wrong_one_its_square(prediction):
    schedule = NoiseSchedule.cosine(100)
    x_start, eps, t, _ = batch(schedule)
    target = losses.target_of(schedule, x_start, eps, t, prediction)
    off = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64).reshape(4, 1, 1, 1)
    loss = losses.simple_loss(schedule, x_start, t, eps, torch.cat([target + off, target * 7], dim=1), prediction)
    torch.testing.assert_close(loss, off.flatten() ** 2)


def test_a_perfect_small_variance_network_has_no_kl():
    schedule = NoiseSchedule.cosine(100)
    x_start, eps, t, x_t = batch(schedule)
    out = torch.cat([eps, -torch.ones_like(eps)], dim=1)
    bound = vlb(schedule, x_start, x_t, t, out)
    assert bound[1:].abs().max() < 1e-9
    assert bound[0] > 0


def test_the_bound_trains_the_variance_alone_and_the_simple_loss_the_mean():
    schedule = NoiseSchedule.cosine(100)
    x_start, eps, t, x_t = batch(schedule)
    generator = torch.Generator().manual_seed(1)
    out = torch.randn(4, 4, 3, 3, generator=generator, dtype=F64, requires_grad=True)
    loss, whole = losses.variance_loss(schedule, x_start, x_t, t, out), vlb(schedule, x_start, x_t, t, out)
    torch.testing.assert_close(loss, schedule.T * whole)
    (stopped,) = torch.autograd.grad(loss.mean(), out)
    (simple,) = torch.autograd.grad(losses.simple_loss(schedule, x_start, t, eps, out).mean(), out)
    (bound,) = torch.autograd.grad(whole.mean(), out)
    assert simple[:, 2:].abs().max() == 0 and stopped[:, :2].abs().max() == 0
    assert bound[:, :2].abs().max() > 0  # what is stopped
    torch.testing.assert_close(stopped[:, 2:], schedule.T * bound[:, 2:])


# ------------------------------------------------------------------ the reverse process


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        ("fixed_small", lambda s: s.posterior_variance[5]),
        ("fixed_large", lambda s: s.betas[5]),
    ],
)
def test_fixed_variances(variance, expected):
    schedule = NoiseSchedule.linear(10)
    x = torch.zeros(1, 1, 2, 2, dtype=F64)
    p = reference.p_mean_variance(schedule, x, x, torch.tensor([5]), variance=variance)
    assert p.variance.item() == expected(schedule).item()
    assert p.log_variance.item() == pytest.approx(math.log(expected(schedule)))


def test_the_large_variance_decodes_with_the_small_one_of_the_next_step():
    schedule, x = NoiseSchedule.linear(10), torch.zeros(2, 1, 2, 2, dtype=F64)
    p = reference.p_mean_variance(schedule, x, x, torch.tensor([0, 9]), variance="fixed_large")
    expected = [math.log(schedule.posterior_variance[1]), math.log(schedule.betas[9])]
    assert p.log_variance.flatten().tolist() == pytest.approx(expected)


def test_learned_range_interpolates_the_logs():
    schedule, t = NoiseSchedule.linear(10), torch.tensor([5])
    x = torch.zeros(1, 1, 1, 3, dtype=F64)
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=F64).reshape(1, 1, 1, 3)
    p = reference.p_mean_variance(schedule, torch.cat([x, v], 1), x, t, variance="learned_range")
    small, large = schedule.posterior_variance[5], schedule.betas[5]
    expected = torch.stack([small, (small * large).sqrt(), large])
    torch.testing.assert_close(p.variance.flatten(), expected)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_reverse_mean_is_ho_et_als_eq_11_unless_clipped(clip):
    schedule, t = NoiseSchedule.linear(10), torch.tensor([5])
    x, eps = torch.randn(2, 1, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) * 2
    p = reference.p_mean_variance(schedule, eps, x, t, clip=clip)
    alpha, beta, alpha_bar = schedule.alphas[5], schedule.betas[5], schedule.alphas_cumprod[5]
    eq11 = (x - beta / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt()
    assert torch.allclose(p.mean, eq11, rtol=1e-10) == (clip is None)
    assert (p.x_start.abs().max() <= 0.5) == (clip is not None)


def test_dynamic_threshold_by_hand():
    x = torch.tensor([[0.0, 1.0, -2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4, -0.5]]).reshape(2, 1, 1, 5)
    got = reference.dynamic_threshold(x, 0.75, math.inf)
    expected = torch.tensor([[0.0, 1 / 3, -2 / 3, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4, -0.5]]).reshape(2, 1, 1, 5)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(reference.dynamic_threshold(x, 0.75, 1.5)[0, 0, 0, 3], torch.tensor(1.0))


def test_guidance_mixes_the_first_half_only():
    def model(x, t, y=None):
        return torch.cat([x + y.reshape(-1, 1, 1, 1), y.reshape(-1, 1, 1, 1).expand_as(x)], dim=1).float()

    guided = reference.classifier_free_guidance(model, 3.0, null_class=10)
    x, t = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    out = guided(x, t, torch.tensor([1, 4]))
    assert out[:, 0].flatten().tolist() == [10 + 3 * (1 - 10), 10 + 3 * (4 - 10)]
    assert out[:, 1].flatten().tolist() == [1, 4]
    with pytest.raises(ValueError, match="y must be labels"):
        guided(x, t)


def test_loops_feed_the_timesteps_and_labels_and_draw_no_last_noise():
    seen = []

    def model(x, t, y):
        seen.append((t.tolist(), y.tolist()))
        return 0.1 * x

    drawn = []

    def noise(i):
        drawn.append(i)
        return torch.zeros(2, 1, 2, 2)

    steps, y = torch.tensor([9, 4, 0]), torch.tensor([3, 5])
    reference.p_sample_loop(model, NoiseSchedule.linear(10), torch.ones(2, 1, 2, 2), noise, timesteps=steps, y=y)
    assert seen == [([9, 9], [3, 5]), ([4, 4], [3, 5]), ([0, 0], [3, 5])]
    assert drawn == [0, 1]


def test_noise_may_be_a_tensor_a_callable_or_a_generator():
    schedule, x_T = NoiseSchedule.linear(10), torch.ones(2, 1, 2, 2)

    def generator():
        return torch.Generator().manual_seed(5)

    source = generator()
    z = torch.stack([torch.randn(2, 1, 2, 2, generator=source) for _ in range(10)])
    results = [
        reference.p_sample_loop(lambda x, t: 0.5 * x, schedule, x_T, noise)
        for noise in (z, lambda i: z[i], generator())
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    other = reference.p_sample_loop(lambda x, t: 0.5 * x, schedule, x_T, z.flip(0))
    assert not torch.equal(results[0], other)


def test_state_keeps_its_dtype():
    schedule, steps = NoiseSchedule.linear(20), spaced_timesteps(20, 4)
    for dtype in (torch.float32, F64):
        x_T, z = torch.ones(1, 1, 2, 2, dtype=dtype), torch.zeros(20, 1, 1, 2, 2)
        assert reference.p_sample_loop(lambda x, t: x, schedule, x_T, z).dtype == dtype
        assert reference.ddim_sample_loop(lambda x, t: x, schedule, x_T, steps).dtype == dtype
        assert reference.dpmpp_2m_sample_loop(lambda x, t: x, schedule, x_T, steps).dtype == dtype


def test_bad_input():
    schedule, x, t = NoiseSchedule.linear(10), torch.zeros(1, 2, 2, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="out must have 2 channels, or 4 for learned_range, got 2"):
        reference.p_mean_variance(schedule, x, x, t, variance="learned_range")
    with pytest.raises(ValueError, match="variance must be"):
        reference.p_mean_variance(schedule, x, x, t, variance="learned")
    with pytest.raises(ValueError, match="prediction must be"):
        reference.p_mean_variance(schedule, x, x, t, prediction="noise")
    with pytest.raises(ValueError, match="prediction must be"):
        losses.simple_loss(schedule, x, t, x, x, "noise")
    with pytest.raises(ValueError, match="noise must be given"):
        reference.ddim_sample_loop(lambda x, t: x, schedule, x, torch.tensor([5]), eta=0.5)


def test_normal_kl_keeps_its_digits_where_the_two_are_almost_one():
    """As the terms of good models are; in float32 a sum with ones in it would keep two digits."""
    m1, l1, m2, l2 = (torch.tensor(value, dtype=F64) for value in (0.3, -9.0, 0.30001, -8.999))
    exact = likelihood.normal_kl(m1, l1, m2, l2)
    close_by = likelihood.normal_kl((m1 - m2).float(), (l1 - l2).float(), torch.zeros(()), torch.zeros(()))
    scaled = exact - 0.5 * (m1 - m2) ** 2 * (-l2).exp() + 0.5 * (m1 - m2) ** 2
    assert float(close_by) == pytest.approx(float(scaled), rel=1e-3)
    assert float(scaled) == pytest.approx(2.5e-7, rel=1e-2)
