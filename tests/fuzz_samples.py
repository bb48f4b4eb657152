"""Valid files of every format, and the ways in which the fuzz test damages them."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from randomise import randomise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import bntools

ARCH = "fuzz_samples:network"
INPUTS = torch.zeros(1, 3, 8, 8)


def network() -> nn.Module:
    """A small one with what files hold: layers, norms, hooks of torchvision."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(stem, BasicBlock(4, 4), head).eval()
    randomise(model)
    return model


# ---- the samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A file, what reads it and, where a model is split in two, what has to be beside it."""

    kind: str
    name: str
    content: bytes
    beside: tuple[tuple[str, bytes], ...] = ()


def samples(folder: Path) -> list[Sample]:
    """One of each format; `folder` is for the writers that take names only."""
    return [*_models(folder), *_programs(folder), *_inputs(folder), *_recipes()]


def _models(folder: Path) -> Iterator[Sample]:
    model = network()
    folded = bntools.fold(model, INPUTS)
    for name, zipped in (("zip", True), ("legacy", False)):
        for what, content in (("whole", model), ("weights", {"state_dict": model.state_dict()})):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            yield Sample(f"{what} {name}", "m.pt", stream.getvalue())
    for name, options in {
        "folded.pt": {}, "weights.pt": {"state_dict": True}, "weights.safetensors": {}
    }.items():  # fmt: skip
        bntools.save(folded, folder / name, **options)
        kind = f"bntools {name}"
        yield Sample(kind, f"m.{name.rpartition('.')[2]}", (folder / name).read_bytes())


def _programs(folder: Path) -> Iterator[Sample]:
    model = network()
    torch.export.save(torch.export.export(model, (INPUTS,)), folder / "m.pt2")
    yield Sample("pt2", "m.pt2", (folder / "m.pt2").read_bytes())
    torch.jit.trace(model, INPUTS).save(folder / "m.ts")
    yield Sample("TorchScript", "m.pt", (folder / "m.ts").read_bytes())
    yield Sample("TorchScript, trusted", "m.pt", (folder / "m.ts").read_bytes())
    yield from _onnx(model, folder)


def _onnx(model: nn.Module, folder: Path) -> Iterator[Sample]:
    import onnx

    torch.onnx.export(
        model, (INPUTS,), folder / "m.onnx", dynamo=True, optimize=False, verbose=False
    )
    proto = onnx.load(folder / "m.onnx")
    yield Sample("ONNX", "m.onnx", proto.SerializeToString())
    onnx.save(
        proto, folder / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0
    )
    data = (("e.data", (folder / "e.data").read_bytes()),)
    yield Sample("ONNX with data", "e.onnx", (folder / "e.onnx").read_bytes(), data)


def _inputs(folder: Path) -> Iterator[Sample]:
    arrays = {"arg0": INPUTS.numpy(), "mask": np.ones((1, 4), bool)}
    for kind, write in (("npz", np.savez), ("npz, compressed", np.savez_compressed)):
        write(folder / "x.npz", **arrays)
        yield Sample(f"inputs {kind}", "x.npz", (folder / "x.npz").read_bytes())
    np.save(folder / "x.npy", INPUTS.numpy())
    yield Sample("inputs npy", "x.npy", (folder / "x.npy").read_bytes())
    for kind, zipped in (("zip", True), ("legacy", False)):
        stream = io.BytesIO()
        content = (INPUTS, {"scale": torch.ones(2)})
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        yield Sample(f"inputs pt {kind}", "x.pt", stream.getvalue())


def _recipes() -> Iterator[Sample]:
    for kind in ("fold", "freeze", "replace"):
        yield Sample(f"recipe {kind}", "r.json", json.dumps(_cut(kind).recipe.to_dict()).encode())


@lru_cache
def _cut(kind: str) -> Any:
    """The network after a surgery."""
    surgeries: dict[str, Callable[[nn.Module], Any]] = {
        "fold": lambda model: bntools.fold(model, INPUTS),
        "freeze": bntools.freeze,
        "replace": lambda model: bntools.replace(model, "groupnorm"),
    }
    return surgeries[kind](network())


