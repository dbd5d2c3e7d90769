import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.kernels.operands import COLUMNS, Operands
from fastddpm.kernels.p_sample import p_sample_reference
from fastddpm.process import reference
from fastddpm.process.ddim import ddim_table
from fastddpm.process.ddpm import ddpm_table
from fastddpm.process.dpmpp import dpmpp_2m_table, dpmpp_3m_table, third_exponential
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.solvers import make_table
from fastddpm.process.table import DynamicThreshold, StepTable, dynamic_bound
from fastddpm.process.timesteps import respace, spaced_timesteps
from tests.helpers import oracle, run_table

F32, F64 = torch.float32, torch.float64
SHAPE = (3, 2, 5, 7)


def columns(table, name):
    return table.rows[: table.S, COLUMNS.index(name)].double()


def close(ours, theirs, rtol=1e-6, atol=1e-7):
    torch.testing.assert_close(ours, theirs.double(), rtol=rtol, atol=atol)


# ------------------------------------------------------------------ the peers' tables

DIFFUSERS = {
    "diffusers_cifar_like": NoiseSchedule.linear(1000, dtype=F32),
    "diffusers_trained_default": NoiseSchedule.cosine(1000, dtype=F32),
}
DIFFUSERS_ANCESTRAL = [
    ("diffusers_cifar_like", "ancestral"),
    ("diffusers_cifar_like", "ancestral_small_trailing"),
    ("diffusers_trained_default", "ancestral"),
    ("diffusers_trained_default", "ancestral_linspace"),
]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("peer", "mode"), DIFFUSERS_ANCESTRAL, ids=["-".join(key) for key in DIFFUSERS_ANCESTRAL])
def test_ancestral_variances_equal_diffusers(peer, mode, variance):
    data = oracle(peer)
    table = ddpm_table(
        DIFFUSERS[peer],
        data[f"{mode}/t"],
        prev_timesteps=data[f"{mode}/prev_t"],
        variance=variance,
        noise_gate="t0",
        prediction="v",
    )
    noisy = data[f"{mode}/t"] > 0
    theirs = torch.where(noisy, data[f"{mode}/sched/variance_{variance}"], 0.0)
    close(columns(table, "sigma") ** 2, theirs, rtol=2e-5)
    assert torch.equal(columns(table, "sigma") > 0, noisy & (theirs > 1e-19))


DIFFUSERS_DDIM = [
    ("diffusers_cifar_like", "ddim_eta"),
    ("diffusers_trained_default", "ddim"),
    ("diffusers_trained_default", "ddim_noclip_trailing"),
]


