"""An independent judge of digits: a small convolutional classifier trained on real MNIST when the tests run."""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.pictures.data import load_images, read_idx


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10),
    )  # fmt: skip


@functools.cache
def judge(mnist: Path) -> tuple[nn.Module, float]:
    """The trained classifier of unit pictures [n, 1, 28, 28], and its accuracy on MNIST's test set."""
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
    network.eval()
    images = torch.from_numpy(read_idx(mnist / "t10k-images-idx3-ubyte.gz").copy())[:, None].float() / 255
    labels = torch.from_numpy(read_idx(mnist / "t10k-labels-idx1-ubyte.gz").copy())
    return network, float((classify(network, images) == labels).float().mean())


@torch.no_grad()
def classify(network: nn.Module, pictures: Tensor) -> Tensor:
    """The digit that the judge sees in each unit picture [n, 1, 28, 28]."""
    return network(pictures).argmax(1)
