"""Folding ONNX models: every operation and trap, against the same graph in float64."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_folds import FOLDS, KEEPS, Net
from onnx_models import FLOAT, node
from randomise import randomise
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import bntools
from bntools.errors import InputError, LoadError, PlanError, SaveError
from bntools.examples import given
from bntools.onnx_surgery import pipeline
from bntools.onnx_surgery.folding import FoldedOnnx, fold_proto
from bntools.runtimes.exporting import export
from bntools.runtimes.sessions import open_session
from bntools.runtimes.widening import DoubleModel

NO_ORT = {"bfloat16"}


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def feeds(model: onnx.ModelProto, seed: int, batch: int = 3, size: int = 11) -> dict[str, Tensor]:
    """Random inputs; sizes that are open are those given."""
    stored = {each.name for each in model.graph.initializer}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        tensor = value.type.tensor_type
        shape = [
            d.dim_value or (batch if axis == 0 else size) for axis, d in enumerate(tensor.shape.dim)
        ]
        shape = shape or [batch, 3, size, size]
        dtype = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
        drawn = torch.randn(shape, generator=generator)
        found[value.name] = drawn.to(dtype.get(tensor.elem_type, torch.float32))
    return found


def exactly(model: onnx.ModelProto, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model gives in float64."""
    return DoubleModel(copied(model)).run(fed)


def off(found: Tensor, truth: Tensor) -> float:
    """The relative L2 error."""
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", FOLDS)
def test_a_norm_folds_and_nothing_else_changes(name: str):
    """In float64 to the rounding of the stored weights, and in ONNX Runtime as it is written."""
    make, folds = FOLDS[name]
    model = make()
    before = model.SerializeToString(deterministic=True)
    result = bntools.fold_onnx(model)
    assert model.SerializeToString(deterministic=True) == before
    report = result.report
    assert len(report.folds) == folds == len(report.decisions)
    if not folds:
        return
    assert report.check
    assert report.check.float64 is not None
    assert report.check.float64.worst.error < 1e-10
    made = result.model
    kinds = [each.op_type for each in made.graph.node]
    assert "BatchNormalization" not in kinds
    assert [each.name for each in made.graph.output] == [each.name for each in model.graph.output]
    fed = feeds(model, 1)
    limit = 1e-2 if "float16" in name or name == "bfloat16" else 1e-6
    for other, truth in exactly(model, fed).items():
        assert off(exactly(made, fed)[other], truth) < limit
        if name not in NO_ORT | {"no shapes"}:
            given = open_session(made.SerializeToString(), optimise=False).run(fed)[other]
            assert off(given, truth) < 4 * limit


@pytest.mark.parametrize("name", KEEPS)
def test_a_norm_that_cannot_fold_is_kept_with_the_reason(name: str):
    """The model stays as it is, and what is said has no word of PyTorch's."""
    make, path, reason = KEEPS[name]
    model = make()
    plan = bntools.plan_onnx(model)
    decision = next(each for each in plan.decisions if each.path == path)
    assert decision.reason is not None
    assert decision.reason.value == reason
    assert decision.detail
    assert "parametri" not in decision.detail
    assert "TorchScript" not in decision.detail


@pytest.mark.parametrize("name", ["conv", "concat", "frozen norm", "shared weight", "two norms"])
def test_what_is_folded_is_valid_and_tidy(name: str):
    """The checker takes it, names are unique, and nothing is left that nobody uses."""
    made = bntools.fold_onnx(FOLDS[name][0]()).model
    onnx.checker.check_model(made, full_check=True)
    names = [name for each in made.graph.node for name in each.output]
    names += [each.name for each in (*made.graph.initializer, *made.graph.input)]
    assert len(set(names)) == len(names)
    used = {name for each in made.graph.node for name in each.input}
    assert {each.name for each in made.graph.initializer} <= used
    assert {each.name for each in made.graph.value_info} <= set(names)


def test_everything_but_the_norms_stays():
    """Opsets, IR version, metadata, doc strings, names; a weight keeps its name."""
    model = FOLDS["conv"][0]()
    model.ir_version = 8
    model.doc_string, model.producer_name, model.graph.doc_string = "mine", "me", "a graph"
    model.metadata_props.add(key="owner", value="somebody")
    model.opset_import.append(helper.make_opsetid("com.example", 3))
    made = bntools.fold_onnx(model).model
    assert made.opset_import == model.opset_import
    assert (made.ir_version, made.doc_string, made.producer_name) == (8, "mine", "me")
    assert made.graph.doc_string == "a graph"
    assert made.graph.input == model.graph.input
    assert made.graph.output == model.graph.output
    assert "c_w" in {each.name for each in made.graph.initializer}
    notes = {each.key: each.value for each in made.metadata_props}
    assert notes["owner"] == "somebody"
    assert json.loads(notes["bntools_folded"]) == {"batchnormalization_y": ["conv_c"]}