@pytest.mark.parametrize(("peer", "mode"), DIFFUSERS_DDIM, ids=["-".join(key) for key in DIFFUSERS_DDIM])
def test_ddim_variances_equal_diffusers(peer, mode):
    data = oracle(peer)
    t = data[f"{mode}/t"]
    prev = (t - 1000 // len(t)).clamp(min=-1)
    for eta in (0.3, 1.0):
        table = ddim_table(DIFFUSERS[peer], t, eta=eta, prev_timesteps=prev, prediction="v")
        close((columns(table, "sigma") / eta) ** 2, data[f"{mode}/sched/variance"], rtol=2e-5)


@pytest.mark.parametrize("peer", DIFFUSERS)
def test_dpmpp_rows_follow_from_the_sigmas_of_diffusers(peer):
    # Their update, in terms of their sigmas: σ_VE = √(1−ᾱ)/√ᾱ, the last one 0.
    data = oracle(peer)
    table = dpmpp_2m_table(DIFFUSERS[peer], data["dpmpp_2m/t"], prediction="v", clip=None)
    sigma_ve = data["dpmpp_2m/sched/sigmas"].double()
    alpha = 1.0 / (1.0 + sigma_ve**2).sqrt()
    sigma, lam = alpha * sigma_ve, -sigma_ve.log()
    for i in range(table.S):
        row, x, now, before = table.row(i), 0.3, -0.8, 0.5
        d0, d1 = now, 0.0
        h = lam[i + 1] - lam[i]
        if 0 < i < table.S - 1:
            d1 = (now - before) / ((lam[i] - lam[i - 1]) / h)
        gain = alpha[i + 1] * (1.0 - torch.exp(-h))
        expected = sigma[i + 1] / sigma[i] * x + gain * d0 + 0.5 * gain * d1
        got = row["c_x"] * x + row["c_0"] * now + row["c_h"] * before
        assert got == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
        assert (row["c_h"] != 0) == (0 < i < table.S - 1)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("euler", [False, True], ids=["", "euler_at_final"])
@pytest.mark.parametrize("lower", [False, True], ids=["", "lower_order_final"])
@pytest.mark.parametrize("S", [1, 2, 3, 4, 14, 15, 40])
@pytest.mark.parametrize("peer", DIFFUSERS)
def test_dpmpp_3m_rows_equal_diffusers(peer, S, lower, euler, final):
    """Each step of its scheduler, on random states and estimates; only the term in x is in float32 there."""
    schedule, short = DIFFUSERS[peer], lower and S < 15
    theirs = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.numpy(), solver_order=3, prediction_type="sample", final_sigmas_type=final,
        lower_order_final=lower, euler_at_final=euler,
    )  # fmt: skip
    theirs.set_timesteps(S)
    table = dpmpp_3m_table(
        schedule, theirs.timesteps, prediction="x_start", clip=None, final_alpha_to_one=final == "zero",
        lower_order_final=euler or short, lower_order_second=short, second_difference="half",
    )  # fmt: skip
    a = schedule.alphas_cumprod_exact[torch.cat([theirs.timesteps, torch.zeros(1, dtype=torch.int64)])]
    theirs.sigmas = ((1 - a) / a).sqrt()
    theirs.sigmas[-1] *= final != "zero"
    x, x_start = torch.randn(2, S, 64, generator=torch.Generator().manual_seed(0)).double()
    reads = []
    for i, t in enumerate(theirs.timesteps):
        row = table.row(i)
        names = ("c_0", "c_h", "c_h2")[: i + 1]
        terms = [row["c_x"] * x[i], *(row[name] * x_start[i - back] for back, name in enumerate(names))]
        size = sum(term.abs().max().item() for term in terms)
        close(sum(terms), theirs.step(x_start[i], t, x[i]).prev_sample, atol=3e-7 * size)
        reads.append((row["c_h"] != 0) + (row["c_h2"] != 0))
    wanted = [min(i, 2) for i in range(S)]
    if short and S > 1:
        wanted[-2] = min(wanted[-2], 1)
    if short or euler or final == "zero":
        wanted[-1] = 0
    assert reads == wanted and table.history == max(wanted)


def test_dpmpp_3m_begins_as_2m_and_short_runs_are_2m():
    steps, options = [90, 70, 50, 30, 5], {"final_alpha_to_one": False, "prediction": "v"}
    second = dpmpp_2m_table(NoiseSchedule.linear(100), steps, **options)
    third = dpmpp_3m_table(NoiseSchedule.linear(100), steps, **options)
    assert torch.equal(third.rows[:2], second.rows[:2]) and (third.rows[2:5] != second.rows[2:5]).any(1).all()
    lowered = dpmpp_3m_table(NoiseSchedule.linear(100), steps, lower_order_second=True, **options)
    assert torch.equal(lowered.rows[3], second.rows[3]) and torch.equal(lowered.rows[4], third.rows[4])
    pair = [make_table(NoiseSchedule.linear(100), steps[:2], solver=s, **options) for s in ("dpmpp_2m", "dpmpp_3m")]
    assert torch.equal(pair[0].rows, pair[1].rows) and pair[1].history == 1


def test_dpmpp_3m_after_infinite_lambda():
    """A step from λ = −∞ has no length: neither the row after it nor that after the next reads across it."""
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1).rescale_zero_terminal_snr()
    table = dpmpp_3m_table(schedule, [99, 80, 60, 40, 20], prediction="v", clip=None)
    assert [table.row(i)["c_h"] != 0 for i in range(5)] == [False, False, True, True, False]
    assert [table.row(i)["c_h2"] != 0 for i in range(5)] == [False, False, False, True, False]
    a = schedule.alphas_cumprod_exact[[80, 60, 40]]
    before, h = (0.5 * (a / (1 - a)).log()).diff().tolist()
    weight = (math.expm1(-h) + h) / before  # of x̂_0 − x̂_0' alone: the second order's step in the form of Heun
    row, alpha = table.row(2), math.sqrt(a[2])
    assert row["c_0"] == pytest.approx(alpha * (weight - math.expm1(-h)), rel=1e-6)
    assert row["c_h"] == pytest.approx(-alpha * weight, rel=1e-6)


