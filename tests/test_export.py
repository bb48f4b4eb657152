"""`export_onnx`: what is in the file, what is proven about it, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torchvision
from randomise import randomise, settle
from torch import Tensor, nn

import bntools
from bntools import artifacts, judging, proving, publishing
from bntools.errors import (
    ExportError,
    InputError,
    NondeterministicError,
    RuntimeUnavailableError,
    SaveError,
)
from bntools.examples import Examples
from bntools.recipe import Recipe
from bntools.runtimes.cleaning import clean, name_ends

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()


def net(channels: int = 6) -> nn.Sequential:
    """A net whose norms fold, with random statistics and affine parameters."""
    layers = [
        nn.Conv2d(3, channels, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    ]
    model = nn.Sequential(*layers)
    randomise(model, 3)
    return model.eval()


def export(model: nn.Module, inputs: Any, path: Path, **options: Any) -> Any:
    options.setdefault("provider", "cpu")
    return bntools.export_onnx(model, inputs, path, **options)


def ran(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """What ONNX Runtime gives, without any code of bntools."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def properties(path: Path) -> dict[str, str]:
    return {each.key: each.value for each in onnx.load(path).metadata_props}


def state(model: nn.Module) -> list[Any]:
    """What must be the same after an export."""
    return [
        [
            (name, t.clone(), t.requires_grad)
            for name, t in model.state_dict(keep_vars=True).items()
        ],
        [(name, id(m), m.training, dict(m.__dict__)) for name, m in model.named_modules()],
        torch.get_rng_state(),
    ]


def assert_same(before: list[Any], after: list[Any]) -> None:
    for (name, a, grad), (_, b, flag) in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b), name
        assert grad is flag
    assert [m[:3] for m in before[1]] == [m[:3] for m in after[1]]
    assert [list(m[3]) for m in before[1]] == [list(m[3]) for m in after[1]]
    assert torch.equal(before[2], after[2])


# The file


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Any, Path]:
    """A model, the result of its export, and the file."""
    model, path = net(), tmp_path_factory.mktemp("export") / "net.onnx"
    before = state(model)
    result = export(model, IMAGE, path, options=bntools.ExportOptions(source="net.pt"))
    assert_same(before, state(model))
    return model, result, path


def test_the_file_computes_the_same_at_every_batch_size(exported):
    model, result, path = exported
    assert result.report
    assert result.report.path == str(path)
    for size in (1, 2, 7):
        image = torch.rand(size, 3, 8, 8)
        (given,) = ran(path, image)
        want = model.double()(image.double()).detach().numpy()
        model.float()
        assert np.abs(given - want).max() < 1e-5 * np.abs(want).max()


def test_the_file_has_no_norm_and_nothing_computed_that_is_constant(exported):
    _, result, path = exported
    assert operators(path) <= {"Conv", "Relu", "Gemm", "Reshape", "Shape", "Concat", "Squeeze"}
    assert result.report.operators["Conv"] == 2
    assert [d.path for d in result.report.fold.folds] == ["1", "4"]


def test_the_file_says_where_it_comes_from_and_how_it_was_checked(exported):
    _, result, path = exported
    said = properties(path)
    assert set(said) == {
        "bntools_recipe", "bntools_source", "bntools_verification", "bntools_version"
    }  # fmt: skip
    assert said["bntools_source"] == "net.pt"
    assert Recipe.from_dict(json.loads(said["bntools_recipe"])) == result.recipe
    assert len(result.recipe.edits) == 3
    figures = json.loads(said["bntools_verification"])
    assert figures["equivalent"] is True
    assert [c["inputs"].partition("x")[0] for c in figures["checks"]] == ["2", "1", "3"]
    (output,) = figures["checks"][0]["outputs"]
    assert output["error"] <= output["limit"]


