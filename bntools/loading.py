"""Reading models: every file format by its content, and architectures by name.

Files are untrusted: `bntools.pickles` follows each pickle before `torch.load(weights_only=True)`
reads it, and only classes of torch.nn, torchvision and timm, and those that the user names, are
created. A further format is one entry in `FORMATS`.
"""

from __future__ import annotations

import difflib
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._C import PyTorchFileReader

from bntools.architectures import build
from bntools.checkpoints import build_with_weights, find_weights, some
from bntools.errors import LoadError
from bntools.imports import one_line, quiet
from bntools.pickles import Examined, examine
from bntools.recipe import Recipe, mark
from bntools.trust import AllowList, Leftover, Refusal

__all__ = ["FORMATS", "Format", "Loaded", "is_onnx", "load", "read", "read_model"]

_HEAD = 512
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[\w.\-]+")
_LONGEST = 10_000


@dataclass(frozen=True)
class Loaded:
    """A model, what the user should know about how it was read, and the recipe in the file.

    `recipe` is the JSON data that `bntools.save` stored with the model, None where there is none.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """What the user gave besides the file."""

    arch: str | None
    allowed: AllowList


@dataclass(frozen=True)
class Probe:
    """What of a file is looked at to tell its format."""

    path: Path
    head: bytes
    size: int

    @cached_property
    def archive(self) -> tuple[zipfile.ZipInfo, ...] | None:
        """The members of a zip archive; None where it is none or cannot be read."""
        if not self.head.startswith(b"PK"):
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return None

    @cached_property
    def members(self) -> dict[str, int]:
        """The sizes of an archive's files by their names, without the folder that all are in."""
        return {
            info.filename.partition("/")[2] or info.filename: info.file_size
            for info in self.archive or ()
        }

    def fails(self, problem: str) -> LoadError:
        """The error about this file, safe to print whatever names the file has chosen."""
        text = "".join(c if c.isprintable() else "?" for c in problem)
        return LoadError(f"Cannot load {self.path}: {text[:_LONGEST]}.")


@dataclass(frozen=True)
class Format:
    """A file format: how it is known, and how it is read or what to do instead."""

    name: str
    matches: Callable[[Probe], bool]
    read: Callable[[Probe, Request], Loaded] | None = None
    advice: str = "bntools reads what torch.save wrote. Save the model: torch.save(model, path)"


def load(
    source: str | os.PathLike[str], arch: str | None = None, allow: Sequence[str] = ()
) -> nn.Module:
    """Load a model from a file, without running anything that the file contains.

    `source` is a file that `torch.save` or `bntools.save` wrote: a whole model, or a state dict,
    which needs `arch`; or the name of an architecture, which gets random weights.
    `arch` is "torchvision:NAME", "timm:NAME" or "package.module:factory"; a factory is called
    without arguments. `allow` names further classes, "package.Class", that the file may hold.
    Tensors go to the CPU; whole models keep their training flags, built ones are in eval mode.

    Raises LoadError.

    Example:
        >>> import bntools
        >>> model = bntools.load("torchvision:resnet18")
        >>> type(model).__name__
        'ResNet'
    """
    return read_model(source, arch, allow).model


def read_model(
    source: str | os.PathLike[str], arch: str | None = None, allow: Sequence[str] = ()
) -> Loaded:
    """Like `load`, with the notes and the recipe beside the model."""
    path = Path(source)
    request = Request(arch, AllowList(allow))
    if not path.exists():
        if arch is None and _NAMED.fullmatch(str(source)):
            model = build(str(source))
            return Loaded(model, (f"{source} has random weights: no file was given",))
        raise LoadError(f"Cannot load {path}: there is no such file{_similar(path)}.")
    probe = _probe(path)
    found = next(entry for entry in FORMATS if entry.matches(probe))
    if found.read is None:
        raise probe.fails(f"it is {found.name}; {found.advice}")
    with _explained(probe):
        return found.read(probe, request)


read = read_model


def _probe(path: Path) -> Probe:
    if path.is_dir():
        raise LoadError(f"Cannot load {path}: it is a folder. Give a file in it.")
    if not path.is_file():
        raise LoadError(f"Cannot load {path}: it is no regular file.")
    try:
        with path.open("rb") as stream:
            probe = Probe(path, stream.read(_HEAD), path.stat().st_size)
    except OSError as error:
        raise LoadError(f"Cannot load {path}: {error.strerror}.") from error
    if not probe.head:
        raise probe.fails("it is empty")
    return probe


