"""The table of formats: how each is known, what reads and writes it, and which verbs take it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bntools.formats.exported import read_exported, write_exported
from bntools.formats.interface import EVERY_VERB, Format
from bntools.formats.probe import Probe, holds, is_text, starts
from bntools.formats.safetensors import read_safetensors, write_safetensors
from bntools.formats.scripted import read_script, write_script
from bntools.formats.torchfile import read_torch, write_torch
from bntools.formats.unpickling import LEGACY_MAGIC

__all__ = ["FORMATS", "recognised", "refusal", "supported", "written_as"]

_SCRIPT = (
    "Take the model that it was made from: torch.save(model, path), or torch.export.save(program,"
    " path)"
)
_ONNX = "Save the PyTorch model: torch.save(model, path)"
_ONNX_VERBS = frozenset({"fold", "inspect", "verify"})
_ORIGINALS = (
    "It keeps no originals: fold again with --keep-originals, into a .pt or .safetensors file"
)
_AGAIN = "download or copy it again"


def _is_onnx(probe: Probe) -> bool:
    """Whether a file is an ONNX model, by its content or its name."""
    # A protobuf message: the IR version, then a field of ModelProto.
    fields = re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]", probe.head)
    return fields is not None or probe.path.suffix == ".onnx"


def _is_safetensors(probe: Probe) -> bool:
    length = int.from_bytes(probe.head[:8], "little")
    return probe.head[8:9] == b"{" and length <= probe.size - 8


# The first entry that matches counts.
FORMATS: tuple[Format, ...] = (
    Format(
        "a TorchScript archive",
        holds("constants.pkl"),
        read_script,
        advice=_SCRIPT,
        key="TorchScript",
        write=write_script,
        endings=(".ts", ".torchscript", ".jit"),
        verbs=frozenset({"fold", "inspect", "verify"}),
        carries=frozenset({"recipe"}),
    ),
    Format(
        "a torch.export archive",
        holds("archive_format", "serialized_exported_program.json"),
        read_exported,
        advice=_ORIGINALS,
        key="torch.export",
        write=write_exported,
        endings=(".pt2",),
        verbs=EVERY_VERB - {"unfold"},
        carries=frozenset({"recipe"}),
    ),
    Format(
        "a torch.save file",
        holds("data.pkl"),
        read_torch,
        key="torch.save",
        write=write_torch,
        endings=(".pt", ".pth", ".ckpt", ".bin", ".pkl", ".tar"),
        verbs=EVERY_VERB,
        carries=frozenset({"recipe", "originals"}),
        holds_weights=True,
    ),
    Format("a torch.save file from before torch 1.6", starts(LEGACY_MAGIC), read_torch),
    Format(
        "a safetensors file",
        _is_safetensors,
        read_safetensors,
        key="safetensors",
        write=write_safetensors,
        endings=(".safetensors",),
        verbs=EVERY_VERB,
        carries=frozenset({"recipe", "originals"}),
        holds_weights=True,
    ),
    Format("a Keras model", holds("model.weights.h5")),
    Format("a zip archive that torch.save did not write", lambda p: bool(p.archive)),
    Format("a damaged or incomplete zip archive", starts(b"PK"), advice=_AGAIN),
    Format("an HDF5 file", starts(b"\x89HDF\r\n")),
    Format("a NumPy array", starts(b"\x93NUMPY")),
    Format(
        "a compressed or packed file",
        lambda p: (
            p.head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z"))
            or p.head[257:262] == b"ustar"
        ),
        advice="unpack it first",
    ),
    Format("a GGUF file", starts(b"GGUF")),
    Format("a TensorFlow Lite model", lambda p: p.head[4:8] == b"TFL3"),
    Format(
        "a pickle that torch.save did not write",
        starts(*(b"\x80" + bytes([protocol]) for protocol in range(2, 6))),
    ),
    Format(
        "a Git LFS pointer, not the file itself",
        starts(b"version https://git-lfs"),
        advice="fetch it with: git lfs pull",
    ),
    Format("a web page, not a model", starts(b"<!DOCTYPE", b"<!doctype", b"<html"), advice=_AGAIN),
    Format(
        "an ONNX model",
        _is_onnx,
        advice=_ONNX,
        key="ONNX",
        endings=(".onnx",),
        verbs=_ONNX_VERBS,
        carries=frozenset({"recipe"}),
    ),
    Format("a text file", is_text),
    Format("of no format that bntools knows", lambda _: True),
)


def supported() -> tuple[Format, ...]:
    """The formats that some verb takes, or that a result can be written in."""
    return tuple(entry for entry in FORMATS if entry.key)


def written_as(path: str | os.PathLike[str]) -> Format:
    """The format that a name asks for: that of torch.save where the ending says nothing else."""
    ending = Path(path).suffix.lower()
    found = [f for f in supported() if ending in f.endings]
    return found[0] if found else next(f for f in FORMATS if f.key == "torch.save")


def refusal(found: Format) -> str:
    """Why a file of a format is not taken, and what to do."""
    if not found.verbs:
        return f"it is {found.name}; {found.advice}"
    *names, last = [f"`{verb}`" for verb in sorted(found.verbs)]
    return f"it is {found.name}; only {', '.join(names)} and {last} take that. {found.advice}"


def recognised(probe: Probe) -> Format:
    """The format of a file."""
    return next(entry for entry in FORMATS if entry.matches(probe))
