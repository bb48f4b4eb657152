"""Whether enough data has been seen: confidence intervals of every channel's statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bntools.moments import Moments

__all__ = ["Confidence"]

_LEAST_BATCHES = 5


@dataclass(eq=False)
class Confidence:
    """The 95 % interval of one layer's mean and variance, from how far its batches differ.

    Batches are the units: the elements of an image are far from independent. The half-width is
    `t * s / sqrt(k)` with k batches, s the deviation of the batch means (of the batch's second
    moments about the first batch's mean for the variance) and t Student's quantile. This holds for
    batches drawn at random, not for a loader sorted by class.
    Source: the method of batch means (Law, "Simulation Modeling and Analysis", ch. 9).
    """

    eps: float
    pooled: Moments | None = None
    shift: Tensor | None = None
    means: Moments | None = None
    seconds: Moments | None = None

    def add(self, batch: Moments) -> None:
        """Count one batch."""
        shift = batch.mean if self.shift is None else self.shift
        second = batch.variance() + (batch.mean - shift).square()
        zeros = torch.zeros_like(shift)
        mean, spread = Moments(1, batch.mean, zeros), Moments(1, second, zeros)
        self.means = mean if self.means is None else self.means.merge(mean)
        self.seconds = spread if self.seconds is None else self.seconds.merge(spread)
        self.pooled = batch if self.pooled is None else self.pooled.merge(batch)
        self.shift = shift

    def error(self) -> float:
        """The widest half-width: of a mean in deviations, of a variance relative to it.

        Both are measured against `variance + eps`; infinite before there are five batches.
        """
        if self.means is None or self.seconds is None or self.pooled is None:
            return float("inf")
        batches = self.means.count
        if batches < _LEAST_BATCHES:
            return float("inf")
        width = student(batches - 1) / math.sqrt(batches)
        scale = self.pooled.variance() + self.eps
        mean = (self.means.variance(1) / scale).sqrt().max()
        variance = (self.seconds.variance(1).sqrt() / scale).max()
        return width * float(torch.maximum(mean, variance))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.5 % from 4 degrees of freedom on.

    Source: the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).

    Example:
        >>> round(student(4), 2), round(student(1000), 3)
        (2.77, 1.962)
    """
    z = 1.959964
    quantile: float = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return quantile
