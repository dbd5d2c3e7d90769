"""Neither what a program has set for PyTorch nor what it does to the network may change pictures unnoticed."""

import contextlib

import pytest
import torch
from torch import nn

from fastddpm import ModelSpec, NoiseSchedule, Sampler
from fastddpm.engines.weights import Weights
from tests.engines.common import like
from tests.networks import tiny_sampler, tiny_unet

ASKED = {"class_labels": [0, 1], "solver": "ddpm", "steps": 4, "output": "raw"}


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_is_set_for_all_of_pytorch_does_not_change_pictures(name):
    sampler = tiny_sampler()
    expected = sampler.sample(2, **ASKED)
    for fresh in (sampler, like(sampler, "auto")):
        with SURROUNDINGS[name]():
            got = fresh.sample(2, **ASKED)
        assert torch.equal(got, expected) and got.dtype == torch.float32 and not got.requires_grad
        assert torch.equal(fresh.sample(2, **ASKED), expected)  # what was made then serves afterwards


def test_a_network_that_was_put_back_into_training_samples_as_before_and_trains_on():
    torch.manual_seed(0)
    network = tiny_unet(dropout=0.5)
    sampler = Sampler(network, NoiseSchedule.linear(40), tiny_sampler().spec, device="cpu")
    expected = sampler.sample(2, **ASKED)
    network.train()
    network.mid.eval()
    assert torch.equal(sampler.sample(2, **ASKED), expected)
    assert network.training and network.stem.training and not network.mid.training


CHANGES = {
    "in place": lambda net: net.time_projection.weight.mul_(1.5),
    "load_state_dict": lambda net: net.load_state_dict({k: v * 1.25 for k, v in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({k: v * 1.25 for k, v in net.state_dict().items()}, assign=True),
    "data": lambda net: [p.data.mul_(1.25) for p in net.parameters()],
    "other data": lambda net: [setattr(p, "data", p.data * 1.25) for p in net.parameters()],
    "replaced": lambda net: setattr(net.stem, "weight", nn.Parameter(net.stem.weight * 1.25)),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_noticed(change, precision):
    sampler = Sampler(tiny_unet(), NoiseSchedule.linear(40), tiny_sampler().spec, device="cpu", precision=precision)
    network = sampler.stepper.source
    before = sampler.sample(2, **ASKED)
    with torch.no_grad():
        CHANGES[change](network)
    expected = like(sampler, "eager").sample(2, **ASKED) if precision == "fp32" else None
    if expected is None:
        fresh = Sampler(network, sampler.schedule, sampler.spec, device="cpu", engine="eager", precision=precision)
        expected = fresh.sample(2, **ASKED)
    got = sampler.sample(2, **ASKED)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(got, expected)


def test_weights_that_stay_are_read_no_second_time(monkeypatch):
    network, digests = tiny_unet(), []
    weights = Weights(network)
    first = weights.digest
    monkeypatch.setattr("fastddpm.engines.weights.weights_hash", lambda network: digests.append(1) or first)
    assert not weights.have_changed() and digests == []
    with torch.no_grad():
        network.stem.bias.add_(0.0)  # touched, and the same
    assert not weights.have_changed() and digests == [1]
    assert not weights.have_changed() and digests == [1]


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_bf16_changes_the_network_alone_and_little(engine):
    sampler = tiny_sampler()
    half = like(sampler, engine, precision="bf16")
    assert sampler.model.stem.weight.dtype == torch.float32
    assert half.model.stem.weight.dtype == torch.bfloat16 and half.model.time_mlp[0].weight.dtype == torch.float32
    full, low = (s.sample(8, class_labels=1, steps=10) for s in (sampler, half))
    assert low.dtype == torch.float32
    psnr = -10 * ((full - low) ** 2).flatten(1).mean(1).log10()
    assert psnr.median() > 35 and not torch.equal(full, low)


def test_bf16_of_another_network_is_autocast():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = network, []

        def forward(self, x, t):
            self.seen.append(self.inner[0](x).dtype)
            return self.inner(x)

    net = Net()
    sampler = Sampler(net, NoiseSchedule.linear(20), ModelSpec(shape=(1, 4, 4)), device="cpu", precision="bf16")
    assert sampler.sample(1, steps=2).dtype == torch.float32 and net.seen[0] == torch.bfloat16
    assert network[0].weight.dtype == torch.float32
