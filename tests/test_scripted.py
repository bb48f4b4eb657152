"""TorchScript: read with trust alone, folded by torch's own pass, and never believed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import randomise
from torch import Tensor, nn

import bntools
from bntools.errors import LoadError, PlanError, SaveError, SurgeryError
from bntools.report import Reason

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::UserWarning:torch"
)


class Plain(nn.Module):
    """With an attribute, and a size that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pick = nn.Conv2d(8, 4, 1)
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(torch.relu(self.bn(self.conv(x)))) * self.factor


class Net(Plain):
    """With a second method."""

    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Twice(nn.Module):
    """One host, two norms: torch's pass folds one of them into it, for both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(self.one(self.conv(x))))


class Unused(nn.Module):
    """torch's pass ends the process on this one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.bn(self.conv(x))
        return self.other(x)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(5))


def made(cls: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cls()
    randomise(model, 3)
    return model.eval()


def stored(model: nn.Module, path: Path, *, trace: bool = False) -> Path:
    compiled: Any = torch.jit.trace(model, image()) if trace else torch.jit.script(model)
    torch.jit.save(compiled, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return stored(made(Net), tmp_path / "net.ts")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(program, [str(argument) for argument in arguments])


def test_reading_wants_trust(net):
    """A file of TorchScript is a program, whatever its name says."""
    renamed = net.with_name("model.pt")
    renamed.write_bytes(net.read_bytes())
    for path in (net, renamed):
        with pytest.raises(LoadError, match=r"it is TorchScript, which is a program.*--trust"):
            bntools.load(path)
    assert isinstance(bntools.load(net, trust=True), torch.jit.ScriptModule)


@pytest.mark.parametrize("trace", [False, True])
def test_a_fold_is_proven_and_keeps_everything(trace, tmp_path):
    """Methods, attributes, parameters, and the free batch; the argument stays as it is."""
    model = made(Plain if trace else Net)
    source = bntools.load(stored(model, tmp_path / "m.ts", trace=trace), trust=True)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    result = bntools.fold(source, image())
    assert [(d.path, d.hosts) for d in result.report.folds] == [("bn", ("conv",))]
    assert result.report.check.float64.outputs[0].error < 1e-12
    folded = result.model
    assert "batch_norm" not in str(folded.inlined_graph)
    for batch in (1, 5):
        assert torch.allclose(
            folded(image(batch, 3, 8, 8)), model(image(batch, 3, 8, 8)), atol=1e-5
        )
    if not trace:
        assert folded.factor == 2.0
        assert torch.allclose(folded.features(image()), model.features(image()), atol=1e-5)
    assert folded.conv.bias.dtype is torch.float32
    assert all(torch.equal(t, before[n]) for n, t in source.state_dict().items())
    assert "batch_norm" in str(source.inlined_graph)


def test_half_precision_is_folded_in_float64(tmp_path):
    """And rounded once, to the dtype of each tensor."""
    source = torch.jit.script(made(Net).bfloat16())
    result = bntools.fold(source, image().bfloat16())
    assert {t.dtype for t in result.model.parameters()} == {torch.bfloat16}
    assert result.report.folds
    assert result.report.check


def test_what_torch_folds_wrong_is_undone(tmp_path):
    """Silently wrong by torch's pass; here both layers stay, with the way on."""
    model = made(Twice)
    source = bntools.load(stored(model, tmp_path / "m.ts"), trust=True)
    wrong = torch.jit._recursive.wrap_cpp_module(torch._C._jit_pass_fold_convbn(source._c))
    assert not torch.allclose(wrong(image()), model(image()), atol=1e-2)
    result = bntools.fold(source, image())
    assert {d.reason for d in result.report.kept} <= {Reason.CHECK_FAILED, Reason.SCRIPTED}
    assert "torch.export" in result.report.kept[0].detail
    assert result.report.check
    assert result.report.check.rolled_back
    assert torch.equal(result.model(image()), model(image()))


def test_the_pass_is_not_tried_where_it_ends_the_process(tmp_path):
    """A norm whose output nobody takes."""
    source = bntools.load(stored(made(Unused), tmp_path / "m.ts", trace=True), trust=True)
    result = bntools.fold(source, image())
    assert not result.report.folds
    (kept,) = (d for d in result.report.kept if d.path == "bn")
    assert "torch's pass crashes" in kept.detail or kept.reason is Reason.NOT_EXECUTED


def test_a_pass_that_fails_leaves_a_reason(tmp_path):
    """Torch asserts inside; the model is told to be left."""

    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.bn(self.conv(x))
            return x

    source = bntools.load(stored(made(Loops), tmp_path / "m.ts", trace=True), trust=True)
    result = bntools.fold(source, image())
    assert [(d.reason, "fails" in d.detail) for d in result.report.kept] == [
        (Reason.SCRIPTED, True)
    ]


def test_torchscript_folds_as_a_whole(net):
    """Selections and options that take a model apart are refused with the next step."""
    source = bntools.load(net, trust=True)
    with pytest.raises(PlanError, match="Cannot select norm layers in TorchScript"):
        bntools.plan_fold(source, image(), only="bn")
    with pytest.raises(SurgeryError, match="Cannot merge, pad forward or keep originals"):
        bntools.fold(source, image(), keep_originals=True)


def test_inspect_sees_health_and_folds(net):
    """The statistics are there, and so is what would fold."""
    layer = bntools.inspect(bntools.load(net, trust=True)).layers[0]
    assert (layer.path, layer.kind, layer.channels) == ("bn", "BatchNorm2d", 8)
    assert layer.decision.hosts == ("conv",)


def test_files_keep_the_recipe(net, tmp_path):
    """Beside the code, under extra; a .pt of a compiled model is TorchScript, too."""
    result = bntools.fold(bntools.load(net, trust=True), image())
    for name in ("folded.ts", "folded.pt"):
        bntools.save(result, tmp_path / name)
        read = bntools.read_model(tmp_path / name, trust=True)
        assert read.recipe == result.recipe.to_dict()
        assert [e["edit"] for e in read.recipe["edits"]] == ["add-bias", "drop-norm"]
        assert torch.equal(read.model(image()), result.model(image()))


_FRESH = """
import sys, torch
model, (inputs, wanted) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(inputs), wanted)
"""


@pytest.mark.parametrize(
    "name",
    [
        "",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "torchvision:resnet18",
                "torchvision:mobilenet_v3_small",
                "torchvision:shufflenet_v2_x0_5",
                "torchvision:densenet121",
                "torchvision:mnasnet0_5",
                "timm:ghostnet_050",
            )
        ),
    ],
)
def test_folds_go_to_a_fresh_process_bit_for_bit(name, tmp_path):
    """Compiled by torch, folded, written, and run without bntools."""
    model = bntools.load(name) if name else made(Plain)
    inputs = image(2, 3, 64, 64) if name else image()
    randomise(model.eval())
    torch.jit.save(torch.jit.trace(model, inputs), tmp_path / "m.ts")
    result = bntools.fold(bntools.load(tmp_path / "m.ts", trust=True), inputs)
    assert result.report.folds
    bntools.save(result, tmp_path / "f.ts")
    with torch.no_grad():
        torch.save((inputs, result.model(inputs)), tmp_path / "wanted.pt")
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "f.ts"), str(tmp_path / "wanted.pt")]
    subprocess.run(command, check=True, timeout=300)


