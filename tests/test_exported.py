"""Exported programs: every verb works on them, bit for bit, and what torch wrote stays."""

from __future__ import annotations

import copy
import inspect
import io
import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from randomise import randomise, settle
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten

import bntools
from bntools.errors import InputError, LoadError, SaveError
from bntools.programs.program import Program

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")


class Net(nn.Module):
    """A bit of everything: state that is written, constants, an in-place activation, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 2), bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.act = nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, output_padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("gain", torch.tensor(2.0), persistent=False)
        self.offset = torch.arange(6.0)

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls.add_(1)
        y = self.norm(self.up(self.act(self.bn(self.conv(x)))))
        a, b = y.chunk(2, 1)
        pooled = torch.cat([b, a], 1).mean((2, 3)).view(x.shape[0], -1)
        pooled = pooled * self.gain + self.offset.to(x.dtype)
        return {"out": self.fc(self.drop(pooled)), "aux": [y, y.shape[0]]}


class Text(nn.Module):
    """Several inputs, keywords, tied weights, integers, an ordered dict and None."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor, mask: Tensor, *, flag: int = 2, extra: Any) -> Any:
        y = self.words(ids) * mask[..., None] + extra["k"][0] * flag
        y = self.norm(self.first(y).transpose(1, 2)).transpose(1, 2)
        return self.out(y), OrderedDict(z=y, n=None)


def made(cls: type[nn.Module], seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls()
    randomise(model, seed)
    return model.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(5))


def export(model: nn.Module, *args: Any, shapes: Any = None, **kwargs: Any) -> Any:
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def stored(program: Any, path: Path) -> Path:
    torch.export.save(program, path)
    return path


def leaves(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tree_flatten(model(*args, **kwargs))[0]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = export(made(Net), image(), shapes={"x": {0: Dim.AUTO, 2: Dim("h", min=4, max=64)}})
    return stored(program, tmp_path_factory.mktemp("net") / "net.pt2")


# ---- loading -------------------------------------------------------------------------------------


def test_a_program_gives_what_torch_gives_bit_for_bit(net):
    """Also for other batches and sizes than it was exported with."""
    program, torchs = bntools.load(net), torch.export.load(net).module()
    for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (3, 3, 12, 8)):
        assert same(leaves(program, image(*shape)), leaves(torchs, image(*shape)))


def test_layers_come_back_with_their_options(net):
    """At the paths that own the tensors, with the same repr."""
    program, model = bntools.load(net), made(Net)
    for name in ("conv", "bn", "act", "up", "norm", "fc"):
        assert repr(program.get_submodule(name)) == repr(getattr(model, name))
    assert not any(module.training for module in program.modules())


def test_the_state_dict_is_that_of_the_model(net):
    """Names, values, kinds; what is not persistent is no part of it."""
    program, model = bntools.load(net), made(Net)
    own, wanted = program.state_dict(), model.state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in wanted.items())
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_buffers_are_written(net):
    """A forward of the program counts like one of the model."""
    program = bntools.load(net)
    leaves(program, image())
    assert float(program.calls) == 1


def test_sizes_that_were_fixed_stay_fixed(net):
    """And conditions that torch.export found are checked."""
    program = bntools.load(net)
    with pytest.raises(InputError, match=r"x\.size\(3\) must be 8, and is 9"):
        program(image(2, 3, 8, 9))
    with pytest.raises(InputError, match=r"at most 64|<= 64"):
        program(image(2, 3, 65, 8))
    with pytest.raises(InputError, match="x must be a tensor of 4 dimensions"):
        program(image(3, 8, 8))
    with pytest.raises(InputError, match="it takes x"):
        program(image(), image())


