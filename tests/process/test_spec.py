"""ModelSpec and UNetConfig accept what they describe and refuse all else, in one sentence."""

import dataclasses
import json

import pytest

from fastddpm.nets.config import UNetConfig
from fastddpm.process.spec import ModelSpec
from tests.tiny import SPEC, UNET


@pytest.mark.parametrize("value", [SPEC, ModelSpec((3, 4, 5), "v", "learned_range", None)], ids=["full", "sparse"])
def test_spec_survives_json(value):
    assert ModelSpec.from_dict(json.loads(json.dumps(value.to_dict()))) == value


def test_unet_config_survives_json():
    assert UNetConfig.from_dict(json.loads(json.dumps(UNET.to_dict()))) == UNET


@pytest.mark.parametrize(
    ("variance", "learned"), [("fixed_small", False), ("fixed_large", False), ("learned_range", True)]
)
def test_learned_variance(variance, learned):
    assert ModelSpec((1, 4, 4), variance=variance).learned_variance is learned


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (1, 8)}, {"shape": (1, 8, 0)}, {"shape": (1, 8, 8.0)}, {"shape": (True, 8, 8)}, {"shape": "abc"},
        {"prediction": "noise"}, {"variance": "learned"}, {"clip": 0}, {"clip": -1.0}, {"clip": float("nan")},
        {"clip": "1"}, {"num_classes": 0}, {"num_classes": 2.5}, {"num_classes": 2}, {"null_class": -1},
        {"null_class": False}, {"null_class": 3.0}, {"class_names": ("a", "b")}, {"class_names": "abc"},
        {"class_names": (1, 2, 3)}, {"time_scale": 0}, {"time_scale": float("inf")}, {"clipped_eps": "both"},
    ],
    ids=lambda change: "{}={!r}".format(*next(iter(change.items()))),
)  # fmt: skip
def test_spec_refuses(change):
    (name,) = change
    with pytest.raises(ValueError, match="class_names" if change == {"num_classes": 2} else name):
        dataclasses.replace(SPEC, **change)


@pytest.mark.parametrize(
    "values", [{}, {"prediction": "eps"}, {"shape": [1, 2, 3], "colour": 1}, [], "shape", 7, None], ids=repr
)
def test_spec_refuses_other_json(values):
    with pytest.raises((ValueError, TypeError), match="ModelSpec"):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": (7, 8)}, {"sample_size": (8,)}, {"sample_size": (8, 0)}, {"in_channels": 0},
        {"in_channels": True}, {"in_channels": 1.0}, {"channels": ()}, {"channels": (8, -8)}, {"channels": (8, 6)},
        {"layers": 0}, {"layers": 10**6}, {"attention": (True,)}, {"attention": (0, 1)}, {"up_attention": (True,) * 3},
        {"mid_attention": 1}, {"num_heads": 3}, {"up_num_heads": 3}, {"head_channels": 5}, {"norm_groups": 3},
        {"norm_eps": -1.0}, {"norm_eps": float("nan")}, {"dropout": 1.0}, {"dropout": "0"}, {"scale_shift": None},
        {"attention_order": "kqv"}, {"downsample_padding": "same"}, {"embedding": "rotary"}, {"stem_channels": 0},
        {"stem_channels": 6}, {"num_classes": 0}, {"embedding_shift": 2.0},
    ],
    ids=lambda change: "{}={!r}".format(*next(iter(change.items()))),
)  # fmt: skip
def test_unet_config_refuses(change):
    with pytest.raises((ValueError, TypeError), match="UNetConfig: "):
        dataclasses.replace(UNET, **change)


@pytest.mark.parametrize("values", [{"chanels": [8]}, [], "layers", 7, None], ids=repr)
def test_unet_config_refuses_other_json(values):
    with pytest.raises((ValueError, TypeError), match="UNetConfig"):
        UNetConfig.from_dict(values)


def test_heads_must_divide_the_width_exactly():
    """8 channels in 3 heads would leave 2 channels over, although 8 // 3 = 2 divides 8."""
    with pytest.raises(ValueError, match="num_heads must divide"):
        dataclasses.replace(UNET, num_heads=3)
