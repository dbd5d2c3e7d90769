"""An own port of the assertions of diffusers' tests/schedulers/test_scheduler_ddim.py."""

import pytest
import torch
from diffusers import DDIMScheduler

from tests.integrations.diffusers_contract.common import OURS, CommonContract, fixed_noise, fixed_sample, model


class TestDDIMScheduler(CommonContract):
    classes = (DDIMScheduler, OURS["ddim"])
    steps = 50
    options = {"eta": 0.0}
    config = {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
        "clip_sample": True,
    }  # fmt: skip

    def full_loop(self, kind, **changes):
        scheduler, x = self.make(kind, **changes), fixed_sample()
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, 0.0).prev_sample
        return float(x.abs().sum()), float(x.abs().mean())

    @pytest.mark.parametrize("timesteps", [100, 500, 1000])
    def test_timesteps(self, kind, tmp_path, timesteps):
        self.check_reloaded(kind, tmp_path, num_train_timesteps=timesteps)

    def test_steps_offset(self, kind, tmp_path):
        for offset in (0, 1):
            self.check_reloaded(kind, tmp_path, steps_offset=offset)
        scheduler = self.make(kind, steps_offset=1)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
        assert scheduler.timesteps.dtype == torch.int64

    @pytest.mark.parametrize("start, end", [(1e-4, 0.002), (1e-3, 0.02), (0.01, 0.2), (0.1, 2)])
    def test_betas(self, kind, tmp_path, start, end):
        self.check_reloaded(kind, tmp_path, beta_start=start, beta_end=end)

    @pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
    def test_schedules(self, kind, tmp_path, schedule):
        self.check_reloaded(kind, tmp_path, beta_schedule=schedule)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_prediction_type(self, kind, tmp_path, prediction):
        self.check_reloaded(kind, tmp_path, prediction_type=prediction)

    @pytest.mark.parametrize("clip", [True, False])
    def test_clip_sample(self, kind, tmp_path, clip):
        self.check_reloaded(kind, tmp_path, clip_sample=clip)

    @pytest.mark.parametrize("spacing", ["trailing", "leading"])
    def test_timestep_spacing(self, kind, tmp_path, spacing):
        self.check_reloaded(kind, tmp_path, timestep_spacing=spacing)

    @pytest.mark.parametrize("rescale", [True, False])
    def test_rescale_betas_zero_snr(self, kind, tmp_path, rescale):
        self.check_reloaded(kind, tmp_path, rescale_betas_zero_snr=rescale)

    def test_thresholding(self, kind, tmp_path):
        self.check_reloaded(kind, tmp_path, thresholding=False)
        for limit in (0.5, 1.0, 2.0):
            for prediction in ("epsilon", "v_prediction"):
                changes = {"prediction_type": prediction, "sample_max_value": limit}
                self.check_reloaded(kind, tmp_path, thresholding=True, **changes)

    @pytest.mark.parametrize("t", [1, 10, 49])
    def test_time_indices(self, kind, tmp_path, t):
        self.check_reloaded(kind, tmp_path, t)

    @pytest.mark.parametrize("t, steps", [(1, 10), (10, 50), (50, 500)])
    def test_inference_steps(self, kind, tmp_path, t, steps):
        self.check_reloaded(kind, tmp_path, t, steps=steps)

    @pytest.mark.parametrize("t, eta", [(1, 0.0), (10, 0.5), (49, 1.0)])
    def test_eta(self, kind, tmp_path, t, eta):
        self.check_reloaded(kind, tmp_path, t, options={"eta": eta})

    @pytest.mark.parametrize(
        "t, previous, variance",
        [(0, 0, 0.0), (420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)],
    )
    def test_variance(self, kind, t, previous, variance):
        assert abs(float(self.make(kind)._get_variance(t, previous)) - variance) < 1e-5

    @pytest.mark.parametrize(
        "changes, total, mean",
        [
            pytest.param({}, 172.0067, 0.223967, id="test_full_loop_no_noise"),
            pytest.param({"prediction_type": "v_prediction"}, 52.5302, 0.0684, id="test_full_loop_with_v_prediction"),
            pytest.param(
                {"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295, 0.1951,
                id="test_full_loop_with_set_alpha_to_one",
            ),
            pytest.param(
                {"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784, 0.1941,
                id="test_full_loop_with_no_set_alpha_to_one",
            ),
        ],
    )  # fmt: skip
    def test_full_loop(self, kind, changes, total, mean):
        got_total, got_mean = self.full_loop(kind, **changes)
        assert abs(got_total - total) < 1e-2
        assert abs(got_mean - mean) < 1e-3

    def test_full_loop_with_noise(self, kind):
        scheduler = self.make(kind)
        scheduler.set_timesteps(10)
        timesteps = scheduler.timesteps[8 * scheduler.order :]
        x = scheduler.add_noise(fixed_sample(), fixed_noise(), timesteps[:1])
        for t in timesteps:
            x = scheduler.step(model(x, t), t, x, 0.0).prev_sample
        assert abs(float(x.abs().sum()) - 354.5418) < 1e-2
        assert abs(float(x.abs().mean()) - 0.4616) < 1e-3
