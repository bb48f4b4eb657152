"""Recipes in the user's own code: an architecture becomes the one that the weights are of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntools.errors import LoadError
from bntools.formats.recipes import recipe_in
from bntools.modules import duplicate, named_tensors, unwrap
from bntools.recipe import Recipe, apply_edits, mark, recipe_of

__all__ = ["apply_recipe", "read_recipe"]

_KEYS = ("bntools_recipe", "recipe")


@torch.inference_mode(mode=False)
def apply_recipe(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None,
    *,
    inplace: bool = False,
) -> nn.Module:
    """The architecture that a recipe makes of a model; the weights are loaded after that.

    `recipe` is a `Recipe` (`result.recipe`), its JSON data or text, or a file: JSON (also a report
    of the command line), or one that `bntools.save` wrote, in any format. Nothing in files is run.
    None, which such a file has where nothing was edited, changes nothing. Added biases are zero;
    nothing is computed from the old weights.

    The argument is left as it was, and a copy is returned; with `inplace` it is changed itself,
    or not at all where the recipe does not fit. Use what is returned: a recipe may replace the
    model as a whole.

    Raises `LoadError` for what is no recipe, `SurgeryError`, `TargetError` or `PlanError` for one
    of another architecture.

    Example:
        >>> import torch, bntools
        >>> def net():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = bntools.fold(net().eval(), torch.rand(1, 3, 8, 8))
        >>> fresh = bntools.apply_recipe(net(), result.recipe)
        >>> fresh.load_state_dict(result.model.state_dict())
        <All keys matched successfully>
    """
    wanted = read_recipe(recipe)
    source = unwrap(model)
    whole = recipe_of(source).then(wanted)
    if inplace:
        # a copy that shares the tensors, to find out at no cost whether the recipe fits
        apply_edits(duplicate(source, {id(t): t for *_, t in named_tensors(source)}), wanted)
    changed = apply_edits(source if inplace else duplicate(source), wanted)
    if whole.edits:
        mark(changed, whole)
    return model if inplace and changed is source else changed


def read_recipe(given: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None) -> Recipe:
    """A recipe in any of the forms that `apply_recipe` takes. Raises `LoadError`."""
    if given is None:
        return Recipe()
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return _from_text(given, "the text")
    if isinstance(given, Mapping):
        return _from_data(given, "the data")
    if not isinstance(given, (str, os.PathLike)):
        raise LoadError(
            f"Cannot read a recipe from a {type(given).__name__}: give a Recipe, its JSON data or"
            " text, or a file."
        )
    path = Path(given)
    if path.suffix.lower() == ".json":
        try:
            return _from_text(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise LoadError(f"Cannot read the recipe in {path}: {why}.") from error
    return _from_data(recipe_in(path), str(path))


def _from_text(text: str, where: str) -> Recipe:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"Cannot read the recipe in {where}: it is no JSON ({error}).") from error
    return _from_data(data, where)


def _from_data(data: Any, where: str) -> Recipe:
    if isinstance(data, Mapping) and "edits" not in data:
        found = next((key for key in _KEYS if key in data), None)
        if found is None:
            raise LoadError(f"Cannot read the recipe in {where}: it has none.")
        data = data[found]
    return Recipe() if data is None else Recipe.from_dict(data)
