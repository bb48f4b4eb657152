"""Folding: a plan becomes a recipe and new tensors, and those a new model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bntools.errors import PlanError, SurgeryError
from bntools.modules import duplicate, get_module, named_tensors
from bntools.planning import Absorption, HostFold, NormFold, absorptions
from bntools.recipe import Edit, Recipe, apply_edits, set_tensors
from bntools.registry import host_rule
from bntools.report import Reason
from bntools.resources import one_thread

__all__ = ["Folded", "fold_copy", "fold_in_place"]


@dataclass(frozen=True)
class Folded:
    """A folded model, the recipe that made it, and how many subnormal values became zero."""

    model: nn.Module
    recipe: Recipe
    flushed: int


def fold_copy(model: nn.Module, folds: Sequence[NormFold]) -> Folded:
    """Carry folds out on a copy in eval mode; the weights that they replace are never copied."""
    tensors, flushed = _absorbed(model, folds)
    old = {name: _tensor(model, name) for name in tensors}
    stand_ins = {id(t): _like(t, tensors[name]) for name, t in old.items() if t is not None}
    stand_ins.update({id(t): t for t in _vanishing(model, folds)})
    try:
        copied = duplicate(model, stand_ins)
    except RecursionError as error:
        raise SurgeryError(f"Cannot copy the model: {error}.") from error
    recipe = _recipe(folds)
    if copied.training:
        copied.eval()
    copied = apply_edits(copied, recipe)
    set_tensors(copied, {name: t for name, t in tensors.items() if old[name] is None})
    return Folded(copied, recipe, flushed)


def fold_in_place(model: nn.Module, folds: Sequence[NormFold]) -> nn.Module:
    """Carry folds out on the model itself; only for a model that nobody else holds."""
    model = apply_edits(model, Recipe(tuple(_pads(folds))))
    for absorption in absorptions(folds).values():
        # one host at a time: the old weights go as the new ones come
        set_tensors(model, _absorb(model, absorption)[0])
    return apply_edits(model, Recipe(tuple(_drops(folds))))


def _recipe(folds: Sequence[NormFold]) -> Recipe:
    gains = {
        host.path: Edit("add-bias", host.path, host.outputs)
        for fold in folds
        for host in fold.hosts
        if host.gains_bias
    }
    return Recipe((*gains.values(), *_pads(folds), *_drops(folds)))


def _pads(folds: Iterable[NormFold]) -> Iterator[Edit]:
    for absorption in absorptions(folds).values():
        before = absorption.before
        if before is not None and before.padding:
            yield Edit("pad-channels", before.path, options={"padding": list(before.padding)})


def _drops(folds: Iterable[NormFold]) -> Iterator[Edit]:
    for fold in folds:
        constants: dict[str, dict[str, list[float]]] = {}
        for path, attribute, *number in fold.layer.neutral:
            constants.setdefault(path, {})[attribute] = number
        for path, numbers in constants.items():
            yield Edit("neutralise", path, options={"constants": numbers})
        if not constants:
            yield Edit("drop-norm", fold.layer.path)


def _absorbed(model: nn.Module, folds: Iterable[NormFold]) -> tuple[dict[str, Tensor], int]:
    """The new tensors by name, and how many values were flushed."""
    tensors: dict[str, Tensor] = {}
    flushed = 0
    for absorption in absorptions(folds).values():
        new, count = _absorb(model, absorption)
        tensors.update(new)
        flushed += count
    return tensors, flushed


def _absorb(model: nn.Module, absorption: Absorption) -> tuple[dict[str, Tensor], int]:
    host = absorption.host
    if host.registered:
        return _absorb_registered(model, absorption), 0
    weight = _tensor(model, host.weight)
    sides = (absorption.before, absorption.after)
    if weight is None or not all(_fits(side, weight) for side in sides if side is not None):
        raise PlanError(f"Cannot fold into {host.path}: the plan is of another model.")
    bias = _tensor(model, host.bias) if host.bias is not None else None
    with torch.no_grad(), one_thread():
        new = absorption.absorbed(weight, bias)
    tensors = {host.weight: new.weight}
    if new.bias is not None and host.bias is not None:
        tensors[host.bias] = new.bias
    pads = absorption.pad_values()
    if pads is not None:
        tensors[f"{host.path}.pad_value".lstrip(".")] = pads.to(weight.device, weight.dtype)
    return tensors, new.flushed


def _fits(side: HostFold, weight: Tensor) -> bool:
    return side.layout.channels(weight) == side.affine.channels


def _absorb_registered(model: nn.Module, absorption: Absorption) -> dict[str, Tensor]:
    """What the host's rule makes of its tensors, one side after the other."""
    host = absorption.host
    module = get_module(model, host.path)
    if absorption.before is None or absorption.after is None:
        tensors = _by_rule(module, host)
    else:
        inner = _by_rule(module, absorption.before)
        module = duplicate(module)
        set_tensors(module, inner)
        tensors = {**inner, **_by_rule(module, absorption.after)}
    prefix = f"{host.path}." if host.path else ""
    return {prefix + attribute: tensor for attribute, tensor in tensors.items()}


def _by_rule(module: nn.Module, host: HostFold) -> dict[str, Tensor]:
    rule = host_rule(module)
    absorb = None if rule is None else rule.before if host.before else rule.after
    if absorb is None:
        raise PlanError(f"Cannot fold into {host.path}: its class is not registered any more.")
    with torch.no_grad():
        new = absorb(module, host.affine)
    if isinstance(new, Reason):
        raise SurgeryError(f"Cannot fold into {host.path}: its rule refuses ({new.value}).")
    tensors = {}
    for attribute, tensor in new.items():
        old = _tensor(module, attribute)
        tensors[attribute] = tensor.to(old.dtype) if old is not None else tensor
    return tensors


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    path, _, attribute = name.rpartition(".")
    module = get_module(model, path)
    found = module._parameters.get(attribute)
    return found if found is not None else module._buffers.get(attribute)


def _like(old: Tensor, new: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _vanishing(model: nn.Module, folds: Iterable[NormFold]) -> Iterable[Tensor]:
    """The tensors of the norms that go; those that others hold as well are copied like any."""
    gone = {id(get_module(model, f.layer.path)) for f in folds if not f.layer.neutral}
    others = {id(t) for _, owner, _, t in named_tensors(model) if id(owner) not in gone}
    for _, owner, _, tensor in named_tensors(model):
        if id(owner) in gone and id(tensor) not in others:
            yield tensor
