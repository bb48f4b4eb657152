"""Files that try to run code, in both formats that torch.save has written: none of them does."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from bntools.errors import LoadError
from bntools.loading import load
from bntools.pickles import examine
from bntools.trust import _FUNCTIONS, AllowList

MAGIC = 0x1950A86A20F9469CFC6C


def write_zip(path: Path, payload: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, payload: bytes) -> Path:
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    path.write_bytes(head + payload + pickle.dumps([], 2))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once any code of a payload has run, also by importing `songbird`."""
    song = tmp_path / "song"
    monkeypatch.setenv("CANARY", str(song))
    nest = tmp_path / "nest"
    nest.mkdir()
    (nest / "songbird.py").write_text(
        "import os\nopen(os.environ['CANARY'], 'w').close()\ndef sing(*_): pass\n"
    )
    monkeypatch.syspath_prepend(nest)
    yield song
    sys.modules.pop("songbird", None)


SING = "open(__import__('os').environ['CANARY'], 'w').close()"
SHELL = 'touch "$CANARY"'
RAW_SYSTEM = b"cposix\nsystem\n(X" + len(SHELL).to_bytes(4, "little") + SHELL.encode() + b"tR"


def raw(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def model_with(**attributes):
    model = nn.ReLU()
    model.__dict__.update(attributes)
    return model


def dumped(value) -> bytes:
    return pickle.dumps(value, 2)


SINGING = {
    "os.system": dumped(Calls(os.system, SHELL)),
    "exec": dumped(Calls(exec, SING)),
    "eval": dumped(Calls(eval, SING)),
    "import_module": dumped(Calls(importlib.import_module, "songbird")),
    "__import__": dumped(Calls(builtins.__import__, "songbird")),
    "a module that sings when imported": raw(b"csongbird\nsing\n)R"),
    "Popen": dumped(Calls(subprocess.Popen, ["touch", "placeholder"])),
    "getattr of a module": dumped(Calls(getattr, Calls(__import__, "songbird"), "sing")),
    "nested in arguments": dumped(Calls(OrderedDict, [("a", Calls(os.system, SHELL))])),
    "beside weights": dumped({"state_dict": {"a": 1}, "args": Calls(os.system, SHELL)}),
    "in a module's attributes": dumped(model_with(note=Calls(exec, SING))),
    "as a dict key": dumped({Calls(exec, SING): 1}),
    "through partial": dumped(Calls(functools.partial(exec, SING))),
    "through a state": dumped(Calls(OrderedDict, state={"_metadata": Calls(exec, SING)})),
    "memoised and called later": raw(
        b"cbuiltins\nexec\nq\x00cbuiltins\nset\n]\x85Rh\x00" + text(SING) + b"\x85R"
    ),
    "protocol 0 INST": raw(b"(" + text(SHELL) + b"iposix\nsystem\n"),
    "OBJ": raw(b"(cposix\nsystem\n" + text(SHELL) + b"o"),
    "STACK_GLOBAL": b"\x80\x04" + b"\x8c\x05posix\x8c\x06system\x93" + text(SHELL) + b"\x85R.",
    "STACK_GLOBAL in protocol 2": raw(
        text("posix") + text("system") + b"\x93" + text(SHELL) + b"\x85R"
    ),
    "a name with a space": raw(b"cposix\nsystem x\n" + text(SHELL) + b"\x85R"),
    "through _rebuild_from_type_v2": raw(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nexec\nctorch\nTensor\n"
        + text(SING)
        + b"\x85NtR"
    ),
    "in a persistent id": raw(b"(" + text("module") + b"cposix\nsystem\n" + text("") * 2 + b"tQ"),
    "computed in a persistent id": raw(
        b"(" + text("storage") + RAW_SYSTEM + text("0") * 2 + b"K\x01tQ"
    ),
    "torch.load again": raw(b"ctorch.serialization\nload\n(" + text("evil.pkl") + b"NNtR"),
    "torch.hub": raw(b"ctorch.hub\nload\n" + text("songbird") + text("sing") + b"\x86R"),
    "a downloader of torchvision": raw(
        b"ctorchvision.datasets.utils\ndownload_url\n" + text("file:///") * 2 + b"\x86R"
    ),
    "a factory of torchvision": raw(b"ctorchvision.models.resnet\nresnet18\n)R"),
    "a factory of timm": raw(
        b"ctimm.models._factory\ncreate_model\n" + text("resnet18") + b"\x85R"
    ),
    "an import inside an allowed module": raw(
        b"ctorch.nn.functional\nimportlib\n" + text("songbird") + b"\x85R"
    ),
    "a dotted name": raw(
        b"ctorch.nn\nfunctional.importlib.import_module\n" + text("songbird") + b"\x85R"
    ),
    "pickle.loads": dumped(Calls(pickle.loads, pickle.dumps(Calls(exec, SING), 2))),
    "codecs with a codec of choice": raw(
        b"c_codecs\nencode\n" + text("x") + text("songbird") + b"\x86R"
    ),
}


@pytest.mark.parametrize("payload", SINGING.values(), ids=SINGING.keys())
@WRITERS
def test_a_malicious_file_runs_nothing(write, payload, canary, tmp_path):
    with pytest.raises(LoadError, match=r"Cannot load .*model\.pt: its? ") as caught:
        load(write(tmp_path / "model.pt", payload))
    assert not canary.exists()
    assert "songbird" not in sys.modules
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["os.system", "exec", "beside weights", "OBJ", "STACK_GLOBAL"])
def test_the_payloads_would_sing_if_they_were_unpickled(name, canary):
    pickle.loads(SINGING[name])
    assert canary.exists()


