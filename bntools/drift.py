"""The drift of running statistics between two models."""

from __future__ import annotations

from torch import Tensor, nn

from bntools.errors import PlanError
from bntools.modules import get_module
from bntools.moments import Statistics
from bntools.report import Difference, LayerDrift, Uncompared
from bntools.selection import Patterns, select
from bntools.statistics import layer_drift, running_statistics

__all__ = ["diff"]

_Layer = tuple[str, Tensor | None, Tensor]


def diff(a: nn.Module, b: nn.Module, *, only: Patterns = "*", skip: Patterns = ()) -> Difference:
    """How far the running statistics of two models are apart, layer by layer.

    Layers are compared by their paths; frozen ones count. The drift of a channel is the symmetric
    Kullback-Leibler divergence, in nats, between the Gaussians of its two means and variances (the
    layer's eps added to both): the same in both directions, and 0 only where they are equal.

    Raises PlanError where the models have no such layer in common.

    Example:
        >>> import torch, bntools
        >>> old, new = (torch.nn.Sequential(torch.nn.BatchNorm2d(4)) for _ in range(2))
        >>> _ = new[0].running_mean.fill_(2.0)
        >>> print(bntools.diff(old, new).summary())
        1 norm layer compared; the largest drift is at 0, channel 0: symmetric KL 2 (median 2)
    """
    before, after = running_statistics(a), running_statistics(b)
    wanted = select([*before, *(path for path in after if path not in before)], only, skip)
    both = [path for path in before if path in wanted and path in after]
    found = [_compared(path, before[path], after[path], _eps(a, path)) for path in both]
    layers = tuple(each for each in found if isinstance(each, LayerDrift))
    uncompared = [each for each in found if isinstance(each, Uncompared)]
    for side, own, other in (("first", before, after), ("second", after, before)):
        alone = (path for path in own if path in wanted and path not in other)
        uncompared += [Uncompared(path, f"only in the {side}") for path in alone]
    if not layers:
        raise PlanError(
            "Cannot compare the models: they have no norm layer with running statistics in common"
            f" ({_paths(before)} against {_paths(after)})."
        )
    return Difference(layers, tuple(uncompared))


def _compared(path: str, old: _Layer, new: _Layer, eps: float) -> LayerDrift | Uncompared:
    kind, mean, variance = old
    _, new_mean, new_variance = new
    if variance.shape != new_variance.shape or not variance.numel():
        return Uncompared(path, f"{variance.numel()} channels against {new_variance.numel()}")
    if (mean is None) is not (new_mean is None):
        return Uncompared(path, "only one of them keeps a mean")
    before = Statistics(variance.new_zeros(variance.shape) if mean is None else mean, variance)
    after = Statistics(before.mean if new_mean is None else new_mean, new_variance)
    return layer_drift(path, kind, before, after, eps=eps, has_mean=mean is not None)


def _eps(model: nn.Module, path: str) -> float:
    eps = getattr(get_module(model, path), "eps", 0.0)
    return float(eps) if isinstance(eps, (int, float)) else 0.0


def _paths(layers: dict[str, _Layer]) -> str:
    return ", ".join(list(layers)[:3]) + (", ..." if len(layers) > 3 else "") or "none"
