"""The doctor: what it says about each norm layer, and that every finding fires, and only then."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from randomise import randomise
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from zoo import Net

import bntools
from bntools.errors import InputError
from bntools.report import Action, Inspection, Range, Reason, Severity

IMAGE = torch.zeros(1, 3, 8, 8)
SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
Harm = Callable[[Any], Any]


def healthy(*, bias: bool = False) -> nn.Sequential:
    """A conv and a norm about which there is nothing to say."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6)).eval()
    randomise(model)
    return model


def two_norms() -> nn.Sequential:
    return nn.Sequential(
        *healthy(), nn.Conv2d(6, 6, 1, bias=False), copy.deepcopy(healthy()[1])
    ).eval()


def found(inspection: Inspection) -> set[tuple[str, str, str]]:
    return {(f.path, f.severity.value, f.code) for f in inspection.findings}


def message(inspection: Inspection, code: str) -> str:
    [text] = [f.message for f in inspection.findings if f.code == code]
    return text


@torch.no_grad()
def harmed(harm: Harm, model: nn.Sequential | None = None) -> nn.Sequential:
    model = healthy() if model is None else model
    harm(model)
    return model


def put(name: str, *values: float) -> Harm:
    """Overwrite the first values of one of the norm's tensors."""

    def harm(model: Any) -> None:
        getattr(model[1], name)[: len(values)] = torch.tensor(values)

    return harm


def fill(value: float, *names: str) -> Harm:
    def harm(model: Any) -> None:
        for name in names:
            getattr(model[1], name).fill_(value)

    return harm


def never_updated(model: Any) -> None:
    model[1].reset_running_stats()


def half_overflow(model: Any) -> None:
    model[0].weight.fill_(300.0)
    model[1].running_var.fill_(0.0)
    model.half()


FIRES = {
    "nan in the mean": (put("running_mean", float("nan")), "1", "error", "nan-or-inf"),
    "inf in the variance": (put("running_var", float("inf")), "1", "error", "nan-or-inf"),
    "nan in gamma": (put("weight", float("nan")), "1", "error", "nan-or-inf"),
    "inf in beta": (put("bias", float("-inf")), "1", "error", "nan-or-inf"),
    "zero variance and eps": (
        lambda model: (put("running_var", 0.0)(model), setattr(model[1], "eps", 0.0)),
        "1", "error", "nan-or-inf",
    ),
    "negative variance": (put("running_var", -1e-7), "1", "error", "negative-variance"),
    "a variance of 0": (put("running_var", 0.0), "1", "info", "tiny-variance"),
    "a subnormal variance": (put("running_var", 5.6e-45), "1", "info", "tiny-variance"),
    "half of the variances": (put("running_var", 0.0, 1e-6, 9e-6), "1", "warning", "tiny-variance"),
    "a huge variance": (put("running_var", 2e8), "1", "info", "huge-variance"),
    "fresh statistics": (never_updated, "1", "warning", "never-updated"),
    "a dead channel": (put("weight", -9e-6), "1", "info", "dead-channels"),
    "half of them dead": (put("weight", 0.0, 1e-7, -1e-9), "1", "warning", "dead-channels"),
    "a norm in training mode": (
        lambda model: model[1].train(), "1", "warning", "training-mode",
    ),
    "the model in training mode": (lambda model: model.train(), "", "info", "training-mode"),
    "no statistics": (
        lambda model: model.__setitem__(1, nn.BatchNorm2d(6, track_running_stats=False).eval()),
        "1", "warning", "no-running-statistics",
    ),
    "overflow in float16": (half_overflow, "1", "warning", "fold-overflow"),
    "no batches counted": (
        lambda model: model[1].num_batches_tracked.zero_(), "", "info", "no-batches-counted",
    ),
    "momentum 0": (lambda model: setattr(model[1], "momentum", 0.0), "", "info", "zero-momentum"),
}  # fmt: skip


def test_a_healthy_model_has_no_findings():
    """The model that the other tests harm."""
    inspection = bntools.inspect(healthy(), IMAGE)
    assert inspection.findings == ()
    assert inspection.worst() is None
    assert inspection.summary() == "1 of 1 norm layers would fold; 0 errors, 0 warnings, 0 notes"