@pytest.mark.parametrize("h", [1e-8, 1e-3, 0.3, 0.4999999, 0.5, 0.7, 5.0])
def test_phi_3_is_exact_for_steps_of_any_length(h):
    x = Fraction(h)
    exact = sum((-x) ** (k - 2) / math.factorial(k) for k in range(3, 60))
    assert third_exponential(torch.tensor([h], dtype=F64)).item() == pytest.approx(float(exact), rel=2e-14)


@pytest.mark.parametrize("peer", ["openai_guided", "openai_improved"])
def test_learned_range_rows_equal_openai(peer):
    data = oracle(peer)
    T = len(data["sched_full/betas"])
    schedule = NoiseSchedule.linear(T) if peer == "openai_guided" else NoiseSchedule.cosine(T)
    table = ddpm_table(schedule, respace(T, len(data["ancestral/t"])), variance="learned_range")
    theirs = {key.split("/")[-1]: value.flip(0) for key, value in data.items() if key.startswith("ancestral/sched/")}
    assert torch.equal(table.timesteps[:-1], theirs["timestep_map"])
    close(columns(table, "c_0"), theirs["posterior_mean_coef1"])
    close(columns(table, "c_x"), theirs["posterior_mean_coef2"])
    close(columns(table, "log_beta"), theirs["betas"].log())
    close(columns(table, "log_beta_tilde"), theirs["posterior_log_variance_clipped"])
    assert columns(table, "sigma").tolist() == [1.0] * (table.S - 1) + [0.0]


@pytest.mark.parametrize("peer", ["openai_guided", "openai_improved"])
@pytest.mark.parametrize("mode", ["ddim", "ddim_eta"])
def test_ddim_rows_follow_from_openais_tables(peer, mode):
    data = oracle(peer)
    T = len(data["sched_full/betas"])
    schedule = NoiseSchedule.linear(T) if peer == "openai_guided" else NoiseSchedule.cosine(T)
    eta = 0.7 if mode == "ddim_eta" else 0.0
    table = ddim_table(schedule, data[f"{mode}/t"], eta=eta)
    a = data[f"{mode}/sched/alphas_cumprod"].flip(0)
    a_prev = torch.cat([a[1:], a.new_ones(1)])
    sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
    close(columns(table, "sigma"), sigma)
    x, x_start = 0.9, -0.35
    eps = (x / a.sqrt() - x_start) / (1 / a - 1).sqrt()
    expected = a_prev.sqrt() * x_start + (1 - a_prev - sigma**2).sqrt() * eps
    close(columns(table, "c_x") * x + columns(table, "c_0") * x_start, expected)


@pytest.mark.parametrize("peer", ["lucidrains_pred_v", "pesser_ho", "w86763777_ddpm"])
def test_full_runs_equal_the_peers_posterior(peer):
    data = oracle(peer)
    schedules = {
        "lucidrains_pred_v": NoiseSchedule.sigmoid(1000),
        "pesser_ho": NoiseSchedule.linear(1000),
        "w86763777_ddpm": NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000).double()),
    }
    table = ddpm_table(schedules[peer], torch.arange(999, -1, -1), variance="fixed_large")
    close(columns(table, "c_0"), data["sched_full/posterior_mean_coef1"].flip(0))
    close(columns(table, "c_x"), data["sched_full/posterior_mean_coef2"].flip(0))
    close(columns(table, "sigma")[:-1] ** 2, data["sched_full/betas"].flip(0)[:-1])
    assert table.row(999)["sigma"] == 0.0


def test_part_of_a_run_goes_on_to_the_next_timestep():
    # What pesser's loop does over t = 999 … 988: the last row leads to 987, not to x_0.
    schedule = NoiseSchedule.linear(1000)
    whole = ddpm_table(schedule, torch.arange(999, -1, -1))
    part = ddpm_table(schedule, torch.arange(999, 987, -1), prev_timesteps=torch.arange(998, 986, -1))
    assert torch.equal(part.rows[:12], whole.rows[:12])