def test_a_second_fold_replaces_the_notes_of_the_first():
    """A key of metadata is there once."""
    model = FOLDS["two norms"][0]()
    first = bntools.fold_onnx(model, only="batchnormalization_b").model
    second = bntools.fold_onnx(first).model
    keys = Counter(each.key for each in second.metadata_props)
    assert set(keys.values()) == {1}
    assert [each.op_type for each in second.graph.node] == ["Conv"]


def test_only_and_skip_choose_norms():
    """By the names of nodes where a file has no module paths."""
    model = FOLDS["split"][0]()
    report = bntools.fold_onnx(model, skip="*_q").report
    assert [each.path for each in report.folds] == ["batchnormalization_p"]
    assert [each.reason.value for each in report.kept] == ["skipped"]
    with pytest.raises(PlanError, match=r"Cannot select 'bn\*'"):
        bntools.plan_onnx(model, only="bn*")


def test_module_paths_of_torch_name_the_decisions():
    """The exporter notes them on each node; two nodes of one module are two calls."""
    model = FOLDS["shared norm"][0]()
    scopes = {"conv_a": "conv", "conv_b": "conv"}
    for each in model.graph.node:
        path = scopes.get(each.name, "block.bn" if each.op_type == "BatchNormalization" else "")
        each.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{path}', 'op']")
    plan = bntools.plan_onnx(model)
    assert [(each.path, each.hosts) for each in plan.folds] == [
        ("block.bn", ("conv",)),
        ("block.bn (call 2)", ("conv (call 2)",)),
    ]


class Scale(nn.Module):
    """A LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def test_what_torch_exports_has_the_paths_of_its_modules():
    """Frozen norms and layer scales are arithmetic in the file, and modules in the plan."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), FrozenBatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5), Scale(),
        nn.LayerNorm(5), nn.GELU(),
    ).eval()  # fmt: skip
    randomise(model)
    made = export(model, given(torch.randn(2, 3, 8, 8)))
    result = bntools.fold_onnx(ir.to_proto(made.graph))
    assert [(each.path, each.kind, each.hosts) for each in result.report.folds] == [
        ("1", "FrozenBatchNorm2d", ("0",)),
        ("4", "BatchNormalization", ("3",)),
        ("7", "Scale", ("6",)),
    ]
    kinds = {each.op_type for each in result.model.graph.node}
    assert not kinds & {"Mul", "Add", "BatchNormalization"}


def test_a_weight_is_copied_only_where_it_has_to_be():
    """One copy for two users that need the same, none where nobody else needs the old one."""
    alone = bntools.fold_onnx(FOLDS["conv"][0]()).model
    both = bntools.fold_onnx(FOLDS["shared weight"][0]()).model
    half = bntools.fold_onnx(FOLDS["weight that another conv needs"][0]()).model
    counts = [sum(len(t.dims) == 4 for t in made.graph.initializer) for made in (alone, both, half)]
    assert counts == [1, 2, 2]
    net = Net("n", 3, 8, 8).weight("w", 6, 3, 3, 3).add("Conv", "x w", "a").add("Conv", "x w", "b")
    net.bn("a", "p", 6)
    parts = " ".join(f"p_{part}" for part in ("gamma", "beta", "mean", "var"))
    net.add("BatchNormalization", f"b {parts}", "q").add("Add", "p q", "y")
    same = bntools.fold_onnx(net.model()).model
    assert sum(len(t.dims) == 4 for t in same.graph.initializer) == 1


def test_a_fold_that_computes_something_else_is_undone(monkeypatch: pytest.MonkeyPatch):
    """The check is a check: a fault planted in one fold of two is found and named."""

    def faulty(*args: object, **more: object) -> FoldedOnnx:
        folded = fold_proto(*args, **more)  # type: ignore[arg-type]  # whatever it was called with
        for tensor in folded.proto.graph.initializer:
            if tensor.name == "a_w" and "p_gamma" not in {
                t.name for t in folded.proto.graph.initializer
            }:
                wrong = numpy_helper.to_array(tensor).copy()
                wrong[0] *= 1.001
                tensor.CopyFrom(numpy_helper.from_array(wrong, "a_w"))
        return folded

    net = Net("n", 3, 8, 8).conv("x", "a", (6, 3, 3, 3)).bn("a", "p", 6)
    net.conv("x", "b", (6, 3, 3, 3)).bn("b", "q", 6).add("Mul", "p q", "y")
    monkeypatch.setattr(pipeline, "fold_proto", faulty)
    monkeypatch.setattr("bntools.onnx_surgery.proving.fold_proto", faulty)
    report = bntools.fold_onnx(net.model()).report
    assert [each.path for each in report.folds] == ["batchnormalization_q"]
    kept = report.kept[0]
    assert (kept.path, kept.reason) == ("batchnormalization_p", bntools.Reason.CHECK_FAILED)
    assert report.check is not None
    assert report.check.rolled_back == ("batchnormalization_p",)


