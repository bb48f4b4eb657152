"""Building a layer in the place of a norm: what of the old one carries over."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bntools.affine import Affine
from bntools.errors import TargetError

__all__ = [
    "as_eval_affine",
    "carried",
    "channels_of",
    "eps_of",
    "group_norm",
    "has_no_affine",
    "normalised",
    "place_of",
    "rank_of",
]


def channels_of(norm: nn.Module) -> int:
    """The number of channels that a norm has."""
    found = getattr(norm, "num_features", None)
    for name in () if found else ("weight", "running_var", "running_mean", "bias"):
        tensor = getattr(norm, name, None)
        found = found or (tensor.numel() if isinstance(tensor, Tensor) else None)
    if not found:
        raise TargetError(f"Cannot replace a {type(norm).__name__}: it does not say its channels.")
    return int(found)


def rank_of(norm: nn.Module) -> int:
    """The rank of the maps that a norm takes, by the names of its classes."""
    names = [cls.__name__ for cls in type(norm).__mro__]
    return next((rank for rank in (1, 3) if any(f"{rank}d" in name for name in names)), 2)


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm."""
    return float(getattr(norm, "eps", 1e-5))


def has_no_affine(norm: nn.Module) -> bool:
    """Whether a norm only normalises."""
    return getattr(norm, "weight", None) is None and getattr(norm, "bias", None) is None


def place_of(norm: nn.Module) -> dict[str, Any]:
    """The dtype and device of a norm; its statistics may be wider than its parameters."""
    for name in ("weight", "bias", "running_var", "running_mean"):
        tensor = getattr(norm, name, None)
        if isinstance(tensor, Tensor):
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {}


def group_norm(norm: nn.Module, groups: int, *, affine: bool | None) -> nn.Module:
    """A GroupNorm in the place of a norm."""
    fixed = has_no_affine(norm) and not affine
    new = nn.GroupNorm(
        groups, channels_of(norm), eps=eps_of(norm), affine=not fixed, **place_of(norm)
    )
    return carried(new, norm)


def carried(new: nn.Module, norm: nn.Module, *, fixed: bool = False) -> nn.Module:
    """Give a new layer the affine, the grad flags and the mode of the old one."""
    for name in ("weight", "bias"):
        mine, theirs = new._parameters.get(name), getattr(norm, name, None)
        if mine is None:
            continue
        if isinstance(theirs, Tensor):
            mine.data.copy_(theirs.detach())
            mine.requires_grad_(theirs.requires_grad)
        elif fixed:
            mine.requires_grad_(False)
    return new.train(norm.training)


def as_eval_affine(new: nn.Module, norm: nn.Module) -> None:
    """Let an affine map start as the one that a batch norm with statistics is in eval mode."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    affine = Affine.of_batch_norm(mean, variance, weight, bias, eps=eps_of(norm))
    new._parameters["weight"].data.copy_(affine.scale)  # type: ignore[union-attr] # both are there
    new._parameters["bias"].data.copy_(affine.shift)  # type: ignore[union-attr]


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """What a batch norm gives in eval mode; one without statistics uses those of the batch."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    batch = mean is None or variance is None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return F.batch_norm(x, mean, variance, weight, bias, training=batch, eps=eps_of(norm))
