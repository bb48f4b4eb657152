"""TorchScript archives: programs, which are read with trust alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bntools.archives import check_unpacked
from bntools.formats.interface import Loaded, Request, Saved
from bntools.formats.notes import NOTE, note, note_in, recipe_of_note
from bntools.formats.probe import Probe
from bntools.imports import quiet
from bntools.recipe import Recipe, mark
from bntools.runtimes.scripting import scripted
from bntools.writing import write_atomically

__all__ = ["is_script", "read_script", "write_script"]


def is_script(model: nn.Module) -> bool:
    """Whether a model can only be written as TorchScript."""
    return isinstance(model, torch.jit.ScriptModule)


def read_script(probe: Probe, request: Request) -> Loaded:
    """The compiled module in an archive."""
    if not request.trust:
        raise probe.wants_trust("it is TorchScript, which is a program and not data")
    check_unpacked(probe.archive or ())
    with quiet():
        load: Any = torch.jit.load
        model = load(str(probe.path), map_location="cpu")
    recipe = recipe_of_note(note_in(probe))
    if recipe is not None:
        mark(model, Recipe.from_dict(recipe))
    notes = (
        (f"--arch {request.arch} is not used: the file holds a compiled model",)
        if request.arch is not None
        else ()
    )
    return Loaded(model, notes, recipe)


def write_script(saved: Saved, path: Path, force: bool) -> tuple[str, ...]:  # noqa: FBT001 - as all writers
    """Write a model as TorchScript, with its recipe beside it."""
    model, notes = scripted(saved.model, saved.example_inputs, str(path))
    whole = io.BytesIO()  # torch closes what it writes to
    with quiet():
        torch.jit.save(model, whole, _extra_files={NOTE: note(saved.recipe)})
    write_atomically(path, lambda stream: stream.write(whole.getbuffer()), force=force)
    return notes