# ------------------------------------------------------------------ against the textbook


def model_for(variance):
    def model(x, t, y=None):
        out = 0.8 * x + 0.3 * torch.sin(3 * x + t.reshape(-1, 1, 1, 1) / 100)
        return torch.cat([out, torch.cos(2 * x)], dim=1) if variance == "learned_range" else out

    return model


def draw(S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(SHAPE, generator=generator, dtype=F64)
    return x_T, torch.randn(S, *SHAPE, generator=generator, dtype=F64)


def same_run(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("clip", [None, 1.0, 0.4])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_ddpm_equals_the_textbook(prediction, variance, clip):
    schedule, steps = NoiseSchedule.cosine(60), respace(60, "3,5,4")
    x_T, z = draw(len(steps))
    model = model_for(variance)
    table = ddpm_table(schedule, steps, prediction=prediction, variance=variance, clip=clip)
    expected = reference.p_sample_loop(
        model, schedule, x_T, z, timesteps=steps, prediction=prediction, variance=variance, clip=clip
    )
    same_run(run_table(table, model, x_T, z), expected)


def test_full_ddpm_equals_the_textbook():
    schedule = NoiseSchedule.linear(200)
    x_T, z = draw(200)
    model = model_for("fixed_small")
    expected = reference.p_sample_loop(model, schedule, x_T, z)
    same_run(run_table(ddpm_table(schedule, torch.arange(199, -1, -1)), model, x_T, z), expected)


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("clipped_eps", ["rederive", "raw"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_ddim_equals_the_textbook(prediction, eta, clipped_eps, clip):
    schedule, steps = NoiseSchedule.linear(100, 1e-3, 0.1), spaced_timesteps(100, 9, "trailing")
    x_T, z = draw(len(steps))
    model = model_for("fixed_small")
    table = ddim_table(schedule, steps, prediction=prediction, eta=eta, clip=clip, clipped_eps=clipped_eps)
    assert table.uses_noise == (eta > 0)
    expected = reference.ddim_sample_loop(
        model,
        schedule,
        x_T,
        steps,
        eta=eta,
        noise=z,
        prediction=prediction,
        clip=clip,
        clipped_eps=clipped_eps,
    )
    same_run(run_table(table, model, x_T, z), expected)


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_dpmpp_2m_equals_the_textbook(prediction, clip):
    schedule, steps = NoiseSchedule.linear(100, 1e-3, 0.1), spaced_timesteps(100, 9, "linspace")
    x_T, _ = draw(1)
    model = model_for("fixed_small")
    table = dpmpp_2m_table(schedule, steps, prediction=prediction, clip=clip)
    assert table.history == 1
    assert not table.uses_noise
    expected = reference.dpmpp_2m_sample_loop(model, schedule, x_T, steps, prediction=prediction, clip=clip)
    same_run(run_table(table, model, x_T), expected)


def test_dynamic_thresholding_equals_the_textbook():
    schedule, steps = NoiseSchedule.cosine(60), respace(60, 12)
    x_T, z = draw(len(steps))
    model = model_for("fixed_small")
    table = ddpm_table(schedule, steps, clip=DynamicThreshold(0.9, 3.0))
    expected = reference.p_sample_loop(model, schedule, x_T, z, timesteps=steps, threshold=(0.9, 3.0))
    unclipped = reference.p_sample_loop(model, schedule, x_T, z, timesteps=steps, clip=None)
    assert (expected - unclipped).abs().max() > 0.1
    same_run(run_table(table, model, x_T, z), expected)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
def test_fixed_rows_do_not_see_the_variance_half_of_a_network(solver):
    schedule, steps = NoiseSchedule.cosine(60), respace(60, 12)
    options = {"eta": 0.8} if solver == "ddim" else {}
    table = make_table(schedule, steps, solver=solver, **options)
    x_T, z = draw(len(steps))
    plain, doubled = (run_table(table, model_for(kind), x_T, z) for kind in ("fixed_small", "learned_range"))
    assert torch.equal(plain, doubled)


# ------------------------------------------------------------------ identities between solvers


@given(data=st.data(), prediction=st.sampled_from(["eps", "x_start", "v"]))
def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance(data, prediction):
    T = data.draw(st.integers(2, 300))
    steps = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1, max_size=30)), reverse=True)
    name = data.draw(st.sampled_from(["linear", "cosine", "scaled_linear", "sigmoid"]))
    schedule = NoiseSchedule.by_name(name, T)
    ddim = ddim_table(schedule, steps, eta=1.0, prediction=prediction)
    ddpm = ddpm_table(schedule, steps, prediction=prediction)
    torch.testing.assert_close(ddim.rows, ddpm.rows, rtol=2.4e-7, atol=1e-9)


@given(data=st.data(), eta=st.floats(0, 1), prediction=st.sampled_from(["eps", "x_start", "v"]))
def test_both_ddim_conventions_agree_where_nothing_is_clipped(data, eta, prediction):
    steps = sorted(data.draw(st.sets(st.integers(0, 99), min_size=1, max_size=20)), reverse=True)
    schedule = NoiseSchedule.cosine(100, max_beta=0.9)
    rederive, raw = (
        ddim_table(schedule, steps, eta=eta, clip=None, clipped_eps=kind, prediction=prediction)
        for kind in ("rederive", "raw")
    )

    def in_x_and_out(table):
        c = {name: columns(table, name) for name in COLUMNS}
        return torch.stack([c["c_x"] + c["c_0"] * c["a_x"], c["c_o"] + c["c_0"] * c["a_o"]])

    # Float32 rows: the terms that cancel are as large as c_0/√ᾱ.
    scale = (columns(raw, "c_0").abs() * columns(raw, "a_x").abs().clamp(min=1)).max().item()
    torch.testing.assert_close(in_x_and_out(rederive), in_x_and_out(raw), rtol=0, atol=1e-6 * max(1.0, scale))


def test_first_dpmpp_row_and_the_one_after_infinite_lambda_are_ddims():
    schedule = NoiseSchedule.linear(100, 1e-3, 0.1).rescale_zero_terminal_snr()
    steps = [99, 60, 30, 10]
    ddim = ddim_table(schedule, steps, prediction="v", clip=None)
    table = dpmpp_2m_table(schedule, steps, prediction="v", clip=None)
    assert [table.row(i)["c_h"] != 0 for i in range(4)] == [False, False, True, False]
    for i in (0, 1, 3):
        torch.testing.assert_close(table.rows[i], ddim.rows[i], rtol=1e-6, atol=1e-7)


def test_lower_order_final_changes_only_a_last_row_with_finite_lambda():
    schedule, steps, prev = NoiseSchedule.linear(100), [90, 60, 30], [60, 30, 5]
    finite = dpmpp_2m_table(schedule, steps, prev_timesteps=prev)
    lower = dpmpp_2m_table(schedule, steps, prev_timesteps=prev, lower_order_final=True)
    assert finite.row(2)["c_h"] != 0
    assert lower.row(2)["c_h"] == 0
    assert torch.equal(finite.rows[:2], lower.rows[:2])
    ended = dpmpp_2m_table(schedule, steps)
    assert torch.equal(ended.rows, dpmpp_2m_table(schedule, steps, lower_order_final=True).rows)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpmpp_3m"])
def test_final_alpha_of_one_returns_x_start_and_alpha_0_does_not(solver):
    schedule, steps = NoiseSchedule.linear(100, 1e-3, 0.1), [90, 60, 30]
    to_one = make_table(schedule, steps, solver=solver)
    assert to_one.row(2)["c_0"] == 1.0
    assert to_one.row(2)["c_x"] == 0.0
    to_first = make_table(schedule, steps, solver=solver, final_alpha_to_one=False)
    explicit = make_table(schedule, steps, solver=solver, prev_timesteps=[60, 30, 0])
    known = [COLUMNS.index(name) for name in ("k_0", "k_z")]
    rest = [i for i in range(len(COLUMNS)) if i not in known]
    assert torch.equal(to_first.rows[:, rest], explicit.rows[:, rest])
    assert to_first.row(2)["c_x"] > 0
    # What is known of a picture is the picture itself where a run ends, whatever ᾱ is taken there.
    assert to_first.rows[2, known].tolist() == [1.0, 0.0] and explicit.row(2)["k_z"] > 0


# ------------------------------------------------------------------ noise gates


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [[9, 4, 0], [9, 6, 3]], ids=["to-0", "to-3"])
def test_noise_gates(variance, steps):
    schedule = NoiseSchedule.linear(10)
    final = ddpm_table(schedule, steps, variance=variance).row(2)["sigma"]
    t0 = ddpm_table(schedule, steps, variance=variance, noise_gate="t0").row(2)["sigma"]
    assert final == 0
    leaves_noise = steps[-1] > 0 and variance != "fixed_small"
    assert (t0 > 0) == leaves_noise