def test_inputs_go_by_position_or_by_name(tmp_path):
    """Constants must be those of the export; sizes that belong together are checked together."""
    model, ids, mask = made(Text), torch.arange(6).reshape(2, 3), torch.ones(2, 3)
    extra = {"k": [image(8), image(2)]}
    batch, length = Dim("b"), Dim("t")
    shapes = {
        "ids": {0: batch, 1: length},
        "mask": {0: batch, 1: length},
        "flag": None,
        "extra": {"k": [None, None]},
    }
    program = export(model, ids, mask, flag=3, extra=extra, shapes=shapes)
    loaded = bntools.load(stored(program, tmp_path / "text.pt2"))
    wanted = leaves(program.module(), ids, mask, flag=3, extra=extra)
    assert same(leaves(loaded, ids, mask, flag=3, extra=extra), wanted)
    assert same(leaves(loaded, ids=ids, mask=mask, flag=3, extra=extra), wanted)
    assert isinstance(loaded(ids, mask, flag=3, extra=extra)[1], OrderedDict)
    assert loaded.words.weight is loaded.out.weight
    with pytest.raises(InputError, match="flag is fixed at 3, and is 4"):
        loaded(ids, mask, flag=4, extra=extra)
    with pytest.raises(InputError, match=r"mask\.size\(1\) must be 3 as well, and is 2"):
        loaded(ids, mask[:, :2], flag=3, extra=extra)
    result = bntools.fold(loaded)
    assert [d.hosts for d in result.report.folds] == [("first",)]


def test_layers_come_back_from_a_decomposed_program(tmp_path):
    """After run_decompositions calls have other names: convolution, addmm, and a norm of three."""
    program = export(made(Net), image(), shapes=({0: Dim.AUTO},)).run_decompositions()
    loaded = bntools.load(stored(program, tmp_path / "net.pt2"))
    assert same(leaves(loaded, image()), leaves(program.module(), image()))
    assert {type(loaded.get_submodule(n)).__name__ for n in ("conv", "bn", "up", "fc")} == {
        "Conv2d",
        "BatchNorm2d",
        "ConvTranspose2d",
        "Linear",
    }
    assert {"bn", "norm"} <= {d.path for d in bntools.fold(loaded).report.folds}


def test_a_program_in_training_mode_is_one(tmp_path):
    """It draws and counts as it did; its eval version is what folds."""
    model = made(Net).train()
    program = export(model, image())
    read = bntools.read_model(stored(program, tmp_path / "net.pt2"))
    torchs = program.module()
    assert read.model.training
    assert read.notes == ("the program was exported in training mode",)
    assert same(leaves(read.model, image()), leaves(torchs, image()))
    assert int(read.model.bn.num_batches_tracked) == int(torchs.bn.num_batches_tracked)
    result = bntools.fold(read.model)
    assert "the model is in training mode" in result.report.warnings[0]
    assert same(leaves(read.model.eval(), image()), leaves(model.eval(), image()))


def test_one_norm_in_training_mode_is_kept(tmp_path):
    """Where the rest is not, the file means it."""
    model = made(Net)
    model.norm.train()
    program = export(model, image())
    loaded = bntools.load(stored(program, tmp_path / "net.pt2"))
    assert not loaded.training
    assert loaded.norm.training
    kept = {d.path: d.reason for d in bntools.plan_fold(loaded).kept}
    assert kept["norm"] is bntools.Reason.TRAINING_MODE


def test_bfloat16_stays(tmp_path):
    """Half precision goes through both ways."""
    model = made(Net).bfloat16()
    program = export(model, image().bfloat16(), shapes=({0: Dim.AUTO},))
    loaded = bntools.load(stored(program, tmp_path / "net.pt2"))
    assert same(leaves(loaded, image().bfloat16()), leaves(program.module(), image().bfloat16()))
    bntools.save(bntools.fold(loaded), tmp_path / "folded.pt2")
    assert bntools.load(tmp_path / "folded.pt2").conv.weight.dtype is torch.bfloat16


