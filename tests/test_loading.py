"""`load`: what a deployment engineer has on disk, good and bad."""

from __future__ import annotations

import argparse
import gzip
import pickle
import subprocess
import sys
import textwrap
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock

from bntools.errors import LoadError
from bntools.formats import table
from bntools.loading import load, read_model

NET = "torchvision:shufflenet_v2_x0_5"
LEGACY_TOO = {"torchvision:googlenet", "torchvision:raft_small", "timm:levit_128s"}
BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BasicBlock(4, 4), nn.ReLU())


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A working folder with a user's own module, `mynets`."""
    (tmp_path / "mynets.py").write_text(
        textwrap.dedent(
            """
            import enum
            import torch
            from torch import nn

            class Kind(enum.Enum):
                PLAIN = "plain"

            def act(x):
                return x

            class Net(nn.Module):
                def __init__(self, channels=4):
                    super().__init__()
                    self.conv, self.bn = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)
                    self.kind, self.act = Kind.PLAIN, act
                def forward(self, x):
                    return self.act(self.bn(self.conv(x)))

            class Raises:
                def __init__(self):
                    raise ValueError("no such\\nconfig")

            number = 3
            """
        )
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mynets", "broken"):
        sys.modules.pop(name, None)


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch",
    [
        "torchvision:googlenet",
        "torchvision:quantized_resnet18",
        "torchvision:lraspp_mobilenet_v3_large",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "torchvision:raft_small",
        "timm:mobilenetv3_small_050",
        "timm:repvgg_a0",
        "timm:levit_128s",
        "timm:fasternet_t0",
        "timm:densenet121",
    ],
)
def test_whole_models_of_torchvision_and_timm_load_without_options(arch, tmp_path):
    model = load(arch)
    for zipped in {True, arch not in LEGACY_TOO}:
        torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        loaded = read_model(tmp_path / "m.pt")
        assert type(loaded.model) is type(model)
        assert same(loaded.model, model)
        assert loaded.notes == ()


def special_models() -> dict[str, nn.Module]:
    lazy = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d())
    lazy(torch.zeros(2, 2, 2, 2))
    tagged = nn.Conv2d(2, 2, 1)
    tagged.weight.note = "mine"
    return {
        "weight_norm": nn.utils.weight_norm(nn.Conv2d(2, 2, 1)),
        "spectral_norm": nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)),
        "pruned": prune.l1_unstructured(nn.Conv2d(2, 2, 1), "weight", amount=1),
        "DataParallel": nn.DataParallel(nn.Conv2d(2, 2, 1)),
        "activation function": nn.TransformerEncoderLayer(4, 2, activation=torch.relu),
        "partial": torchvision.models.resnet18(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)),
        "SyncBatchNorm": nn.SyncBatchNorm(3),
        "bfloat16": nn.Conv2d(2, 2, 1).bfloat16(),
        "preprocessing": nn.Sequential(torchvision.transforms.Resize(3), nn.ReLU()),
        "tagged parameter": tagged,
        "lazy that has run": lazy,
    }


@BOTH_FORMATS
@pytest.mark.parametrize("name", special_models())
def test_unusual_modules_load_without_options(name, zipped, tmp_path):
    model = special_models()[name]
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert same(load(tmp_path / "m.pt"), model)


def test_the_training_flags_of_a_whole_model_stay(tmp_path):
    model = small().eval()
    model[1].train()
    torch.save(model, tmp_path / "m.pt")
    assert [m.training for m in load(tmp_path / "m.pt").modules()] == [
        m.training for m in model.modules()
    ]