def test_learned_range_on_a_noisy_last_row_takes_the_peers_floor():
    schedule = NoiseSchedule.linear(10)
    row = ddpm_table(schedule, [9, 6, 3], variance="learned_range", noise_gate="t0").row(2)
    assert row["log_beta_tilde"] == pytest.approx(math.log(1e-20))
    assert row["log_beta"] == pytest.approx(math.log(1 - float(schedule.alphas_cumprod[3])))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_one_step_run_returns_x_start(variance):
    row = ddpm_table(NoiseSchedule.cosine(10), [7], variance=variance).row(0)
    assert (row["c_0"], row["c_x"], row["sigma"]) == (1.0, 0.0, 0.0)
    assert all(math.isfinite(row[name]) for name in ("log_beta", "log_beta_tilde"))


def test_schedule_of_one_step():
    table = ddpm_table(NoiseSchedule.from_betas([0.5]), [0])
    assert (table.row(0)["c_0"], table.row(0)["c_x"]) == (1.0, 0.0)


# ------------------------------------------------------------------ the table itself


@given(
    T=st.integers(1, 400),
    solver=st.sampled_from(["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"]),
    prediction=st.sampled_from(["eps", "x_start", "v"]),
    name=st.sampled_from(["linear", "cosine", "sigmoid", "laplace"]),
    data=st.data(),
)
def test_every_table_is_finite_and_ends_with_the_identity(T, solver, prediction, name, data):
    S = data.draw(st.integers(1, T))
    steps = spaced_timesteps(T, S, data.draw(st.sampled_from(["leading", "trailing", "linspace"])))
    table = make_table(NoiseSchedule.by_name(name, T), steps, solver=solver, prediction=prediction, clip=0.9)
    assert table.S == S
    assert bool(table.rows[:, [i for i, c in enumerate(COLUMNS) if c != "bound"]].isfinite().all())
    identity = {**dict.fromkeys(COLUMNS, 0.0), "c_x": 1.0, "bound": math.inf}
    assert table.row(S) == identity
    assert columns(table, "bound").tolist() == pytest.approx([0.9] * S)
    assert table.timesteps.tolist() == [*steps.tolist(), 0]
    # Whatever comes before, the last row returns x̂_0 without noise.
    last = table.row(S - 1)
    assert last["c_0"] == pytest.approx(1.0)
    assert last["sigma"] == 0.0
    assert abs(last["c_x"]) < 1e-6


