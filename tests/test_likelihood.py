"""Likelihoods: equal to OpenAI's loop, to the closed form where there is one, and the same in every company."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.process.likelihood import Likelihood
from fastddpm.process.noise import normals
from fastddpm.process.timesteps import respace
from tests.bounds import F64, bound_by_the_textbook, discretised_normal_bits
from tests.checkpoints.test_dialects import FIXTURES
from tests.checkpoints.test_dialects import sampler as peers_sampler
from tests.helpers import peers_dir
from tests.networks import tiny_sampler

NAMES = ("total_bpd", "prior_bpd", "vlb", "x_start_mse", "eps_mse")
OPENAI = ("openai_improved", "openai_guided")
RTOL = 1e-5
"""The bound against the textbook's and OpenAI's."""


def images_of(sampler, n=3, seed=0):
    return torch.randint(0, 256, (n, *sampler.spec.shape), generator=torch.Generator().manual_seed(seed)).byte()


def measured(sampler, images=None, **options):
    options.setdefault("progress", False)
    return sampler.likelihood(images_of(sampler) if images is None else images, **options)


def off(one, other):
    """The largest difference of two bounds, relative to each picture's, over all terms."""
    scale = other.total_bpd.abs()[:, None]
    return float(((one.vlb - other.vlb).abs() / scale).max())


# ------------------------------------------------------------------ against others


@pytest.mark.parametrize("respacing", ["respaced_20", "respaced_ddim10"])
@pytest.mark.parametrize("name", OPENAI)
def test_the_bound_is_openais(name, respacing):
    folder = peers_dir() / name
    with np.load(folder / "likelihood.npz") as data:
        theirs = {key.removeprefix(f"{respacing}/"): data[key] for key in data.files if key.startswith(respacing)}
        images = torch.from_numpy(data["x_uint8"])
    ours = measured(
        peers_sampler(name),
        images,
        timesteps=str(theirs["timestep_respacing"]),
        noise=torch.from_numpy(theirs["noise"]),
        class_labels=theirs.get("y"),
    )
    assert ours.timesteps.tolist() == theirs["timesteps"].tolist()
    total = theirs["total_bpd"]
    # In one picture's total of 1288 bits the loop that made the fixture is itself 8e-6 off what float64 gives.
    rtol = np.where(total > 1000, 2 * RTOL, RTOL)
    assert (np.abs(ours.total_bpd.numpy() / total - 1) <= rtol).all()
    # Single terms may be as small as the rounding of what they are the difference of.
    assert (np.abs(ours.vlb.numpy() - theirs["vb"]) <= (rtol * total)[:, None]).all()
    np.testing.assert_allclose(ours.prior_bpd, theirs["prior_bpd"], rtol=RTOL, atol=1e-7)
    np.testing.assert_allclose(ours.x_start_mse, theirs["xstart_mse"], rtol=RTOL)
    np.testing.assert_allclose(ours.eps_mse, theirs["mse"], rtol=RTOL, atol=1e-6)


VARIANTS = [
    {"prediction": prediction, "variance": variance}
    for prediction in ("eps", "x_start", "v")
    for variance in ("fixed_small", "fixed_large", "learned_range")
] + [{"clip": None}, {"num_classes": None, "null_class": None}, {"time_scale": 25.0}]


@pytest.mark.parametrize("timesteps", ["", "7", "ddim10"], ids=["all", "7", "ddim10"])
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_the_bound_is_the_textbooks(spec, timesteps):
    sampler = tiny_sampler(**spec)
    visited, images = respace(40, timesteps), images_of(sampler)
    labels = None if sampler.spec.num_classes is None else torch.tensor([2, 0, 1])
    noise = torch.randn(len(visited), *images.shape, generator=torch.Generator().manual_seed(1))
    expected = bound_by_the_textbook(sampler, images, visited, noise, labels)
    ours = measured(sampler, images, timesteps=timesteps, noise=noise, class_labels=labels)
    assert torch.equal(ours.timesteps, visited)
    for name in NAMES:
        theirs = expected[name]
        least = theirs.abs().max() * 1e-5 if name in ("vlb", "eps_mse") else 1e-9
        torch.testing.assert_close(getattr(ours, name).to(F64), theirs, rtol=2e-5, atol=float(least), msg=name)


