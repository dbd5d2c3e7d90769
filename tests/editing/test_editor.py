"""Edits against loops written by hand, and what they promise of their ends."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from fastddpm import Method, ModelSpec, NoiseSchedule, Sampler
from fastddpm.editing.plans import slerp
from fastddpm.kernels.operands import COLUMNS
from fastddpm.kernels.philox import START
from fastddpm.process.noise import normals
from fastddpm.step.request import RunOptions
from tests.networks import SPEC, tiny_unet

T = 40
LABEL = {"class_labels": 1}


@pytest.fixture(scope="module")
def sampler():
    return Sampler(tiny_unet(), NoiseSchedule.linear(T), SPEC, device="cpu", engine="eager")


def pictures(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def own(n: int = 2, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and ids of a run."""
    return torch.full((n,), seed), torch.arange(n)


def by_hand(sampler, table, x, seeds, ids, first=0):
    """A table's rows from `first` on, in plain PyTorch, without histories."""
    labels = torch.ones(len(x), dtype=torch.int64)
    with torch.no_grad():
        for i in range(first, table.S):
            row, t = table.row(i), table.timesteps[i].expand(len(x))
            out = sampler.network(x, t, labels)
            x_start = (row["a_x"] * x + row["a_o"] * out).clamp(-row["bound"], row["bound"])
            z = normals(seeds, ids, t, (1, 8, 8))
            x = row["c_0"] * x_start + row["c_x"] * x + row["c_o"] * out + row["sigma"] * z
    return x


# --- from a picture -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_img2img_is_a_loop_from_a_noised_picture(sampler, solver):
    images, (seeds, ids) = pictures(), own()
    table = sampler.table(solver=solver, steps=10)
    first = next(i for i, t in enumerate(table.timesteps.tolist()) if t <= 0.6 * T)
    t, a = table.timesteps[first], float(sampler.schedule.alphas_cumprod[table.timesteps[first]])
    eps = normals(seeds, ids, t.expand(2) + START, (1, 8, 8))
    x_t = a**0.5 * (2 * images - 1) + (1 - a) ** 0.5 * eps
    expected = by_hand(sampler, table, x_t, seeds, ids, first)
    got = sampler.img2img(images, 0.6, seed=7, solver=solver, steps=10, output="raw", **LABEL)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    supplied = sampler.img2img(images, 0.6, seed=7, solver=solver, steps=10, output="raw", x_T=eps, **LABEL)
    torch.testing.assert_close(supplied, got, rtol=1e-4, atol=1e-4)


def test_img2img_draws_from_a_generator_in_the_order_of_use(sampler):
    def generator():
        return torch.Generator().manual_seed(11)

    draws = generator()
    eps = torch.randn(2, 1, 8, 8, generator=draws)
    got = sampler.img2img(pictures(), 0.5, solver="ddpm", steps=8, noise=generator(), **LABEL)
    expected = sampler.img2img(pictures(), 0.5, solver="ddpm", steps=8, noise=draws, x_T=eps, **LABEL)
    assert torch.equal(got, expected)


