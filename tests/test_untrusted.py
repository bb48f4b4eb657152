"""Files that try to run code, in both formats that torch.save has written: none of them does."""

from __future__ import annotations

import io
import sys

import pytest
from hostile import (
    BIRD,
    SHELL,
    SINGING,
    dumped,
    named,
    raw,
    storage_id,
    text,
    write_legacy,
    write_zip,
)
from torch import nn

from bntools import pickles
from bntools.errors import LoadError
from bntools.loading import load
from bntools.pickles import examine
from bntools.trust import _FUNCTIONS, AllowList

WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once `songbird` has been imported."""
    song = tmp_path / "song"
    monkeypatch.setenv("CANARY", str(song))
    (tmp_path / "songbird.py").write_text(BIRD)
    monkeypatch.syspath_prepend(tmp_path)
    yield song
    sys.modules.pop("songbird", None)


ASKING = {
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
    "codecs with a codec of choice": raw(
        b"c_codecs\nencode\n" + text("x") + text("songbird") + b"\x86R"
    ),
    "a name with a space": raw(b"cposix\nsystem x\n" + text(SHELL) + b"\x85R"),
    "a name with an escape": raw(b"cposix\nsys\\x74em\n" + text(SHELL) + b"\x85R"),
    "a graph of torch.fx": raw(b"ctorchvision.models.feature_extraction\nDualGraphModule\n)\x81}b"),
}


@pytest.mark.parametrize("payload", ASKING.values(), ids=ASKING.keys())
@WRITERS
def test_what_is_not_on_the_list_is_not_called(write, payload, canary, tmp_path):
    with pytest.raises(
        LoadError, match=r"Cannot load .*model\.pt: it (asks|calls|holds)"
    ) as caught:
        load(write(tmp_path / "model.pt", payload))
    assert not canary.exists()
    assert "\n" not in str(caught.value)


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
ONE = storage_id(named("torch.FloatStorage"))


def tensor(size: int, stride: int, offset: int = 0) -> bytes:
    """A tensor of one dimension that shows a storage of one number."""
    numbers = (b"J" + n.to_bytes(4, "little", signed=True) for n in (offset, size, stride))
    place, shape, steps = numbers
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + ONE + place + shape + b"\x85" + steps + b"\x85\x89NtR"


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
        storage_id(named("torch.FloatStorage"), count=b"J\xff\xff\xff\x7f"),
        "it is damaged",
    ),
    "sets a state twice": (LINEAR + b")\x81}b}b", "it sets the state of a torch.nn.* twice"),
    "sets a state of pairs": (LINEAR + b")\x81]b", "to something else than a dict"),
    "sets an attribute with a meaning": (
        LINEAR + b")\x81}" + text("__setstate__") + named("torch.nn.functional.relu") + b"sb",
        "it sets the attribute __setstate__",
    ),
    "sets the class of a parameter": (
        named("torch._utils._rebuild_parameter_with_state")
        + (b"(N\x89N}" + text("__class__") + named("torch.nn.modules.linear.Linear") + b"stR"),
        "it sets the attribute __class__",
    ),
    "has more layers than any network": (
        named("torch.nn.modules.rnn.LSTM")
        + (b")\x81}" + text("num_layers") + b"J\xff\xff\xff\x7fsb"),
        "more layers than any network has",
    ),
    "reaches out of its storage": (tensor(4, 2), "a tensor in it reaches out of what"),
    "starts after its storage": (tensor(1, 1, offset=1), "a tensor in it reaches out of what"),
    "has a negative size": (tensor(-1, 1), "a tensor in it reaches out of what"),
    "has a size that it has computed": (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + ONE
        + b"K\x00ctorch\nSize\n)\x85RK\x01\x85\x89NtR",
        "a tensor in it reaches out of what",
    ),
    "makes a tensor of something else": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(}K\x00K\x01\x85K\x01\x85\x89NtR",
        "from something that is no storage",
    ),
    "repeats one number": (tensor(2**31 - 1, 0), "repeat their numbers"),
    "repeats one number in a nested call": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n"
        + tensor(2**31 - 1, 0).partition(b"v2\n")[2][:-1]
        + b"NtR",
        "repeat their numbers",
    ),
    "iterates over a tensor in a list": (
        named("collections.OrderedDict") + b"]" + tensor(2, 0) + b"a\x85R",
        "it calls collections.OrderedDict",
    ),
    "has an endless name": (b"c" + b"n" * 20_000, "a name beyond any sensible length"),
    "is too long": (b"X\x01\x00\x00\x0f", "is over 64 MiB long"),
}


@pytest.mark.parametrize(("body", "message"), BENT.values(), ids=BENT.keys())
@WRITERS
def test_allowed_names_cannot_be_bent(write, body, message, tmp_path):
    with pytest.raises(LoadError, match=message):
        load(write(tmp_path / "model.pt", raw(body)))


@WRITERS
def test_a_pickle_that_would_take_long_to_follow_is_refused(write, monkeypatch, tmp_path):
    monkeypatch.setattr(pickles, "_MOST_STEPS", 2000)
    assert load(write(tmp_path / "a.pt", dumped(nn.Sequential(*[nn.ReLU()] * 100))))
    with pytest.raises(LoadError, match="over 2,000 instructions"):
        load(write(tmp_path / "b.pt", raw(b"]" + b"Na" * 1000)))


def test_a_class_of_the_user_is_asked_for_by_the_option_that_allows_it(tmp_path):
    path = write_zip(
        tmp_path / "model.pt", raw(b"cnets.lenet\nLeNet\n)\x81}bcnets.lenet\nBlock\n)\x81a")
    )
    with pytest.raises(LoadError) as caught:
        load(path)
    assert "--allow nets.lenet.Block --allow nets.lenet.LeNet;" in str(caught.value)
    assert "allow=('nets.lenet.Block', 'nets.lenet.LeNet',)" in str(caught.value)


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