@pytest.mark.parametrize(("harm", "path", "severity", "code"), FIRES.values(), ids=FIRES)
def test_a_harm_is_found(harm: Harm, path: str, severity: str, code: str):
    """With its severity, and without the plan as well where it does not need one."""
    model = harmed(harm)
    assert (path, severity, code) in found(bntools.inspect(model, IMAGE.to(model[0].weight.dtype)))
    if code != "fold-overflow":
        unplanned = bntools.inspect(model, torch.zeros(1, 5, 8, 8))
        assert unplanned.layers[0].decision is None
        assert (path, severity, code) in found(unplanned)


@pytest.mark.parametrize(
    "harm",
    [
        put("running_var", 1.01e-5, 9e7),
        put("weight", 1.1e-5, -1.1e-5),
        fill(0.0, "running_mean"),
        fill(1.0, "running_var"),
        lambda model: setattr(model[1], "momentum", None),
        lambda model: setattr(model[1], "momentum", 1e-3),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model[0].train(),
    ],
)
def test_what_is_no_harm_is_not_found(harm: Harm):
    """Just inside of the thresholds, and half of the signs."""
    model = harmed(harm)
    assert bntools.inspect(model, IMAGE.to(model[0].weight.dtype)).findings == ()


def test_counts_and_limits_are_in_the_messages():
    """A finding says how much of the layer it is about."""
    nan = bntools.inspect(harmed(put("running_mean", float("nan"), float("inf"))), IMAGE)
    assert message(nan, "nan-or-inf") == "values are NaN or infinite: 2 of 6 in mean"
    negative = bntools.inspect(harmed(put("running_var", -0.5, -2.0)), IMAGE)
    assert message(negative, "negative-variance") == (
        "the variance of 2 of 6 channels is negative (down to -2)"
    )
    assert not any(f.code == "nan-or-inf" for f in negative.findings)
    tiny = bntools.inspect(harmed(put("running_var", 0.0, 1e-9)), IMAGE)
    assert message(tiny, "tiny-variance") == (
        "the variance of 2 of 6 channels is under eps (1e-05), 1 of them 0"
    )


def test_batches_counted_without_statistics_are_mentioned():
    """Statistics at 0 and 1 after many batches: reset, or momentum 0."""
    model = harmed(never_updated)
    model[1].num_batches_tracked.fill_(12)
    said = message(bntools.inspect(model, IMAGE), "never-updated")
    assert said.endswith("although 12 batches were counted")


def test_findings_come_worst_first():
    """A reader sees errors before notes, whatever layer they are in."""
    model = two_norms()
    with torch.no_grad():
        model[1].weight[0] = 0
        model[3].running_mean[0] = float("nan")
    inspection = bntools.inspect(model, IMAGE)
    assert [f.path for f in inspection.findings] == ["3", "1"]
    assert [f.code for f in inspection.errors] == ["nan-or-inf"]
    assert inspection.worst() is Severity.ERROR
    assert inspection.summary().endswith("; 1 error, 0 warnings, 1 note")


def test_a_bias_before_a_norm_is_redundant():
    """Said once, of the first norm behind it, and only where the plan folds."""
    model = nn.Sequential(*healthy(bias=True), copy.deepcopy(healthy()[1])).eval()
    inspection = bntools.inspect(model, IMAGE)
    assert found(inspection) == {("1", "info", "biased-conv")}
    assert message(inspection, "biased-conv") == "the bias of 0 is redundant before this norm"
    between = nn.Sequential(model[0], nn.GELU(), model[1]).eval()
    assert bntools.inspect(between, IMAGE).findings == ()


def test_subnormal_values_of_a_fold_are_counted():
    """One channel of 27 weights becomes subnormal; float16 values are never flushed."""
    model = healthy()
    with torch.no_grad():
        model[0].weight[0] = 1e-36
        model[1].weight[0] = 1e-4
        model[1].running_var[0] = 1.0
    inspection = bntools.inspect(model, IMAGE)
    assert found(inspection) == {("1", "info", "fold-subnormal")}
    flushed = bntools.fold(model, IMAGE).report.flushed
    assert message(inspection, "fold-subnormal").startswith(f"{flushed} values of the folded 0 ")
    assert flushed == 27
    assert bntools.inspect(model.half(), IMAGE.half()).findings == ()


