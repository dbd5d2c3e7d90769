"""Runs of shards that the tests of this folder share: a network of one convolution, few steps."""

import dataclasses
import random
from pathlib import Path

import torch

from fastddpm.process.method import Method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampler import Sampler
from fastddpm.shards.formats import FormatName
from fastddpm.shards.maker import Maker, Recipe
from fastddpm.shards.part import Part
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done, Worker
from tests.networks import SPEC

PLAN = Plan(n=22, shard_size=5, first_id=3)
WHOLE = Part()
RECIPE = Recipe(PLAN, method=Method("ddpm", 2), classes=(2, 0, 1), seed=7, batch_size=3)


class Small(torch.nn.Module):
    """The smallest network whose output depends on all that it is given."""

    def __init__(self, labels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.label = torch.nn.Embedding(labels, 64)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        shift = 0 if y is None else self.label(y).view(-1, 1, 8, 8)
        return self.conv(x) + shift * (1 + t.view(-1, 1, 1, 1) / 40)


def small_sampler(T: int = 40, **spec: object) -> Sampler:
    """A sampler on `Small`; keyword arguments change the conventions."""
    return Sampler(Small(), NoiseSchedule.linear(T), dataclasses.replace(SPEC, **spec), device="cpu")


class Silent:
    """Keeps what a worker reports."""

    def __init__(self) -> None:
        self.pictures, self.waits = 0, 0

    def there(self, pictures: int) -> None:
        self.pictures += pictures

    def waiting(self, shards: int) -> None:
        self.waits += 1


def maker(out: object, format: FormatName = "npz", sampler=None, **changes: object) -> Maker:
    """A maker of the usual run, with changes."""
    recipe = dataclasses.replace(RECIPE, format=format, **changes)
    return Maker(sampler or small_sampler(), recipe, Store(str(out)))


def work(made: Maker, part: Part = WHOLE, **options: object) -> Done:
    """Let a worker finish a run."""
    return Worker(made, part, Silent(), **options).run()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def some_order(seed: int, shards: int) -> list[int]:
    """The numbers of all shards in an order of its own."""
    return random.Random(seed).sample(range(shards), shards)
