"""The first layer that differs: named where a fault is, and nothing named in a correct fold."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path

import onnx
import pytest
import timm
import torch
from faults import Fault, fold_of
from randomise import randomise, settle
from test_traps import changes, fingerprint
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from zoo import CASES

import bntools
from bntools.depth import compare_layers
from bntools.errors import InputError, LoadError
from bntools.report import DepthReport, LayerError


def seeded(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    """A model with statistics that show mistakes, and an input for it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    model.eval()
    randomise(model, 3)
    settle(model, x)
    return model.requires_grad_(False), x


def built(make, *shape: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return seeded(make(), *shape)


def small() -> tuple[nn.Module, Tensor]:
    """conv, norm, relu, conv, norm, relu, linear."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 5),
        )

    return built(make, 4, 3, 8, 8)


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    return bntools.fold(model, x).model


@functools.cache
def exported(name: str, *, optimised: bool = False) -> bytes:
    """The correct fold of a network, or with "unfolded " before its name the network itself."""
    fold = fold_of(name.removeprefix("unfolded "))
    model = fold.model if name.startswith("unfolded ") else fold.correct
    return in_onnx(model, fold.inputs, optimised=optimised)


def in_onnx(model: nn.Module, x: Tensor, *, optimised: bool = False) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, optimize=optimised, verbose=False)
    return bytes(program.model_proto.SerializeToString())


def shifted(model: nn.Module, path: str, channel: int = 0, by: float = 1e-3) -> nn.Module:
    """A copy in which one channel of a norm gives a thousandth of its deviation more."""
    twin = copy.deepcopy(model)
    norm = twin.get_submodule(path)
    norm.bias[channel] += by * norm.weight[channel].abs()
    return twin


def paths(report: DepthReport) -> list[str]:
    return [layer.name for layer in report.layers]


def reasons(report: DepthReport) -> dict[str, str]:
    return {each.path: each.why for each in report.skipped}


# Correct folds


def test_fold_agrees_at_every_layer_after_a_norm():
    model, x = small()
    report = compare_layers(model, folded(model, x), x)
    assert report, str(report)
    assert paths(report) == ["1", "2", "4", "5", "6", "7"]
    assert set(reasons(report)) == {"0", "3"}
    assert report.first_different is None
    assert report.last_agreeing.path == "7"
    assert report.truth == "float64"
    assert all(0 < layer.error <= layer.limit < 1e-5 for layer in report.layers)


def test_original_agrees_with_its_fold_as_the_reference():
    model, x = small()
    report = compare_layers(folded(model, x), model, x)
    assert report, str(report)
    assert paths(report) == ["1", "2", "4", "5", "6", "7"]


def test_model_agrees_with_itself_at_every_layer():
    model, x = small()
    report = compare_layers(model, copy.deepcopy(model), x)
    assert report
    assert paths(report) == [str(i) for i in range(8)]
    assert report.skipped == ()


def test_fold_of_another_tool_agrees():
    """torch.fx makes another class of module, with the same paths."""
    model, x = small()
    report = compare_layers(model, fuse(copy.deepcopy(model)), x)
    assert report, str(report)
    assert paths(report) == ["0", "2", "3", "5", "6", "7"]
    assert [row.carries for row in report.layers] == ["1", "", "4", "", "", ""]


class Between(nn.Module):
    """What lies between hosts and their norms: dropout, a view, a concat; a norm on a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout()
        self.rearrange = nn.Flatten(2)
        self.first, self.second = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.drop(self.one(x)), self.two(x)], 1)
        return self.act(self.second(self.first(self.rearrange(both))))


def test_layers_between_hosts_and_a_norm_are_not_compared_and_named():
    model, x = built(Between, 2, 3, 8, 8)
    twin = folded(model, x)
    assert isinstance(twin.first, nn.Identity)
    assert isinstance(twin.second, nn.Identity)
    report = compare_layers(model, twin, x)
    assert report, str(report)
    assert paths(report) == ["second", "act"]
    assert set(reasons(report)) >= {"one", "two", "rearrange", "first"}
    assert "folded" in reasons(report)["one"]
    broken = compare_layers(model, folded(shifted(model, "second", 5), x), x)
    assert broken.first_different.path == "second"
    assert broken.first_different.where == "channel 5"


def test_norm_with_its_own_activation_agrees_after_the_activation():
    model, x = built(lambda: timm.create_model("test_efficientnet"), 2, 3, 48, 48)
    twin = folded(model, x)
    report = compare_layers(model, twin, x)
    assert report, str(report)
    assert "bn1" in paths(report) or "bn1.act" in paths(report)
    at = "blocks.1.0.bn2"
    broken = compare_layers(model, folded(shifted(model, at, 3, by=1e-2), x), x)
    assert broken.first_different.path.startswith(at)


