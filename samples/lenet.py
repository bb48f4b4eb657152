"""The LeNet of the classic course in three versions, and how it is trained: for `fashion_lenet.py`.

Without batch norm, with one written by hand, and with `nn.BatchNorm1d` and `nn.BatchNorm2d`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

__all__ = ["VERSIONS", "Curve", "HandBatchNorm", "Split", "accuracy", "lenet", "read", "train"]

BATCH = 256
EPS, DECAY = 1e-5, 0.9


class HandBatchNorm(nn.Module):
    """Batch normalisation in tensor arithmetic, for (N, D) and (N, C, H, W).

    It uses the statistics of the batch while gradients are enabled, and moving averages otherwise.
    The averages weight the OLD value with 0.9; `momentum` of PyTorch weights the new one, with 0.1.
    """

    def __init__(self, features: int, dims: int) -> None:
        super().__init__()
        shape = (1, features) if dims == 2 else (1, features, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each feature, or each channel."""
        if not torch.is_grad_enabled():
            normal = (x - self.moving_mean) / torch.sqrt(self.moving_var + EPS)
            return self.gamma * normal + self.beta
        axes = [0] if x.dim() == 2 else [0, 2, 3]
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        with torch.no_grad():
            self.moving_mean.mul_(DECAY).add_((1 - DECAY) * mean)
            self.moving_var.mul_(DECAY).add_((1 - DECAY) * variance)
        return self.gamma * (x - mean) / torch.sqrt(variance + EPS) + self.beta


Norm = Callable[[int, int], nn.Module]
VERSIONS: dict[str, Norm | None] = {
    "without": None,
    "by hand": HandBatchNorm,
    "nn": lambda n, dims: nn.BatchNorm1d(n, EPS) if dims == 2 else nn.BatchNorm2d(n, EPS),
}


def lenet(version: str, seed: int = 0) -> nn.Sequential:
    """Convolutions 6@5x5 and 16@5x5, then 120, 84 and 10 units; sigmoid, Xavier initialisation."""
    norm = VERSIONS[version]
    layers: list[nn.Module] = []
    for before, after in ((1, 6), (6, 16)):
        layers.append(nn.Conv2d(before, after, 5))
        layers += [] if norm is None else [norm(after, 4)]
        layers += [nn.Sigmoid(), nn.MaxPool2d(2, 2)]
    layers.append(nn.Flatten())
    for before, after in pairwise((16 * 4 * 4, 120, 84)):
        layers.append(nn.Linear(before, after))
        layers += [] if norm is None else [norm(after, 2)]
        layers.append(nn.Sigmoid())
    model = nn.Sequential(*layers, nn.Linear(84, 10))
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
    return model


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 28, 28) in [0, 1] and their classes."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> Split:
        """The first of them."""
        return Split(self.images[:count], self.labels[:count])

    def batches(self, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
        """Pairs (images, labels)."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def read(source: str | None, folder: Path) -> tuple[Split, Split]:
    """Fashion-MNIST for training and test: from an .npz, or by torchvision's loader."""
    if source is not None:
        with np.load(source) as arrays:
            parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
        pairs = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in parts]
    else:
        from torchvision.datasets import FashionMNIST  # noqa: PLC0415 - it may download

        sets = [FashionMNIST(folder, train=train, download=True) for train in (True, False)]
        pairs = [(each.data, each.targets) for each in sets]
    train, test = (Split(x.unsqueeze(1).float() / 255, y.long()) for x, y in pairs)
    return train, test


@dataclass
class Curve:
    """What became of each epoch; `speed` is in examples per second of training."""

    loss: list[float]
    train: list[float]
    test: list[float]
    speed: float = 0.0


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of images that are given their class, in eval mode."""
    was, _ = model.training, model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in split.batches(2000))
    model.train(was)
    return hits / len(split.labels)


def train(
    model: nn.Module,
    data: tuple[Split, Split],
    epochs: int,
    progress: Progress,
    *,
    name: str = "",
    rate: float = 1.0,
) -> Curve:
    """SGD on the cross-entropy, with batches of 256 in an order of their own; the model is changed.

    Accuracy on the training set is that of each batch before its step, as in the course.
    """
    curve, spent = Curve([], [], []), 0.0
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
    generator = torch.Generator().manual_seed(0)
    steps = -(-len(data[0].labels) // BATCH)
    task = progress.add_task(f"training {name}", total=epochs * steps)
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data[0].labels), generator=generator)
        loss_sum = hits = 0.0
        start = time.perf_counter()
        for index in order.split(BATCH):
            x, y = data[0].images[index], data[0].labels[index]
            optimizer.zero_grad()
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(y)
            hits += int((out.argmax(1) == y).sum())
            progress.advance(task)
        spent += time.perf_counter() - start
        curve.loss.append(loss_sum / len(order))
        curve.train.append(hits / len(order))
        curve.test.append(accuracy(model, data[1]))
    progress.remove_task(task)
    curve.speed = epochs * len(data[0].labels) / spent
    return curve