def test_the_weaker_the_closer(sampler):
    images = pictures(8)
    off = [
        (sampler.img2img(images, strength, steps=20, **LABEL) - images).square().mean().item()
        for strength in (0.05, 0.2, 0.4)
    ]
    assert off == sorted(off) and off[0] < off[-1] / 2


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
def test_an_edited_picture_depends_on_itself_seed_and_id_alone(sampler, solver):
    images = pictures(5)
    options = {"seed": 2, "solver": solver, "steps": 9, **LABEL}
    jumps = {} if solver in ("ddpm", "ddim") else {"fill": "replace"}
    for edit in (
        lambda x, ids, size: sampler.img2img(x, 0.7, sample_ids=ids, batch_size=size, **options),
        lambda x, ids, size: sampler.inpaint(
            x, "left", resamplings=2, sample_ids=ids, batch_size=size, **options, **jumps
        ),
    ):
        together = edit(images, range(5), 3)
        assert torch.equal(edit(images[[4, 1]], [4, 1], 3), together[[4, 1]])
        torch.testing.assert_close(edit(images[3], [3], None), together[3:4], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(edit(images[3], [4], None), together[3:4], atol=1e-2)


# --- upwards, and between two ---------------------------------------------------------------------


def test_what_is_inverted_is_drawn_again(sampler):
    images = pictures()
    off = []
    for steps in (10, 20, 40):
        run = {"steps": steps, "clip": None, **LABEL}
        latents = sampler.invert(images, **run)
        again = sampler.sample(2, x_T=latents, output="raw", **run)
        off.append((again - (2 * images - 1)).square().mean().sqrt().item())
    assert off[0] > 1.5 * off[1] > 2.25 * off[2] and off[2] < 0.1, off


def test_interpolation_through_noise_begins_and_ends_with_its_pictures(sampler):
    a, b = pictures()
    run = {"steps": 10, "seed": 4, "solver": "ddpm", **LABEL}
    between = sampler.interpolate(a, b, 5, level=0.6, sample_ids=[9], **run)
    assert between.shape == (5, 1, 8, 8)
    for place, picture in ((0, a), (4, b), (2, (a + b) / 2)):
        alone = sampler.img2img(picture, 0.6, sample_ids=[9], **run)
        torch.testing.assert_close(between[place : place + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [None, 0.7])
def test_interpolation_by_inversion_begins_and_ends_with_its_pictures(sampler, level):
    a, b = pictures()
    run = {"steps": 40, "clip": None, **LABEL}
    between = sampler.interpolate(a, b, 3, path="slerp", level=level, output="raw", **run)
    if level is None:
        latents = sampler.invert([a, b], **run)
        alone = sampler.sample(
            3, x_T=slerp(*latents[:, None], torch.tensor([0, 0.5, 1]).view(-1, 1, 1, 1)), output="raw", **run
        )
        torch.testing.assert_close(between, alone, rtol=1e-4, atol=1e-4)
    for place, picture in ((0, a), (2, b)):
        assert (between[place] - (2 * picture - 1)).square().mean().sqrt() < 0.1


def test_interpolation_takes_the_labels_of_its_ends_for_their_inversion(sampler):
    a, b = pictures()
    run = {"steps": 40, "clip": None, "path": "slerp", "output": "raw"}
    between = sampler.interpolate(a, b, 3, class_labels=[0, 1, 2], guidance_scale=[1.0, 1.0, 1.0], **run)
    for place, picture in ((0, a), (2, b)):
        assert (between[place] - (2 * picture - 1)).square().mean().sqrt() < 0.1


def test_slerp_keeps_the_length_and_turns_evenly():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 3, 4, 4, generator=g)
    a, b = a / a.norm(), b / b.norm()
    path = slerp(a, b, torch.linspace(0, 1, 7).view(-1, 1, 1, 1)).flatten(1)
    torch.testing.assert_close(path.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(path[[0, -1]], torch.stack((a.flatten(), b.flatten())))
    turns = (path[1:] * path[:-1]).sum(1)
    torch.testing.assert_close(turns, turns[:1].expand(6))
    straight = slerp(a, 2 * a, torch.tensor([0.5]).view(-1, 1, 1, 1))
    torch.testing.assert_close(straight, 1.5 * a)


# --- filled in ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fill": "replace"}, {"solver": "ddpm", "resamplings": 2}], ids=str)
def test_what_is_known_comes_out_as_it_went_in(sampler, options):
    images = pictures()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:7] = True
    got = sampler.inpaint(images, mask, steps=8, output="raw", **({"resamplings": 3} | options), **LABEL)
    known = ~mask.expand_as(got)
    assert torch.equal(got[known], (2 * images - 1)[known]) and not torch.allclose(got, 2 * images - 1, atol=0.1)


def test_a_mask_of_everything_is_plain_sampling(sampler):
    run = {"steps": 8, "solver": "ddpm", "seed": 3, "output": "raw", **LABEL}
    filled = sampler.inpaint(pictures(), torch.ones(8, 8), fill="replace", **run)
    torch.testing.assert_close(filled, sampler.sample(2, **run), rtol=1e-5, atol=1e-5)


def test_inpainting_is_refused_where_a_solver_looks_back(sampler):
    with pytest.raises(ValueError, match=r"^inpaint: solver must be ddpm or ddim where a run jumps back, got dpmpp_2m"):
        sampler.inpaint(pictures(), "middle", solver="dpmpp_2m", **LABEL)


def repaint_by_diffusers(network, x_T, images, mask, generator, scheduler):
    """The loop of diffusers' RePaintPipeline."""
    x, last = x_T, scheduler.timesteps[0] + 1
    for t in scheduler.timesteps:
        if t < last:
            x = scheduler.step(network(x, t.expand(len(x))), t, x, images, mask, generator=generator).prev_sample
        else:
            x = scheduler.undo_step(x, last, generator=generator)
        last = t
    return x


def one_z_a_row(scheduler, mask, shape, seed):
    """The z of each row that adds what a step and the jump after it draw, elements known and not, float64.

    r σ z_0 + Σ w_k z_k is σ_row z for what is drawn, r √(1−ᾱ_prev) z_0 + Σ w_k z_k is √(1−ᾱ_to) z for what is known.
    """
    generator = torch.Generator().manual_seed(seed)
    betas, a_bar = scheduler.betas.double(), scheduler.alphas_cumprod.double()

    def draw():
        return torch.randn(shape, generator=generator).double()

    timesteps, rows = scheduler.timesteps.tolist(), []
    for last, t in zip([timesteps[0] + 1, *timesteps], timesteps, strict=False):
        if t < last:
            prev = a_bar[t - 1] if t else torch.tensor(1.0).double()
            step = scheduler.eta * ((1 - prev) / (1 - a_bar[t]) * (1 - a_bar[t] / prev)).sqrt()
            z = draw()
            rows.append([step * z, (1 - prev).sqrt() * z, step**2, 1 - prev])
        else:
            kept, added, z = (1 - betas[last]).sqrt(), betas[last].sqrt(), draw()
            free, held, var, level = rows[-1]
            rows[-1] = [kept * free + added * z, kept * held + added * z,
                        kept**2 * var + added**2, kept**2 * level + added**2]  # fmt: skip
    zs = []
    for free, held, var, level in rows:
        parts = [torch.where(v > 0, part / v.clamp(min=1e-30).sqrt(), 0.0) for part, v in ((free, var), (held, level))]
        zs.append(torch.where(mask > 0, parts[1], parts[0]))
    return torch.stack(zs).float()


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_pictures_are_those_of_diffusers_repaint(eta):
    diffusers = pytest.importorskip("diffusers")
    steps, (length, resamplings), shape = 20, (3, 4), (2, 1, 4, 4)
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=steps, eta=eta)
    scheduler.set_timesteps(steps, length, resamplings)

    def network(x, t):
        return 0.6 * x + 0.2 * torch.sin(3 * x.roll(1, -1)) + 0.01 * t.view(-1, 1, 1, 1)

    g = torch.Generator().manual_seed(1)
    images, x_T = torch.rand(shape, generator=g), torch.randn(shape, generator=g)
    known = (torch.rand(4, 4, generator=g) < 0.5).float()  # 1 is known to diffusers
    expected = repaint_by_diffusers(
        network, x_T, 2 * images - 1, known, torch.Generator().manual_seed(2), scheduler
    )  # fmt: skip
    sampler = Sampler(network, NoiseSchedule.linear(steps), ModelSpec(shape=shape[1:]), device="cpu", engine="eager")
    got = sampler.inpaint(
        images, 1 - known, jump_length=length, resamplings=resamplings, x_T=x_T, output="raw",
        method=Method("ddim", steps=steps, eta=eta, clipped_eps="raw"), noise=one_z_a_row(scheduler, known, shape, 2),
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_supplied_noise_has_a_row_for_every_step(sampler):
    with pytest.raises(ValueError, match=r"noise must have shape \(26, 2, 1, 8, 8\)"):
        sampler.inpaint(
            pictures(), "top", steps=10, jump_length=2, resamplings=3, noise=torch.zeros(10, 2, 1, 8, 8), **LABEL
        )


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda s: s.img2img(pictures(), 2.0), ValueError, r"^img2img: strength must be above 0 and at most 1, got 2"),
        (lambda s: s.img2img([], 0.5), ValueError, r"^img2img: images must be at least one, got none"),
        (lambda s: s.img2img(torch.rand(1, 9, 8), 0.5), ValueError, r"^img2img: images must be 8×8 pixels"),
        (lambda s: s.img2img(pictures() * 255, 0.5), ValueError, r"^img2img: images of floats must be in \[0, 1\]"),
        (lambda s: s.img2img(pictures(), 0.5, stepps=3), TypeError, r"got stepps; mend the name"),
        (lambda s: s.inpaint(pictures(), "centre"), ValueError, r"^inpaint: mask must be an image file or one of"),
        (lambda s: s.inpaint(pictures(), "top", fill="x"), ValueError, r"^inpaint: fill must be one of repaint"),
        (lambda s: s.inpaint(pictures(), "top", method="replace"), TypeError, r"method must be a fastddpm.Method"),
        (lambda s: s.invert(pictures(), solver="ddpm"), ValueError, r"^invert: solver must be ddim, got ddpm; "),
        (lambda s: s.invert(pictures(), eta=0.5), ValueError, r"^invert: eta must be 0, got more; "),
        (lambda s: s.invert(pictures(), x_T=pictures()), ValueError, r"^invert: x_T must be left out, got one; "),
        (lambda s: s.interpolate(pictures(), pictures()), ValueError, r"a and b must be one picture each, got 2"),
        (lambda s: s.interpolate(*pictures(), 1), ValueError, r"^interpolate: n must be at least 2, got 1; "),
        (lambda s: s.interpolate(*pictures(), 3, path="x"), ValueError, r"^interpolate: path must be one of"),
        (lambda s: s.interpolate(*pictures(), 3, path="slerp", solver="ddpm"), ValueError, r"^interpolate: solver"),
        (lambda s: s.interpolate(*pictures(), 3, sample_ids=[1, 2, 3]), ValueError, r"sample_ids must be one id"),
        (lambda s: s.interpolate(*pictures(), 3, x_T=pictures(3)), ValueError, r"^interpolate: x_T must be left"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sampler, edit, error, match):
    with pytest.raises(error, match=match):
        edit(sampler)


