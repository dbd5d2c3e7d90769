"""Tables and textbook loops refuse options that they do not have, and name themselves."""

import pytest
import torch

from fastddpm import NoiseSchedule
from fastddpm.process import reference
from fastddpm.process.ddpm import ddpm_table
from fastddpm.process.likelihood_table import likelihood_table

SCHEDULE = NoiseSchedule.linear(20)
START = (lambda x, t, y=None: 0 * x, SCHEDULE, torch.zeros(1, 1, 2, 2))
STEPS, NOISE = torch.tensor([9, 5]), torch.zeros(2, 1, 1, 2, 2)
WRONG = [
    (ddpm_table, "ddpm_table", {"final_alpha_to_one": False}),
    (ddpm_table, "ddpm_table", {"foo": 1}),
    (likelihood_table, "likelihood_table", {"prev_timesteps": [3, -1]}),
    (likelihood_table, "likelihood_table", {"final_alpha_to_one": False}),
]


@pytest.mark.parametrize("table, name, options", WRONG, ids=lambda value: getattr(value, "__name__", str(value)))
def test_of_tables(table, name, options):
    with pytest.raises(TypeError, match=f"{name}: options must be .*, got {next(iter(options))}; mend the name"):
        table(SCHEDULE, [9, 5], **options)


LOOPS = {
    "p_mean_variance": lambda **given: reference.p_sample_loop(*START, NOISE, timesteps=STEPS, **given),
    "ddim_sample_loop": lambda **given: reference.ddim_sample_loop(*START, STEPS, **given),
    "dpmpp_2m_sample_loop": lambda **given: reference.dpmpp_2m_sample_loop(*START, STEPS, **given),
}


@pytest.mark.parametrize("name, option", list(zip(LOOPS, ("eta", "variance", "eta"), strict=True)))
def test_of_loops(name, option):
    assert LOOPS[name]().shape == (1, 1, 2, 2)
    with pytest.raises(TypeError, match=f"{name}: options must be .*, got {option}; mend the name"):
        LOOPS[name](**{option: 0.5})