# ---- what reads them -----------------------------------------------------------------------------


def read(sample: Sample, path: Path) -> Any:
    """Read a file as bntools does for users."""
    if sample.kind.startswith("inputs"):
        return bntools.read_inputs(path)
    if sample.kind.startswith("recipe"):
        return _apply(path, sample.kind.split()[1])
    if sample.kind.startswith("ONNX"):
        return bntools.inspect_onnx(path)
    arch = ARCH if "weights" in sample.kind else None
    return bntools.load(path, arch, trust="trusted" in sample.kind)


def _apply(path: Path, kind: str) -> Any:
    """Read a recipe as that of a file with its weights: JSON in safetensors' metadata."""
    tensors = {k: v for k, v in _cut(kind).model.state_dict().items() if isinstance(v, Tensor)}
    text = path.read_bytes().decode("latin-1")
    header: dict[str, Any] = {"__metadata__": {"bntools_recipe": text, "bntools_version": "0"}}
    at, pieces = 0, []
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        offsets = [at, at + len(raw)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        pieces.append(raw)
        at += len(raw)
    head = json.dumps(header).encode()
    file = path.with_suffix(".safetensors")
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(pieces))
    try:
        return bntools.load(file, ARCH)
    finally:
        file.unlink()


# ---- mutations -----------------------------------------------------------------------------------

Mutation = Callable[[bytes, random.Random], bytes]
_DEEP = "a list in a list in a list"
_TELLING = (b"\0", b"\xff", b"\x7f", b"\x80", b"(", b")", b"R", b".", b"\n", b"}", b"]", b'"')
_NUMBERS = (
    0,
    1,
    -1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
)


def mutated(content: bytes, chance: random.Random, others: list[bytes]) -> tuple[bytes, str]:
    """A damaged file, and how it was damaged."""
    ways: dict[str, Mutation] = {
        "bits": _bits,
        "bytes": _bytes,
        "number": _number,
        "truncated": lambda d, c: d[: c.randrange(len(d))],
        "inserted": _inserted,
        "removed": _removed,
        "repeated": _repeated,
        "spliced": lambda d, c: _spliced(d, c.choice(others), c),
    }
    if content[:2] == b"PK":
        ways |= {"member": _in_member, "pickle": _in_pickle, "members": _members}
    if content[:1] == b"{" or content[8:9] == b"{":
        ways |= {"JSON": _in_json, "JSON again": _in_json, "JSON text": _in_text}
    way = chance.choice(sorted(ways))
    try:
        changed = ways[way](content, chance)
        for _ in range(chance.choice((0, 0, 0, 1, 2))):
            changed = ways[way](changed, chance) if changed else changed
    except (ValueError, KeyError, IndexError, RecursionError, zipfile.BadZipFile):
        way, changed = "bits", _bits(content, chance)
    return changed, way


