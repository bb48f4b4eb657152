"""Per-channel least squares from moments: `target = weight * base + bias`, in closed form.

Everything is float64. Moments are centred before they are summed, and merged by Chan's formula, so
that a mean of 1e4 beside a deviation of 1e-2 loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["JointMoments", "Line", "Rows", "pieces", "rows_of", "solve"]

_PIECE = 1 << 19
"""Elements that are widened to float64 at a time."""
_ROUNDING = 1e-15


@dataclass(frozen=True, eq=False)
class JointMoments:
    """Moments of pairs (base, target) of each channel, of shape (C,), or (K, C) for K bases.

    `m2_base` and `m2_target` are summed squared deviations from the means, `m_both` their summed
    products; `count` is the number of pairs per channel.
    """

    count: int
    base: Tensor
    target: Tensor
    m2_base: Tensor
    m2_target: Tensor
    m_both: Tensor

    def merge(self, other: JointMoments) -> JointMoments:
        """The moments of both sets of pairs (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        part = other.count / count
        base, target = other.base - self.base, other.target - self.target
        between = self.count * part
        return JointMoments(
            count,
            self.base + base * part,
            self.target + target * part,
            self.m2_base + other.m2_base + base.square() * between,
            self.m2_target + other.m2_target + target.square() * between,
            self.m_both + other.m_both + base * target * between,
        )

    def chosen(self, index: int) -> JointMoments:
        """The moments of one of K bases."""
        return JointMoments(
            self.count,
            self.base[index],
            self.target[index],
            self.m2_base[index],
            self.m2_target[index],
            self.m_both[index],
        )

    def error_of(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The summed squared error of a line, per channel."""
        spread = weight.square() * self.m2_base - 2 * weight * self.m_both + self.m2_target
        off = weight * self.base + bias - self.target
        return (spread + self.count * off.square()).clamp(min=0)

    @property
    def is_finite(self) -> bool:
        """Whether no infinity or NaN has gone in."""
        parts = (self.base, self.target, self.m2_base, self.m2_target, self.m_both)
        return all(bool(part.isfinite().all()) for part in parts)


@dataclass(frozen=True, eq=False)
class Line:
    """The best weight and bias of each channel, and the summed squared error that is left.

    `degenerate` marks channels whose base is constant: their weight is zero, their bias the mean.
    """

    weight: Tensor
    bias: Tensor
    error: Tensor
    degenerate: Tensor


def solve(
    moments: JointMoments,
    *,
    weight: bool = True,
    bias: bool = True,
    least: float = _ROUNDING,
) -> Line:
    """The least-squares line of each channel; without `weight` it is one, without `bias` zero.

    A base whose deviation is less than `least` of its size counts as constant: the weight for it
    would blow up what little varies.

    Example:
        >>> base = torch.tensor([[0.0], [1.0], [2.0]])
        >>> line = solve(rows_of(base, 3 * base - 1).pooled())
        >>> line.weight.item(), line.bias.item(), line.error.item()
        (3.0, -1.0, 0.0)
    """
    count = moments.count
    size = (moments.m2_base / count + moments.base.square()).sqrt()
    spread, both = moments.m2_base, moments.m_both
    if not bias:  # around zero in place of the means
        spread = spread + count * moments.base.square()
        both = both + count * moments.base * moments.target
    flat = (spread / count).sqrt() <= least * size
    slope = torch.where(flat, 0.0, both / torch.where(flat, 1.0, spread))
    if not weight:
        slope = torch.ones_like(slope)
    shift = moments.target - slope * moments.base if bias else torch.zeros_like(slope)
    return Line(slope, shift, moments.error_of(slope, shift), flat)


@dataclass(frozen=True, eq=False)
class Rows:
    """Moments of (base, target) within each sample and channel, of shape (N, C).

    As a normalisation is an affine map within a sample and channel, those of every normalised form
    of the base follow from these.
    """

    positions: int
    base: Tensor
    target: Tensor
    m2_base: Tensor
    m2_target: Tensor
    m_both: Tensor

    def pooled(self) -> JointMoments:
        """The moments of each channel over all samples."""
        base, target = self.base.mean(0), self.target.mean(0)
        off, off_target = self.base - base, self.target - target
        return JointMoments(
            self.base.shape[0] * self.positions,
            base,
            target,
            self.m2_base.sum(0) + self.positions * off.square().sum(0),
            self.m2_target.sum(0) + self.positions * off_target.square().sum(0),
            self.m_both.sum(0) + self.positions * (off * off_target).sum(0),
        )

    def mapped(self, scale: Tensor, centre: Tensor | float = 0.0) -> Rows:
        """The moments with `(base - centre) * scale` as the base, each of shape (N, C)."""
        return replace(
            self,
            base=(self.base - centre) * scale,
            m2_base=self.m2_base * scale.square(),
            m_both=self.m_both * scale,
        )

    def statistics(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the base over groups of channels, for every channel."""
        samples, channels = self.base.shape
        means = self.base.view(samples, groups, -1)
        centre = means.mean(2, keepdim=True)
        m2 = self.m2_base.view(samples, groups, -1) / self.positions
        variance = (m2 + (means - centre).square()).mean(2, keepdim=True)
        return (
            centre.expand_as(means).reshape(samples, channels),
            variance.expand_as(means).reshape(samples, channels),
        )

    def normalised(self, groups: int, eps: float) -> Rows:
        """The moments with the group-normalised base in its place."""
        centre, variance = self.statistics(groups)
        return self.mapped((variance + eps).rsqrt(), centre)


def rows_of(base: Tensor, target: Tensor) -> Rows:
    """The moments within each sample and channel of tensors of shape (N, C) or (N, C, ...)."""
    x, y = _widened(base), _widened(target)
    mean_x, mean_y = x.mean(2), y.mean(2)
    x, y = x - mean_x.unsqueeze(2), y - mean_y.unsqueeze(2)
    return Rows(
        x.shape[2],
        mean_x,
        mean_y,
        torch.einsum("ncp,ncp->nc", x, x),
        torch.einsum("ncp,ncp->nc", y, y),
        torch.einsum("ncp,ncp->nc", x, y),
    )


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one batch in pieces of some samples each."""
    each = max(1, tensors[0][:1].numel())
    rows = max(1, _PIECE // each)
    for start in range(0, tensors[0].shape[0], rows):
        yield tuple(t[start : start + rows] for t in tensors)


def _widened(tensor: Tensor) -> Tensor:
    if tensor.device.type == "mps":  # it has no float64
        tensor = tensor.cpu()
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1).double()
