"""An own port of the assertions of diffusers' tests/schedulers/test_schedulers.py (SchedulerCommonTest).

Each test has its counterpart's name and asserts what that asserts, once for diffusers' class and once for ours: the
first shows that the port is faithful, the second that the replacement keeps the contract.
"""

import inspect
import logging

import numpy as np
import pytest
import torch
from diffusers.utils import DummyObject

import fastddpm

BATCH, CHANNELS, SIDE = 4, 3, 8
LOG = logging.getLogger("diffusers.configuration_utils")


def random_sample():
    return torch.rand(BATCH, CHANNELS, SIDE, SIDE)


def _ramp(numbers):
    return (numbers.reshape(CHANNELS, SIDE, SIDE, BATCH) / numbers.numel()).permute(3, 0, 1, 2)


def fixed_sample():
    return _ramp(torch.arange(BATCH * CHANNELS * SIDE * SIDE))


def fixed_noise():
    return _ramp(torch.arange(BATCH * CHANNELS * SIDE * SIDE).flip(-1))


def model(x, t):
    return x * t / (t + 1)


def close(a, b):
    return float((a - b).abs().sum()) < 1e-5


class CommonContract:
    """Mixed into a test class for one scheduler, which says which classes, what configuration and how many steps."""

    classes = ()
    config = {}
    steps = None
    options = {}

    @pytest.fixture(params=["theirs", "ours"])
    def kind(self, request):
        return self.classes[request.param == "ours"]

    def make(self, kind, **changes):
        return kind(**{**self.config, **changes})

    def step(self, scheduler, *arguments, **options):
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.manual_seed(0)
        return scheduler.step(*arguments, **options)

    def saved_and_loaded(self, scheduler, folder):
        scheduler.save_config(folder)
        return type(scheduler).from_pretrained(folder)

    def check_reloaded(self, kind, folder, t=0, *, steps=None, options=None, **changes):
        """check_over_configs and check_over_forward: what was saved and loaded again steps alike."""
        pair = [self.make(kind, **changes)]
        pair.append(self.saved_and_loaded(pair[0], folder))
        x = random_sample()
        outputs = []
        for scheduler in pair:
            if self.steps is not None:
                scheduler.set_timesteps(steps or self.steps)
            scheduler.scale_model_input(x, 0)
            outputs.append(self.step(scheduler, 0.1 * x, t, x, **{**self.options, **(options or {})}).prev_sample)
        assert close(*outputs)

    # ------------------------------------------------------------------ the common tests

    def test_from_save_pretrained(self, kind, tmp_path):
        self.check_reloaded(kind, tmp_path, 1)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
    def test_compatibles(self, kind):
        scheduler = self.make(kind)
        assert scheduler.compatibles
        for compatible in scheduler.compatibles:
            if isinstance(compatible, DummyObject):
                continue  # needs a package that is not installed
            other = compatible.from_config(scheduler.config)
            back = kind.from_config(other.config)
            assert {k: v for k, v in back.config.items() if k in scheduler.config} == dict(scheduler.config)
            extra = {k for k in back.config if k not in scheduler.config}
            assert not extra & set(inspect.signature(kind.__init__).parameters)

    def test_from_pretrained(self, kind, tmp_path):
        scheduler = self.make(kind)
        scheduler.save_pretrained(tmp_path)
        loaded = kind.from_pretrained(tmp_path)
        wanted = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
        assert dict(loaded.config) == wanted

    def test_step_shape(self, kind):
        scheduler, x = self.make(kind), random_sample()
        if self.steps is not None:
            scheduler.set_timesteps(self.steps)
        first = scheduler.step(0.1 * x, 0, x, **self.options).prev_sample
        second = scheduler.step(0.1 * x, 1, x, **self.options).prev_sample
        assert first.shape == second.shape == x.shape

    def test_scheduler_outputs_equivalence(self, kind):
        scheduler, x = self.make(kind), random_sample()
        outputs = []
        for return_dict in (True, False):
            if self.steps is not None:
                scheduler.set_timesteps(self.steps)
            outputs.append(self.step(scheduler, 0.1 * x, 0, x, return_dict=return_dict, **self.options))
        named, plain = outputs
        assert isinstance(plain, tuple) and len(plain) <= len(named.to_tuple())
        for a, b in zip(named.to_tuple(), plain, strict=False):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)

    def test_scheduler_public_api(self, kind):
        scheduler, x = self.make(kind), random_sample()
        assert hasattr(scheduler, "init_noise_sigma")
        assert hasattr(scheduler, "scale_model_input") and hasattr(scheduler, "step")
        assert scheduler.scale_model_input(x, 0.0).shape == x.shape

    def test_add_noise_device(self, kind):
        scheduler, x = self.make(kind), random_sample()
        scheduler.set_timesteps(100)
        t = scheduler.timesteps[5][None]
        assert scheduler.add_noise(scheduler.scale_model_input(x, 0.0), torch.randn_like(x), t).shape == x.shape

    def test_deprecated_kwargs(self, kind):
        takes_any = "kwargs" in inspect.signature(kind.__init__).parameters
        assert takes_any == bool(kind._deprecated_kwargs)

    def test_trained_betas(self, kind, tmp_path):
        scheduler = self.make(kind, trained_betas=np.array([0.1, 0.3]))
        scheduler.save_pretrained(tmp_path)
        assert scheduler.betas.tolist() == kind.from_pretrained(tmp_path).betas.tolist()

    def test_getattr_is_correct(self, kind, caplog):
        scheduler = self.make(kind)
        scheduler.dummy_attribute = 5
        scheduler.register_to_config(test_attribute=5)
        with caplog.at_level(logging.WARNING, logger=LOG.name):
            assert scheduler.dummy_attribute == 5
            assert scheduler.save_pretrained == scheduler.save_pretrained
        assert not caplog.records
        for _ in range(2):
            with pytest.warns(FutureWarning):
                assert scheduler.test_attribute == 5
        with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute 'does_not_exist'"):
            scheduler.does_not_exist  # noqa: B018


OURS = {
    "ddpm": fastddpm.FastDDPMScheduler,
    "ddim": fastddpm.FastDDIMScheduler,
    "dpm": fastddpm.FastDPMSolverMultistepScheduler,
}