class Renamed(nn.BatchNorm2d):
    """A batch norm by another name, as timm's BatchNormAct2d is: torch's pass goes by names."""


def _renamed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Renamed(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("", {"1": "Renamed"}),
        *(
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in ("timm:efficientnet_lite0", "timm:regnetx_002")
        ),
    ],
)
def test_norms_of_other_classes_are_listed_and_stay(name, kept, tmp_path):
    """They are told by their statistics, and the way on is said; what can be folded is."""
    model = bntools.load(name) if name else _renamed()
    inputs = image(2, 3, 64, 64) if name else image()
    randomise(model.eval())
    kept = kept or {p: type(m).__name__ for p, m in model.named_modules() if hasattr(m, "eps")}
    torch.jit.save(torch.jit.trace(model, inputs), tmp_path / "m.ts")
    compiled = bntools.load(tmp_path / "m.ts", trust=True)
    result = bntools.fold(compiled, inputs)
    assert {each.path: each.kind for each in result.report.kept} == kept
    assert {each.reason for each in result.report.kept} == {Reason.SCRIPTED}
    assert all(
        "export that (torch.export) and fold the .pt2" in d.detail for d in result.report.kept
    )
    assert [each.path for each in result.report.folds] == ([] if name else ["3"])
    inspected = {layer.path for layer in bntools.inspect(compiled, inputs).layers}
    assert inspected == {*kept, *(each.path for each in result.report.folds)}


def test_an_instance_norm_is_no_batch_norm(tmp_path):
    """It has running statistics, and is not in the plan of the Python model either."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)).eval()
    torch.jit.save(torch.jit.script(model), tmp_path / "m.ts")
    compiled = bntools.load(tmp_path / "m.ts", trust=True)
    assert bntools.fold(compiled, image()).report.decisions == ()
    assert bntools.fold(model, image()).report.decisions == ()


def test_modules_are_written_compiled_or_traced(tmp_path):
    """What the compiler does not know is traced, which the notes tell."""

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return type(x)(x) * {"two": 2}["two"]

    assert bntools.save(made(Net), tmp_path / "net.ts") == ()
    (note,) = bntools.save(Unknown(), tmp_path / "traced.ts", example_inputs=image())
    assert "was traced" in note
    for name, model in (("net.ts", made(Net)), ("traced.ts", Unknown())):
        assert torch.equal(bntools.load(tmp_path / name, trust=True)(image()), model(image()))


def test_a_trace_that_gives_something_else_is_not_written(tmp_path):
    """A branch that was not taken."""

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * max([1, *(2 for size in x.shape[:1] if size > 2)])

    with pytest.raises(SaveError, match=r"TorchScript gives another output than the model for 4x"):
        bntools.save(Branches(), tmp_path / "m.ts", example_inputs=image())
    assert list(tmp_path.iterdir()) == []


def test_verbs_that_take_modules_apart_refuse(net, tmp_path):
    """With what takes them, and the way on."""
    for verb, *rest in (("freeze",), ("replace", "--with", "groupnorm"), ("export",)):
        result = run(verb, net, "--trust", "-o", tmp_path / "out.pt", *rest)
        assert result.exit_code == 3
        assert "only `fold`, `inspect` and `verify` take that" in result.stderr
    assert not (tmp_path / "out.pt").exists()


def test_the_command_line_folds_and_verifies(net, tmp_path):
    """`--trust` warns; the default output is beside the file."""
    answer = run("fold", net, "--trust", "-o", tmp_path / "folded.ts", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert "warning: --trust" in answer.stderr
    assert json.loads(answer.stdout)["output"] == str(tmp_path / "folded.ts")
    assert zipfile.is_zipfile(tmp_path / "folded.ts")
    judged = run("verify", net, tmp_path / "folded.ts", "--trust", "-q")
    assert judged.exit_code == 0, judged.stderr
    assert run("fold", net, "-o", tmp_path / "f2.ts").exit_code == 3