def test_every_node_knows_its_module_and_no_path_of_this_machine_is_in_the_file(exported):
    _, _, path = exported
    scopes = {}
    for node in onnx.load(path).graph.node:
        notes = {each.key: each.value for each in node.metadata_props}
        scopes[node.op_type] = notes.get("pkg.torch.onnx.name_scopes", "")
        assert not {"pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"} & set(notes)
        assert not node.doc_string
    assert scopes["Relu"].startswith("['', '2',")
    assert scopes["Gemm"].startswith("['', '6',")
    content = path.read_bytes()
    for leak in (os.fsencode(Path(__file__).parent), os.fsencode(Path(torch.__file__).parent)):
        assert leak not in content


def test_initialisers_are_no_inputs_and_ends_have_names(exported):
    _, result, path = exported
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["output"]
    assert result.report.inputs == ("input: batchx3x8x8 float32",)
    assert result.report.dynamic_batch


def test_nothing_else_is_left_in_the_folder(exported):
    _, _, path = exported
    assert [each.name for each in path.parent.iterdir()] == ["net.onnx"]


def test_the_report_is_text_and_data(exported):
    _, result, _ = exported
    report = result.report
    assert str(report).splitlines()[-1] == report.summary()
    assert "opset 20, any batch size; folded 2 of 2 norm layers; worst error" in report.summary()
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (data["schema"], data["verb"], data["equivalent"]) == (1, "export", True)
    assert {"record", "fold", "check", "truth", "export", "session", "compare"} <= set(
        data["seconds"]
    )
    assert data["placement"]["provider"] == report.placement.provider
    assert "onnxruntime" in data["versions"]


def test_the_same_export_gives_the_same_bytes(exported, tmp_path):
    """But for the figures of its check: kernels on several threads round as they come."""
    model, _, path = exported
    options = bntools.ExportOptions(source="net.pt")
    export(model, IMAGE, tmp_path / "net.onnx", options=options)
    one, other = onnx.load(path), onnx.load(tmp_path / "net.onnx")
    for each in (one, other):
        figures = [p for p in each.metadata_props if p.key == "bntools_verification"]
        each.metadata_props.remove(*figures)
    assert one.SerializeToString() == other.SerializeToString()


def test_the_truth_is_found_once_for_fold_and_file(tmp_path, monkeypatch):
    asked: list[str] = []

    def counting(find: Callable[..., Any]) -> Callable[..., Any]:
        def found(model: nn.Module, examples: Examples, **options: Any) -> Any:
            asked.append(str(examples))
            return find(model, examples, **options)

        return found

    for module in (judging, proving):
        monkeypatch.setattr(module, "find_truth", counting(module.find_truth))
    assert export(net(), IMAGE, tmp_path / "net.onnx").report
    assert sorted(asked) == [f"{n}x3x8x8 float32" for n in (1, 2, 3)]


def test_without_a_fold_norms_stay_and_biases_are_constant(tmp_path):
    model = net()
    report = export(model, IMAGE, tmp_path / "net.onnx", fold=False).report
    assert report
    assert report.fold is None
    assert report.operators["BatchNormalization"] == 2
    assert "Expand" not in report.operators
    assert "2 BatchNormalization nodes" in report.summary()
    values = {each.name for each in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {"1.running_mean", "4.running_var"} <= values


def test_only_and_skip_choose_what_folds(tmp_path):
    options = bntools.ExportOptions(skip="4")
    report = export(net(), IMAGE, tmp_path / "net.onnx", options=options).report
    assert report.operators["BatchNormalization"] == 1
    assert report.fold.kept[0].path == "4"


# Failures


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[Any], None]) -> None:
    """Plant a fault in what the exporter gives."""
    right = publishing.export

    def wrong(*args: Any, **options: Any) -> Any:
        made = right(*args, **options)
        spoiled(made.graph)
        return made

    monkeypatch.setattr(publishing, "export", wrong)


def shift_bias(model: Any) -> None:
    value = model.graph.initializers["0.bias"]
    shifted = value.const_value.numpy() + np.float32(1e-3)
    value.const_value = ir.tensor(shifted, name=value.name)


