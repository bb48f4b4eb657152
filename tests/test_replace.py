"""Replacing norms: what carries over, which groups, what is refused, and that the result lasts."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
from randomise import named_modules, norms, randomise, settle
from replace_models import Residual
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import bntools
from bntools.errors import FitError, InputError, LoadError, SurgeryError, TargetError
from bntools.norms import ChannelLayerNorm, EvoNorm2dB0, EvoNorm2dS0
from bntools.recipe import Recipe, apply_edits, recipe_of
from bntools.report import Action, Reason
from bntools.targets import Shape, Site

TARGETS = {
    "groupnorm": bntools.ToGroupNorm(groups=2),
    "layernorm": bntools.ToLayerNorm(),
    "layernorm-channels": bntools.ToLayerNorm(over="channels"),
    "instancenorm": bntools.ToInstanceNorm(),
    "evonorm-s0": bntools.ToEvoNormS0(groups=2),
    "evonorm-b0": bntools.ToEvoNormB0(),
}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


class Bias(nn.BatchNorm2d):
    """A subclass that only normalises, in a forward of its own."""

    def forward(self, x):
        return super().forward(x)


class WithReLU(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


def net(norm: nn.Module, *after: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, norm.num_features, 3), norm, *after).eval()
    randomise(model)
    settle(model, X)
    return model


def state(model: nn.Module) -> dict:
    modules = {path: (type(m), m.training) for path, m in named_modules(model)}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"modules": modules, "flags": flags, **copy.deepcopy(model.state_dict())}


def same_state(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def expected(target: object, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """What a target stands for, written down once more."""
    n, c = x.shape[:2]
    dims = {
        "ToGroupNorm": lambda: x.reshape(n, 2, -1),
        "ToLayerNorm": lambda: x.reshape(n, 1, -1),
        "ToInstanceNorm": lambda: x.reshape(n, c, -1),
    }[type(target).__name__]()
    mean, var = dims.mean(-1, keepdim=True), dims.var(-1, unbiased=False, keepdim=True)
    y = ((dims - mean) / (var + norm.eps).sqrt()).reshape(x.shape)
    shape = (1, c, *[1] * (x.dim() - 2))
    return y * norm.weight.reshape(shape) + norm.bias.reshape(shape)


# What carries over


@pytest.mark.parametrize("target", ["groupnorm", "layernorm", "instancenorm"])
@pytest.mark.parametrize(
    ("norm", "size"),
    [(nn.BatchNorm1d, (9,)), (nn.BatchNorm2d, (5, 4)), (nn.BatchNorm3d, (2, 3, 4))],
)
def test_the_new_layer_does_what_its_name_says_in_float64(target, norm, size):
    old = norm(4, eps=0.03).double()
    randomise(old)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    made = TARGETS[target].build(old)
    torch.testing.assert_close(made(x), expected(TARGETS[target], x, old), rtol=1e-12, atol=1e-12)


def test_a_layer_norm_over_channels_normalises_each_position():
    old = nn.BatchNorm2d(4, eps=0.03).double()
    randomise(old)
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    y = F.layer_norm(x.permute(0, 2, 3, 1), (4,), old.weight, old.bias, old.eps)
    made = TARGETS["layernorm-channels"].build(old)
    torch.testing.assert_close(made(x), y.permute(0, 3, 1, 2), rtol=1e-12, atol=1e-12)


@every_target
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_affine_eps_dtype_flags_and_mode_carry_over(target, dtype):
    old = nn.BatchNorm2d(8, eps=0.07).to(dtype).eval()
    randomise(old)
    old.weight.requires_grad_(False)
    made = target.build(old, nn.ReLU())
    assert torch.equal(made.weight, old.weight)
    assert torch.equal(made.bias, old.bias)
    assert made.weight.data_ptr() != old.weight.data_ptr()
    assert made.weight.dtype == made.bias.dtype == dtype
    assert (made.weight.requires_grad, made.bias.requires_grad) == (False, True)
    assert (made.eps, made.training) == (0.07, False)


@pytest.mark.parametrize("target", ["groupnorm", "layernorm", "instancenorm"])
def test_a_norm_without_affine_becomes_a_layer_without_one(target):
    made = TARGETS[target].build(nn.BatchNorm2d(8, affine=False))
    assert made.weight is None
    assert made.bias is None


def test_the_running_variance_of_b0_starts_as_that_of_the_batch_norm():
    old = nn.BatchNorm2d(8, momentum=0.3)
    randomise(old)
    made = bntools.ToEvoNormB0().build(old, nn.ReLU())
    assert torch.equal(made.running_var, old.running_var)
    assert made.momentum == 0.3


@pytest.mark.parametrize("name", ["evonorm-s0", "evonorm-b0"])
def test_an_evonorm_without_nonlinearity_starts_as_the_norm_in_eval_mode(name):
    old = nn.BatchNorm2d(8).double().eval()
    randomise(old)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    made = TARGETS[name].build(old)
    assert not made.nonlinearity
    torch.testing.assert_close(made(x), old(x), rtol=1e-10, atol=1e-10)


# Kinds of norms


@every_target
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: nn.SyncBatchNorm(4),
        lambda: Bias(4),
    ],
    ids=["plain", "no affine", "no statistics", "sync", "subclass"],
)
def test_every_kind_of_batch_norm_is_replaced(make, target):
    model = net(make(), nn.ReLU())
    before = state(model)
    result = bntools.replace(model, target, X)
    assert len(result.report.replaced) == 1
    assert norms(result.model).keys() <= {"1"}
    assert not isinstance(result.model[1], nn.modules.batchnorm._BatchNorm)
    assert result.model(X).isfinite().all()
    assert same_state(before, state(model))


@every_target
def test_frozen_batch_norms_are_replaced_and_stay_without_gradients(target):
    from torchvision.ops import FrozenBatchNorm2d

    layer = FrozenBatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU()).eval()
    randomise(model)
    new = bntools.replace(model, target, X).model[1]
    assert type(new) is not FrozenBatchNorm2d
    assert not new.weight.requires_grad
    if target.name in ("groupnorm", "layernorm", "instancenorm"):
        assert torch.equal(new.weight, layer.weight)


def test_what_bntools_froze_is_replaced():
    model = bntools.freeze(net(nn.BatchNorm2d(4), nn.ReLU()), affine=True).model
    new = bntools.replace(model, "layernorm", X).model[1]
    assert type(new) is nn.GroupNorm
    assert not new.weight.requires_grad


def test_a_frozen_norm_becomes_a_b0_that_stays_frozen():
    """Its variance would move in training, and v, when the affine were to stay."""
    model = bntools.freeze(net(nn.BatchNorm2d(4), nn.ReLU()), affine=True).model
    for fit in (None, [X, X + 1]):
        new = bntools.replace(model, "evonorm-b0", X, fit=fit).model[1]
        before = new.running_var.clone()
        new.train()(torch.randn(4, 4, 5, 5))
        assert torch.equal(new.running_var, before)
        assert not any(p.requires_grad for p in new.parameters())
    assert type(bntools.unfreeze(new).model) is EvoNorm2dB0


def test_a_cumulative_average_stays_one():
    model = net(nn.BatchNorm2d(4, momentum=None), nn.ReLU())
    assert bntools.replace(model, "evonorm-b0", X).model[1].momentum is None


def test_a_lazy_norm_is_made_first():
    model = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()).eval()
    new = bntools.replace(model, bntools.ToGroupNorm(groups=3), X).model
    assert repr(new[1]).startswith("GroupNorm(3, 6")


def test_a_parametrised_norm_gets_the_value_that_its_weight_has():
    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", Halve())
    model = net(norm)
    result = bntools.replace(model, "layernorm", X)
    assert torch.equal(result.model[1].weight, norm.weight)
    assert not hasattr(result.model[1], "parametrizations")
    assert "parametrised" in result.report.layers[0].note


def test_a_shared_norm_is_one_new_layer_at_both_places():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(OrderedDict(a=norm, b=nn.Conv2d(3, 3, 1), c=norm)).eval()
    randomise(model)
    result = bntools.replace(model, "layernorm", X)
    assert result.model.a is result.model.c
    assert type(result.model.a) is nn.GroupNorm
    assert len(result.report.layers) == 1


def test_a_subclass_that_does_more_is_kept_and_says_how_to_teach_it():
    model = net(WithReLU(4))
    row = bntools.replace(model, "groupnorm", X).report.layers[0]
    assert (row.action, row.reason) == (Action.KEEP, Reason.MORE_THAN_NORM)
    assert "register_norm" in row.detail


def test_hooks_and_scripted_layers_keep_their_layer():
    hooked = net(nn.BatchNorm2d(4))
    hooked[1].register_forward_hook(lambda *_: None)
    scripted = net(nn.BatchNorm2d(4))
    scripted[1] = torch.jit.script(scripted[1])
    for model, reason in ((hooked, Reason.HOOKS), (scripted, Reason.SCRIPTED)):
        report = bntools.replace(model, "groupnorm", X).report
        assert [row.reason for row in report.layers] == [reason]


def test_a_norm_that_did_not_run_is_replaced_unless_its_surroundings_matter():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "idle": nn.BatchNorm2d(4)})
    model.forward = model["conv"].forward
    model.eval()
    row = bntools.replace(model, "groupnorm", X).report.layers[0]
    assert row.action is Action.REPLACE
    assert "did not run" in row.note
    for target in ("evonorm-s0", "instancenorm"):
        row = bntools.replace(model, target, X).report.layers[0]
        assert row.reason is Reason.NOT_EXECUTED


def test_timm_layers_keep_drop_and_activation_or_give_it_away():
    from timm.layers import BatchNormAct2d

    def build():
        return net(BatchNormAct2d(4))

    grouped = bntools.replace(build(), bntools.ToGroupNorm(groups=2), X).model[1]
    assert list(dict(grouped.named_children())) == ["norm", "act"]
    y = torch.randn(2, 4, 3, 3)
    assert torch.equal(grouped(y), F.relu(grouped.norm(y)))
    taken = bntools.replace(build(), "evonorm-s0", X)
    assert type(taken.model[1]) is EvoNorm2dS0
    assert taken.report.layers[0].activation == "its own ReLU"
    kept = bntools.replace(
        build(), "evonorm-s0", X, options=bntools.ReplaceOptions(keep_activation=True)
    )
    assert type(kept.model[1].norm) is EvoNorm2dS0
    assert kept.model[1].norm.nonlinearity


def test_a_timm_layer_with_another_activation_is_kept():
    from timm.layers import BatchNormAct2d

    row = bntools.replace(net(BatchNormAct2d(4, act_layer=nn.Mish)), "evonorm-s0", X).report.layers[
        0
    ]
    assert row.reason is Reason.ACTIVATION_STAYS
    assert "Mish" in row.detail


# Groups


@pytest.mark.parametrize(
    ("channels", "wanted", "groups"),
    [(24, 5, 4), (64, 32, 32), (7, 4, 1), (48, 32, 24), (6, 100, 6)],
)
def test_a_group_count_that_does_not_divide_becomes_the_nearest_divisor(channels, wanted, groups):
    nearest = min(
        (n for n in range(1, channels + 1) if channels % n == 0), key=lambda n: abs(n - wanted)
    )
    assert abs(groups - wanted) == abs(nearest - wanted)
    found = bntools.ToGroupNorm(groups=wanted).resolved(Shape(channels, 16, 2))
    assert found.target.groups == groups
    assert bool(found.note) == (groups != wanted)


def test_the_report_says_which_groups_were_chosen():
    row = bntools.replace(net(nn.BatchNorm2d(6)), bntools.ToGroupNorm(groups=4), X).report.layers[0]
    assert row.groups == 3
    assert "as 4 do not divide 6" in row.note


def test_channels_per_group_decides():
    model = bntools.replace(net(nn.BatchNorm2d(12)), bntools.ToGroupNorm(channels_per_group=4), X)
    assert model.model[1].num_groups == 3


def test_on_maps_of_one_value_groups_have_two_channels_at_least():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).eval()
    result = bntools.replace(model, bntools.ToGroupNorm(groups=8), torch.randn(2, 3))
    assert result.model[1].num_groups == 4
    assert "one value each" in result.report.layers[0].note


@pytest.mark.parametrize(
    ("target", "channels"),
    [("instancenorm", 8), ("groupnorm", 1), ("layernorm", 1), ("evonorm-s0", 1)],
)
def test_nothing_to_normalise_is_refused_with_the_reason(target, channels):
    model = nn.Sequential(nn.Linear(3, channels), nn.BatchNorm1d(channels), nn.ReLU()).eval()
    row = bntools.replace(model, target, torch.randn(4, 3)).report.layers[0]
    assert row.reason is Reason.ONE_VALUE


def test_an_instance_norm_on_1x1_maps_is_refused_and_inferred_sizes_are_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 64), nn.BatchNorm2d(8)).eval()
    row = bntools.replace(model, "instancenorm").report.layers[0]
    assert row.reason is Reason.ONE_VALUE
    assert "1x1" in row.detail
    assert "--input-shape" in row.detail


@every_target
def test_a_batch_of_one_runs_and_trains(target):
    model = bntools.replace(
        net(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), target, X[:1]
    ).model
    model.train()(X[:1]).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Factories


def make_norm(norm: nn.Module) -> nn.Module:
    return nn.GroupNorm(1, norm.num_features)


def test_a_callable_makes_the_new_layer_in_dtype_and_mode_of_the_old():
    model = net(nn.BatchNorm2d(4)).double()
    result = bntools.replace(model, make_norm, X.double())
    assert result.model[1].weight.dtype == torch.float64
    assert not result.model[1].training
    assert result.recipe.to_dict()["edits"][0]["target"] == {"name": f"{__name__}:make_norm"}


def test_a_recipe_with_a_factory_runs_no_code():
    recipe = Recipe.from_dict(
        bntools.replace(net(nn.BatchNorm2d(4)), make_norm, X).recipe.to_dict()
    )
    with pytest.raises(TargetError, match="runs no code of others"):
        apply_edits(net(nn.BatchNorm2d(4)), recipe)


@pytest.mark.parametrize("target", [None, 3, {}, {"name": "groupnorm", "size": 3}])
def test_a_damaged_recipe_is_told(target):
    data = {"version": 1, "edits": [{"edit": "replace-norm", "path": "1", "target": target}]}
    with pytest.raises(TargetError, match="damaged target"):
        apply_edits(net(nn.BatchNorm2d(4)), Recipe.from_dict(data))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda norm: norm, "the old layer"),
        (lambda norm: 3, "a int"),
        (lambda norm: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_factory_that_gives_nothing_useful_is_told(factory, said):
    with pytest.raises(TargetError, match=said):
        bntools.replace(net(nn.BatchNorm2d(4)), factory, X)


def test_a_factory_whose_layer_does_not_run_is_told():
    model = net(nn.BatchNorm2d(4))
    before = state(model)
    with pytest.raises(SurgeryError, match="Cannot run the model with its new layers"):
        bntools.replace(model, lambda norm: nn.LayerNorm(99), X)
    assert same_state(before, state(model))


# Bad input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bntools.ToGroupNorm(groups=0), "groups=0"),
        (lambda: bntools.ToGroupNorm(groups=-2), "groups=-2"),
        (lambda: bntools.ToGroupNorm(groups=2.5), "groups=2.5"),
        (lambda: bntools.ToGroupNorm(groups=True), "groups=True"),
        (lambda: bntools.ToEvoNormS0(groups="most"), "or 'auto'"),
        (lambda: bntools.ToGroupNorm(channels_per_group=0), "channels_per_group=0"),
        (lambda: bntools.ToLayerNorm(over="images"), "'sample' or 'channels'"),
        (lambda: bntools.named_target("gruopnorm"), "Did you mean groupnorm"),
        (lambda: bntools.named_target("evonorm"), "evonorm-s0"),
        (lambda: bntools.named_target("layernorm", groups=2), "no such option"),
        (lambda: bntools.named_target("torch:pi"), "cannot be called"),
        (lambda: bntools.ReplaceOptions(no_activation="drop"), "'affine' or 'keep'"),
        (lambda: bntools.ReplaceOptions(distill=-1), "0 or more"),
        (lambda: bntools.replace(net(nn.BatchNorm2d(4)), 7, X), "give a target"),
    ],
)
def test_a_malformed_target_is_told(make, said):
    with pytest.raises(TargetError, match=said):
        make()


def test_a_number_without_a_name_is_the_number_of_groups():
    """Not, by the order of the bases, the nonlinearity."""
    assert bntools.ToEvoNormS0(4) == bntools.ToEvoNormS0(groups=4)
    with pytest.raises(TypeError, match="positional argument"):
        bntools.ToEvoNormB0(4)


@pytest.mark.parametrize(
    "edit",
    [
        {"edit": "unsync", "path": "1"},
        {"edit": "unsync", "path": "1", "dims": "two"},
        {"edit": "freeze", "path": "1", "form": "package.module:factory"},
        {"edit": "add-bias", "path": "0", "channels": 10**12},
    ],
    ids=lambda edit: " ".join(map(str, edit.values())),
)
def test_a_damaged_edit_is_told(edit):
    with pytest.raises(SurgeryError, match=f"Cannot {edit['edit'].partition('-')[0]}"):
        apply_edits(net(nn.BatchNorm2d(4)), Recipe.from_dict({"version": 1, "edits": [edit]}))


def test_loading_a_file_imports_no_factory_that_its_recipe_names(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "hostile.py").write_text(f"open({str(ran)!r}, 'w')\nmake = print\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit = {"edit": "replace-norm", "path": "1", "target": {"name": "hostile:make"}}
    recipe = {"version": 1, "edits": [edit]}
    content = {"model": net(nn.BatchNorm2d(4)), "bntools_recipe": recipe, "bntools_version": "0"}
    torch.save(content, tmp_path / "hostile.pt")
    model = bntools.load(tmp_path / "hostile.pt")
    bntools.save(bntools.fold(model, X), tmp_path / "folded.pt")
    bntools.load(tmp_path / "folded.pt")
    with pytest.raises(TargetError, match="runs no code of others"):
        apply_edits(net(nn.BatchNorm2d(4)), recipe_of(model))
    assert not ran.exists()


def test_a_factory_that_cannot_be_imported_is_told():
    with pytest.raises(LoadError, match="no module named 'nowhere'"):
        bntools.named_target("nowhere:norm")


@pytest.mark.parametrize(
    "data",
    [[], iter(()), torch.empty(0, 3, 8, 8), [torch.full((4, 3, 8, 8), math.nan)], 3],
    ids=["no batch", "an empty iterator", "no sample", "not finite", "no data"],
)
def test_data_that_says_nothing_is_refused_and_nothing_changes(data):
    model = net(nn.BatchNorm2d(4))
    before = state(model)
    with pytest.raises((FitError, InputError)):
        bntools.replace(model, "groupnorm", X, fit=data)
    assert same_state(before, state(model))


def test_too_few_values_for_a_fit_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(FitError, match="1"):
        bntools.replace(model, "layernorm", fit=torch.randn(1, 3))


def test_distilling_without_data_is_refused():
    with pytest.raises(FitError, match="without data"):
        bntools.replace(
            net(nn.BatchNorm2d(4)), "groupnorm", X, options=bntools.ReplaceOptions(distill=3)
        )


def test_a_model_without_norms_stays_and_says_so():
    result = bntools.replace(nn.Sequential(nn.Conv2d(3, 4, 3)), "groupnorm", X)
    assert result.report.layers == ()
    assert "no norm layer to replace" in result.report.summary()


def test_only_and_skip_choose():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    report = bntools.replace(model, "layernorm", X, only="2").report
    assert [row.reason for row in report.layers] == [Reason.SKIPPED, None]
    with pytest.raises(bntools.BNToolsError, match="no norm layer has such a path"):
        bntools.replace(model, "layernorm", X, skip="layer1.*")


# The result lasts


def residual() -> nn.Module:
    """The same network on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Residual().eval()
    randomise(model)
    settle(model, X)
    return model


