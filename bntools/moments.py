"""Moments of activations, and the estimates of running statistics that are made from them.

Everything is float64, one value per channel. The moments of a batch are exact to rounding in
float64 for any mean and deviation; the estimators are small values that a batch turns into new
ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Cumulative",
    "Ema",
    "Estimator",
    "Moments",
    "Pooled",
    "Statistics",
    "mixed",
    "moments_of",
    "residual",
    "symmetric_kl",
]

_CACHED = 1 << 16
"""Elements of a piece that stays in a CPU core's cache through all its operations."""
_LAUNCHED = 1 << 24
"""Elements of a piece on an accelerator, where a launch costs more than a trip to memory."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviations from it (M2) of each channel.

    `count` is the number of elements per channel, `mean` and `m2` have the shape (C,).
    """

    count: int
    mean: Tensor
    m2: Tensor

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of elements together.

        `d = mean_b - mean_a; mean = mean_a + d * n_b / n; M2 = M2_a + M2_b + d^2 * n_a * n_b / n`
        (Chan, Golub and LeVeque, 1979).

        Example:
            >>> a, b = moments_of(torch.tensor([[1.0], [3.0]])), moments_of(torch.tensor([[8.0]]))
            >>> both = a.merge(b)
            >>> both.count, both.mean.item(), both.m2.item()
            (3, 4.0, 26.0)
        """
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        distance = other.mean - self.mean
        mean = self.mean + distance * (other.count / count)
        between = distance.square() * (self.count * (other.count / count))
        return Moments(count, mean, self.m2 + other.m2 + between)

    def variance(self, correction: int = 0) -> Tensor:
        """`M2 / (n - correction)`: biased (population) with 0, Bessel-corrected with 1."""
        return self.m2 / (self.count - correction)

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device))


def moments_of(x: Tensor, mask: Tensor | None = None) -> Moments:
    """The moments of each channel of an activation of shape (N, C) or (N, C, ...).

    Every element is taken as float64, less a shift near the mean: of a mean of 100 and a deviation
    of 0.01 all digits stay, which `E[x^2] - E[x]^2` in float32 loses. The activation is read once,
    in pieces that fit a cache. `mask` is a boolean tensor of shape (N, ...) without the channel
    axis: only where it is True do elements count.

    Example:
        >>> moments_of(torch.tensor([[1.0, 100.5], [3.0, 101.5]])).variance(correction=1)
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    if x.device.type == "mps":  # it has no float64
        return moments_of(x.cpu(), None if mask is None else mask.cpu())
    channels = x.shape[1]
    last = x.movedim(1, -1)
    if mask is not None:
        x = last[mask]
    elif last.is_contiguous():
        x = last.reshape(-1, channels)
    count = x.numel() // channels if channels else 0
    total = torch.zeros(channels, dtype=torch.float64, device=x.device)
    if not count:
        return Moments(0, total, total.clone())
    axes = [0, *range(2, x.dim())]
    shift = x[: max(1, _CACHED // channels) if x.dim() == 2 else 1].double().mean(axes)
    squares = torch.zeros_like(total)
    for part, piece in _pieces(x):
        values = piece.to(torch.float64, copy=True)
        values.sub_(shift[part].view(-1, *[1] * (x.dim() - 2)))
        total[part] += values.sum(axes)
        squares[part] += values.square_().sum(axes)
    off = total / count
    return Moments(count, shift + off, (squares - total * off).clamp_(min=0))


def _pieces(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """An activation in pieces, each with the channels that it has."""
    most = _CACHED if x.device.type == "cpu" else _LAUNCHED
    channels = x.shape[1]
    sample = x[0].numel()
    if sample <= most:
        for piece in torch.split(x, most // sample):
            yield slice(None), piece
        return
    width = max(1, most * channels // sample)
    for row in range(x.shape[0]):
        for start in range(0, channels, width):
            part = slice(start, start + width)
            yield part, x[row : row + 1, part]


# ---- estimators ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a norm layer normalises with: mean and variance of each channel, of shape (C,)."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class Cumulative:
    """PyTorch's `momentum=None`: the simple average of what the batches give.

    `x_k = x_(k-1) + (z_k - x_(k-1)) / k`, with z the mean and the variance of a batch: Bessel's
    (`correction` 1) for batch norms, which normalise with the biased one; biased (0) for EvoNorm.
    Every batch counts the same, and the variance between batches is lost.
    Source: `torch.nn.BatchNorm2d` and `torch.optim.swa_utils.update_bn`.
    """

    correction: int = 1
    batches: int = 0
    value: Statistics | None = None

    def after(self, batch: Moments) -> Cumulative:
        """The estimate with one batch more."""
        weight = 1 / (self.batches + 1)
        value = _towards(self.value, batch, weight, self.correction)
        return replace(self, batches=self.batches + 1, value=value)


@dataclass(frozen=True, eq=False)
class Ema:
    """The exponential moving average of training: it starts from the statistics that are there.

    `x_k = (1 - momentum) * x_(k-1) + momentum * z_k`, z as in `Cumulative`. After k batches the
    old statistics still weigh `(1 - momentum)^k`, and the order of the batches matters.
    Source: `torch.nn.BatchNorm2d` with a momentum.
    """

    momentum: float
    value: Statistics
    correction: int = 1
    batches: int = 0

    def after(self, batch: Moments) -> Ema:
        """The estimate with one batch more."""
        value = _towards(self.value, batch, self.momentum, self.correction)
        return replace(self, batches=self.batches + 1, value=value)


@dataclass(frozen=True, eq=False)
class Pooled:
    """The moments of all elements, however they come in batches.

    `mean = sum(x) / n; variance = sum((x - mean)^2) / n`: the population variance (biased), which
    includes that between batches; merged by `Moments.merge`. Batch sizes and order do not matter.
    Source: Chan, Golub and LeVeque, 1979.
    """

    moments: Moments | None = None
    batches: int = 0

    @property
    def value(self) -> Statistics | None:
        """Mean and population variance of what has come so far."""
        if self.moments is None:
            return None
        return Statistics(self.moments.mean, self.moments.variance())

    def after(self, batch: Moments) -> Pooled:
        """The estimate with one batch more."""
        merged = batch if self.moments is None else self.moments.merge(batch)
        return replace(self, batches=self.batches + 1, moments=merged)


Estimator = Cumulative | Ema | Pooled


def _towards(old: Statistics | None, batch: Moments, weight: float, correction: int) -> Statistics:
    variance = batch.variance(correction)
    if old is None:
        return Statistics(batch.mean, variance)
    return Statistics(
        old.mean + weight * (batch.mean - old.mean),
        old.variance + weight * (variance - old.variance),
    )


def mixed(source: Statistics, target: Statistics, *, prior: float, samples: float) -> Statistics:
    """Old statistics as so many samples' worth: `(N * source + n * target) / (N + n)`.

    N is `prior`, n the number of samples seen (images, not elements), for mean and variance alike.
    Source: Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", 2020.

    Example:
        >>> old = Statistics(torch.tensor([0.0]), torch.tensor([1.0]))
        >>> new = Statistics(torch.tensor([4.0]), torch.tensor([5.0]))
        >>> mixed(old, new, prior=16, samples=48).mean
        tensor([3.])
    """
    share = samples / (prior + samples)
    return Statistics(
        source.mean + share * (target.mean - source.mean),
        source.variance + share * (target.variance - source.variance),
    )


# ---- distances -----------------------------------------------------------------------------------


def residual(running: Statistics, seen: Statistics, eps: float) -> Tensor:
    """How far the statistics in use are from those of what a layer sees, for each channel.

    The larger of `|mean_running - mean_seen| / sqrt(var_seen + eps)` and
    `|log((var_running + eps) / (var_seen + eps))|`.
    """
    scale = seen.variance + eps
    shift = (running.mean - seen.mean).abs() / scale.sqrt()
    return torch.maximum(shift, ((running.variance + eps) / scale).log().abs())


def symmetric_kl(
    mean_a: Tensor, variance_a: Tensor, mean_b: Tensor, variance_b: Tensor, *, eps: float = 0.0
) -> Tensor:
    """The mean of both Kullback-Leibler divergences between two Gaussians, for each channel.

    `((v_a + d^2) / v_b + (v_b + d^2) / v_a - 2) / 4` in nats, with `d = mean_a - mean_b` and
    `v = variance + eps`: with a layer's eps it compares what the layer normalises with, and
    channels of no variance compare too.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> symmetric_kl(zero, one, one, one)
        tensor([0.5000])
    """
    squared = (mean_a - mean_b).square()
    a, b = variance_a + eps, variance_b + eps
    return ((a + squared) / b + (b + squared) / a - 2) / 4
