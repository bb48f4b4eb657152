"""Teach bntools a norm layer that it does not know: `python samples/custom_norm.py`.

The layer below keeps the logarithm of its standard deviation and a gain in decibels, which no tool
could guess. One call of `register_norm` says what it computes in eval mode; after that it is
inspected, folded and proven like any batch norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bntools


class DecibelNorm(nn.Module):
    """`10 ** (gain / 20) * (x - mean) / exp(log_std) + bias`, per channel of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("log_std", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """A cumulative maximum in its way keeps any tool from seeing through it."""
        scale = torch.pow(10.0, self.gain / 20) * torch.exp(-self.log_std)
        shift = self.bias - self.mean * scale
        index = torch.arange(len(scale), device=x.device).cummax(0).values
        return torch.stack(
            [x[:, i] * scale[i] + shift[i] for i in index.tolist()],  # one channel at a time
            dim=1,
        )


def affine(norm: DecibelNorm) -> bntools.Affine:
    """What the layer does to each channel, in float64."""
    scale = 10 ** (norm.gain.double() / 20) * (-norm.log_std.double()).exp()
    return bntools.Affine(scale, norm.bias.double() - norm.mean.double() * scale)


def network() -> nn.Module:
    """Two convolutions with norms of random statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), DecibelNorm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), DecibelNorm(4)
    )
    for norm in (model[1], model[4]):
        for tensor in (*norm.parameters(), *norm.buffers()):
            nn.init.normal_(tensor.data, std=0.5)
    return model.eval()


def main() -> None:
    """Fold before and after the lesson."""
    model = network()
    print(f"before: {bntools.plan_fold(model).summary()}")
    bntools.register_norm(DecibelNorm, affine=affine)
    result = bntools.fold(model)
    print(f"after: {result.report.summary()}")
    print(result.model)
    if len(result.report.folds) != 2 or not result.report.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
