"""Zip archives from strangers: what two readers could read differently is read by none."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from hostile import SINGING, write_zip
from torch import nn

from bntools import archives
from bntools.archives import check_unpacked, directory
from bntools.arrays import read_arrays
from bntools.errors import DataError, InputError, LoadError
from bntools.formats.probe import probe_file
from bntools.inputs import read_inputs
from bntools.loading import load
from bntools.trust import Refusal

END, CENTRAL, LOCAL, END64, LOCATOR = b"PK\5\6", b"PK\1\2", b"PK\3\4", b"PK\6\6", b"PK\6\7"


def saved(**members: bytes) -> bytes:
    """A plain archive of stored members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (members or {"a": b"aaaa", "b": b"bbbb"}).items():
            archive.writestr(f"m/{name}", content)
    return stream.getvalue()


def at(data: bytes, place: int, form: str, value: int) -> bytes:
    """The same bytes with another number in one place."""
    changed = bytearray(data)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


def read(data: bytes):
    return directory(io.BytesIO(data))


def written(tmp_path, model=None) -> bytes:
    torch.save(model or nn.Linear(2, 2), tmp_path / "plain.pt")
    return (tmp_path / "plain.pt").read_bytes()


def test_members_are_listed_in_the_order_of_their_places():
    """With their sizes and whether they are compressed."""
    found = read(saved(a=b"12345", b=b""))
    assert [(m.name, m.size, m.start, m.compressed) for m in found] == [
        ("m/a", 5, 0, False),
        ("m/b", 0, 38, False),
    ]


def test_what_torch_writes_is_read(tmp_path):
    """Its archives end in the large form although they are small, and defer their sizes."""
    written(tmp_path)
    with zipfile.ZipFile(tmp_path / "plain.pt") as archive:
        expected = {info.filename: info.file_size for info in archive.infolist()}
    assert {m.name: m.size for m in read((tmp_path / "plain.pt").read_bytes())} == expected


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(compress):
    """Compressed or not."""
    stream = io.BytesIO()
    compress(stream, a=np.zeros(100), b=np.ones(3))
    assert {m.name: m.size for m in directory(stream)} == {"a.npy": 928, "b.npy": 152}


