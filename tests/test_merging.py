"""Parallel linear branches become one layer: blocks of the literature, and hostile look-alikes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from branch_models import (
    ACBlock,
    CroppedACBlock,
    DilatedBranches,
    DiverseBranch,
    NormAfterSum,
    PaddedDiverseBranch,
    RepConv,
    RepMixer,
    Sum,
    branches,
)
from randomise import difference, outputs, randomise
from torch import nn
from torch.nn import functional as F

import bntools
from bntools.errors import SurgeryError
from bntools.merging import merges as merges_module
from bntools.recipe import Recipe, apply_edits
from bntools.report import Action, Reason

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose2d)
MAPS = (1, 6, 9, 11)


def merged(model: nn.Module, shape=MAPS, **options):
    """A fold with merges of a model with random statistics; the argument stays as it was."""
    torch.manual_seed(0)
    randomise(model.eval())
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    x = torch.randn(shape)
    result = bntools.fold(model, x, **({"merge_branches": True} | options))
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return result


def layer_count(model: nn.Module) -> int:
    return sum(isinstance(module, LAYERS) for module in model.modules())


def is_same(model: nn.Module, result, shape=MAPS) -> bool:
    """Whether the float32 result, computed in float64, is the model but for one rounding."""
    x = torch.randn(3, *shape[1:], dtype=torch.float64)
    mine = outputs(copy.deepcopy(result.model).double(), x)
    truth = outputs(copy.deepcopy(model).double(), x)
    return difference(mine, truth) < 1e-5


def left_reasons(result) -> list[Reason]:
    return [row.reason for row in result.report.merging.left]


BLOCKS = {
    "RepConv": lambda: RepConv(6, 6),
    "RepConv with stride": lambda: RepConv(6, 12, 2),
    "RepConv in groups": lambda: RepConv(6, 6, groups=2),
    "RepConv depthwise": lambda: RepConv(6, 6, groups=6),
    "ACNet": lambda: ACBlock(6, 8),
    "ACNet with stride": lambda: ACBlock(6, 8, 2),
    "ACNet with dilation": lambda: ACBlock(6, 6, 1, 2),
    "ACNet cropped": lambda: CroppedACBlock(6, 8),
    "ACNet cropped and padded": lambda: CroppedACBlock(6, 8, 5, 1),
    "diverse branches": lambda: DiverseBranch(6, 8),
    "diverse branches with stride": lambda: DiverseBranch(6, 8, 2),
    "diverse branches with padding": lambda: PaddedDiverseBranch(6),
    "RepMixer": lambda: RepMixer(6),
    "dilated branches": lambda: DilatedBranches(6),
    "norm after the sum": lambda: NormAfterSum(6),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_one_convolution(name):
    """One layer with parameters is left, exact in float64 and proven in the model's dtype."""
    model = BLOCKS[name]()
    result = merged(model)
    assert layer_count(result.model) == 1
    assert len(result.report.merging.merges) == 1
    assert result.report.check
    assert result.report.check.float64.outputs[0].error < 1e-13
    assert not [d for d in result.report.decisions if d.action is Action.KEEP]
    assert is_same(model, result)
    owners = {name.rpartition(".")[0] for name, _ in result.model.named_parameters()}
    left = owners - {"", "norm"}  # a scale that the block itself holds
    assert left == {result.report.merging.merges[0].into}


@pytest.mark.parametrize("name", ["RepConv", "ACNet", "RepMixer", "diverse branches"])
def test_a_merged_block_saves_loads_and_replays(name, tmp_path):
    """The recipe, as JSON, makes the architecture of a fresh block; the weights fit strictly."""
    model = BLOCKS[name]()
    result = merged(model)
    recipe = Recipe.from_dict(json.loads(json.dumps(result.recipe.to_dict())))
    fresh = apply_edits(BLOCKS[name]().eval(), recipe)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    x = torch.randn(2, 6, 9, 11)
    with torch.no_grad():
        assert torch.equal(fresh(x), result.model(x))
        assert torch.equal(copy.deepcopy(result.model)(x), result.model(x))
    path = tmp_path / "block.pt"
    bntools.save(result, path)
    classes = {type(model).__name__, "RepConv"}
    loaded = bntools.load(path, allow=[f"branch_models.{name}" for name in classes])
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_off_by_default():
    """Nothing merges unless it is asked for."""
    result = merged(RepConv(6, 6), merge_branches=False)
    assert result.report.merging is None
    assert layer_count(result.model) == 2


