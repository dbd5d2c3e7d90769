"""An own port of the assertions of diffusers' tests/schedulers/test_scheduler_ddpm.py."""

import pytest
import torch
from diffusers import DDPMScheduler

from tests.integrations.diffusers_contract.common import OURS, CommonContract, fixed_noise, fixed_sample, model


class TestDDPMScheduler(CommonContract):
    classes = (DDPMScheduler, OURS["ddpm"])
    config = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "variance_type": "fixed_small", "clip_sample": True,
    }  # fmt: skip

    @pytest.mark.parametrize("timesteps", [1, 5, 100, 1000])
    def test_timesteps(self, kind, tmp_path, timesteps):
        self.check_reloaded(kind, tmp_path, num_train_timesteps=timesteps)

    @pytest.mark.parametrize("start, end", [(1e-4, 0.002), (1e-3, 0.02), (0.01, 0.2), (0.1, 2)])
    def test_betas(self, kind, tmp_path, start, end):
        self.check_reloaded(kind, tmp_path, beta_start=start, beta_end=end)

    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_schedules(self, kind, tmp_path, schedule):
        self.check_reloaded(kind, tmp_path, beta_schedule=schedule)

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "other"])
    def test_variance_type(self, kind, tmp_path, variance):
        self.check_reloaded(kind, tmp_path, variance_type=variance)

    @pytest.mark.parametrize("clip", [True, False])
    def test_clip_sample(self, kind, tmp_path, clip):
        self.check_reloaded(kind, tmp_path, clip_sample=clip)

    def test_thresholding(self, kind, tmp_path):
        self.check_reloaded(kind, tmp_path, thresholding=False)
        for limit in (0.5, 1.0, 2.0):
            for prediction in ("epsilon", "sample", "v_prediction"):
                changes = {"prediction_type": prediction, "sample_max_value": limit}
                self.check_reloaded(kind, tmp_path, thresholding=True, **changes)

    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    def test_prediction_type(self, kind, tmp_path, prediction):
        self.check_reloaded(kind, tmp_path, prediction_type=prediction)

    @pytest.mark.parametrize("t", [0, 500, 999])
    def test_time_indices(self, kind, tmp_path, t):
        self.check_reloaded(kind, tmp_path, t)

    @pytest.mark.parametrize("t, variance", [(0, 0.0), (487, 0.00979), (999, 0.02)])
    def test_variance(self, kind, t, variance):
        assert abs(float(self.make(kind)._get_variance(t)) - variance) < 1e-5

    def test_rescale_betas_zero_snr(self, kind, tmp_path):
        for rescale in (True, False):
            self.check_reloaded(kind, tmp_path, rescale_betas_zero_snr=rescale)

    def full_loop(self, kind, **changes):
        scheduler, x, generator = self.make(kind, **changes), fixed_sample(), torch.manual_seed(0)
        for t in reversed(range(len(scheduler))):
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
        return float(x.abs().sum()), float(x.abs().mean())

    def test_full_loop_no_noise(self, kind):
        total, mean = self.full_loop(kind)
        assert abs(total - 258.9606) < 1e-2
        assert abs(mean - 0.3372) < 1e-3

    def test_full_loop_with_v_prediction(self, kind):
        total, mean = self.full_loop(kind, prediction_type="v_prediction")
        assert abs(total - 202.0296) < 1e-2
        assert abs(mean - 0.2631) < 1e-3

    def test_custom_timesteps(self, kind):
        scheduler, timesteps = self.make(kind), [100, 87, 50, 1, 0]
        scheduler.set_timesteps(timesteps=timesteps)
        reached = [scheduler.previous_timestep(t).item() for t in scheduler.timesteps]
        assert reached == [87, 50, 1, 0, -1]

    def test_custom_timesteps_increasing_order(self, kind):
        with pytest.raises(ValueError, match="must be in descending order"):
            self.make(kind).set_timesteps(timesteps=[100, 87, 50, 51, 0])

    def test_custom_timesteps_passing_both_num_inference_steps_and_timesteps(self, kind):
        with pytest.raises(ValueError, match="Can only pass one of"):
            self.make(kind).set_timesteps(num_inference_steps=5, timesteps=[100, 87, 50, 1, 0])

    def test_custom_timesteps_too_large(self, kind):
        scheduler = self.make(kind)
        with pytest.raises(ValueError, match="`timesteps` must start before"):
            scheduler.set_timesteps(timesteps=[scheduler.config.num_train_timesteps])

    def test_full_loop_with_noise(self, kind):
        scheduler, generator = self.make(kind), torch.manual_seed(0)
        timesteps = scheduler.timesteps[(len(scheduler) - 2) * scheduler.order :]
        x = scheduler.add_noise(fixed_sample(), fixed_noise(), timesteps[:1])
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
        assert abs(float(x.abs().sum()) - 387.9466) < 1e-2
        assert abs(float(x.abs().mean()) - 0.5051) < 1e-3
