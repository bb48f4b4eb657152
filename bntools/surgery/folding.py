"""Folding: a plan becomes a recipe and new tensors, and those a new model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bntools.absorb import absorb_after
from bntools.errors import PlanError, SurgeryError
from bntools.modules import duplicate, get_module, named_tensors
from bntools.planning import HostFold, NormFold
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
    for host in _hosts(folds):
        # one host at a time: the old weights go as the new ones come
        set_tensors(model, _absorb(model, host)[0])
    return apply_edits(model, _recipe(folds, biases=False))


def _recipe(folds: Iterable[NormFold], *, biases: bool = True) -> Recipe:
    edits: dict[tuple[str, str], Edit] = {}
    for fold in folds:
        for host in fold.hosts:
            if host.gains_bias and biases:
                edit = Edit("add-bias", host.path, host.affine.channels)
                edits["add-bias", host.path] = edit
    drops = [Edit("drop-norm", fold.layer.path) for fold in folds]
    return Recipe((*edits.values(), *drops))


def _hosts(folds: Iterable[NormFold]) -> list[HostFold]:
    """Each host once, with the affines of all that folds into it composed in their order."""
    hosts: dict[str, HostFold] = {}
    for fold in sorted(folds, key=lambda each: each.turn):
        for host in fold.hosts:
            known = hosts.get(host.weight)
            affine = known.affine.then(host.affine) if known else host.affine
            bias = host.bias or (known.bias if known else None)
            hosts[host.weight] = replace(host, affine=affine, bias=bias)
    return list(hosts.values())


def _absorbed(model: nn.Module, folds: Iterable[NormFold]) -> tuple[dict[str, Tensor], int]:
    """The new tensors by name, and how many values were flushed."""
    tensors: dict[str, Tensor] = {}
    flushed = 0
    for host in _hosts(folds):
        new, count = _absorb(model, host)
        tensors.update(new)
        flushed += count
    return tensors, flushed


def _absorb(model: nn.Module, host: HostFold) -> tuple[dict[str, Tensor], int]:
    if host.registered:
        return _absorb_registered(model, host), 0
    weight = _tensor(model, host.weight)
    if weight is None or host.layout.channels(weight) != host.affine.channels:
        raise PlanError(f"Cannot fold into {host.path}: the plan is of another model.")
    bias = _tensor(model, host.bias) if host.bias is not None else None
    with torch.no_grad(), one_thread():
        new = absorb_after(weight, bias, host.affine, host.layout)
    tensors = {host.weight: new.weight}
    if new.bias is not None and host.bias is not None:
        tensors[host.bias] = new.bias
    return tensors, new.flushed


def _absorb_registered(model: nn.Module, host: HostFold) -> dict[str, Tensor]:
    module = get_module(model, host.path)
    rule = host_rule(module)
    if rule is None:
        raise PlanError(f"Cannot fold into {host.path}: its class is not registered any more.")
    with torch.no_grad():
        new = rule.after(module, host.affine)
    if isinstance(new, Reason):
        raise SurgeryError(f"Cannot fold into {host.path}: its rule refuses ({new.value}).")
    prefix = f"{host.path}." if host.path else ""
    tensors = {}
    for attribute, tensor in new.items():
        old = _tensor(model, prefix + attribute)
        tensors[prefix + attribute] = tensor.to(old.dtype) if old is not None else tensor
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
    gone = {id(get_module(model, fold.layer.path)) for fold in folds}
    others = {id(t) for _, owner, _, t in named_tensors(model) if id(owner) not in gone}
    for _, owner, _, tensor in named_tensors(model):
        if id(owner) in gone and id(tensor) not in others:
            yield tensor
