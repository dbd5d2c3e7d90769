"""denoising-diffusion-pytorch: its files and its loops, against the package's own code."""

import concurrent.futures
import copy
import importlib
import json
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm import CheckpointError, Sampler, load_checkpoint
from fastddpm.bench.lucidrains_package import package_module
from fastddpm.checkpoints import lucidrains
from fastddpm.checkpoints.lucidrains_schedule import find_objective, named_schedule
from fastddpm.integrations import accelerate
from fastddpm.integrations import lucidrains as integration
from fastddpm.nets.lucidrains import LucidrainsUNet
from tests.helpers import relative
from tests.tiny import environment

pytest.importorskip("einops")
if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
    pytest.skip("denoising-diffusion-pytorch is not installed", allow_module_level=True)

UNET = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8}
CONFIGS = {
    "v, sigmoid": ({}, {"objective": "pred_v", "beta_schedule": "sigmoid"}),
    "noise, linear, self-conditioned": (
        {"self_condition": True, "dim_mults": (1, 2, 2), "full_attn": (False, True, True)},
        {"objective": "pred_noise", "beta_schedule": "linear"},
    ),
    "x0, cosine, min-SNR": (
        {"init_dim": 12, "channels": 1, "attn_heads": (1, 2), "attn_dim_head": (4, 8)},
        {"objective": "pred_x0", "beta_schedule": "cosine", "min_snr_loss_weight": True, "ddim_sampling_eta": 0.7},
    ),
    "v, min-SNR, self-conditioned": (
        {"self_condition": True, "channels": 2, "flash_attn": True, "dropout": 0.1},
        {"objective": "pred_v", "beta_schedule": "cosine", "min_snr_loss_weight": True, "min_snr_gamma": 3},
    ),
    "own sigmoid, unit range": (
        {"sinusoidal_pos_emb_theta": 500, "dim_mults": (2, 1)},
        {"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"end": 2, "tau": 0.9}, "auto_normalize": False,
         "objective": "pred_noise", "image_size": (8, 12), "ddim_sampling_eta": 1.0},
    ),
}  # fmt: skip
PARAMETERS = pytest.mark.parametrize(("unet", "diffusion"), CONFIGS.values(), ids=CONFIGS)
T = 60
SHORT = 24
"""For tests that sample."""


def module(name="denoising_diffusion_pytorch"):
    return package_module(name)


