"""The edits that a surgery makes, as data, and the one way in which they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bntools.errors import BNToolsError, LoadError, SurgeryError
from bntools.modules import get_module, replace_modules
from bntools.naming import ToFactory, target_from_dict
from bntools.norms.conversion import CHANGES
from bntools.registry import norm_rule
from bntools.rewriting import MERGES, remove_activation_after
from bntools.statistics import add_statistics

__all__ = [
    "RECIPE_VERSION",
    "Edit",
    "Recipe",
    "apply_edits",
    "architecture_of",
    "mark",
    "mark_architecture",
    "recipe_of",
    "set_tensors",
]

RECIPE_VERSION = 1
_KEY = "bntools_recipe"
_ARCH = "bntools_arch"
# Recipes come out of files that nobody vouches for.
_MOST_EDITS = 100_000
_LONGEST = 1_000
_MOST_CHANNELS = 2**63 - 1
_MOST_VALUES = 10_000


_Factory = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Edit:
    """One change of the architecture.

    `kind` is "add-bias" (the layer at `path` gains a parameter `bias` of `channels` values),
    "drop-norm" (the norm at `path` becomes its remainder: an Identity, or its drop and activation),
    "replace-norm" (the norm becomes what the option `target` builds), "remove-activation" (the
    module at `path` becomes an Identity or, with the option `after`, its forward loses the
    activation after that submodule), "merge-branches" and "merge-linear" (of `bntools.rewriting`:
    one layer stands for several), "freeze", "unfreeze", "unsync" and "pad-channels" (of
    `bntools.norms`), or "add-statistics" (a norm without running statistics gets them). `options`
    are JSON values by name.
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
    def from_dict(cls, data: Any) -> Edit:
        """Read JSON data. Raises ValueError, which says what is wrong with it."""
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise ValueError(f"an edit is a {type(data).__name__}")
        kind, path, channels = data.get("edit"), data.get("path"), data.get("channels")
        for name, value in (("edit", kind), ("path", path)):
            if not isinstance(value, str) or len(value) > _LONGEST:
                raise ValueError(f"{name!r} is no short string")
        whole = type(channels) is int and 0 < channels <= _MOST_CHANNELS
        if channels is not None and not whole:
            raise ValueError(f"the channels of {kind} are no count")
        options = {k: v for k, v in data.items() if k not in ("edit", "path", "channels")}
        if _values(options) > _MOST_VALUES:
            raise ValueError(f"the options of {kind} are beyond any sensible size")
        return cls(str(kind), str(path), channels, options)


def _values(value: Any, depth: int = 0) -> int:
    """How many values there are in JSON data; raises ValueError for what is none."""
    if depth > 8:
        raise ValueError("its options nest too deep")
    if isinstance(value, dict):
        keys = sum(_values(key, depth + 1) for key in value)
        return keys + sum(_values(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return 1 + sum(_values(item, depth + 1) for item in value)
    if isinstance(value, str) and len(value) <= _LONGEST:
        return 1
    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63):
        return 1
    if isinstance(value, float) and math.isfinite(value):
        return 1
    raise ValueError(f"an option is a {type(value).__name__} that no recipe has")


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
        version = data.get("version") if isinstance(data, Mapping) else None
        if type(version) is not int or version != RECIPE_VERSION:
            raise LoadError("Cannot read a recipe of another version. Upgrade bntools.")
        edits = data.get("edits")
        if not isinstance(edits, (list, tuple)) or len(edits) > _MOST_EDITS:
            raise LoadError("Cannot read a damaged recipe: it has no list of edits.")
        try:
            return cls(tuple(Edit.from_dict(edit) for edit in edits))
        except ValueError as error:
            raise LoadError(f"Cannot read a damaged recipe: {error}.") from error

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


def architecture_of(model: nn.Module) -> str | None:
    """The name of the architecture that a model was built as, where that is known."""
    name = model.__dict__.get(_ARCH)
    return name if isinstance(name, str) and len(name) <= _LONGEST else None


def mark_architecture(model: nn.Module, name: str) -> None:
    """Note on a model, which is ours, the name of the architecture that it was built as."""
    model.__dict__[_ARCH] = name


def apply_edits(
    model: nn.Module, recipe: Recipe, *, factory: Callable[[nn.Module], nn.Module] | None = None
) -> nn.Module:
    """Carry a recipe out on a model, in place; returns the model, or what takes its place.

    Edits take effect in their order. `factory` is the one that "replace-norm" edits name where
    their target is none of bntools.

    Raises `SurgeryError`, `TargetError` or `PlanError` for edits that are none, and for what does
    not fit the model; it is then half changed.
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


def _applied(module: nn.Module, edit: Edit, factory: _Factory | None) -> nn.Module | None:
    """What takes a module's place; None where it was changed itself."""
    if edit.kind not in _KINDS:
        raise SurgeryError(f"Cannot apply the edit {edit.kind!r}: this bntools has no such edit.")
    try:
        return _KINDS[edit.kind](module, edit, factory)
    except BNToolsError:
        raise
    except Exception as error:  # the module at the path can be of any class
        why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise SurgeryError(
            f"Cannot {edit.kind} {edit.path}: {' '.join(why.split())[:200]}."
        ) from error


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


def _add_bias(module: nn.Module, edit: Edit, _: _Factory | None) -> None:
    weight = module._parameters.get("weight")
    if weight is None or edit.channels is None:
        raise SurgeryError(f"Cannot add a bias to {edit.path}: it has no weight beside it.")
    if type(edit.channels) is not int or not 0 < edit.channels <= weight.numel():
        raise SurgeryError(f"Cannot add a bias to {edit.path}: it has no {edit.channels} channels.")
    if module._parameters.get("bias") is not None:
        raise SurgeryError(f"Cannot add a bias to {edit.path}: it has one.")
    outputs = getattr(module, "out_channels", getattr(module, "out_features", edit.channels))
    if isinstance(module, _LINEAR) and outputs != edit.channels:
        raise SurgeryError(
            f"Cannot add a bias to {edit.path}: it has {outputs} channels, not {edit.channels}."
            " The recipe is of another architecture."
        )
    values = torch.zeros(edit.channels, dtype=weight.dtype, device=weight.device)
    module._parameters["bias"] = nn.Parameter(values, requires_grad=weight.requires_grad)


_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)  # noqa: SLF001 - the base of all has no other name
_BATCH_NORM = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the same


