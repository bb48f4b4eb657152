"""What users can teach bntools: norm layers and hosts that it does not know.

The built-in entries at the end come in through the same door.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from bntools.affine import Affine
from bntools.report import Reason

__all__ = ["HostRule", "NormRule", "host_rule", "norm_rule", "register_host", "register_norm"]

AffineOf = Callable[[Any], Affine | Reason]
Remainder = Callable[[Any], nn.Module | None]
Absorb = Callable[[Any, Affine], Mapping[str, Tensor] | Reason]


@dataclass(frozen=True)
class NormRule:
    """How a norm class works in eval mode: its affine, what it does besides, its channel axis."""

    affine: AffineOf
    remainder: Remainder | None = None
    channel_dim: int = 1
    when: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class HostRule:
    """How a linear class absorbs an affine after it or before it, and the axes of its channels.

    `channel_dim` is the output's axis, `input_channel_dim` the input's where that is another one.
    """

    after: Absorb
    before: Absorb | None = None
    channel_dim: int = 1
    input_channel_dim: int | None = None

    def input_dim(self, rank: int) -> int:
        """The axis of the channels of an input."""
        own = self.channel_dim if self.input_channel_dim is None else self.input_channel_dim
        return own % rank


_NORMS: dict[str, NormRule] = {}
_HOSTS: dict[str, HostRule] = {}


def register_norm(
    cls: type[nn.Module] | str,
    *,
    affine: AffineOf,
    remainder: Remainder | None = None,
    channel_dim: int = 1,
    when: Callable[[Any], bool] | None = None,
) -> None:
    """Teach bntools a norm layer.

    `affine(module)` returns the per-channel map that the module applies in eval mode (scale and
    shift of shape (C,)), or the `Reason` why it cannot be folded; `remainder(module)` returns a
    module for what it does after that (an activation), or None; `channel_dim` is the axis of C;
    where `when(module)` is False the module is no norm layer to bntools.
    `cls` is a class, or its dotted name where it should not be imported. Subclasses count as long
    as they do not override `forward`.

    Example:
        >>> import torch, bntools
        >>> from torch import nn
        >>> class Scale(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.full((channels, 1, 1), 2.0))
        ...     def forward(self, x):
        ...         return x * self.gain
        >>> bntools.register_norm(
        ...     Scale, affine=lambda m: bntools.Affine(m.gain.flatten(), 0 * m.gain.flatten())
        ... )
    """
    _NORMS[_name(cls)] = NormRule(affine, remainder, channel_dim, when)


def register_host(
    cls: type[nn.Module] | str,
    *,
    after: Absorb,
    before: Absorb | None = None,
    channel_dim: int = 1,
    input_channel_dim: int | None = None,
) -> None:
    """Teach bntools a linear layer of your own.

    `after(module, affine)` returns the new tensors, by the names of the module's parameters and
    buffers, with which `module(x)` gives `affine(old module(x))`, or the `Reason` why it cannot;
    `before(module, affine)` likewise for `module(affine(x))`. The tensors should be computed in
    float64 from the float64 `affine`; they are cast to the dtype that they had. `channel_dim` is
    the axis of the output's channels (-1 for the last), `input_channel_dim` that of the input's
    where it is another one. Without `before` no norm is folded into what comes after it.
    """
    _HOSTS[_name(cls)] = HostRule(after, before, channel_dim, input_channel_dim)


def norm_rule(module: nn.Module) -> NormRule | None:
    """The rule for a module's class, or for the class whose `forward` it inherits."""
    rule = _lookup(_NORMS, module)
    return rule if rule is None or rule.when is None or rule.when(module) else None


def host_rule(module: nn.Module) -> HostRule | None:
    """The rule for a module's class, or for the class whose `forward` it inherits."""
    return _lookup(_HOSTS, module)


def _name(cls: type | str) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


Rule = TypeVar("Rule", NormRule, HostRule)


def _lookup(table: dict[str, Rule], module: nn.Module) -> Rule | None:
    forward = getattr(type(module), "forward", None)
    for cls in type(module).__mro__:
        rule = table.get(_name(cls))
        if rule is not None:
            return rule if getattr(cls, "forward", None) is forward else None
        if cls is nn.Module:
            break
    return None


def _frozen_affine(module: Any) -> Affine:
    return Affine.of_batch_norm(
        module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
    )


def _batch_norm_affine(module: Any) -> Affine | Reason:
    if module.running_mean is None or module.running_var is None:
        return Reason.NO_STATISTICS
    if module.training:
        return Reason.TRAINING_MODE
    return _frozen_affine(module)


def _drop_and_act(module: Any) -> nn.Module | None:
    parts = [(name, getattr(module, name, None)) for name in ("drop", "act")]
    left = [(n, m) for n, m in parts if m is not None and type(m) is not nn.Identity]
    if not left:
        return None
    remainder = nn.Sequential()
    for name, part in left:
        remainder.add_module(name, part)
    return remainder.train(module.training)


for _cls in (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
):
    register_norm(_cls, affine=_frozen_affine)
for _cls in ("BatchNormAct2d", "SyncBatchNormAct"):
    register_norm(
        f"timm.layers.norm_act.{_cls}", affine=_batch_norm_affine, remainder=_drop_and_act
    )
register_norm(
    "timm.layers.norm_act.FrozenBatchNormAct2d", affine=_frozen_affine, remainder=_drop_and_act
)
for _cls in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"):
    register_norm(f"bntools.norms.frozen.Frozen{_cls}", affine=_batch_norm_affine)
for _cls in ("FrozenBatchNormAct2d", "FrozenSyncBatchNormAct"):
    register_norm(
        f"bntools.norms.frozen_timm.{_cls}", affine=_batch_norm_affine, remainder=_drop_and_act
    )
for _cls in ("EvoNormS0", "EvoNormB0"):  # the form that ends a residual branch is an affine alone
    register_norm(
        f"bntools.norms.evonorm.{_cls}",
        affine=lambda module: Affine(module.weight, module.bias),
        when=lambda module: not module.nonlinearity,
    )