@pytest.mark.parametrize("name", FIXTURES)
def test_every_dialect_has_a_likelihood(name):
    peers_dir()
    sampler = peers_sampler(name)
    labels = None if sampler.spec.num_classes is None else 0
    found = measured(sampler, steps=4, class_labels=labels)
    assert found.vlb.shape == (3, 4) and bool(found.total_bpd.isfinite().all()) and bool((found.vlb > 0).all())


# ------------------------------------------------------------------ against the closed form

MU, SCALE = 0.1, 0.15
ERROR_RATE = 1e-6
"""Chance that a right bound fails a statistical comparison; the seeds are fixed."""


def exact(variance="fixed_small", prediction="eps", T=60, beta_end=0.2, shape=(1, 8, 8)):
    """A sampler whose network says what can be known of N(μ, s² I)."""
    schedule = NoiseSchedule.linear(T, beta_end=beta_end)

    def model(x, t):
        a = schedule.at(schedule.alphas_cumprod, t, x).double()
        gain = a.sqrt() * SCALE**2 / (a * SCALE**2 + 1 - a)
        estimate = MU + gain * (x.double() - a.sqrt() * MU)
        eps = schedule.predict_eps_from_x_start(x.double(), t, estimate)
        out = {
            "eps": lambda: eps,
            "x_start": lambda: estimate,
            "v": lambda: schedule.v_from(estimate, eps, t),
            "x_prev": lambda: schedule.q_posterior(estimate, x.double(), t)[0],
        }[prediction]().float()
        return torch.cat((out, torch.zeros_like(out)), 1) if variance == "learned_range" else out

    spec = ModelSpec(shape=shape, prediction=prediction, variance=variance, clip=None)
    return Sampler(model, schedule, spec, device="cpu", engine="eager")


def expected_terms(sampler, timesteps):
    """The bound's KL terms in expectation over data and noise, in bits per dimension, by Ho et al. 2020, eq. 5 to 7."""
    a = sampler.schedule.alphas_cumprod[timesteps].tolist()
    terms = []
    for here, to in zip(a[:-1], a[1:], strict=True):
        beta = 1 - here / to
        true = beta * (1 - to) / (1 - here)
        between = math.sqrt(beta * true)  # v = 0
        model = {"fixed_small": true, "fixed_large": beta, "learned_range": between}[sampler.spec.variance]
        missing = SCALE**2 * (1 - here) / (here * SCALE**2 + 1 - here)  # of E[x_0 | x_t]
        distance = (math.sqrt(to) * beta / (1 - here)) ** 2 * missing
        terms.append(0.5 * (math.log(model / true) + true / model + distance / model - 1) / math.log(2))
    return torch.tensor(terms, dtype=F64)


def drawn(n, shape=(1, 8, 8)):
    """Pictures of N(μ, s² I), float in [0, 1]."""
    x = MU + SCALE * torch.randn(n, *shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return ((x + 1) / 2).float()


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_gaussian_data_has_the_closed_form(variance, steps):
    sampler = exact(variance)
    found = measured(sampler, drawn(256), steps=steps)
    terms, theory = found.vlb[:, :-1].double(), expected_terms(sampler, found.timesteps)
    # Each picture's sum is independent of the others', and so a mean's deviation is known.
    total = terms.sum(1)
    z = (total.mean() - theory.sum()) / (total.std() / len(total) ** 0.5)
    assert abs(float(z)) < norm.isf(ERROR_RATE / 2), f"{total.mean():.5f} instead of {theory.sum():.5f}"
    z = (terms.mean(0) - theory) / (terms.std(0) / len(total) ** 0.5)
    assert float(z.abs().max()) < norm.isf(ERROR_RATE / 2 / len(theory))


@pytest.mark.parametrize("prediction", ["x_start", "v", "x_prev"])
def test_the_same_model_has_the_same_bound_whatever_it_predicts(prediction):
    images = drawn(8)
    expected = measured(exact("fixed_large"), images)
    found = measured(exact("fixed_large", prediction), images)
    torch.testing.assert_close(found.vlb, expected.vlb, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.total_bpd, expected.total_bpd, rtol=1e-5, atol=0.0)


def test_the_closed_form_sees_small_errors():
    sampler = exact("fixed_large")
    found = measured(sampler, drawn(256), steps=20)
    total, theory = found.vlb[:, :-1].double().sum(1), expected_terms(sampler, found.timesteps).sum()
    for wrong in (1.01 * total, total - 0.05):
        assert abs(float((wrong.mean() - theory) / (total.std() / 16))) > norm.isf(ERROR_RATE / 2)


def test_the_bound_of_an_exact_model_is_the_entropy_of_its_data():
    """What N(μ, s²) has to say, cut into 256 levels; the bound adds the less to it the smaller the steps are."""
    images = (drawn(16) * 255).round().byte()
    bits = float(discretised_normal_bits(images.to(F64) / 127.5 - 1, MU, SCALE).mean())
    coarse, fine = (
        float(measured(exact("fixed_large", T=T, beta_end=20 / T), images).total_bpd.mean()) - bits for T in (80, 320)
    )
    # What is left is the price of the last step's noise, which is about as wide as a level.
    assert 0 < fine < 0.05 * bits and fine < 0.7 * coarse


def test_a_network_of_another_range_has_the_same_bound():
    """What is learned on [0, 1] with half the noise is the same model."""
    sampler = exact(T=50)
    half = dataclasses.replace(sampler.spec, to_unit="identity")
    images = drawn(4)
    found = measured(
        Sampler(sampler.model, sampler.schedule, half, device="cpu", engine="eager"), images, timesteps=[49]
    )
    a = float(sampler.schedule.alphas_cumprod[49])
    scale = math.sqrt(1 - a)
    x = images.double()
    eps = normals(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.full((4,), 49 + (2 << 28)), (1, 8, 8))
    x_t = math.sqrt(a) * x + scale * eps
    gain = math.sqrt(a) * SCALE**2 / (a * SCALE**2 + 1 - a)
    mean = MU + gain * (x_t - math.sqrt(a) * MU)
    spread = torch.distributions.Normal(mean, scale)  # σ² of the only row is β = 1 − ᾱ
    bits = -(spread.cdf(x + 0.5 / 255) - spread.cdf(x - 0.5 / 255)).log().flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found.vlb[:, 0].double(), bits, rtol=2e-3, atol=0.0)