FOLDING = [case for case in CASES.values() if case.available]
HARD = ("vectorised_map", "inference_mode_inside", "scripted_block", "scripted_host")


def agrees(name: str) -> None:
    case = CASES[name]
    model, x = case.prepare(), case.example()
    twin = folded(model, x)
    for one, other in ((model, twin), (twin, model)):
        report = compare_layers(one, other, x)
        assert report, f"{name}: {report}"


@pytest.mark.parametrize("name", [*(case.name for case in FOLDING[::12]), *HARD])
def test_hostile_model_agrees_with_its_fold(name):
    agrees(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in FOLDING])
def test_every_hostile_model_agrees_with_its_fold(name):
    agrees(name)


# Faults are named where they are


@pytest.mark.parametrize("path", fold_of("digits").paths)
def test_shift_of_one_channel_is_named_at_its_norm(path):
    fold = fold_of("digits")
    for channel in (0, 3):
        broken = fold.faulty(Fault("shifted bias", path, channel))
        first = compare_layers(fold.model, broken, fold.inputs).first_different
        assert first.path == path
        assert first.where == f"channel {channel}"
        assert first.error > 10 * first.limit


def test_last_layer_that_agrees_is_the_one_before():
    model, x = small()
    report = compare_layers(model, folded(shifted(model, "4", 2), x), x)
    assert not report
    assert report.first_different.path == "4"
    assert report.last_agreeing.path == "2"
    assert "4" in report.summary()
    assert "2 is the last that agrees" in report.summary()


def test_fault_in_the_first_layer_has_no_layer_before():
    model, x = small()
    report = compare_layers(model, folded(shifted(model, "1"), x), x)
    assert report.last_agreeing is None
    assert "none before it" in report.summary()


def test_norm_that_was_dropped_without_a_fold_is_named():
    model, x = small()
    twin = folded(model, x)
    twin[3] = copy.deepcopy(model[3])
    assert compare_layers(model, twin, x).first_different.path == "4"


def test_norm_of_another_kind_is_named_and_its_host_still_compared():
    model, x = small()
    twin = copy.deepcopy(model)
    twin[4] = nn.GroupNorm(2, 6)
    report = compare_layers(model, twin, x)
    assert report.first_different.path == "4"
    assert report.last_agreeing.path == "3"


def test_weights_rounded_in_a_layer_without_a_norm_are_named_there():
    model, x = small()
    twin = folded(model, x)
    twin[7].weight.copy_(twin[7].weight.bfloat16())
    report = compare_layers(model, twin, x)
    assert report.first_different.path == "7"
    assert report.last_agreeing.path == "6"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_named_at_its_layer(value):
    model, x = small()
    twin = folded(model, x)
    twin[3].bias[1] = value
    report = compare_layers(model, twin, x)
    assert report.first_different.path == "4"
    assert report.first_different.error == float("inf")
    json.dumps(report.to_dict(), allow_nan=False)


def test_layer_of_another_shape_is_named():
    model, x = small()
    twin = copy.deepcopy(model)
    twin[2] = nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1))
    twin[3] = nn.Sequential(twin[3], nn.ZeroPad2d(-1))
    report = compare_layers(model, twin, x)
    assert report.first_different.path == "2"
    assert "shape" in report.first_different.note


# Calls, names


class Twice(nn.Module):
    """One activation and one conv, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv(x)))
        return self.act(self.norm2(self.conv(y)))


def test_every_call_of_a_module_is_compared():
    model, x = built(Twice, 2, 4, 6, 6)
    twin = shifted(model, "norm2", 1)
    report = compare_layers(model, twin, x)
    assert paths(report) == [
        "conv (call 1)", "norm1", "act (call 1)", "conv (call 2)", "norm2", "act (call 2)",
    ]  # fmt: skip
    assert report.first_different.path == "norm2"
    assert report.last_agreeing.name == "conv (call 2)"
    act = report.layers[-1]
    assert (act.call, act.calls, act.agrees) == (2, 2, False)


class Once(Twice):
    """The same with an activation less."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv(x)).relu()
        return self.act(self.norm2(self.conv(y)))


def test_module_that_is_called_another_number_of_times_is_not_compared():
    model, x = built(Twice, 2, 4, 6, 6)
    twin = Once().eval()
    twin.load_state_dict(model.state_dict())
    report = compare_layers(model, twin, x)
    assert report, str(report)
    assert "different number of times" in reasons(report)["act"]


def test_names_that_only_one_model_has_are_listed():
    model, x = small()
    twin = copy.deepcopy(model)
    twin[5] = nn.Sequential(nn.Threshold(0, 0), nn.Hardtanh(-1e9, 1e9))
    report = compare_layers(model, twin, x)
    assert report
    assert "only the candidate" in reasons(report)["5.0"]
    back = compare_layers(twin, model, x)
    assert back
    assert "no such layer" in reasons(back)["5.0"]