def test_two_norms_on_one_host_count_subnormals_once():
    """As many as the fold flushes: of both norms together."""
    model = nn.Sequential(*healthy(), copy.deepcopy(healthy()[1])).eval()
    with torch.no_grad():
        model[0].weight[0] = 1e-37
        for norm in (model[1], model[2]):
            norm.weight[0], norm.running_var[0] = 1e-2, 1.0
    inspection = bntools.inspect(model, IMAGE)
    assert found(inspection) == {("2", "info", "fold-subnormal")}
    flushed = bntools.fold(model, IMAGE).report.flushed
    assert message(inspection, "fold-subnormal").startswith(f"{flushed} values")


def test_non_finite_statistics_are_no_overflow():
    """The fold is refused for the same reason, but the cure is another one."""
    inspection = bntools.inspect(harmed(put("running_mean", float("nan"))), IMAGE)
    assert inspection.layers[0].decision.reason is Reason.NON_FINITE
    assert found(inspection) == {("1", "error", "nan-or-inf")}


def test_mixed_settings_are_noted_once():
    """About the whole model, with the values."""
    model = two_norms()
    model[3].eps, model[3].momentum = 1e-3, 0.01
    inspection = bntools.inspect(model, IMAGE)
    assert found(inspection) == {("", "info", "mixed-eps"), ("", "info", "mixed-momentum")}
    assert message(inspection, "mixed-eps") == "the norm layers differ in eps: 1e-05, 0.001"
    assert bntools.inspect(two_norms(), IMAGE).findings == ()


def test_many_layers_are_named_by_their_first():
    """A converted file has the same note for every layer."""
    model = nn.Sequential(*two_norms(), *two_norms()[2:], *two_norms()[2:]).eval()
    for index in (1, 3, 5, 7):
        model[index].num_batches_tracked.zero_()
    said = message(bntools.inspect(model, IMAGE), "no-batches-counted")
    assert said == (
        "num_batches_tracked is 0, with real statistics, in 4 norm layers (1, 3, 5, ...):"
        " a converted file"
    )


def test_a_layer_is_described():
    """Everything that the issue asks for."""
    model = healthy()
    norm = model[1]
    [layer] = bntools.inspect(model, IMAGE).layers
    assert (layer.path, layer.kind, layer.channels) == ("1", "BatchNorm2d", 6)
    assert (layer.eps, layer.momentum, layer.batches_tracked) == (1e-5, 0.1, 100)
    assert layer.variance == Range(float(norm.running_var.min()), float(norm.running_var.max()))
    assert layer.mean == Range(float(norm.running_mean.min()), float(norm.running_mean.max()))
    assert layer.gamma == Range(norm.weight.min().item(), norm.weight.max().item())
    assert (layer.frozen, layer.input_dependent) == (False, False)
    assert layer.decision == bntools.plan_fold(model, IMAGE).decisions[0]


def test_ranges_are_those_of_the_finite_values():
    """NaN and infinity are findings; a layer of nothing else has no range."""
    some = bntools.inspect(harmed(put("running_mean", float("nan"), float("inf"))), IMAGE).layers[0]
    assert some.mean is not None
    assert some.mean.high < 10
    none = bntools.inspect(harmed(fill(float("nan"), "running_mean")), IMAGE).layers[0]
    assert none.mean is None


@pytest.mark.parametrize(
    ("norm", "frozen"),
    [
        (FrozenBatchNorm2d(6), True),
        (nn.BatchNorm2d(6, momentum=0.0), True),
        (nn.BatchNorm2d(6), False),
    ],
    ids=["frozen class", "momentum 0", "plain"],
)
def test_frozen_layers_have_statistics_that_nothing_changes(norm: nn.Module, frozen: bool):
    """Whatever `requires_grad` says: that is about gamma and beta."""
    norm.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm).eval()
    randomise(model)
    [layer] = bntools.inspect(model, IMAGE).layers
    assert layer.frozen is frozen


