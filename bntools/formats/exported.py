"""What torch.export saves: programs (`.pt2`), read without unpickling or evaluating anything.

`torch.export.load` unpickles weights, constants and example inputs, resolves names in the graph to
any attribute of torch, puts other names into code that it executes, and evaluates expressions
with sympy. Here the graph is JSON that becomes a `bntools.programs` program, whose operations are
on an allow-list; weights are raw bytes, and what is pickled goes the way of every pickle
(`bntools.formats.unpickling`).
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bntools.archives import check_stored
from bntools.formats.interface import Loaded, Request, Saved
from bntools.formats.notes import NOTE, note, note_in, recipe_of_note
from bntools.formats.probe import Probe, explained, probe_file
from bntools.formats.soundness import check_sound
from bntools.formats.unpickling import unpickled
from bntools.programs.lifting import Source, lifted
from bntools.programs.operators import trust_namespace
from bntools.programs.program import Program
from bntools.programs.reading import read_program
from bntools.programs.values import dtype_of
from bntools.recipe import Recipe, mark
from bntools.runtimes.capturing import capture
from bntools.trust import AllowList, Refusal
from bntools.writing import write_atomically

__all__ = ["from_exported", "read_exported", "write_exported"]

_LARGEST_JSON = 512 * 2**20
_OLD = "serialized_exported_program.json"
_STRIDED = 7


@dataclass(frozen=True)
class _Archive:
    """The members of an archive, whatever folder they are in."""

    probe: Probe
    file: zipfile.ZipFile
    names: Mapping[str, zipfile.ZipInfo]
    request: Request
    storages: dict[str, Tensor] = field(default_factory=dict)

    def raw(self, name: str) -> bytearray:
        """The bytes of a member; KeyError where there is none."""
        info = self.names[name]
        data = bytearray(info.file_size)
        with self.file.open(info) as stream:
            view, done = memoryview(data), 0
            while count := stream.readinto(view[done:]):  # type: ignore[attr-defined] # ZipExtFile has it
                done += count
        if done != info.file_size:
            raise ValueError(f"{name} is incomplete")
        return data

    def json(self, name: str) -> Any:
        """A member that is JSON."""
        if self.names[name].file_size > _LARGEST_JSON:
            raise ValueError(f"{name} is too large")
        return json.loads(bytes(self.raw(name)))

    def pickled(self, name: str) -> Any:
        """A member that is a torch.save file, read as untrusted as any."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "part.pt"
            path.write_bytes(self.raw(name))
            return unpickled(probe_file(path), self.request.allowed)[0]


def from_exported(program: torch.export.ExportedProgram) -> Program:
    """An exported program in memory as an `nn.Module` that every function of bntools takes.

    Calls with the tensors of one layer are that layer again, under its path; what it gives is
    equal to what `program.module()` gives. The module has copies of the program's tensors. Write it
    with `bntools.save(module, "model.pt2")`.

    Raises LoadError for programs that call what bntools does not know.

    Example:
        >>> import torch, bntools
        >>> layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> program = torch.export.export(layers, (torch.zeros(2, 3, 8, 8),))
        >>> bntools.fold(bntools.from_exported(program)).report.folds[0].hosts
        ('0',)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        torch.export.save(program, path)
        probe = probe_file(path)
        with explained(probe):
            loaded = read_exported(probe, Request(None, AllowList(), trust=True))
    module: Any = loaded.model
    made: Program = module
    return made


def read_exported(probe: Probe, request: Request) -> Loaded:
    """The program in an archive as an `nn.Module`, its layers as submodules."""
    with zipfile.ZipFile(probe.path) as file:
        archive = _Archive(probe, file, _members(probe, file), request)
        source = _old_source(archive) if _OLD in archive.names else _source(archive)
    if request.trust:
        _trust(source.plan["graph"])
    program = lifted(source)
    check_sound(program, probe)
    program.check()
    notes = [] if request.arch is None else [f"--arch {request.arch} is not used: it is a program"]
    notes += _notes(source, program)
    recipe = recipe_of_note(note_in(probe))
    if recipe is not None:
        mark(program, Recipe.from_dict(recipe))
    return Loaded(program, tuple(notes), recipe)


def write_exported(saved: Saved, path: Path, force: bool) -> tuple[str, ...]:  # noqa: FBT001 - as all writers
    """Export a model and write the program; what the user should know about it."""
    texts = {NOTE: note(saved.recipe)}
    captured = capture(saved.model, saved.example_inputs, str(path), texts)
    write_atomically(path, lambda stream: stream.write(captured.data), force=force)
    return captured.notes


# ---- the archive ---------------------------------------------------------------------------------


def _members(probe: Probe, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their names without the folder that all of a new archive are in."""
    check_stored(probe.archive or ())
    infos = file.infolist()
    old = any(info.filename == _OLD for info in infos)
    return {info.filename if old else info.filename.partition("/")[2]: info for info in infos}


