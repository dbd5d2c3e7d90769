"""Classifier guidance: loops written out by hand (Dhariwal & Nichol 2021), an exact answer, and what is refused."""

import functools
import math

import pytest
import torch

from fastddpm import ModelSpec, NoiseSchedule, Sampler, StepTable
from fastddpm.kernels.operands import COLUMNS
from fastddpm.process import reference
from fastddpm.process.repaint import resampled
from fastddpm.process.timesteps import respace
from fastddpm.step.guided import guides_of
from tests.networks import tiny_sampler
from tests.process.test_exactness import MU, SCALE, assert_normal, exact_model, expected_x_start

T, LABELS = 40, [0, 2, 1]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RESPACED = pytest.mark.parametrize("timesteps", ["40", "9", [35, 20, 6]], ids=["all", "respaced", "ends above 0"])


def gradient(x, t, y):
    """Some function of all three, which knows nothing of a classifier."""
    shift = t if y is None else t + y
    return 2.0 * torch.sin(3.0 * x + shift[:, None, None, None])


def begin(seed=0, n=3, S=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randn(S, n, 1, 8, 8, generator=generator)


def chosen(timesteps):
    return respace(T, timesteps) if isinstance(timesteps, str) else torch.tensor(timesteps)


def condition_mean_loop(sampler, x, z, timesteps, y, variance):
    """OpenAI's p_sample with its condition_mean: μ + Σ ∇ log p(y|x_t), on the respaced process."""
    spaced = sampler.schedule.respaced(timesteps.flip(0))
    for i, t in enumerate(timesteps.tolist()):
        fed, index = torch.full((len(x),), t), torch.full((len(x),), len(timesteps) - 1 - i)
        p = reference.p_mean_variance(spaced, sampler.network(x, fed, y), x, index, variance=variance)
        # Its small variance is 0 at the end; the others are there what the clipped logarithm says.
        sigma2 = p.variance if variance == "fixed_small" else p.log_variance.exp()
        x_next = p.mean + sigma2 * gradient(x, fed, y)
        if i < len(timesteps) - 1:
            x_next = x_next + (0.5 * p.log_variance).exp() * z[i]
        x = x_next
    return x


def condition_score_loop(sampler, x, z, timesteps, y, eta):
    """OpenAI's ddim_sample with its condition_score: ε − √(1−ᾱ) ∇ log p(y|x_t), and x̂_0 anew, unclipped."""
    a, steps, seen = sampler.schedule.alphas_cumprod, timesteps.tolist(), []
    for i, t in enumerate(steps):
        fed = torch.full((len(x),), t)
        a_t, a_prev = float(a[t]), float(a[steps[i + 1]]) if i + 1 < len(steps) else 1.0
        out = sampler.network(x, fed, y)[:, :1]
        x_start = reference.predict_x_start(sampler.schedule, out, x, fed, "eps").clamp(-1, 1)
        eps = sampler.schedule.predict_eps_from_x_start(x, fed, x_start) - (1 - a_t) ** 0.5 * gradient(x, fed, y)
        x_start = sampler.schedule.predict_x_start_from_eps(x, fed, eps)
        sigma = eta * ((1 - a_prev) / (1 - a_t)) ** 0.5 * (1 - a_t / a_prev) ** 0.5
        x = a_prev**0.5 * x_start + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * z[i]
        seen.append(x_start)
    return x, seen


@RESPACED
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@torch.no_grad()
def test_ddpm_is_openais_condition_mean(variance, timesteps):
    sampler, steps = tiny_sampler(T, variance=variance), chosen(timesteps)
    x, z = begin(S=len(steps))
    expected = condition_mean_loop(sampler, x, z, steps, torch.tensor(LABELS), variance)
    asked = {"solver": "ddpm", "timesteps": steps, "class_labels": LABELS, "x_T": x, "noise": z, "output": "raw"}
    torch.testing.assert_close(sampler.sample(3, cond_fn=gradient, **asked), expected, **CLOSE)
    assert (sampler.sample(3, **asked) - expected).abs().max() > 1e-2


@RESPACED
@pytest.mark.parametrize("eta", [0.0, 0.6])
@torch.no_grad()
def test_ddim_is_openais_condition_score(eta, timesteps):
    sampler, steps = tiny_sampler(T), chosen(timesteps)
    x, z = begin(S=len(steps))
    expected, x_starts = condition_score_loop(sampler, x, z, steps, torch.tensor(LABELS), eta)
    seen = []
    asked = {"timesteps": steps, "eta": eta, "class_labels": LABELS, "x_T": x, "noise": z, "output": "raw"}
    ours = sampler.sample(3, cond_fn=gradient, callback=lambda preview: seen.append(preview.x_start), **asked)
    torch.testing.assert_close(ours, expected, **CLOSE)
    for mine, theirs in zip(seen, x_starts, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_start"])
@torch.no_grad()
def test_ddim_with_the_networks_own_eps(prediction):
    """The convention of diffusers, in whose terms ε is moved as it comes and x̂_0 after clipping."""
    schedule = NoiseSchedule.linear(T)
    spec = ModelSpec((1, 8, 8), prediction=prediction, clipped_eps="raw")
    sampler = Sampler(lambda x, t: 0.8 * torch.sin(2.0 * x), schedule, spec, device="cpu")
    steps, (x, _) = [30, 17, 4], begin()
    ours = sampler.sample(3, timesteps=steps, x_T=x, cond_fn=gradient, output="raw")
    for i, t in enumerate(steps):
        fed, a_t = torch.full((3,), t), float(schedule.alphas_cumprod[t])
        a_prev = float(schedule.alphas_cumprod[steps[i + 1]]) if i + 1 < len(steps) else 1.0
        whole = reference.predict_x_start(schedule, sampler.network(x, fed), x, fed, prediction)
        g = gradient(x, fed, None)
        eps = schedule.predict_eps_from_x_start(x, fed, whole) - (1 - a_t) ** 0.5 * g
        x = a_prev**0.5 * (whole.clamp(-1, 1) + (1 - a_t) / a_t**0.5 * g) + (1 - a_prev) ** 0.5 * eps
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dpm_solver_sees_the_moved_estimate_in_this_row_and_the_next():
    """A network that predicts x_0 and moves it by itself is the same, for any order."""
    schedule = NoiseSchedule.linear(T)
    spec = ModelSpec((1, 8, 8), prediction="x_start", clip=None)

    def network(x, t):
        return 0.5 * torch.sin(2.0 * x)

    def moved(x, t):
        a = schedule.at(schedule.alphas_cumprod, t, x).float()
        return network(x, t) + (1 - a) / a.sqrt() * gradient(x, t, None)

    plain = Sampler(network, schedule, spec, device="cpu")
    by_itself = Sampler(moved, schedule, spec, device="cpu")
    for solver in ("dpmpp_2m", "dpmpp_3m"):
        asked = {"solver": solver, "steps": 9, "output": "raw"}
        torch.testing.assert_close(plain.sample(2, cond_fn=gradient, **asked), by_itself.sample(2, **asked), **CLOSE)


# ------------------------------------------------------------------ an exact answer

WANTED, NOISE = 1.0, 0.5
"""y = x_0 + NOISE · n, observed as WANTED in each pixel: p(y|x_t) is a Gaussian, and its gradient is known."""


def exact_gradient(schedule, x, t, y=None):
    wide = x.double()
    a = schedule.at(schedule.alphas_cumprod, t, wide)
    spread = a * SCALE**2 + 1 - a
    gain, left = a.sqrt() * SCALE**2 / spread, SCALE**2 * (1 - a) / spread
    return (gain * (WANTED - expected_x_start(schedule, wide, t)) / (left + NOISE**2)).float()


def guided_moments(schedule, steps):
    """Mean and variance of x_0 under ancestral sampling with Algorithm 1: affine maps and noise, as without it."""
    spaced = schedule.respaced(steps.flip(0))
    mean, var = 0.0, 1.0
    for i in range(spaced.T - 1, -1, -1):
        a, sigma2 = float(spaced.alphas_cumprod[i]), float(spaced.posterior_variance[i])
        spread = a * SCALE**2 + 1 - a
        gain, left = math.sqrt(a) * SCALE**2 / spread, SCALE**2 * (1 - a) / spread
        c1, c2 = float(spaced.posterior_mean_coef1[i]), float(spaced.posterior_mean_coef2[i])
        pull = sigma2 * gain / (left + NOISE**2)
        rest = MU - gain * math.sqrt(a) * MU  # E[x_0|x_t] = gain · x_t + rest
        mean = (c1 * gain + c2) * mean + c1 * rest + pull * (WANTED - gain * mean - rest)
        var = (c1 * gain + c2 - pull * gain) ** 2 * var + sigma2
    return mean, var


POSTERIOR_VAR = 1 / (1 / SCALE**2 + 1 / NOISE**2)
POSTERIOR_MEAN = POSTERIOR_VAR * (MU / SCALE**2 + WANTED / NOISE**2)


def test_the_theory_of_the_full_chain_is_the_data_given_y():
    """Algorithm 1 follows p(x_t|y) to first order in the steps (Dhariwal & Nichol 2021, eq. 5–9)."""

    def errors(T):
        mean, var = guided_moments(NoiseSchedule.linear(T, 0.1 / T, 20 / T), torch.arange(T - 1, -1, -1))
        return abs(mean - POSTERIOR_MEAN), abs(var - POSTERIOR_VAR)

    few, many = errors(1000), errors(4000)
    assert few[0] < 0.01 and few[1] < 0.03 * POSTERIOR_VAR and abs(MU - POSTERIOR_MEAN) > 0.2
    assert few[0] / many[0] == pytest.approx(4, rel=0.1)


def test_ddpm_samples_have_the_theorys_mean_and_variance():
    schedule, steps = NoiseSchedule.linear(1000), respace(1000, "30")
    sampler = Sampler(exact_model(schedule), schedule, ModelSpec((1, 8, 8), clip=None), device="cpu")
    x = sampler.sample(
        192, solver="ddpm", timesteps=steps, noise=torch.Generator().manual_seed(3), output="raw",
        cond_fn=functools.partial(exact_gradient, schedule),
    )  # fmt: skip
    assert_normal(x, *guided_moments(schedule, steps))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_solvers_of_the_ode_lead_to_the_data_given_y(solver):
    """With the exact score of p(x_t|y) they approximate the flow of N(POSTERIOR_MEAN, POSTERIOR_VAR)."""
    schedule = NoiseSchedule.linear(1000)
    sampler = Sampler(exact_model(schedule), schedule, ModelSpec((1, 1, 1), clip=None), device="cpu")
    x_T = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)

    def error(steps):
        asked = {"solver": solver, "steps": steps, "x_T": x_T, "output": "raw"}
        low, middle, high = sampler.sample(3, cond_fn=functools.partial(exact_gradient, schedule), **asked).flatten()
        return abs(float(middle) - POSTERIOR_MEAN) + abs(float(high - low) / 2 - POSTERIOR_VAR**0.5)

    few, many = error(20), error(160)
    assert many < 0.02 and many < few / 3


# ------------------------------------------------------------------ company, labels, engines


@torch.no_grad()
def test_it_meets_guidance_without_a_classifier():
    sampler, steps = tiny_sampler(T, variance="learned_range"), chosen("9")
    x, z = begin(S=9)
    model = reference.classifier_free_guidance(sampler.network, 2.5, 3)
    both = tiny_sampler(T, variance="learned_range")
    both.network = lambda x, t, y: model(x, t, y)
    expected = condition_mean_loop(both, x, z, steps, torch.tensor(LABELS), "learned_range")
    asked = {"solver": "ddpm", "timesteps": steps, "class_labels": LABELS, "x_T": x, "noise": z, "output": "raw"}
    ours = sampler.sample(3, cond_fn=gradient, guidance_scale=2.5, **asked)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_a_sample_depends_on_its_own_label_alone():
    sampler = tiny_sampler(T)
    asked = {"solver": "ddpm", "steps": 5, "cond_fn": gradient, "output": "raw", "batch_size": 2}
    whole = sampler.sample(3, class_labels=LABELS, **asked)  # the last batch is filled up
    alone = sampler.sample(1, class_labels=[LABELS[2]], sample_ids=[2], **asked)
    assert torch.equal(whole[2:], alone)


def test_networks_without_classes_leave_the_labels_to_the_classifier():
    told = []

    def cond_fn(x, t, y):
        told.append((t.dtype, None if y is None else y.tolist()))
        return gradient(x, t, y)

    sampler = tiny_sampler(T, num_classes=None, null_class=None, time_scale=25.0)
    asked = {"steps": 2, "solver": "ddpm", "output": "raw"}
    sampler.sample(3, class_labels=[7, 0, 9], cond_fn=cond_fn, **asked)
    sampler.sample(3, cond_fn=cond_fn, **asked)
    assert told == 2 * [(torch.float32, [7, 0, 9])] + 2 * [(torch.float32, None)]
    with pytest.raises(ValueError, match="the network has no classes"):
        sampler.sample(3, class_labels=[7, 0, 9], **asked)


def test_engines():
    sampler = tiny_sampler(T)
    sampler.sample(2, steps=2, class_labels=0, cond_fn=gradient)
    assert sampler.engine.used == "eager" and "classifier's gradient" in sampler.engine.why
    compiled = Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="compiled")
    with pytest.raises(
        ValueError, match="engine must be auto or eager for cond_fn, got compiled: .*use engine='eager'"
    ):
        compiled.stream(2, steps=2, class_labels=0, cond_fn=gradient)


