"""Reading models: every file format by its content, and architectures by name.

Files are untrusted. The formats are in `bntools.formats`: a further one is a row of its table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from bntools.architectures import build
from bntools.errors import LoadError
from bntools.formats.interface import Loaded, Request
from bntools.formats.probe import explained, probe_file, similar
from bntools.formats.table import recognised, refusal
from bntools.trust import AllowList

__all__ = ["Loaded", "check_takes", "is_onnx", "load", "read_model"]

_NAMED = re.compile(r"[A-Za-z_][\w.]*:[\w.\-]+")


def load(
    source: str | os.PathLike[str],
    arch: str | None = None,
    allow: Sequence[str] = (),
    *,
    trust: bool = False,
) -> nn.Module:
    """Load a model from a file, without running anything that the file contains.

    `source` is a file that `torch.save` or `bntools.save` wrote: a whole model, or a state dict,
    which needs `arch`; or the name of an architecture, which gets random weights.
    `arch` is "torchvision:NAME", "timm:NAME" or "package.module:factory"; a factory is called
    without arguments. `allow` names further classes, "package.Class", that the file may hold.
    `trust` lets the file run whatever code is in it, if it cannot be read otherwise.
    Tensors go to the CPU; whole models keep their training flags, built ones are in eval mode.

    Raises LoadError.

    Example:
        >>> import bntools
        >>> model = bntools.load("torchvision:resnet18")
        >>> type(model).__name__
        'ResNet'
    """
    return read_model(source, arch, allow, trust=trust).model


def read_model(
    source: str | os.PathLike[str],
    arch: str | None = None,
    allow: Sequence[str] = (),
    *,
    trust: bool = False,
) -> Loaded:
    """Like `load`, with the notes and the recipe beside the model."""
    path = Path(source)
    request = Request(arch, AllowList(allow), trust)
    if not os.path.exists(path):
        if arch is None and _NAMED.fullmatch(str(source)):
            model = build(str(source))
            return Loaded(model, (f"{source} has random weights: no file was given",))
        raise LoadError(f"Cannot load {path}: there is no such file{similar(path)}")
    probe = probe_file(path)
    with explained(probe):
        found = recognised(probe)
        if found.read is None:
            raise probe.fails(refusal(found))
        return replace(found.read(probe, request), format=found.key or "torch.save")


def check_takes(source: str | os.PathLike[str], verb: str) -> None:
    """Find out before a file is read whether a verb, such as "freeze", takes its format.

    Raises LoadError. What is no file, or of no format that any verb takes, is left to `load`.
    """
    path = Path(source)
    if not os.path.isfile(path):
        return
    probe = probe_file(path)
    with explained(probe):
        found = recognised(probe)
    if found.verbs and verb not in found.verbs:
        raise LoadError(f"Cannot {verb} {path}: {refusal(found)}.")


def is_onnx(source: str | os.PathLike[str]) -> bool:
    """Whether a file is an ONNX model, by its content, or by its name where that tells nothing.

    Raises LoadError for what cannot be read.
    """
    path = Path(source)
    if not os.path.isfile(path):
        return path.suffix == ".onnx"
    probe = probe_file(path)
    with explained(probe):
        return recognised(probe).key == "ONNX"