class Many(nn.Module):
    """A module that gives several tensors of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Split()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        large, small, order = self.split(x)
        return {"sum": large + small, "order": order}


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, z = self.one(x), self.two(x)
        return y, z, (y + 2 * z).argsort(1)


class OffInOne(Split):
    """The second of its tensors is wrong, and no layer inside it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second, order = super().forward(x)
        return first, second + 1e-3, order


def test_every_output_of_a_module_is_compared():
    model, x = built(Many, 3, 4)
    twin = copy.deepcopy(model)
    assert compare_layers(model, twin, x)
    twin.split.__class__ = OffInOne
    report = compare_layers(model, twin, x)
    assert report.first_different.name == "split[1]"
    assert report.last_agreeing.name == "split.two"


# Precision, dtypes, devices of the reference


class OnlyFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, _ = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.float())


def test_reference_that_does_not_run_in_float64_is_said_and_faults_are_found():
    model = OnlyFloat32().eval()
    _, x = small()
    report = compare_layers(model, folded(model, x), x)
    assert report, str(report)
    assert report.truth == "float32"
    assert "float64" in str(report)
    broken = compare_layers(model, folded(shifted(model, "inner.4", 2), x), x)
    assert broken.first_different.path == "inner.4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_candidate_in_half_precision_is_judged_by_that_precision(dtype):
    model, x = small()
    twin = folded(model, x).to(dtype)
    report = compare_layers(model, twin, x)
    assert report, str(report)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert max(layer.limit for layer in report.layers) > torch.finfo(dtype).eps
    twin[3].bias[1] += 1.0
    assert compare_layers(model, twin, x).first_different.path == "4"


def test_float64_reference_is_its_own_truth():
    model, x = small()
    model, x = model.double(), x.double()
    report = compare_layers(model, folded(model, x), x)
    assert report, str(report)
    broken = compare_layers(model, folded(shifted(model, "4", 2, by=1e-9), x), x)
    assert broken.first_different.path == "4"


def test_layer_that_draws_random_numbers_is_no_proof():
    model, x = small()
    model[5] = nn.Sequential(nn.ReLU(), nn.Dropout())
    model[5][1].forward = lambda y: nn.functional.dropout(y, 0.5, training=True)
    report = compare_layers(model, copy.deepcopy(model), x)
    assert "own error" in reasons(report)["5.1"]
    assert "7" not in paths(report)


# Nothing is changed; memory