def test_a_file_folds_through_the_public_api(tmp_path: Path):
    """Read by path, written whole, and the same for `verify`."""
    source, target = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(FOLDS["conv with bias"][0](), source)
    bntools.save(bntools.fold_onnx(source), target)
    assert bntools.verify(source, target)
    with pytest.raises(SaveError, match="it exists"):
        bntools.save(bntools.fold_onnx(source), target)
    with pytest.raises(SaveError, match=r"ends with \.onnx"):
        bntools.save(bntools.fold_onnx(source), tmp_path / "small.pt")


def test_weights_in_files_of_their_own_are_read(tmp_path: Path):
    """External data below the folder of the model."""
    source = tmp_path / "model.onnx"
    onnx.save(
        FOLDS["conv"][0](), source, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    result = bntools.fold_onnx(source)
    assert result.report.check
    bntools.save(result, tmp_path / "small.onnx")
    assert bntools.verify(source, tmp_path / "small.onnx")


def test_large_weights_are_written_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As over 2 GiB: the check runs from a file, and the data have a name of their own."""
    monkeypatch.setattr("bntools.onnx_surgery.writing.is_large", lambda proto, largest=0: True)
    monkeypatch.setattr("bntools.artifacts._SMALL", 1)
    result = bntools.fold_onnx(FOLDS["conv"][0]())
    assert result.report.check
    target = tmp_path / "small.onnx"
    bntools.save(result, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.onnx.data"]
    stored, wanted = onnx.load(target).graph.initializer, result.model.graph.initializer
    for one, other in zip(stored, wanted, strict=True):
        assert np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("../../../etc/passwd", "outside of its folder"),
        ("/etc/passwd", "outside of its folder"),
        ("..\\..\\secret", "outside of its folder"),
        ("C:\\secret", "outside of its folder"),
        ("", "outside of its folder"),
        ("link.bin", "behind a link"),
        ("missing.bin", "not there"),
        ("short.bin", "incomplete|cannot be read"),
    ],
)
def test_external_data_elsewhere_are_refused(tmp_path: Path, location: str, why: str):
    """Path tricks, links, and files that are too short."""
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    (tmp_path / "model" / "short.bin").write_bytes(bytes(3))
    model = FOLDS["conv"][0]()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "model" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LoadError, match=why):
        bntools.fold_onnx(tmp_path / "model" / "m.onnx")


def test_what_is_no_onnx_model_is_refused(tmp_path: Path):
    """One line, whatever it is."""
    for name, content in (
        ("empty", b""), ("text", b"hello"), ("bytes", bytes(range(256))),
        ("cut", FOLDS["conv"][0]().SerializeToString()[:-50]),
    ):  # fmt: skip
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(LoadError, match=r"^Cannot load [^\n]*$"):
            bntools.plan_onnx(path)
    with pytest.raises(LoadError, match="no such file"):
        bntools.plan_onnx(tmp_path / "nothing.onnx")
    invalid = FOLDS["conv"][0]()
    invalid.graph.node[0].op_type = "Convolution"
    with pytest.raises(LoadError, match="checker refuses it"):
        bntools.plan_onnx(invalid)


def test_example_inputs_are_named_or_in_order():
    """They say which sizes to look at, and have to fit."""
    model = FOLDS["conv"][0]()
    for inputs in (torch.zeros(1, 3, 8, 8), {"x": torch.zeros(1, 3, 8, 8)}):
        plan = bntools.plan_onnx(model, inputs)
        assert (len(plan.folds), plan.inputs) == (1, "x=1x3x8x8 float32")
    for wrong in (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8, 8).long()):
        with pytest.raises(InputError, match="it takes x: nx3x8x8 float32"):
            bntools.plan_onnx(model, wrong)
    with pytest.raises(InputError, match="its inputs are x"):
        bntools.plan_onnx(model, (torch.zeros(1, 3, 8, 8), torch.zeros(1)))


def test_sizes_behind_numbers_are_taken_from_a_run():
    """NonZero makes a size that only a run shows."""
    net = Net("n", 3, 8, 8).add("NonZero", "x", "z").ints("axes", 0)
    net.add("Cast", "z", "f", to=FLOAT).add("Unsqueeze", "f axes", "u")
    net.conv("u", "c", (6, 4, 1)).bn("c", "b", 6).add("ReduceMax", "b", "y", keepdims=0)
    report = bntools.fold_onnx(net.model()).report
    assert [each.hosts for each in report.folds] == [("conv_c",)]


def test_a_fold_holds_for_every_size():
    """A reshape that keeps the channels at one size only is found at the other."""
    net = Net("n", 4, "length").weight("w", 4, 4).add("MatMul", "w x", "m")
    net.ints("to", -1, 64).add("Reshape", "m to", "r").bn("r", "y", 64)
    decision = bntools.plan_onnx(net.model()).decisions[0]
    assert decision.reason is not None


def test_scalars_that_stay_are_no_news():
    """The halves and ones of a GELU are not listed; a scalar that folds is."""
    net = Net("n", 5).weight("half", value=0.5).add("Sigmoid", "x", "s").add("Mul", "s half", "m")
    assert bntools.plan_onnx(net.add("Relu", "m", "y").model()).decisions == ()
    net = Net("n", 5).weight("w", 5, 4).add("MatMul", "x w", "m").weight("half", value=0.5)
    plan = bntools.plan_onnx(net.add("Mul", "m half", "y").model())
    assert [(each.kind, each.hosts) for each in plan.folds] == [("affine (mul)", ("matmul_m",))]


def test_the_doctor_reads_the_statistics_of_a_file():
    """The findings are those that a PyTorch model gets."""
    net = Net("n", 3, 8, 8).conv("x", "c", (6, 3, 3, 3), bias=True).bn("c", "y", 6)
    net.weights["y_var"][1] = -0.5
    inspection = bntools.inspect_onnx(net.model())
    layer = inspection.layers[0]
    assert (layer.path, layer.kind, layer.channels) == (
        "batchnormalization_y", "BatchNormalization", 6,
    )  # fmt: skip
    assert layer.eps == 1e-5
    assert layer.variance is not None
    assert layer.variance.low == -0.5
    assert "negative-variance" in {each.code for each in inspection.errors}


def test_a_model_that_draws_random_numbers_is_refused():
    """Neither equal nor unequal; the node is named."""
    net = Net("n", 3, 8, 8).conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6)
    net.nodes.append(node("RandomNormalLike", "b", "r", name="noise"))
    with pytest.raises(bntools.BNToolsError, match="noise"):
        bntools.fold_onnx(net.add("Add", "b r", "y").model())


def test_a_batch_of_nothing_changes_no_decision():
    """Empty inputs show no channels: the sizes of the model decide."""
    model = FOLDS["flatten"][0]()
    plan = bntools.plan_onnx(model, torch.zeros(0, 3, 4, 4))
    assert plan.decisions[0].reason is not None


def test_batch_norms_before_opset_14_are_judged_rightly():
    """The reference evaluator of onnx mixes the batch's statistics into theirs."""
    for opset in (7, 9, 13):
        model = Net(2, 3, 8, 8, opset=opset).conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).model()
        fed = feeds(model, 3)
        given = open_session(model.SerializeToString(), optimise=False).run(fed)["y"]
        assert off(given, exactly(model, fed)["y"]) < 1e-6


