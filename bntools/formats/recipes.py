"""The recipe in a file, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bntools.errors import LoadError
from bntools.formats.probe import explained, probe_file, similar
from bntools.formats.safetensors import recipe_of_metadata
from bntools.formats.table import recognised
from bntools.formats.tensors import read_tensors
from bntools.formats.unpickling import unpickled
from bntools.recipe import recipe_of
from bntools.trust import AllowList, Refusal

__all__ = ["recipe_in"]


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe in a file that bntools wrote, as JSON data. Raises `LoadError`."""
    if not path.exists():
        raise LoadError(f"Cannot load {path}: there is no such file{similar(path)}.")
    probe = probe_file(path)
    with explained(probe):
        found = recognised(probe)
        if found.key == "safetensors":
            return recipe_of_metadata(read_tensors(probe).metadata)
        if found.key != "torch.save":
            raise Refusal(f"it is {found.name}, of which no recipe is read")
        content, _ = unpickled(probe, AllowList())
        if isinstance(content, nn.Module):
            return recipe_of(content).to_dict()
        recipe = content.get("bntools_recipe") if isinstance(content, Mapping) else None
        if not isinstance(recipe, dict):
            raise Refusal("it has no recipe: bntools did not write it, or nothing was changed")
        return recipe
