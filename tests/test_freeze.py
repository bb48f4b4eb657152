"""Freezing: statistics that no forward changes, whatever happens to the model around them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from randomise import named_modules, norms, outputs, randomise, run
from timm.layers.norm_act import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    convert_sync_batchnorm,
)
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from zoo_models import MODELS

import bntools
from bntools.errors import BNToolsError, InputError, LoadError, PlanError, SurgeryError
from bntools.modules import get_module
from bntools.norms import EvoNorm1dB0, EvoNorm2dB0, EvoNorm3dB0, FrozenEvoNorm2dB0, is_frozen
from bntools.norms import FrozenBatchNorm2d as OurFrozen
from bntools.norms.conversion import (
    from_frozen_batchnorm,
    to_batch_norm,
    to_frozen_batchnorm,
)
from bntools.norms.frozen import (
    Frozen,
    freeze_module,
    frozen_class,
    rebuild,
    thawed_class,
    unfreeze_module,
)
from bntools.recipe import apply_edits
from bntools.report import Action, Reason

C = 6


class Doubled(nn.BatchNorm2d):
    """A subclass with a forward of its own, and an attribute."""

    def __init__(self, channels):
        super().__init__(channels)
        self.factor = 2.0

    def forward(self, x):
        return super().forward(x) * self.factor


class Renamed(nn.BatchNorm1d):
    """A subclass that changes nothing."""


class Handwritten(nn.Module):
    """Running statistics, without being a BatchNorm."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()


class Stubborn(nn.BatchNorm2d):
    """Updates its statistics in every mode."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1
        )


class Batchwise(nn.BatchNorm2d):
    """Normalises by the batch in every mode, and leaves its statistics alone."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1)


class DetectronStyle(nn.Module):
    """The FrozenBatchNorm2d that many repositories carry a copy of, with its eps in the code."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {
            "weight": 1.0,
            "bias": 0.0,
            "running_mean": 0.0,
            "running_var": 1.0,
        }.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


DetectronStyle.__name__ = "FrozenBatchNorm2d"

LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(C), (4, C, 5)),
    "BatchNorm1d of features": (lambda: nn.BatchNorm1d(C), (4, C)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(C), (4, C, 5, 3)),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(C, momentum=None), (4, C, 5, 3)),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(C, affine=False), (4, C, 5, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(C), (4, C, 3, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(C), (4, C, 5, 3)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(C), (4, C, 5, 3)),
    "SyncBatchNormAct": (lambda: convert_sync_batchnorm(BatchNormAct2d(C)), (4, C, 5, 3)),
    "EvoNorm1dB0": (lambda: EvoNorm1dB0(C), (4, C, 5)),
    "EvoNorm2dB0": (lambda: EvoNorm2dB0(C), (4, C, 5, 3)),
    "EvoNorm3dB0": (lambda: EvoNorm3dB0(C), (4, C, 3, 2, 2)),
    "a subclass": (lambda: Doubled(C), (4, C, 5, 3)),
    "a renamed class": (lambda: Renamed(C), (4, C)),
    "timm's SplitBatchNorm2d": (lambda: SplitBatchNorm2d(C), (4, C, 5, 3)),
    "timm's EvoNorm2dB0": (lambda: timm.layers.EvoNorm2dB0(C), (4, C, 5, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(C, track_running_stats=True), (4, C, 5, 3)),
    "a hand-written one": (lambda: Handwritten(C), (4, C, 5, 3)),
}
KNOWN = list(LAYERS)[:12]


@pytest.fixture(params=LAYERS)
def layer(request):
    """A layer in training mode with statistics of its own, and an input."""
    return made(request.param)


@pytest.fixture(params=KNOWN)
def known(request):
    """The same, of the classes that have a frozen class in bntools."""
    return made(request.param)


def made(name):
    build, shape = LAYERS[name]
    module = build()
    randomise(module, 3)
    return module.train(), torch.randn(shape, generator=torch.Generator().manual_seed(4))


def small():
    """Every kind of place: in a Sequential, nested, shared, and a BatchNorm1d."""
    shared = nn.BatchNorm2d(C)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C),
        nn.Sequential(shared, nn.ReLU(), shared, nn.Dropout(0.5)),
        nn.Flatten(),
        nn.Linear(C * 16, C),
        nn.BatchNorm1d(C),
    )
    randomise(model)
    return model


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def contents(model):
    """All that purity is about: tensors, flags, modes, classes."""
    return (
        {name: t.clone() for name, t in model.state_dict(keep_vars=False).items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {path: (m.training, type(m), dict(m._forward_hooks)) for path, m in named_modules(model)},
    )


def assert_same_contents(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(t, expected[0][name]) for name, t in found[0].items())
    assert found[1:] == expected[1:]


def eval_output(module, x):
    return copy.deepcopy(module).eval()(x.clone())


def assert_keeps(module, x, expected):
    """Forwards in training mode give what eval mode gave and leave every buffer as it was."""
    before = {name: t.clone() for name, t in module.named_buffers()}
    for _ in range(2):
        assert torch.equal(module(x.clone()), expected)
    assert all(torch.equal(t, before[name]) for name, t in module.named_buffers())


# What keeps a layer frozen


def test_a_frozen_layer_ignores_every_way_to_training_mode(layer):
    """train(), apply, the flag itself, momentum, a parent's train()."""
    module, x = layer
    expected = eval_output(module, x)
    frozen = freeze_module(module)
    parent = nn.Sequential(frozen)
    for wake in (
        frozen.train,
        lambda: frozen.apply(lambda m: m.train()),
        lambda: setattr(frozen, "training", True),
        lambda: setattr(frozen, "momentum", 0.9),
        lambda: frozen.eval().train(),
        parent.train,
        lambda: parent.requires_grad_(True),
    ):
        wake()
        assert frozen.training is False
        assert_keeps(frozen, x, expected)