@pytest.mark.parametrize(
    ("kind", "opset", "more"),
    [
        ("Squeeze", 11, {"axes": [2]}),
        ("Unsqueeze", 11, {"axes": [2]}),
        ("Pad", 9, {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"}),
        ("Transpose", 9, {"perm": [3, 1, 2, 0]}),
        ("SpaceToDepth", 9, {"blocksize": 1}),
        ("Relu", 9, {}),
    ],
)
def test_movement_is_understood_in_every_opset(kind: str, opset: int, more: dict[str, Any]):
    """What became an input was an attribute before."""
    size = 1 if kind == "Squeeze" else 4
    net = Net(2, 3, size + 2, 6, opset=opset).conv("x", "c", (6, 3, 3, 3))
    net.add(kind, "c", "p", **more).bn("p", "y", 6, positive=True)
    if kind == "Relu":
        net.weights["y_mean"], net.weights["y_beta"] = np.zeros((2, 6), np.float32)
    report = bntools.fold_onnx(net.model()).report
    assert len(report.folds) == 1, report.kept


def test_numpy_is_not_written_to():
    """Constants are shared with the file: a fold makes new ones."""
    model = FOLDS["gemm with factors"][0]()
    before = {each.name: numpy_helper.to_array(each).copy() for each in model.graph.initializer}
    bntools.fold_onnx(model)
    for each in model.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(each), before[each.name])