def _similar(path: Path) -> str:
    with suppress(OSError):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
        if near:
            return f"; did you mean {path.parent / near[0]}?"
    return ""


@contextmanager
def _explained(probe: Probe) -> Iterator[None]:
    """Whatever goes wrong in reading a file becomes a LoadError of one line."""
    try:
        yield
    except LoadError:
        raise
    except Refusal as error:
        raise probe.fails(str(error)) from None
    except OSError as error:
        raise probe.fails(error.strerror or str(error)) from error
    except MemoryError as error:
        raise probe.fails("it needs more memory than there is") from error
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise probe.fails(f"it is damaged or incomplete ({detail}). Copy it again") from error


# ---- torch.save ---------------------------------------------------------------------------------


def _read_torch(probe: Probe, request: Request) -> Loaded:
    content, leftovers = _unpickled(probe, request.allowed)
    if isinstance(content, nn.Module):
        return _whole(content, probe, request)
    if isinstance(content, Mapping) and "bntools_version" in content:
        return _own(content, probe, request)
    found, notes = find_weights(content)
    notes += [f"left out what else is in the file ({', '.join(leftovers)})"] if leftovers else []
    if isinstance(found, nn.Module):
        whole = _whole(found, probe, request)
        return Loaded(found, (*notes, *whole.notes))
    if request.arch is None:
        raise probe.fails(
            f"it holds weights only ({len(found)} tensors: {some(found)}), and not the model. "
            "Name the architecture, such as --arch torchvision:resnet50, --arch timm:NAME or "
            "--arch package.module:factory"
        )
    model, remarks = build_with_weights(request.arch, found)
    return Loaded(model, (*notes, *remarks))


def _unpickled(probe: Probe, allowed: AllowList) -> tuple[Any, list[str]]:
    zipped = probe.archive is not None
    with probe.path.open("rb") as stream, quiet():
        examined = (
            _examined_zip(probe, stream, allowed)
            if zipped
            else _examined_legacy(probe, stream, allowed)
        )
        stream.seek(0)
        data: IO[bytes] = stream
        if examined.edits:
            data = BytesIO(examined.rewritten(stream.read()))
        with torch.serialization.safe_globals(examined.grants):
            return torch.load(data, map_location="cpu", weights_only=True), examined.leftovers


def _examined_zip(probe: Probe, stream: IO[bytes], allowed: AllowList) -> Examined:
    names = [info.filename for info in probe.archive or ()]
    if len({name.lower() for name in names}) < len(names):
        raise Refusal("its archive has two files of one name")
    if len({name.partition("/")[0] for name in names}) > 1:
        raise Refusal("its archive has more than one folder, which torch.save does not write")
    if sum(info.file_size for info in probe.archive or ()) > probe.size:
        raise Refusal("its archive is compressed, which torch.save never does. Unpack it first")
    # The very reader that torch.load will use, so that both see the same pickle.
    pickled = PyTorchFileReader(stream).get_record("data.pkl")
    examined = examine(BytesIO(pickled), allowed)
    for key, claimed in examined.storages.items():
        if claimed > probe.members.get(f"data/{key}", 0):
            raise Refusal(f"it is damaged: its tensor storage {key!r} is incomplete")
    if examined.edits:
        raise Refusal("it names classes in a way that torch.save does not write")
    return examined


def _examined_legacy(probe: Probe, stream: IO[bytes], allowed: AllowList) -> Examined:
    pickles = [examine(stream, allowed) for _ in range(_LEGACY_PICKLES)]
    content = pickles[3]
    if any(other.grants or other.edits for other in (*pickles[:3], pickles[4])):
        raise Refusal("its header names classes, which torch.save does not write")
    if sum(content.storages.values()) > probe.size:
        raise Refusal("it is damaged or incomplete: tensors are missing. Copy it again")
    return content


def _own(content: Mapping[str, Any], probe: Probe, request: Request) -> Loaded:
    """A file that `bntools.save` wrote."""
    model, recipe = content.get("model"), content.get("bntools_recipe")
    if not isinstance(model, nn.Module) or not (recipe is None or isinstance(recipe, dict)):
        raise probe.fails(
            f"bntools {content.get('bntools_version')} wrote it in a way that this version does "
            "not read. Upgrade bntools"
        )
    if recipe is not None:
        mark(model, Recipe.from_dict(recipe))
    return Loaded(model, _whole(model, probe, request).notes, recipe)