def test_a_whole_model_under_a_key_is_found_beside_training_state(tmp_path):
    model = small()
    torch.save({"epoch": 3, "model": model, "optimizer": {"param_groups": []}}, tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt")
    assert same(loaded.model, model)
    assert loaded.notes == ("took the weights at 'model'",)


def test_an_architecture_given_for_a_whole_model_is_reported_as_unused(tmp_path):
    torch.save(small(), tmp_path / "m.pt")
    assert (
        "--arch timm:resnet18 is not used"
        in read_model(tmp_path / "m.pt", "timm:resnet18").notes[0]
    )


def test_loading_leaves_the_safe_globals_of_torch_as_they_were(tmp_path):
    torch.serialization.add_safe_globals([nn.Conv2d])
    try:
        before = set(torch.serialization.get_safe_globals())
        torch.save(small(), tmp_path / "m.pt")
        load(tmp_path / "m.pt")
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()


@BOTH_FORMATS
def test_classes_that_the_user_names_load(zipped, nets):
    torch.save(load("mynets:Net"), "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        LoadError, match=r"--allow mynets\.Kind --allow mynets\.Net --allow mynets\.act"
    ):
        load("m.pt")
    model = load("m.pt", allow=["mynets.Net", "mynets.Kind", "mynets.act"])
    assert model.kind is sys.modules["mynets"].Kind.PLAIN
    assert model(torch.zeros(1, 3, 2, 2)).shape == (1, 4, 2, 2)


def test_a_class_of_the_script_that_saved_the_file_is_taken_from_a_module(nets):
    script = "from mynets import *\nNet.__module__ = '__main__'\ntorch.save(Net(), 'm.pt')"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(LoadError, match=r"--allow MODULE\.Net .*MODULE is the importable file"):
        load("m.pt")
    model = load("m.pt", allow=("mynets.Net", "mynets.Kind", "mynets.act"))
    assert type(model).__module__ == "mynets"


def test_a_class_that_cannot_be_imported_is_an_error(nets):
    torch.save(load("mynets:Net"), "m.pt")
    allow = ("mynets.Net", "mynets.Kind", "mynets.act")
    (nets / "mynets.py").unlink()
    del sys.modules["mynets"]
    with pytest.raises(LoadError, match=r"Cannot allow mynets\.\w+: no module named 'mynets'"):
        load("m.pt", allow=allow)


def test_a_name_that_is_no_class_name_cannot_be_allowed():
    with pytest.raises(LoadError, match=r"Cannot allow 'Net': give the full name"):
        load("m.pt", allow="Net")


# ---- state dicts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    torch.manual_seed(1)
    return load(NET)


WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 2},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "ema only": lambda s: {"ema": s, "model": None},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "model_ema": lambda s: {"model_ema": s},
    "params": lambda s: {"params": s},
    "nested": lambda s: {"checkpoint": {"state_dict": s}},
    "an unusual key": lambda s: {"generator": s, "step": 3},
    "in a tuple": lambda s: (s, 7),
}