def test_in_place_it_is_the_same():
    """What eager steps on GPUs do."""
    sampler = tiny_sampler(T)
    asked = {"solver": "ddim", "steps": 5, "class_labels": LABELS, "cond_fn": gradient, "output": "raw"}
    expected, was = sampler.sample(3, **asked), type(sampler.engine).in_place
    try:
        type(sampler.engine).in_place = True
        assert torch.equal(sampler.sample(3, **asked), expected)
    finally:
        type(sampler.engine).in_place = was


def test_refusals():
    sampler = tiny_sampler(T)
    asked = {"steps": 2, "class_labels": 0}
    for cond_fn, kind, message in [
        (3, TypeError, r"cond_fn must be a function \(x, t, y\) → gradient, got int"),
        (lambda x, t, y: 3.0, TypeError, "cond_fn must return a tensor of floats, got float"),
        (lambda x, t, y: y, TypeError, "cond_fn must return a tensor of floats, got torch.int64"),
        (lambda x, t, y: x[:, :, 0], ValueError, r"gradient of x's shape \(1, 1, 8, 8\), got \(1, 1, 8\)"),
    ]:
        with pytest.raises(kind, match=message):
            sampler.sample(1, cond_fn=cond_fn, **asked)
    with pytest.raises(FloatingPointError, match="from step 1 of 2"):
        sampler.sample(1, cond_fn=lambda x, t, y: x * torch.nan, **asked)
    schedule = NoiseSchedule.linear(20).rescale_zero_terminal_snr()
    silent = Sampler(lambda x, t: x, schedule, ModelSpec((1, 8, 8), prediction="v"), device="cpu")
    with pytest.raises(ValueError, match="needs some signal at every timestep, got none at t=19"):
        silent.sample(1, steps=20, cond_fn=gradient)
    silent.sample(1, steps=20, solver="ddpm", cond_fn=gradient)
    table = sampler.table(steps=2)
    plain = StepTable(table.rows, table.timesteps, table.counters, "eps", "fixed_small", "ddim", 0, False)
    with pytest.raises(ValueError, match="no classifier can guide them"):
        guides_of(plain)


