"""The shipped checkpoint's digits, by the features of a classifier of real ones: near to them."""

import pytest
import torch
from torch import nn

from fastddpm import Sampler
from fastddpm.evaluate import Evaluator, Features, SampledPictures, open_set
from fastddpm.evaluate.sets import PictureSet
from tests.helpers import mnist_dir
from tests.judge import judge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def features():
    """The classifier's last hidden layer: 128 numbers."""
    network, accuracy = judge(mnist_dir())
    assert accuracy > 0.97
    hidden = nn.Sequential(*list(network)[:-2]).eval()
    return Features("judge", "", lambda pictures: hidden(pictures.float() / 255), torch.device("cpu"))


def test_drawn_digits_are_near_real_ones(features):
    sampler = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    reference = open_set(mnist_dir() / "t10k-images-idx3-ubyte.gz")
    evaluator = Evaluator(reference, features)

    def measured(steps):
        drawn = SampledPictures(sampler, 200, 0, range(10), {"solver": "dpmpp_2m", "steps": steps, "progress": False})
        return evaluator.measure(PictureSet(drawn.source, drawn))

    few, enough = measured(3), measured(12)
    real = Evaluator(reference, features, metrics=["fd"]).measure(open_set(mnist_dir()))  # the training pictures
    print(f"FD of real digits {real.fd:.4f}, of drawn ones {enough.fd:.4f}, in 3 steps {few.fd:.4f}")
    print(enough.kid, enough.prdc, few.kid, few.prdc)
    assert real.fd < enough.fd < few.fd
    assert enough.prdc.precision > 0.5 and enough.prdc.recall > 0.5
    assert enough.kid.mean < few.kid.mean
