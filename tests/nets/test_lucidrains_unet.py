"""Our U-Net of denoising-diffusion-pytorch against the package's, option by option, and what samplers ask of it."""

import importlib.util
import itertools

import pytest
import torch

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.bench.lucidrains_package import package_module
from fastddpm.checkpoints.flags import Flags
from fastddpm.checkpoints.lucidrains import FLAGS, make_network
from fastddpm.checkpoints.lucidrains_unet import structure, unseen
from fastddpm.checkpoints.lucidrains_versions import older_options, unwrapped
from fastddpm.engines import cache
from fastddpm.nets.lucidrains import LucidrainsConfig, LucidrainsUNet
from fastddpm.step.network import Network
from tests.engines.common import like
from tests.steps import begin

pytest.importorskip("einops")
if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
    pytest.skip("denoising-diffusion-pytorch is not installed", allow_module_level=True)

PLAIN, CLASSES = "denoising_diffusion_pytorch", "classifier_free_guidance"
OPTIONS = {
    "defaults": (PLAIN, {"dim_mults": (1, 2, 4, 8), "attn_heads": 4, "attn_dim_head": 32}),
    "one level": (PLAIN, {"dim_mults": (1,)}),
    "levels that get narrower": (PLAIN, {"dim_mults": (3, 1, 2)}),
    "one channel, wider at first": (PLAIN, {"channels": 1, "init_dim": 12}),
    "self-conditioned": (PLAIN, {"self_condition": True}),
    "learned variance": (PLAIN, {"learned_variance": True}),
    "learned sinusoids": (PLAIN, {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 10}),
    "random sinusoids": (PLAIN, {"random_fourier_features": True}),
    "theta": (PLAIN, {"sinusoidal_pos_emb_theta": 300}),
    "full attention everywhere": (PLAIN, {"full_attn": (True, True)}),
    "linear attention inside": (PLAIN, {"full_attn": (True, False)}),
    "heads by level": (PLAIN, {"attn_heads": (1, 3), "attn_dim_head": (4, 6)}),
    "flash": (PLAIN, {"flash_attn": True}),
    "classes": (CLASSES, {"num_classes": 4}),
    "classes, learned sinusoids": (CLASSES, {"num_classes": 2, "learned_sinusoidal_cond": True, "init_dim": 12}),
    "classes, three levels": (CLASSES, {"num_classes": 3, "dim_mults": (1, 2, 2), "channels": 1}),
}
EVERY = pytest.mark.parametrize("name", OPTIONS)
RTOL = 1e-5
"""Of the largest output."""