def test_neither_model_is_changed_also_when_one_raises():
    model, x = small()
    model.train()
    twin = folded(model, x)
    before = [fingerprint(each, x) for each in (model, twin)]
    compare_layers(model, twin, x)
    with pytest.raises(InputError, match="Cannot run the model"):
        compare_layers(model, twin, torch.ones(1, 7))
    after = [fingerprint(each, x) for each in (model, twin)]
    assert [changes(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_small_memory_gives_the_same_report_in_more_runs():
    model, x = small()
    twin = folded(shifted(model, "4", 2), x)
    runs = []
    handle = model[0].register_forward_hook(lambda *_: runs.append(1))
    whole = compare_layers(model, twin, x)
    few = len(runs)
    parts = compare_layers(model, twin, x, memory=1)
    handle.remove()
    assert parts == whole
    assert len(runs) > few > 0


# ONNX


@pytest.mark.parametrize(
    ("name", "optimised"),
    [("digits", False), ("unfolded digits", False), ("unfolded digits", True), ("dcgan", True)],
)
def test_onnx_model_agrees_by_the_names_of_its_modules(name, optimised):
    fold, made = fold_of(name.removeprefix("unfolded ")), exported(name, optimised=optimised)
    for one, other in ((fold.model, made), (made, fold.model)):
        report = compare_layers(one, other, fold.inputs)
        assert report, str(report)
        assert report.truth == "float64"
        shown = {row.path for row in report.layers} | {row.carries for row in report.layers}
        # a container whose last layer the norm is has nodes of its own, where that may have none
        assert all(shown & {path, path.rpartition(".")[0]} for path in fold.paths)
    assert compare_layers(fold.correct, made, fold.inputs)


class Unused(nn.Module):
    """A norm whose output nobody uses, after a conv that something else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.norm(y)
        return self.act(y)


class UnusedLater(Unused):
    """The same, where the other one comes after a norm that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(x))
        self.norm(y)
        return self.act(y)


@pytest.mark.parametrize("optimised", [False, True])
def test_unused_norm_after_one_that_folds_is_not_taken_for_folded(optimised):
    model, x = built(UnusedLater, 2, 3, 6, 6)
    twin = folded(model, x)
    for candidate in (twin, in_onnx(twin, x, optimised=optimised)):
        report = compare_layers(model, candidate, x)
        assert report, str(report)
        carries = {row.carries or row.path for row in report.layers}
        assert {"first", "act"} <= carries


def test_norm_that_the_exporter_left_out_is_not_taken_for_folded():
    """Seen in trained networks, and in a random one."""
    model, x = built(Unused, 2, 3, 6, 6)
    report = compare_layers(model, in_onnx(model, x), x)
    assert report, str(report)
    assert paths(report) == ["conv", "act"]
    twin = copy.deepcopy(model)
    twin.norm = nn.Identity()
    assert compare_layers(model, twin, x).first_different.path == "norm"


def test_two_onnx_models_agree_by_names():
    fold = fold_of("digits")
    plain, same = exported("unfolded digits"), exported("digits")
    report = compare_layers(plain, same, fold.inputs)
    assert report, str(report)
    assert len(report.layers) >= 20
    assert [row.carries for row in report.layers if row.path == "3.conv1"] == ["3.bn1"]


@pytest.mark.parametrize("path", fold_of("digits").paths[::3])
def test_fault_in_an_onnx_model_is_named_at_its_host(path, tmp_path):
    fold = fold_of("digits")
    fold.exported(tmp_path / "good.onnx")
    broken = fold.faulty(Fault("shifted mean", path, 3))
    file = fold.faulty_onnx(broken, tmp_path / "broken.onnx")
    (host,) = (d.hosts[0] for d in fold.plan.folds if d.path == path)
    first = compare_layers(fold.model, file, fold.inputs).first_different
    assert (first.path, first.carries, first.where) == (host, path, "channel 3")
    assert first.error > 10 * first.limit


def test_calls_of_a_module_in_an_onnx_model_are_told_apart():
    fold = fold_of("digits")
    report = compare_layers(fold.model, exported("digits"), fold.inputs)
    assert {"3.relu (call 1)", "3.relu (call 2)"} <= set(paths(report))


def test_onnx_model_without_names_is_compared_at_its_outputs():
    fold = fold_of("digits")
    proto = onnx.load_from_string(exported("digits"))
    for node in proto.graph.node:
        del node.metadata_props[:]
    report = compare_layers(fold.model, proto.SerializeToString(), fold.inputs)
    assert report, str(report)
    assert len(report.layers) == 1
    assert "no such layer" in reasons(report)["1"]


def test_file_that_is_no_onnx_model_is_an_error(tmp_path):
    fold = fold_of("digits")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(LoadError, match=r"broken\.onnx"):
        compare_layers(fold.model, tmp_path / "broken.onnx", fold.inputs)


# What is said


def row(name: str, error: float, **options: object) -> LayerError:
    return LayerError(name, "Conv2d", error, 1e-7, 1e-6, error <= 1e-6, **options)


def test_table_and_summary_name_the_layer_the_channel_and_the_limit():
    model, x = small()
    report = compare_layers(model, folded(shifted(model, "4", 2), x), x)
    text = str(report)
    assert "channel 2" in text
    assert "DIFFERS" in text
    assert "not compared, as a norm is folded into them: 0, 3" in text
    assert text.endswith(report.summary())
    data = report.to_dict()
    assert (data["agrees"], data["first_different"], data["last_agreeing"]) == (False, "4", "2")
    json.dumps(data, allow_nan=False)


def test_report_of_no_layer_is_falsy_and_says_so():
    report = DepthReport(())
    assert not report
    assert "no layer" in report.summary()
    assert report.first_different is report.last_agreeing is None


def test_verify_has_the_layers_where_they_are_asked_for():
    model, x = small()
    twin = folded(shifted(model, "4", 2), x)
    assert bntools.verify(model, twin, x).layers is None
    found = bntools.verify(model, twin, x, per_layer=True)
    assert found.layers.first_different.path == "4"


# Pictures


@pytest.mark.parametrize(("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_picture_of_the_errors_is_written(tmp_path, ending, start):
    model, x = small()
    good = compare_layers(model, folded(model, x), x)
    bad = compare_layers(model, folded(shifted(model, "4", 2), x), x)
    for report in (good, {"folded": good, "shifted": bad}):
        path = tmp_path / f"errors{ending}"
        bntools.write_plot(report, path, force=True)
        assert path.read_bytes().startswith(start)


def test_picture_names_the_first_layer_that_differs(tmp_path):
    layers = (row("one", 0.0), row("two", 1e-3, where="channel 4"), row("$x_1$", float("inf")))
    bntools.write_plot({"$_bad": DepthReport(layers)}, tmp_path / "errors.svg")
    drawn = Path(tmp_path / "errors.svg").read_text("utf-8")
    assert "two: channel 4" in drawn
    assert "relative error, against float64 truth" in drawn


def test_picture_of_nothing_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no layer"):
        bntools.write_plot(DepthReport(()), tmp_path / "errors.png")
    assert not list(tmp_path.iterdir())