class Regions(nn.Module):
    """Graphs in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        with torch.autocast("cpu"):
            y = self.norm(self.other(y))
        return torch.cond(y.sum() > 0, lambda a: a + 1, lambda a: a - 1, (y.float(),))


def test_graphs_in_the_graph_run_and_have_their_layers(tmp_path):
    """no_grad, autocast and torch.cond; a norm in there is found, and folds."""
    program = export(made(Regions), image())
    loaded = bntools.load(stored(program, tmp_path / "r.pt2"))
    assert same(leaves(loaded, image()), leaves(program.module(), image()))
    result = bntools.fold(loaded)
    assert {d.path for d in result.report.decisions} == {"bn", "norm"}
    bntools.save(result, tmp_path / "folded.pt2")
    again = bntools.load(tmp_path / "folded.pt2")
    assert same(leaves(again, image()), leaves(result.model, image()))


def test_a_layer_under_two_names_is_one(tmp_path):
    """Tied tensors of one layer make one layer; of two layers, tied weights."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(x)

    loaded = bntools.load(stored(export(made(Twice), image()), tmp_path / "t.pt2"))
    assert loaded.two.get_submodule("0") is loaded.one.get_submodule("0")
    assert len(bntools.plan_fold(loaded).folds) == 1


def test_a_bias_that_is_not_passed_is_not_used(tmp_path):
    """The layer would use it, so the call stays what it is."""

    class Unpassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.conv.weight)

    program = export(made(Unpassed), image())
    loaded = bntools.load(stored(program, tmp_path / "u.pt2"))
    assert not isinstance(loaded.conv, nn.Conv2d)
    assert same(leaves(loaded, image()), leaves(program.module(), image()))


def test_the_archive_of_older_torch_is_read(net, tmp_path):
    """Up to torch 2.7 the weights were torch.save files in a plain zip."""
    whole, program = zipfile.ZipFile(net), torch.export.load(net)
    name = next(n for n in whole.namelist() if n.endswith("models/model.json"))
    parts = {
        "version": b"8.20",
        "serialized_exported_program.json": whole.read(name),
        "serialized_state_dict.pt": pickled(dict(program.state_dict)),
        "serialized_constants.pt": pickled(dict(program.constants)),
    }
    old = tmp_path / "old.pt2"
    with zipfile.ZipFile(old, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    assert same(leaves(bntools.load(old), image()), leaves(program.module(), image()))


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


# ---- verbs and writing ---------------------------------------------------------------------------


def test_a_fold_of_a_program_is_written_as_one(net, tmp_path):
    """Free sizes stay free, names stay, the recipe travels, and torch loads it."""
    result = bntools.fold(bntools.load(net))
    assert {"bn", "norm"} <= {d.path for d in result.report.folds}
    folded = tmp_path / "folded.pt2"
    assert bntools.save(result, folded) == ()
    again = bntools.read_model(folded)
    assert again.recipe == result.recipe.to_dict()
    assert bntools.load(folded).conv.bias is not None
    program = torch.export.load(folded)
    assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    assert program.graph_signature.user_inputs == ("x",)
    for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (2, 3, 64, 8)):
        wanted = leaves(result.model, image(*shape))
        assert same(leaves(again.model, image(*shape)), wanted)
        assert same(leaves(program.module(), image(*shape)), wanted)
    with pytest.raises(InputError, match=r"at most 64|<= 64"):
        again.model(image(2, 3, 65, 8))


