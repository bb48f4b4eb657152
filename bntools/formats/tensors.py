"""The layout of a safetensors file: a JSON header, then the tensors one after the other.

Files are read by the safetensors library, which maps them and holds what the header claims against
their size. They are written here, as a stream: the library copies what is not contiguous, all of it
at once, and writes to names only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bntools.errors import SaveError
from bntools.formats.probe import Probe
from bntools.trust import Refusal

__all__ = ["Contents", "read_tensors", "write_tensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LONGEST_HEADER = 1 << 24
_ALIGNMENT = 64  # bytes, as torch's allocator
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Contents:
    """The tensors of a file, mapped into memory and not yet read, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(probe: Probe) -> Contents:
    """Map the tensors of a file; changes to them do not reach it. Raises `Refusal`."""
    length = int.from_bytes(probe.head[:8], "little")
    if length > _LONGEST_HEADER:
        raise Refusal(f"its header claims {length} bytes, which is beyond any sensible size")
    try:
        with safe_open(probe.path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            return Contents({name: _aligned(file.get_tensor(name)) for name in names}, metadata)
    except SafetensorError as error:
        raise Refusal(f"it is damaged or incomplete ({error}). Copy it again") from error


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch itself would put one: kernels round by where in memory they work."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def write_tensors(
    stream: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file, tensors that fill whole cache lines first, then the widest types, then by name.

    So nearly all of them can be used where the file is mapped, without a copy.
    Raises `SaveError` for what the format cannot hold.
    """
    order = sorted(tensors, key=lambda name: (*_place(tensors[name]), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for name in order:
        tensor = tensors[name]
        _check(name, tensor)
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _LONGEST_HEADER:
        raise SaveError("Cannot write a safetensors file: the names of its tensors are too many.")
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for piece in _bytes(tensors[name] for name in order):
        stream.write(piece)


def _place(tensor: Tensor) -> tuple[bool, int]:
    size = tensor.numel() * tensor.dtype.itemsize
    return size % _ALIGNMENT != 0, -tensor.dtype.itemsize


def _check(name: str, tensor: Tensor) -> None:
    if name == _METADATA or tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        what = f"{tensor.dtype}".removeprefix("torch.")
        what = what if tensor.layout is torch.strided else f"{what}, {tensor.layout}"
        raise SaveError(
            f"Cannot write {name} ({what}) to a safetensors file: the format has no such tensors. "
            "Write a .pt file."
        )


def _bytes(tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    """The contents of tensors, of which only one at a time is copied where it is not in order."""
    for tensor in tensors:
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
