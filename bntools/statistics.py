"""Which modules have running statistics, what these mean, and how far two of them are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bntools.errors import PlanError
from bntools.modules import named_modules
from bntools.moments import Statistics, symmetric_kl
from bntools.norms import EvoNormB0, is_frozen
from bntools.report.drift import LayerDrift, Spread

__all__ = [
    "StatisticsRule",
    "TrackedNorm",
    "add_statistics",
    "layer_drift",
    "left_alone",
    "running_statistics",
    "spread",
    "statistics_rule",
    "tracked_norms",
]

BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the base of all has no other name


@dataclass(frozen=True)
class StatisticsRule:
    """How a class keeps running statistics over (N, C, ...), one value per channel.

    `has_mean`: whether it keeps a mean beside the variance; `correction` is 1 where training
    averages Bessel-corrected batch variances, and 0 for biased ones.
    """

    has_mean: bool = True
    correction: int = 1


_BATCH_NORM = StatisticsRule()
_BIASED = StatisticsRule(has_mean=False, correction=0)


def statistics_rule(module: nn.Module) -> StatisticsRule | None:
    """The rule for a module; None for one without running statistics of a batch, or frozen ones.

    They are every subclass of `_BatchNorm` (SyncBatchNorm, lazy ones, timm's BatchNormAct2d), and
    EvoNormB0, which keeps a biased variance and no mean. `track_running_stats=False` has a rule.
    """
    if is_frozen(module):
        return None
    if isinstance(module, BatchNorm):
        return _BATCH_NORM
    if isinstance(module, EvoNormB0) and module.nonlinearity:
        return _BIASED
    return None


@dataclass(frozen=True, eq=False)
class TrackedNorm:
    """A norm layer that has, or could have, running statistics."""

    path: str
    module: nn.Module
    rule: StatisticsRule

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def eps(self) -> float:
        """What the layer adds to the variance."""
        return float(getattr(self.module, "eps", 0.0))

    @property
    def mean(self) -> Tensor | None:
        """The running mean, None where the layer keeps none."""
        return _buffer(self.module, "running_mean") if self.rule.has_mean else None

    @property
    def variance(self) -> Tensor | None:
        """The running variance, None without statistics."""
        return _buffer(self.module, "running_var")

    @property
    def batches(self) -> Tensor | None:
        """`num_batches_tracked`."""
        return _buffer(self.module, "num_batches_tracked")

    @property
    def tracks(self) -> bool:
        """Whether it has the statistics that its rule wants."""
        return self.variance is not None and (self.mean is not None or not self.rule.has_mean)

    def statistics(self) -> Statistics:
        """The running statistics in float64; the mean is 0 for layers that keep none.

        Raises PlanError for a layer without any.
        """
        mean, variance = self.mean, self.variance
        if variance is None or (self.rule.has_mean and mean is None):
            raise PlanError(
                f"Cannot read the statistics of {self.path or 'the model'}: it has no running"
                " statistics (track_running_stats=False). Skip it with --skip."
            )
        wide = variance.detach().double()
        return Statistics(torch.zeros_like(wide) if mean is None else mean.detach().double(), wide)


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    buffers = module._buffers
    found = buffers[name] if name in buffers else None  # noqa: SIM401 - TorchScript has no get
    return None if found is None or is_lazy(found) else found


def tracked_norms(model: nn.Module) -> dict[str, TrackedNorm]:
    """Every norm layer with a rule, by its path, in registration order."""
    found: dict[str, TrackedNorm] = {}
    for path, module in named_modules(model):
        rule = None if isinstance(module, torch.jit.ScriptModule) else statistics_rule(module)
        if rule is not None:
            found[path] = TrackedNorm(path, module, rule)
    return found


def add_statistics(module: Any) -> None:
    """Give a norm layer without running statistics fresh ones: mean 0, variance 1, no batch."""
    weight = module._parameters.get("weight")
    device = None if weight is None else weight.device
    channels = getattr(module, "num_features", None) or weight.numel()
    ones = torch.ones(channels, device=device, dtype=None if weight is None else weight.dtype)
    if isinstance(module, BatchNorm):
        module._buffers["running_mean"] = torch.zeros_like(ones)
    else:
        ones = ones.float()
    module._buffers["running_var"] = ones
    module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=device)
    module.track_running_stats = True


def left_alone(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The layers with running statistics that are not re-estimated: path to (kind, why)."""
    found: dict[str, tuple[str, str]] = {}
    for path, module in named_modules(model):
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            kind = str(getattr(module, "original_name", kind))
        if _buffer(module, "running_var") is None and not is_frozen(module):
            continue
        if is_frozen(module):
            found[path] = (kind, "its statistics are frozen; unfreeze it first")
        elif isinstance(module, torch.jit.ScriptModule):
            found[path] = (kind, "it is compiled by TorchScript; recalibrate before scripting")
        elif statistics_rule(module) is None:
            found[path] = (kind, "its statistics are not those of a batch")
    return found


# ---- drift ---------------------------------------------------------------------------------------


def running_statistics(model: nn.Module) -> dict[str, tuple[str, Tensor | None, Tensor]]:
    """Path to (kind, mean or None, variance) of every layer that has them, float64 on the CPU.

    Frozen layers count as well.
    """
    found: dict[str, tuple[str, Tensor | None, Tensor]] = {}
    for path, module in named_modules(model):
        mean, variance = _buffer(module, "running_mean"), _buffer(module, "running_var")
        if variance is not None:
            kind = str(getattr(module, "original_name", type(module).__name__))
            wide = None if mean is None else mean.detach().cpu().double()
            found[path] = (kind, wide, variance.detach().cpu().double())
    return found


def layer_drift(
    path: str,
    kind: str,
    before: Statistics,
    after: Statistics,
    *,
    eps: float = 0.0,
    has_mean: bool = True,
) -> LayerDrift:
    """How far a layer's statistics have moved."""
    divergence = symmetric_kl(
        before.mean, before.variance, after.mean, after.variance, eps=eps
    ).cpu()
    known = divergence.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return LayerDrift(
        path,
        kind,
        divergence.numel(),
        spread(before.mean) if has_mean else None,
        spread(after.mean) if has_mean else None,
        spread(before.variance),
        spread(after.variance),
        float(divergence.median()),
        float(known.max()),
        int(known.argmax()),
    )


def spread(values: Tensor) -> Spread:
    """The smallest, the median and the largest value."""
    wide = values.detach().double().cpu()
    return Spread(float(wide.min()), float(wide.median()), float(wide.max()))