def test_the_host_keeps_its_path_and_stays_the_same_layer_where_it_fits():
    """A 3x3 that is large enough only gets new numbers, and a bias where it has none."""
    result = merged(RepConv(6, 6))
    assert result.report.merging.merges[0].into == "rbr_dense.0"
    assert result.report.merging.merges[0].rewritten == ""
    assert isinstance(result.model.rbr_1x1, nn.Identity)
    assert isinstance(result.model, RepConv)


def test_a_larger_layer_stands_where_none_is_large_enough():
    """A row and a column need a square; at the path of one of them."""
    layers = {
        "a": nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
        "b": nn.Conv2d(6, 6, (3, 1), padding=(1, 0)),
        "c": nn.Conv2d(6, 6, (3, 1), padding=(1, 0)),
    }
    model = Sum(lambda s, x: s.a(x) + s.b(x) + s.c(x), **layers)
    result = merged(model)
    assert result.model.a.kernel_size == (3, 3)
    assert result.model.a.padding == (1, 1)
    assert is_same(model, result)


def test_gradient_flags_and_dtypes_carry_over():
    """A frozen host stays frozen; half precision stays half."""
    model = Sum(lambda s, x: s.a(x) + s.b(x), **branches()).requires_grad_(False).bfloat16()
    x = torch.randn(MAPS).bfloat16()
    result = bntools.fold(model.eval(), x, merge_branches=True)
    assert result.report.check
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in result.model.parameters())


def _inplace(s, x):
    y = s.a(x)
    y += s.b(x)
    return y


def _onto_input(s, x):
    y = F.relu(x)
    y += s.a(y)
    return y


MERGES = {
    "dropout in eval mode": (
        lambda s, x: s.d(s.a(x)) + F.dropout(s.b(x), 0.5, s.training),
        {"d": nn.Dropout(0.3), **branches()},
    ),
    "in place": (_inplace, branches()),
    "onto its own input": (_onto_input, {"a": nn.Conv2d(6, 6, 3, padding=1)}),
    "literals and alpha": (
        lambda s, x: torch.add(2 * s.a(x), s.b(x), alpha=0.5) - x / 3 - torch.sub(x, s.b(x)) + -x,
        branches(),
    ),
    "one layer twice": (lambda s, x: s.a(x) + s.a(x), {"a": nn.Conv2d(6, 6, 3, padding=1)}),
    "an explicit pad": (
        lambda s, x: s.a(F.pad(x, (1, 1, 1, 1))) + s.b(x),
        {"a": nn.Conv2d(6, 6, 3), "b": nn.Conv2d(6, 6, 1)},
    ),
    "an uneven pad": (
        lambda s, x: s.a(F.pad(x, (1, 0, 1, 0))) + s.b(x),
        {"a": nn.Conv2d(6, 6, 2), "b": nn.Conv2d(6, 6, 3, padding=1)},
    ),
    "padding same": (
        lambda s, x: s.a(x) + s.b(x),
        {
            "a": nn.Conv2d(6, 6, 3, padding="same"),
            "b": nn.Conv2d(6, 6, 5, padding="same"),
        },
    ),
    "even kernels": (
        lambda s, x: s.a(x) + s.b(x),
        {"a": nn.Conv2d(6, 6, 4, padding=2), "b": nn.Conv2d(6, 6, 2, padding=1)},
    ),
    "average pooling": (
        lambda s, x: s.a(x) + s.p(x),
        {"a": nn.Conv2d(6, 6, 3), "p": nn.AvgPool2d(3, 1)},
    ),
    "average pooling with padding": (
        lambda s, x: s.a(x) + s.p(x) + x,
        {"a": nn.Conv2d(6, 6, 3, padding=1), "p": nn.AvgPool2d(3, 1, 1)},
    ),
    "a branch of a layer's output": (
        lambda s, x: s.b(s.a(x)) + s.c(s.a(x)) if False else _inner(s, x),
        {**branches(), "c": nn.Conv2d(6, 6, 3, padding=1)},
    ),
}


