"""The edits that a surgery makes, as data, and the one way in which they are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import LoadError, SurgeryError
from bntools.modules import get_module, replace_modules
from bntools.naming import ToFactory, target_from_dict
from bntools.norms.conversion import CHANGES
from bntools.registry import norm_rule
from bntools.rewriting import remove_activation_after

__all__ = ["RECIPE_VERSION", "Edit", "Recipe", "apply_edits", "mark", "recipe_of", "set_tensors"]

RECIPE_VERSION = 1
_KEY = "bntools_recipe"


@dataclass(frozen=True)
class Edit:
    """One change of the architecture.

    `kind` is "add-bias" (the layer at `path` gains a parameter `bias` of `channels` values),
    "drop-norm" (the norm at `path` becomes its remainder: an Identity, or its drop and activation),
    "replace-norm" (the norm becomes what the option `target` builds), "remove-activation" (the
    module at `path` becomes an Identity or, with the option `after`, its forward loses the
    activation after that submodule), "freeze", "unfreeze" and "unsync" (of `bntools.norms`), or
    "add-statistics" (a norm without running statistics gets them). `options` are JSON values by
    name.
    """

    kind: str
    path: str
    channels: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON data."""
        data: dict[str, Any] = {"edit": self.kind, "path": self.path, **self.options}
        return data if self.channels is None else {**data, "channels": self.channels}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """Read JSON data."""
        options = {k: v for k, v in data.items() if k not in ("edit", "path", "channels")}
        return cls(str(data["edit"]), str(data["path"]), data.get("channels"), options)


@dataclass(frozen=True)
class Recipe:
    """A versioned list of edits: applied to a fresh model, it gives a result's architecture."""

    edits: tuple[Edit, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data."""
        return {"version": RECIPE_VERSION, "edits": [edit.to_dict() for edit in self.edits]}

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Read JSON data; raises `LoadError` for data of another version or shape."""
        if not isinstance(data, dict) or data.get("version") != RECIPE_VERSION:
            raise LoadError("Cannot read a recipe of another version. Upgrade bntools.")
        try:
            edits = [Edit.from_dict(edit) for edit in data["edits"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"Cannot read a damaged recipe: {error!r}.") from error
        return cls(tuple(edits))

    def then(self, after: Recipe) -> Recipe:
        """This recipe followed by another one."""
        return Recipe((*self.edits, *after.edits))


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of the surgeries that a model has been through; empty for an original model."""
    data = model.__dict__.get(_KEY)
    return Recipe() if data is None else Recipe.from_dict(data)


def mark(model: nn.Module, recipe: Recipe) -> None:
    """Note on a model, which is ours, the recipe that made it, so that recipes chain."""
    model.__dict__[_KEY] = recipe.to_dict()


def apply_edits(
    model: nn.Module, recipe: Recipe, *, factory: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """Carry a recipe out on a model, in place; returns the model, or what takes its place.

    Edits take effect in their order. `factory` is the one that "replace-norm" edits name where
    their target is none of bntools.
    """
    pending: dict[str, nn.Module] = {}
    last = ""
    for edit in recipe.edits:
        if pending and (edit.kind != last or edit.path in pending):
            model, pending = replace_modules(model, pending), {}
        last = edit.kind
        new = _applied(get_module(model, edit.path), edit, factory)
        if new is not None:
            pending[edit.path] = new
    return replace_modules(model, pending)


def _applied(
    module: nn.Module, edit: Edit, factory: Callable[[nn.Module], nn.Module] | None
) -> nn.Module | None:
    """What takes a module's place; None where it was changed itself."""
    if edit.kind in CHANGES:
        return _changed(module, edit)
    if edit.kind == "drop-norm":
        return _remainder(module)
    if edit.kind == "replace-norm":
        return _replacement(module, edit, factory)
    if edit.kind == "remove-activation" and "after" not in edit.options:
        return nn.Identity().train(module.training)
    if edit.kind == "add-bias":
        module._parameters["bias"] = _empty_bias(module, edit)
    elif edit.kind == "remove-activation":
        remove_activation_after(module, str(edit.options["after"]))
    else:
        raise SurgeryError(f"Cannot apply the edit {edit.kind!r}: this bntools has no such edit.")
    return None


def _changed(module: nn.Module, edit: Edit) -> nn.Module:
    try:
        return CHANGES[edit.kind](module, edit.options)
    except (KeyError, TypeError, ValueError) as error:
        raise SurgeryError(f"Cannot {edit.kind} {edit.path}: {error}.") from error


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers, by name, new contents; their grad flags stay.

    A bias that a layer could have and has not is made.
    """
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = get_module(model, path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
            continue
        like = module._parameters.get(attribute)
        like = like if like is not None else module._parameters.get("weight")
        grad = tensor.is_floating_point() and (like is None or like.requires_grad)
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=grad)


def _empty_bias(module: nn.Module, edit: Edit) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None or edit.channels is None:
        raise SurgeryError(f"Cannot add a bias to {edit.path}: it has no weight beside it.")
    if type(edit.channels) is not int or not 0 < edit.channels <= weight.numel():
        raise SurgeryError(f"Cannot add a bias to {edit.path}: it has no {edit.channels} channels.")
    values = torch.zeros(edit.channels, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _replacement(
    module: nn.Module, edit: Edit, factory: Callable[[nn.Module], nn.Module] | None
) -> nn.Module:
    """The new norm, followed by what the old one did besides, unless the target stands for that."""
    target = target_from_dict(edit.options.get("target"))
    if isinstance(target, ToFactory):
        target = replace(target, factory=factory)
    new = target.build(module)
    rule = norm_rule(module)
    left = rule.remainder(module) if rule is not None and rule.remainder is not None else None
    if left is None or edit.options.get("takes_remainder"):
        return new
    parts = left._modules if type(left) is nn.Sequential else {"remainder": left}
    whole = nn.Sequential()
    for name, part in {"norm": new, **parts}.items():
        whole.add_module(name, part)
    return whole.train(module.training)


def _remainder(module: nn.Module) -> nn.Module:
    rule = norm_rule(module)
    left = rule.remainder(module) if rule is not None and rule.remainder is not None else None
    return left if left is not None else nn.Identity().train(module.training)