def test_a_frozen_layer_has_no_training_mode():
    """It uses its statistics in either mode."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm2d(6)).eval()
    randomise(model)
    model[1].train()
    assert bntools.inspect(model, IMAGE).findings == ()


def test_a_norm_that_stays_in_training_below_a_training_model_is_found():
    """Its `train` does not listen to `eval()`; the plan sees that."""

    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), Stubborn(6))
    randomise(model)
    assert ("1", "warning", "training-mode") in found(
        bntools.inspect(model, torch.ones(2, 3, 8, 8))
    )


def dependent() -> list[nn.Module]:
    from timm import layers
    from torchvision.models.convnext import LayerNorm2d

    return [
        nn.GroupNorm(2, 6), nn.LayerNorm(6), nn.LayerNorm([6, 4, 4]), nn.RMSNorm(6),
        nn.InstanceNorm2d(6), nn.LazyInstanceNorm2d(affine=False, track_running_stats=False),
        nn.LocalResponseNorm(3), LayerNorm2d(6),
        nn.CrossMapLRN2d(3), layers.LayerNorm(6), layers.LayerNorm2d(6), layers.GroupNorm1(6),
        layers.GroupNormAct(8, 4), layers.RmsNorm(6), layers.RmsNorm2d(6), layers.SimpleNorm2d(6),
        layers.LayerNormAct2d(6), layers.EvoNorm2dS0(32), layers.EvoNorm2dB0(6),
        layers.FilterResponseNormAct2d(6), layers.FilterResponseNormTlu2d(6),
    ]  # fmt: skip


@pytest.mark.parametrize("norm", dependent(), ids=lambda norm: type(norm).__name__)
def test_input_dependent_layers_are_listed_and_do_not_count(norm: nn.Module):
    """They come last, without a decision and without findings."""
    model = healthy()
    model.register_module("other", norm.eval())
    model.forward = lambda x: nn.Sequential.forward(model[:2], x)
    inspection = bntools.inspect(model, IMAGE)
    assert [layer.input_dependent for layer in inspection.layers] == [False, True]
    layer = inspection.layers[1]
    assert (layer.path, layer.kind, layer.decision) == ("other", type(norm).__name__, None)
    assert inspection.summary().startswith("1 of 1 norm layers")
    assert {f.code for f in inspection.findings} <= {"uninitialized"}


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "T5LayerNorm", "GroupNorm32", "FusedLayerNorm"])
def test_foreign_layers_are_known_by_their_names(name: str):
    """Libraries write these classes themselves."""
    foreign = type(name, (nn.Identity,), {})()
    assert bntools.inspect(nn.Sequential(nn.Conv2d(3, 6, 3), foreign)).layers[0].kind == name


@pytest.mark.parametrize(
    "name", ["PreNorm", "LayerNormMlp", "WeightNorm", "Normalize", "ConvNormAct"]
)
def test_what_holds_a_norm_is_none(name: str):
    """Only the layer itself is listed."""
    foreign = type(name, (nn.Identity,), {})()
    assert bntools.inspect(nn.Sequential(nn.Conv2d(3, 6, 3), foreign)).layers == ()


def test_nan_in_an_input_dependent_layer_is_an_error():
    """The only finding that needs no statistics."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)).eval()
    with torch.no_grad():
        model[1].weight[0] = float("nan")
        model[1].weight[1] = 0.0
    inspection = bntools.inspect(model)
    assert found(inspection) == {("1", "error", "nan-or-inf")}
    assert inspection.summary().startswith("the model has no norm layer to fold; 1 error")
    assert inspection.warnings == ()


def test_an_instance_norm_with_statistics_is_in_no_plan():
    """It does not count, but its statistics are looked at."""
    model = nn.Sequential(*healthy(), nn.InstanceNorm2d(6, track_running_stats=True)).eval()
    inspection = bntools.inspect(model, IMAGE)
    assert found(inspection) == {("2", "warning", "never-updated"), ("2", "info", "not-planned")}
    assert inspection.summary().startswith("1 of 1 norm layers")


def test_layers_are_in_execution_order():
    """Registration order says little about a network."""
    parts = {"late": nn.BatchNorm2d(6), "early": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(2)}
    model = Net(lambda net, x: net.late(net.conv(net.early(x))), conv=nn.Conv2d(3, 6, 3), **parts)
    inspection = bntools.inspect(model.eval(), IMAGE)
    assert [layer.path for layer in inspection.layers] == ["early", "late", "unused"]
    reasons = [layer.decision.reason for layer in inspection.layers]
    assert reasons[1:] == [None, Reason.NOT_EXECUTED]


