"""Targets by name: those of the command line and of recipes, and factories of the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from bntools.building import place_of
from bntools.errors import TargetError
from bntools.imports import import_object
from bntools.targets import (
    Target,
    ToEvoNormB0,
    ToEvoNormS0,
    ToGroupNorm,
    ToInstanceNorm,
    ToLayerNorm,
)

__all__ = ["ToFactory", "named_target", "target_from_dict", "target_of"]


@dataclass(frozen=True)
class ToFactory(Target):
    """Whatever `factory(norm)` makes of the norm that it replaces; `name` is where it is found.

    What it returns is moved to the dtype, device and mode of the old norm, and not changed
    otherwise.
    """

    path: str = ""
    factory: Callable[[nn.Module], nn.Module] | None = field(default=None, repr=False)

    def build(self, norm: nn.Module, activation: nn.Module | None = None) -> nn.Module:
        """What the factory gives. Raises TargetError where that is no module."""
        del activation
        if self.factory is None:
            raise TargetError(
                f"Cannot apply a recipe with the factory {self.path}: a recipe runs no code of"
                " others. Replace the layers again with bntools.replace."
            )
        try:
            new: Any = self.factory(norm)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise TargetError(f"Cannot build a layer with {self.path}: it raised {why}.") from error
        if not isinstance(new, nn.Module) or new is norm:
            what = "the old layer" if new is norm else f"a {type(new).__name__}"
            raise TargetError(
                f"Cannot build a layer with {self.path}: it gave {what}. It is called with the"
                " old norm and returns a new nn.Module."
            )
        place = place_of(norm)
        return new.to(device=place.get("device"), dtype=place.get("dtype")).train(norm.training)

    def to_dict(self) -> dict[str, Any]:
        """The name of the factory."""
        return {"name": self.path}


def named_target(
    name: str,
    *,
    groups: int | Literal["auto"] | None = None,
    channels_per_group: int | None = None,
    over: str | None = None,
) -> Target:
    """The target of a name: those of the command line, or "package.module:factory".

    Options that are None are those of the target by default. Raises TargetError for an unknown
    name and for options that the target has not, LoadError where a factory cannot be imported.

    Example:
        >>> import bntools
        >>> bntools.named_target("layernorm", over="channels")
        ToLayerNorm(over='channels', affine=None)
    """
    options = {"groups": groups, "channels_per_group": channels_per_group, "over": over}
    given = {key: value for key, value in options.items() if value is not None}
    cls = _TARGETS.get(name)
    unknown = [key for key in given if cls is None or key not in {f.name for f in fields(cls)}]
    if cls is None and ":" not in name:
        raise TargetError(_unknown(name))
    if unknown:
        option = unknown[0].replace("_", "-")
        raise TargetError(
            f"Cannot replace norms with {name} and --{option}: it has no such option."
        )
    return cls(**given) if cls is not None else _factory(name)


def _factory(name: str) -> Target:
    module, _, attribute = name.partition(":")
    factory = import_object(module, attribute, what=f"replace norms with {name}")
    if not callable(factory):
        raise TargetError(f"Cannot replace norms with {name}: it cannot be called.")
    return ToFactory(name, factory)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), _TARGETS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"Cannot replace norms with {name!r}: it is none of {', '.join(_TARGETS)}, and not"
        f" package.module:factory.{hint}"
    )


def target_of(given: Any) -> Target:
    """The target that a caller means: a target, its name, or a callable."""
    if isinstance(given, Target):
        return given
    if isinstance(given, str):
        return named_target(given)
    if isinstance(given, type) and issubclass(given, Target):
        return given()
    if callable(given):
        name = getattr(given, "__qualname__", type(given).__qualname__)
        home = getattr(given, "__module__", None) or "unknown"
        return ToFactory(f"{home}:{name}", given)
    raise TargetError(
        f"Cannot replace norms with a {type(given).__name__}: give a target such as"
        " bntools.ToGroupNorm(), its name, or a callable that makes a layer of the old one."
    )


def target_from_dict(data: Any) -> Target:
    """Read the JSON data of a target; a factory is named there and not imported.

    Raises TargetError for data of another shape.
    """
    try:
        name = str(data["name"])
        options = {key: value for key, value in data.items() if key != "name"}
        return _TARGETS[name](**options) if name in _TARGETS else ToFactory(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError(f"Cannot read a damaged target: {error!r}.") from error


_TARGETS: dict[str, type[Target]] = {
    cls.name: cls for cls in (ToGroupNorm, ToLayerNorm, ToInstanceNorm, ToEvoNormS0, ToEvoNormB0)
}