# --- the exact answer -----------------------------------------------------------------------------

MEAN = torch.tensor([0.2, -0.1]).double()
COVARIANCE = torch.tensor([[0.16, 0.14], [0.14, 0.20]]).double()
"""Two pixels that know of each other, with which a correlation of 0.78 is to be found again."""
KNOWN = 0.7
EXACT = (
    float(MEAN[1] + COVARIANCE[0, 1] / COVARIANCE[0, 0] * (KNOWN - MEAN[0])),
    float(COVARIANCE[1, 1] - COVARIANCE[0, 1] ** 2 / COVARIANCE[0, 0]),
)
"""Mean and variance of the second pixel given the first."""
ERROR_RATE = 1e-6


def pair_sampler():
    """A sampler on the exact ε of the pair: √(1−ᾱ) (ᾱΣ + (1−ᾱ)I)⁻¹ (x − √ᾱμ)."""
    schedule = NoiseSchedule.cosine(100)
    a_bar = schedule.alphas_cumprod_exact

    def gains(t):
        a = a_bar[t].view(-1, 1, 1)
        return (1 - a).sqrt() * torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2).double()), a.sqrt()

    def network(x, t):
        gain, signal = gains(t[:1])  # all samples are at one row
        return (gain @ (x.double().view(-1, 2, 1) - signal * MEAN.view(2, 1))).float().view(x.shape)

    spec = ModelSpec(shape=(1, 1, 2), clip=None)
    return Sampler(network, schedule, spec, device="cpu", engine="eager"), gains