def _inner(s, x):
    u = F.relu(s.a(x))
    return s.b(u) + s.c(u) + u


@pytest.mark.parametrize("name", MERGES)
def test_what_is_linear_merges_however_it_is_written(name):
    """One layer less at least, and right at other sizes."""
    forward, layers = MERGES[name]
    model = Sum(forward, **copy.deepcopy(layers))
    result = merged(model)
    assert len(result.report.merging.merges) == 1, result.report.merging.left
    assert is_same(model, result, (1, 6, 12, 10))


RANKS = {
    "linear": ({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}, (2, 5, 6)),
    "linear on vectors": ({"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6)}, (2, 6)),
    "1d": ({"a": nn.Conv1d(6, 6, 3, padding=1), "b": nn.Conv1d(6, 6, 1)}, (2, 6, 9)),
    "3d": ({"a": nn.Conv3d(6, 6, 3, padding=1), "b": nn.Conv3d(6, 6, 1)}, (2, 6, 5, 4, 5)),
}


@pytest.mark.parametrize("name", RANKS)
def test_other_ranks_merge_alike(name):
    layers, shape = RANKS[name]
    model = Sum(lambda s, x: s.a(x) - s.b(x) + x, **copy.deepcopy(layers))
    result = merged(model, shape)
    assert layer_count(result.model) == 1
    assert is_same(model, result, shape)


def _shared(s, x):
    c = s.a(x) + s.b(x)
    return c + s.a(F.relu(c))


def _returned(s, x):
    y = s.a(x)
    return y + s.b(x), y


def _twice(s, x):
    y = s.a(x)
    return y + s.b(x) + torch.sigmoid(y)


def _alias(s, x):
    y = F.relu(x)
    z = y
    z += s.a(y)
    return z + y


def _method(s, x):
    y = F.relu(x)
    y.add_(s.a(y))
    return F.silu(y)


def _own_memory(s, x):
    y = s.a(x)
    y.add_(s.b(x))
    return F.silu(y)


def _flow(s, x):
    return s.a(x) + s.b(x) if x.sum() > -1e9 else x


def _tied() -> dict[str, nn.Module]:
    layers = {"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 3, padding=1)}
    layers["b"].weight = layers["a"].weight
    return layers


def add(s, x):
    return s.a(x) + s.b(x)


def conv(kernel, **options) -> nn.Conv2d:
    return nn.Conv2d(6, 6, kernel, **options)


REFUSED = {
    "branches of different inputs": (lambda s, x: s.a(x) + s.b(F.relu(x)), branches, None),
    "an activation in a branch": (lambda s, x: F.relu(s.a(x)) + s.b(x), branches, None),
    "a slice of other sizes": (
        lambda s, x: s.a(x[:, :, 1:8, 1:-1]) + s.b(x[:, :, 1:-1, 1:-1]),
        branches,
        Reason.NOT_REWRITABLE,
    ),
    "a slice of every other place": (
        lambda s, x: s.a(x[:, :, ::2, ::2]) + s.b(x[:, :, ::2, ::2]),
        branches,
        Reason.NOT_REWRITABLE,
    ),
    "padding of what was cut off": (
        lambda s, x: s.a(x[:, :, 1:-1, 1:-1]) + s.c(x),
        lambda: {**branches(), "c": nn.Conv2d(6, 6, 3)},
        Reason.PADDED_BETWEEN,
    ),
    "other dilations": (
        add,
        lambda: {"a": conv(3, padding=1), "b": conv(3, padding=2, dilation=2)},
        Reason.COSTS_MORE,
    ),
    "a shared layer": (_shared, branches, Reason.HOST_SHARED),
    "a branch that is returned": (_returned, branches, Reason.RETURNED),
    "a branch that is used twice": (_twice, branches, Reason.USED_ELSEWHERE),
    "tied weights": (add, _tied, Reason.TIED_WEIGHT),
    "padding by reflection": (
        add,
        lambda: {"a": conv(3, padding=1, padding_mode="reflect"), "b": conv(1)},
        Reason.NOT_REWRITABLE,
    ),
    "a transposed convolution": (
        add,
        lambda: {"a": nn.ConvTranspose2d(6, 6, 3, padding=1), "b": conv(1)},
        Reason.OTHER_GEOMETRY,
    ),
    "a sum that broadcasts": (
        add,
        lambda: {"a": conv(3, padding=1), "b": nn.Conv2d(6, 1, 1)},
        Reason.CHANNEL_MISMATCH,
    ),
    "an alias of what is written": (
        _alias,
        lambda: {"a": conv(3, padding=1)},
        Reason.NOT_REWRITABLE,
    ),
    "a method that writes its input": (
        _method,
        lambda: {"a": conv(3, padding=1)},
        Reason.WRITTEN_IN_PLACE,
    ),
    "a result by another name": (_own_memory, branches, Reason.NOT_REWRITABLE),
    "control flow": (_flow, branches, Reason.NOT_REWRITABLE),
    "pooling that does not count padding": (
        add,
        lambda: {"a": conv(3, padding=1), "b": nn.AvgPool2d(3, 1, 1, count_include_pad=False)},
        Reason.OTHER_GEOMETRY,
    ),
    "pooling in ceil_mode": (
        add,
        lambda: {"a": conv(3, stride=2), "b": nn.AvgPool2d(3, 2, ceil_mode=True)},
        Reason.OTHER_GEOMETRY,
    ),
    "what would cost more": (
        add,
        lambda: {"a": conv(1), "b": conv(5, padding=2, groups=6)},
        Reason.COSTS_MORE,
    ),
    "a row and a column alone": (
        add,
        lambda: {"a": conv((1, 3), padding=(0, 1)), "b": conv((3, 1), padding=(1, 0))},
        Reason.COSTS_MORE,
    ),
    "a constant that is none of a channel": (
        lambda s, x: s.a(x) + s.b(x) + s.c.weight.sum() * torch.ones_like(x[:1]),
        lambda: {**branches(), "c": nn.Linear(1, 1)},
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_alike_stays_and_is_right(name):
    """The result gives the same, and a refusal says why."""
    forward, layers, reason = REFUSED[name]
    model = Sum(forward, **layers())
    shape = (1, 6, 9, 9)
    result = merged(model, shape)
    into = {layer for row in result.report.merging.merges for layer in row.layers}
    assert "c" not in into
    if reason is None:
        assert set(left_reasons(result)) <= {Reason.CHANNEL_MISMATCH}
    else:
        assert left_reasons(result) == [reason]
        assert result.report.merging.merges == ()
        assert layer_count(result.model) == layer_count(model)
    assert is_same(model, result, shape)
    assert all(row.detail for row in result.report.merging.left)


def test_other_strides_stay():
    """They agree in size at one input only."""
    model = Sum(add, a=conv(4), b=conv(1, stride=2))
    result = merged(model, (1, 6, 7, 7))
    assert left_reasons(result) == [Reason.OTHER_GEOMETRY]


@pytest.mark.parametrize("which", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("layer", ["a", "b"])
def test_hooks_on_a_branch_keep_it(which, layer):
    """They would see another value, or nothing any more."""
    model = Sum(add, **branches())
    getattr(model.get_submodule(layer), which)(lambda *_: None)
    result = merged(model)
    assert left_reasons(result) == [Reason.HOOKS]
    assert layer_count(result.model) == 2


def test_weight_norm_keeps_a_branch():
    model = Sum(add, **branches())
    torch.nn.utils.parametrizations.weight_norm(model.a)
    assert left_reasons(merged(model)) == [Reason.COMPUTED_WEIGHT]


def test_a_block_that_is_called_twice_stays():
    """One forward cannot be rewritten for one of two calls."""
    model = Sum(lambda s, x: s.r(s.r(x)), r=RepConv(6, 6))
    result = merged(model)
    assert set(left_reasons(result)) == {Reason.HOST_SHARED}
    assert is_same(model, result)


def test_a_norm_that_is_skipped_stays_and_the_rest_merges():
    """`--skip` holds for merges as well."""
    result = merged(RepConv(6, 6), skip="rbr_identity")
    assert isinstance(result.model.rbr_identity, nn.BatchNorm2d)
    assert len(result.report.merging.merges) == 1
    assert left_reasons(result) == [Reason.SKIPPED]


def test_a_traced_module_is_edited_in_its_graph():
    """A GraphModule has a graph already."""
    model = torch.fx.symbolic_trace(RepConv(6, 6).eval())
    result = merged(model)
    assert layer_count(result.model) == 1
    assert is_same(model, result)


def test_two_sums_in_one_forward_merge_both():
    """The second edit finds its place after the first."""

    def forward(s, x):
        u = F.relu(s.a(x) + s.b(x))
        return s.c(u) + s.d(u) + u

    other = {"c": conv(3, padding=1), "d": conv(1)}
    model = Sum(forward, **branches(), **other)
    result = merged(model)
    assert len(result.report.merging.merges) == 2
    assert layer_count(result.model) == 2
    assert is_same(model, result)


class Listed(nn.Module):
    """Takes its input out of a list, twice, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in branches().items():
            self.add_module(name, layer)

    def forward(self, xs):
        return {"sum": self.a(xs[0]) + self.b(xs[0]), "rest": xs[1]}


def test_values_out_of_containers_merge():
    """A list of one tensor is no tensor, and what is taken out twice is one value."""
    model = Listed().eval()
    xs = [torch.randn(MAPS), torch.randn(MAPS)]
    result = bntools.fold(model, (xs,), merge_branches=True)
    assert len(result.report.merging.merges) == 1
    assert layer_count(result.model) == 1
    alone = bntools.fold(model, ([xs[0], xs[0]],), merge_branches=True)
    assert layer_count(alone.model) == 1


def test_a_layer_with_two_names_goes_under_both():
    model = Sum(lambda s, x: s.a(x) + s.c(x), **branches())
    model.c = model.b
    result = merged(model)
    assert isinstance(result.model.b, nn.Identity)
    assert isinstance(result.model.c, nn.Identity)
    assert is_same(model, result)


class Extra(nn.Module):
    """A sum that depends on an optional argument in part."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(conv(3, padding=1) for _ in range(3))

    def forward(self, x, extra=None):
        out = 0
        for step in self.steps:
            out = out + step(x)
        return out + x if extra is None else out * extra


def test_what_does_not_depend_on_an_argument_merges_without_the_rest():
    """The whole sum would be another one where the argument is given; the inner one is the same."""
    model = Extra()
    result = merged(model)
    assert layer_count(result.model) == 1
    x, extra = torch.randn(MAPS), torch.randn(MAPS)
    assert is_same(model, result)
    with torch.no_grad():
        assert difference([result.model(x, extra)], [model(x, extra)]) < 1e-5
        assert difference([result.model(x, extra=extra)], [model(x, extra)]) < 1e-5


def test_both_modes_are_rewritten():
    """What the forward does in training mode beside the sum, it still does."""

    def forward(s, x):
        y = s.a(x) + s.b(x)
        return y * 2 if s.training else y

    model = Sum(forward, **branches())
    result = merged(model)
    x = torch.randn(MAPS)
    with torch.no_grad():
        twice = result.model.train()(x)
        assert difference([twice], [2 * result.model.eval()(x)]) == 0


def test_a_merge_that_fails_its_check_is_undone_and_the_others_stay(monkeypatch):
    """A planted fault in the kernel of one host: the check finds it, names it and takes it back."""

    def forward(s, x):
        u = F.relu(s.a(x) + s.b(x))
        return s.c(u) + s.d(u) + u

    model = Sum(forward, **branches(), c=conv(3, padding=1), d=conv(1))
    right = merges_module.set_tensors

    def wrong(target, tensors):
        tensors = dict(tensors)
        if "c.weight" in tensors:
            tensors["c.weight"] = tensors["c.weight"] * 1.001
        right(target, tensors)

    monkeypatch.setattr(merges_module, "set_tensors", wrong)
    result = merged(model)
    assert [row.into for row in result.report.merging.merges] == ["a"]
    assert set(left_reasons(result)) == {Reason.CHECK_FAILED}
    assert result.report.check.rolled_back == ("c",)
    assert result.report.check
    assert is_same(model, result)


def test_a_fault_that_no_merge_survives_leaves_the_fold(monkeypatch):
    """Everything that was merged is undone; the folds stay."""
    right = merges_module.set_tensors

    def wrong(target, tensors):
        right(target, {name: t + 1e-3 for name, t in tensors.items()})

    monkeypatch.setattr(merges_module, "set_tensors", wrong)
    model = RepConv(6, 6)
    result = merged(model)
    assert result.report.merging.merges == ()
    assert set(left_reasons(result)) == {Reason.CHECK_FAILED}
    assert layer_count(result.model) == 2
    assert is_same(model, result)


def test_the_report_counts_layers_parameters_and_flops():
    """Sizes of the original and of the result, at the recorded input."""
    result = merged(RepConv(6, 6))
    before, after = result.report.merging.before, result.report.merging.after
    assert (before.convolutions, after.convolutions) == (2, 1)
    assert after.parameters == 6 * 6 * 9 + 6
    assert after.flops == 2 * 6 * 6 * 9 * 9 * 11
    data = json.loads(json.dumps(result.to_dict()))
    assert data["merging"]["merges"][0]["layers"] == ["rbr_identity", "rbr_dense.0", "rbr_1x1.0"]
    assert "convolutions 2 -> 1 (-50.0 %)" in str(result)
    assert "merged 3 layers into 1" in result.report.summary()


def edit(**changes) -> Recipe:
    """The recipe of a merged RepConv, of which the last edit is changed."""
    data = merged(RepConv(6, 6)).recipe.to_dict()
    last = data["edits"][-1]
    for name, value in changes.items():
        target = last["layer"] if name in last["layer"] else last
        target[name] = value
    return Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": "nowhere"}, "it has no values nowhere"),
        ({"output": "x"}, "it has no values x and x"),
        ({"input": 3}, "by short strings"),
        ({"calls": []}, "names the calls"),
        ({"calls": ["rbr_1x1"]}, "it does"),
        ({"steps": ["add = add(x, x)"]}, "it does"),
        ({"host": "act"}, "no convolution or linear layer"),
        ({"host": "nothing.there"}, "there is no 'nothing'"),
        ({"layer": None}, "it has no shape"),
        ({"inputs": 10**12}, "no sensible numbers"),
        ({"inputs": True}, "no sensible numbers"),
        ({"kernel": [3]}, "axes do not agree"),
        ({"kernel": [3, 3, 3, 3]}, "no lists"),
        ({"kernel": [1001, 1001]}, "are more than the"),
        ({"groups": 4}, "groups do not divide"),
        ({"padding": [-1, 0]}, "no sensible numbers"),
        ({"bias": 1}, "whether it has a bias"),
    ],
)
def test_a_damaged_recipe_is_one_line(changes, said):
    """Recipes come from files that nobody vouches for."""
    recipe = edit(**changes)
    with pytest.raises((SurgeryError, bntools.BNToolsError), match=said):
        apply_edits(RepConv(6, 6), recipe)


def test_a_merge_of_another_forward_is_refused():
    """Where the code calls other layers than it did, nothing is merged."""

    class Other(RepConv):
        def forward(self, x):
            return self.act(self.rbr_dense(x) + self.rbr_1x1(torch.relu(x)) + self.rbr_identity(x))

    recipe = edit()
    model = apply_edits(Other(6, 6), Recipe(recipe.edits[:-1]))
    before = list(model.named_modules())
    with pytest.raises(SurgeryError, match=r"it has no values|it does"):
        apply_edits(model, Recipe(recipe.edits[-1:]))
    assert list(model.named_modules()) == before