def test_without_freezing_the_statistics_move(layer):
    """The check above fails for a plain layer: eval() is undone by train()."""
    module, x = layer
    expected = eval_output(module, x)
    module.eval()
    module.train()
    with pytest.raises(AssertionError):
        assert_keeps(module, x, expected)


def test_copies_and_pickles_stay_frozen(layer):
    module, x = layer
    expected = eval_output(module, x)
    frozen = freeze_module(module, affine=True)
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(frozen)
        assert repr(other) == repr(frozen)
        assert_keeps(other.train(), x, expected)
        affine = [other._parameters.get(name) for name in ("weight", "bias")]
        assert not any(p.requires_grad for p in affine if p is not None)


def test_compiled_it_stays_frozen(layer):
    module, x = layer
    expected = eval_output(module, x)
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(freeze_module(module)), backend="eager").train()
    assert_keeps(compiled, x, expected)
    assert torch.equal(compiled.eval()(x.clone()), expected)


def test_freezing_what_is_compiled_already_takes_effect():
    """The compiled code of before is not used again."""
    model = nn.Sequential(nn.BatchNorm2d(C)).train()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, C, 5, 3)
    compiled(x)
    expected = eval_output(model, x)
    assert bntools.freeze(compiled, inplace=True).model is compiled
    assert_keeps(compiled, x, expected)


def test_scripted_it_stays_frozen(known):
    """TorchScript has a `training` flag of its own, of which the frozen forward knows nothing."""
    module, x = known
    expected = eval_output(module, x)
    scripted = torch.jit.script(freeze_module(module)).train()
    assert_keeps(scripted, x, expected)
    assert is_frozen(scripted)


def test_a_symbolic_trace_passes_through_a_frozen_layer(known):
    """Also where torch's own layer would be a leaf: its class is one of bntools."""
    module, x = known
    expected = eval_output(module, x)
    traced = torch.fx.symbolic_trace(nn.Sequential(freeze_module(module))).train()
    assert_keeps(traced, x, expected)


def test_exported_it_stays_frozen(known):
    module, x = known
    expected = eval_output(module, x)
    exported = torch.export.export(nn.Sequential(freeze_module(module)).train(), (x,))
    torch.testing.assert_close(exported.module()(x.clone()), expected)


def test_wrapped_for_distributed_training_it_stays_frozen():
    """DistributedDataParallel broadcasts buffers: the same values."""
    model, x = bntools.freeze(small()).model, IMAGES
    before = {name: t.clone() for name, t in model.named_buffers()}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.train()
        wrapped(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())


def test_update_bn_leaves_a_frozen_layer_alone():
    """It resets statistics and sets the momentum to None before it runs the model."""
    model = bntools.freeze(small()).model
    before = {name: t.clone() for name, t in model.named_buffers()}
    torch.optim.swa_utils.update_bn([IMAGES], model)
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def test_moving_to_another_dtype_keeps_it_frozen(layer):
    module, x = layer
    frozen = freeze_module(module).to(torch.float64).train()
    expected = eval_output(frozen, x.double())
    assert_keeps(frozen, x.double(), expected)