def wrong_node(model: Any) -> None:
    node = next(node for node in model.graph if node.op_type == "Relu")
    node.op_type = "Sigmoid"


@pytest.mark.parametrize("fault", [shift_bias, wrong_node])
def test_a_wrong_node_or_weight_fails_the_check_and_nothing_is_written(
    fault, tmp_path, monkeypatch
):
    spoil(monkeypatch, fault)
    result = export(net(), IMAGE, tmp_path / "net.onnx")
    assert not result.report
    assert result.report.path is None
    assert "NOT equivalent" in result.report.summary()
    assert result.to_dict()["equivalent"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_onnx_refuses_is_an_error(tmp_path, monkeypatch):
    def unknown(model: Any) -> None:
        next(iter(model.graph)).op_type = "Convolve"

    spoil(monkeypatch, unknown)
    with pytest.raises(ExportError, match=r"a file that ONNX refuses \(.*Convolve"):
        export(net(), IMAGE, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["_opened", "publish", "export"])
def test_an_interrupt_leaves_the_old_file_and_the_model_as_they_were(where, tmp_path, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, path = net(), tmp_path / "net.onnx"
    path.write_text("old")
    before = state(model)
    monkeypatch.setattr(publishing, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(model, IMAGE, path, force=True)
    assert_same(before, state(model))
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


def test_an_existing_file_and_a_missing_folder_are_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "observe", None)
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(SaveError, match="it exists"):
        export(net(), IMAGE, tmp_path / "net.onnx")
    (tmp_path / "other.onnx.data").write_text("old")
    with pytest.raises(SaveError, match=r"other\.onnx\.data: it exists"):
        export(net(), IMAGE, tmp_path / "other.onnx")
    with pytest.raises(SaveError, match="there is no folder"):
        export(net(), IMAGE, tmp_path / "nowhere" / "net.onnx")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA may work here"
)
def test_a_missing_device_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "observe", None)
    with pytest.raises(RuntimeUnavailableError, match=r"on CUDA: onnxruntime .* for the CPU"):
        export(net(), IMAGE, tmp_path / "net.onnx", provider="cuda")
    with pytest.raises(bntools.BNToolsError, match="'tpu'"):
        export(net(), IMAGE, tmp_path / "net.onnx", provider="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("tf32", [False, True])
def test_a_model_on_a_gpu_is_exported_and_verified_there(dtype, tf32, tmp_path):
    options = bntools.ExportOptions(allow_tf32=tf32)
    model, images = net().cuda(), IMAGE.cuda()
    result = export(
        model, images, tmp_path / "net.onnx", provider="cuda", dtype=dtype, options=options
    )
    assert result.report, result.report
    assert result.report.placement.provider == "cuda"
    assert result.report.placement.tf32 is tf32
    assert next(model.parameters()).is_cuda


def training(model: nn.Sequential) -> nn.Sequential:
    return model.train()


def training_below(model: nn.Sequential) -> nn.Sequential:
    model[4].train()
    return model


def without_statistics(model: nn.Sequential) -> nn.Sequential:
    model[4] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    return model


class Functional(nn.Module):
    """A norm that is no module, in training mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.batch_norm(self.conv(x), None, None, training=True)


def functional(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(model[0], nn.Conv2d(6, 3, 1), Functional()).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (training, r"in training mode.*Call model\.eval\(\) first"),
        (training_below, r"4 stays in training mode.*Call model\.eval\(\) first"),
        (without_statistics, r"4 has no running statistics.*Give it statistics, or replace it"),
        (functional, r"2 normalises with the statistics of each batch.*training=False"),
    ],
)
@pytest.mark.parametrize("fold", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_norms_that_use_batch_statistics_are_refused_with_the_cure(change, message, fold, tmp_path):
    model = change(net())
    before = state(model)
    with pytest.raises(ExportError, match=message):
        export(model, IMAGE, tmp_path / "net.onnx", fold=fold)
    assert_same(before, state(model))
    assert list(tmp_path.iterdir()) == []


class Standardised(nn.Conv2d):
    """Normalises its own weight by a batch norm in training mode: the same for every input."""

    def forward(self, x):
        weight = nn.functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        )
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def test_a_standardised_weight_is_no_norm_of_the_batch(tmp_path):
    model = nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    report = export(model, IMAGE, tmp_path / "net.onnx").report
    assert report
    assert report.operators == {"Conv": 2}


def test_a_random_model_is_refused(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, training=True)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Noisy()).eval()
    with pytest.raises(NondeterministicError, match="draws random numbers"):
        export(model, IMAGE, tmp_path / "net.onnx")


def test_a_model_that_gives_nan_is_not_written(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model[0].weight.data[0] = torch.nan
    report = export(model, IMAGE, tmp_path / "net.onnx").report
    assert "the reference itself gives NaN" in report.summary()
    assert list(tmp_path.iterdir()) == []


# Batch sizes


class BySize(nn.Module):
    """Not the same computation for every batch size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y * 2 if x.shape[0] == 2 else y * 3


class OneSize(BySize):
    """Runs at the batch size 2 alone."""

    def forward(self, x):
        return self.conv(x).reshape(2, 4, 36)


class Mates(BySize):
    """Each output depends on the whole batch."""

    def forward(self, x):
        y = self.conv(x)
        return y - y.mean(0, keepdim=True)


class Squeezed(BySize):
    """At batch size 1 the output has one dimension less, in PyTorch."""

    def forward(self, x):
        return self.conv(x).mean((2, 3)).squeeze()


@pytest.mark.parametrize(
    ("model", "why"),
    [(BySize, r"does not give the same on 1x3x8x8"), (OneSize, "runs at no other")],
)
def test_a_model_that_fixes_its_batch_size_is_exported_with_that_one_or_refused(
    model, why, tmp_path
):
    made = model().eval()
    report = export(made, IMAGE, tmp_path / "net.onnx").report
    assert report
    assert not report.dynamic_batch
    assert report.inputs == ("x: 2x3x8x8 float32",)
    assert any(why in note.replace("\\", "") for note in report.notes)
    options = bntools.ExportOptions(require_dynamic=True)
    with pytest.raises(ExportError, match=rf"with a free batch size: .*{why}.*--static-batch"):
        export(made, IMAGE, tmp_path / "other.onnx", options=options)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_outputs_of_another_rank_or_that_depend_on_the_batch_are_right_at_every_size(
    size, tmp_path
):
    for model in (Mates(), Squeezed()):
        path = tmp_path / f"{type(model).__name__}.onnx"
        report = export(model.eval(), IMAGE[:size], path).report
        assert report.dynamic_batch
        for n in (1, 4):
            image = torch.rand(n, 3, 8, 8)
            want = model(image).detach().numpy()
            (given,) = ran(path, image)
            assert given.shape == want.shape
            assert np.allclose(given, want, atol=1e-5)


def test_a_static_export_has_the_size_of_its_examples_and_one_when_inferred(tmp_path):
    report = export(net(), IMAGE, tmp_path / "a.onnx", dynamic_batch=False).report
    assert report.inputs == ("input: 2x3x8x8 float32",)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = export(model, None, tmp_path / "b.onnx", dynamic_batch=False).report
    assert report.inputs == ("input: 1x3x64x64 float32",)
    assert report.example.endswith("(inferred)")


# Dtypes


def mixed(dtype: torch.dtype) -> nn.Module:
    """A half model whose norms are float32."""
    model = net().to(dtype)
    model[1].float()
    model[4].float()
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fold", [True, False])
def test_half_models_with_float32_norms_load_and_compute_the_same(dtype, fold, tmp_path):
    model = mixed(dtype)
    before = state(model)
    report = export(model, IMAGE.to(dtype), tmp_path / "net.onnx", fold=fold).report
    assert_same(before, state(model))
    assert report, report
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert ("BatchNormalization" in report.operators) is not fold
    assert report.inputs == (f"input: batchx3x8x8 {report.dtype}",)


SOURCES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUICK = {(torch.float32, "float16"), (torch.float16, "float32"), (torch.float64, "bfloat16")}


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        pytest.param(s, d, marks=() if (s, d) in QUICK else pytest.mark.slow)
        for s in SOURCES
        for d in ("float16", "bfloat16", "float32")
    ],
)
def test_every_dtype_becomes_every_other_with_a_limit_that_follows(source, dtype, tmp_path):
    model = mixed(source) if source.itemsize == 2 else net().to(source)
    report = export(model, IMAGE.to(source), tmp_path / "net.onnx", dtype=dtype).report
    assert report, report
    assert report.outputs == (f"output: batchx5 {dtype}",)
    limit = report.worst.worst.limit
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert 8 * eps <= limit < 100 * eps
    assert len(report.fold.folds) == 2