@every_target
def test_the_result_saves_loads_and_its_recipe_rebuilds_it(target, tmp_path):
    model = residual()
    result = bntools.replace(model, target, X)
    bntools.save(result, tmp_path / "new.pt")
    again = bntools.load(tmp_path / "new.pt", allow=("replace_models.Residual",))
    assert torch.equal(again(X), result.model(X))
    assert recipe_of(again) == result.recipe == Recipe.from_dict(result.recipe.to_dict())
    rebuilt = apply_edits(residual(), Recipe.from_dict(result.recipe.to_dict()))
    assert rebuilt.state_dict().keys() == result.model.state_dict().keys()
    assert torch.equal(rebuilt(X), result.model(X))


def test_what_is_kept_folds_afterwards_and_the_recipes_chain():
    model = residual()
    result = bntools.replace(model, "evonorm-s0", X, only="bn1")
    folded = bntools.fold(result.model, X)
    assert len(folded.report.folds) == 1
    assert folded.report.check
    assert bntools.verify(result.model, folded.model, X)
    kinds = [edit["edit"] for edit in folded.recipe.to_dict()["edits"]]
    assert kinds[:2] == ["replace-norm", "remove-activation"]
    assert kinds[-1] == "drop-norm"
    rebuilt = apply_edits(residual(), folded.recipe)
    assert rebuilt.state_dict().keys() == folded.model.state_dict().keys()