def randomize(network, scale=1.0):
    """Random weights everywhere, also where the package starts with ones."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and not name.endswith((".g", "mem_kv")):
            parameter.data = scale * noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = parameter.data + 0.1 * noise
    return network.eval()


def make(unet=None, diffusion=None, kind=None, source="denoising_diffusion_pytorch"):
    """A GaussianDiffusion of the package around its U-Net, random."""
    source = module(source)
    options = {"image_size": 8, "timesteps": T, **(diffusion or {})}
    network = randomize(source.Unet(**{**UNET, **(unet or {})}))
    if options.get("objective") == "pred_noise":
        # Early on x_0 is the output times 60: a rough random network would make chaos of any rounding.
        network.final_conv.weight.data.mul_(0.1)
    return (kind or source.GaussianDiffusion)(network, **options)


def trainer_file(path, diffusion, ema=None):
    """What its Trainer saves, the online weights being others than the averaged ones."""
    online = copy.deepcopy(diffusion)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.mul_(1.1)
    averaged = {f"ema_model.{name}": value for name, value in diffusion.state_dict().items()}
    averaged |= {f"online_model.{name}": value for name, value in online.state_dict().items()}
    averaged |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    values = {"step": 700, "model": online.state_dict(), "opt": {"state": {}, "param_groups": []}, "scaler": None}
    torch.save({**values, "ema": averaged if ema is None else ema, "version": "2.3.4"}, path)
    return online


def flags_of(unet, diffusion):
    """All of its arguments under their names, as somebody would who keeps them in a file."""
    given = {**UNET, "image_size": 8, "timesteps": T, **unet, **diffusion}
    return json.loads(json.dumps(given))


def asked(diffusion, *names):
    """The flags without which a file cannot be read, and `names`."""
    wanted = {"image_size", "auto_normalize", "sinusoidal_pos_emb_theta", *names}
    return {"image_size": 8} | {name: value for name, value in diffusion.items() if name in wanted}


def draws(shape, count, seed=0):
    """x_T and the noise of `count` steps, as the package draws them."""
    torch.manual_seed(seed)
    return torch.randn(shape), torch.stack([torch.randn(shape) for _ in range(count)])


# ------------------------------------------------------------------ files


@PARAMETERS
def test_networks_and_schedules_of_any_configuration(tmp_path, unet, diffusion):
    theirs = make(unet, diffusion)
    online = trainer_file(tmp_path / "model-7.pt", theirs)
    sampler = Sampler.from_pretrained(tmp_path / "model-7.pt", device="cpu", **flags_of(unet, diffusion))
    shape = (2, theirs.channels, *theirs.image_size)
    x, fed_back = torch.randn(shape, generator=torch.Generator().manual_seed(1)).tanh(), torch.rand(shape)
    t = torch.tensor([3, T - 1])
    with torch.no_grad():
        assert relative(sampler.network(x, t), theirs.model(x, t)) <= 1e-5
        if theirs.self_condition:
            assert relative(sampler.network(x, t, x_self_cond=fed_back), theirs.model(x, t, fed_back)) <= 1e-5
            assert relative(sampler.network(x, t), theirs.model(x, t, fed_back)) > 1e-3
        raw = Sampler.from_pretrained(
            tmp_path / "model-7.pt", device="cpu", model="online_model", **flags_of(unet, diffusion)
        )
        assert relative(raw.network(x, t), online.model(x, t)) <= 1e-5
    for name, buffer in theirs.named_buffers():
        if hasattr(type(sampler.schedule), name) or name == "loss_weight":
            torch.testing.assert_close(getattr(sampler.schedule, name), buffer, rtol=1e-7, atol=0.0)
    snr = sampler.schedule.alphas_cumprod_exact / (1 - sampler.schedule.alphas_cumprod_exact)
    float64 = module().sigmoid_beta_schedule if "sigmoid" in diffusion["beta_schedule"] else None
    if float64 is not None:  # to the digits of float64, beyond those of the buffers
        bar = (1 - float64(T, **diffusion.get("schedule_fn_kwargs", {}))).cumprod(0)
        torch.testing.assert_close(snr, bar / (1 - bar), rtol=1e-9, atol=0.0)
    assert sampler.checkpoint.training["steps"] == 700


@PARAMETERS
def test_what_has_to_be_said(tmp_path, unet, diffusion):
    """The image's size; the rest follows from the weights, or is the package's default."""
    theirs = make(unet, diffusion)
    trainer_file(tmp_path / "model-7.pt", theirs)
    full = load_checkpoint(tmp_path / "model-7.pt", **flags_of(unet, diffusion))
    options = asked({**unet, **diffusion}, "ddim_sampling_eta")
    short = load_checkpoint(tmp_path / "model-7.pt", **options)
    assert short.spec == full.spec
    assert short.network.config == full.network.config
    bar = full.schedule.alphas_cumprod_exact
    rounding = 1e-6 if diffusion.get("schedule_fn_kwargs") else 0.0  # then they are put together from float32
    torch.testing.assert_close(short.schedule.alphas_cumprod_exact, bar, rtol=rounding, atol=0.0)
    torch.testing.assert_close(1 - short.schedule.alphas_cumprod_exact, 1 - bar, rtol=rounding, atol=0.0)


@pytest.mark.parametrize("kind", ["diffusion", "U-Net", "average", "no average"])
def test_parts_of_a_file(tmp_path, kind):
    theirs = make(*CONFIGS["v, sigmoid"])
    path, flags = tmp_path / "part.pt", {"image_size": 8}
    if kind == "diffusion":
        torch.save(theirs.state_dict(), path)
    elif kind == "U-Net":
        torch.save(theirs.model.state_dict(), path)
        with pytest.raises(CheckpointError, match="does not say timesteps, beta_schedule, objective"):
            load_checkpoint(path, **flags)
        flags |= {"timesteps": T, "beta_schedule": "sigmoid", "objective": "pred_v"}
    elif kind == "average":
        torch.save({f"ema_model.{name}": value for name, value in theirs.state_dict().items()}, path)
    else:
        torch.save({"step": 1, "model": theirs.state_dict()}, path)
        with pytest.raises(CheckpointError, match=r"network of the file \(online_model\), got 'ema_model'"):
            load_checkpoint(path, model="ema_model", **flags)
    ours = load_checkpoint(path, **flags)
    if kind == "no average":
        assert ours.settings["model"] == ("online_model", "file") and ours.training["model"] == "online_model"
    assert all(torch.equal(value, theirs.model.state_dict()[name]) for name, value in ours.network.state_dict().items())
    torch.testing.assert_close(ours.schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-7, atol=0.0)
    assert ours.spec.prediction == "v"


def test_half_precision_weights_are_widened(tmp_path):
    theirs = make()
    torch.save(
        {n: v.half() if n.startswith("model.") else v for n, v in theirs.state_dict().items()}, tmp_path / "m.pt"
    )
    network = load_checkpoint(tmp_path / "m.pt", image_size=8).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_p2_weights_of_older_versions_do_not_show_the_objective(tmp_path):
    state = make().state_dict()
    state["p2_loss_weight"] = torch.ones_like(state.pop("loss_weight"))
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="does not say objective"):
        load_checkpoint(tmp_path / "m.pt", image_size=8)
    assert load_checkpoint(tmp_path / "m.pt", image_size=8, objective="pred_x0").spec.prediction == "x_start"


@pytest.mark.parametrize("T", [20, 60, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_loss_weights_show_the_objective(schedule, T):
    for objective in ("pred_noise", "pred_x0", "pred_v"):
        for gamma in (None, 0.5, 5):
            if schedule == "linear" and T == 20 and objective == "pred_noise":
                continue  # ᾱ = 0 at the end, where its weight is 0/0
            options = {} if gamma is None else {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
            theirs = make({}, {"timesteps": T, "beta_schedule": schedule, "objective": objective, **options})
            betas = getattr(module(), f"{schedule}_beta_schedule")(T)
            assert find_objective(theirs.loss_weight, (1 - betas).cumprod(0)) == objective


@pytest.mark.parametrize("T", [21, 200, 1000])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [("linear", {}), ("cosine", {}), ("cosine", {"s": 0.02}), ("sigmoid", {}), ("sigmoid", {"start": -2, "tau": 0.5})],
)
def test_schedules_in_float64(schedule, options, T):
    theirs = getattr(module(), f"{schedule}_beta_schedule")(T, **options)
    torch.testing.assert_close(named_schedule(schedule, T, options).betas, theirs, rtol=1e-12, atol=1e-16)


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@PARAMETERS
def test_samples_of_any_configuration(tmp_path, unet, diffusion, solver):
    diffusion = {**diffusion, "timesteps": SHORT, "sampling_timesteps": 17 if solver == "ddim" else SHORT}
    theirs = make(unet, diffusion)
    trainer_file(tmp_path / "model-7.pt", theirs)
    options = asked({**unet, **diffusion}, "ddim_sampling_eta") | {"sampling_timesteps": theirs.sampling_timesteps}
    sampler = Sampler.from_pretrained(tmp_path / "model-7.pt", device="cpu", **options)
    steps = theirs.sampling_timesteps
    x_T, noise = draws((3, theirs.channels, *theirs.image_size), steps)
    torch.manual_seed(0)
    expected = theirs.sample(batch_size=3)
    ours = sampler.sample(3, solver=solver, x_T=x_T, noise=noise, progress=False)
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)
    assert float(expected.std()) > 0.05


def test_sampling_timesteps_are_the_default_of_ddim(tmp_path):
    trainer_file(tmp_path / "m.pt", make())
    sampler = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8, sampling_timesteps=7)
    assert sampler.table().timesteps[:-1].tolist() == [59, 50, 41, 33, 24, 16, 7]
    assert sampler.table(steps=3).S == 3
    assert sampler.table(solver="ddpm").S == T
    whole = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8, sampling_timesteps=T)
    assert whole.table().S == 50


@pytest.mark.parametrize("T", [7, 100, 1000])
def test_ddim_steps_are_the_packages(T):
    from fastddpm.process.timesteps import spaced_timesteps

    for S in sorted({1, 2, 3, 5, 7, T // 4 + 1, T // 2 + 1, T - 1, T}):
        times = list(reversed(torch.linspace(-1, T - 1, steps=S + 1).int().tolist()))
        assert spaced_timesteps(T, S, "linspace_x0").tolist() == times[:-1]
        assert times[-1] == -1


def test_pictures_of_networks_trained_on_the_unit_range(tmp_path):
    trainer_file(tmp_path / "m.pt", make())
    options = {"seed": 1, "steps": 4, "progress": False}
    centred = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8)
    unit = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8, auto_normalize=False)
    raw = centred.sample(2, output="raw", **options)
    assert torch.equal(centred.sample(2, **options), raw / 2 + 0.5)
    assert torch.equal(unit.sample(2, **options), raw)
    assert torch.equal(unit.sample(2, output="uint8", **options), (raw.clamp(0, 1) * 255).round().to(torch.uint8))
    assert centred.sample(2, clip=None, eta=1.0, **options).abs().max() > 0.0


def test_self_conditioning_does_not_depend_on_the_batch_or_on_previews(tmp_path):
    unet, diffusion = CONFIGS["noise, linear, self-conditioned"]
    trainer_file(tmp_path / "m.pt", make(unet, diffusion))
    sampler = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8)
    options = {"solver": "ddpm", "steps": 12, "progress": False, "output": "raw"}
    together = sampler.sample(5, **options)
    torch.testing.assert_close(sampler.sample(5, batch_size=2, **options), together, rtol=0.0, atol=1e-5)
    seen = []
    torch.testing.assert_close(sampler.sample(5, callback=seen.append, **options), together, rtol=0.0, atol=0.0)
    # What the network was fed in the second step is the first step's estimate.
    x_start = sampler.network(seen[0].x, torch.full((5,), seen[1].timestep), x_self_cond=seen[0].x_start)
    row = sampler.table(solver="ddpm", steps=12).row(1)
    expected = (row["a_x"] * seen[0].x + row["a_o"] * x_start).clamp(-1, 1)
    torch.testing.assert_close(seen[1].x_start, expected, rtol=0.0, atol=1e-5)


def test_other_networks_take_no_self_conditioning(tmp_path):
    trainer_file(tmp_path / "m.pt", make())
    sampler = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8)
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="x_self_cond must be None"):
        sampler.network(x, torch.tensor([1]), x_self_cond=x)


def test_learned_variance(tmp_path):
    kind = module("learned_gaussian_diffusion").LearnedGaussianDiffusion
    theirs = make({"learned_variance": True}, {"beta_schedule": "linear"}, kind)
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    sampler = Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8)
    assert (sampler.spec.prediction, sampler.spec.variance) == ("eps", "learned_range")
    x_T, noise = draws((2, 3, 8, 8), T)
    torch.manual_seed(0)
    expected = theirs.sample(batch_size=2)
    ours = sampler.sample(2, solver="ddpm", x_T=x_T, noise=noise, progress=False)
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)


# ------------------------------------------------------------------ classes

CLASSES = "classifier_free_guidance"


def with_classes(**diffusion):
    # This U-Net's linear attention has four heads of 32; only the innermost one is configured.
    return make({"num_classes": 4}, diffusion, source=CLASSES)


def ours_with_classes(tmp_path, theirs, **flags):
    trainer_file(tmp_path / "m.pt", theirs)
    return Sampler.from_pretrained(tmp_path / "m.pt", device="cpu", image_size=8, attn_heads=2, **flags)


def test_class_conditional_network(tmp_path):
    theirs = with_classes()
    sampler = ours_with_classes(tmp_path, theirs)
    assert (sampler.spec.num_classes, sampler.spec.null_class, sampler.spec.ddim_eta) == (4, 4, 1.0)
    assert sum(p.numel() for p in sampler.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 5, 59]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        labelled = theirs.model(x, t, y, cond_drop_prob=0.0)
        dropped = theirs.model(x, t, y, cond_drop_prob=1.0)
    assert relative(sampler.network(x, t, y), labelled) <= 1e-5
    assert relative(sampler.network(x, t, torch.full((3,), 4)), dropped) <= 1e-5
    assert relative(labelled, dropped) > 1e-3
    with pytest.raises(CheckpointError, match=r"does not say attn_heads \(or attn_dim_head\)"):
        load_checkpoint(tmp_path / "m.pt", image_size=8)
    with pytest.raises(CheckpointError, match="attn_heads must be a divisor of 16"):
        load_checkpoint(tmp_path / "m.pt", image_size=8, attn_heads=3)
    same = load_checkpoint(tmp_path / "m.pt", image_size=8, attn_dim_head=8)
    assert same.network.config == sampler.checkpoint.network.config


def test_info_says_which_guidance_is_meant(tmp_path, capsys):
    from fastddpm.cli import app

    ours_with_classes(tmp_path, with_classes())
    flags = ["--flag", "image_size=8", "--flag", "attn_heads=2"]
    app(["convert", str(tmp_path / "m.pt"), str(tmp_path / "own"), *flags], standalone_mode=False)
    capsys.readouterr()
    for path, extra in ((tmp_path / "m.pt", flags), (tmp_path / "own", [])):
        app(["info", str(path), "--json", *extra], standalone_mode=False)
        guidance = json.loads(capsys.readouterr().out)["checkpoint"]["guidance"]
        assert guidance.startswith(
            "possible: label 4 stands for no class; out_u + w (out_c - out_u) alone, without the"
        )
    for flag, what in (("rescaled_phi", "rescaled"), ("remove_parallel_component", "projected")):
        with pytest.raises(CheckpointError, match=rf"{what} guidance \({flag}\) is not supported; leave it out"):
            load_checkpoint(tmp_path / "m.pt", image_size=8, attn_heads=2, **{flag: 0.7})


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("steps", [13, SHORT], ids=["ddim", "ancestral"])
def test_guided_samples(tmp_path, objective, steps):
    more = {"timesteps": SHORT, "sampling_timesteps": steps, "ddim_sampling_eta": 0.4, "beta_schedule": "linear"}
    theirs = with_classes(objective=objective, **more)
    sampler = ours_with_classes(tmp_path, theirs, ddim_sampling_eta=0.4)
    plain = theirs.model.forward_with_cond_scale
    # The package's projection is on by default and no argument of `sample`.
    theirs.model.forward_with_cond_scale = lambda *a, **k: plain(*a, remove_parallel_component=False, **k)
    x_T, noise = draws((2, 3, 8, 8), steps)
    labels = torch.tensor([1, 3])
    torch.manual_seed(0)
    expected = theirs.sample(labels, cond_scale=2.5, rescaled_phi=0.0)
    solver = "ddpm" if steps == SHORT else "ddim"
    ours = sampler.sample(2, solver=solver, steps=steps, x_T=x_T, noise=noise, class_labels=labels,
                          guidance_scale=2.5, progress=False)  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=2e-4)


# ------------------------------------------------------------------ accelerate


@pytest.mark.parametrize("steps", [SHORT, 17], ids=["ancestral", "ddim"])
@PARAMETERS
def test_accelerated_diffusion_draws_the_same(monkeypatch, unet, diffusion, steps):
    if diffusion["objective"] == "pred_x0":
        monkeypatch.setattr(integration, "NOISE_BYTES", 0)
    theirs = make(unet, {**diffusion, "timesteps": SHORT, "sampling_timesteps": steps})
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    fast = accelerate(theirs)
    torch.manual_seed(5)
    expected, after = theirs.sample(3, return_all_timesteps=True), torch.randn(4)
    for all_steps, wanted in ((False, expected[:, -1]), (True, expected)):
        torch.manual_seed(5)
        ours = fast.sample(batch_size=3, return_all_timesteps=all_steps)
        torch.testing.assert_close(ours, wanted, rtol=0.0, atol=1e-4)
        assert torch.equal(torch.randn(4), after)
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


def test_accelerated_diffusion_is_the_diffusion_otherwise():
    theirs = make()
    fast = accelerate(theirs)
    assert accelerate(fast) is fast
    assert (fast.image_size, fast.num_timesteps) == ((8, 8), T)
    assert fast.eval() is fast and fast.to("cpu") is fast
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = theirs(images)
    torch.manual_seed(0)
    assert torch.equal(fast(images), expected)
    fast.is_ddim_sampling, fast.sampling_timesteps = True, 5
    assert theirs.sampling_timesteps == 5

    def both():
        torch.manual_seed(1)
        expected = theirs.sample(2)
        torch.manual_seed(1)
        torch.testing.assert_close(fast.sample(2), expected, rtol=0.0, atol=1e-4)
        return expected

    first = both()
    theirs.train()
    with torch.no_grad():
        theirs.model.final_conv.bias.add_(0.3)  # training goes on
    assert relative(both(), first) > 1e-2
    assert theirs.training and theirs.model.training
    theirs.ddim_sampling_eta = 0.5
    both()


def test_accelerated_diffusion_under_threads(monkeypatch):
    """Calls for pictures of several sizes at once: each result is what the package draws from the same x_T."""
    theirs = make(diffusion={"sampling_timesteps": 3})
    fast = accelerate(theirs, engine="eager")
    shapes = [(2, 3, 8, 8), (2, 3, 4, 6), (1, 3, 12, 4)]
    change = integration.AcceleratedGaussianDiffusion.__setattr__

    def slowly(self, name, value):
        change(self, name, value)
        time.sleep(0.02)  # so that others come in between

    monkeypatch.setattr(integration.AcceleratedGaussianDiffusion, "__setattr__", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(fast.ddim_sample, shape, return_all_timesteps=True) for shape in 4 * shapes]
        results = [call.result() for call in calls]
    for shape, states in zip(4 * shapes, results, strict=True):
        assert states.shape == (shape[0], 4, *shape[1:])
        x_T = 2 * states[:, 0] - 1
        monkeypatch.setattr(torch, "randn", lambda *_, x_T=x_T, **__: x_T)
        torch.testing.assert_close(states[:, -1], theirs.ddim_sample(shape), rtol=0.0, atol=1e-4)
        monkeypatch.undo()


def test_a_copy_of_an_accelerated_diffusion():
    fast = accelerate(make(diffusion={"sampling_timesteps": 3}))
    torch.manual_seed(5)
    expected = fast.sample(1)
    for other in (copy.copy(fast), copy.deepcopy(fast)):
        torch.manual_seed(5)
        assert torch.equal(other.sample(1), expected)
    assert other.model is not fast.model


@PARAMETERS
def test_what_is_accelerated_runs_on_our_network(monkeypatch, unet, diffusion):
    theirs, made = make(unet, {**diffusion, "sampling_timesteps": 3}), []
    monkeypatch.setattr(integration, "Sampler", lambda *a, **k: made.append(Sampler(*a, **k)) or made[-1])
    accelerate(theirs).sample(1)
    [network] = [sampler.model for sampler in made]
    assert isinstance(network, LucidrainsUNet) and network.identity() is not None
    before = theirs.model.final_conv.weight.clone()
    network.final_conv.weight.data.add_(1)
    assert torch.equal(theirs.model.final_conv.weight, before)


def hooked(model):
    model.mid_block2.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return model


def with_another_part(model):
    model.mid_attn.attend = type(model.mid_attn.attend)(scale=3.0)
    return model


def of_a_subclass(model):
    class Unet(type(model)):
        def forward(self, *inputs):
            return -super().forward(*inputs)

    model.__class__ = Unet
    return model


@pytest.mark.parametrize("change", [hooked, with_another_part, of_a_subclass])
def test_networks_that_somebody_has_changed_run_as_they_are(change):
    theirs = make({"self_condition": True}, {"sampling_timesteps": 3})
    torch.manual_seed(2)
    plain = theirs.sample(2)
    theirs.model = change(theirs.model)
    torch.manual_seed(2)
    expected = theirs.sample(2)
    assert (expected - plain).abs().max() > 1e-3
    torch.manual_seed(2)
    torch.testing.assert_close(accelerate(theirs).sample(2), expected, rtol=0.0, atol=1e-4)


def test_accelerated_learned_variance():
    kind = module("learned_gaussian_diffusion").LearnedGaussianDiffusion
    theirs = make({"learned_variance": True}, {"objective": "pred_noise"}, kind)
    torch.manual_seed(2)
    expected = theirs.sample(2)
    torch.manual_seed(2)
    torch.testing.assert_close(accelerate(theirs).sample(2), expected, rtol=0.0, atol=1e-4)
    theirs.is_ddim_sampling, theirs.sampling_timesteps = True, 5
    with pytest.raises(ValueError, match="must be all of LearnedGaussianDiffusion's, got 5"):
        accelerate(theirs).sample(2)


def test_no_host_synchronisation_in_the_loop(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastddpm.engines.runner import StepRunner

    theirs = make(*CONFIGS["noise, linear, self-conditioned"])
    forbidden = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}
    found, inside = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if inside and str(function) in forbidden:
                found.append(str(function))
            return function(*args, **(kwargs or {}))

    run = StepRunner.run

    def watched(self, *arguments):
        inside.append(arguments)
        try:
            return run(self, *arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(StepRunner, "run", watched)
    with Watch():
        accelerate(theirs).sample(2)
        assert found == []
        inside.append("to see that it is seen")
        assert torch.ones(1).item() == 1.0
    assert len(found) == 1


@pytest.mark.parametrize("name", ["model_predictions", "p_sample", "sample"])
def test_diffusions_with_a_loop_of_their_own_are_refused(name):
    kind = type("Mine", (module().GaussianDiffusion,), {name: getattr(module().GaussianDiffusion, name)})
    with pytest.raises(TypeError, match=f"with its own {name}, got Mine"):
        accelerate(make(kind=kind))
    theirs = make()
    setattr(theirs, name, lambda *arguments: None)
    with pytest.raises(TypeError, match=f"with its own {name}, got GaussianDiffusion"):
        accelerate(theirs)


def test_a_diffusion_of_version_1():
    """There the size is one number, and before 1.1 nothing is told of how pictures are normalised."""
    theirs = make(*CONFIGS["v, sigmoid"])
    torch.manual_seed(5)
    expected = theirs.sample(2)
    theirs.image_size = 8
    del theirs.unnormalize
    torch.manual_seed(5)
    torch.testing.assert_close(accelerate(theirs).sample(2), expected, rtol=0.0, atol=1e-4)


def test_a_diffusion_of_before_version_1_is_refused():
    kind = type("GaussianDiffusion", (module().GaussianDiffusion,), {"sample": lambda self, batch_size=16: None})
    with pytest.raises(TypeError, match="denoising-diffusion-pytorch 1.0.2 or later, got an older one"):
        accelerate(make(kind=kind))


def test_other_diffusions_are_refused():
    with pytest.raises(TypeError, match=r"without classes, masks or guidance, got .*sample\(classes, cond_scale"):
        accelerate(with_classes())
    guided = module("guided_diffusion")
    with pytest.raises(TypeError, match=r"got one with classifier guidance \(cond_fn\), which is not supported"):
        accelerate(guided.GaussianDiffusion(guided.Unet(8, dim_mults=(1, 2)), image_size=8))
    with pytest.raises(TypeError, match="accelerate: "):
        accelerate(torch.nn.Linear(1, 1))


# ------------------------------------------------------------------ what cannot be read


def refuse(tmp_path, state, message, **flags):
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "m.pt", **{"image_size": 8, **flags})
    assert "\n" not in str(caught.value)


WRONG_FLAGS = [
    ({"image_size": 7}, "image_size must be divisible by 2"),
    ({"image_size": None}, "does not say image_size"),
    ({"image_size": [8, 8, 8]}, "image_size must be one integer or two"),
    ({"dim": 16}, "dim must be 8, as its weights have it, got 16"),
    ({"dim_mults": [1, 2, 4]}, "dim_mults must be"),
    ({"channels": 1}, "channels must be 3"),
    ({"self_condition": True}, "self_condition must be False"),
    ({"learned_variance": True}, "learned_variance must be False"),
    ({"attn_heads": 4}, r"attn_heads must be \[2, 2\]"),
    ({"full_attn": [True, True]}, "full_attn must be"),
    ({"timesteps": 1000}, "timesteps must be 60"),
    ({"objective": "pred_noise"}, "objective must be 'pred_v'"),
    ({"objective": "eps"}, "objective must be one of pred_noise, pred_x0, pred_v"),
    ({"beta_schedule": "cosine"}, "beta_schedule must give the betas of the file"),
    ({"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"tau": 2}}, "beta_schedule must give the betas"),
    ({"beta_schedule": "sigmoid", "schedule_fn_kwargs": {"tua": 2}}, "schedule_fn_kwargs must be options of"),
    ({"schedule_fn_kwargs": 3}, "schedule_fn_kwargs must be named numbers"),
    ({"beta_schedule": "quad"}, "beta_schedule must be one of linear, cosine, sigmoid"),
    ({"sampling_timesteps": 61}, "sampling_timesteps must be at most 60"),
    ({"ddim_sampling_eta": 2.0}, r"ddim_sampling_eta must be in \[0, 1\]"),
    ({"auto_normalize": 1}, "auto_normalize must be True or False"),
    ({"sinusoidal_pos_emb_theta": 0}, "sinusoidal_pos_emb_theta must be a number above 1"),
    ({"num_classes": 3}, "num_classes must be None"),
    ({"model": "net_model"}, "model must be a network of the file .one without a name., got 'net_model'"),
    ({"objectiv": "pred_v"}, "did you mean objective"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS)
def test_wrong_flags(tmp_path, flags, message):
    refuse(tmp_path, make().state_dict(), message, **flags)


def test_names_and_shapes_that_do_not_fit(tmp_path):
    state = make().state_dict()
    taken_for = "m.pt, taken for lucidrains"
    refuse(tmp_path, {**state, "model.more": torch.zeros(2)}, f"{taken_for}.*more is left over")
    refuse(tmp_path, {**state, "extra": torch.zeros(2)}, f"{taken_for}.*buffers must be those of GaussianDiffusion")
    for name in [name for name in state if name.startswith("model.")][::11]:
        left = {other: tensor for other, tensor in state.items() if other != name}
        refuse(tmp_path, left, f"{taken_for}.* missing|is of no kind|must be that|gives others")
    some = "model.mid_attn.to_qkv.weight"
    refuse(tmp_path, {**state, some: state[some][:, :1]}, "mid_attn.to_qkv.weight must have shape")
    refuse(tmp_path, {**state, some: state[some] * torch.nan}, "NaN or infinity, first mid_attn.to_qkv.weight")
    refuse(tmp_path, {**state, some: state[some].long()}, "mid_attn.to_qkv.weight must hold floats, got torch.int64")
    refuse(tmp_path, {**state, "betas": state["betas"][:10]}, "must hold one float per training step")
    refuse(tmp_path, {**state, "betas": state["betas"] * 0.99}, "must follow from the betas beside it")
    refuse(tmp_path, {**state, "betas": state["betas"] * torch.nan}, "betas must be finite")
    without = {name: value for name, value in state.items() if name != "betas"}
    refuse(tmp_path, without, "betas is missing")


def test_relatives_are_named(tmp_path):
    state = make().state_dict()
    flat = {name: value[..., 0] if value.ndim == 4 else value for name, value in state.items()}
    refuse(tmp_path, flat, "the U-Net must be 2-D, got a 1-D one")
    guided = {name.replace(".2.norm", ".2.fn.norm"): value for name, value in state.items()}
    refuse(tmp_path, guided, r"that of the module guided_diffusion, for classifier guidance \(cond_fn\), which is not")
    oldest = {**state, "model.downs.0.3.weight": torch.zeros(8, 8, 4, 4)}
    refuse(tmp_path, oldest, "of the package's version 0.31 or older, which is not supported")
    karras = {"step": 1, "model": {"model.input_block.weight": torch.zeros(1)}, "ema": {}}
    refuse(tmp_path, karras, "without its 2-D U-Net")
    weighted = {**state, "model.final_conv.weight": torch.zeros(8, 8, 1, 1)}
    refuse(tmp_path, weighted, "a network of WeightedObjectiveGaussianDiffusion, which is not supported")
    conditioned = {**state, "model.init_conv.weight": torch.zeros(8, 4, 7, 7)}
    refuse(tmp_path, conditioned, "takes 4 channels and returns 3: it is conditioned on pictures")
    twice = {**state, "model.init_conv.weight": torch.zeros(8, 6, 7, 7)}
    refuse(tmp_path, twice, "takes 6 channels and returns 3: it is conditioned on pictures", self_condition=False)


CONTINUOUS = {
    "continuous_time_gaussian_diffusion": "ContinuousTimeGaussianDiffusion",
    "v_param_continuous_time_gaussian_diffusion": "VParamContinuousTimeGaussianDiffusion",
    "elucidated_diffusion": "ElucidatedDiffusion",
}


@pytest.mark.parametrize(("source", "name"), CONTINUOUS.items(), ids=CONTINUOUS.values())
@pytest.mark.parametrize("part", ["diffusion", "trainer", "U-Net"])
def test_diffusions_of_continuous_time_are_named(tmp_path, source, name, part):
    """They feed the network the log SNR, so that the steps of any schedule would draw noise from it."""
    unet = module().Unet(**UNET, learned_sinusoidal_cond=True)
    diffusion = getattr(module(source), name)(unet, image_size=8)
    state = unet.state_dict() if part == "U-Net" else diffusion.state_dict()
    values = state if part != "trainer" else {"step": 1, "model": state, "ema": {f"ema_model.{k}": v for k, v in
                                                                                state.items()}}  # fmt: skip
    refuse(tmp_path, values, f"{name}.* is not supported", timesteps=50, beta_schedule="linear", objective="pred_v")


def test_a_learned_schedule_is_named(tmp_path):
    kind = module("continuous_time_gaussian_diffusion").ContinuousTimeGaussianDiffusion
    unet = module().Unet(**UNET, learned_sinusoidal_cond=True)
    refuse(
        tmp_path, kind(unet, image_size=8, noise_schedule="learned").state_dict(), "fed the log SNR by a diffusion of"
    )


def test_simple_diffusion_is_named(tmp_path):
    simple = module("simple_diffusion")
    unet = simple.UViT(8, dim_mults=(1, 2), vit_depth=1, attn_dim_head=8, attn_heads=2)
    for values in (unet.state_dict(), simple.GaussianDiffusion(unet, image_size=8).state_dict()):
        refuse(
            tmp_path, values, r"holds denoising-diffusion-pytorch's UViT \(simple_diffusion\), which is not supported"
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files(tmp_path, share):
    trainer_file(tmp_path / "m.pt", make())
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "m.pt", image_size=8)


STATE = make().state_dict()
SHAPES = st.sampled_from([(), (1,), (0, 3), (8, 8), (4, 2, 1, 1), (2, 2, 8, 4), (3, 8, 1, 1), (60,)])


@given(
    changed=st.dictionaries(st.sampled_from(list(STATE)), SHAPES | st.just("gone"), min_size=1, max_size=4),
    flags=st.dictionaries(
        st.sampled_from(lucidrains.FLAGS),
        st.none() | st.integers(-2, 70) | st.text(max_size=3) | st.booleans() | st.lists(st.integers(0, 3), max_size=3),
        max_size=3,
    ),
)
@settings(max_examples=30)
def test_any_change_is_read_or_refused(tmp_path_factory, changed, flags):
    state = {**STATE, **{name: torch.ones(shape) for name, shape in changed.items() if shape != "gone"}}
    state = {name: value for name, value in state.items() if changed.get(name) != "gone"}
    path = tmp_path_factory.mktemp("any") / "m.pt"
    torch.save(state, path)
    try:
        load_checkpoint(path, **{"image_size": 8, **flags})
    except CheckpointError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------ without the package


def test_the_package_is_not_needed(tmp_path):
    flags, options = {"image_size": 8, "attn_heads": 2}, {"steps": 3, "progress": False}
    asked = {"plain.pt": options, "classes.pt": {**options, "class_labels": [1, 3], "guidance_scale": 2.0}}
    for name, theirs in zip(asked, (make(), with_classes()), strict=True):
        trainer_file(tmp_path / name, theirs)
    code = """
import json, sys
sys.modules["denoising_diffusion_pytorch"] = sys.modules["einops"] = None
import torch
from fastddpm import Sampler
flags, asked = map(json.loads, sys.argv[1:])
for path, options in asked.items():
    torch.save(Sampler.from_pretrained(path, device="cpu", **flags).sample(2, **options), path + ".pictures")
"""
    command = [sys.executable, "-c", code, json.dumps(flags), json.dumps(asked)]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    for name, options in asked.items():
        sampler = Sampler.from_pretrained(tmp_path / name, device="cpu", **flags)
        pictures = torch.load(tmp_path / f"{name}.pictures", weights_only=True)
        torch.testing.assert_close(pictures, sampler.sample(2, **options), rtol=0.0, atol=1e-4)