def _bits(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _bytes(data: bytes, chance: random.Random) -> bytes:
    place, new = chance.randrange(len(data)), chance.choice(_TELLING) * chance.choice((1, 1, 4, 64))
    return data[:place] + new + data[place + len(new) :]


def _number(data: bytes, chance: random.Random) -> bytes:
    size = chance.choice((1, 2, 4, 8))
    value = chance.choice(_NUMBERS) & (2 ** (8 * size) - 1)
    place = chance.randrange(len(data))
    return (
        data[:place] + value.to_bytes(size, chance.choice(("little", "big"))) + data[place + size :]
    )


def _inserted(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.randbytes(chance.choice((1, 2, 4, 16, 256, 4096))) + data[place:]


def _removed(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + data[place + chance.choice((1, 2, 4, 16, 256, 4096)) :]


def _repeated(data: bytes, chance: random.Random) -> bytes:
    place, size = chance.randrange(len(data)), chance.choice((1, 4, 16, 256, 4096))
    return data[:place] + data[place : place + size] * chance.choice((2, 3, 50)) + data[place:]


def _spliced(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


# Mutations inside what holds the content, which leave the frame around it valid.


def _archived(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def _unpacked(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


_ANY = ("bits", "bytes", "number", "truncated", "inserted", "removed", "repeated")


def _changed(data: bytes, chance: random.Random) -> bytes:
    """One mutation of a part, which may be JSON itself."""
    if not data:
        return chance.randbytes(4)
    if data[:1] == b"{" and chance.random() < 0.8:
        return _in_json(data, chance)
    ways: list[Mutation] = [_bits, _bytes, _number, _inserted, _removed, _repeated]
    return chance.choice(ways)(data, chance)


def _in_member(data: bytes, chance: random.Random) -> bytes:
    members = _unpacked(data)
    place = chance.randrange(len(members))
    name, content = members[place]
    members[place] = name, _changed(content, chance)
    return _archived(members)


def _in_pickle(data: bytes, chance: random.Random) -> bytes:
    members = _unpacked(data)
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith((".pkl", ".json", ".pt"))]
    place = chance.choice(pickles)
    name, content = members[place]
    if content[:2] == b"PK":
        members[place] = name, _in_pickle(content, chance)
    else:
        members[place] = name, _changed(content, chance)
    return _archived(members)


def _members(data: bytes, chance: random.Random) -> bytes:
    """Members leave, come twice, or change their names."""
    members = _unpacked(data)
    place = chance.randrange(len(members))
    name, content = members[place]
    what = chance.randrange(4)
    if what == 0:
        del members[place]
    elif what == 1:
        members.append((name + "x", content))
    elif what == 2:
        members[place] = (name.replace("/", "/../", 1), content)
    else:
        members[place] = (members[chance.randrange(len(members))][0].upper(), content)
    return _archived(members)


def _odd(chance: random.Random) -> Any:
    plain = (None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x" * 5000, "\0", [], {})
    telling = ("../../etc/passwd", "__class__", "F64", [[]], {"a": {}}, [-1], [2**40, 2**40], _DEEP)
    return chance.choice((*plain, *telling))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in JSON data with each of its keys."""
    stack = [value]
    while stack:
        container = stack.pop()
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        for key, inner in entries:
            yield container, key
            if isinstance(inner, (dict, list)) and inner:
                stack.append(inner)


def _in_json(data: bytes, chance: random.Random) -> bytes:
    """A value of another type, a key that leaves, or one that comes."""
    framed = data[:1] != b"{"
    length = int.from_bytes(data[:8], "little") if framed else len(data)
    text, rest = (data[8 : 8 + length], data[8 + length :]) if framed else (data, b"")
    content = json.loads(text)
    container, key = chance.choice(list(_places(content)))
    what = chance.randrange(5)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[chance.choice(["x", "version", "edits", "__metadata__", ""])] = container[key]
    elif what == 2 and isinstance(container[key], str) and container[key][:1] in ("{", "["):
        container[key] = _in_json(container[key].encode(), chance).decode()
    else:
        container[key] = _odd(chance)
    return _framed(json.dumps(content).encode(), rest, framed=framed)


def _in_text(data: bytes, chance: random.Random) -> bytes:
    """The text itself, with its length put right."""
    framed = data[:1] != b"{"
    length = int.from_bytes(data[:8], "little") if framed else len(data)
    text, rest = (data[8 : 8 + length], data[8 + length :]) if framed else (data, b"")
    ways: list[Mutation] = [_bits, _bytes, _inserted, _removed, _repeated]
    return _framed(chance.choice(ways)(text, chance), rest, framed=framed)


def _framed(text: bytes, rest: bytes, *, framed: bool) -> bytes:
    if f'"{_DEEP}"'.encode() in text:
        depth = 1 + len(text) % 30_000
        text = text.replace(f'"{_DEEP}"'.encode(), b"[" * depth + b"]" * depth)
    return len(text).to_bytes(8, "little") + text + rest if framed else text