@pytest.mark.parametrize("target", ["evonorm-s0", "evonorm-b0"])
def test_an_evonorm_without_nonlinearity_folds_as_the_affine_that_it_is(target):
    model = bntools.replace(net(nn.BatchNorm2d(4)), target, X).model
    result = bntools.fold(model, X)
    assert type(result.model[1]) is nn.Identity
    torch.testing.assert_close(result.model(X), model(X), rtol=1e-4, atol=1e-4)
    active = bntools.replace(net(nn.BatchNorm2d(4), nn.ReLU()), target, X).model
    assert not bntools.fold(active, X).report.folds


def test_one_layer_after_the_other_gives_the_same_as_both_at_once():
    model = residual()
    both = bntools.replace(model, "evonorm-s0", X).model
    first = bntools.replace(model, "evonorm-s0", X, only="bn1").model
    second = bntools.replace(first, "evonorm-s0", X).model
    assert torch.equal(second(X), both(X))


@pytest.mark.filterwarnings("ignore")  # of the exporter
@every_target
def test_the_result_exports_to_onnx_and_is_the_same_there(target, tmp_path):
    import onnxruntime

    model = bntools.replace(residual(), target, X).model
    torch.onnx.export(model, (X,), tmp_path / "m.onnx", dynamo=True, optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(X).detach(), rtol=1e-4, atol=1e-4)


