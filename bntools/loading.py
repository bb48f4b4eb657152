"""Reading models: every file format by its content, and architectures by name.

Files are untrusted: `bntools.trust` follows each pickle before `torch.load(weights_only=True)`
reads it, and only classes of torch.nn, torchvision and timm, and those that the user names, are
created. A further format is one entry in `FORMATS`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._C import PyTorchFileReader

from bntools.errors import LoadError
from bntools.trust import (
    AllowList,
    Examined,
    Leftover,
    Refusal,
    examine,
    import_object,
    one_line,
    working_folder_first,
)

__all__ = ["FORMATS", "Format", "Loaded", "load", "read", "read_model"]

_HEAD = 512
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5
_NAMED = re.compile(r"[A-Za-z_][\w.]*:[\w.\-]+")
_KNOWN_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "ema",
    "state_dict_ema",
    "model_ema",
    "params",
)
_SHOWN = 4
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
            model = _built(str(source))
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


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch and the model libraries warn about while a model is read says nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- torch.save ---------------------------------------------------------------------------------


def _read_torch(probe: Probe, request: Request) -> Loaded:
    content, leftovers = _unpickled(probe, request.allowed)
    if isinstance(content, nn.Module):
        return _whole(content, probe, request)
    if isinstance(content, Mapping) and "bntools_version" in content:
        return _own(content, probe, request)
    found, notes = _chosen(content)
    notes += [f"left out what else is in the file ({', '.join(leftovers)})"] if leftovers else []
    if isinstance(found, nn.Module):
        whole = _whole(found, probe, request)
        return Loaded(found, (*notes, *whole.notes))
    if request.arch is None:
        raise probe.fails(
            f"it holds weights only ({len(found)} tensors: {_some(found)}), and not the model. "
            "Name the architecture, such as --arch torchvision:resnet50, --arch timm:NAME or "
            "--arch package.module:factory"
        )
    model, remarks = _with_weights(request.arch, found)
    return Loaded(model, (*notes, *remarks))


def _unpickled(probe: Probe, allowed: AllowList) -> tuple[Any, list[str]]:
    zipped = probe.archive is not None
    with probe.path.open("rb") as stream, _quiet():
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


# ---- checkpoints --------------------------------------------------------------------------------


def _chosen(content: Any) -> tuple[Any, list[str]]:
    """The model or the weights in a checkpoint, and what to say about the choice."""
    if _is_state_dict(content):
        return content, []
    places = dict(_places(content))
    if not places:
        raise Refusal(f"it holds {_described(content)}, and no model and no weights")
    usual = sorted((rank for rank in map(_rank, places) if rank), key=lambda rank: rank[:2])
    if not usual and len(places) > 1:
        raise Refusal(
            f"it holds several sets of weights ({_some(places)}) and none under a usual name. "
            "Save the one that you want alone"
        )
    where = usual[0][2] if usual else next(iter(places))
    others = [place for place in places if place != where]
    instead = f", not those at {_some([repr(place) for place in others])}" if others else ""
    return places[where], [f"took the weights at {where!r}{instead}"]


def _rank(place: str) -> tuple[int, int, str] | None:
    """How usual a place is: its depth, then the order of the usual keys."""
    key = place.rpartition(".")[2]
    return (place.count("."), _KNOWN_KEYS.index(key), place) if key in _KNOWN_KEYS else None


def _places(content: Any, above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        # The moments of an optimizer look like weights.
        entries = [] if "param_groups" in content else list(content.items())
    elif isinstance(content, (list, tuple)):
        entries = list(enumerate(content))
    else:
        return
    for key, value in entries:
        place = f"{above}.{key}" if above else str(key)
        if isinstance(value, nn.Module) or _is_state_dict(value):
            yield place, value
        elif depth < 3:
            yield from _places(value, place, depth + 1)


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and any(isinstance(v, Tensor) and v.is_floating_point() for v in content.values())
        and all(
            isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
            for key, value in content.items()
        )
    )


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        if "param_groups" in content or "optimizer" in content:
            return "the state of an optimizer"
        return f"a dict with the keys {_some(content)}" if content else "an empty dict"
    if isinstance(content, Tensor):
        return f"a single tensor of shape {tuple(content.shape)}"
    return f"a {type(content).__name__}"


def _some(names: Any) -> str:
    """The first few names, for a message."""
    shown = [str(name) for name in list(names)[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")


def _with_weights(arch: str, weights: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """The architecture with the weights of a state dict, strictly."""
    model = _built(arch)
    state, notes = _renamed(weights, model.state_dict().keys())
    for classes in _class_counts(arch, _misshapen(model, state)):
        with suppress(LoadError):  # not every architecture has classes
            other = _built(arch, classes)
            if not _misshapen(other, state):
                model = other
                notes.append(f"built {arch} with {classes} classes, as in the file")
                break
    notes += _fit_precision(model, state)
    _fill(model, state, arch)
    return model, notes


def _renamed(weights: Mapping[str, Any], expected: Iterable[str]) -> tuple[Any, list[str]]:
    """The weights under the architecture's names: without what wrappers put before them."""
    names, notes = {key: key for key in weights}, []
    compiled = "_orig_mod."
    if any(compiled in key for key in weights) and not any(compiled in key for key in expected):
        names = {key: key.replace(compiled, "") for key in names}
        notes.append(f"removed {compiled!r} from the names of the weights")
    if "n_averaged" in names and "n_averaged" not in expected:
        del names["n_averaged"]
        notes.append("left out 'n_averaged', the counter of an averaged model")
    while prefix := _shared_prefix(names.values(), expected):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        notes.append(f"removed {prefix!r} from the names of the weights")
    if not notes:
        return weights, notes
    return {name: weights[key] for key, name in names.items()}, notes