def test_bfloat16_is_stored_and_float32_is_computed(tmp_path):
    report = export(net(), IMAGE, tmp_path / "net.onnx", dtype=torch.bfloat16).report
    graph = onnx.load(tmp_path / "net.onnx").graph
    floats = {each.data_type for each in graph.initializer if each.dims and each.data_type != 7}
    assert floats == {onnx.TensorProto.BFLOAT16}
    assert any("stored in bfloat16 and computed with in float32" in n for n in report.notes)


def test_a_model_that_overflows_in_the_dtype_is_refused(tmp_path):
    model = net()
    model[0].weight.data.mul_(1e6)
    with pytest.raises(ExportError, match=r"Cannot use float16: the model itself overflows"):
        export(model, IMAGE, tmp_path / "net.onnx", dtype="float16")
    assert export(model, IMAGE, tmp_path / "net.onnx", dtype="bfloat16").report


def test_a_dtype_that_is_not_offered_is_refused(tmp_path):
    with pytest.raises(ExportError, match="choose one of float32, float16, bfloat16"):
        export(net(), IMAGE, tmp_path / "net.onnx", dtype="int8")


def test_a_double_model_that_onnx_runtime_cannot_run_is_an_error_with_a_cure(tmp_path):
    with pytest.raises(bntools.BNToolsError, match=r"Conv.*dtype"):
        export(net().double(), IMAGE.double(), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


# Inputs and outputs


class Many(nn.Module):
    """Several inputs, nested, with a flag; nested outputs of several dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(5, 4)

    def forward(self, image, parts, index, scale=2.0, flag=True):
        y = self.bn(self.conv(image)).mean((2, 3))
        z = self.linear(parts["a"]) + parts["b"][0] * scale
        picked = y.gather(1, index[:, None])
        return {
            "sum": [y + z, {"deep": z}],
            "image": image,
            "same": z,
            "class": y.argmax(1),
            "picked": picked if flag else None,
            "count": 3,
            7: y > 0,
        }


PARTS = {"a": IMAGE[:, 0, 0, :5].clone(), "b": [IMAGE[:, 0, 1, :4].clone()]}
INDEX = torch.tensor([1, 3])


@pytest.mark.parametrize(
    "inputs",
    [
        (IMAGE, PARTS, INDEX),
        Examples((IMAGE, PARTS), {"scale": 3.0, "index": INDEX}),
        {"flag": True, "index": INDEX, "parts": PARTS, "image": IMAGE},
    ],
    ids=["positional", "mixed", "keywords in another order"],
)
def test_nested_inputs_and_outputs_of_every_kind_are_compared(inputs, tmp_path):
    model = Many().eval()
    randomise(model)
    model.eval()
    report = export(model, inputs, tmp_path / "net.onnx").report
    assert report, report
    assert report.dynamic_batch
    assert {each.partition(":")[0] for each in report.inputs} == {
        "image", "parts_a", "parts_b_0", "index"
    }  # fmt: skip
    assert [each.partition(":")[0] for each in report.outputs] == [
        "sum_0", "sum_1_deep", "output_image", "same", "class", "picked", "output_7"
    ]  # fmt: skip
    assert {o.name for o in report.checks[0].outputs} >= {"output.sum[1].deep", "output[7]"}


def test_outputs_that_are_constants_inputs_or_repeated_are_outputs_of_their_own(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("anchors", torch.arange(3.0))

        def forward(self, x):
            y = self.conv(x)
            return y, y, x, self.anchors, torch.ones(2)

    report = export(Plain().eval(), IMAGE, tmp_path / "net.onnx").report
    assert report, report
    assert report.inputs == ("x: batchx3x8x8 float32",)
    given = ran(tmp_path / "net.onnx", IMAGE)
    assert [list(each.shape) for each in given] == [
        [2, 4, 6, 6], [2, 4, 6, 6], [2, 3, 8, 8], [3], [2]
    ]  # fmt: skip


def test_objects_are_flattened_by_their_attributes(tmp_path):
    class Answer:
        def __init__(self, logits):
            self.logits = logits
            self.seconds = 3

    class Objects(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return Answer(self.conv(x))

    report = export(Objects().eval(), IMAGE, tmp_path / "net.onnx").report
    assert report.outputs == ("logits: batchx4x6x6 float32",)


# What cannot be exported


class Svd(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Reads(nn.Module):
    def forward(self, x):
        return x * (1 if max(x.flatten().tolist()) > 0.5 else 2)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1)))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Svd, r"there is no ONNX form of aten\._linalg_svd, which 1 \(Svd\) calls"),
        (Decides, r"1 \(Decides\) \(test_export\.py, line \d+: return x if x\.sum\(\) > 0.*\)"),
        (Reads, r"1 \(Reads\) \(test_export\.py, line \d+: .*decides by the numbers"),
        (Scripted, r"1\.inner \(\w+\) is TorchScript"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_module(part, message, tmp_path, capfd):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), part()).eval()
    before = state(model)
    with pytest.raises(ExportError, match=message) as raised:
        export(model, IMAGE, tmp_path / "net.onnx", fold=False)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert_same(before, state(model))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_convs_without_a_bias_get_none(tmp_path):
    """Torch's exporter gives a bias-free Conv3d zeros of a shape that ONNX Runtime refuses."""
    model = nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4), nn.ReLU()).eval()
    file = tmp_path / "net.onnx"
    assert export(model, torch.rand(2, 2, 4, 6, 6), file, fold=False).report
    convs = [node for node in onnx.load(file).graph.node if node.op_type == "Conv"]
    assert [len(node.input) for node in convs] == [2]