def test_the_rng_and_the_grad_mode_of_the_caller_stay():
    model = residual()
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    bntools.replace(model, "evonorm-b0", X)
    assert torch.equal(torch.rand(3), expected_draw)
    assert torch.is_grad_enabled()


# Fitting


def test_a_fit_brings_the_network_nearer_and_auto_groups_reach_the_recipe():
    model = residual()
    data = torch.randn(64, 3, 8, 8) * 2 + 0.3
    truth = model(data).detach()

    def far(candidate):
        return float((candidate(data).detach() - truth).norm() / truth.norm())

    plain = bntools.replace(model, bntools.ToGroupNorm(groups=2), X)
    fitted = bntools.replace(model, bntools.ToGroupNorm(groups="auto"), fit=data.split(16))
    assert far(fitted.model) < 0.8 * far(plain.model)
    assert fitted.report.fit is not None
    for row, edit in zip(fitted.report.replaced, fitted.recipe.edits, strict=True):
        layer = fitted.model.get_submodule(row.path)
        assert row.groups == layer.num_groups == edit.options["target"]["groups"]
    rebuilt = apply_edits(residual(), fitted.recipe)
    assert rebuilt.bn1.num_groups == fitted.model.bn1.num_groups


def test_a_norm_without_affine_gets_one_for_the_fit():
    model = net(nn.BatchNorm2d(4, affine=False))
    data = torch.randn(64, 3, 8, 8) * 2 + 0.3
    result = bntools.replace(model, "layernorm", fit=[data])
    assert result.model[1].weight is not None
    truth = model(data).detach()
    assert float((result.model(data).detach() - truth).norm() / truth.norm()) < 0.7