def _source(archive: _Archive) -> Source:
    """The archive that torch.export.save writes since torch 2.8."""
    models = [n for n in archive.names if n.startswith("models/") and n.endswith(".json")]
    name = _model_name(archive, models)
    if archive.names.get("byteorder") and bytes(archive.raw("byteorder")) != b"little":
        raise Refusal("its weights are big-endian, which bntools does not read")
    tensors: dict[str, Tensor] = {}
    for folder, kind in (("weights", "weights"), ("constants", "constants")):
        legacy = f"data/{folder}/{name}.pt"
        if legacy in archive.names:
            tensors.update(_checked_tensors(archive.pickled(legacy)))
        else:
            config = archive.json(f"data/{folder}/{name}_{kind}_config.json")
            tensors.update(_raw_tensors(archive, f"data/{folder}", config["config"]))
    return read_program(archive.json(f"models/{name}.json"), tensors)


def _model_name(archive: _Archive, models: Sequence[str]) -> str:
    names = [model.removeprefix("models/").removesuffix(".json") for model in models]
    if "model" in names:
        return "model"
    if len(names) == 1:
        return names[0]
    if names:
        raise Refusal(
            f"it holds {len(names)} programs ({', '.join(sorted(names)[:5])}). Save the one that"
            " you mean: torch.export.save(program, path)"
        )
    compiled = any(name.startswith("data/aotinductor") for name in archive.names)
    what = "code compiled by AOTInductor" if compiled else "no program"
    raise Refusal(f"it holds {what}. Save the exported program: torch.export.save(program, path)")


def _old_source(archive: _Archive) -> Source:
    """The archive that torch.export.save wrote up to torch 2.7."""
    tensors: dict[str, Tensor] = {}
    for part in ("serialized_state_dict", "serialized_constants"):
        for ending in (".pt", ".json"):
            if archive.names.get(part + ending) and archive.names[part + ending].file_size:
                tensors.update(_checked_tensors(archive.pickled(part + ending)))
    return read_program(archive.json(_OLD), tensors)


def _checked_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise Refusal("its weights are no dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Refusal(
                f"it holds {name}, a {type(value).__name__}, which only its own code can use"
            )
    return dict(content)


def _raw_tensors(
    archive: _Archive, folder: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    known: dict[str, Tensor] = {}
    for name, payload in config.items():
        key = json.dumps([payload["path_name"], payload["is_param"], payload["tensor_meta"]])
        if payload["use_pickle"] or payload["tensor_meta"] is None:
            raise Refusal(
                f"{name} is pickled (an object, or a tensor of a class of its own), which can run"
                " any code, and was not read. Export the model without it"
            )
        if key not in known:
            known[key] = _raw_tensor(archive, f"{folder}/{payload['path_name']}", payload)
        yield name, known[key]


def _raw_tensor(archive: _Archive, record: str, payload: Mapping[str, Any]) -> Tensor:
    meta = payload["tensor_meta"]
    dtype = dtype_of(meta["dtype"])
    sizes, strides = (_numbers(meta[key]) for key in ("sizes", "strides"))
    (offset,) = _numbers([meta["storage_offset"]])
    if meta["layout"] != _STRIDED:
        raise Refusal("a tensor in it is sparse, which bntools does not read")
    if record not in archive.storages:
        archive.storages[record] = torch.frombuffer(
            archive.raw(record) or bytearray(8), dtype=torch.uint8
        )
    flat = archive.storages[record]
    flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
    if 0 in sizes:
        made = torch.empty(sizes, dtype=dtype)
    else:
        made = flat.as_strided(sizes, strides, offset)  # which checks the bounds
    if not payload["is_param"]:
        return made
    grad = bool(meta["requires_grad"]) and (made.is_floating_point() or made.is_complex())
    return nn.Parameter(made, requires_grad=grad)


def _numbers(sizes: Sequence[Any]) -> tuple[int, ...]:
    found = tuple(size["as_int"] for size in sizes)
    if not all(type(number) is int and number >= 0 for number in found):
        raise ValueError("a tensor has an impossible size")
    return found


# ---- what else is in the archive --------------------------------------------------------------


def _trust(graph: Mapping[str, Any]) -> None:
    for node in graph["nodes"]:
        match = re.fullmatch(r"torch\.ops\.(\w+)\.\w+\.\w+", str(node["target"]))
        if match is not None and match[1] != "higher_order":
            trust_namespace(match[1])


def _notes(source: Source, program: Program) -> Iterator[str]:
    if program.training:
        yield "the program was exported in training mode"
    unread = len(source.plan["guards"]) - len(program.prepared.guards)
    if unread:
        yield f"{unread} conditions on the inputs are not understood and not checked"