def test_exporters_say_nothing_and_leave_logging_as_it_was(tmp_path, capfd):
    logging.disable(logging.NOTSET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export(net(), IMAGE, tmp_path / "net.onnx", opset=17).report
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_what_exporters_say_is_there_for_whoever_wants_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("bntools.export"), "level", logging.DEBUG)
    logging.getLogger("bntools.export").manager._clear_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert export(net(), IMAGE, tmp_path / "net.onnx", opset=17).report
    said = capfd.readouterr()
    assert said.out == ""
    logging.getLogger("bntools.export").manager._clear_cache()


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=pytest.mark.slow)])
def test_the_opset_is_the_one_that_was_asked_for(opset, tmp_path):
    report = export(net(), IMAGE, tmp_path / "net.onnx", opset=opset).report
    assert report.opset == opset
    assert {o.domain: o.version for o in onnx.load(tmp_path / "net.onnx").opset_import} == {
        "": opset
    }


@pytest.mark.parametrize("opset", [5, 99])
def test_an_opset_that_cannot_be_had_is_refused(opset, tmp_path):
    with pytest.raises(ExportError, match=f"opset {opset}: torch's exporter writes 17 to"):
        export(net(), IMAGE, tmp_path / "net.onnx", opset=opset)


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="Cannot run the model on 2x1x8x8"):
        export(net(), IMAGE[:, :1], tmp_path / "net.onnx")


