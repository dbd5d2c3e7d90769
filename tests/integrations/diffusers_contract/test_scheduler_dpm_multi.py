"""An own port of the assertions of diffusers' tests/schedulers/test_scheduler_dpm_multi.py."""

import itertools

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)

from tests.integrations.diffusers_contract.common import (
    OURS,
    CommonContract,
    close,
    fixed_noise,
    fixed_sample,
    model,
    random_sample,
)


class TestDPMSolverMultistepScheduler(CommonContract):
    classes = (DPMSolverMultistepScheduler, OURS["dpm"])
    steps = 25
    config = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "solver_order": 2, "prediction_type": "epsilon", "thresholding": False, "sample_max_value": 1.0,
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
        "euler_at_final": False, "lambda_min_clipped": -float("inf"), "variance_type": None,
        "final_sigmas_type": "sigma_min",
    }  # fmt: skip

    def with_past(self, scheduler, x, steps):
        """A scheduler as if it had made steps before, which it may look back on."""
        scheduler.set_timesteps(steps)
        scheduler.model_outputs = [0.1 * x + past for past in (0.2, 0.15, 0.10)][: scheduler.config.solver_order]
        return scheduler

    def check_reloaded(self, kind, folder, t=0, *, steps=None, options=None, **changes):
        x = random_sample()
        first = self.with_past(self.make(kind, **changes), x, steps or self.steps)
        second = self.with_past(self.saved_and_loaded(first, folder), x, steps or self.steps)
        a = b = x
        for i in range(t, min(t + first.config.solver_order + 1, len(first.timesteps))):
            timestep = second.timesteps[i]
            a = first.step(0.1 * x, timestep, a).prev_sample
            b = second.step(0.1 * x, timestep, b).prev_sample
            assert close(a, b)

    def full_loop(self, scheduler, timesteps=None):
        if timesteps is None:
            scheduler.set_timesteps(10)
        else:
            scheduler.set_timesteps(timesteps=timesteps)
        x, generator = fixed_sample(), torch.manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
        return x

    def test_step_shape(self, kind):
        x = random_sample()
        scheduler = self.with_past(self.make(kind), x, self.steps)
        first = scheduler.step(0.1 * x, scheduler.timesteps[5], x).prev_sample
        second = scheduler.step(0.1 * x, scheduler.timesteps[6], x).prev_sample
        assert first.shape == second.shape == x.shape

    @pytest.mark.parametrize("timesteps", [25, 50, 100, 999, 1000])
    def test_timesteps(self, kind, tmp_path, timesteps):
        self.check_reloaded(kind, tmp_path, num_train_timesteps=timesteps)

    def test_thresholding(self, kind, tmp_path):
        self.check_reloaded(kind, tmp_path, thresholding=False)
        for order, solver, limit, prediction in itertools.product(
            (1, 2, 3), ("midpoint", "heun"), (0.5, 1.0, 2.0), ("epsilon", "sample")
        ):
            changes = {"solver_order": order, "solver_type": solver, "algorithm_type": "dpmsolver++"}
            changes |= {"sample_max_value": limit, "prediction_type": prediction}
            self.check_reloaded(kind, tmp_path, thresholding=True, **changes)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_prediction_type(self, kind, tmp_path, prediction):
        self.check_reloaded(kind, tmp_path, prediction_type=prediction)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"])
    def test_solver_order_and_type(self, kind, tmp_path, algorithm):
        for solver, order, prediction in itertools.product(("midpoint", "heun"), (1, 2, 3), ("epsilon", "sample")):
            is_sde = algorithm.startswith("sde-")
            if is_sde and order == 3:
                continue
            changes = {"solver_order": order, "solver_type": solver, "prediction_type": prediction}
            changes["algorithm_type"] = algorithm
            if not is_sde:
                self.check_reloaded(kind, tmp_path, **changes)
            assert not self.full_loop(self.make(kind, **changes)).isnan().any()

    @pytest.mark.parametrize(
        "option, values",
        [
            pytest.param("lower_order_final", (True, False), id="test_lower_order_final"),
            pytest.param("euler_at_final", (True, False), id="test_euler_at_final"),
            pytest.param("lambda_min_clipped", (-float("inf"), -5.1), id="test_lambda_min_clipped"),
            pytest.param("variance_type", (None, "learned_range"), id="test_variance_type"),
            pytest.param("rescale_betas_zero_snr", (True, False), id="test_rescale_betas_zero_snr"),
            pytest.param("use_beta_sigmas", (True,), id="test_beta_sigmas"),
            pytest.param("use_exponential_sigmas", (True,), id="test_exponential_sigmas"),
        ],
    )
    def test_options(self, kind, tmp_path, option, values):
        for value in values:
            self.check_reloaded(kind, tmp_path, **{option: value})

    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 999, 1000])
    def test_inference_steps(self, kind, tmp_path, steps):
        self.check_reloaded(kind, tmp_path, steps=steps)

    @pytest.mark.parametrize(
        "changes, mean",
        [
            pytest.param({}, 0.3301, id="test_full_loop_no_noise"),
            pytest.param(
                {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}, 1.1364,
                id="test_full_loop_no_noise_thres",
            ),
            pytest.param({"prediction_type": "v_prediction"}, 0.2251, id="test_full_loop_with_v_prediction"),
            pytest.param(
                {"prediction_type": "v_prediction", "use_karras_sigmas": True}, 0.2096,
                id="test_full_loop_with_karras_and_v_prediction",
            ),
            pytest.param(
                {"prediction_type": "v_prediction", "use_lu_lambdas": True}, 0.1554,
                id="test_full_loop_with_lu_and_v_prediction",
            ),
        ],
    )  # fmt: skip
    def test_full_loop(self, kind, changes, mean):
        assert abs(float(self.full_loop(self.make(kind, **changes)).abs().mean()) - mean) < 1e-3

    def test_full_loop_with_noise(self, kind):
        scheduler = self.make(kind)
        scheduler.set_timesteps(10)
        timesteps = scheduler.timesteps[5 * scheduler.order :]
        x = scheduler.add_noise(fixed_sample(), fixed_noise(), timesteps[:1])
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        assert abs(float(x.abs().sum()) - 318.4111) < 1e-2
        assert abs(float(x.abs().mean()) - 0.4146) < 1e-3

    def test_switch(self, kind):
        scheduler = self.make(kind)
        assert abs(float(self.full_loop(scheduler).abs().mean()) - 0.3301) < 1e-3
        for other in (DPMSolverSinglestepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, kind):
            scheduler = other.from_config(scheduler.config)
        assert abs(float(self.full_loop(scheduler).abs().mean()) - 0.3301) < 1e-3

    def test_fp16_support(self, kind):
        scheduler = self.make(kind, thresholding=True, dynamic_thresholding_ratio=0)
        scheduler.set_timesteps(10)
        x = fixed_sample().half()
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        assert x.dtype == torch.float16

    def test_duplicated_timesteps(self, kind):
        scheduler = self.make(kind)
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps

    @pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("final", ["sigma_min", "zero"])
    def test_custom_timesteps(self, kind, algorithm, prediction, final):
        changes = {"algorithm_type": algorithm, "prediction_type": prediction, "final_sigmas_type": final}
        scheduler = self.make(kind, **changes)
        by_number = self.full_loop(scheduler)
        assert close(by_number, self.full_loop(self.make(kind, **changes), timesteps=scheduler.timesteps))