# --- beside known pixels and jumps --------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["replace", "repaint"])
def test_what_is_known_is_not_moved(fill):
    sampler = tiny_sampler()
    pictures, mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(8, 8)
    mask[2:6, 2:6] = 1.0
    asked = {"fill": fill, "resamplings": 3, "steps": 6, "class_labels": [0, 2], "output": "raw"}
    plain = sampler.inpaint(pictures, mask, **asked)
    guided = sampler.inpaint(pictures, mask, cond_fn=gradient, **asked)
    known, drawn = mask == 0, mask == 1
    assert torch.equal(guided[..., known], plain[..., known])
    torch.testing.assert_close(guided[..., known], 2 * pictures[..., known] - 1, rtol=0, atol=1e-6)
    assert (guided[..., drawn] - plain[..., drawn]).abs().max() > 1e-2


def reach(table):
    """(t, row, what a gradient adds) of each row but the identity."""
    return list(zip(table.timesteps, table.rows, table.guides, strict=True))[:-1]


def test_a_jump_scales_what_a_gradient_adds_as_it_scales_the_mean():
    sampler = tiny_sampler()
    table = sampler.table(solver="ddpm", steps=6)
    longer = resampled(table, sampler.schedule, jump_length=2, resamplings=3)
    column = COLUMNS.index("c_0")
    of_first = {int(t): (row[column], guide) for t, row, guide in reach(table)}
    jumped = 0
    for t, row, guide in reach(longer):
        mean, (of_x, of_x_start) = of_first[int(t)]
        jumped += bool(row[column] != mean)
        torch.testing.assert_close(guide, torch.stack((of_x * row[column] / mean, of_x_start)), rtol=1e-5, atol=1e-9)
    assert jumped == 4 and len(longer.guides) == len(longer.rows)
