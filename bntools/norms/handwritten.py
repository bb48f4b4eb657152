"""Batch norms and affines that are written by hand: taken out of use, or made an nn.BatchNorm.

Their tensors are parameters, buffers or plain attributes, of any shape with one value per channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bntools.norms.frozen import freeze_module

__all__ = ["constant_like", "neutralised", "to_batch_norm_module"]

_CLASSES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_NEAR = 4
_ROLES = {
    "mean": "running_mean", "variance": "running_var", "gamma": "weight", "beta": "bias",
}  # fmt: skip


def constant_like(tensor: Tensor, value: float, plus: float = 0.0) -> Tensor:
    """A tensor of one number v, in the shape and dtype of another, for which `v + plus == value`.

    The sum is the one that the dtype rounds; where no number near gives it, v is the nearest.
    """
    start = torch.tensor(value - plus, dtype=tensor.dtype, device="cpu")
    wanted = torch.tensor(value, dtype=tensor.dtype, device="cpu")
    found = start
    for step in range(2 * _NEAR + 1):
        near = start
        for _ in range((step + 1) // 2):
            near = torch.nextafter(near, near.new_tensor(math.inf if step % 2 else -math.inf))
        if bool(near + plus == wanted):
            found = near
            break
    return torch.full_like(tensor.detach(), float(found))


def neutralised(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Give constants of a module, in place, numbers with which it does nothing.

    The option `constants` has for each attribute two numbers, `value` and `plus`, of
    `constant_like`. Raises TypeError or ValueError for others.
    """
    constants = options.get("constants")
    if not isinstance(constants, Mapping) or not constants:
        raise TypeError("the recipe names no constants")
    for name, wanted in constants.items():
        numbers = wanted if isinstance(wanted, (list, tuple)) else ()
        if len(numbers) != 2 or not all(type(n) in (int, float) for n in numbers):
            raise TypeError(f"the recipe has no numbers for {name!r}")
        value, plus = (float(number) for number in numbers)
        if not (math.isfinite(value) and math.isfinite(plus)):
            raise ValueError(f"the recipe has no finite numbers for {name!r}")
        _set(module, name, constant_like(_held(module, name), value, plus))
    return module


def _held(module: nn.Module, name: Any) -> Tensor:
    """A tensor that a module holds itself, registered or not."""
    for table in (module._parameters, module._buffers, module.__dict__):
        found = table.get(name) if isinstance(name, str) else None
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
    raise TypeError(f"there is no tensor {name!r} in it")


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        grad = module._parameters[name].requires_grad  # type: ignore[union-attr]  # `_held` saw it
        module._parameters[name] = nn.Parameter(tensor, requires_grad=grad)
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        module.__dict__[name] = tensor


def to_batch_norm_module(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The nn.BatchNorm that does what a hand-written one does.

    The options `dims` (1, 2 or 3), `eps` and `momentum` are those of the new layer, which has
    copies of the tensors that `mean`, `variance`, `gamma` and `beta` name; without the last two it
    has no affine. `offset` is added to gamma; a `frozen` one keeps to its statistics. Raises
    TypeError or ValueError for others.
    """
    cls = _CLASSES.get(options.get("dims", 0))
    eps, momentum = (options.get(name) for name in ("eps", "momentum"))
    if cls is None or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError("the recipe has no such batch norm")
    if momentum is not None and (not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1):
        raise ValueError(f"the recipe has a momentum of {momentum!r}")
    tensors = {
        role: _held(module, options[role]).detach().flatten().clone()
        for role in _ROLES
        if options.get(role) is not None
    }
    sizes = {len(tensor) for tensor in tensors.values()}
    if not {"mean", "variance"} <= tensors.keys() or len(sizes) != 1:
        raise ValueError("it has no mean and variance of one value per channel")
    like = tensors["variance"]
    affine = "gamma" in tensors or "beta" in tensors
    made = cls(sizes.pop(), eps, momentum, affine=affine, device=like.device, dtype=like.dtype)
    tensors.setdefault("gamma", torch.ones_like(like)).add_(_number(options, "offset"))
    tensors.setdefault("beta", torch.zeros_like(like))
    for role, tensor in tensors.items():
        if affine or role not in ("gamma", "beta"):
            _set(made, _ROLES[role], tensor.to(like.dtype))
    for role in ("gamma", "beta") if affine else ():
        held = _held(module, options[role]) if options.get(role) is not None else None
        trained = held is not None and held.requires_grad
        made._parameters[_ROLES[role]].requires_grad_(trained)  # type: ignore[union-attr]  # affine
    made.train(module.training)
    return freeze_module(made) if options.get("frozen") else made


def _number(options: Mapping[str, Any], name: str) -> float:
    number = options.get(name, 0.0)
    if type(number) not in (int, float) or not math.isfinite(number):
        raise ValueError(f"the recipe has no finite {name}")
    return float(number)
