"""A network's modules and tensors are those that PyTorch finds, and a run looks for them no more often than it must."""

from torch import nn

from fastddpm.common import progress
from fastddpm.engines import modules, surroundings, weights
from tests.networks import tiny_sampler, tiny_unet


class Odd(nn.Module):
    """Modules and tensors that are there twice, or not at all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.again, self.none, self.inner = self.first, None, nn.Sequential(nn.BatchNorm1d(2), self.first)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.register_module("empty", None)
        self.register_buffer("nothing", None)


def identities(found):
    return sorted(map(id, found))


def test_the_same_modules_and_tensors_are_found_as_by_pytorch():
    for network in (tiny_unet(), Odd(), nn.Identity()):
        assert identities(modules.modules_of(network)) == identities(network.modules())
        assert identities(modules.tensors_of(network)) == identities([*network.parameters(), *network.buffers()])


def test_a_run_looks_through_the_network_twice_and_makes_no_bar_that_nobody_sees(monkeypatch):
    sampler, looks = tiny_sampler(), []
    sampler.sample(2, steps=2)
    for module in (surroundings, modules):
        monkeypatch.setattr(module, "modules_of", lambda network: looks.append(1) or modules_of(network))
    monkeypatch.setattr(progress, "progress_bar", None)
    sampler.sample(2, steps=2, progress=False)
    assert weights.tensors_of is modules.tensors_of and len(looks) == 2


modules_of = modules.modules_of
