"""Zip archives from strangers: their directory, read so strictly that all readers see the same.

Two readers can see two archives in one file: they search the end of the directory, add up offsets
and believe sizes each in their own way (`zipfile` and the miniz in torch do). What is refused here
is what they can disagree on, and what unpacks to more than the file should hold.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from bntools.trust import Refusal

__all__ = [
    "Member",
    "check_stored",
    "check_unpacked",
    "directory",
    "holds_arrays",
    "is_archive",
]

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR = b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END64_SIZE, _LOCATOR_SIZE, _CENTRAL_SIZE, _LOCAL_SIZE = 22, 56, 20, 46, 30
_LONGEST_COMMENT = 2**16 - 1
_MANY16, _MANY32 = 2**16 - 1, 2**32 - 1
_MOST_MEMBERS = 2**18
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_STORED, _DEFLATED = 0, 8
_LARGEST_RATIO = 100
_ALWAYS_UNPACKED = 2**26
# No absolute path, no way up, nothing that a terminal or another system reads otherwise.
_NAME = re.compile(r"(?!/)[^\x00-\x1f\x7f\\]+")


@dataclass(frozen=True)
class Member:
    """One file in an archive: its bytes when unpacked and as stored, and where it starts."""

    name: str
    size: int
    packed: int
    start: int
    compressed: bool


def is_archive(head: bytes) -> bool:
    """Whether a file that starts like this is a zip archive."""
    return head.startswith((_LOCAL, _END, _END64))


def directory(stream: IO[bytes]) -> tuple[Member, ...]:
    """The members of a zip archive, in the order of their places in the file.

    Raises `Refusal` for what is damaged, or what two readers could read differently.
    """
    size = stream.seek(0, 2)
    start, length, count = _end(stream, size)
    stream.seek(start)
    members = sorted(_entries(stream.read(length), count), key=lambda member: member.start)
    names = [member.name.lower() for member in members]
    if len(set(names)) < len(names):
        raise Refusal("its archive has two files of one name")
    ends = [*(member.start for member in members[1:]), start]
    for member, end in zip(members, ends, strict=True):
        _check_place(stream, member, end)
    return tuple(members)


def check_stored(members: Sequence[Member]) -> None:
    """Refuse compression, where the writer of the format never compresses."""
    if any(member.compressed for member in members):
        raise Refusal("its archive is compressed, which torch.save never does. Unpack it first")


def check_unpacked(members: Sequence[Member]) -> None:
    """Refuse what unpacks to far more than it is: 100 times its size, and over 64 MiB."""
    size, packed = sum(m.size for m in members), sum(m.packed for m in members)
    if size > max(_ALWAYS_UNPACKED, _LARGEST_RATIO * packed):
        raise Refusal(
            f"its archive unpacks to {size:,} bytes, over {_LARGEST_RATIO} times what it takes."
            " Unpack it yourself if you trust it"
        )


def holds_arrays(stream: IO[bytes]) -> bool:
    """Whether an archive is one of NumPy arrays (.npz), and unpacks to a sensible size."""
    members = directory(stream)
    if not any(member.name.endswith(".npy") for member in members):
        return False
    check_unpacked(members)
    return True


# ---- the end of the archive ----------------------------------------------------------------------


def _end(stream: IO[bytes], size: int) -> tuple[int, int, int]:
    """Where the directory starts, its length, and how many members it lists."""
    stream.seek(max(0, size - _END_SIZE - _LONGEST_COMMENT))
    tail = stream.read()
    place = tail.rfind(_END)
    if place < 0 or len(tail) - place < _END_SIZE:
        raise _damaged("it has no end")
    found = size - len(tail) + place
    disk, disk_of_start, here, count, length, start, comment = struct.unpack_from(
        "<4H2LH", tail, place + 4
    )
    if found + _END_SIZE + comment != size:
        raise _ambiguous("something follows its end")
    if (disk, disk_of_start) != (0, 0) or here != count:
        raise Refusal("its archive is in several parts. Join them first")
    wide = _end64(stream, found)
    if wide is None and (_MANY32 in (length, start) or count == _MANY16):
        raise _damaged("its large directory is missing")
    last = found
    if wide is not None:
        limits = (_MANY32, _MANY32, _MANY16)
        for said, really, limit in zip((start, length, count), wide[1:], limits, strict=True):
            if said not in (really, limit):
                raise _ambiguous("its two ends contradict each other")
        last, start, length, count = wide
    if start + length != last:
        raise _ambiguous("its directory is not where it says")
    if count > _MOST_MEMBERS or count * _CENTRAL_SIZE > length:
        raise Refusal(f"its archive lists {count:,} files, beyond any sensible number")
    return start, length, count


def _end64(stream: IO[bytes], found: int) -> tuple[int, int, int, int] | None:
    """Where the zip64 end is, where the directory starts, its length and count, if it has one."""
    if found < _LOCATOR_SIZE + _END64_SIZE:
        return None
    stream.seek(found - _LOCATOR_SIZE)
    locator = stream.read(_LOCATOR_SIZE)
    if not locator.startswith(_LOCATOR):
        return None
    disk, place, disks = struct.unpack_from("<LQL", locator, 4)
    if disk != 0 or disks > 1 or place != found - _LOCATOR_SIZE - _END64_SIZE:
        raise _ambiguous("its large end is not where it says")
    stream.seek(place)
    record = stream.read(_END64_SIZE)
    if not record.startswith(_END64):
        raise _damaged("its large end is missing")
    length, one, two, here, count, size, start = struct.unpack_from("<Q4x2L4Q", record, 4)
    if length != _END64_SIZE - 12 or (one, two) != (0, 0) or here != count:
        raise _ambiguous("its large end is in several parts")
    return place, start, size, count


# ---- the members ---------------------------------------------------------------------------------


def _entries(data: bytes, count: int) -> list[Member]:
    members, place = [], 0
    for _ in range(count):
        if len(data) - place < _CENTRAL_SIZE or not data.startswith(_CENTRAL, place):
            raise _damaged("its directory breaks off")
        flags, method, packed, size, *lengths, start = struct.unpack_from(
            "<HH8xLL3H8xL", data, place + 8
        )
        end = place + _CENTRAL_SIZE + sum(lengths)
        if end > len(data):
            raise _damaged("its directory breaks off")
        body = data[place + _CENTRAL_SIZE : end]
        name = _name(body[: lengths[0]], flags)
        extra = body[lengths[0] : lengths[0] + lengths[1]]
        size, packed, start = _widened(extra, (size, packed, start))
        if flags & _ENCRYPTED:
            raise Refusal("its archive is encrypted. Unpack it first")
        if method not in (_STORED, _DEFLATED) or (method == _STORED and size != packed):
            raise Refusal(f"its archive holds {name!r} in a way that is not read. Unpack it first")
        members.append(Member(name, size, packed, start, method != _STORED))
        place = end
    if place != len(data):
        raise _ambiguous("something follows its directory")
    return members


def _name(raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise _damaged("a name in it is no text") from None
    parts = name.removesuffix("/").split("/")
    if not _NAME.fullmatch(name) or any(part in ("", ".", "..") for part in parts):
        raise Refusal(f"its archive has a file {name!r}, which is no name inside a folder")
    return name


def _widened(extra: bytes, narrow: tuple[int, int, int]) -> tuple[int, int, int]:
    """The size, packed size and start, from the zip64 field where the directory points to it."""
    values, place = list(narrow), 0
    seen = False
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        field = extra[place + 4 : place + 4 + length]
        if len(field) < length or (kind == 1 and seen):
            raise _damaged("its directory breaks off")
        if kind == 1:
            seen = True
            wide = [i for i, value in enumerate(values) if value == _MANY32]
            if length < 8 * len(wide):
                raise _damaged("a large size in it is missing")
            for order, i in enumerate(wide):
                values[i] = struct.unpack_from("<Q", field, 8 * order)[0]
        place += 4 + length
    return values[0], values[1], values[2]


def _check_place(stream: IO[bytes], member: Member, end: int) -> None:
    """A member is where the directory says, under that name, and before the next one."""
    stream.seek(member.start)
    head = stream.read(_LOCAL_SIZE)
    if len(head) < _LOCAL_SIZE or not head.startswith(_LOCAL):
        raise _damaged(f"{member.name!r} is not where it says")
    flags, method, packed, size, *lengths = struct.unpack_from("<HH8xLLHH", head, 6)
    name = _name(stream.read(lengths[0]), flags)
    if name != member.name or (method != _STORED) != member.compressed:
        raise _ambiguous(f"{member.name!r} is called otherwise where it is")
    deferred = bool(flags & _DESCRIPTOR)
    if any(
        local not in (value, _MANY32) and not (deferred and local == 0)
        for local, value in ((size, member.size), (packed, member.packed))
    ):
        raise _ambiguous(f"{member.name!r} has two sizes")
    if member.start + _LOCAL_SIZE + sum(lengths) + member.packed > end:
        raise _ambiguous(f"{member.name!r} overlaps what follows it")


def _damaged(how: str) -> Refusal:
    return Refusal(f"it is damaged or incomplete: of its archive, {how}. Copy it again")


def _ambiguous(how: str) -> Refusal:
    return Refusal(f"its archive can be read in two ways ({how}), and is not")