def test_finished_samples_stay():
    table = ddim_table(NoiseSchedule.cosine(10), [9, 0], eta=0.5)
    x, out = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    step, end = torch.tensor([2, 1]), torch.tensor([2, 2])
    zeros = torch.zeros(2, dtype=torch.int64)
    new, _ = p_sample_reference(Operands(x, out, table.rows, table.timesteps, step, end, zeros, zeros))
    assert torch.equal(new[0], x[0])
    assert not torch.equal(new[1], x[1])


def test_rows_are_float64_results_rounded_once():
    schedule = NoiseSchedule.linear(1000)
    table = ddpm_table(schedule, torch.arange(999, -1, -1))
    exact = (1.0 - schedule.alphas_cumprod).sqrt() / schedule.alphas_cumprod.sqrt()
    assert torch.equal(columns(table, "a_o").float(), -exact.flip(0).float())


def test_zero_terminal_snr():
    schedule = NoiseSchedule.linear(50).rescale_zero_terminal_snr()
    for solver in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"):
        with pytest.raises(ValueError, match="prediction must be v or x_start .* got eps at t=49"):
            make_table(schedule, [49, 20], solver=solver)
        make_table(schedule, [48, 20], solver=solver)
        table = make_table(schedule, [49, 20], solver=solver, prediction="v")
        assert (table.row(0)["a_x"], table.row(0)["a_o"]) == (0.0, -1.0)