def _whole(model: nn.Module, probe: Probe, request: Request) -> Loaded:
    """A model that came out of a file, once it is found sound."""
    seen: set[int] = set()
    for value in _contents(model, seen):
        if isinstance(value, Leftover):
            raise probe.fails(
                f"the model holds a {value.wanted}, which is no part of a network. If you trust "
                f"the file, add --allow {value.wanted} (in Python allow=({value.wanted!r},))"
            )
        if isinstance(value, nn.Module) and not _is_sound(value):
            raise probe.fails(f"it is damaged: a {type(value).__name__} in it is incomplete")
        if isinstance(value, Tensor) and value.is_meta:
            raise probe.fails("its tensors have no values (device 'meta'). Save it with weights")
    if request.arch is None:
        return Loaded(model)
    return Loaded(model, (f"the file holds the whole model: --arch {request.arch} is not used",))


def _contents(root: Any, seen: set[int]) -> Iterator[Any]:
    """Everything in the attributes, lists, tuples and dicts below a module, each once."""
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, nn.Module):
            stack.extend(vars(value).values())
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack.extend(value)


def _is_sound(module: nn.Module) -> bool:
    state = vars(module)
    kinds = {"_parameters": Tensor, "_buffers": Tensor, "_modules": nn.Module}
    if type(state.get("training")) is not bool:
        return False
    return all(
        isinstance(state.get(table), dict)
        and all(
            isinstance(k, str) and (v is None or isinstance(v, kind))
            for k, v in state[table].items()
        )
        for table, kind in kinds.items()
    )


# ---- the formats --------------------------------------------------------------------------------


def _holds(*names: str) -> Callable[[Probe], bool]:
    return lambda probe: any(name in probe.members for name in names)


def _starts(*heads: bytes) -> Callable[[Probe], bool]:
    return lambda probe: probe.head.startswith(heads)


def _is_safetensors(probe: Probe) -> bool:
    length = int.from_bytes(probe.head[:8], "little")
    return probe.head[8:9] == b"{" and length <= probe.size - 8


def _is_onnx(probe: Probe) -> bool:
    # A protobuf message: the IR version, then a field of ModelProto.
    fields = re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]", probe.head)
    return fields is not None or probe.path.suffix == ".onnx"


def is_onnx(source: str | os.PathLike[str]) -> bool:
    """Whether a file is an ONNX model, by its content or its name."""
    path = Path(source)
    return path.suffix == ".onnx" if not path.is_file() else _is_onnx(_probe(path))


def _is_text(probe: Probe) -> bool:
    return not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", probe.head)


_NOT_YET = "bntools does not read that yet. Save the model itself: torch.save(model, path)"
_ONNX = "only `bntools verify` takes that. Save the PyTorch model: torch.save(model, path)"
_AGAIN = "download or copy it again"

# The first entry that matches counts.
FORMATS: tuple[Format, ...] = (
    Format("a TorchScript archive", _holds("constants.pkl"), advice=_NOT_YET),
    Format(
        "a torch.export archive",
        _holds("archive_format", "serialized_exported_program.json"),
        advice=_NOT_YET,
    ),
    Format("a torch.save file", _holds("data.pkl"), _read_torch),
    Format("a torch.save file from before torch 1.6", _starts(_LEGACY_MAGIC), _read_torch),
    Format("a safetensors file", _is_safetensors, advice=_NOT_YET),
    Format("a Keras model", _holds("model.weights.h5")),
    Format("a zip archive that torch.save did not write", lambda p: bool(p.archive)),
    Format("a damaged or incomplete zip archive", _starts(b"PK"), advice=_AGAIN),
    Format("an HDF5 file", _starts(b"\x89HDF\r\n")),
    Format("a NumPy array", _starts(b"\x93NUMPY")),
    Format(
        "a compressed or packed file",
        lambda p: (
            p.head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z"))
            or p.head[257:262] == b"ustar"
        ),
        advice="unpack it first",
    ),
    Format("a GGUF file", _starts(b"GGUF")),
    Format("a TensorFlow Lite model", lambda p: p.head[4:8] == b"TFL3"),
    Format(
        "a pickle that torch.save did not write",
        _starts(*(b"\x80" + bytes([protocol]) for protocol in range(2, 6))),
    ),
    Format(
        "a Git LFS pointer, not the file itself",
        _starts(b"version https://git-lfs"),
        advice="fetch it with: git lfs pull",
    ),
    Format("a web page, not a model", _starts(b"<!DOCTYPE", b"<!doctype", b"<html"), advice=_AGAIN),
    Format("an ONNX model", _is_onnx, advice=_ONNX),
    Format("a text file", _is_text),
    Format("of no format that bntools knows", lambda _: True),
)
