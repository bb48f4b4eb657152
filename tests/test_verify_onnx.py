"""`verify` across runtimes: PyTorch and ONNX Runtime, in either order, on many batches."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_models import BFLOAT16, FLOAT, HALF, INT64, linear, node, onnx_model
from randomise import randomise
from torch import Tensor, nn

import bntools
from bntools.errors import (
    BNToolsError,
    InputError,
    LoadError,
    NondeterministicError,
    RuntimeUnavailableError,
)
from bntools.runtimes import devices
from bntools.runtimes.precision import TF32_EPS
from bntools.runtimes.sessions import open_session
from bntools.runtimes.widening import DoubleModel

X = torch.linspace(-1, 1, 12).reshape(3, 4)
EPS = torch.finfo(torch.float32).eps


class Twin(nn.Module):
    """What `onnx_models.linear` is, in PyTorch."""

    def __init__(self, give=lambda y: y) -> None:
        super().__init__()
        weights = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in WEIGHTS}
        self.linear = nn.Linear(4, 6)
        self.linear.weight.data, self.linear.bias.data = weights["w"].T.contiguous(), weights["b"]
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.linear(x).relu())


WEIGHTS = linear().graph.initializer


def written(folder: Path, model: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return written(tmp_path, linear())


@pytest.fixture(scope="module")
def conv() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    randomise(model, 3)
    return model


# Any pair, in either order


def test_every_pair_of_runtimes_is_judged(file):
    for reference in (Twin(), file, str(file)):
        for candidate in (Twin(), file):
            result = bntools.verify(reference, candidate, X)
            assert result, str(result)
            assert result.truth == "float64"
            assert result.placement.provider == "cpu"


def test_wrong_candidate_is_caught_in_either_order(tmp_path, file):
    wrong = written(tmp_path, linear(bias=1e-4), "wrong.onnx")
    for reference, candidate in ((Twin(), wrong), (wrong, Twin()), (file, wrong), (wrong, file)):
        assert not bntools.verify(reference, candidate, X)


def test_placement_says_where_the_candidate_ran(file):
    placement = bntools.verify(Twin(), file, X).placement
    assert placement.runtime == "ONNX Runtime"
    assert sum(placement.nodes.values()) > 0
    assert bntools.verify(file, Twin(), X).placement.runtime == "PyTorch"


def test_truth_of_an_onnx_file_is_the_graph_in_float64(file):
    result = bntools.verify(file, Twin(), X)
    assert result.truth == "float64"
    assert 0 < result.worst.reference_error < 4 * EPS
    assert any("onnx's evaluator" in note for note in result.notes)
    double = Twin().double()
    exact = DoubleModel(linear()).run({"x": X})["y"]
    assert torch.allclose(exact, double(X.double()), rtol=1e-15, atol=1e-15)


def test_file_that_the_evaluator_cannot_run_is_judged_by_fixed_limits(tmp_path, monkeypatch):
    def fails(_):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr("bntools.subjects.DoubleModel", fails)
    path = written(tmp_path, linear())
    result = bntools.verify(path, Twin(), X)
    assert result
    assert result.truth == "float32"
    assert "no such operation" in "".join(result.notes)
    assert result.worst.limit == pytest.approx(80 * EPS)
    assert not bntools.verify(path, written(tmp_path, linear(bias=1e-3), "wrong.onnx"), X)


# Inputs


def test_without_inputs_several_batches_of_odd_sizes_are_drawn(file):
    for pair in ((Twin(), file), (file, Twin()), (file, file), (Twin(), Twin())):
        result = bntools.verify(*pair)
        assert result
        assert result.batches == 3
        assert "batches of 3 and 1" in result.inputs
        assert result.inputs.endswith("(inferred)")


def test_other_seeds_draw_other_inputs(file):
    errors = {bntools.verify(Twin(), file, seed=seed).worst.max_abs for seed in range(4)}
    assert len(errors) > 1


def test_batch_that_the_file_fixes_is_kept(tmp_path):
    model = linear()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    path = written(tmp_path, model)
    for pair in ((Twin(), path), (path, Twin())):
        result = bntools.verify(*pair)
        assert result
        assert (result.batches, result.inputs) == (1, "x=5x4 float32 (inferred)")
    with pytest.raises(InputError, match=r"it takes x: 5x4 float32\. Give such inputs, or export"):
        bntools.verify(Twin(), path, X)


def test_candidate_that_is_wrong_at_another_batch_size_is_caught(tmp_path):
    """A graph in which the size of the batch that was exported is baked in."""
    model = onnx_model(
        [node("Reshape", "x s", "r"), node("ReduceMean", "r axes", "m", keepdims=0),
         node("Shape", "x", "n", end=1), node("ConstantOfShape", "n", "z"),
         node("Add", "z m", "y")],
        [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n"])],
        {"s": np.array([1, -1]), "axes": np.array([0, 1])},
    )  # fmt: skip
    reference = Twin(lambda y: y)
    reference.forward = lambda x: x[:1].mean() + 0 * x[:, 0]
    path = written(tmp_path, model)
    assert bntools.verify(reference, path, X[:1])
    assert not bntools.verify(reference, path)


@pytest.mark.parametrize("kind", ["tuple", "dict", "other names"])
def test_inputs_go_by_name_or_by_order(file, kind):
    inputs = {"tuple": (X,), "dict": {"x": X}, "other names": {"features": X}}[kind]
    if kind == "other names":
        twin = Twin()
        twin.forward = lambda features: twin.linear(features).relu()
        assert bntools.verify(twin, file, inputs)
        assert bntools.verify(twin, file, {"x": X})
        with pytest.raises(InputError, match="lacks x and there is no features"):
            bntools.verify(file, file, inputs)
        return
    for pair in ((Twin(), file), (file, Twin()), (file, file)):
        assert bntools.verify(*pair, inputs)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((X, X), "2 tensors, and its inputs are x: nx4 float32"),
        (X[:, :3], r"shape \(3, 3\), and it takes x: nx4 float32"),
        (X.long(), "x is int64, and it takes x: nx4 float32"),
        ({"z": X}, "it lacks x and there is no z"),
        ({"x": 3}, "x is no tensor"),
    ],
    ids=["count", "shape", "dtype", "name", "number"],
)
def test_wrong_inputs_are_an_error_that_says_what_is_expected(file, inputs, says):
    with pytest.raises(InputError, match=says):
        bntools.verify(file, file, inputs)


def test_floats_are_cast_to_what_the_file_takes(file):
    assert bntools.verify(file, Twin(), X.double())
    assert bntools.verify(Twin().double(), file, X)


def test_batches_of_a_loader_are_all_compared(file):
    data = torch.utils.data.TensorDataset(torch.randn(7, 4), torch.zeros(7))
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    for pair in ((Twin(), file), (file, Twin())):
        result = bntools.verify(*pair, loader)
        assert result
        assert result.batches == 3
    assert bntools.verify(Twin(), file, iter([X, X[:1]])).batches == 2


def test_data_that_was_read_is_compared(tmp_path, file):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((5, 4), np.float32))
    data = bntools.read_data(tmp_path / "x.npy", batch_size=2)
    result = bntools.verify(Twin(), file, data)
    assert result
    assert result.batches == 3
    assert "x.npy" in result.inputs


def test_labels_of_a_batch_are_left_out_even_where_a_second_input_is_optional():
    class Masked(Twin):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    batches = [(X, torch.zeros(3)), (X[:2], torch.ones(2))]
    result = bntools.verify(Masked(), Twin(), iter(batches))
    assert result
    assert result.batches == 2


def test_no_batch_at_all_is_an_error(file):
    with pytest.raises(InputError, match="no batch"):
        bntools.verify(Twin(), file, iter([]))


def test_several_inputs_of_several_dtypes_are_drawn(tmp_path):
    model = onnx_model(
        [node("Gather", "table ids", "e"), node("MatMul", "e x", "y")],
        [("ids", INT64, ["n", 3]), ("x", FLOAT, ["n", 4, "t"])],
        [("y", FLOAT, ["n", 3, "t"])],
        {"table": np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)},
    )
    path = written(tmp_path, model)
    result = bntools.verify(path, path)
    assert result
    assert result.inputs.startswith("ids=2x3 int64, x=2x4x64 float32")


# Outputs


def two_outputs() -> onnx.ModelProto:
    model = linear()
    model.graph.node.append(node("ArgMax", "y", "best", axis=1, keepdims=0))
    best = onnx.helper.make_tensor_value_info("best", INT64, ["n"])
    model.graph.output.append(best)
    return model


def test_outputs_pair_by_their_order_and_texts_do_not_count(tmp_path):
    path = written(tmp_path, two_outputs())
    for give in (
        lambda y: {"scores": y, "note": "a text", "classes": y.argmax(1)},
        lambda y: (y, y.argmax(1)),
        lambda y: [{"inner": (y, None)}, 3, y.argmax(1)],
    ):
        assert bntools.verify(Twin(give), path, X)
        assert bntools.verify(path, Twin(give), X)
    result = bntools.verify(Twin(lambda y: {"s": y, "t": "x", "c": y.argmax(1)}), path, X)
    assert [o.name for o in result.outputs] == ["output.s", "output.c"]


@pytest.mark.parametrize(
    "give",
    [lambda y: y, lambda y: (y, y.argmax(1), y), lambda y: (y.argmax(1), y), lambda y: (y, y)],
    ids=["fewer", "more", "other order", "other kind"],
)
def test_outputs_of_another_number_or_order_are_not_equal(tmp_path, give):
    path = written(tmp_path, two_outputs())
    assert not bntools.verify(Twin(give), path, X)
    assert not bntools.verify(path, Twin(give), X)


# Precision


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_candidate_is_cast_and_judged_by_that_precision(conv, name):
    images = torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(conv.state_dict())
    result = bntools.verify(conv, copy.deepcopy(conv), images, dtype=name)
    eps = torch.finfo(getattr(torch, name)).eps
    assert result
    assert result.worst.limit >= 8 * eps
    assert result.worst.error > 100 * EPS
    assert result.worst.reference_error > 100 * EPS, "the reference's error in that precision"
    wrong = copy.deepcopy(conv)
    wrong[5].bias.data[3] += 1.0
    assert not bntools.verify(conv, wrong, images, dtype=name)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), conv.state_dict().values(), strict=True)
    )


def test_dtype_that_there_is_not_is_an_error(file):
    with pytest.raises(InputError, match="float16, bfloat16, float32, float64"):
        bntools.verify(Twin(), Twin(), X, dtype="float8")
    with pytest.raises(InputError, match="torch and onnxruntime"):
        bntools.verify(Twin(), Twin(), X, runtime="tensorrt")
    with pytest.raises(InputError, match="cpu, cuda, auto"):
        bntools.verify(Twin(), Twin(), X, provider="tpu")
    with pytest.raises(InputError, match="it is an ONNX model"):
        bntools.verify(Twin(), file, X, runtime="torch")


@pytest.mark.parametrize(("kind", "dtype"), [(HALF, "float16"), (BFLOAT16, "bfloat16")])
def test_file_in_half_precision_is_judged_by_it(tmp_path, kind, dtype):
    scale = onnx.helper.make_tensor("s", kind, [4], [1.5, 0.75, -2.0, 1.1])
    model = onnx_model(
        [node("Mul", "x s", "y")] if kind == HALF else [
            node("Cast", "x", "f", to=FLOAT), node("Cast", "s", "g", to=FLOAT),
            node("Mul", "f g", "h"), node("Cast", "h", "y", to=kind)],
        [("x", kind, ["n", 4])], [("y", kind, ["n", 4])],
    )  # fmt: skip
    model.graph.initializer.append(scale)
    path = written(tmp_path, model)
    twin = Twin()
    twin.forward = lambda x: x * torch.tensor([1.5, 0.75, -2.0, 1.1]).to(x)
    for result in (bntools.verify(twin, path, X), bntools.verify(path, path, X)):
        assert result
        assert result.worst.limit >= 8 * torch.finfo(getattr(torch, dtype)).eps


def test_candidate_is_exported_for_onnx_runtime(conv):
    folded = bntools.fold(conv).model
    folded[0].bias.data[3] += 1e-3
    result = bntools.verify(conv, folded, runtime="onnxruntime")
    assert not result
    assert result.placement.runtime == "ONNX Runtime"
    assert result.batches == 3


def test_exported_candidate_runs_on_batches_of_a_loader(conv):
    loader = [torch.randn(n, 3, 8, 8) for n in (2, 5)]
    assert bntools.verify(conv, conv, iter(loader), runtime="onnxruntime").batches == 2


def test_file_that_is_judged_more_coarsely_than_it_is_says_so(file):
    result = bntools.verify(Twin(), file, X, dtype="float16")
    assert result
    assert any("judged in float16 as asked" in note for note in result.notes)


# Devices


def test_cuda_that_cannot_be_had_is_an_error_for_either_runtime(monkeypatch, file):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="Cannot run PyTorch on CUDA"):
        bntools.verify(Twin(), Twin(), X, provider="cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeUnavailableError, match="built without CUDA"):
        bntools.verify(file, Twin(), X, provider="cuda")


def test_auto_says_what_it_picked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bntools.verify(Twin(), Twin(), X, provider="auto")
    assert result
    assert result.placement.provider == "cpu"
    assert "picked because" in str(result.placement)


def test_tf32_widens_the_limit_only_where_it_is_on(monkeypatch):
    result = bntools.verify(Twin(), Twin(), X, allow_tf32=True)
    assert result.worst.limit < 100 * EPS
    on = devices.torch_placement(torch.device("cpu"))
    monkeypatch.setattr(
        "bntools.subjects.torch_placement",
        lambda *_, **__: type(on)("PyTorch", "cuda", "a GPU", tf32=True),
    )
    result = bntools.verify(Twin(), Twin(), X, allow_tf32=True)
    assert result
    assert result.worst.limit >= 8 * TF32_EPS
    assert "times its rounding" in result.worst.why or "roundings of 0.00098" in result.worst.why


# One reference, many candidates


def test_truth_is_found_once_for_all_candidates(conv, monkeypatch):
    from bntools import subjects

    calls = []
    find = subjects.find_truth
    monkeypatch.setattr(subjects, "find_truth", lambda *a, **k: (calls.append(1), find(*a, **k))[1])
    reference = bntools.Reference(conv, torch.randn(4, 3, 8, 8))
    wrong = copy.deepcopy(conv)
    wrong[1].eps = 1e-3
    verdicts = [bool(reference.judge(each)) for each in (conv, copy.deepcopy(conv), wrong, conv)]
    assert verdicts == [True, True, False, True]
    assert len(calls) == 1
    assert reference.judge(conv, dtype="float16")
    assert len(calls) == 1


def test_reference_judges_candidates_of_every_runtime(file):
    reference = bntools.Reference(Twin())
    assert reference.judge(file)
    assert reference.judge(Twin())
    assert reference.judge(Twin(), dtype="bfloat16")


# What cannot be judged


def test_random_nodes_are_named(tmp_path):
    model = onnx_model(
        [node("RandomNormalLike", "x", "r", name="noise"), node("Add", "x r", "y")],
        [("x", FLOAT, ["n", 4])],
        [("y", FLOAT, ["n", 4])],
    )
    path = written(tmp_path, model)
    for pair in ((path, Twin()), (path, path)):
        with pytest.raises(NondeterministicError, match=r"noise \(RandomNormalLike\)"):
            bntools.verify(*pair, X)
    twin = Twin()
    twin.forward = lambda x: x
    with pytest.raises(NondeterministicError, match="the candidate on the same input differ"):
        bntools.verify(twin, path, X)


def test_dropout_in_training_mode_is_named(tmp_path):
    model = onnx_model(
        [node("Dropout", "x ratio on", "y", name="drop")],
        [("x", FLOAT, ["n", 4])],
        [("y", FLOAT, ["n", 4])],
        {"ratio": np.array(0.5, np.float32), "on": np.array(True)},
    )
    with pytest.raises(NondeterministicError, match=r"drop \(Dropout in training mode\)"):
        bntools.verify(written(tmp_path, model), Twin(), X)


def test_damaged_and_missing_files_are_load_errors(tmp_path, file):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    for bad in (broken, tmp_path / "nothing.onnx", tmp_path / "nothing.pt"):
        for pair in ((bad, file), (file, bad)):
            with pytest.raises(LoadError, match=bad.name) as caught:
                bntools.verify(*pair, X)
            assert "\n" not in str(caught.value)


def test_input_that_cannot_be_inferred_is_an_error_with_the_cure(file):
    unknown = Twin()
    unknown.forward = lambda x, y: x
    with pytest.raises(InputError, match="--input-shape"):
        bntools.verify(nn.Identity(), nn.Identity())
    with pytest.raises(BNToolsError, match="Cannot infer an input"):
        bntools.verify(unknown, file)


# The float64 evaluator


def ends(shape, out=None):
    return [("x", FLOAT, shape)], [("y", FLOAT, out or ["a", "b", "c", "d"][: len(shape)])]


def weights_of(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


KERNELS = {
    "conv": (node("Conv", "x w b", "y", pads=[1, 0, 2, 1], strides=[2, 1]), (6, 4, 3, 3), 6),
    "grouped": (node("Conv", "x w b", "y", group=2, dilations=[2, 2]), (6, 2, 3, 3), 6),
    "same upper": (node("Conv", "x w b", "y", auto_pad="SAME_UPPER", strides=[2, 2]),
                   (6, 4, 2, 2), 6),
    "same lower": (node("Conv", "x w b", "y", auto_pad="SAME_LOWER", strides=[2, 2]),
                   (6, 4, 2, 2), 6),
    "valid": (node("Conv", "x w b", "y", auto_pad="VALID"), (6, 4, 3, 2), 6),
    "transposed": (node("ConvTranspose", "x w b", "y", strides=[2, 2], pads=[1, 1, 0, 1],
                        output_padding=[1, 0]), (4, 6, 3, 3), 6),
    "transposed grouped": (node("ConvTranspose", "x w b", "y", group=2, dilations=[2, 1]),
                           (4, 3, 3, 3), 6),
    "max pool": (node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 2],
                      pads=[1, 0, 1, 1]),),
    "max pool up": (node("MaxPool", "x", "y", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),),
    "dilated pool": (node("MaxPool", "x", "y", kernel_shape=[2, 2], dilations=[2, 2]),),
    "mean pool": (node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),),
    "counted": (node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                     count_include_pad=1),),
    "mean pool up": (node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2],
                          ceil_mode=1),),
    "counted up": (node("AveragePool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
                        pads=[0, 1, 0, 1], count_include_pad=1),),
    "batch norm": (node("BatchNormalization", "x one b m v", "y", epsilon=1e-3),),
    "softmax": (node("Softmax", "x", "y", axis=1),),
}  # fmt: skip


def kernel_model(name: str) -> onnx.ModelProto:
    operation, *shapes = KERNELS[name]
    weights = {}
    if shapes:
        weights = {"w": weights_of(*shapes[0]), "b": weights_of(shapes[1])}
    if name == "batch norm":
        weights = {n: weights_of(4) for n in ("one", "b", "m")} | {"v": weights_of(4) ** 2 + 0.1}
    return onnx_model([operation], *ends([2, 4, 9, 7]), weights, opset=19)


def agrees(model: onnx.ModelProto, x: Tensor) -> None:
    given = open_session(model.SerializeToString(), optimise=False).run({"x": x})["y"]
    exact = DoubleModel(model).run({"x": x})["y"]
    assert exact.dtype == torch.float64
    assert exact.shape == given.shape
    assert torch.allclose(given.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_evaluator_in_float64_agrees_with_onnx_runtime(name):
    agrees(
        kernel_model(name), torch.randn((2, 4, 9, 7), generator=torch.Generator().manual_seed(2))
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    "where", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
)
@pytest.mark.parametrize("size", [(18, 14), (5, 10), (1, 21)], ids=str)
def test_resizing_in_float64_agrees_with_onnx_runtime(mode, where, size):
    operation = node(
        "Resize", "x none none2 size", "y", mode=mode, coordinate_transformation_mode=where
    )
    operation.input[1] = operation.input[2] = ""
    model = onnx_model([operation], *ends([1, 2, 9, 7]), {"size": np.array([1, 2, *size])})
    agrees(model, torch.randn((1, 2, 9, 7), generator=torch.Generator().manual_seed(2)))


def test_float32_constants_and_casts_become_double():
    model = onnx_model(
        [node("Constant", "", "c", value_float=0.1), node("Cast", "x", "h", to=HALF),
         node("Cast", "h", "f", to=FLOAT), node("Mul", "f c", "p"), node("Shape", "p", "s"),
         node("ConstantOfShape", "s", "z"), node("Add", "p z", "y")],
        [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])],
    )  # fmt: skip
    exact = DoubleModel(model).run({"x": X})["y"]
    tenth = float(np.float32(0.1))
    assert torch.allclose(exact, X.double() * tenth, rtol=1e-15, atol=0)


def test_inner_graphs_become_double():
    then = onnx.helper.make_graph(
        [node("Mul", "x half", "t")], "then", [],
        [onnx.helper.make_tensor_value_info("t", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half")],
    )  # fmt: skip
    other = onnx.helper.make_graph(
        [node("Identity", "x", "e")], "else", [],
        [onnx.helper.make_tensor_value_info("e", FLOAT, None)],
    )  # fmt: skip
    model = onnx_model(
        [node("If", "yes", "y", then_branch=then, else_branch=other)],
        [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])], {"yes": np.array(True)},
    )  # fmt: skip
    exact = DoubleModel(model).run({"x": X})["y"]
    assert torch.equal(exact, X.double() / 2)
