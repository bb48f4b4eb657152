"""Batch norms and affines that people write by hand, in the spellings that are found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Affine", "CourseBatchNorm", "Frozen", "Functional", "LayerScale", "Normalise", "lenet",
]  # fmt: skip


def batch_norm(x, gamma, beta, moving_mean, moving_var, eps, momentum):
    """The batch norm of a classic course: its mode is that of the gradients."""
    if not torch.is_grad_enabled():
        x_hat = (x - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        assert len(x.shape) in (2, 4)
        if len(x.shape) == 2:
            mean = x.mean(dim=0)
            var = ((x - mean) ** 2).mean(dim=0)
        else:
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        x_hat = (x - mean) / torch.sqrt(var + eps)
        moving_mean = momentum * moving_mean + (1.0 - momentum) * mean
        moving_var = momentum * moving_var + (1.0 - momentum) * var
    return gamma * x_hat + beta, moving_mean.data, moving_var.data


class CourseBatchNorm(nn.Module):
    """Written by hand: gamma and beta are parameters, the moving statistics plain tensors."""

    def __init__(self, channels: int, rank: int, *, buffers: bool = False) -> None:
        super().__init__()
        shape = (1, channels) if rank == 2 else (1, channels, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        if buffers:
            self.register_buffer("moving_mean", torch.zeros(shape))
            self.register_buffer("moving_var", torch.ones(shape))
        else:
            self.moving_mean = torch.zeros(shape)
            self.moving_var = torch.ones(shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.moving_mean.device != x.device:
            self.moving_mean = self.moving_mean.to(x.device)
            self.moving_var = self.moving_var.to(x.device)
        y, self.moving_mean, self.moving_var = batch_norm(
            x, self.gamma, self.beta, self.moving_mean, self.moving_var, eps=1e-5, momentum=0.9
        )
        return y


def lenet(norm=CourseBatchNorm) -> nn.Sequential:
    """The LeNet of the course, with a batch norm after each of its first four layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), norm(6, 4), nn.Sigmoid(), nn.MaxPool2d(2, 2),
        nn.Conv2d(6, 16, 5), norm(16, 4), nn.Sigmoid(), nn.MaxPool2d(2, 2), nn.Flatten(),
        nn.Linear(256, 120), norm(120, 2), nn.Sigmoid(),
        nn.Linear(120, 84), norm(84, 2), nn.Sigmoid(),
        nn.Linear(84, 10),
    )  # fmt: skip


class Frozen(nn.Module):
    """The FrozenBatchNorm2d that detectors carry in files of their own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class LayerScale(nn.Module):
    """The layer scale of timm, in place or not."""

    def __init__(self, channels: int, *, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Affine(nn.Module):
    """The learned affine of ResMLP, over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, 1, channels) + 0.5)
        self.beta = nn.Parameter(torch.randn(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Normalise(nn.Module):
    """The normalisation of images, at the start of a model that takes them as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Functional(nn.Module):
    """A convolution and a functional batch norm with tensors of its own, in one module."""

    def __init__(self, before: int, after: int, *, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3)
        self.register_buffer("mean", torch.randn(after))
        self.register_buffer("var", torch.rand(after) + 0.5)
        self.scale = nn.Parameter(torch.rand(after) + 0.5) if affine else None
        self.shift = nn.Parameter(torch.randn(after)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=1e-3))
