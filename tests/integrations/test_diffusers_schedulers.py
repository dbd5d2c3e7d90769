"""The drop-in schedulers against their parents: results, state, fall-back, no waiting for the device."""

import copy
import inspect
import itertools
import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from fastddpm import FastDDIMScheduler, FastDDPMScheduler, FastDPMSolverMultistepScheduler, Method, ModelSpec, Sampler
from fastddpm.checkpoints.diffusers_scheduler import conventions_of
from fastddpm.integrations import diffusers_schedulers, scheduler_tables, scheduler_update
from fastddpm.integrations.scheduler_rows import Rows, position_of
from fastddpm.integrations.scheduler_tables import multistep_tables
from tests.checkpoints.test_dialects import FIXTURES
from tests.helpers import oracle, peers_dir
from tests.syncs import NoSync

PAIRS = {
    "ddpm": (DDPMScheduler, FastDDPMScheduler),
    "ddim": (DDIMScheduler, FastDDIMScheduler),
    "dpm": (DPMSolverMultistepScheduler, FastDPMSolverMultistepScheduler),
}
# Each step rounds about once per operation; x_0 of an ε-network is the state times up to 1/√ᾱ_T = 160.
STEP_RTOL = 1e-5
RUN_RTOL = 2e-5
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.fixture
def table_steps(monkeypatch):
    """How many steps were made with a table, and not by the parent."""
    count = []
    update = diffusers_schedulers.update
    monkeypatch.setattr(diffusers_schedulers, "update", lambda *a: count.append(1) or update(*a))
    return count


def network(x, t, channels=1):
    out = torch.sin(1.3 * x + 0.01 * float(t)) * 0.8
    return out if channels == 1 else torch.cat([out, torch.cos(2 * x)], 1)


def run(scheduler, steps, *, shape=(2, 3, 8, 8), dtype=torch.float32, channels=1, generator=None, **options):
    """All states, all x_0 and the generator's last state."""
    generator = generator or torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    if steps is not None:
        scheduler.set_timesteps(steps)
    states, starts = [], []
    for t in scheduler.timesteps:
        result = scheduler.step(network(x, t, channels), t, x, generator=generator, **options)
        x = result.prev_sample
        states.append(x)
        starts.append(result.get("pred_original_sample"))
    last = None if isinstance(generator, list) else generator.get_state()
    return states, starts, last


def relative(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1))


def check_alike(kind, config, steps, tolerance=RUN_RTOL, **options):
    theirs, ours = (run(cls(**config), steps, **options) for cls in PAIRS[kind])
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a, b) <= tolerance
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            assert relative(a, b) <= 100 * tolerance  # before clipping it is as rough as 1/√ᾱ
    assert ours[2] is None or torch.equal(ours[2], theirs[2])  # as many draws, and the same


# ---------------------------------------------------------------------- the same results as the parent


