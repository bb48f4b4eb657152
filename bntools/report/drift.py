"""How far running statistics have moved, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerDrift", "Spread"]


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of a tensor's values; NaN where there is one."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerDrift:
    """The running statistics of one norm layer before and after, summarised over its channels.

    `kl_median` and `kl_max` are the symmetric Kullback-Leibler divergence, in nats, between the
    Gaussian of each channel before and after (the layer's eps added to both variances), and
    `worst_channel` is where it is largest. The means are None for layers that keep none.
    """

    path: str
    kind: str
    channels: int
    mean_before: Spread | None
    mean_after: Spread | None
    variance_before: Spread
    variance_after: Spread
    kl_median: float
    kl_max: float
    worst_channel: int
