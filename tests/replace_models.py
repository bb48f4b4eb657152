"""Blocks whose activations are called in every way that there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "Dropping", "Functional", "Looping", "Odd", "Residual", "Twice"]


class Residual(nn.Module):
    """torchvision's way: one ReLU, in place, at three call sites."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + out
        return self.head(self.relu(out).mean((2, 3)))


class Functional(nn.Module):
    """The activation is a function, with arguments of its own."""

    def __init__(self, function: Any = F.relu, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.function = function
        self.options = options

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.function(self.bn(self.conv(x)), **self.options) * scale


class Twice(nn.Module):
    """A block that is called twice, and a norm in a Sequential below the activation's caller."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.unit(x)) + self.act(x) + self.act(self.unit(2 * x))


class Dropping(nn.Module):
    """What is asked of `training`, as a number and as a branch, has to stay asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)), inplace=True)
        if self.training:
            y = y + 1
        return F.dropout(y, 0.5, self.training)


class Looping(nn.Module):
    """Control flow on values, which no symbolic trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        while y.sum() < 0:
            y = y + 1
        return y


class Odd(nn.Module):
    """A norm with an activation that an EvoNorm does not stand for, or none, or two users."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(3, 3, 1)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        if self.kind == "hand-written swish":
            return y * torch.sigmoid(y)
        if self.kind == "used elsewhere":
            return self.act(y) + y
        if self.kind == "returned":
            return self.act(y), y
        if self.kind == "no activation":
            return self.conv(y)
        if self.kind == "only in training elsewhere":
            return self.act(y) + (self.act(self.conv(x)) if self.training else 0)
        if self.kind == "some calls":
            return self.act(y) + self.bn(x + 1)
        if self.kind == "different activations":
            return self.act(y) + torch.tanh(self.bn(x + 1))
        return self._depending(y)

    def _depending(self, y: Tensor) -> Tensor:
        """What depends on the mode, or on the layers themselves."""
        if self.kind == "another in training":
            return F.relu(y) if self.training else torch.tanh(y)
        if self.kind == "none in training":
            return y if self.training else self.act(y)
        if self.kind == "asked for":
            return self.act(y) * (2 if isinstance(self.act, nn.ReLU) else 1)
        if self.kind == "asks the norm":
            return F.relu(y) * (2 if self.bn.training else 1)
        raise ValueError(self.kind)


MODELS = {"residual": Residual, "functional": Functional, "twice": Twice, "dropping": Dropping}