def _check_class(module: nn.Module, edit: Edit, *, home: str, what: str) -> None:
    """Refuse a layer that can be no norm, or no activation: the recipe is of other layers.

    Those of users may be anything, but have no submodules.
    """
    cls = type(module)
    of_torch = cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Module
    known = cls.__module__ == home or isinstance(module, nn.Identity)
    if not known and (of_torch or module._modules):
        raise SurgeryError(
            f"Cannot {edit.kind} {edit.path or 'the model'}: a {cls.__name__} is no {what}. The"
            " recipe is of another architecture."
        )


def _drop_norm(module: nn.Module, edit: Edit, __: _Factory | None) -> nn.Module:
    if not isinstance(module, _BATCH_NORM) and norm_rule(module) is None:
        _check_class(module, edit, home=_BATCH_NORM.__module__, what="norm layer")
    left = _remainder(module)
    new = left if left is not None else nn.Identity().train(module.training)
    return _with_guests(module, new)


def _with_guests(norm: nn.Module, new: nn.Module) -> nn.Module:
    """What takes a norm's place, with the submodules of the norm if torch's class has none itself.

    So it is in a program (`.pt2`), which runs the activation of a fused layer by its path.
    """
    if type(norm).__module__ == nn.BatchNorm2d.__module__:
        for name, child in norm._modules.items():
            if child is not None and name != "parametrizations" and name not in new._modules:
                new.add_module(name, child)
    return new


def _remove_activation(module: nn.Module, edit: Edit, _: _Factory | None) -> nn.Module | None:
    if "after" not in edit.options:
        _check_class(module, edit, home=nn.ReLU.__module__, what="activation")
        return nn.Identity().train(module.training)
    remove_activation_after(module, str(edit.options["after"]))
    return None


def _add_statistics(module: nn.Module, _: Edit, __: _Factory | None) -> None:
    add_statistics(module)


def _replace_norm(module: nn.Module, edit: Edit, factory: _Factory | None) -> nn.Module:
    """The new norm, followed by what the old one did besides, unless the target stands for that."""
    target = target_from_dict(edit.options.get("target"))
    if isinstance(target, ToFactory):
        target = replace(target, factory=factory)
    new = target.build(module)
    left = _remainder(module)
    if left is None or edit.options.get("takes_remainder"):
        return _with_guests(module, new)
    parts = left._modules if type(left) is nn.Sequential else {"remainder": left}
    whole = nn.Sequential()
    for name, part in {"norm": new, **parts}.items():
        whole.add_module(name, part)
    return whole.train(module.training)


def _remainder(module: nn.Module) -> nn.Module | None:
    rule = norm_rule(module)
    return rule.remainder(module) if rule is not None and rule.remainder is not None else None


def _change(module: nn.Module, edit: Edit, _: _Factory | None) -> nn.Module:
    return CHANGES[edit.kind](module, edit.options)


def _merge(module: nn.Module, edit: Edit, _: _Factory | None) -> None:
    MERGES[edit.kind](module, edit.options)


# Each gives what takes the module's place, or None where it has changed it. A further kind of edit
# is a row here, and its function where its surgery is.
_KINDS: dict[str, Callable[[nn.Module, Edit, _Factory | None], nn.Module | None]] = {
    **dict.fromkeys(CHANGES, _change),
    **dict.fromkeys(MERGES, _merge),
    "add-bias": _add_bias,
    "add-statistics": _add_statistics,
    "drop-norm": _drop_norm,
    "remove-activation": _remove_activation,
    "replace-norm": _replace_norm,
}