def test_a_module_is_written_as_a_program_with_a_free_batch(tmp_path):
    """Without example inputs they are inferred; the batch is free where the model lets it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    randomise(model)
    notes = bntools.save(model, tmp_path / "m.pt2", example_inputs=torch.zeros(1, 3, 8, 8))
    assert notes == ()
    loaded = bntools.load(tmp_path / "m.pt2")
    for batch in (1, 2, 5):
        assert same(leaves(loaded, image(batch, 3, 8, 8)), leaves(model, image(batch, 3, 8, 8)))


def test_a_batch_that_the_model_fixes_is_told(tmp_path):
    """The note says so."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 192) + x.sum()

    notes = bntools.save(Fixed().eval(), tmp_path / "f.pt2", example_inputs=image(2, 3, 8, 8))
    assert notes == ("the batch size is fixed at 2: the model, or torch.export, leaves no other",)
    with pytest.raises(InputError, match="must be 2"):
        bntools.load(tmp_path / "f.pt2")(image(4, 3, 8, 8))


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    """A forward that decides by numbers has no one graph."""

    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(SaveError, match=r"Cannot write .*m\.pt2: .*decides by the numbers"):
        bntools.save(Decides().eval(), tmp_path / "m.pt2", example_inputs=image())
    with pytest.raises(SaveError, match="runs on none of the inputs"):
        bntools.save(nn.ReLU(), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_gives_something_else_is_not_written(tmp_path):
    """A state in Python is no part of a graph: the check sees it."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counts.total += 1
            return x * Counts.total

    Counts.total = 0
    with pytest.raises(SaveError, match="gives another output than the model"):
        bntools.save(Counts().eval(), tmp_path / "m.pt2", example_inputs=image())
    assert list(tmp_path.iterdir()) == []


def test_programs_go_through_every_other_format(net, tmp_path):
    """A program is plain data: a .pt of it needs no trust."""
    result = bntools.fold(bntools.load(net))
    bntools.save(result, tmp_path / "p.pt")
    again = bntools.load(tmp_path / "p.pt")
    assert isinstance(again, Program)
    assert same(leaves(again, image()), leaves(result.model, image()))
    copied = copy.deepcopy(again)
    assert same(leaves(copied, image()), leaves(result.model, image()))


def test_other_verbs_take_programs(net):
    """freeze, replace and recalibrate see the layers; verify pairs programs with anything."""
    program, model = bntools.load(net), made(Net)
    assert bool(bntools.verify(model, program, image()))
    assert {d.path for d in bntools.freeze(program).report.changed} == {"bn", "norm"}
    before = program.bn.running_mean.clone()
    recalibrated = bntools.recalibrate(program, [image(), image() + 1])
    assert not torch.equal(recalibrated.model.bn.running_mean, before)
    assert torch.equal(program.bn.running_mean, before)
    inspection = bntools.inspect(program)
    assert [layer.path for layer in inspection.layers][:2] == ["bn", "norm"]


def test_norms_of_a_program_are_replaced(tmp_path):
    """An activation that is a layer of its own goes with EvoNorm."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    randomise(model.eval())
    program = bntools.load(stored(export(model, image()), tmp_path / "m.pt2"))
    grouped = bntools.replace(program, bntools.ToGroupNorm(groups=2))
    assert isinstance(grouped.model.get_submodule("1"), nn.GroupNorm)
    evolved = bntools.replace(program, bntools.ToEvoNormS0())
    assert [type(evolved.model.get_submodule(n)).__name__ for n in "12"] == [
        "EvoNorm2dS0",
        "Identity",
    ]


def test_the_loaded_program_is_not_changed_by_a_fold(net):
    """As every model that is handed in."""
    program = bntools.load(net)
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    plan = program.plan
    bntools.fold(program)
    assert program.plan == plan
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict().items())


_FRESH = """
import sys, torch, bntools
model, inputs, wanted = bntools.load(sys.argv[1]), *torch.load(sys.argv[2])
with torch.no_grad():
    found = model(inputs)
assert torch.equal(found, wanted), float((found - wanted).abs().max())
"""
_ARCHITECTURES = {
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:densenet121": 64,
    "torchvision:googlenet": 96,
    "timm:efficientnet_lite0": 64,
    "timm:convmixer_768_32": 32,
    "timm:regnetx_002": 64,
    "timm:ghostnet_050": 64,
}


def fresh(folder: Path, model: nn.Module, inputs: Tensor) -> int:
    """Export, load, fold, write, and run by another Python; how many norms are folded."""
    stored(export(model, inputs, shapes=({0: Dim.AUTO},)), folder / "m.pt2")
    program = bntools.load(folder / "m.pt2")
    assert same(leaves(program, inputs), leaves(model, inputs))
    result = bntools.fold(program)
    bntools.save(result, folder / "f.pt2")
    torch.save((inputs, leaves(result.model, inputs)[0]), folder / "wanted.pt")
    run = [sys.executable, "-c", _FRESH, str(folder / "f.pt2"), str(folder / "wanted.pt")]
    subprocess.run(run, check=True, timeout=300)
    return len(result.report.folds)


