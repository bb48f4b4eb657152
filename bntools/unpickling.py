"""What torch.save wrote, unpickled without running anything that the file contains.

`bntools.pickles` follows each pickle before `torch.load(weights_only=True)` reads it, and only
classes of torch.nn, torchvision and timm, and those that the user names, are created.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import IO, Any

import torch
from torch._C import PyTorchFileReader

from bntools.archives import Member, check_stored, directory, is_archive
from bntools.imports import quiet, working_folder_first
from bntools.pickles import LARGEST_PICKLE, Examined, examine, too_long
from bntools.trust import AllowList, Refusal

__all__ = ["LEGACY_MAGIC", "refused", "unpickle"]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5
_ALWAYS_REPEATED = 2**26
_LONGEST = 1000


def unpickle(
    stream: IO[bytes], allowed: AllowList, *, trust: bool = False
) -> tuple[Any, list[str]]:
    """The content of a file that is open for reading, and what was left out of it.

    With `trust`, a file that wants more than it may is unpickled all the same, and runs its code.
    Raises Refusal for what may not be, and whatever torch raises for a damaged file.
    """
    size, head = stream.seek(0, 2), _head(stream)
    members = directory(stream) if is_archive(head) else None
    if members is None and head != LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    if members is not None:
        _check_archive(members)
    stream.seek(0)
    with quiet():
        try:
            if members is None:
                examined = _examined_legacy(stream, size, allowed)
            else:
                examined = _examined_zip(stream, members, size, allowed)
        except Refusal:
            if not trust:
                raise
            stream.seek(0)
            with working_folder_first():
                return torch.load(stream, map_location="cpu", weights_only=False), []
        stream.seek(0)
        data = stream
        if examined.edits:
            data = BytesIO(examined.rewritten(stream.read()))
        with torch.serialization.safe_globals(examined.grants):
            return torch.load(data, map_location="cpu", weights_only=True), examined.leftovers


def refused(error: Refusal) -> str:
    """Why a file is refused that should hold tensors alone, safe to print."""
    text = f"it holds more than tensors and plain values ({', '.join(error.wanted)})"
    text = text if error.wanted else str(error)
    return "".join(c if c.isprintable() else "?" for c in text)[:_LONGEST]


def _head(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    return stream.read(len(LEGACY_MAGIC))


def _check_archive(members: Sequence[Member]) -> None:
    if len({member.name.partition("/")[0] for member in members}) > 1:
        raise Refusal("its archive has more than one folder, which torch.save does not write")
    check_stored(members)


def _examined_zip(
    stream: IO[bytes], members: Sequence[Member], size: int, allowed: AllowList
) -> Examined:
    sizes = {member.name.partition("/")[2]: member.size for member in members}
    if sizes.get("data.pkl", 0) > LARGEST_PICKLE:
        raise Refusal(too_long())
    # The very reader that torch.load will use, so that both see the same pickle.
    pickled = PyTorchFileReader(stream).get_record("data.pkl")
    examined = examine(BytesIO(pickled), allowed)
    _check_repeats(examined, size)
    for key, claimed in examined.storages.items():
        if claimed > sizes.get(f"data/{key}", 0):
            raise Refusal(f"it is damaged: its tensor storage {key!r} is incomplete")
    if examined.edits:
        raise Refusal("it names classes in a way that torch.save does not write")
    return examined


def _examined_legacy(stream: IO[bytes], size: int, allowed: AllowList) -> Examined:
    pickles = [examine(stream, allowed) for _ in range(_LEGACY_PICKLES)]
    content = pickles[3]
    if any(other.grants or other.edits for other in (*pickles[:3], pickles[4])):
        raise Refusal("its header names classes, which torch.save does not write")
    if sum(content.storages.values()) > size:
        raise Refusal("it is damaged or incomplete: tensors are missing. Copy it again")
    _check_repeats(content, size)
    return content


def _check_repeats(examined: Examined, size: int) -> None:
    """A tensor that repeats its numbers costs nothing in the file, and its size when it is used."""
    if examined.repeated > size + _ALWAYS_REPEATED:
        raise Refusal(
            f"its tensors repeat their numbers to {examined.repeated:,} bytes more than are in it."
            " Save them with .contiguous()"
        )