# ------------------------------------------------------------------ the same in every company


def test_the_bound_is_the_same_for_every_batch_size_and_order():
    sampler = tiny_sampler()
    images, labels = images_of(sampler, 7), torch.arange(7) % 3
    whole = measured(sampler, images, class_labels=labels, steps=6, seed=2**64 - 1)
    parts = measured(sampler, images, class_labels=labels, steps=6, seed=2**64 - 1, batch_size=3)
    assert off(parts, whole) < 1e-6
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    shuffled = {"class_labels": labels[order], "sample_ids": order, "batch_size": 3, "seed": 2**64 - 1}
    other = measured(sampler, images[order], steps=6, **shuffled)
    assert torch.equal(other.vlb, parts.vlb[order]) and torch.equal(other.prior_bpd, parts.prior_bpd[order])


def test_seeds_and_sampling_have_noise_of_their_own():
    """The seed counts, and so does the domain: the noise of sampling with the same seed is another."""
    sampler = tiny_sampler()
    images = images_of(sampler)
    first, again, second = (measured(sampler, images, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.vlb, again.vlb) and not torch.equal(first.vlb, second.vlb)
    ids, seeds = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    for domain, is_it in ((2 << 28, True), (0, False)):
        noise = torch.stack([normals(seeds, ids, torch.full((3,), t + domain), (1, 8, 8)) for t in first.timesteps])
        assert torch.equal(measured(sampler, images, steps=3, noise=noise).vlb, first.vlb) is is_it


def test_noise_as_a_function_and_from_a_generator():
    sampler, asked = tiny_sampler(), []
    noise = torch.randn(3, 3, 1, 8, 8)

    def function(i, t, ids):
        asked.append((i, t))
        return noise[i]

    found = measured(sampler, steps=3, noise=function)
    assert torch.equal(found.vlb, measured(sampler, steps=3, noise=noise).vlb)
    assert asked == list(enumerate(found.timesteps.tolist()))
    drawn = torch.stack(list(torch.randn(3, 3, 1, 8, 8, generator=torch.Generator().manual_seed(5))))
    generated = measured(sampler, steps=3, noise=torch.Generator().manual_seed(5))
    torch.testing.assert_close(generated.vlb, measured(sampler, steps=3, noise=drawn).vlb, rtol=1e-6, atol=0.0)


def test_batches_come_as_they_are_finished_and_files_are_read_when_their_turn_comes(tmp_path):
    sampler = tiny_sampler()
    images, files = images_of(sampler, 5), []
    for number, picture in enumerate(images):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(picture[0].numpy()).save(files[-1])
    expected = measured(sampler, images, steps=3, batch_size=2)
    files[4].unlink()
    stream = sampler.stream_likelihood(files, batch_size=2, progress=False, steps=3)
    parts = [next(stream), next(stream)]
    assert [len(part) for part in parts] == [2, 2]
    torch.testing.assert_close(torch.cat([part.vlb for part in parts]), expected.vlb[:4])
    with pytest.raises(ValueError, match="likelihood: images must exist, got .*4.png"):
        next(stream)


def test_bfloat16_is_the_networks_and_the_bounds_are_close():
    sampler = tiny_sampler()
    low = Sampler(sampler.model, sampler.schedule, sampler.spec, device="cpu", engine="eager", precision="bf16")
    expected, found = (measured(one, class_labels=1, steps=5) for one in (sampler, low))
    assert found.vlb.dtype == torch.float32
    torch.testing.assert_close(found.total_bpd, expected.total_bpd, rtol=0.05, atol=0.0)


def test_a_self_conditioned_network_is_told_nothing():
    seen = []

    def model(x, t, x_self_cond=None):
        seen.append(x_self_cond)
        return x

    spec = ModelSpec(shape=(1, 4, 4), self_condition=True)
    measured(Sampler(model, NoiseSchedule.linear(10), spec, device="cpu", engine="eager"), steps=2)
    assert len(seen) == 2 and all(not guess.any() for guess in seen)


def test_dynamic_thresholding_is_that_of_sampling():
    """What the bound takes for x̂_0 is what a sampler with the same threshold makes of the same state."""
    sampler = tiny_sampler(threshold=(0.8, 1.5), clip=None)
    images, noise = images_of(sampler), torch.randn(1, 3, 1, 8, 8)
    found = measured(sampler, images, timesteps=[20], noise=noise)
    x_start = images.float() / 127.5 - 1
    t, seen = torch.full((3,), 20), []
    x_t = sampler.schedule.q_sample(x_start, t, noise[0])
    sampler.sample(3, x_T=x_t, timesteps=[20], solver="ddim", callback=lambda p: seen.append(p.x_start), progress=False)
    expected = (seen[0] - x_start).square().flatten(1).mean(1)
    torch.testing.assert_close(found.x_start_mse[:, 0], expected, rtol=1e-5, atol=0.0)


# ------------------------------------------------------------------ what is wrong


WRONG = [
    ({"images": torch.zeros(2, 1, 9, 9)}, ValueError, "likelihood: images must be 8×8 pixels, got 9×9"),
    ({"images": torch.full((2, 1, 8, 8), 1.5)}, ValueError, r"likelihood: images of floats must be in \[0, 1\]"),
    ({"images": []}, ValueError, "likelihood: images must be at least one, got none"),
    ({"images": 7}, TypeError, "likelihood: images must be paths"),
    ({"steps": 41}, ValueError, "steps must be in 1 … 40"),
    ({"timesteps": [3, 5]}, ValueError, "likelihood: timesteps must be strictly descending"),
    ({"noise": torch.zeros(2, 3, 1, 8, 8)}, ValueError, "noise must have shape"),
    ({"class_labels": [0, 1]}, ValueError, "class_labels must be one label or n = 3"),
    ({"sample_ids": [1]}, ValueError, "sample_ids must have n = 3"),
    ({"guidance_scale": 2.0}, TypeError, "likelihood: options must be .*got guidance_scale"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_wrong_is_one_clear_line(options, kind, message):
    with pytest.raises(kind, match=message):
        measured(tiny_sampler(), **options)


def test_nan_is_named_with_its_timestep():
    network = lambda x, t: torch.where(t.view(-1, 1, 1, 1) < 5, torch.nan, x)  # noqa: E731
    sampler = Sampler(network, NoiseSchedule.linear(10), ModelSpec(shape=(1, 4, 4)), device="cpu", engine="eager")
    with pytest.raises(FloatingPointError, match=r"row 6 of 10 \(t = 4\) of 3 pictures, first id 0"):
        measured(sampler)


def test_a_likelihood_is_documented_numbers():
    found = measured(tiny_sampler(), steps=2)
    assert isinstance(found, Likelihood) and len(found) == 3
    assert {name: tuple(getattr(found, name).shape) for name in NAMES} == {
        "total_bpd": (3,), "prior_bpd": (3,), "vlb": (3, 2), "x_start_mse": (3, 2), "eps_mse": (3, 2),
    }  # fmt: skip
    assert json.dumps(found.timesteps.tolist()) == "[39, 0]"
