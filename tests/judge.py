"""An independent judge of digits: a small convolutional classifier of real MNIST, whose weights lie beside this module.

    python -m tests.judge MNIST

trains it anew on the folder MNIST, which takes the better part of a minute, and writes judge.safetensors.
"""

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastddpm.pictures.data import load_images, read_idx

WEIGHTS = Path(__file__).with_suffix(".safetensors")
"""In half precision. Who trusts them may: they are asked for all of MNIST's test set before they judge."""


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10),
    )  # fmt: skip


def trained(mnist: Path) -> nn.Module:
    """The classifier of unit pictures [n, 1, 28, 28], trained on MNIST's training set."""
    data = load_images(mnist)
    assert data.labels is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _network().train()
        epochs, batch = 3, 128
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        steps = epochs * len(data.images) // batch
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(data.images)).split(batch)[: len(data.images) // batch]:
                loss = F.cross_entropy(network(data.images[rows].float() / 255), data.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    return network.eval()


def accuracy(network: nn.Module, mnist: Path) -> float:
    """The part of MNIST's test set that a classifier reads rightly."""
    images = torch.from_numpy(read_idx(mnist / "t10k-images-idx3-ubyte.gz").copy())[:, None].float() / 255
    labels = torch.from_numpy(read_idx(mnist / "t10k-labels-idx1-ubyte.gz").copy())
    return float((classify(network, images) == labels).float().mean())


@functools.cache
def judge(mnist: Path) -> tuple[nn.Module, float]:
    """The trained classifier of unit pictures [n, 1, 28, 28], and its accuracy on MNIST's test set."""
    network = _network()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    network.eval()
    return network, accuracy(network, mnist)


@torch.no_grad()
def classify(network: nn.Module, pictures: Tensor) -> Tensor:
    """The digit that the judge sees in each unit picture [n, 1, 28, 28]."""
    return network(pictures).argmax(1)


if __name__ == "__main__":
    save_file({name: value.half() for name, value in trained(Path(sys.argv[1])).state_dict().items()}, WEIGHTS)
