"""Method: the option list, which stands once, and the table that it makes."""

import dataclasses
import typing

import pytest
import torch

from fastddpm import Method
from fastddpm.engines.options import SampleOptions, split_options
from fastddpm.process.method import MethodOptions
from fastddpm.process.table import DynamicThreshold
from fastddpm.step.request import RunOptions
from tests.networks import tiny_sampler


def names(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_type_checkers_see_the_same_options():
    assert set(typing.get_type_hints(MethodOptions)) == names(Method)
    assert set(typing.get_type_hints(SampleOptions)) == names(Method) | names(RunOptions) | {"method"}
    for field in dataclasses.fields(Method):
        assert typing.get_type_hints(MethodOptions)[field.name] == typing.get_type_hints(Method)[field.name]


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddpm", "steps": 7, "variance": "fixed_large"},
        {"solver": "ddim", "timesteps": "ddim5", "eta": 0.3, "clipped_eps": "raw"},
        {"solver": "dpmpp_2m", "timesteps": [39, 20, 3], "clip": DynamicThreshold(0.9)},
    ],
    ids=lambda options: options["solver"],
)
def test_a_method_and_its_options_make_the_same_table_and_pictures(options):
    sampler = tiny_sampler()
    one, other = sampler.table(Method(**options)), sampler.table(**options)
    assert torch.equal(one.rows, other.rows) and one.threshold == other.threshold
    labels = {"class_labels": [0, 1], "progress": False}
    assert torch.equal(sampler.sample(2, method=Method(**options), **labels), sampler.sample(2, **options, **labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Method(), "steps": 3}, "steps must be left out beside a method"),
        ({"method": "ddim"}, "method must be a fastddpm.Method, got str"),
        ({"stepz": 3}, "got stepz; mend the name"),
        ({"num_inference_steps": 3}, "it is called steps here"),
        ({"low_res": print}, "it is called condition here"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(TypeError, match=message):
        split_options(options)
