"""What torch.save writes: whole modules, and state dicts."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from bntools.checkpoints import find_weights
from bntools.errors import SaveError
from bntools.formats.interface import Loaded, Request, Saved, own_version
from bntools.formats.kept import KEPT, kept_parts
from bntools.formats.probe import Probe
from bntools.formats.soundness import check_sound
from bntools.formats.unpickling import unpickled
from bntools.formats.weights import Weights, placed, state_of
from bntools.modules import named_modules
from bntools.originals import originals_of
from bntools.recipe import Recipe, mark
from bntools.rewriting import Rewritten
from bntools.writing import write_atomically

__all__ = ["read_torch", "write_torch"]

_RECIPE = "bntools_recipe"


def read_torch(probe: Probe, request: Request) -> Loaded:
    """A whole module, or a state dict in an architecture."""
    content, leftovers = unpickled(probe, request.allowed, trust=request.trust)
    if isinstance(content, nn.Module):
        return _whole(content, probe, request)
    if isinstance(content, Mapping) and ("bntools_version" in content or _RECIPE in content):
        return _own(content, probe, request)
    found, notes = find_weights(content)
    notes += [f"left out what else is in the file ({', '.join(leftovers)})"] if leftovers else []
    if isinstance(found, nn.Module):
        whole = _whole(found, probe, request)
        return Loaded(found, (*notes, *whole.notes))
    loaded = placed(Weights(found), probe, request)
    return replace(loaded, notes=(*notes, *loaded.notes))


def _own(content: Mapping[str, Any], probe: Probe, request: Request) -> Loaded:
    """A file that `bntools.save` wrote."""
    model, recipe = content.get("model"), content.get(_RECIPE)
    arch, weights = content.get("bntools_arch"), content.get("state_dict")
    readable = recipe is None or isinstance(recipe, dict)
    if readable and isinstance(weights, Mapping) and (arch is None or isinstance(arch, str)):
        ours = "bntools_version" in content
        found = content.get(KEPT)
        kept = (found.get("steps"), found.get("tensors", {})) if isinstance(found, dict) else None
        return placed(Weights(weights, recipe, arch, ours, kept), probe, request)
    if not isinstance(model, nn.Module) or not readable:
        raise probe.fails(
            f"bntools {content.get('bntools_version')} wrote it in a way that this version does "
            "not read. Upgrade bntools"
        )
    if recipe is not None:
        mark(model, Recipe.from_dict(recipe))
    return Loaded(model, _whole(model, probe, request).notes, recipe)


def _whole(model: nn.Module, probe: Probe, request: Request) -> Loaded:
    check_sound(model, probe)
    originals = originals_of(model)
    if originals is not None and not originals.is_sound():
        raise probe.fails("the originals that its model has kept are damaged. Copy it again")
    if request.arch is None:
        return Loaded(model)
    return Loaded(model, (f"the file holds the whole model: --arch {request.arch} is not used",))


def write_torch(saved: Saved, path: Path, force: bool) -> None:  # noqa: FBT001 - as all writers
    """Write a whole module, or its state dict with the recipe beside."""
    model = saved.model
    content: dict[str, Any] = (
        _as_weights(saved) if saved.state_dict else {"model": model, _RECIPE: saved.recipe}
    )
    content["bntools_version"] = own_version()

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(content, stream)
        except (SaveError, OSError):
            raise
        except Exception as error:
            raise _unpicklable(path, model, error) from error

    write_atomically(path, write, force=force)


def _as_weights(saved: Saved) -> dict[str, Any]:
    content = {
        "state_dict": state_of(saved.model),
        _RECIPE: saved.recipe,
        "bntools_arch": saved.arch,
    }
    originals = originals_of(saved.model)
    if originals is not None:
        steps, tensors = kept_parts(originals)
        content[KEPT] = {"steps": steps, "tensors": tensors}
    return content


# ---- what cannot be pickled ----------------------------------------------------------------------


def _unpicklable(target: Path, model: nn.Module, error: Exception) -> SaveError:
    culprit = _culprit(model) or " ".join(str(error).split())[:200]
    return SaveError(f"Cannot write {target}: {culprit}.")


def _culprit(model: nn.Module) -> str:
    """What in a model cannot be saved, by its path."""
    for path, module in named_modules(model):
        cls, at = type(module), f" at {path}" if path else ""
        cls = cls.__mro__[2] if isinstance(module, Rewritten) else cls
        if isinstance(module, torch.jit.ScriptModule):
            return f"the module{at} is TorchScript, which is saved with torch.jit.save"
        if _found(cls) is not cls:
            return (
                f"the class {cls.__module__}.{cls.__qualname__}{at} cannot be found by that name. "
                "Define it at the top level of a module"
            )
        for name, value in vars(module).items():
            if not _pickles(value):
                place = f"{path}.{name}" if path else name
                return f"the attribute {place} ({_described(value)}) cannot be pickled"
    return ""


def _found(cls: type) -> Any:
    return getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)


def _described(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__name__} {name}" if name else type(value).__name__


class _ShallowPickler(pickle.Pickler):
    """Pickles values without the tensors and modules in them."""

    def persistent_id(self, value: Any) -> str | None:
        return "skipped" if isinstance(value, (torch.Tensor, nn.Module)) else None


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _pickles(value: Any) -> bool:
    try:
        _ShallowPickler(_Nowhere(), protocol=2).dump(value)
    except Exception:  # noqa: BLE001 - pickling runs what any class defines
        return False
    return True
