"""Norm layers that use their running statistics, whatever mode the model around them is in.

A layer is frozen by giving it another class: it stays the same object, with the same parameters,
buffers, hooks and `state_dict` keys, and an instance of the class that it was. Its `training` flag
is False and cannot be set, so that no forward updates its statistics.
"""

from __future__ import annotations

import types
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bntools.norms import evonorm
from bntools.norms.functional import channel_affine, check_rank, evo_norm_b0

__all__ = [
    "Frozen",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenEvoNorm1dB0",
    "FrozenEvoNorm2dB0",
    "FrozenEvoNorm3dB0",
    "FrozenNorm",
    "FrozenSyncBatchNorm",
    "freeze_module",
    "frozen_class",
    "is_frozen",
    "rebuild",
    "thawed_class",
    "unfreeze_module",
]

for _name in ("channel_affine", "check_rank", "evo_norm_b0"):
    torch.fx.wrap(_name)  # symbolic traces call them whole

_AFFINE = ("weight", "bias", "v")  # and what they are computed of: weight_orig, weight_g
_NAMES = ("FrozenBatchNorm", "FrozenSyncBatchNorm", "FrozenEvoNorm")
_TIMM = "timm.layers.norm_act"


class _Pinned:
    """The `training` flag of a frozen layer: always False; what it is set to is kept aside."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else False

    def __set__(self, module: Any, mode: bool) -> None:  # noqa: FBT001 - a descriptor's signature
        module.__dict__["training"] = False
        module.__dict__["_mode_asked"] = bool(mode)


class Frozen:
    """What all frozen layers have: they never are in training mode, and keep their statistics."""

    training = _Pinned()

    def reset_running_stats(self) -> None:
        """Do nothing: `torch.optim.swa_utils.update_bn` would lose the statistics."""

    def extra_repr(self) -> str:
        """What the layer says when it is not frozen, and what of it is."""
        whole: Any = super()
        what = "statistics and affine" if "_grad_before" in self.__dict__ else "statistics"
        return ", ".join(filter(None, [whole.extra_repr(), f"frozen={what}"]))


class _EvalBatchNorm(Frozen):
    """Batch norm by the running statistics, without a mode to ask for."""

    __constants__ = [*nn.BatchNorm2d.__constants__, "_ranks"]  # noqa: RUF012 - torch's own form
    _ranks = (4, 4)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's norms name it
        """Normalise an input of shape (N, C, ...)."""
        return self._normalised(input)

    def _normalised(self: Any, x: Tensor) -> Tensor:
        check_rank(x.dim(), self._ranks[0], self._ranks[1])
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            momentum=0.0,
            eps=self.eps,
        )


class FrozenBatchNorm1d(_EvalBatchNorm, nn.BatchNorm1d):
    """A BatchNorm1d with fixed statistics."""

    _ranks = (2, 3)


class FrozenBatchNorm2d(_EvalBatchNorm, nn.BatchNorm2d):
    """A BatchNorm2d with fixed statistics.

    Example:
        >>> import torch
        >>> from bntools.norms import FrozenBatchNorm2d
        >>> norm = FrozenBatchNorm2d(4).train()
        >>> _ = norm(torch.rand(2, 4, 3, 3))
        >>> norm.training, norm.running_mean, isinstance(norm, torch.nn.BatchNorm2d)
        (False, tensor([0., 0., 0., 0.]), True)
    """


class FrozenBatchNorm3d(_EvalBatchNorm, nn.BatchNorm3d):
    """A BatchNorm3d with fixed statistics."""

    _ranks = (5, 5)


class FrozenSyncBatchNorm(_EvalBatchNorm, nn.SyncBatchNorm):
    """A SyncBatchNorm with fixed statistics: there is nothing left to synchronise."""

    _ranks = (2, 5)


class _EvalEvoNormB0(Frozen):
    """EvoNorm-B0 by the running variance, without a mode to ask for."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 - as torch's norms name it
        """Normalise and activate an input of shape (N, C, ...)."""
        check_rank(input.dim(), self._ranks[0], self._ranks[1])
        if self.v is None:
            return channel_affine(input, self.weight, self.bias)
        return evo_norm_b0(input, self.v, self.weight, self.bias, self.running_var, eps=self.eps)[0]


class FrozenEvoNorm1dB0(_EvalEvoNormB0, evonorm.EvoNorm1dB0):
    """An EvoNorm1dB0 with a fixed variance."""


class FrozenEvoNorm2dB0(_EvalEvoNormB0, evonorm.EvoNorm2dB0):
    """An EvoNorm2dB0 with a fixed variance."""