def pair(name):
    """The package's network of these options, random, and ours with its weights."""
    source, options = OPTIONS[name]
    torch.manual_seed(0)
    options = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, **options}
    theirs = package_module(source).Unet(**options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = unwrapped(theirs.state_dict())
    flags = Flags("test", {name: options[name] for name in FLAGS if name in options}, FLAGS)
    known = structure(weights, flags)
    ours = make_network(known | unseen(weights, flags, known) | older_options(weights, flags, None), weights, "test")
    return theirs, ours


def inputs(ours):
    """x, t, and what else the network is given."""
    config, generator = ours.config, torch.Generator().manual_seed(1)
    x, fed_back = torch.randn(2, 3, config.channels, 8, 16, generator=generator).tanh()
    more = {"x_self_cond": fed_back} if config.self_condition else {}
    return (
        x,
        torch.tensor([0, 999, 17]),
        *((torch.tensor([0, 1, config.num_classes]),) if config.num_classes else ()),
        more,
    )


def assert_close(found, expected, rtol=RTOL):
    torch.testing.assert_close(found, expected, rtol=0.0, atol=rtol * float(expected.abs().max()))


@EVERY
@torch.no_grad()
def test_outputs_are_the_packages(name):
    theirs, ours = pair(name)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t, *y, more = inputs(ours)
    if y:
        known = torch.cat([theirs(x[:2], t[:2], y[0][:2], cond_drop_prob=0.0),
                           theirs(x[2:], t[2:], torch.tensor([0]), cond_drop_prob=1.0)])  # fmt: skip
    else:
        known = theirs(x, t, **more)
    assert_close(ours(x, t, *y, **more), known)
    if more:
        assert_close(ours(x, t), theirs(x, t))
    if ours.config.num_classes is None:  # under the very names
        other = LucidrainsUNet(ours.config).eval()
        other.load_state_dict(theirs.state_dict(), strict=True)
        assert torch.equal(other(x, t, **more), ours(x, t, **more))


@EVERY
@torch.no_grad()
def test_tabulated_rows_give_the_same_output(name):
    _, ours = pair(name)
    assert isinstance(ours, Network)
    x, t, *y, more = inputs(ours)
    expected, times, index = ours(x, t, *y, **more), torch.tensor([999, 17, 0]), torch.tensor([2, 0, 1])
    if y:
        table = torch.cat([ours.tabulate(times, label) for label in y[0].tolist()])
        told = ours.body(x, ours.tabulate(times), index, y[0])
        assert_close(told, expected)
        index = index + 3 * torch.arange(3)
    else:
        table = ours.tabulate(times)
    assert table.shape[1] == ours.row_numbers()
    assert_close(ours.body(x, table, index, **more), expected)
    assert_close(ours.body(x, table[index], **more), expected)


@EVERY
@torch.no_grad()
def test_in_bfloat16_all_but_the_embedding_is_cast(name):
    _, ours = pair(name)
    x, t, *y, more = inputs(ours)
    expected, cast = ours(x, t, *y, **more), ours.cast(torch.bfloat16)
    assert_close(cast(x, t, *y, **more).float(), expected, rtol=0.05)
    assert_close(ours(x, t, *y, **more), expected, rtol=0.0)
    kept = {name for name, value in cast.named_parameters() if value.dtype == torch.float32}
    embedding = {name for name, _ in ours.named_parameters() if name.startswith(("time_mlp.", "classes_", "null_"))}
    assert kept == embedding | {name for name, _ in ours.named_parameters() if ".mlp." in name}


@pytest.mark.parametrize("name", ["self-conditioned", pytest.param("classes", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_trace_is_of_any_batch(name):
    _, ours = pair(name)
    x, t, *y, more = inputs(ours)
    batch = [{0: torch.export.Dim.DYNAMIC}] * (2 + len(y))
    shapes = {**dict(zip(("x", "t", "y"), batch, strict=False)), **{key: batch[0] for key in more}}
    traced = torch.export.export(ours, (x, t, *y), more, dynamic_shapes=shapes).module()
    few = [value[:2] for value in (x, t, *y)]
    less = {key: value[:2] for key, value in more.items()}
    assert_close(traced(*few, **less), ours(*few, **less))


def test_labels_and_estimates_of_x_0_must_fit():
    plain, classes = pair("one level")[1], pair("classes")[1]
    x, t = torch.zeros(1, 3, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match="y must be labels y here, got none"):
        classes(x, t)
    with pytest.raises(ValueError, match="y must be no labels here, got labels"):
        plain(x, t, t)
    with pytest.raises(ValueError, match="x_self_cond must be None here, got a tensor; leave it out"):
        plain(x, t, x_self_cond=x)


def sampler(name, **options):
    _, ours = pair(name)
    config = ours.config
    classes = (
        {} if config.num_classes is None else {"num_classes": config.num_classes, "null_class": config.num_classes}
    )
    spec = ModelSpec((config.channels, 8, 8), self_condition=config.self_condition, **classes)
    with torch.no_grad():
        ours.final_conv.weight.mul_(0.1)  # a rough network makes chaos of any rounding
    return Sampler(ours, NoiseSchedule.linear(40), spec, device="cpu", **options)


def test_what_tells_networks_apart():
    """Samplers of the same network share a package; the configuration, which changes outputs, is part of its key."""
    one, other = (sampler("heads by level", engine="compiled") for _ in range(2))
    table = one.table(steps=3)
    keys = [s.engine.quick.key(s.engine.quick.formed(begin(s, table, [0, 1]))) for s in (one, other)]
    assert keys[0] == keys[1] and one.engine.quick.is_kept(begin(one, table, [0, 1]))
    identities = [LucidrainsConfig(8, 8, (1,), (True,), (heads,) * 2, (8 // heads,) * 2, sinusoidal_pos_emb_theta=theta)
                  for heads, theta in itertools.product((1, 2), (1e3, 1e4))]  # fmt: skip
    assert len({LucidrainsUNet(config).identity() for config in identities}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one level", "self-conditioned", "classes"])
def test_compiled_steps_are_kept(name):
    one = sampler(name, engine="compiled")
    guided = one.spec.num_classes is not None
    assert one.compile(2, guided=guided) > 0
    packages = set(cache.packages())
    other = sampler(name, engine="compiled")
    assert other.compile(2, guided=guided) is None
    options = {"solver": "ddpm", "steps": 6, "output": "raw", "progress": False}
    options |= {"class_labels": [0, 3], "guidance_scale": 2.0} if guided else {}
    expected = like(one, "eager").sample(2, **options)
    found = other.sample(2, **options)
    assert other.engine.used == "compiled" and set(cache.packages()) == packages
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