# Large models


@pytest.fixture
def always_large(monkeypatch):
    monkeypatch.setattr(artifacts, "LARGEST", 1000)


def test_large_weights_go_to_a_second_file_that_moves_with_the_first(always_large, tmp_path):
    model, path = net(), tmp_path / "net.onnx"
    report = export(model, IMAGE, path).report
    assert report
    assert report.data == str(tmp_path / "net.onnx.data")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == pytest.approx(sum(e.stat().st_size for e in tmp_path.iterdir()), rel=0.5)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in ("net.onnx", "net.onnx.data"):
        shutil.move(tmp_path / file, moved / file)
    (given,) = ran(moved / "net.onnx", IMAGE)
    assert np.allclose(given, model(IMAGE).detach().numpy(), atol=1e-5)
    assert properties(moved / "net.onnx")["bntools_version"]


def test_a_replaced_pair_is_never_mixed_with_the_old_one(always_large, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    export(net(), IMAGE, path)
    old = [path.read_bytes(), (tmp_path / "net.onnx.data").read_bytes()]

    def fail(*_: Any, **__: Any) -> None:
        raise SaveError("Cannot write: the disk is full.")

    other = net(8)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_atomically", fail)
        with pytest.raises(SaveError, match="disk is full"):
            export(other, IMAGE, path, force=True)
    assert [path.read_bytes(), (tmp_path / "net.onnx.data").read_bytes()] == old
    assert len(list(tmp_path.iterdir())) == 2

    report = export(other, IMAGE, path, force=True).report
    assert sorted(each.name for each in tmp_path.iterdir()) == ["net.onnx", "net.onnx.2.data"]
    assert report.data == str(tmp_path / "net.onnx.2.data")
    (given,) = ran(path, IMAGE)
    assert np.allclose(given, other(IMAGE).detach().numpy(), atol=1e-5)


def test_a_failed_check_of_a_large_model_leaves_nothing(always_large, tmp_path, monkeypatch):
    spoil(monkeypatch, shift_bias)
    assert not export(net(), IMAGE, tmp_path / "net.onnx").report
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes_is_exported(tmp_path):
    """Its weights do not fit in one protobuf message."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 24000), nn.Linear(24000, 24000), nn.Linear(24000, 8))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1e-2, 1e-2)
    assert sum(p.nbytes for p in model.parameters()) > 2**31
    report = export(model, torch.rand(2, 64), tmp_path / "wide.onnx", fold=False).report
    assert report, report
    assert report.data == str(tmp_path / "wide.onnx.data")
    assert (tmp_path / "wide.onnx").stat().st_size < 2**20


MODELS = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0", "densenet121"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_torchvision_models_are_exported_and_compute_the_same(name, dtype, tmp_path):
    """With random statistics, at a size that their strides divide."""
    model = getattr(torchvision.models, name)(weights=None)
    randomise(model)
    settle(model.eval(), torch.rand(16, 3, 64, 64))
    report = export(model, torch.rand(2, 3, 64, 64), tmp_path / "m.onnx", dtype=dtype).report
    assert report, report
    assert report.dynamic_batch
    assert "Expand" not in report.operators


# Cleaning


def test_an_output_name_never_clashes_with_another_value():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    inner = ir.node("Relu", [x], name="first")
    inner.outputs[0].name = "out"
    last = ir.node("Neg", [inner.outputs[0]], name="second")
    last.outputs[0].name = "last"
    graph = ir.Graph([x], last.outputs, nodes=[inner, last], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=10)
    clean(model)
    name_ends(model, ["output.out"], batch=None)
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == 2
    assert model.graph.outputs[0].name == "out"
    assert model.graph.inputs[0].name == "x"