def moments(table, gains):
    """Mean and variance of the second pixel by the table's own affine maps, in float64: what it is drawn from."""
    of_out = {int(t): [value[0].numpy() for value in gains(t[None])] for t in table.timesteps.unique()}
    mean, cov, one = np.zeros(2), np.eye(2), np.eye(2)
    for values, t in zip(table.rows[:-1].tolist(), table.timesteps.tolist(), strict=False):
        row, (gain, signal) = dict(zip(COLUMNS, values, strict=True)), of_out[t]
        # out = G (x − √ᾱ μ), x̂_0 = a_x x + a_o out, x ← c_0 x̂_0 + c_x x + c_o out + σ z
        part = row["c_0"] * row["a_o"] + row["c_o"]
        matrix = (row["c_0"] * row["a_x"] + row["c_x"]) * one + part * gain
        mean = matrix @ mean - part * gain @ (signal.item() * MEAN.numpy())
        cov = matrix @ cov @ matrix.T + row["sigma"] ** 2 * one
        mean[0] = row["k_0"] * KNOWN
        cov = np.diag([row["k_z"] ** 2, cov[1, 1]])
    return mean[1], cov[1, 1]


def repaint_table(sampler, jump_length, resamplings, method):
    """The table of such an inpainting."""
    pair = torch.full((1, 1, 2), 0.5)
    return sampler.planner(method, RunOptions()).inpaint(pair, "right", "repaint", jump_length, resamplings).table


