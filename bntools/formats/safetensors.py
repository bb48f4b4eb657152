"""safetensors: weights, with the recipe and the architecture's name in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bntools.errors import SaveError
from bntools.formats.interface import Loaded, Request, Saved, own_version
from bntools.formats.kept import KEPT, kept_parts
from bntools.formats.probe import Probe
from bntools.formats.tensors import Contents, read_tensors, write_tensors
from bntools.formats.weights import Weights, placed, state_of
from bntools.originals import originals_of
from bntools.trust import Refusal
from bntools.writing import write_atomically

__all__ = ["read_safetensors", "recipe_of_metadata", "write_safetensors"]

_VERSION, _RECIPE, _ARCH = "bntools_version", "bntools_recipe", "bntools_arch"
_KEPT = f"{KEPT}."
_OWN = {_VERSION, _RECIPE, _ARCH, KEPT, "format"}


def read_safetensors(probe: Probe, request: Request) -> Loaded:
    """A state dict in an architecture, mapped from the file."""
    contents = read_tensors(probe)
    tensors: dict[str, Any] = dict(contents.tensors)
    for alias, name in contents.metadata.items():
        # How safetensors itself notes tensors that are one.
        if alias not in _OWN and alias not in tensors and name in contents.tensors:
            tensors[alias] = contents.tensors[name]
    weights = Weights(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(_KEPT)},
        recipe_of_metadata(contents.metadata),
        contents.metadata.get(_ARCH),
        _VERSION in contents.metadata,
        _kept(contents),
    )
    return placed(weights, probe, request)


def recipe_of_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe in the metadata of a file, as JSON data. Raises `Refusal`."""
    found = _parsed(metadata, _RECIPE)
    if found is not None and not isinstance(found, dict):
        raise Refusal("its recipe is no JSON object")
    return found


def _kept(contents: Contents) -> tuple[Any, dict[str, Tensor]] | None:
    steps = _parsed(contents.metadata, KEPT)
    if steps is None:
        return None
    tensors = contents.tensors.items()
    return steps, {n.removeprefix(_KEPT): t for n, t in tensors if n.startswith(_KEPT)}


def _parsed(metadata: Mapping[str, str], key: str) -> Any:
    if key not in metadata:
        return None
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise Refusal(f"what its metadata have as {key} is no JSON ({error})") from error


def write_safetensors(saved: Saved, path: Path, force: bool) -> None:  # noqa: FBT001 - as all writers
    """Write the weights of a model; tensors that are one are written once."""
    tensors, shared = _distinct(state_of(saved.model))
    metadata = {"format": "pt", _VERSION: own_version(), **shared}
    if saved.recipe is not None:
        metadata[_RECIPE] = json.dumps(saved.recipe, separators=(",", ":"))
    if saved.arch is not None:
        metadata[_ARCH] = saved.arch
    kept = originals_of(saved.model)
    if kept is not None:
        steps, parts = kept_parts(kept)
        metadata[KEPT] = json.dumps(steps, separators=(",", ":"))
        tensors.update({f"{_KEPT}{name}": tensor for name, tensor in parts.items()})
    write_atomically(path, lambda s: write_tensors(s, tensors, metadata), force=force)


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that differ, and the further names of those that have several."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    known: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise SaveError(
                f"Cannot write {name} to a safetensors file: it is a {type(value).__name__}, and "
                "the format has only tensors. Write a .pt file."
            )
        key = _place(value)
        if key is not None and key in known and name not in _OWN:
            shared[name] = known[key]
            continue
        known[key] = name
        tensors[name] = value
    return tensors, shared


def _place(tensor: Tensor) -> Any:
    """What two names of one tensor have in common; None where there is nothing to share."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
