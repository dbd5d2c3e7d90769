"""Small networks and samplers for tests: random, but smooth enough that a run does not amplify rounding."""

import dataclasses

import torch
from torch import Tensor, nn

from fastddpm.nets.unet import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler

CONFIG = UNetConfig(
    sample_size=(8, 8), in_channels=1, out_channels=1, channels=(8, 16), layers=1, attention=(False, True),
    norm_groups=4, num_classes=4,
)  # fmt: skip
ODD_SHAPES = [(3, 7, 9), (1, 27, 27), (3, 5, 5), (1, 1, 1), (1, 1, 3)]
"""Samples whose number of elements is no multiple of four."""
SPEC = ModelSpec(shape=(1, 8, 8), num_classes=3, null_class=3)


def tiny_unet(**options: object) -> UNet:
    """A U-Net with 3 classes and a null class, every parameter random."""
    torch.manual_seed(0)
    network = UNet(dataclasses.replace(CONFIG, **options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.3 if name.startswith(("label_embedding", "time_")) else 0.15
            parameter.normal_(std=scale)
    return network.eval()


def tiny_sampler(T: int = 40, **spec: object) -> Sampler:
    """A sampler on `tiny_unet`; keyword arguments change the conventions."""
    changed = dataclasses.replace(SPEC, **spec)
    learned = changed.variance == "learned_range"
    unet = tiny_unet(out_channels=2 if learned else 1, num_classes=None if changed.num_classes is None else 4)
    return Sampler(unet, NoiseSchedule.linear(T), changed, device="cpu")


def one_level_sampler(T: int = 40, **options: object) -> Sampler:
    """A sampler on a U-Net of one resolution, which compiles and is traced in half the time."""
    unet = tiny_unet(channels=(8,), attention=(True,))
    return Sampler(unet, NoiseSchedule.linear(T), SPEC, device="cpu", **options)


class TwoLayers(nn.Module):
    """A network of somebody's own, told of time and class: what takes long with a U-Net is quick with it."""

    def __init__(self, in_channels: int = 1) -> None:
        """Random weights, always the same; channels beyond the first are a condition's."""
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(in_channels, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.classes = nn.Embedding(4, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The output for x [B, C, H, W], t [B] and y [B]."""
        told = (self.classes(y) + t[:, None] / 400)[:, :, None, None]
        return 0.5 * x[:, :1] + 0.5 * self.last(torch.tanh(self.first(x) + told))


def two_layers_sampler(T: int = 40, **options: object) -> Sampler:
    """A sampler on `TwoLayers`."""
    return Sampler(TwoLayers(), NoiseSchedule.linear(T), SPEC, device="cpu", **options)