@pytest.mark.parametrize("method", [Method("ddpm", variance="fixed_large"), Method(steps=100)], ids=["ddpm", "ddim"])
def test_what_is_filled_in_comes_to_be_the_exact_conditional(method):
    """By the affine maps of the run: with each doubling of the resamplings the divergence from it more than halves."""
    sampler, gains = pair_sampler()
    off, divergences = [], []
    for resamplings in (1, 2, 4, 8, 16):
        mean, var = moments(repaint_table(sampler, 5, resamplings, method), gains)
        off.append((abs(mean - EXACT[0]), abs(var - EXACT[1])))
        ratio = var / EXACT[1]
        divergences.append((ratio - 1 - math.log(ratio) + off[-1][0] ** 2 / EXACT[1]) / 2)
    assert all(later < 0.5 * earlier for earlier, later in zip(divergences, divergences[1:], strict=False)), divergences
    assert divergences[0] > 0.25 and divergences[-1] < 0.01
    if method.solver == "ddpm":  # whose steps are taken with the larger of the two variances, which errs to one side
        assert off == sorted(off, reverse=True) and off[-1] < (0.025, 0.002) and off[-1][1] < 0.002


@pytest.mark.parametrize(
    ("resamplings", "solver"),
    [(1, "ddpm"), *(pytest.param(6, solver, marks=pytest.mark.slow) for solver in ("ddpm", "ddim"))],
)
def test_it_is_drawn_from_the_distribution_of_the_maps(resamplings, solver):
    """z- and χ²-test of 4096 filled pixels against the closed form, each with an error rate of 1e-6."""
    sampler, gains = pair_sampler()
    n = 4096
    images = torch.full((n, 1, 1, 2), (KNOWN + 1) / 2)
    options = {"resamplings": resamplings, "jump_length": 5, "solver": solver, "steps": 50}
    x = sampler.inpaint(images, "right", output="raw", **options)[:, 0, 0, 1].double()
    mean, var = moments(repaint_table(sampler, 5, resamplings, Method(solver, steps=50)), gains)
    assert abs(float(x.mean()) - mean) / math.sqrt(var / n) < norm.isf(ERROR_RATE / 2)
    ratio = float(((x - x.mean()) ** 2).sum()) / var
    assert chi2.ppf(ERROR_RATE / 2, n - 1) < ratio < chi2.isf(ERROR_RATE / 2, n - 1)
