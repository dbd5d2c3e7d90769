"""Conditions: networks with more input than output channels, against loops that put the channels together by hand."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastddpm import ModelSpec, NoiseSchedule, Sampler, low_res
from fastddpm.engines.choose import Engine
from fastddpm.engines.gpu import Gpu, compile_in_place
from fastddpm.kernels.kept import CACHE_VARIABLE
from fastddpm.process import reference
from fastddpm.process.timesteps import respace, spaced_timesteps
from tests.engines.common import like
from tests.engines.recorder import Recorder
from tests.networks import tiny_unet

T, C = 40, 2


def sampler(**spec):
    """A sampler whose network takes two channels behind x's one."""
    changed = {"num_classes": 3, "null_class": 3, "condition_channels": C, **spec}
    kind = ModelSpec((1, 8, 8), **changed)
    unet = tiny_unet(
        in_channels=1 + kind.condition_channels,
        out_channels=2 if kind.learned_variance else 1,
        num_classes=None if kind.num_classes is None else 4,
    )
    return Sampler(unet, NoiseSchedule.linear(T), kind, device="cpu")


def conditions(n=3, channels=C, seed=1):
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def by_hand(ours, condition):
    """The network with the condition in it, for the textbook."""
    return lambda x, t, *y: ours.network(torch.cat((x, condition), 1), t, *y)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_runs_are_the_textbooks(solver, scale):
    ours, condition, y = sampler(variance="learned_range"), conditions(), torch.tensor([0, 2, 1])
    generator = torch.Generator().manual_seed(3)
    x_T, z = torch.randn(3, 1, 8, 8, generator=generator), torch.randn(9, 3, 1, 8, 8, generator=generator)
    model = by_hand(ours, condition)
    if scale != 1.0:
        model = reference.classifier_free_guidance(model, scale, 3)
    if solver == "ddpm":
        steps = respace(T, "9")
        expected = reference.p_sample_loop(
            model, ours.schedule, x_T, z, timesteps=steps, y=y, variance="learned_range"
        )  # fmt: skip
    else:
        steps = spaced_timesteps(T, 9, "trailing")
        loop = reference.ddim_sample_loop if solver == "ddim" else reference.dpmpp_2m_sample_loop
        expected = loop(model, ours.schedule, x_T, steps, y=y)
    noise = {"noise": z} if solver == "ddpm" else {}
    x = ours.sample(
        3, solver=solver, timesteps=steps, x_T=x_T, class_labels=y, guidance_scale=scale, condition=condition,
        output="raw", **noise,
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=2e-5)
    other = ours.sample(
        3, solver=solver, timesteps=steps, x_T=x_T, class_labels=y, condition=-condition, output="raw", **noise
    )
    assert (other - x).abs().max() > 1e-2


def test_each_sample_keeps_its_own_in_batches_that_are_filled():
    ours, condition = sampler(), conditions(5)
    asked = {"steps": 4, "output": "raw", "batch_size": 2, "class_labels": 1}
    whole = ours.sample(5, condition=condition, **asked)
    assert torch.equal(ours.sample(1, condition=condition[4:], sample_ids=[4], **asked), whole[4:])
    one = ours.sample(5, condition=condition[:1], **asked)
    assert torch.equal(one[:1], whole[:1]) and not torch.equal(one[1:], whole[1:])
    assert torch.equal(one, ours.sample(5, condition=condition[0], **asked))


def test_any_callable_is_given_both():
    shapes = []

    def network(x, t):
        shapes.append(tuple(x.shape))
        return x[:, :1] - x[:, 1:].sum(1, keepdim=True)

    spec = ModelSpec((1, 8, 8), condition_channels=C)
    Sampler(network, NoiseSchedule.linear(T), spec, device="cpu").sample(2, steps=2, condition=conditions(2))
    assert set(shapes) == {(2, 3, 8, 8)}


def other_conditions_are_no_news(compiled, used):
    """One prepared step draws what eager steps draw, for one condition after the other."""
    asked = {"steps": 7, "output": "raw", "class_labels": 1, "guidance_scale": 2.0}
    eager = like(compiled, "eager")
    for seed in (1, 2):
        x = compiled.sample(3, condition=conditions(seed=seed), **asked)
        assert compiled.engine.used == used
        torch.testing.assert_close(x, eager.sample(3, condition=conditions(seed=seed), **asked), rtol=1e-4, atol=1e-4)