def test_a_model_that_does_not_run_is_examined_all_the_same():
    """The warning says why there are no decisions."""
    model = harmed(put("running_var", -1.0))
    inspection = bntools.inspect(model, torch.zeros(1, 5, 8, 8))
    assert inspection.layers[0].variance is not None
    assert inspection.layers[0].decision is None
    assert inspection.inputs == ""
    assert inspection.summary() == "1 norm layer, health only; 1 error, 0 warnings, 0 notes"
    [warning] = inspection.warnings
    assert "Cannot run the model on 1x5x8x8" in warning


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda net, x, y: net.bn(x) @ y.undefined, "Cannot infer an input"),
        (lambda net, *args: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_model_without_an_input_is_examined_all_the_same(forward: Callable[..., Any], said: str):
    """Also where its forward raises whatever it likes."""
    inspection = bntools.inspect(Net(forward, bn=nn.BatchNorm2d(6)).eval())
    assert found(inspection) == {("bn", "warning", "never-updated")}
    assert said in inspection.warnings[0]


def test_a_planner_that_fails_does_not_stop_the_doctor(monkeypatch: pytest.MonkeyPatch):
    """A bug there is named by its type."""

    def fail(*args: Any) -> None:
        raise KeyError("graph")

    monkeypatch.setattr("bntools.inspection.plan_fold", fail)
    [warning] = bntools.inspect(healthy(), IMAGE).warnings
    assert warning.endswith("KeyError: 'graph'")


def test_inputs_of_a_useless_type_are_an_error():
    """That is no property of the model."""
    with pytest.raises(InputError, match="Cannot use example inputs of type int"):
        bntools.inspect(healthy(), 3)


def test_a_model_without_norm_layers_says_so():
    """It is not even run."""
    inspection = bntools.inspect(Net(lambda net: 1 / 0, act=nn.ReLU()))
    assert inspection.layers == inspection.warnings == inspection.findings == ()
    assert inspection.summary().startswith("the model has no norm layer to fold")


@pytest.mark.parametrize(
    "norm",
    [
        nn.LazyBatchNorm2d(),
        nn.LazyBatchNorm2d(affine=False),
        nn.BatchNorm2d(6, device="meta"),
        nn.BatchNorm2d(6, affine=False, device="meta"),
    ],
)
def test_layers_without_values_are_named(norm: nn.Module):
    """There is nothing to read, and nothing else to say."""
    model = Net(lambda net: None, bn=norm.eval()).eval()
    assert ("bn", "warning", "uninitialized") in found(bntools.inspect(model))
    assert "never-updated" not in {f.code for f in bntools.inspect(model).findings}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(0),
        nn.BatchNorm2d(0, affine=False),
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(6),
        nn.BatchNorm2d(6, momentum=None),
        nn.BatchNorm2d(6).half(),
        nn.BatchNorm2d(6).bfloat16(),
        nn.Sequential(nn.BatchNorm2d(6)),
        nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(6), dim=None),
    ],
)
def test_odd_norms_are_described(norm: nn.Module):
    """Each alone as a model, run and not run."""
    for inputs in (None, IMAGE, torch.ones(2, 6, 4, 4)):
        [layer] = bntools.inspect(norm.eval(), inputs).layers
        assert layer.kind
        assert json.dumps(bntools.inspect(norm, inputs).to_dict(), allow_nan=False)


def test_statistics_set_to_none_by_hand_are_no_crash():
    """One of them only, and both."""
    model = healthy()
    model[1].running_mean = None
    assert ("1", "warning", "no-running-statistics") in found(bntools.inspect(model, IMAGE))
    model[1].running_var = None
    [layer] = bntools.inspect(model, IMAGE).layers
    assert (layer.mean, layer.variance, layer.channels) == (None, None, 6)


def test_a_gamma_of_another_length_is_no_crash():
    """A broken checkpoint surgery: the model does not run."""
    model = harmed(lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(4))))
    assert bntools.inspect(model, IMAGE).layers[0].decision is None