def test_a_site_teaches_what_the_old_norm_and_its_activation_gave():
    norm = nn.BatchNorm2d(4).eval()
    randomise(norm)
    x = torch.randn(2, 4, 3, 3)
    site = Site("bn", "bn", bntools.ToEvoNormS0(), nn.SiLU())
    assert torch.equal(site.teach(norm, x), F.silu(norm(x)))
    loose = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert torch.equal(Site("bn", "bn", bntools.ToGroupNorm()).teach(loose, x), loose(x))


def test_the_report_says_without_data_that_the_model_needs_training():
    report = bntools.replace(net(nn.BatchNorm2d(4)), "groupnorm", X).report
    assert any("not fitted" in warning for warning in report.warnings)
    data = report.to_dict()
    assert data["layers"][0]["action"] == "replace"
    assert data["target"] == {"name": "groupnorm", "groups": 32}
    assert str(report).endswith(report.summary())


def test_b0_and_s0_keep_their_kind_of_maps():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()).eval()
    for target in ("evonorm-s0", "evonorm-b0"):
        new = bntools.replace(model, target, torch.randn(2, 3, 8)).model
        assert type(new[1]).__name__.startswith("EvoNorm1d")
        assert type(new[2]) is nn.Identity
    model = net(nn.SyncBatchNorm(4), nn.ReLU())
    assert type(bntools.replace(model, "evonorm-b0", X).model[1]) is EvoNorm2dB0


def test_a_layer_norm_over_channels_is_ours():
    new = bntools.replace(net(nn.BatchNorm2d(4)), TARGETS["layernorm-channels"], X).model
    assert type(new[1]) is ChannelLayerNorm