@BOTH_FORMATS
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_are_found_where_checkpoints_hide_them(wrap, zipped, reference, tmp_path):
    checkpoint = wrap(reference.state_dict())
    torch.save(checkpoint, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    model = load(tmp_path / "m.pt", arch=NET)
    assert same(model, reference)
    assert not model.training


def test_the_usual_key_wins_and_the_choice_is_reported(reference, tmp_path):
    other = {k: torch.zeros_like(v) for k, v in reference.state_dict().items()}
    torch.save({"ema": other, "state_dict": reference.state_dict()}, tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt", NET)
    assert same(loaded.model, reference)
    assert loaded.notes == ("took the weights at 'state_dict', not those at 'ema'",)


@pytest.mark.parametrize(
    ("rename", "removed"),
    [
        (lambda k: f"module.{k}", ["module."]),
        (lambda k: f"_orig_mod.{k}", ["_orig_mod."]),
        (lambda k: f"module._orig_mod.{k}", ["_orig_mod.", "module."]),
        (lambda k: f"model.module.{k}", ["model.", "module."]),
        (lambda k: k.replace("stage2.", "stage2._orig_mod."), ["_orig_mod."]),
    ],
)
def test_prefixes_of_wrappers_are_removed_and_reported(rename, removed, reference, tmp_path):
    state = {rename(key): value for key, value in reference.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt", NET)
    assert same(loaded.model, reference)
    assert loaded.notes == tuple(f"removed {p!r} from the names of the weights" for p in removed)


def test_the_counter_of_an_averaged_model_is_left_out(reference, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(reference)
    torch.save(averaged.state_dict(), tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt", NET)
    assert same(loaded.model, reference)
    assert "left out 'n_averaged'" in loaded.notes[0]


def test_a_prefix_that_the_architecture_has_itself_stays(nets, tmp_path):
    (nets / "wrapped.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)))"
    )
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)))
    torch.save(model.state_dict(), "m.pt")
    loaded = read_model("m.pt", "wrapped:net")
    assert same(loaded.model, model)
    assert loaded.notes == ()


@BOTH_FORMATS
def test_what_training_scripts_put_beside_the_weights_is_left_out(zipped, reference, tmp_path):
    checkpoint = {
        "state_dict": reference.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "folder": tmp_path,
        "history": np.zeros(3),
        "counts": OrderedDict(a=1),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(
            torch.optim.SGD([torch.zeros(1)], lr=0.1)
        ).state_dict(),
    }
    torch.save(checkpoint, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    loaded = read_model(tmp_path / "m.pt", NET)
    assert same(loaded.model, reference)
    assert any("argparse.Namespace" in note for note in loaded.notes)


def test_left_out_objects_do_not_pass_for_a_part_of_a_model(tmp_path):
    model = small()
    model.folder = tmp_path
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=r"the model holds .*--allow pathlib\.PosixPath"):
        load(tmp_path / "m.pt")
    assert load(tmp_path / "m.pt", allow=["pathlib.PosixPath"]).folder == tmp_path


@pytest.mark.parametrize("arch", ["torchvision:mobilenet_v3_small", "timm:resnet10t"])
def test_another_number_of_classes_is_taken_from_the_file(arch, tmp_path):
    name = arch.partition(":")[2]
    if arch.startswith("timm"):
        trained = pytest.importorskip("timm").create_model(name, num_classes=7)
    else:
        trained = torchvision.models.get_model(name, num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt", arch)
    assert same(loaded.model, trained)
    assert loaded.notes == (f"built {arch} with 7 classes, as in the file",)


def test_half_precision_weights_become_float32_and_float64_stay(reference, tmp_path):
    for dtype in (torch.float16, torch.float64):
        state = {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in reference.state_dict().items()
        }
        torch.save(state, tmp_path / f"{dtype}.pt")
    half, double = (read_model(tmp_path / f"torch.float{n}.pt", NET) for n in (16, 64))
    assert half.model.fc.weight.dtype == torch.float32
    assert half.notes == ("weights of type float16 become float32",)
    assert double.model.fc.weight.dtype == torch.float64


def test_statistics_of_old_files_without_batch_counters_load(reference, tmp_path):
    state = {k: v for k, v in reference.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "m.pt")
    assert torch.equal(load(tmp_path / "m.pt", NET).fc.weight, reference.fc.weight)


def adam_state() -> dict:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_the_moments_of_an_optimizer_do_not_pass_for_weights(reference, tmp_path):
    checkpoint = {
        "net": reference.state_dict(),
        "optim": adam_state(),
        "rng": {"cpu": torch.get_rng_state()},
    }
    torch.save(checkpoint, tmp_path / "m.pt")
    loaded = read_model(tmp_path / "m.pt", NET)
    assert same(loaded.model, reference)
    assert loaded.notes == ("took the weights at 'net'",)


# ---- bad checkpoints ----------------------------------------------------------------------------


def test_a_state_dict_needs_an_architecture(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        LoadError, match=r"holds weights only \(\d+ tensors: conv1\.0\.weight, .*--arch"
    ):
        load(tmp_path / "m.pt")


def test_a_state_dict_of_another_architecture_says_which_names_differ(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "m.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m.pt", arch="torchvision:resnet18")
    message = str(caught.value)
    assert "does not fit torchvision:resnet18: weights are 1" in message
    assert " missing (conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, ...), " in message
    assert " unexpected (conv1.0.weight, " in message
    assert " 1 of another shape (fc.weight (1000, 1024) in the file, (1000, 512) in the " in message
    assert "\n" not in message


def test_a_state_dict_of_other_shapes_says_which(nets):
    torch.save(type(load("mynets:Net"))(channels=5).state_dict(), "m.pt")
    with pytest.raises(LoadError) as caught:
        load("m.pt", arch="mynets:Net")
    assert (
        "6 of another shape (conv.weight (5, 3, 1, 1) in the file, (4, 3, 1, 1) in the "
        "architecture, " in str(caught.value)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": {}, "param_groups": []}, "holds the state of an optimizer, and no model"),
        ({"optimizer": {}, "epoch": 1}, "holds the state of an optimizer, and no model"),
        (adam_state(), "holds the state of an optimizer, and no model"),
        ({"epoch": 1, "loss": 2.0}, "a dict with the keys epoch, loss, and no model"),
        ({}, "an empty dict, and no model"),
        (torch.zeros(2, 3), r"a single tensor of shape \(2, 3\), and no model"),
        ([1, 2], "a list, and no model"),
        (
            {"generator": {"a": torch.zeros(1)}, "critic": {"a": torch.zeros(1)}},
            r"several sets of weights \(generator, critic\)",
        ),
        ({"model": 3, "bntools_version": "9.9", "bntools_recipe": None}, "bntools 9.9 wrote it"),
    ],
)
def test_a_file_without_a_model_says_what_it_holds(content, message, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(LoadError, match=message):
        load(tmp_path / "m.pt", arch=NET)


def test_a_model_without_values_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2, device="meta"), tmp_path / "m.pt")
    with pytest.raises(LoadError, match="its tensors have no values"):
        load(tmp_path / "m.pt")


def test_a_module_that_lacks_its_tables_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    del model.__dict__["_buffers"]
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="it is damaged: a Linear in it is incomplete"):
        load(tmp_path / "m.pt")