def _shared_prefix(names: Iterable[str], expected: Iterable[str]) -> str:
    first = {name.partition(".")[0] + "." for name in names}
    prefix = first.pop() if len(first) == 1 else ""
    unknown = prefix and not any(name.startswith(prefix) for name in expected)
    return prefix if unknown and all(name.startswith(prefix) for name in names) else ""


_Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _misshapen(model: nn.Module, state: Mapping[str, Any]) -> _Shapes:
    """The shapes in the file and in the model of the tensors that differ."""
    pairs = {
        name: (tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if isinstance(state.get(name), Tensor)
        and isinstance(tensor, Tensor)
        and not nn.parameter.is_lazy(tensor)
    }
    # Scalars were tensors of one element before torch 0.4, and load_state_dict takes both.
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b and (a, b) != ((1,), ())}


def _class_counts(arch: str, wrong: _Shapes) -> list[int]:
    """The numbers of classes that could explain the shapes, where only a classifier differs."""
    if arch.partition(":")[0] not in _LIBRARIES:
        return []
    if not all(a and b and a[1:] == b[1:] for a, b in wrong.values()):
        return []
    return sorted({a[0] for a, _ in wrong.values()})


def _fit_precision(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Let the model compute in float64 where its weights do; other types become the model's."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    types = {t.dtype for t in tensors if t.is_floating_point()}
    if types == {torch.float64}:
        model.double()
        return ["the weights are float64, and so is the model"]
    narrow = sorted(str(t).removeprefix("torch.") for t in types if t.itemsize < 4)
    return [f"weights of type {', '.join(narrow)} become float32"] if narrow else []


def _fill(model: nn.Module, state: Mapping[str, Any], arch: str) -> None:
    wrong = _misshapen(model, state)
    if wrong:
        expected = model.state_dict().keys()
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
    else:
        missing, unexpected = model.load_state_dict(state, strict=False)
    shapes = [f"{k} {a} in the file, {b} in the architecture" for k, (a, b) in wrong.items()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise Refusal(
            f"it does not fit {arch}: weights are {', '.join(problems)}. Name the architecture "
            "that it was saved from; one with other options needs --arch package.module:factory"
        )


# ---- architectures ------------------------------------------------------------------------------


def _built(arch: str, classes: int | None = None) -> nn.Module:
    """The architecture with random weights, in eval mode."""
    provider, _, name = arch.partition(":")
    options = {} if classes is None else {"num_classes": classes}
    if not provider or not name:
        raise LoadError(
            f"Cannot build {arch!r}: an architecture is torchvision:NAME, timm:NAME or "
            f"package.module:factory{_nearest(arch)}."
        )
    if provider in _LIBRARIES:
        model = _LIBRARIES[provider](name, options)
    else:
        model = _from_factory(provider, name)
    return model.eval()


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models: Any = _imported("torchvision.models")
    if name.lower() not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    weights = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    with _quiet(), _building(f"torchvision:{name}"):
        model = models.get_model(name, **weights, **options)
    return _checked(model, f"torchvision:{name}")


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    timm: Any = _imported("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    with _quiet(), _building(f"timm:{name}"):
        model = timm.create_model(name, pretrained=False, **options)
    return _checked(model, f"timm:{name}")


_LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _from_factory(module: str, name: str) -> nn.Module:
    arch = f"{module}:{name}"
    factory = import_object(module, name, what=f"build {arch}")
    if isinstance(factory, nn.Module) or not callable(factory):
        return _checked(factory, arch)
    with working_folder_first(), _building(arch):
        model = factory()
    return _checked(model, arch)


@contextmanager
def _building(arch: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise LoadError(f"Cannot build {arch}: it raised {detail}.") from error


def _checked(model: Any, arch: str) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    raise LoadError(f"Cannot build {arch}: it gave a {type(model).__name__}, not an nn.Module.")


def _imported(library: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(library)
    except ImportError as error:
        name = library.partition(".")[0]
        raise LoadError(
            f"Cannot build {name} models: {one_line(error)}. Install it with: pip install {name}"
        ) from error


def _unknown(library: str, name: str, names: Sequence[str]) -> LoadError:
    near = [f"{library}:{n}" for n in difflib.get_close_matches(name.lower(), names, n=3)]
    hint = f"; near are {', '.join(near)}" if near else ""
    return LoadError(f"Cannot build {library}:{name}: {library} has no such model{hint}.")


def _nearest(name: str) -> str:
    with suppress(LoadError):
        if name.lower() in _imported("torchvision.models").list_models():
            return f"; did you mean torchvision:{name}?"
        if _imported("timm").is_model(name):
            return f"; did you mean timm:{name}?"
    return ""


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


def _is_text(probe: Probe) -> bool:
    return not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", probe.head)


_NOT_YET = "bntools does not read that yet. Save the model itself: torch.save(model, path)"
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
    Format("an ONNX model", _is_onnx, advice=_NOT_YET),
    Format("a text file", _is_text),
    Format("of no format that bntools knows", lambda _: True),
)