@pytest.mark.parametrize(("T", "steps"), [(200, 20), (40, None)], ids=["strided", "all"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_steps_as_its_parent(prediction, variance, T, steps, table_steps):
    for spacing, clip in itertools.product(SPACINGS, (True, False)):
        config = {"prediction_type": prediction, "variance_type": variance, "timestep_spacing": spacing}
        config |= {"clip_sample": clip, "num_train_timesteps": T}
        check_alike("ddpm", config, steps, channels=2 if variance == "learned_range" else 1)
    assert len(table_steps) == 6 * (steps or T)


@pytest.mark.parametrize("clipped", [True, False], ids=["clipped_out", "raw_out"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_steps_as_its_parent(prediction, eta, clipped, table_steps):
    for spacing, clip, to_one in itertools.product(SPACINGS, (True, False), (True, False)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing, "clip_sample": clip}
        check_alike("ddim", {**config, "set_alpha_to_one": to_one}, 10, eta=eta, use_clipped_model_output=clipped)
    assert len(table_steps) == 120


ORDERS = pytest.mark.parametrize("order", [2, 3], ids=["second order", "third order"])


@ORDERS
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_steps_as_its_parent(prediction, final, order, table_steps):
    made = 0
    for spacing, lower, euler, steps in itertools.product(SPACINGS, (True, False), (True, False), (1, 2, 8, 20)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing, "final_sigmas_type": final}
        config["solver_order"] = order
        check_alike("dpm", {**config, "lower_order_final": lower, "euler_at_final": euler}, steps)
        made += steps
    assert len(table_steps) == made


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_beta_schedules(schedule, table_steps):
    check_alike("ddpm", {"beta_schedule": schedule}, 30)
    assert len(table_steps) == 30


@pytest.mark.parametrize("kind", PAIRS)
def test_trained_betas_and_zero_terminal_snr(kind):
    betas = np.linspace(1e-4, 0.03, 100)
    check_alike(kind, {"trained_betas": betas, "num_train_timesteps": 100}, 10)
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    check_alike(kind, config, 10)


@pytest.mark.parametrize("limit", [1.0, 2.0])
@pytest.mark.parametrize("kind", PAIRS)
def test_dynamic_thresholding(kind, limit, table_steps):
    for prediction in PREDICTIONS:
        config = {"thresholding": True, "sample_max_value": limit, "prediction_type": prediction}
        check_alike(kind, config, 10)
    assert len(table_steps) == 30


@pytest.mark.parametrize("shape", [(2, 3), (1, 3, 7), (2, 3, 5, 7), (2, 3, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_any_shape(kind, shape, table_steps):
    check_alike(kind, {}, 5, shape=shape)
    assert len(table_steps) == 5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1.5e-1)], ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_half_precision_keeps_its_dtype(kind, dtype, tolerance):
    # The parent rounds after every operation, we once per step: both differ from float32 by as much.
    theirs, ours = (run(cls(), 10, dtype=dtype)[0][-1] for cls in PAIRS[kind])
    exact = run(PAIRS[kind][0](), 10, dtype=dtype)[0][-1].float()
    assert ours.dtype == theirs.dtype == dtype
    assert relative(ours, exact) <= tolerance


def test_generators_one_per_sample_and_the_global_one():
    for kind in ("ddpm", "ddim"):
        options = {"eta": 1.0} if kind == "ddim" else {}
        lists = ([torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2))
        theirs, ours = (
            run(cls(), 10, generator=g, **options)[0][-1] for cls, g in zip(PAIRS[kind], lists, strict=True)
        )
        assert relative(ours, theirs) <= RUN_RTOL
    x = torch.rand(2, 3, 4, 4)
    results = []
    for cls in PAIRS["ddpm"]:
        torch.manual_seed(7)
        results.append(cls().step(0.1 * x, 500, x).prev_sample)
    torch.testing.assert_close(*results, rtol=STEP_RTOL, atol=STEP_RTOL)


def test_variance_noise_is_used_and_not_both():
    x, z = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    results = []
    for cls in PAIRS["ddim"]:
        scheduler = cls()
        scheduler.set_timesteps(10)
        results.append(scheduler.step(0.1 * x, 500, x, eta=0.7, variance_noise=z).prev_sample)
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            scheduler.step(x, 500, x, eta=0.7, variance_noise=z, generator=torch.Generator())
    torch.testing.assert_close(*results, rtol=STEP_RTOL, atol=STEP_RTOL)


def test_fixed_large_log_means_the_large_variance():
    scheduler, large = (FastDDPMScheduler(variance_type=name) for name in ("fixed_large_log", "fixed_large"))
    a, b = run(scheduler, 10)[0][-1], run(large, 10)[0][-1]
    assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("mode", [mode for mode in FIXTURES.get("diffusers_cifar_like", [""])])
def test_the_library_s_own_results(mode):
    """The stored runs of diffusers itself, with the network's outputs by our loader and the noise as it was."""
    folder = peers_dir() / "diffusers_cifar_like"
    data = oracle("diffusers_cifar_like")
    config = json.loads((folder / "schedulers" / mode / "scheduler_config.json").read_text())
    kind = next(ours for theirs, ours in PAIRS.values() if theirs.__name__ == config["_class_name"])
    modes = json.loads((folder / "meta.json").read_text())
    growth, largest = modes["amplification_and_max_abs_final"][mode]
    scheduler = kind.from_pretrained(folder / "schedulers" / mode)
    sampler = Sampler.from_pretrained(folder, device="cpu")
    x = data[f"{mode}/x_T"].float()
    scheduler.set_timesteps(len(data[f"{mode}/t"]))
    assert scheduler.timesteps.tolist() == data[f"{mode}/t"].tolist()
    description = json.dumps(modes["modes"][mode])
    options = {}
    if kind is FastDDIMScheduler:
        options = {"use_clipped_model_output": mode == "ddim_clipped_out", "eta": 0.6 if mode == "ddim_eta" else 0.0}
        assert (f'"eta": {options["eta"]}' in description) or mode != "ddim_eta"
    noise = iter(data.get(f"{mode}/z", torch.zeros(0)))
    z = None
    for t in scheduler.timesteps:
        out = sampler.network(x, t.expand(2))
        if f"{mode}/z" in data:
            z = next(noise).float()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(diffusers_schedulers, "draw", lambda *_, z=z: z)
            x = scheduler.step(out, t, x, **options).prev_sample
    bound = max(1e-4, 5e-6 * growth) * (1.0 if kind is not FastDPMSolverMultistepScheduler else max(1.0, largest))
    assert float((x - data[f"{mode}/final"]).abs().max()) <= bound


# ---------------------------------------------------------------------- timesteps in every form


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    "form",
    [int, np.int64, torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor(t, dtype=torch.int32)],
    ids=["int", "numpy", "0-d", "1-d", "int32"],
)
def test_forms_of_a_timestep(kind, form, table_steps):
    x = torch.rand(2, 3, 4, 4)
    results = []
    for cls in PAIRS[kind]:
        scheduler = cls()
        scheduler.set_timesteps(10)
        t = 500 if cls is PAIRS[kind][0] else form(500)
        results.append(scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    torch.testing.assert_close(*results, rtol=STEP_RTOL, atol=STEP_RTOL)
    assert len(table_steps) == 1


@pytest.mark.parametrize("threshold", [False, True], ids=["clip", "threshold"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_with_a_timestep_per_sample(variance, threshold):
    config = {"variance_type": variance, "thresholding": threshold, "sample_max_value": 2.0}
    ours, theirs = FastDDPMScheduler(**config), DDPMScheduler(**config)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    x = torch.randn(4, 3, 5, 5)
    t = torch.tensor([900, 100, 0, 900])
    out = network(x, 1, 2 if variance == "learned_range" else 1)
    got = ours.step(out, t, x, generator=torch.Generator().manual_seed(3))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for b in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, b=b, **__: z[b : b + 1])
            want = theirs.step(out[b : b + 1], int(t[b]), x[b : b + 1])
        torch.testing.assert_close(got.prev_sample[b : b + 1], want.prev_sample, rtol=STEP_RTOL, atol=STEP_RTOL)
        torch.testing.assert_close(got.pred_original_sample[b : b + 1], want.pred_original_sample, rtol=1e-4, atol=1e-4)


LEARNED = {
    "table": {},
    "two histories": {"solver_order": 3},
    "no table": {"solver_order": 1},
    "thresholds": {"solver_order": 1, "thresholding": True, "sample_max_value": 2.0},
    "DPM-Solver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "DPM-Solver, thresholds": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
}


@pytest.mark.parametrize("config", LEARNED.values(), ids=LEARNED.keys())
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("C", [1, 2, 3, 4, 6])
def test_dpm_leaves_out_a_learned_variance_of_any_number_of_channels(config, prediction, C):
    """The parent, given the first half alone and no learned variance, is the right value."""
    config = {**config, "prediction_type": prediction}
    ours = run(
        FastDPMSolverMultistepScheduler(**config, variance_type="learned_range"), 6, shape=(2, C, 4, 4), channels=2
    )
    theirs = run(DPMSolverMultistepScheduler(**config), 6, shape=(2, C, 4, 4))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.shape == (2, C, 4, 4) and relative(a, b) <= RUN_RTOL


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 2, 6)], ids=str)
def test_ddim_with_a_timestep_per_sample(eta, shape):
    ours, theirs = FastDDIMScheduler(), DDIMScheduler()
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    x, z, t = torch.randn(shape), torch.randn(shape), torch.tensor([900, 300, 0])
    out = network(x, 1)
    got = ours.step(out, t, x, eta, variance_noise=z).prev_sample
    each = [theirs.step(out[b, None], int(t[b]), x[b, None], eta, variance_noise=z[b, None]) for b in range(3)]
    torch.testing.assert_close(got, torch.cat([e.prev_sample for e in each]), rtol=STEP_RTOL, atol=STEP_RTOL)


@ORDERS
def test_dpm_solver_with_a_timestep_per_sample(order):
    """Two samples in one batch, the second a step behind: each goes its own way."""
    x = torch.randn(2, 3, 4, 4)
    alone = []
    for b, steps in enumerate((5, 4)):
        scheduler = DPMSolverMultistepScheduler(solver_order=order)
        scheduler.set_timesteps(6)
        y = x[b, None]
        for t in scheduler.timesteps[:steps]:
            y = scheduler.step(network(y, t), t, y).prev_sample
        alone.append(y)
    ours = FastDPMSolverMultistepScheduler(solver_order=order)
    ours.set_timesteps(6)
    t = ours.timesteps
    first = ours.step(network(x[:1], t[0]), t[0], x[:1]).prev_sample
    state = torch.cat([first, x[1:]])
    # The new sample has no past, and its first row reads none.
    ours.model_outputs[-1] = torch.cat([ours.model_outputs[-1], torch.full((1, 3, 4, 4), torch.nan)])
    for i in (1, 2, 3, 4):
        out = torch.cat([network(state[:1], t[i]), network(state[1:], t[i - 1])])
        state = ours.step(out, torch.stack([t[i], t[i - 1]]), state).prev_sample
    torch.testing.assert_close(state, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_of_several_timesteps_one_is_unknown():
    scheduler = FastDDPMScheduler()
    scheduler.set_timesteps(10)
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(IndexError, match="timestep must be in the run's timesteps, got 901; see set_timesteps"):
        scheduler.step(x, torch.tensor([900, 901]), x)
    with pytest.raises(ValueError, match="timestep must be one, or one for each of 2 samples, got 3"):
        scheduler.step(x, torch.tensor([900, 800, 700]), x)


@pytest.mark.parametrize("kind", PAIRS)
def test_timesteps_out_of_order_and_unknown_ones(kind):
    """Whatever the parent does with them: other rows, the rows between, or an error."""
    x = torch.rand(2, 3, 4, 4)
    for t in (900, 0, 450, 333, 999, 1001):
        results = []
        for cls in PAIRS[kind]:
            scheduler = cls()
            scheduler.set_timesteps(20)
            try:
                results.append(scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
            except Exception as error:
                results.append(type(error))
        if isinstance(results[0], type):
            assert results[0] is results[1]
        else:
            torch.testing.assert_close(*results, rtol=STEP_RTOL, atol=STEP_RTOL)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_a_step_before_set_timesteps(kind):
    x = torch.rand(1, 3, 4, 4)
    for cls in PAIRS[kind]:
        with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
            cls().step(x, 10, x)


def test_ddpm_without_set_timesteps_goes_to_t_minus_one(table_steps):
    x = torch.rand(1, 3, 4, 4)
    for timesteps in (None, torch.tensor([700, 400, 100])):
        results = []
        for cls in PAIRS["ddpm"]:
            scheduler = cls()
            if timesteps is not None:
                scheduler.timesteps = timesteps
            g = torch.Generator().manual_seed(0)
            results.append([scheduler.step(0.1 * x, t, x, g).prev_sample for t in (700, 400, 100)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=STEP_RTOL, atol=STEP_RTOL)
    assert len(table_steps) == 6


def test_custom_timesteps():
    # Not 500 and 499 in a row: DPM-Solver divides by that step, which float32 hardly knows, in the parent's step.
    for kind, timesteps in itertools.product(("ddpm", "dpm"), ([900, 500, 450, 20, 3], [0], [999, 0])):
        results = []
        for cls in PAIRS[kind]:
            scheduler = cls(prediction_type="v_prediction")
            scheduler.set_timesteps(timesteps=timesteps)
            results.append(run(scheduler, None)[0][-1])
        assert relative(*results) <= RUN_RTOL


def test_position_is_told_by_address_alone():
    timesteps = torch.arange(10, 0, -1)
    views = list(timesteps)
    assert [position_of(view, timesteps) for view in views] == list(range(10))
    assert position_of(timesteps[3:][2:3], timesteps) == 5
    assert position_of(timesteps[4].clone(), timesteps) is None
    assert position_of(timesteps.int()[4], timesteps) is None
    assert position_of(timesteps[2:4], timesteps) is None
    assert position_of(torch.arange(100, 0, -1)[50], timesteps) is None


def test_a_device_that_cannot_be_read_gets_rows_by_lookup():
    """As on an accelerator: a timestep is looked up there, and one that is not in the run shows as NaN."""
    scheduler = FastDDPMScheduler()
    scheduler.set_timesteps(10)
    (rows,) = scheduler.tables()
    table, times, row_of = rows.on(torch.device("cpu"))
    assert isinstance(rows, Rows) and rows.on(torch.device("cpu"))[0] is table
    assert row_of[torch.tensor([900, 800, 0])].tolist() == [0, 1, 9]
    assert row_of[torch.tensor([899, 1])].tolist() == [10, 10]
    assert table[10].isnan().all() and len(table) == len(times) == 12
    x = torch.rand(2, 3, 4, 4)
    place = rows, torch.tensor([0, 10])
    new, _ = scheduler_update.update_each(place, x, x, torch.zeros_like(x), (None, None), False)
    assert new[0].isfinite().all() and new[1].isnan().all()


# ---------------------------------------------------------------------- state, configurations, fall-back


@ORDERS
def test_multistep_state_is_the_parent_s(order):
    """A run may change hands at every step."""
    theirs, ours = (cls(solver_order=order) for cls in PAIRS["dpm"])
    mixed = [cls(solver_order=order) for cls in PAIRS["dpm"]]
    for scheduler in (theirs, ours, *mixed):
        scheduler.set_timesteps(8)
    x = y = torch.randn(2, 3, 4, 4)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(network(x, t), t, x).prev_sample
        this, other = mixed[i % 2], mixed[1 - i % 2]
        y = this.step(network(y, t), t, y).prev_sample
        for name in ("model_outputs", "lower_order_nums", "_step_index"):
            setattr(other, name, copy.copy(getattr(this, name)))
        assert this.step_index == theirs.step_index and this.lower_order_nums == theirs.lower_order_nums
        assert relative(this.model_outputs[-1], theirs.model_outputs[-1]) <= 1e-3
    assert relative(y, x) <= RUN_RTOL


@ORDERS
@pytest.mark.parametrize("begin", [None, 3])
def test_a_multistep_run_that_starts_in_the_middle(begin, order):
    results = []
    for cls in PAIRS["dpm"]:
        scheduler = cls(solver_order=order)
        scheduler.set_timesteps(10)
        if begin is not None:
            scheduler.set_begin_index(begin)
        x = torch.full((1, 3, 4, 4), 0.3)
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(network(x, t), t, x).prev_sample
        results.append(x)
    assert relative(*results) <= RUN_RTOL


@ORDERS
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("lower", "euler"), [(False, False), (True, False), (True, True)], ids=str)
def test_a_method_s_rows_are_the_scheduler_s(order, final, lower, euler):
    """What a checkpoint's folder says of its scheduler leads to the table that the scheduler in memory has."""
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 3, 14, 15)):
        config = {"timestep_spacing": spacing, "final_sigmas_type": final, "solver_order": order}
        config |= {"lower_order_final": lower, "euler_at_final": euler}
        scheduler = DPMSolverMultistepScheduler(**config)
        scheduler.set_timesteps(steps)
        theirs = multistep_tables(scheduler, scheduler.timesteps)[-1]
        spec = ModelSpec(shape=(1, 8, 8), **conventions_of("DPMSolverMultistepScheduler", config))
        ours = Method(f"dpmpp_{order}m", steps).table(scheduler_tables.schedule_of(scheduler), spec)
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.rows, theirs.rows)


FALLBACKS = [
    ("ddpm", {"variance_type": "learned"}), ("ddpm", {"variance_type": "other"}), ("ddpm", {"beta_end": 2.0}),
    ("ddpm", {"thresholding": True, "sample_max_value": 0.5}),
    *(("dpm", {"prediction_type": "sample", **config}) for config in (
        {"solver_order": 1}, {"solver_type": "heun"}, {"algorithm_type": "sde-dpmsolver++"},
        {"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    )),
    ("dpm", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]  # fmt: skip


@pytest.mark.parametrize("kind, config", FALLBACKS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_what_no_table_holds_is_the_parent_s(kind, config, table_steps):
    channels = 2 if config.get("variance_type") == "learned" else 1
    results = []
    for cls in PAIRS[kind]:
        states = run(cls(**config), 10, channels=channels)[0]
        results.append(states[-1])
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num()) and not table_steps


def test_repeated_timesteps_and_double_precision_are_the_parent_s(table_steps):
    for kind, options, steps in (("dpm", {}, 1000), ("ddpm", {"dtype": torch.float64}, 5)):
        theirs, ours = (run(cls(), steps, **options)[0][-1] for cls in PAIRS[kind])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert not table_steps


def test_tables_follow_what_is_replaced():
    x = torch.rand(1, 3, 4, 4)

    def both(change):
        results = []
        for cls in PAIRS["ddpm"]:
            scheduler = cls()
            scheduler.set_timesteps(10)
            scheduler.step(x, 500, x)
            change(scheduler)
            t = scheduler.timesteps[2]
            results.append(scheduler.step(0.1 * x, t, x, torch.Generator().manual_seed(0)).prev_sample)
        torch.testing.assert_close(*results, rtol=STEP_RTOL, atol=STEP_RTOL)
        return results[1]

    def lower_in_place(scheduler):
        scheduler.timesteps[2:] -= 50

    def other_alphas(scheduler):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2

    plain = both(lambda s: None)
    changes = [
        lower_in_place,
        other_alphas,
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: setattr(s, "timesteps", torch.tensor([900, 300, 20])),
        lambda s: s.set_timesteps(7),
    ]
    for change in changes:
        assert not torch.equal(both(change), plain)


def test_sigmas_that_were_replaced_are_the_parent_s(table_steps):
    results = []
    for cls in PAIRS["dpm"]:
        scheduler = cls()
        scheduler.set_timesteps(6)
        scheduler.sigmas = scheduler.sigmas * 1.5
        results.append(run(scheduler, None)[0][-1])
    assert torch.equal(*results) and not table_steps


@pytest.mark.parametrize("kind", PAIRS)
def test_configurations_go_round(kind, tmp_path):
    theirs, ours = PAIRS[kind]
    original = theirs(num_train_timesteps=500, beta_schedule="scaled_linear", prediction_type="v_prediction")
    fast = ours.from_config(original.config)
    same = {k: v for k, v in original.config.items() if not k.startswith("_")}
    assert {k: v for k, v in fast.config.items() if not k.startswith("_")} == same
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == ours.__name__
    assert type(ours.from_pretrained(tmp_path)) is ours
    back = theirs.from_config(ours.from_pretrained(tmp_path).config)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == same
    assert theirs in fast.compatibles and set(diffusers_schedulers.OURS) <= set(fast.compatibles)
    for other in diffusers_schedulers.OURS:
        assert other.from_config(PNDMScheduler(beta_end=0.01).config).config.beta_end == 0.01


@pytest.mark.parametrize("kind", PAIRS)
def test_signatures_are_the_parent_s(kind):
    theirs, ours = PAIRS[kind]
    for name in ("__init__", "step", "set_timesteps", "add_noise", "scale_model_input"):
        a, b = (inspect.signature(getattr(cls, name)).parameters for cls in (theirs, ours))
        assert [(p.name, p.default, p.kind) for p in a.values()] == [(p.name, p.default, p.kind) for p in b.values()]
    assert hasattr(theirs, "get_velocity") == hasattr(ours, "get_velocity")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("kind", PAIRS)
def test_copies_step_alike(kind, copied):
    scheduler = PAIRS[kind][1]()
    scheduler.set_timesteps(10)
    twin = copied(scheduler)
    assert torch.equal(run(twin, None)[0][-1], run(scheduler, None)[0][-1])


def test_a_step_can_be_differentiated():
    gradients = []
    for cls in PAIRS["ddim"]:
        scheduler = cls(clip_sample=False)
        scheduler.set_timesteps(10)
        x, out = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
        scheduler.step(out, 500, x).prev_sample.square().sum().backward()
        gradients.append((x.grad, out.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inference_mode_and_out_of_it():
    scheduler = FastDDPMScheduler()
    x = torch.rand(1, 3, 4, 4)
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        inside = scheduler.step(x, 500, x, torch.Generator().manual_seed(0)).prev_sample
    y = x.clone().requires_grad_()
    outside = scheduler.step(y, 500, y, torch.Generator().manual_seed(0)).prev_sample
    outside.sum().backward()
    assert torch.equal(inside, outside.detach()) and y.grad is not None


def test_inputs_are_left_alone():
    for kind in PAIRS:
        for prediction in PREDICTIONS:
            scheduler = PAIRS[kind][1](prediction_type=prediction)
            scheduler.set_timesteps(5)
            x, out = torch.randn(1, 3, 4, 4), 3 * torch.randn(1, 3, 4, 4)
            kept = x.clone(), out.clone()
            scheduler.step(out, scheduler.timesteps[0], x)
            assert torch.equal(x, kept[0]) and torch.equal(out, kept[1])


@pytest.mark.parametrize("kind", PAIRS)
def test_tensors_that_do_not_fit_fail_as_in_the_parent(kind):
    for out_shape in ((2, 6, 4, 4), (2, 3, 5, 5)):
        errors = []
        for cls in PAIRS[kind]:
            scheduler = cls()
            scheduler.set_timesteps(5)
            with pytest.raises(RuntimeError) as caught:
                scheduler.step(torch.rand(out_shape), scheduler.timesteps[0], torch.rand(2, 3, 4, 4))
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


# ---------------------------------------------------------------------- the forward process


@pytest.mark.parametrize("n", [1, 3], ids=["one_t", "t_each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 4, 9)], ids=str)
def test_add_noise_and_velocity(shape, dtype, n):
    x, z = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (2e-3, 2e-3)
    for kind, name in itertools.product(PAIRS, ("add_noise", "get_velocity")):
        if name == "get_velocity" and kind == "dpm":
            continue
        results = []
        for cls in PAIRS[kind]:
            scheduler = cls()
            scheduler.set_timesteps(20)
            t = scheduler.timesteps[torch.tensor([4, 0, 19])[:n]]
            results.append(getattr(scheduler, name)(x, z, t))
            assert results[-1].dtype == dtype
        torch.testing.assert_close(*results, rtol=rtol, atol=atol)


def test_dpm_solver_adds_noise_of_the_last_level_to_unknown_timesteps():
    x, z = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    results = []
    for cls in PAIRS["dpm"]:
        scheduler = cls()
        scheduler.set_timesteps(5)
        results.append(scheduler.add_noise(x, z, torch.tensor([int(scheduler.timesteps[1]), 3])))
        scheduler.set_begin_index(2)
        results.append(scheduler.add_noise(x, z, scheduler.timesteps[2:3].repeat(2)))
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1], results[3], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- no waiting


@pytest.mark.parametrize("kind", PAIRS)
def test_a_loop_never_waits(kind, calls=9):
    scheduler = PAIRS[kind][1]()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    with NoSync() as watch:
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, generator=generator).prev_sample
    assert len(watch.calls) <= 10 * calls


def test_a_timestep_per_sample_never_waits():
    scheduler = FastDDPMScheduler(variance_type="fixed_large")
    scheduler.set_timesteps(10)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([900, 300])
    scheduler.step(x, t, x)
    with NoSync():
        scheduler.step(0.1 * x, t, x)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_kernel_s_path(kind, monkeypatch):
    """What a GPU runs, with the kernel's plain form in the kernel's place: the same results, and no waiting."""
    monkeypatch.setattr(scheduler_update, "runs_triton", lambda device_type: True)
    for prediction in PREDICTIONS:
        check_alike(kind, {"prediction_type": prediction}, 10)
    check_alike(kind, {"thresholding": True, "sample_max_value": 2.0}, 10)
    check_alike(kind, {}, 5, shape=(2, 3, 7))
    if kind == "ddpm":
        check_alike(kind, {"variance_type": "learned_range"}, 10, channels=2)
    test_a_loop_never_waits(kind, 50)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PAIRS)
def test_on_a_gpu(kind):
    """The kernel itself, with CUDA's own check for waiting."""
    theirs, ours = (cls(prediction_type="v_prediction") for cls in PAIRS[kind])
    theirs.set_timesteps(10)
    ours.set_timesteps(10, device="cuda")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, generators = x.cuda(), [torch.Generator().manual_seed(1) for _ in range(2)]
    for t in theirs.timesteps:
        x = theirs.step(torch.sin(1.3 * x), t, x, generator=generators[0]).prev_sample
    for t in ours.timesteps[:2]:
        ours.step(y, t, y)  # the first use compiles the kernel
    ours.set_timesteps(10, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in ours.timesteps:
            y = ours.step(torch.sin(1.3 * y), t, y, generator=generators[1]).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(y.cpu(), x) <= 1e-4


def test_the_watch_sees_the_parent_wait():
    """Or it would prove nothing."""
    for kind in PAIRS:
        scheduler = PAIRS[kind][0]()
        scheduler.set_timesteps(10)
        x, t = torch.randn(2, 3, 8, 8), scheduler.timesteps[3]
        with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
            scheduler.step(x, t, x)


def test_a_step_takes_less_than_its_parent():
    """Least of many, for the machine may be busy: measured, the ratio is 3 to 9."""
    x = torch.randn(1, 3, 32, 32)
    for kind in PAIRS:
        least = []
        for cls in PAIRS[kind]:
            scheduler = cls()
            scheduler.set_timesteps(50)
            times = []
            for _ in range(300):
                scheduler._step_index = 3
                start = time.perf_counter()
                scheduler.step(x, scheduler.timesteps[3], x)
                times.append(time.perf_counter() - start)
            least.append(min(times))
        assert least[0] > 1.5 * least[1]


# ---------------------------------------------------------------------- without diffusers


def test_without_diffusers_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import fastddpm\n"
        "try:\n    fastddpm.FastDDPMScheduler\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "diffusers must be installed" in done.stdout and "install fastddpm[diffusers]" in done.stdout
