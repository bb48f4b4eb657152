"""The recipe in a file, without the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bntools.errors import LoadError
from bntools.formats.notes import note_in, read_note
from bntools.formats.probe import Probe, explained, probe_file, similar
from bntools.formats.safetensors import recipe_of_metadata
from bntools.formats.table import recognised
from bntools.formats.tensors import read_tensors
from bntools.formats.unpickling import unpickled
from bntools.recipe import recipe_of
from bntools.trust import AllowList, Refusal

__all__ = ["recipe_in"]

_VERSION, _RECIPE = "bntools_version", "bntools_recipe"


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe in a file that bntools wrote, as JSON data; None where nothing was edited.

    Nothing in the file is run. Raises `LoadError`, also for files that bntools did not write.
    """
    if not os.path.exists(path):
        raise LoadError(f"Cannot load {path}: there is no such file{similar(path)}")
    probe = probe_file(path)
    with explained(probe):
        notes = _notes(probe)
        if _VERSION not in notes and _RECIPE not in notes:
            raise Refusal("it has no recipe: bntools did not write it")
        recipe = notes.get(_RECIPE)
        if recipe is not None and not isinstance(recipe, dict):
            raise Refusal("its recipe is no JSON object")
        return recipe


def _notes(probe: Probe) -> Mapping[str, Any]:
    """What bntools wrote beside a model."""
    found = recognised(probe)
    if found.key == "safetensors":
        return _parsed(read_tensors(probe).metadata)
    if found.key == "ONNX":
        return _parsed(_metadata(probe.path))
    if found.key in ("TorchScript", "torch.export"):
        return read_note(note_in(probe))
    if found.read is None:
        raise Refusal(f"it is {found.name}, of which no recipe is read")
    content, _ = unpickled(probe, AllowList())
    if isinstance(content, nn.Module):
        edits = recipe_of(content)
        return {_RECIPE: edits.to_dict()} if edits.edits else {}
    return content if isinstance(content, Mapping) else {}


def _metadata(path: Path) -> dict[str, str]:
    from bntools.onnx_graph.reading import read_onnx  # noqa: PLC0415 - onnx takes a second

    return {entry.key: entry.value for entry in read_onnx(path).proto.metadata_props}


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Metadata hold texts; the recipe is JSON."""
    if _RECIPE not in metadata:
        return dict(metadata)
    return {**metadata, _RECIPE: recipe_of_metadata(metadata)}