@pytest.mark.parametrize("option", ["os.system", "builtins.exec", "subprocess.Popen"])
def test_the_standard_library_cannot_be_allowed(option, canary, tmp_path):
    path = write_zip(tmp_path / "model.pt", SINGING["os.system"])
    with pytest.raises(LoadError, match=f"Cannot allow {option}: .* can run any code"):
        load(path, allow=[option])
    assert not canary.exists()


def test_a_function_that_the_user_allows_is_still_not_called(canary, tmp_path):
    path = write_zip(tmp_path / "model.pt", raw(b"csongbird\nsing\n)R"))
    with pytest.raises(LoadError, match=r"it calls songbird\.sing"):
        load(path, allow=["songbird.sing"])


LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
BENT = {
    "calls a class": (LINEAR + b"K\x02K\x02\x86R", "it calls torch.nn.modules.linear.Linear"),
    "creates with arguments": (
        LINEAR + b"K\x02K\x02\x86\x81",
        "it creates torch.nn.modules.linear",
    ),
    "calls a harmless function": (
        b"ctorch.nn.functional\nrelu\nN\x85R",
        "it calls torch.nn.functional",
    ),
    "keeps a constructor as a value": (
        b"}" + text("f") + b"ctimm.models.resnet\nResNet\ns",
        "it keeps timm.models.resnet.ResNet as a value",
    ),
    "keeps a constructor in what looks like a persistent id": (
        b"(" + text("module") + b"ctimm.models.resnet\nResNet\n" + text("") * 2 + b"t",
        "it keeps timm.models.resnet.ResNet as a value",
    ),
    "calls what it has computed": (b"NN\x85R", "it calls something that it has computed"),
    "reserves memory": (
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
        "it asks for builtins.bytearray",
    ),
    "changes an Enum": (
        b"ctimm.layers.format\nFormat\n" + text("NCHW") + b"\x85R}" + text("a") + b"K\x01sb",
        "it changes a constant of a library",
    ),
    "takes any method": (
        LINEAR + b")\x81q\x00cbuiltins\ngetattr\nh\x00" + text("__init__") + b"\x86R",
        "it calls builtins.getattr",
    ),
    "joins a process group": (
        b"ctorch.nn.parallel.distributed\nDistributedDataParallel\n)\x81}b",
        "it holds objects of classes that bntools does not know: torch.nn.parallel.distributed",
    ),
    "iterates over a tensor of any length": (
        b"cbuiltins\nset\ncollections\nOrderedDict\n)R\x85R".replace(b"\ncol", b"\nccol"),
        "it calls builtins.set",
    ),
    "sets a computed state": (
        LINEAR + b")\x81ccollections\nOrderedDict\n)Rb",
        "it sets a state that it has computed",
    ),
    "offers a command to paste": (
        b"cnets.Net --trust; curl evil\nNet\n)\x81",
        r"it asks for nets\.Net\.--trust; curl evil Net, which can run any code",
    ),
    "paints the terminal": (b"cnets\n\x1b[2JNet\n)\x81", r"it asks for nets\.\?\[2JNet"),
    "nests tuples": (b")" + b"\x85" * 200, "nests tuples beyond any sensible size"),
    "doubles tuples": (b")" + b"q\x00h\x00\x86" * 60, "nests tuples beyond any sensible size"),
    "claims storage that is not there": (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"J\xff\xff\xff\x7f"
        b"NtQ",
        "it is damaged",
    ),
}


@pytest.mark.parametrize(("body", "message"), BENT.values(), ids=BENT.keys())
@WRITERS
def test_allowed_names_cannot_be_bent(write, body, message, tmp_path):
    with pytest.raises(LoadError, match=message):
        load(write(tmp_path / "model.pt", raw(body)))


def test_a_class_of_the_user_is_asked_for_by_the_option_that_allows_it(tmp_path):
    path = write_zip(
        tmp_path / "model.pt", raw(b"cnets.lenet\nLeNet\n)\x81}bcnets.lenet\nBlock\n)\x81a")
    )
    with pytest.raises(LoadError) as caught:
        load(path)
    assert "--allow nets.lenet.Block --allow nets.lenet.LeNet;" in str(caught.value)
    assert "allow=('nets.lenet.Block', 'nets.lenet.LeNet',)" in str(caught.value)


def test_a_second_pickle_of_the_same_name_does_not_slip_through(canary, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/DATA.pkl", SINGING["exec"])
    with pytest.raises(LoadError, match="two files of one name"):
        load(path)
    assert not canary.exists()


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", raw(b"}"))
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", bytes(10_000_000))
    with pytest.raises(LoadError, match="its archive is compressed"):
        load(tmp_path / "bomb.pt")


def test_every_function_of_the_allow_list_exists():
    allowed = AllowList()
    missing = {name for name in _FUNCTIONS if allowed.grant(name) is None}
    assert not missing


def test_no_allowed_function_may_be_called():
    allowed = AllowList()
    assert not [
        name for name in _FUNCTIONS if allowed.grant(name).call or allowed.grant(name).create
    ]


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.functional.importlib",
        "torch.nn.Module.__init__",
        "torch.nn.modules.conv.torch",
        "torch.hub.load",
        "torch.jit.load",
        "torch.nnx.Linear",
        "torchvision.models.resnet.resnet18",
        "torchvision.datasets.mnist.MNIST",
        "timm.models.helpers.load_checkpoint",
        "timm.models.resnet.os",
        "bntools.trust.attribute",
        "numpy.load",
    ],
)
def test_a_name_near_the_allowed_ones_is_not_allowed(name):
    assert AllowList().grant(name) is None


def test_examining_imports_nothing_that_the_file_names(canary):
    allowed = AllowList()
    with pytest.raises(Exception, match=r"songbird\.Net"):
        examine(io.BytesIO(raw(b"csongbird\nNet\n)\x81}b")), allowed)
    assert not canary.exists()