def test_half_precision_inputs_are_not_promoted():
    """As with a plain BatchNorm, and unlike detectron's form."""
    norm = freeze_module(nn.BatchNorm2d(C))
    assert norm(torch.randn(2, C, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


# What stays as it was


def test_it_is_an_instance_of_the_class_that_it_was(layer):
    module, _ = layer
    was = type(module)
    frozen = freeze_module(module)
    assert frozen is module
    assert isinstance(frozen, was)
    assert type(frozen).__name__ == f"Frozen{was.__name__}"
    assert "frozen=statistics" in repr(frozen)
    assert "frozen=statistics and affine" in repr(freeze_module(frozen, affine=True))


def test_checkpoints_move_freely_between_frozen_and_not():
    plain = small()
    frozen = bntools.freeze(plain).model
    assert list(frozen.state_dict()) == list(plain.state_dict())
    other = small()
    randomise(other, 8)
    frozen.load_state_dict(other.state_dict())
    plain.load_state_dict(frozen.state_dict())
    expected = outputs(other.eval(), IMAGES)
    assert torch.equal(outputs(frozen.eval(), IMAGES)[0], expected[0])
    assert torch.equal(outputs(plain.eval(), IMAGES)[0], expected[0])


def test_gradients_are_those_of_eval_mode(layer):
    module, x = layer
    plain = copy.deepcopy(module).eval()
    frozen = freeze_module(module).train()
    found = []
    for each in (plain, frozen):
        given = x.clone().requires_grad_()
        wanted = [given, *(p for p in each._parameters.values() if p is not None)]
        found.append(torch.autograd.grad(each(given).square().sum(), wanted))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_dropout_and_activation_of_a_fused_layer_follow_the_mode():
    norm = BatchNormAct2d(C, drop_layer=nn.Dropout)
    frozen = freeze_module(norm).train()
    assert frozen.drop.training
    assert not frozen.eval().drop.training


def test_an_input_of_another_rank_is_refused_as_before(known):
    module, x = known
    shape = (C,) if isinstance(module, nn.SyncBatchNorm) else (1, C, *[2] * (x.ndim % 3 + 2))
    with pytest.raises((ValueError, AssertionError), match="expected"):
        module.eval()(torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"expected .* input \(got {len(shape)}D input\)"):
        freeze_module(module)(torch.zeros(shape))


# The affine


def test_with_affine_the_gradients_stop_and_unfreeze_lets_them_go_on():
    model = small()
    model[1].bias.requires_grad_(False)
    before = contents(model)
    frozen = bntools.freeze(model, affine=True).model
    frozen.train()(IMAGES).sum().backward()
    assert frozen[1].weight.grad is None
    assert frozen[0].weight.grad is not None
    again = bntools.unfreeze(frozen).model
    assert_same_contents(contents(again), before)


def test_without_affine_weight_and_bias_are_trained():
    frozen = bntools.freeze(small()).model.train()
    frozen(IMAGES).sum().backward()
    assert frozen[1].weight.grad is not None
    assert frozen[1].bias.grad is not None


def test_freezing_the_affine_of_what_is_frozen_is_a_second_step():
    first = bntools.freeze(small()).model
    second = bntools.freeze(first, affine=True)
    assert len(second.report.changed) == 3
    assert not second.model[1].weight.requires_grad
    third = bntools.freeze(second.model, affine=True)
    assert {d.reason for d in third.report.decisions} == {Reason.ALREADY_FROZEN}


def test_a_parameter_that_others_hold_is_told():
    model = small()
    model.extra = nn.Module()
    model.extra.gain = model[1].weight
    (warning,) = bntools.freeze(model, affine=True).report.warnings
    assert warning == "extra.gain is a parameter of 1, too: its gradients stop"
    assert bntools.freeze(model).report.warnings == ()


# Unfreezing


def test_unfreezing_gives_the_very_layer_back(layer):
    module, x = layer
    state, said, was = copy.deepcopy(module.state_dict()), repr(module), type(module)
    attributes = set(module.__dict__)
    back = unfreeze_module(freeze_module(module, affine=True))
    assert type(back) is was
    assert repr(back) == said
    assert set(back.__dict__) == attributes
    assert back.training
    assert all(torch.equal(t, state[name]) for name, t in back.state_dict().items())
    expected = eval_output(back, x)
    with pytest.raises(AssertionError):
        assert_keeps(back, x, expected)


def test_it_comes_back_in_the_mode_that_it_was_last_set_to():
    model = small().eval()
    frozen = bntools.freeze(model).model
    assert not bntools.unfreeze(frozen).model[1].training
    assert bntools.unfreeze(frozen.train()).model[1].training


def test_only_frozen_layers_can_be_unfrozen():
    report = bntools.unfreeze(small()).report
    assert {d.reason for d in report.decisions} == {Reason.NOT_FROZEN}
    with pytest.raises(TypeError, match="expected a layer that bntools froze"):
        unfreeze_module(nn.BatchNorm2d(C))


# The report, and what is left alone


def test_every_layer_is_in_the_report_once():
    report = bntools.freeze(small(), skip="2.*").report
    assert [(d.path, d.kind, d.action, d.reason) for d in report.decisions] == [
        ("1", "BatchNorm2d", Action.FREEZE, None),
        ("2.0", "BatchNorm2d", Action.KEEP, Reason.SKIPPED),
        ("5", "BatchNorm1d", Action.FREEZE, None),
    ]
    assert report.summary() == "froze 2 of 3 norm layers"
    assert [d.path for d in report.kept] == ["2.0"]
    assert "kept, skipped" in str(report)
    assert report.to_dict()["decisions"][1]["reason"] == "skipped"


def test_a_layer_with_two_names_is_frozen_under_both():
    frozen = bntools.freeze(small()).model
    assert frozen[2][0] is frozen[2][2]
    assert is_frozen(frozen[2][2])


def test_a_model_without_such_layers_is_told():
    result = bntools.freeze(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))
    assert result.report.summary() == "the model has no norm layer to freeze"
    assert result.recipe.edits == ()


@pytest.mark.parametrize(
    ("build", "reason", "says"),
    [
        (lambda: nn.BatchNorm2d(C, track_running_stats=False), Reason.NO_STATISTICS, "track_run"),
        (lambda: EvoNorm2dB0(C, nonlinearity=False), Reason.NO_STATISTICS, "an affine"),
        (nn.LazyBatchNorm2d, Reason.UNINITIALIZED, "run the model once"),
        (lambda: torch.jit.script(nn.BatchNorm2d(C)), Reason.SCRIPTED, "before scripting"),
        (lambda: torchvision.ops.FrozenBatchNorm2d(C), Reason.ALREADY_FROZEN, "no other mode"),
        (lambda: Stubborn(C), Reason.MORE_THAN_NORM, "changes its statistics in eval mode"),
        (lambda: Batchwise(C), Reason.MORE_THAN_NORM, "statistics of the batch in eval mode"),
        (
            lambda: parametrizations.weight_norm(nn.BatchNorm2d(C), dim=None),
            Reason.COMPUTED_AFFINE,
            "parametrized",
        ),
    ],
    ids=[
        "stateless",
        "evonorm",
        "lazy",
        "scripted",
        "torchvision",
        "stubborn",
        "batchwise",
        "parametrized",
    ],
)
def test_what_cannot_be_frozen_is_left_alone_with_a_reason(build, reason, says):
    model = nn.Sequential(nn.Conv2d(3, C, 1), build())
    before = repr(model)
    result = bntools.freeze(model)
    (decision,) = result.report.decisions
    assert (decision.path, decision.action, decision.reason) == ("1", Action.KEEP, reason)
    assert says in decision.detail
    assert repr(model) == before
    assert not isinstance(result.model[1], Frozen)


def test_a_class_that_cannot_be_derived_from_is_left_alone():
    class Final(nn.BatchNorm2d):
        def __init_subclass__(cls):
            raise TypeError("Final is final")

    (decision,) = bntools.freeze(nn.Sequential(Final(C))).report.decisions
    assert decision.reason is Reason.MORE_THAN_NORM
    assert "Final is final" in decision.detail


def test_a_forward_that_is_set_on_the_layer_is_left_alone():
    """It may do anything, and to another layer than the copy that would be tried."""
    norm = nn.BatchNorm2d(C)
    norm.forward = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
    (decision,) = bntools.freeze(nn.Sequential(norm)).report.decisions
    assert decision.reason is Reason.MORE_THAN_NORM
    assert "set on the layer itself" in decision.detail


class Guarded(nn.BatchNorm2d):
    """Has a `training` flag, a `train` and a `__setattr__` of its own."""

    @property
    def training(self):
        return self.__dict__.get("_own_mode", True)

    @training.setter
    def training(self, mode):
        self.__dict__["_own_mode"] = mode

    def train(self, mode=True):
        self.__dict__["training"] = mode
        return super().train(mode)

    def __setattr__(self, name, value):
        if (
            name == "running_var"
            and "_buffers" in self.__dict__
            and self._buffers.get(name) is not None
        ):
            raise RuntimeError("it is mine")
        super().__setattr__(name, value)


def test_a_class_with_a_mode_of_its_own_is_frozen_and_comes_back():
    module = Guarded(C).train()
    x = torch.randn(4, C, 3, 3)
    expected = eval_output(module, x)
    frozen = freeze_module(module)
    assert_keeps(frozen.train(), x, expected)
    assert unfreeze_module(frozen.eval()).training is False


def test_a_hook_that_sets_the_mode_changes_nothing():
    module = nn.BatchNorm2d(C)
    x = torch.randn(4, C, 3, 3)
    expected = eval_output(module, x)
    module.register_forward_pre_hook(lambda layer, _: layer.train() and None)
    assert_keeps(freeze_module(module), x, expected)


def test_trying_a_layer_out_leaves_no_trace():
    """An own forward is tried on a copy: the layer and the random numbers stay as they were."""
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = nn.Sequential(Stubborn(C), Doubled(C))
    randomise(model)
    before = contents(model)
    bntools.freeze(model)
    assert_same_contents(contents(model), before)
    assert torch.equal(torch.rand(3), expected)


def test_patterns_that_select_nothing_are_an_error():
    with pytest.raises(PlanError, match=r"Cannot select 'layer9\.\*'"):
        bntools.freeze(small(), only="layer9.*")
    with pytest.raises(PlanError, match="Cannot select 'nope'"):
        bntools.unfreeze(small(), skip="nope")


def test_an_unknown_form_is_an_error():
    with pytest.raises(PlanError, match="'detectron': choose one of bntools, torchvision"):
        bntools.freeze(small(), form="detectron")


# Purity


@pytest.mark.parametrize("verb", [bntools.freeze, bntools.unfreeze])
def test_the_argument_is_left_as_it_was(verb):
    model = bntools.freeze(small()).model if verb is bntools.unfreeze else small()
    before = contents(model)
    result = verb(model)
    assert_same_contents(contents(model), before)
    assert result.model is not model
    assert result.model.training == model.training


def test_in_place_it_is_the_same_model():
    model = small()
    norm = model[1]
    result = bntools.freeze(model, inplace=True)
    assert result.model is model
    assert model[1] is norm
    assert is_frozen(norm)
    assert bntools.unfreeze(model, inplace=True).model is model
    assert type(norm) is nn.BatchNorm2d


def test_a_refused_pattern_changes_nothing_in_place():
    model = small()
    before = contents(model)
    with pytest.raises(PlanError, match="Cannot select"):
        bntools.freeze(model, only=["1", "nope"], inplace=True)
    assert_same_contents(contents(model), before)


def test_a_model_that_is_a_norm_itself():
    result = bntools.freeze(nn.BatchNorm2d(C))
    assert isinstance(result.model, OurFrozen)
    assert result.report.decisions[0].path == ""
    other = bntools.freeze(nn.BatchNorm2d(C), form="torchvision").model
    assert type(other) is torchvision.ops.FrozenBatchNorm2d
    assert type(bntools.unfreeze(other).model) is nn.BatchNorm2d


# Files and recipes


def test_a_file_carries_frozen_layers_and_the_recipe(tmp_path):
    result = bntools.freeze(small(), affine=True, skip="5")
    bntools.save(result, tmp_path / "frozen.pt")
    loaded = bntools.load(tmp_path / "frozen.pt").train()
    assert type(loaded[1]) is OurFrozen
    assert not loaded[1].weight.requires_grad
    assert loaded[5].training
    assert torch.equal(loaded.eval()(IMAGES), result.model.eval()(IMAGES))
    again = bntools.unfreeze(loaded)
    assert [edit.kind for edit in again.recipe.edits] == ["freeze"] * 2 + ["unfreeze"] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: bntools.freeze(m, affine=True),
        lambda m: bntools.freeze(m, form="torchvision"),
        lambda m: bntools.unfreeze(bntools.freeze(m).model),
        lambda m: bntools.fold(bntools.freeze(m).model, IMAGES),
        lambda m: bntools.freeze(bntools.fold(m, IMAGES, only="1").model),
    ],
    ids=["freeze", "torchvision", "unfreeze", "freeze and fold", "fold and freeze"],
)
def test_the_recipe_gives_a_fresh_model_the_same_architecture(change):
    result = change(small().eval())
    fresh = apply_edits(small(), result.recipe)
    fresh.load_state_dict(result.model.state_dict())
    assert repr(fresh) == repr(result.model)
    assert torch.equal(fresh.eval()(IMAGES), result.model.eval()(IMAGES))