def test_a_member_that_is_written_in_the_large_form_is_read():
    """zip64, as for members over 4 GiB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, archive.open("m/a", "w", force_zip64=True) as f:
        f.write(b"abc")
    assert [(m.name, m.size) for m in directory(stream)] == [("m/a", 3)]


def test_an_archive_with_a_comment_is_read():
    """Readers agree on it."""
    stream = io.BytesIO(saved())
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = b"by hand"
    assert len(directory(stream)) == 2


PLAIN = saved()
DIRECTORY, ENDING = PLAIN.index(CENTRAL), PLAIN.index(END)
SECOND = PLAIN.index(CENTRAL, DIRECTORY + 1)
LARGE_END = struct.pack("<4sQHH2L4Q", END64, 44, 45, 45, 0, 0, 2, 2, ENDING - DIRECTORY, DIRECTORY)
LARGE = PLAIN[:ENDING] + LARGE_END + struct.pack("<4sLQL", LOCATOR, 0, ENDING, 1) + PLAIN[ENDING:]
BAD = {
    "something before it": (b"#!/bin/sh\n" + PLAIN, "not where it says"),
    "something behind it": (PLAIN + b"\0", "something follows its end"),
    "a second archive behind it": (PLAIN + saved(c=b"c"), "not where it says|overlaps"),
    "a second end in the comment": (
        at(PLAIN, ENDING + 20, "<H", 22) + PLAIN[ENDING:],
        "not where it says|something follows",
    ),
    "no end": (PLAIN[:ENDING], "it has no end"),
    "half an end": (PLAIN[: ENDING + 10], "it has no end"),
    "another disk": (at(PLAIN, ENDING + 4, "<H", 1), "in several parts"),
    "fewer files than listed": (
        at(at(PLAIN, ENDING + 8, "<H", 1), ENDING + 10, "<H", 1),
        "something follows its directory",
    ),
    "more files than listed": (
        at(at(PLAIN, ENDING + 8, "<H", 3), ENDING + 10, "<H", 3),
        "breaks off|beyond any sensible number",
    ),
    "a directory elsewhere": (at(PLAIN, ENDING + 16, "<L", 0), "not where it says"),
    "a directory of another length": (at(PLAIN, ENDING + 12, "<L", 10), "not where it says"),
    "a large directory without a large end": (
        at(PLAIN, ENDING + 16, "<L", 2**32 - 1),
        "its large directory is missing",
    ),
    "ends that contradict each other": (
        at(LARGE, LARGE.index(END64) + 48, "<Q", 0),
        "contradict each other|not where it says",
    ),
    "a large end elsewhere": (
        at(LARGE, LARGE.index(LOCATOR) + 8, "<Q", 0),
        "its large end is not where it says",
    ),
    "an encrypted file": (at(PLAIN, DIRECTORY + 8, "<H", 1), "is encrypted"),
    "an unknown compression": (at(PLAIN, DIRECTORY + 10, "<H", 99), "in a way that is not read"),
    "a stored file of two sizes": (at(PLAIN, DIRECTORY + 24, "<L", 9), "in a way that is not"),
    "sizes that lie": (
        at(at(PLAIN, DIRECTORY + 20, "<L", 9), DIRECTORY + 24, "<L", 9),
        "has two sizes|overlaps",
    ),
    "files that overlap": (
        at(PLAIN, SECOND + 42, "<L", 0),
        "called otherwise where it is|overlaps",
    ),
    "a place outside": (at(PLAIN, SECOND + 42, "<L", 10**6), "is not where it says"),
    "another name where it is": (
        PLAIN.replace(LOCAL, LOCAL, 1)[:30] + b"X" + PLAIN[31:],
        "called otherwise where it is",
    ),
    "a name of nothing": (saved(**{"/b": b"x"}), "no name inside a folder"),
    "a name that leads out": (saved(**{"../../etc/passwd": b"x"}), "no name inside a folder"),
    "an absolute name": (saved(a=b"").replace(b"m/a", b"/ma"), "no name inside a folder"),
    "a name with backslashes": (saved(a=b"").replace(b"m/a", b"m\\a"), "no name inside a folder"),
    "a name that steers the terminal": (saved(a=b"").replace(b"m/a", b"m/\x1b"), "no name inside"),
    "a name twice": (saved(a=b"", b=b"").replace(b"m/b", b"m/a"), "two files of one name"),
    "a name twice but for its case": (saved(a=b"", A=b""), "two files of one name"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_can_be_read_in_two_ways_is_refused(data, message):
    """Or is damaged; the sentence says how."""
    with pytest.raises(Refusal, match=message):
        read(data)


def test_the_large_form_is_read_where_both_ends_agree():
    """So that the refusals of it mean something."""
    assert [m.name for m in read(LARGE)] == ["m/a", "m/b"]


def test_every_truncation_is_refused():
    """At whatever byte."""
    for length in range(len(PLAIN)):
        with pytest.raises(Refusal, match="archive"):
            read(PLAIN[:length])


def test_a_directory_of_millions_of_files_is_not_read(monkeypatch):
    """Its listing would take the memory that its bytes do not."""
    monkeypatch.setattr(archives, "_MOST_MEMBERS", 1)
    with pytest.raises(Refusal, match="lists 2 files, beyond any sensible number"):
        read(PLAIN)


# ---- in the files that are read ------------------------------------------------------------------


def test_a_file_that_two_readers_read_differently_is_not_loaded(tmp_path):
    """`zipfile` finds the last directory; torch goes where the end says that it is."""
    hidden = write_zip(tmp_path / "hidden.pt", SINGING["exec"]).read_bytes()
    (tmp_path / "m.pt").write_bytes(hidden + written(tmp_path))
    with pytest.raises(LoadError, match="can be read in two ways"):
        load(tmp_path / "m.pt")


def bomb(path, name: str, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/version", "3\n")


def test_a_compressed_model_is_refused(tmp_path):
    """torch.save never compresses, and what is in it may unpack to anything."""
    bomb(tmp_path / "bomb.pt", "a/data/0", 10_000_000)
    with pytest.raises(LoadError, match="its archive is compressed"):
        load(tmp_path / "bomb.pt")


def test_arrays_that_unpack_to_far_more_than_they_are_are_refused(tmp_path):
    """Real images do not shrink to a hundredth."""
    np.savez_compressed(tmp_path / "bomb.npz", arg0=np.zeros(2**24 + 1, np.float32))
    with pytest.raises(InputError, match=r"unpacks to 67,10\d,\d+ bytes, over 100 times"):
        read_inputs(tmp_path / "bomb.npz")
    with pytest.raises(DataError, match=r"unpacks to 67,10\d,\d+ bytes, over 100 times"):
        read_arrays(tmp_path / "bomb.npz")


def test_arrays_that_shrink_as_arrays_do_are_read(tmp_path):
    """Small ones may shrink as they like."""
    np.savez_compressed(tmp_path / "x.npz", arg0=np.zeros((1, 3, 500, 500), np.float32))
    assert str(read_inputs(tmp_path / "x.npz")) == "1x3x500x500 float32"
    check_unpacked(read(saved()))


def test_a_format_is_told_by_the_directory_that_all_readers_see(tmp_path):
    """The members of a probe are those of the strict reader."""
    written(tmp_path)
    assert {"data.pkl", "version", "byteorder"} <= probe_file(tmp_path / "plain.pt").members.keys()