def test_a_fold_goes_to_a_fresh_process_bit_for_bit(tmp_path):
    """A small network; the others are slow."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    randomise(model.eval())
    assert fresh(tmp_path, model, image()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", _ARCHITECTURES)
def test_architectures_go_to_a_fresh_process_bit_for_bit(name, tmp_path):
    """As many norms fold in the program as in the model that it was made from."""
    inputs = image(2, 3, _ARCHITECTURES[name], _ARCHITECTURES[name])
    model = bntools.load(name)
    randomise(model)
    settle(model, inputs)
    planned = bntools.plan_fold(model, inputs)
    assert fresh(tmp_path, model, inputs) == len(planned.folds)


# ---- files that are not what they should be ------------------------------------------------------


def test_programs_without_a_model_are_explained(tmp_path):
    """Several programs, or none."""
    program = export(nn.Sequential(nn.ReLU()), image())
    many = tmp_path / "many.pt2"
    torch.export.pt2_archive._package.package_pt2(
        many, exported_programs={"a": program, "b": program}
    )
    with pytest.raises(LoadError, match=r"it holds 2 programs \(a, b\)"):
        bntools.load(many)


def test_a_newer_schema_is_told(net, tmp_path):
    """The graph's own version decides."""
    changed = tampered(net, tmp_path, lambda data: data["schema_version"].update(major=9))
    with pytest.raises(LoadError, match="wrote it in the schema 9, and bntools reads 8"):
        bntools.load(changed)


def tampered(source: Path, folder: Path, change: Any) -> Path:
    """A copy of an archive with its graph changed."""
    target = folder / "tampered.pt2"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("models/model.json"):
                content = json.loads(data)
                change(content)
                data = json.dumps(content).encode()
            new.writestr(info.filename, data)
    return target


class Pair(nn.Module):
    """Two inputs, and a norm that averages over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=None)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.norm(self.conv(left)) + self.other(right)


def test_the_names_of_inputs_reach_whoever_asks_for_them(tmp_path):
    """Torch's exporters, and `verify` beside an ONNX model, whose inputs go by name."""
    onnx = pytest.importorskip("onnx")
    inputs = (image(), image().flip(0))
    bntools.save(made(Pair), tmp_path / "m.pt2", example_inputs=inputs)
    program = bntools.load(tmp_path / "m.pt2")
    assert list(inspect.signature(program.forward).parameters) == ["left", "right"]
    bntools.export_onnx(program, inputs, tmp_path / "m.onnx", provider="cpu")
    assert [i.name for i in onnx.load(tmp_path / "m.onnx").graph.input] == ["left", "right"]
    assert bntools.verify(program, tmp_path / "m.onnx")
    assert bntools.verify(tmp_path / "m.onnx", program)
    result = bntools.ship(program, tmp_path / "shipped")
    assert result.report
    named = {"right": inputs[1], "left": inputs[0]}
    assert torch.equal(program(**named), program(*inputs))


def test_the_average_of_all_batches_is_told_from_a_momentum_of_zero(tmp_path):
    """Torch passes 0 for None in eval mode, which would pass for statistics that never move."""
    bntools.save(made(Pair), tmp_path / "m.pt2", example_inputs=(image(), image()))
    program = bntools.load(tmp_path / "m.pt2")
    assert program.norm.momentum is None
    assert [f.code for f in bntools.inspect(program).findings] == ["biased-conv"]
    bntools.save(made(Pair), tmp_path / "m.onnx", example_inputs=(image(), image()))
    found = bntools.inspect_onnx(tmp_path / "m.onnx")
    assert [f.code for f in found.findings] == ["biased-conv"]
    assert [layer.momentum for layer in found.layers] == [None]
