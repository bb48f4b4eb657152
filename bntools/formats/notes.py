"""What bntools writes beside a program, in a file of its archive: the recipe, as JSON."""

from __future__ import annotations

import json
import zipfile
from typing import Any

from bntools.archives import check_unpacked
from bntools.formats.interface import own_version
from bntools.formats.probe import Probe
from bntools.trust import Refusal

__all__ = ["NOTE", "note", "note_in", "read_note", "recipe_of_note"]

NOTE = "bntools.json"
# As TorchScript and torch.export have it, and as torch.export had it up to torch 2.7.
_PLACES = (f"extra/{NOTE}", f"extra_files/{NOTE}")
_LONGEST = 64 * 2**20


def note(recipe: dict[str, Any] | None) -> str:
    """The text that goes beside a program."""
    return json.dumps({"bntools_version": own_version(), "bntools_recipe": recipe})


def read_note(text: str | bytes | None) -> dict[str, Any]:
    """What such a text says, nothing where there is none."""
    found = json.loads(text) if text else None
    return found if isinstance(found, dict) else {}


def recipe_of_note(text: str | bytes | None) -> dict[str, Any] | None:
    """The recipe in such a text, None where there is none."""
    recipe = read_note(text).get("bntools_recipe")
    return recipe if isinstance(recipe, dict) else None


def note_in(probe: Probe) -> bytes | None:
    """The text in an archive, of which nothing else is read; None where there is none."""
    check_unpacked(probe.archive or ())
    with zipfile.ZipFile(probe.path) as file:
        for info in file.infolist():
            name = info.filename
            if name in _PLACES or name.partition("/")[2] in _PLACES:
                if info.file_size > _LONGEST:
                    raise Refusal("its recipe is beyond any sensible size")
                return file.read(info)
    return None