class FrozenEvoNorm3dB0(_EvalEvoNormB0, evonorm.EvoNorm3dB0):
    """An EvoNorm3dB0 with a fixed variance."""


class FrozenNorm(Frozen):
    """A frozen layer of a class that bntools has no frozen class for: one is made when needed.

    It is pickled as the class that it was and made again by `rebuild`.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (thawed_class(type(self)),), self.__dict__


_MADE: dict[type[nn.Module], type[nn.Module]] = {
    cls.__bases__[-1]: cls
    for cls in (
        FrozenBatchNorm1d,
        FrozenBatchNorm2d,
        FrozenBatchNorm3d,
        FrozenSyncBatchNorm,
        FrozenEvoNorm1dB0,
        FrozenEvoNorm2dB0,
        FrozenEvoNorm3dB0,
    )
}


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer has running statistics that no forward changes, whatever its mode.

    So are the layers that `bntools.freeze` makes, and those of torchvision, detectron and timm.
    """
    if isinstance(module, Frozen):
        return True
    scripted = str(getattr(module, "original_name", ""))
    names = [scripted, *(cls.__name__ for cls in type(module).__mro__)]
    return any(name.startswith(_NAMES) for name in names)


def frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The frozen class for the class of a layer with running statistics.

    Raises TypeError where the class cannot be subclassed.
    """
    if issubclass(cls, Frozen):
        return cls
    if cls not in _MADE:
        _MADE[cls] = _of_timm(cls) or _new_class(cls)
    return _MADE[cls]


def _of_timm(cls: type[nn.Module]) -> type[nn.Module] | None:
    if cls.__module__ != _TIMM:
        return None
    home = import_module("bntools.norms.frozen_timm")
    found: type[nn.Module] | None = getattr(home, f"Frozen{cls.__name__}", None)
    return found if found is not None and thawed_class(found) is cls else None


def _new_class(cls: type[nn.Module]) -> type[nn.Module]:
    body = {"__module__": __name__, "__doc__": f"A {cls.__name__} with fixed statistics."}
    bases = (FrozenNorm, cls)
    made: type[nn.Module] = types.new_class(
        f"Frozen{cls.__name__}", bases, {}, lambda namespace: namespace.update(body)
    )
    return made


def thawed_class(cls: type) -> type | None:
    """The class that a frozen class was made from; None for other classes."""
    bases = cls.__bases__
    own = len(bases) == 2 and bases[0] in (_EvalBatchNorm, _EvalEvoNormB0, FrozenNorm)
    return bases[-1] if own and issubclass(bases[-1], nn.Module) else None


def rebuild(cls: type[nn.Module]) -> nn.Module:
    """Make an empty frozen layer of a class: how a file names a layer of a class made here.

    Raises TypeError for what is no module class.
    """
    kind: Any = cls
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"expected a class of modules, got {kind!r}")
    made = frozen_class(cls)
    return made.__new__(made)


def freeze_module(module: nn.Module, *, affine: bool = False) -> nn.Module:
    """Freeze one layer, in place, and return it; `affine` also stops its own gradients.

    Raises TypeError for a class that cannot be frozen.
    """
    if not isinstance(module, Frozen):
        mode = bool(module.training)
        object.__setattr__(module, "__class__", frozen_class(type(module)))
        module.__dict__.update(training=False, _mode_asked=mode)
    if affine and "_grad_before" not in module.__dict__:
        own = {name: p for name, p in module._parameters.items() if p is not None}
        own = {name: p for name, p in own.items() if name.partition("_")[0] in _AFFINE}
        module.__dict__["_grad_before"] = {name: p.requires_grad for name, p in own.items()}
        for parameter in own.values():
            parameter.requires_grad_(False)
    return module


def unfreeze_module(module: nn.Module) -> nn.Module:
    """Give a layer back its class, in place, its gradients, and the mode that it was last set to.

    Raises TypeError for a layer that `freeze_module` has not frozen.
    """
    thawed = thawed_class(type(module))
    if thawed is None:
        raise TypeError(f"expected a layer that bntools froze, got a {type(module).__name__}")
    mode = bool(module.__dict__.pop("_mode_asked", False))
    flags = module.__dict__.pop("_grad_before", {})
    object.__setattr__(module, "__class__", thawed)
    module.training = mode
    for name, flag in flags.items():
        parameter = module._parameters.get(name)
        if parameter is not None and flag:  # one that another frozen layer shares was off before
            parameter.requires_grad_(True)
    return module
