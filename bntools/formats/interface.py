"""What a format is, and what goes in and out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from bntools.formats.probe import Probe
from bntools.trust import AllowList

__all__ = ["EVERY_VERB", "Format", "Loaded", "Request", "Saved", "own_version"]

EVERY_VERB = frozenset(
    {
        "diff",
        "export",
        "fold",
        "freeze",
        "inspect",
        "recalibrate",
        "replace",
        "ship",
        "to-batchnorm",
        "unfold",
        "unfreeze",
        "unsync",
        "verify",
    }
)


@dataclass(frozen=True)
class Loaded:
    """A model, what the user should know about how it was read, and the recipe in the file.

    `recipe` is the JSON data that `bntools.save` stored with the model, None where there is none;
    `format` is the key of the format that was read, empty for an architecture without a file.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None
    format: str = ""


@dataclass(frozen=True)
class Request:
    """What the user gave besides the file; `trust` lets it run the code that is in it."""

    arch: str | None
    allowed: AllowList
    trust: bool = False


@dataclass(frozen=True)
class Saved:
    """What is to be written: a model with its recipe, and how.

    `state_dict` asks for the weights in place of the module, where the format can hold both;
    `example_inputs` are for formats that record a run (None: inferred).
    """

    model: nn.Module
    recipe: dict[str, Any] | None
    arch: str | None = None
    state_dict: bool = False
    example_inputs: Any = None


@dataclass(frozen=True)
class Format:
    """A file format: how it is known, how it is read and written, or what to do instead.

    `key` is the short name of one that bntools supports; `verbs` take it as their MODEL. `write`
    puts a model in its place (`bntools.writing`) and returns notes; its third argument is `force`.
    `carries` says what travels beside the model ("recipe", "originals").
    """

    name: str
    matches: Callable[[Probe], bool]
    read: Callable[[Probe, Request], Loaded] | None = None
    advice: str = "bntools reads what torch.save wrote. Save the model: torch.save(model, path)"
    key: str = ""
    write: Callable[[Saved, Path, bool], tuple[str, ...] | None] | None = None
    endings: tuple[str, ...] = ()
    verbs: frozenset[str] = field(default_factory=frozenset)
    carries: frozenset[str] = field(default_factory=frozenset)
    holds_weights: bool = False


def own_version() -> str:
    """The version of bntools, for the files that it writes."""
    try:
        return version("bntools")
    except PackageNotFoundError:
        return "unknown"