def test_table_moves_and_is_frozen():
    table = ddim_table(NoiseSchedule.cosine(10), [9, 0], clip=DynamicThreshold(0.9))
    moved = table.to("meta")
    assert moved.rows.device.type == moved.timesteps.device.type == "meta"
    assert (moved.solver, moved.threshold) == ("ddim", DynamicThreshold(0.9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.rows = moved.rows
    with pytest.raises(IndexError, match="0 … 2, got 3"):
        table.row(3)


def test_names_are_checked_by_the_table_itself():
    table = ddim_table(NoiseSchedule.cosine(10), [9, 0])
    with pytest.raises(ValueError, match="prediction must be one of eps, x_start, v, x_prev, got 'noise'"):
        dataclasses.replace(table, prediction="noise")
    with pytest.raises(ValueError, match=r"rows must be \[S\+1"):
        dataclasses.replace(table, rows=table.rows[:2])
    with pytest.raises(TypeError, match="float32"):
        dataclasses.replace(table, rows=table.rows.double())
    assert isinstance(table, StepTable)


# ------------------------------------------------------------------ dynamic thresholding


@given(
    ratio=st.floats(0.01, 1.0),
    n=st.integers(1, 40),
    max_value=st.sampled_from([1.0, 2.5, math.inf]),
    seed=st.integers(0, 99),
)
def test_dynamic_bound_is_the_clamped_quantile(ratio, n, max_value, seed):
    generator = torch.Generator().manual_seed(seed)
    x, out = torch.randn(2, 3, 2, 1, 1, n, generator=generator).reshape(2, 3, 2, 1, n)
    rows = torch.zeros(3, len(COLUMNS))
    rows[:, COLUMNS.index("a_x")] = torch.tensor([2.0, 0.5, 0.0])
    rows[:, COLUMNS.index("a_o")] = torch.tensor([-1.0, 3.0, 4.0])
    x_start = torch.tensor([2.0, 0.5, 0.0]).reshape(3, 1, 1, 1) * x
    x_start = x_start + torch.tensor([-1.0, 3.0, 4.0]).reshape(3, 1, 1, 1) * out
    expected = torch.quantile(x_start.double().abs().flatten(1), ratio, dim=1).clamp(1.0, max_value)
    got = dynamic_bound(x, torch.cat([out, out * 9], dim=1), rows, DynamicThreshold(ratio, max_value))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_dynamic_bound_is_one_graph_for_every_batch_size():
    class Bound(torch.nn.Module):
        def forward(self, x, out, rows):
            return dynamic_bound(x, out, rows, DynamicThreshold(0.9, 2.0))

    def arguments(B):
        generator = torch.Generator().manual_seed(B)
        return tuple(torch.randn(B, *rest, generator=generator) for rest in ((2, 3, 3), (2, 3, 3), (len(COLUMNS),)))

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Bound(), arguments(3), dynamic_shapes=[{0: batch}] * 3)
    torch.testing.assert_close(program.module()(*arguments(7)), Bound()(*arguments(7)))


def test_dynamic_bound_refuses_shapes_that_do_not_fit():
    x, rows, threshold = torch.zeros(2, 1, 2, 2), torch.zeros(2, len(COLUMNS)), DynamicThreshold()
    for out, table_rows in ((torch.zeros(2, 1, 2, 3), rows), (torch.zeros(2, 1, 2, 2), rows[:1])):
        with pytest.raises(ValueError, match="must fit x"):
            dynamic_bound(x, out, table_rows, threshold)


@pytest.mark.parametrize("arguments", [(0.0,), (1.1,), (math.nan,), (0.9, 0.5), (0.9, math.nan)], ids=str)
def test_bad_thresholds(arguments):
    with pytest.raises(ValueError, match="DynamicThreshold"):
        DynamicThreshold(*arguments)


# ------------------------------------------------------------------ bad input

LINEAR = NoiseSchedule.linear(10)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ddpm_table(LINEAR, []), "ddpm_table: timesteps must be 1-D with at least one entry"),
        (lambda: ddim_table(LINEAR, [10, 3]), "ddim_table: timesteps must be in 0 … 9, got 10"),
        (lambda: dpmpp_2m_table(LINEAR, [3, 3]), "strictly descending"),
        (lambda: ddim_table(LINEAR, [9, 3], eta=-0.1), r"eta must be in \[0, 1\], got -0.1"),
        (lambda: ddim_table(LINEAR, [9, 3], eta=1.1), "eta"),
        (lambda: ddim_table(LINEAR, [9, 3], eta=math.nan), "eta"),
        (lambda: ddim_table(LINEAR, [9, 3], clip=0.0), "clip must be above 0"),
        (lambda: ddim_table(LINEAR, [9, 3], clip=math.inf), "clip must be above 0"),
        (lambda: ddim_table(LINEAR, [9, 3], clip=math.nan), "clip must be above 0"),
        (lambda: ddim_table(LINEAR, [9, 3], clipped_eps="both"), "rederive, raw"),
        (lambda: ddim_table(LINEAR, [9, 3], prediction="noise"), "got 'noise'"),
        (lambda: ddpm_table(LINEAR, [9, 3], variance="learned"), "fixed_small, fixed_large, learned_range"),
        (lambda: ddpm_table(LINEAR, [9, 3], noise_gate="never"), "final, t0"),
        (lambda: ddpm_table(LINEAR, [9, 3], prev_timesteps=[3]), "must be 2 integers"),
        (lambda: ddpm_table(LINEAR, [9, 3], prev_timesteps=[9, -1]), "between 0 and its timestep"),
        (lambda: ddpm_table(LINEAR, [9, 3], prev_timesteps=[3, -2]), "use −1"),
        (lambda: ddpm_table(LINEAR, [9, 3], prev_timesteps=[3.0, -1.0]), "integers"),
        (lambda: dpmpp_2m_table(LINEAR, [9, 3], prev_timesteps=[4, -1]), "next timestep, got 4 before 3"),
        (lambda: make_table(LINEAR, [9], solver="euler"), "ddpm, ddim, dpmpp_2m, dpmpp_3m, got 'euler'"),
        (lambda: make_table(LINEAR, [9], solver="ddpm", eta=0.0), "options of ddpm .* got eta"),
        (lambda: make_table(LINEAR, [9], solver="ddim", variance="fixed_large"), "options of ddim .* got variance"),
        (lambda: make_table(LINEAR, [9], solver="dpmpp_2m", noise_gate="t0"), "options of dpmpp_2m"),
        (lambda: make_table(LINEAR, [9], solver="dpmpp_2m", lower_order_second=True), "options of dpmpp_2m"),
        (lambda: dpmpp_3m_table(LINEAR, [9, 3], prev_timesteps=[4, -1]), "dpmpp_3m_table: .* got 4 before 3"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_coefficients_beyond_float32_are_refused():
    vanishing = NoiseSchedule.from_betas([0.5] + [1 - 1e-16] * 6)
    with pytest.raises(ValueError, match="finite in float32, got a_x"):
        ddim_table(vanishing, [6, 0])


def test_make_table_hands_every_option_on():
    steps, prev = [9, 6, 3], [6, 3, 1]
    assert torch.equal(
        make_table(LINEAR, steps, variance="fixed_large", noise_gate="t0", prev_timesteps=prev, clip=None).rows,
        ddpm_table(LINEAR, steps, variance="fixed_large", noise_gate="t0", prev_timesteps=prev, clip=None).rows,
    )
    options = {"eta": 0.5, "clipped_eps": "raw", "final_alpha_to_one": False, "prediction": "v"}
    assert torch.equal(
        make_table(LINEAR, steps, solver="ddim", **options).rows, ddim_table(LINEAR, steps, **options).rows
    )
    options = {"lower_order_final": True, "final_alpha_to_one": False, "prediction": "x_start"}
    assert torch.equal(
        make_table(LINEAR, steps, solver="dpmpp_2m", **options).rows, dpmpp_2m_table(LINEAR, steps, **options).rows
    )
    steps, options = [9, 6, 3, 1], options | {"lower_order_final": False, "lower_order_second": True}
    assert torch.equal(
        make_table(LINEAR, steps, solver="dpmpp_3m", **options).rows, dpmpp_3m_table(LINEAR, steps, **options).rows
    )