def test_a_captured_step_reads_it_from_its_own_memory():
    ours = sampler()
    Recorder.captures.clear()
    quick = Gpu(graphs=True, graph_steps=4, compile_step=lambda step, arguments: step, capture=Recorder)
    ours.stepper.engine = Engine("cuda_graph", ours.device, quick=quick)
    other_conditions_are_no_news(ours, "cuda_graph")
    assert len(Recorder.captures) == 2  # of one step and of several, by the first run


def test_a_step_with_one_is_one_graph():
    ours = sampler()
    whole = functools.partial(compile_in_place, backend="eager")
    ours.stepper.engine = Engine("compiled", ours.device, quick=Gpu(graphs=False, compile_step=whole))
    other_conditions_are_no_news(ours, "compiled")


@pytest.mark.slow
def test_a_package_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    compiled = like(sampler(), "compiled")
    assert compiled.compile(3, guided=True) is not None
    other_conditions_are_no_news(compiled, "compiled")
    assert compiled.compile(3, guided=True) is None


# ------------------------------------------------------------------ pictures


def test_pictures_are_brought_into_the_networks_range(tmp_path):
    ours = sampler(condition_channels=1, num_classes=None, null_class=None)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "a.png")
    as_floats = torch.tensor(pixels).float()[None, None] / 127.5 - 1
    asked = {"steps": 3, "output": "raw"}
    expected = ours.sample(2, condition=as_floats, **asked)
    for given in (tmp_path / "a.png", pixels, Image.fromarray(pixels), torch.tensor(pixels)[None], [pixels, pixels]):
        torch.testing.assert_close(ours.sample(2, condition=given, **asked), expected, rtol=1e-5, atol=1e-5)


def test_small_pictures_are_enlarged_as_super_resolution_networks_do():
    small = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(small / 127.5 - 1, (8, 12), mode="bilinear")
    torch.testing.assert_close(low_res(small, (3, 8, 12)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low_res([small[0], small[1]], (3, 8, 12)), expected, rtol=1e-5, atol=1e-6)
    unit = low_res(small, (3, 8, 12), unit_range=True)
    torch.testing.assert_close(unit, (expected + 1) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="low_res: images must be of one size, got 4×4 and 6×4; resize them"):
        low_res([small[0], small[1][..., :4]], (3, 8, 12))
    with pytest.raises(ValueError, match="low_res: images must have 4 channels, got 3"):
        low_res(small, (4, 8, 12))
    with pytest.raises(ValueError, match="low_res: images must be at least one, got none"):
        low_res([], (3, 8, 12))


@pytest.mark.parametrize(
    ("condition", "kind", "message"),
    [
        (None, ValueError, r"condition must be given, a tensor \(3, 2, 8, 8\) or pictures, got None"),
        (
            torch.zeros(3, 1, 8, 8),
            ValueError,
            r"condition must have shape \(3, 2, 8, 8\) or \(1, 2, 8, 8\), got \(3, 1",
        ),
        (torch.zeros(2, 2, 8, 8), ValueError, r"got \(2, 2, 8, 8\); one or n of them"),
        (torch.zeros(3, 2, 4, 4), ValueError, r"got \(3, 2, 4, 4\)"),
        (torch.zeros(8, 8), ValueError, r"got \(8, 8\)"),
        (torch.full((3, 2, 8, 8), torch.nan), ValueError, "condition must be finite"),
        (torch.zeros(3, 2, 8, 8, dtype=torch.int64), TypeError, "condition must be uint8 or float, got torch.int64"),
        ("none.png", ValueError, "condition must exist, got none.png"),
        (7, TypeError, "condition must be paths, PIL images, arrays or tensors, got int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_is_one_clear_line(condition, kind, message):
    with pytest.raises(kind, match=message):
        sampler().sample(3, steps=2, condition=condition)


def test_a_network_that_takes_none():
    plain = sampler(condition_channels=0)
    with pytest.raises(ValueError, match="condition must be left out, got one, but the network takes none"):
        plain.sample(3, steps=2, condition=conditions())
    with pytest.raises(TypeError, match="got low_res; it is called condition here"):
        plain.sample(3, low_res=conditions())