def test_a_shared_norm_is_listed_once():
    """Under its first path."""
    shared = healthy()[1]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), shared, nn.Conv2d(6, 6, 1), shared).eval()
    assert [layer.path for layer in bntools.inspect(model, IMAGE).layers] == ["1"]
    group = nn.GroupNorm(2, 6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), group, group)
    assert [layer.path for layer in bntools.inspect(model, IMAGE).layers] == ["1"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "submodule"])
def test_scripted_norms_are_described(whole: bool):
    """With the names that they had, and their statistics."""
    scripted = torch.jit.script(harmed(put("running_var", -1.0)))
    model = scripted if whole else nn.Sequential(scripted).eval()
    inspection = bntools.inspect(model, IMAGE)
    [layer] = inspection.layers
    assert (layer.path.removeprefix("0."), layer.kind) == ("1", "BatchNorm2d")
    assert (layer.channels, layer.eps, layer.momentum) == (6, 1e-5, 0.1)
    assert (layer.path, "error", "negative-variance") in found(inspection)


def test_wrappers_are_looked_through():
    """Paths are those of the model inside."""
    assert bntools.inspect(nn.DataParallel(healthy()), IMAGE).layers[0].path == "1"


def test_a_class_that_shadows_modules_is_examined():
    """`self.modules = []` breaks `model.modules()`."""
    model = healthy()
    model.modules = []
    assert len(bntools.inspect(model, IMAGE).layers) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("runs", [True, False])
def test_inspecting_changes_nothing(training: bool, runs: bool):
    """Statistics, flags, hooks, gradients and the random state are as before."""
    model = healthy(bias=True).train(training)
    model[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    random = torch.get_rng_state()
    bntools.inspect(model, IMAGE if runs else torch.zeros(1, 5, 8, 8))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert [m.training for m in model.modules()] == [training] * 3
    assert not model[1].weight.requires_grad
    assert torch.equal(random, torch.get_rng_state())


def test_an_inspection_is_json():
    """Enums by value, nested decisions, no NaN."""
    inspection = bntools.inspect(harmed(put("running_mean", float("nan"))), IMAGE)
    data = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert data["layers"][0]["decision"]["reason"] == "non-finite"
    assert data["findings"][0] == {
        "path": "1",
        "severity": "error",
        "code": "nan-or-inf",
        "message": "values are NaN or infinite: 1 of 6 in mean",
    }
    assert str(inspection).endswith(inspection.summary())


def test_the_shipped_sample_is_healthy():
    """No errors, no warnings, all nine would fold, and no input is needed."""
    inspection = bntools.inspect(bntools.load(SAMPLE))
    assert inspection.worst() in (None, Severity.INFO)
    assert inspection.summary().startswith("9 of 9 norm layers would fold; 0 errors, 0 warnings")
    assert "inferred" in inspection.inputs


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_untrained_networks_were_never_updated(name: str):
    """Every layer says so, and nothing else is wrong."""
    model = getattr(torchvision.models, name)().eval()
    inspection = bntools.inspect(model)
    assert {f.code for f in inspection.findings} == {"never-updated"}
    assert len(inspection.findings) == len(inspection.layers)
    assert all(layer.decision.action is Action.FOLD for layer in inspection.layers)


def test_a_randomised_network_is_healthy():
    """No false alarm on ordinary numbers; torchvision's VGG has biases before its norms."""
    model = torchvision.models.vgg11_bn(num_classes=10).eval().features
    randomise(model)
    inspection = bntools.inspect(model)
    assert {f.code for f in inspection.findings} == {"biased-conv"}
    assert len(inspection.findings) == 8


def test_a_network_of_layer_norms_has_its_scales_to_fold():
    """Layer norms are listed for the reader, counted for nobody; the layer scales fold."""
    model = torchvision.models.convnext_tiny().eval()
    inspection = bntools.inspect(model)
    norms = [layer for layer in inspection.layers if not layer.affine]
    assert {layer.kind for layer in norms} == {"LayerNorm", "LayerNorm2d"}
    assert all(layer.input_dependent for layer in norms)
    assert inspection.findings == ()
    assert inspection.summary().startswith("18 of 18 affines would fold")