def test_a_recipe_for_another_model_is_an_error():
    recipe = bntools.freeze(small(), form="torchvision").recipe
    other = nn.Sequential(nn.Identity(), nn.Identity(), nn.Sequential(nn.Identity()))
    with pytest.raises(SurgeryError, match="Cannot freeze 1: expected a BatchNorm2d, got a Ident"):
        apply_edits(other, recipe)


def test_a_frozen_subclass_loads_only_where_its_class_is_allowed(tmp_path):
    """It is made by `rebuild`, which is given a class that the file may use by itself."""
    result = bntools.freeze(nn.Sequential(Doubled(C), SplitBatchNorm2d(C)))
    bntools.save(result, tmp_path / "own.pt")
    name = f"{Doubled.__module__}.Doubled"
    with pytest.raises(LoadError, match=f"--allow {name}"):
        bntools.load(tmp_path / "own.pt")
    loaded = bntools.load(tmp_path / "own.pt", allow=[name]).train()
    assert type(loaded[0]) is type(result.model[0])
    assert type(loaded[1]) is frozen_class(SplitBatchNorm2d)
    x = torch.randn(4, C, 3, 3)
    assert torch.equal(loaded(x), result.model(x))


def test_layers_of_known_libraries_load_without_being_allowed(known, tmp_path):
    module, x = known
    frozen = freeze_module(module)
    bntools.save(nn.Sequential(frozen), tmp_path / "known.pt")
    (loaded,) = bntools.load(tmp_path / "known.pt").train()
    assert type(loaded) is type(frozen)
    assert torch.equal(loaded(x.clone()), frozen(x.clone()))
    assert type(unfreeze_module(loaded)) is thawed_class(type(frozen))


