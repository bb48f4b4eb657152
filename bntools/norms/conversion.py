"""Norm layers in the forms of other libraries, and back: FrozenBatchNorm2d, SyncBatchNorm.

The frozen form of torchvision and detectron has its affine in buffers, so that nothing trains it,
and takes (N, C, H, W) only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bntools.norms.frozen import Frozen, freeze_module, thawed_class, unfreeze_module
from bntools.norms.handwritten import neutralised, to_batch_norm_module
from bntools.norms.padding import pad_channels_edit

__all__ = ["CHANGES", "FORMS", "from_frozen_batchnorm", "to_batch_norm", "to_frozen_batchnorm"]

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_VALUES = ("weight", "bias", "running_mean", "running_var")
_EPS = 1e-5  # of the first of them, DETR's, which writes it into its forward


def to_frozen_batchnorm(module: nn.Module) -> nn.Module:
    """The FrozenBatchNorm2d of torchvision for a BatchNorm2d, or timm's for one with activation.

    It is a new layer with copies of the tensors. Raises TypeError for other layers.
    """
    cls = thawed_class(type(module)) or type(module)
    norm: Any = module
    if cls is nn.BatchNorm2d:
        made = import_module("torchvision.ops").FrozenBatchNorm2d(norm.num_features, norm.eps)
    elif cls.__name__ == "BatchNormAct2d":
        timm = import_module("timm.layers.norm_act")
        made = timm.FrozenBatchNormAct2d(norm.num_features, norm.eps)
        made.drop, made.act = norm.drop, norm.act
    else:
        raise TypeError(f"expected a BatchNorm2d, got a {type(module).__name__}")
    for name in _VALUES:
        made._buffers[name] = _values(norm, name)
    frozen: nn.Module = made
    frozen.training = bool(norm.__dict__.get("_mode_asked", norm.training))
    return frozen


def _values(module: nn.Module, name: str) -> Tensor:
    """A copy of a tensor of a batch norm; what the affine would be where it has none."""
    found = getattr(module, name)
    if found is None:
        like: Any = module.running_var
        return torch.zeros_like(like) if name == "bias" else torch.ones_like(like)
    copied: Tensor = found.detach().clone()
    return copied


def from_frozen_batchnorm(module: nn.Module) -> nn.Module:
    """A BatchNorm2d, or timm's with activation, for the frozen form of another library.

    It is a new layer with copies of the tensors, its affine being trainable. Raises TypeError for
    what has no such tensors.
    """
    tensors = [getattr(module, name, None) for name in _VALUES]
    if isinstance(module, Frozen) or any(not isinstance(t, Tensor) or t.ndim != 1 for t in tensors):
        raise TypeError(f"expected a FrozenBatchNorm2d, got a {type(module).__name__}")
    weight, bias, mean, variance = (t.detach().clone() for t in tensors if t is not None)
    eps = float(getattr(module, "eps", _EPS))
    like: Any = {"eps": eps, "device": weight.device, "dtype": weight.dtype}
    if hasattr(module, "act") and hasattr(module, "drop"):
        timm = import_module("timm.layers.norm_act")
        made: Any = timm.BatchNormAct2d(len(weight), **like)
        made.drop, made.act = module.drop, module.act
    else:
        made = nn.BatchNorm2d(len(weight), **like)
    made._parameters["weight"], made._parameters["bias"] = nn.Parameter(weight), nn.Parameter(bias)
    made._buffers["running_mean"], made._buffers["running_var"] = mean, variance
    result: nn.Module = made
    result.training = module.training
    return result


def to_batch_norm(module: nn.Module, dims: int) -> nn.Module:
    """Make a SyncBatchNorm a BatchNorm of 1, 2 or 3 dimensions, in place; frozen ones stay so.

    timm's SyncBatchNormAct becomes a BatchNormAct2d and keeps its activation. Raises TypeError for
    other layers.
    """
    cls = thawed_class(type(module)) or type(module)
    new: type[nn.Module] | None = None
    if cls is nn.SyncBatchNorm and dims in _BATCH_NORMS:
        new = _BATCH_NORMS[dims]
    elif cls.__name__ == "SyncBatchNormAct" and dims == 2:
        new = import_module("timm.layers.norm_act").BatchNormAct2d
        for name in ("drop", "act"):
            if name not in module._modules:
                module.add_module(name, nn.Identity())
    if new is None:
        raise TypeError(f"expected a SyncBatchNorm, got a {type(module).__name__}")
    frozen = isinstance(module, Frozen)
    mode = bool(module.__dict__.get("_mode_asked", module.training))
    object.__setattr__(module, "__class__", new)
    module.__dict__.pop("process_group", None)
    module.__dict__.pop("_mode_asked", None)
    module.training = mode
    return freeze_module(module) if frozen else module


def _frozen(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    if options.get("form", FORMS[0]) == FORMS[0]:
        return freeze_module(module, affine=bool(options.get("affine")))
    if options["form"] not in FORMS:
        raise TypeError(f"there is no form {options['form']!r}")
    return to_frozen_batchnorm(module)


def _unfrozen(module: nn.Module, _: Mapping[str, Any]) -> nn.Module:
    return unfreeze_module(module) if isinstance(module, Frozen) else from_frozen_batchnorm(module)


def _unsynced(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    return to_batch_norm(module, int(options["dims"]))


FORMS = ("bntools", "torchvision")
# What recipes call these changes; each gives what takes the layer's place, or raises TypeError.
CHANGES: dict[str, Callable[[nn.Module, Mapping[str, Any]], nn.Module]] = {
    "freeze": _frozen,
    "unfreeze": _unfrozen,
    "unsync": _unsynced,
    "pad-channels": pad_channels_edit,
    "neutralise": neutralised,
    "to-batchnorm": to_batch_norm_module,
}