# ---- files that are something else --------------------------------------------------------------


@BOTH_FORMATS
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(part, zipped, tmp_path):
    torch.save(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(LoadError, match="damaged or incomplete") as caught:
        load(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "resnet_best.pt").write_bytes(b"")
    with pytest.raises(LoadError, match="it is a folder"):
        load(tmp_path)
    with pytest.raises(LoadError, match="it is empty"):
        load(tmp_path / "resnet_best.pt")
    with pytest.raises(LoadError, match=r"there is no such file; did you mean .*resnet_best\.pt\?"):
        load(tmp_path / "resnet_bst.pt")


def npz(path):
    with path.open("wb") as stream:
        np.savez(stream, a=np.zeros(2))


OTHERS = {
    "TorchScript": (
        lambda p: torch.jit.script(nn.ReLU()).save(p),
        "TorchScript, which is a program .*--trust",
    ),
    "ONNX": (
        lambda p: p.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x03abc"),
        "an ONNX model; only `fold`, `inspect` and `verify` take that",
    ),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00" + bytes(99)), "a NumPy array"),
    "npz": (npz, "a zip archive"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"abc")), "a compressed .*; unpack it first"),
    "plain pickle": (
        lambda p: p.write_bytes(pickle.dumps({"a": 1})),
        "a pickle that torch.save did",
    ),
    "LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a Git LFS pointer, .*git lfs pull",
    ),
    "HTML": (lambda p: p.write_text("<!DOCTYPE html><html>404</html>"), "a web page"),
    "text": (lambda p: p.write_text("model: resnet50\nlr: 0.1\n"), "a text file"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 4), "of no format that bntools knows"),
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize(("write", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_other_formats_are_named_and_what_to_do(write, message, tmp_path):
    path = tmp_path / "m.bin"
    write(path)
    with pytest.raises(LoadError, match=rf"it is {message}"):
        load(path)


def test_every_format_that_is_read_comes_with_a_reader():
    read = {entry.name for entry in table.FORMATS if entry.read is not None}
    assert {"a torch.save file", "a safetensors file", "a torch.export archive"} <= read
    assert all(entry.read or entry.advice for entry in table.FORMATS)


# ---- architectures ------------------------------------------------------------------------------


def test_the_name_of_an_architecture_gives_random_weights_in_eval_mode(nets):
    for name in (NET, "timm:resnet10t", "mynets:Net"):
        loaded = read_model(name)
        assert not loaded.model.training
        assert loaded.notes == (f"{name} has random weights: no file was given",)


def test_nothing_is_downloaded_for_an_architecture(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    load("torchvision:lraspp_mobilenet_v3_large")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("torchvision:resnet51", "has no such model; near are torchvision:resnet50"),
        ("timm:efficientnet_b99", "timm has no such model; near are timm:efficientnet_b"),
        ("timm:hf-hub:org/model", "timm has no such model"),
        ("resnet50", r"did you mean torchvision:resnet50\?"),
        ("torchvision:", "an architecture is torchvision:NAME"),
        ("nosuchmodule:net", "no module named 'nosuchmodule'"),
        ("mynets:Nte", "mynets has no 'Nte'"),
        ("mynets:number", "gave a int, not an nn.Module"),
        ("mynets:Raises", "raised ValueError: no such config"),
        ("mynets:act", r"raised TypeError: act\(\) missing 1 required positional"),
        ("mynets:Kind.PLAIN", "gave a Kind, not an nn.Module"),
        ("broken:net", "importing broken raised ZeroDivisionError"),
    ],
)
def test_an_architecture_that_cannot_be_built_says_why(arch, message, nets):
    torch.save({"a": torch.zeros(1)}, "m.pt")
    with pytest.raises(LoadError, match=message) as caught:
        load("m.pt", arch=arch)
    assert "\n" not in str(caught.value)


def test_the_working_folder_is_searched_only_for_what_the_user_names(nets):
    before = list(sys.path)
    load("mynets:Net")
    assert sys.path == before


def test_a_missing_timm_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoadError, match="Install it with: pip install timm"):
        load("timm:resnet18")