class Attack:
    """A pickle that calls something with these arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return rebuild, self.arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((dict,), "can run any code"),
        ((nn.parallel.DistributedDataParallel,), "distributed"),
        (("os.system",), "it calls bntools.norms.frozen.rebuild"),
        ((), "it calls bntools.norms.frozen.rebuild"),
        ((nn.BatchNorm2d, 1), "it calls bntools.norms.frozen.rebuild"),
        ((io.BytesIO,), "io.BytesIO"),
    ],
    ids=["builtin", "refused class", "text", "nothing", "two", "standard library"],
)
def test_a_file_cannot_rebuild_anything_else(arguments, says, tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(C))
    model[0].payload = Attack(*arguments)
    torch.save(model, tmp_path / "bad.pt")
    with pytest.raises(LoadError, match=says):
        bntools.load(tmp_path / "bad.pt")


def test_frozen_classes_can_be_made_like_any_layer():
    """They are importable: a model definition may name them."""
    x = torch.randn(2, C, 3, 3)
    norm = OurFrozen(C, affine=False).train()
    assert torch.equal(norm(x), nn.BatchNorm2d(C).eval()(x))
    assert type(bntools.unfreeze(nn.Sequential(norm)).model[0]) is nn.BatchNorm2d
    bare = FrozenEvoNorm2dB0(C, nonlinearity=False).train()
    assert torch.equal(bare(x), x)
    with pytest.raises(RuntimeError, match="running_mean"):
        OurFrozen(C, track_running_stats=False)(x)


def test_rebuilding_what_is_no_module_is_an_error():
    with pytest.raises(TypeError, match="expected a class of modules"):
        rebuild(dict)


def test_frozen_classes_know_their_origin():
    assert thawed_class(OurFrozen) is nn.BatchNorm2d
    assert thawed_class(nn.BatchNorm2d) is None
    assert frozen_class(OurFrozen) is OurFrozen
    assert frozen_class(Doubled) is frozen_class(Doubled)


def test_a_class_that_was_written_frozen_has_no_other():
    class Mixin:
        pass

    class Own(OurFrozen, Mixin):
        pass

    model = nn.Sequential(Own(C))
    assert bntools.freeze(model).report.decisions[0].reason is Reason.ALREADY_FROZEN
    (decision,) = bntools.unfreeze(model).report.decisions
    assert decision.reason is Reason.MORE_THAN_NORM
    assert "written frozen" in decision.detail


# Other verbs on frozen models


@pytest.mark.parametrize("form", ["bntools", "torchvision"])
def test_frozen_layers_fold_as_plain_ones(form):
    model = small().eval()
    frozen = bntools.freeze(model, form=form).model
    plain, other = bntools.fold(model, IMAGES), bntools.fold(frozen, IMAGES)
    assert [d.path for d in other.report.folds] == [d.path for d in plain.report.folds] != []
    torch.testing.assert_close(other.model(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_frozen_fused_layer_folds_and_keeps_its_activation():
    model = nn.Sequential(nn.Conv2d(3, C, 3), BatchNormAct2d(C)).eval()
    randomise(model)
    folded = bntools.fold(bntools.freeze(model).model, IMAGES)
    assert len(folded.report.folds) == 1
    torch.testing.assert_close(folded.model(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_the_doctor_says_that_a_layer_is_frozen():
    inspection = bntools.inspect(bntools.freeze(small()).model, IMAGES)
    assert all(health.frozen for health in inspection.layers)
    assert inspection.layers[0].kind == "FrozenBatchNorm2d"
    assert not any(
        finding.code == "training-mode" for finding in inspection.findings if finding.path
    )


# torchvision's and detectron's form


def test_torchvisions_form_and_back():
    model = small().eval()
    result = bntools.freeze(model, form="torchvision")
    assert type(result.model[1]) is torchvision.ops.FrozenBatchNorm2d
    assert type(result.model[2][2]) is torchvision.ops.FrozenBatchNorm2d
    assert result.report.kept[0].reason is Reason.NO_SUCH_FORM
    torch.testing.assert_close(result.model(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    back = bntools.unfreeze(result.model).model
    assert type(back[1]) is nn.BatchNorm2d
    assert back[1].weight.requires_grad
    torch.testing.assert_close(back(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    back.train()(IMAGES)
    assert int(back[1].num_batches_tracked) == 1


def test_timms_form_and_back():
    model = nn.Sequential(BatchNormAct2d(C, act_layer=nn.SiLU, inplace=False)).eval()
    randomise(model)
    x = torch.randn(2, C, 3, 3)
    frozen = bntools.freeze(model, form="torchvision").model
    assert type(frozen[0]) is FrozenBatchNormAct2d
    torch.testing.assert_close(frozen(x), model(x))
    back = bntools.unfreeze(frozen).model
    assert type(back[0]) is BatchNormAct2d
    torch.testing.assert_close(back(x), model(x))


def test_eps_and_missing_affine_carry_over():
    norm = nn.BatchNorm2d(C, eps=0.1, affine=False)
    randomise(norm)
    x = torch.randn(2, C, 3, 3)
    frozen = to_frozen_batchnorm(norm)
    torch.testing.assert_close(frozen(x), norm.eval()(x))
    torch.testing.assert_close(from_frozen_batchnorm(frozen).eval()(x), norm(x))
    assert to_frozen_batchnorm(freeze_module(norm).double()).weight.dtype == torch.float64


def test_a_copy_of_detectrons_form_is_known_by_its_name():
    model = nn.Sequential(nn.Conv2d(3, C, 3), DetectronStyle(C)).eval()
    randomise(model)
    assert is_frozen(model[1])
    assert bntools.freeze(model).report.decisions[0].reason is Reason.ALREADY_FROZEN
    back = bntools.unfreeze(model).model
    assert type(back[1]) is nn.BatchNorm2d
    torch.testing.assert_close(back(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_of_another_kind_is_left_alone():
    """The name is not enough: what it gives is compared."""

    class FrozenBatchNorm2d(DetectronStyle):
        def forward(self, x):
            return super().forward(x).relu()

    (decision,) = bntools.unfreeze(nn.Sequential(FrozenBatchNorm2d(C))).report.decisions
    assert decision.reason is Reason.MORE_THAN_NORM

    class FrozenBatchNorm(nn.Identity):
        pass

    (decision,) = bntools.unfreeze(nn.Sequential(FrozenBatchNorm())).report.decisions
    assert decision.reason is Reason.MORE_THAN_NORM


def test_hooks_of_a_layer_that_would_be_another_object_are_not_lost():
    model = small()
    model[1].register_forward_hook(lambda *_: None)
    report = bntools.freeze(model, form="torchvision", only="1").report
    assert report.decisions[0].reason is Reason.HOOKS
    kept = bntools.freeze(model).model
    assert kept[1]._forward_hooks


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(C), nn.SyncBatchNorm(C), Doubled(C), nn.GroupNorm(1, C)]
)
def test_other_layers_have_no_such_form(module):
    with pytest.raises(TypeError, match="expected a BatchNorm2d"):
        to_frozen_batchnorm(module)
    with pytest.raises(TypeError, match="expected a FrozenBatchNorm2d"):
        from_frozen_batchnorm(nn.Identity())


# SyncBatchNorm


def test_sync_batch_norm_becomes_that_of_its_inputs():
    model = nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.SyncBatchNorm(C),
        nn.Flatten(),
        nn.Linear(C * 16, C),
        nn.SyncBatchNorm(C),
    )
    randomise(model)
    before = contents(model)
    result = bntools.unsync(model, IMAGES)
    assert_same_contents(contents(model), before)
    assert [type(result.model[i]) for i in (1, 4)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert result.report.summary() == "converted 2 of 2 norm layers"
    assert torch.equal(result.model.eval()(IMAGES), model.eval()(IMAGES))
    fresh = apply_edits(copy.deepcopy(model), result.recipe)
    assert repr(fresh) == repr(result.model)
    reborn = nn.SyncBatchNorm.convert_sync_batchnorm(result.model)
    assert list(reborn.state_dict()) == list(model.state_dict())


def test_timms_sync_layers_keep_their_activation():
    """The converters of torch and others lose it."""
    model = timm.create_model("resnet18", norm_layer="batchnorm2d").eval()
    fused = nn.Sequential(nn.Conv2d(3, C, 3), BatchNormAct2d(C, act_layer=nn.Tanh), model.act1)
    synced = convert_sync_batchnorm(fused).eval()
    assert type(synced[1]) is SyncBatchNormAct
    randomise(synced)
    plain = bntools.unsync(synced, IMAGES).model
    assert type(plain[1]) is BatchNormAct2d
    assert torch.equal(plain(IMAGES), synced(IMAGES))
    scripted = torch.jit.script(plain)
    assert torch.equal(scripted(IMAGES), synced(IMAGES))


def test_a_frozen_sync_layer_stays_frozen():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.SyncBatchNorm(C))
    frozen = bntools.freeze(model, affine=True).model
    plain = bntools.unsync(frozen, IMAGES).model
    assert type(plain[1]) is OurFrozen
    thawed = bntools.unfreeze(plain).model
    assert type(thawed[1]) is nn.BatchNorm2d
    assert thawed[1].weight.requires_grad


def test_sync_layers_that_cannot_be_converted_say_why():
    class Own(nn.SyncBatchNorm):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.unused, self.both = Own(3), nn.SyncBatchNorm(3), nn.SyncBatchNorm(3)

        def forward(self, x):
            return self.both(self.own(x)).sum() + self.both(x.mean((2, 3))).sum()

    reasons = {d.path: d.reason for d in bntools.unsync(Net(), IMAGES).report.decisions}
    assert reasons == {
        "own": Reason.MORE_THAN_NORM,
        "unused": Reason.NOT_EXECUTED,
        "both": Reason.DATA_DEPENDENT,
    }
    with pytest.raises(TypeError, match="expected a SyncBatchNorm"):
        to_batch_norm(nn.BatchNorm2d(C), 2)


def test_a_model_that_does_not_run_cannot_be_unsynced():
    model = nn.Sequential(nn.Linear(7, C), nn.SyncBatchNorm(C))
    with pytest.raises(InputError, match=r"Cannot run the model: .* Give example inputs"):
        bntools.unsync(model, torch.zeros(1, 3))
    assert not model[1]._forward_pre_hooks
    report = bntools.unsync(small()).report
    assert report.summary() == "the model has no SyncBatchNorm layer to unsync"


# Real models


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_100"])
def test_a_whole_timm_model_trains_with_its_statistics_fixed(name):
    model = timm.create_model(name, num_classes=4)
    frozen = bntools.freeze(model).model.train()
    before = {n: t.clone() for n, t in frozen.named_buffers()}
    optimizer = torch.optim.SGD(frozen.parameters(), 0.01)
    for _ in range(2):
        loss = frozen(torch.randn(2, 3, 64, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in frozen.named_buffers())
    assert loss.isfinite()
    model.load_state_dict(frozen.state_dict())


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_zoo_is_frozen_whole(name):
    """With every norm layer set to training mode no buffer changes; unfrozen, it is as it was."""
    model = MODELS[name].build().eval()
    if not norms(model):
        pytest.skip("it has no norm layers")
    said = repr(model)
    result = bntools.freeze(model, inplace=True)
    foreign = {d.reason for d in result.report.kept}
    assert foreign <= {Reason.ALREADY_FROZEN}
    before = {n: t.clone() for n, t in model.named_buffers()}
    for norm in norms(model).values():
        norm.train()
    run(model, MODELS[name].example(1))
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers())
    if not foreign:
        assert repr(bntools.unfreeze(model, inplace=True).model) == said


def test_paths_of_the_report_lead_to_the_layers():
    model = torchvision.models.resnet18()
    result = bntools.freeze(model, only="layer1.*")
    assert len(result.report.changed) == 4
    for decision in result.report.decisions:
        frozen = is_frozen(get_module(result.model, decision.path))
        assert frozen == decision.path.startswith("layer1.")


def test_errors_are_those_of_bntools():
    for error in (PlanError, SurgeryError, InputError, LoadError):
        assert issubclass(error, BNToolsError)


def test_a_pruned_weight_stops_with_the_affine():
    """What trains is `weight_orig`; the layer's weight is computed of it."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    frozen = bntools.freeze(model, affine=True).model
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in bntools.unfreeze(frozen).model.parameters())


def test_unsync_sees_inputs_that_are_given_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.SyncBatchNorm(3)

        def forward(self, x):
            return self.bn(input=x)

    assert type(bntools.unsync(Model(), torch.zeros(1, 3, 4, 4)).model.bn) is nn.BatchNorm2d


def test_a_weight_that_two_layers_share_trains_again():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    frozen = bntools.freeze(model, affine=True).model
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in bntools.unfreeze(frozen).model.parameters())
