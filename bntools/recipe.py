"""The edits that a surgery makes, as data, and the one way in which they are applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import LoadError, SurgeryError
from bntools.modules import get_module, replace_modules
from bntools.registry import norm_rule

__all__ = ["RECIPE_VERSION", "Edit", "Recipe", "apply_edits", "mark", "recipe_of", "set_tensors"]

RECIPE_VERSION = 1
_KEY = "bntools_recipe"


@dataclass(frozen=True)
class Edit:
    """One change of the architecture.

    `kind` is "add-bias" (the layer at `path` gains a parameter `bias` of `channels` values) or
    "drop-norm" (the norm at `path` becomes its remainder: an Identity, or its drop and activation).
    """

    kind: str
    path: str
    channels: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON data."""
        data: dict[str, Any] = {"edit": self.kind, "path": self.path}
        return data if self.channels is None else {**data, "channels": self.channels}


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
            edits = [Edit(str(e["edit"]), str(e["path"]), e.get("channels")) for e in data["edits"]]
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


def apply_edits(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Carry a recipe out on a model, in place; returns the model, or what takes its place."""
    remainders: dict[str, nn.Module] = {}
    for edit in recipe.edits:
        module = get_module(model, edit.path)
        if edit.kind == "add-bias":
            module._parameters["bias"] = _empty_bias(module, edit)
        elif edit.kind == "drop-norm":
            remainders[edit.path] = _remainder(module)
        else:
            raise SurgeryError(
                f"Cannot apply the edit {edit.kind!r}: this bntools has no such edit."
            )
    return replace_modules(model, remainders)


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
    values = torch.zeros(edit.channels, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _remainder(module: nn.Module) -> nn.Module:
    rule = norm_rule(module)
    left = rule.remainder(module) if rule is not None and rule.remainder is not None else None
    return left if left is not None else nn.Identity().train(module.training)
