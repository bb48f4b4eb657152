"""safetensors files: what other programs read and write, shared tensors, every type, damage."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from randomise import randomise, settle
from torch import nn

import bntools
from bntools.errors import LoadError, SaveError
from bntools.formats.probe import probe_file
from bntools.formats.tensors import _NAMES, read_tensors, write_tensors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()


def tied() -> nn.Module:
    model = net()
    twin = nn.Conv2d(4, 4, 1)
    twin.weight = model[2].weight
    model.append(twin)
    return model


ARCH = "test_safetensors:net"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_library_reads_what_bntools_writes(here):
    model = net()
    randomise(model)
    bntools.save(model, "m.safetensors")
    read = safetensors.torch.load_file("m.safetensors")
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(t, read[k]) for k, t in model.state_dict().items())
    with safetensors.safe_open("m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert "bntools_recipe" not in metadata


def test_bntools_reads_what_the_library_writes(here):
    """Without a recipe, as they are on model hubs: the architecture's types stay."""
    model = net()
    randomise(model)
    settle(model, X)
    safetensors.torch.save_file(model.state_dict(), "m.safetensors")
    loaded = bntools.read_model("m.safetensors", ARCH)
    assert torch.equal(loaded.model(X), model(X))
    assert (loaded.recipe, loaded.notes, loaded.format) == (None, (), "safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(half, "half.safetensors")
    loaded = bntools.read_model("half.safetensors", ARCH)
    assert loaded.notes == ("weights of type float16 become float32",)


def test_the_format_is_told_by_the_content(here):
    bntools.save(net(), "m.safetensors")
    (here / "m.safetensors").rename("model.bin")
    assert bntools.read_model("model.bin", ARCH).format == "safetensors"


def test_prefixes_are_stripped_and_said(here):
    state = {f"module.{k}": v for k, v in net().state_dict().items()}
    safetensors.torch.save_file(state, "m.safetensors")
    (note,) = bntools.read_model("m.safetensors", ARCH).notes
    assert "'module.'" in note


def test_tensors_that_are_one_are_written_once(here):
    model = tied()
    bntools.save(model, "m.safetensors")
    with safetensors.safe_open("m.safetensors", "pt") as file:
        assert "3.weight" not in file.keys()  # noqa: SIM118 - it is no dict
        assert file.metadata()["3.weight"] == "2.weight"
    loaded = bntools.load("m.safetensors", "test_safetensors:tied")
    assert loaded[3].weight is loaded[2].weight
    assert torch.equal(loaded(X), model(X))
    again = tied()
    assert safetensors.torch.load_model(again, "m.safetensors") == (set(), [])


def test_views_that_overlap_are_written_whole(here):
    """Two tensors of one storage that are not the same one."""
    whole = torch.arange(12.0).reshape(3, 4)
    model = nn.Module()
    model.register_buffer("rows", whole[:2])
    model.register_buffer("columns", whole[:, 1:3])
    model.register_buffer("expanded", torch.ones(1).expand(5))
    model.register_buffer("turned", whole.t())
    model.register_buffer("scalar", torch.tensor(3.0))
    model.register_buffer("empty", torch.zeros(0, 3))
    bntools.save(model, "m.safetensors")
    read = safetensors.torch.load_file("m.safetensors")
    assert all(torch.equal(t, read[k]) for k, t in model.state_dict().items())


def test_channels_last_weights_have_the_same_values(here):
    model = net().to(memory_format=torch.channels_last)
    bntools.save(model, "m.safetensors")
    loaded = bntools.load("m.safetensors", ARCH)
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", _NAMES, ids=lambda dtype: _NAMES[dtype])
def test_every_type_comes_back_to_the_bit(dtype, here):
    bits = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    tensor = bits.bool() if dtype is torch.bool else bits.view(dtype)
    with open("t.safetensors", "wb") as stream:  # noqa: PTH123 - a stream is what it writes to
        write_tensors(stream, {"b": bits[0, :3], "a": tensor}, {})
    read = read_tensors(probe_file(here / "t.safetensors")).tensors
    assert read["a"].dtype is dtype
    assert torch.equal(read["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(read["b"], bits[0, :3])


def test_the_same_model_gives_the_same_bytes(here):
    bntools.save(net(), "a.safetensors")
    bntools.save(net(), "b.safetensors")
    assert (here / "a.safetensors").read_bytes() == (here / "b.safetensors").read_bytes()


def test_what_the_format_cannot_hold_is_told_and_nothing_is_written(here):
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    wide = nn.Module()
    wide.register_buffer("c", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(SaveError, match=r"Cannot write s \(float32, torch.sparse_coo\)"):
        bntools.save(sparse, "m.safetensors")
    with pytest.raises(SaveError, match=r"Cannot write c \(complex128\)"):
        bntools.save(wide, "m.safetensors")
    with pytest.raises(SaveError, match=r"Cannot write _extra_state .*Write a \.pt file"):
        bntools.save(Extra(), "m.safetensors")
    assert list(here.iterdir()) == []


class Extra(nn.Module):
    def get_extra_state(self) -> object:
        return {"a": 1}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


DAMAGED = {
    "another length": raw({"a": entry()}, bytes(4)),
    "bytes at the end": raw({"a": entry()}, bytes(12)),
    "a hole": raw({"a": entry(data_offsets=[4, 12])}, bytes(12)),
    "an overlap": raw({"a": entry(), "b": entry()}, bytes(8)),
    "negative": raw({"a": entry(shape=[-2])}, bytes(8)),
    "huge": raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)),
    "no such type": raw({"a": entry(dtype="F31")}, bytes(8)),
    "type of another type": raw({"a": entry(dtype=3)}, bytes(8)),
    "no object": raw({"a": 3}, bytes(8)),
    "no JSON": raw(b'{"a": '),
    "no text": raw(b"{\xff\xfe"),
    "metadata of numbers": raw({"__metadata__": {"a": 3}, "a": entry()}, bytes(8)),
    "metadata is a list": raw({"__metadata__": [], "a": entry()}, bytes(8)),
    "recipe no JSON": raw({"__metadata__": {"bntools_recipe": "{"}, "a": entry()}, bytes(8)),
    "recipe no object": raw({"__metadata__": {"bntools_recipe": "[1]"}, "a": entry()}, bytes(8)),
    "recipe nests": raw({"__metadata__": {"bntools_recipe": "[" * 10**5}, "a": entry()}, bytes(8)),
    "recipe of a number": raw({"__metadata__": {"bntools_recipe": "3"}, "a": entry()}, bytes(8)),
    "originals": raw(
        {"__metadata__": {"bntools_originals": "{}", "bntools_version": "1"}, "a": entry()},
        bytes(8),
    ),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_a_load_error_of_one_line(content, here):
    (here / "m.safetensors").write_bytes(content)
    with pytest.raises(LoadError) as caught:
        bntools.load("m.safetensors", "test_safetensors:net")
    assert "\n" not in str(caught.value)


def test_a_sparse_file_with_a_huge_header_is_refused_unread(here):
    """The header is what is parsed: a length of gigabytes is no reason to read gigabytes."""
    with open("m.safetensors", "wb") as stream:  # noqa: PTH123 - it is truncated to its size
        stream.write(struct.pack("<Q", 10**9) + b"{")
        stream.truncate(2 * 10**9)
    with pytest.raises(LoadError, match="its header claims 1000000000 bytes"):
        bntools.load("m.safetensors", ARCH)


def test_changes_to_a_loaded_model_do_not_reach_its_file(here):
    bntools.save(net(), "m.safetensors")
    before = (here / "m.safetensors").read_bytes()
    loaded = bntools.load("m.safetensors", ARCH)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert (here / "m.safetensors").read_bytes() == before


def test_loaded_tensors_are_where_torch_would_put_them(here):
    """Vector kernels round by alignment: outputs are bit-equal only if tensors start alike."""
    odd = {f"t{n}": torch.arange(float(n)) for n in (1, 3, 16, 5, 64, 33)}
    odd["half"] = torch.zeros(7, dtype=torch.float16)
    with open("t.safetensors", "wb") as stream:  # noqa: PTH123 - a stream is what it writes to
        write_tensors(stream, odd, {"a": "b" * 13})
    safetensors.torch.save_file(odd, "library.safetensors", {"a": "b" * 13})
    for name in ("t.safetensors", "library.safetensors"):
        read = read_tensors(probe_file(here / name)).tensors
        assert [n for n, t in read.items() if t.data_ptr() % 64] == []
        assert all(torch.equal(t, odd[n]) for n, t in read.items())
