"""The peers' own checkpoints and results: networks, schedules and samples through the public API."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from fastddpm import Sampler
from tests.helpers import oracle, peers_dir, relative

SCHEDULE_NAMES = {
    "sqrt_alphas_bar": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_bar": "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_bar": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_bar": "sqrt_recipm1_alphas_cumprod",
    "posterior_var": "posterior_variance",
    "posterior_log_var_clipped": "posterior_log_variance_clipped",
}
SOLVERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m"}


def fixtures():
    """The folders' names and, for each, its modes; ("", "") where there is no such folder, so that the test skips."""
    peers = Path(os.environ.get("FASTDDPM_PEERS") or Path(__file__).resolve().parents[3] / "shared" / "peers")
    if not peers.is_dir():
        return {"": [""]}
    metas = {meta.parent.name: json.loads(meta.read_text()) for meta in sorted(peers.glob("*/meta.json"))}
    return {name: list(meta["modes"]) for name, meta in metas.items()}


FIXTURES = fixtures()
MODES = [(name, mode) for name, modes in FIXTURES.items() for mode in modes]


@functools.cache
def meta(name):
    return json.loads((peers_dir() / name / "meta.json").read_text())


@functools.cache
def sampler(name, mode=None):
    folder = peers_dir() / name
    flags = json.loads((folder / "flags.json").read_text())
    if (folder / "model_index.json").is_file():
        path = folder
        flags |= {} if mode is None else {"scheduler": f"schedulers/{mode}"}
    else:
        path = folder / meta(name)["checkpoint"]
    return Sampler.from_pretrained(path, device="cpu", **flags)


@pytest.mark.parametrize("name", FIXTURES)
def test_networks_say_the_same(name):
    peers_dir()
    data, ours = oracle(name), sampler(name)
    y = data.get("y")
    assert relative(ours.network(data["x"], data["t"], y), data["out"]) <= 1e-5
    if "out_with_self_cond" in data:
        fed_back = ours.network(data["x"], data["t"], y, data["x_self_cond"])
        assert relative(fed_back, data["out_with_self_cond"]) <= 1e-5
    if "out_as_sampled" in data:
        fed = data["t"].float() * ours.spec.time_scale
        assert torch.equal(fed, data["t_as_fed"].float())
        assert relative(ours.network(data["x"], data["t_as_fed"], y), data["out_as_sampled"]) <= 1e-5


@pytest.mark.parametrize("name", FIXTURES)
def test_schedules_are_the_same(name):
    peers_dir()
    schedule, compared = sampler(name).schedule, 0
    for key, theirs in oracle(name).items():
        part, _, array = key.partition("/")
        if part != "sched_full" or array in ("timestep_map", "logvar"):
            continue
        ours = getattr(schedule, SCHEDULE_NAMES.get(array, array))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0.0, msg=lambda text, array=array: f"{array}: {text}")
        compared += 1
    assert compared >= 2


def options(name, mode):
    """The arguments of `sample` that a mode stands for."""
    how = meta(name)["modes"][mode]
    chosen = {"solver": SOLVERS[how["scheduler"]] if "scheduler" in how else ("ddim" if "ddim" in mode else "ddpm")}
    extra = how.get("step_kwargs", how)
    if chosen["solver"] == "ddim":
        chosen["eta"] = extra.get("eta", extra.get("ddim_sampling_eta", 0.0))
    if extra.get("use_clipped_model_output"):
        chosen["clipped_eps"] = "rederive"
    if "clip_denoised" in how:
        chosen["clip"] = 1.0 if how["clip_denoised"] else None
    return chosen


def draw(name, mode, output, **other):
    data, ours = oracle(name), sampler(name, mode)
    z, y = data.get(f"{mode}/z"), data.get(f"{mode}/y", data.get("y"))
    steps = {"timesteps": data[f"{mode}/t"], **options(name, mode), **other}
    return ours.sample(
        2,
        x_T=data[f"{mode}/x_T"].float(),
        noise=None if z is None else z.float(),
        class_labels=y if ours.spec.num_classes else None,
        output=output,
        progress=False,
        **steps,
    )


@pytest.mark.parametrize(("name", "mode"), MODES, ids=["-".join(pair) for pair in MODES])
def test_samples_are_the_same(name, mode):
    peers_dir()
    theirs = oracle(name)[f"{mode}/final"]
    amplification, largest = meta(name)["amplification_and_max_abs_final"][mode]
    error = float((draw(name, mode, "raw") - theirs).abs().max()) / max(1.0, largest)
    assert error <= max(1e-4, 5e-6 * amplification)
    if name.startswith("lucidrains"):
        torch.testing.assert_close(
            draw(name, mode, "unit"), oracle(name)[f"{mode}/mapped"], rtol=0.0, atol=error + 1e-6
        )
    if f"{mode}/uint8" in oracle(name):
        differ = draw(name, mode, "uint8").permute(0, 2, 3, 1).int() - oracle(name)[f"{mode}/uint8"].int()
        # A level turns where the state is on its edge: never by more than one, and rarely.
        assert differ.abs().max() <= 1
        assert (differ != 0).float().mean() <= 0.02


def lucidrains_ddim():
    return [pair for pair in MODES if pair[0].startswith("lucidrains") and pair[1].startswith("ddim")] or [("", "")]


@pytest.mark.parametrize(("name", "mode"), lucidrains_ddim())
def test_the_number_of_steps_gives_the_timesteps_of_lucidrains(name, mode):
    peers_dir()
    steps = meta(name)["modes"][mode]["sampling_timesteps"]
    table = sampler(name, mode).table(steps=steps, **options(name, mode))
    assert torch.equal(table.timesteps[:-1], oracle(name)[f"{mode}/t"])
    assert oracle(name)[f"{mode}/t_next"].tolist() == [*table.timesteps[1:-1].tolist(), -1]


@pytest.mark.parametrize(("name", "mode"), [pair for pair in MODES if pair[0].startswith("diffusers")] or [("", "")])
def test_the_number_of_steps_gives_the_timesteps_of_diffusers(name, mode):
    peers_dir()
    steps = meta(name)["modes"][mode]["num_inference_steps"]
    table = sampler(name, mode).table(steps=steps, **options(name, mode))
    assert torch.equal(table.timesteps[:-1], oracle(name)[f"{mode}/t"])


def test_respacing_of_the_flags_is_the_default():
    folder = peers_dir() / "openai_guided"
    assert torch.equal(sampler(folder.name).table(solver="ddpm").timesteps[:-1], oracle(folder.name)["ancestral/t"])


def test_a_pesser_run_that_ends_early_goes_on_to_the_next_timestep():
    peers_dir()
    name, mode = "pesser_ho", "ancestral_first12"
    last = oracle(name)[f"{mode}/t"] - 1
    assert torch.equal(draw(name, mode, "raw"), draw(name, mode, "raw", prev_timesteps=last))
    last[-1] = -1
    assert not torch.equal(draw(name, mode, "raw"), draw(name, mode, "raw", prev_timesteps=last))


@pytest.mark.parametrize(
    ("name", "model", "training"),
    [
        ("w86763777_ddpm", "net_model", {"steps": 5000}),
        ("lucidrains_pred_v", "online_model", {"steps": 4000, "package": "denoising-diffusion-pytorch 2.3.1"}),
    ],
)
def test_raw_weights_beside_the_averaged_ones(name, model, training):
    folder = peers_dir() / name
    flags = json.loads((folder / "flags.json").read_text())
    raw = Sampler.from_pretrained(folder / meta(name)["checkpoint"], device="cpu", model=model, **flags)
    data = oracle(folder.name)
    assert relative(raw.network(data["x"], data["t"]), data[f"out_{model}"]) <= 1e-5
    assert raw.checkpoint.training == {"model": model, **training}
