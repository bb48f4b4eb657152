"""Affines however they are written: chains of arithmetic fold like norm layers, or say why not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from handwritten_models import (
    Affine,
    CourseBatchNorm,
    Frozen,
    Functional,
    LayerScale,
    Normalise,
    lenet,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import Net

import bntools
from bntools.norms.handwritten import constant_like, neutralised
from bntools.report import Action, Reason

EXACT = 1e-10


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in all tensors, plain ones included; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        tables = (module._parameters, module._buffers, module.__dict__)
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    positive = any(part in name for part in ("var", "std"))
                    tensor.data.copy_(drawn.abs() + 0.5 if positive else drawn)
    return model.eval()


def doubled(model: nn.Module) -> nn.Module:
    """The model in float64, plain tensors included."""
    model = model.double()
    for module in model.modules():
        for name, tensor in module.__dict__.items():
            if isinstance(tensor, torch.Tensor):
                module.__dict__[name] = tensor.double()
    return model


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def folds_all(model: nn.Module, x: torch.Tensor) -> bntools.Result:
    """Everything folds, and another input gives the same numbers to float64."""
    model = doubled(settled(model))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = bntools.fold(model, x)
    assert [d.path for d in result.report.kept] == []
    other = torch.rand(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    with torch.no_grad():
        truth, given = model(other), result.model(other)
    assert float((truth - given).norm() / truth.norm()) < EXACT
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return result


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, object]:
    """The reason of each layer that is kept, or the hosts."""
    plan = bntools.plan_fold(model.eval(), x)
    return {d.path: d.reason if d.action is Action.KEEP else d.hosts for d in plan.decisions}


def test_the_hand_written_batch_norms_of_a_lenet_fold_completely():
    """The net of the course: moving statistics as plain tensors, the mode that of gradients."""
    result = folds_all(lenet(), image(2, 1, 28, 28))
    assert len(result.report.folds) == 4
    assert not any(isinstance(m, CourseBatchNorm) for m in result.model.modules())
    assert all(d.affine for d in result.report.folds)


def test_frozen_norms_scales_and_input_normalisation_fold_where_they_stand():
    """A frozen batch norm of one's own, a functional one, and a normalisation at the start."""
    model = nn.Sequential(Normalise(), nn.Conv2d(3, 4, 3), Frozen(4), nn.ReLU(), Functional(4, 5))
    result = folds_all(model, image(2, 3, 12, 12))
    assert {d.path: d.hosts for d in result.report.folds} == {
        "0": ("1",), "2": ("1",), "4 (batch_norm)": ("4.conv",),
    }  # fmt: skip
    assert isinstance(result.model[0], nn.Identity)


def test_learned_scales_over_the_last_axis_fold_into_linear_layers():
    """LayerScale, in place as well, and the affine of ResMLP before and after a Linear."""
    model = nn.Sequential(
        nn.Linear(4, 5), LayerScale(5), nn.Linear(5, 6), LayerScale(6, inplace=True), Affine(6),
        nn.ReLU(), Affine(6), nn.Linear(6, 2),
    )  # fmt: skip
    folds_all(model, image(2, 7, 4))


def test_a_chain_within_a_module_that_does_more_is_neutralised():
    """Its constants become those with which it does nothing, to the bit."""
    model = settled(nn.Sequential(Functional(3, 4))).float()
    result = bntools.fold(model, image(2, 3, 9, 9).float())
    norm = result.model[0]
    x = image(2, 4, 5, 5).float()
    same = F.batch_norm(x, norm.mean, norm.var, norm.scale, norm.shift, eps=1e-3)
    assert torch.equal(same, x)
    assert not torch.equal(model[0].mean, norm.mean)
    assert [e.kind for e in result.recipe.edits] == ["neutralise"]


def test_plain_tensors_are_neutralised_and_their_original_stays_as_it_was():
    """What is no parameter and no buffer is an attribute of the copy."""
    block = Net(lambda m, x: F.relu(m.conv(x) * m.gain), conv=nn.Conv2d(3, 4, 3))
    block.gain = torch.rand(4, 1, 1) + 0.5
    before = block.gain.clone()
    result = bntools.fold(block.eval(), torch.rand(1, 3, 8, 8))
    assert outcome(block, torch.rand(1, 3, 8, 8)) == {"(mul)": ("conv",)}
    assert torch.equal(result.model.gain, torch.ones(4, 1, 1))
    assert torch.equal(block.gain, before)


def scale_and_shift(m, x):
    x = m.conv(x)
    return x.mul_(m.g).add_(m.b)


SPELLINGS = {
    "in place": scale_and_shift,
    "addcmul": lambda m, x: torch.addcmul(m.b, m.conv(x), m.g),
    "constants first": lambda m, x: m.b + m.g * m.conv(x),
    "reciprocal": lambda m, x: m.conv(x) / (1 / m.g) - m.b,
    "one plus": lambda m, x: m.conv(x) * (1 + m.b) + m.g,
    "squared": lambda m, x: (m.conv(x) - m.b) * (m.g * m.g),
    "power": lambda m, x: (m.conv(x) - m.b) * (m.g**2 + 1e-3) ** -0.5,
    "exponential": lambda m, x: m.conv(x) * m.b.exp() + m.g,
    "negated": lambda m, x: m.b - (-m.conv(x) * m.g),
    "a literal undone": lambda m, x: m.conv(x) * 2.0 * m.g + m.b,
    "alpha": lambda m, x: torch.add(m.b, m.conv(x) * m.g, alpha=2),
    "through a view": lambda m, x: m.conv(x) * m.g.flatten()[None, :, None, None],
    "expanded": lambda m, x: m.conv(x) * m.g.expand(4, 3, 3).contiguous()[:, :1, :1] + m.b,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_affine_folds(spelling):
    """In a module that holds the convolution as well, so that its constants are neutralised."""
    model = Net(lambda m, x: F.silu(SPELLINGS[spelling](m, x)), conv=nn.Conv2d(3, 4, 3))
    model.g, model.b = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))
    folds_all(model, image(2, 3, 8, 8))


def random_chain(steps, shape):
    """A forward of steps on `x`, each with a constant of its own."""

    def forward(m, x):
        for i, (kind, inplace) in enumerate(steps):
            c = getattr(m, f"c{i}")
            if kind == "mul":
                x = x.mul_(c) if inplace else c * x
            elif kind == "div":
                x = x.div_(c) if inplace else x / c
            elif kind == "add":
                x = x.add_(c) if inplace else torch.add(x, c, alpha=0.5)
            elif kind == "sub":
                x = x.sub_(c) if inplace else c - x
            elif kind == "std":
                x = x / torch.sqrt(c + 1e-5)
            elif kind == "literal":
                x = (x + 0.25) * 0.5
            else:
                x = torch.addcmul(c, x, c, value=2)
        return x

    alone = Net(forward)
    for i in range(len(steps)):
        alone.register_buffer(f"c{i}", torch.rand(shape) + 0.5)
    return alone


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["mul", "div", "add", "sub", "std", "literal", "addcmul"]),
            st.booleans(),
        ),
        min_size=1, max_size=6,
    ),
    shape=st.sampled_from([(4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1), ()]),
    after=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_chains_fold_to_float64(steps, shape, after):
    """In a module of their own, after a convolution or before one without padding."""
    if not after:  # nobody may write to the input
        steps = [(steps[0][0], False), *steps[1:]]
    chain = random_chain(steps, shape)
    conv = nn.Conv2d(3, 4, 3) if after else nn.Conv2d(4, 3, 3)
    model = nn.Sequential(*((conv, chain) if after else (chain, conv))).double().eval()
    x = image(2, 3 if after else 4, 7, 7)
    plan = bntools.plan_fold(model, x)
    assert [d.action for d in plan.decisions] == [Action.FOLD]
    result = bntools.fold(model, x, plan=plan)
    with torch.no_grad():
        truth, found = model(x.clone()), result.model(x.clone())
    assert float((truth - found).norm() / truth.norm()) < EXACT


def test_a_module_called_twice_after_its_own_hosts_folds_into_both():
    """Shared constants are no hindrance where all calls go."""
    model = Net(
        lambda m, x: m.s(m.a(x)) + m.s(m.b(x)),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), s=LayerScale(1),
    )  # fmt: skip
    model.s.gamma = nn.Parameter(torch.rand(4, 1, 1))
    result = folds_all(model, image(2, 3, 8, 8))
    assert result.report.folds[0].hosts == ("a", "b")


def test_a_module_called_twice_of_which_one_call_cannot_fold_is_kept():
    """One of the calls follows an activation, and goes nowhere."""
    model = Net(
        lambda m, x: F.silu(m.s(F.silu(m.s(m.a(x))))), a=nn.Conv2d(3, 4, 3), s=LayerScale(1)
    )
    model.s.gamma = nn.Parameter(torch.rand(4, 1, 1))
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {"s": Reason.NOT_AFTER_LINEAR}


def test_a_chain_with_a_branch_in_the_middle_is_two_and_stays_right():
    """What is used in between is not changed."""

    def forward(m, x):
        y = m.conv(x) * m.g
        return F.silu(y + m.b * y.new_ones(())) + y * m.h

    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    for name in "gbh":
        setattr(model, name, nn.Parameter(torch.rand(4, 1, 1) + 0.5))
    model = doubled(settled(model))
    x = image(2, 3, 8, 8)
    result = bntools.fold(model, x)
    found = {d.path: d.action for d in result.report.decisions}
    assert found["(mul)"] is Action.FOLD
    with torch.no_grad():
        assert torch.allclose(model(x), result.model(x), rtol=EXACT, atol=EXACT)


def test_constants_that_vary_over_space_are_no_affine():
    """A position embedding, and a mask of pixels."""
    model = Net(lambda m, x: F.silu(m.conv(x) * m.mask + m.pos), conv=nn.Conv2d(3, 4, 3))
    model.mask = nn.Parameter(torch.rand(1, 1, 6, 6))
    model.pos = nn.Parameter(torch.rand(1, 4, 6, 6))
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {}


def test_constants_of_the_channels_against_the_last_axis_do_not_go_into_a_convolution():
    """A (C,) constant broadcasts over the width where that has as many elements."""
    model = Net(lambda m, x: F.silu(m.conv(x) * m.g), conv=nn.Conv2d(3, 6, 3))
    model.g = nn.Parameter(torch.rand(6))
    found = outcome(model, torch.rand(2, 3, 8, 8))
    assert found == {"(mul)": Reason.CHANNEL_MISMATCH}


def test_constants_that_somebody_else_reads_are_kept():
    """The other one would see the neutral numbers."""
    model = Net(lambda m, x: F.silu(m.conv(x) * m.g) + m.g.sum(), conv=nn.Conv2d(3, 4, 3))
    model.g = nn.Parameter(torch.rand(4, 1, 1))
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {"(mul)": Reason.SHARED_STATISTICS}


def test_constants_of_two_chains_are_kept():
    """Neutral for the one is not neutral for the other."""

    def forward(m, x):
        x = F.silu(m.a(x) * m.g + m.h)
        return F.silu(m.b(x) * m.h)

    model = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3))
    model.g, model.h = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))
    assert set(outcome(model, torch.rand(2, 3, 8, 8)).values()) == {Reason.SHARED_STATISTICS}


def test_tied_constants_are_kept_and_modules_of_their_own_fold():
    """Two modules that hold one tensor go one by one; a constant under two names cannot."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1), nn.SiLU(), nn.Conv2d(4, 4, 3))
    model.append(LayerScale(1))
    model[1].gamma = model[4].gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    folds_all(model, image(2, 3, 9, 9))
    block = Net(lambda m, x: F.silu(m.conv(x) * m.g), conv=nn.Conv2d(3, 4, 3))
    block.g = nn.Parameter(torch.rand(4, 1, 1))
    block.also = block.g
    assert outcome(block, torch.rand(2, 3, 8, 8)) == {"(mul)": Reason.SHARED_STATISTICS}


def test_a_constant_of_a_norm_layer_is_no_chains():
    """Its numbers are the norm's to change."""
    model = Net(
        lambda m, x: m.conv(m.bn(x)) * m.bn.weight[:, None, None],
        bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 3),
    )  # fmt: skip
    assert outcome(model, torch.rand(2, 4, 8, 8)) == {"bn": Reason.SHARED_STATISTICS}


def test_a_zero_gain_folds_backward():
    """A residual branch that starts at zero."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1))
    model[1].gamma = nn.Parameter(torch.zeros(4, 1, 1))
    result = bntools.fold(model.eval(), torch.rand(1, 3, 8, 8))
    assert not result.model[0].weight.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_constants_that_are_not_finite_are_kept(bad):
    """Nothing sound comes of them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1), nn.Conv2d(4, 4, 1))
    model[1].gamma = nn.Parameter(torch.full((4, 1, 1), bad))
    assert outcome(model, torch.rand(1, 3, 8, 8)) == {"1": Reason.NON_FINITE}
    found = bntools.inspect(model.eval(), torch.rand(1, 3, 8, 8)).errors
    assert [(f.path, f.code) for f in found] == [("1", "nan-or-inf")]


def test_half_constants_fold_into_a_float32_layer_and_the_dtype_stays():
    """A half constant rounds nothing of a float32 map."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1))
    model[1].gamma = nn.Parameter((torch.rand(4, 1, 1) + 0.5).half())
    result = bntools.fold(model.eval(), torch.rand(1, 3, 8, 8))
    assert isinstance(result.model[1], nn.Identity)
    assert result.model[0].weight.dtype is torch.float32


def test_arithmetic_that_changes_the_dtype_is_no_affine():
    """Without it what comes out would be half."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3).half(), LayerScale(1))
    model[1].gamma = nn.Parameter(torch.rand(4, 1, 1))
    assert outcome(model, torch.rand(1, 3, 8, 8).half()) == {}


def test_numbers_that_follow_from_the_input_are_not_constants():
    """A literal that was read from the data differs in the second recording."""

    def forward(m, x):
        return F.silu(m.conv(x) * m.g + torch.tensor(x.mean().item()))

    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    model.g = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    result = bntools.fold(model.eval(), torch.rand(2, 3, 8, 8))
    x = torch.rand(2, 3, 8, 8) + 3
    with torch.no_grad():
        assert torch.allclose(model(x), result.model(x), atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_a_chain_that_only_some_inputs_take_is_kept(first):
    """The second recording has another batch, and does not do the same."""

    def forward(m, x):
        y = m.conv(x)
        return F.silu(y * m.g if (x.shape[0] == 2) is first else y)

    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    model.g = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {"(mul)": Reason.DATA_DEPENDENT}


def test_a_scale_written_into_some_channels_does_not_go_into_all():
    """A slice that is multiplied in place is a part of what others see."""

    def forward(m, x):
        y = m.conv(x)
        y[:, :2].mul_(m.g)
        return F.silu(y)

    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    model.g = nn.Parameter(torch.rand(2, 1, 1) + 0.5)
    x = torch.rand(2, 3, 8, 8)
    assert outcome(model, x) == {"(mul)": Reason.USED_ELSEWHERE}
    with torch.no_grad():
        assert torch.equal(bntools.fold(model, x).model(x), model(x))


def test_a_constant_that_is_a_weight_as_well_is_kept():
    """Neither goes: the convolution's weight is used elsewhere."""
    model = Net(
        lambda m, x: F.silu(m.conv(x) * m.conv.weight[:, :1, 0, 0, None]), conv=nn.Conv2d(3, 4, 1)
    )
    model.unused = nn.Parameter(torch.rand(1))
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {"(mul)": Reason.SHARED_STATISTICS}


def test_a_neutralised_chain_is_explained_and_unfolds():
    """The other verbs know it."""
    model = settled(nn.Sequential(Functional(3, 4))).float()
    x = torch.rand(2, 3, 9, 9)
    plan = bntools.plan_fold(model, x)
    assert "0.conv absorbs" in str(plan.explain("0 (batch_norm)"))
    folded = bntools.fold(model, x, keep_originals=True).model
    assert not torch.equal(folded[0].mean, model[0].mean)
    again = bntools.unfold(folded).model
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_module_with_hooks_is_kept():
    """They would be lost with it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1))
    model[1].gamma = nn.Parameter(torch.rand(4, 1, 1))
    model[1].register_forward_hook(lambda *_: None)
    assert outcome(model, torch.rand(1, 3, 8, 8)) == {"1": Reason.HOOKS}


def test_a_module_that_returns_more_or_takes_names_is_not_replaced():
    """An Identity would give something else; its constants are neutralised."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x, *, twice=False):
            y = x * self.g
            return (y, y) if twice else y

    model = Net(lambda m, x: m.p(m.conv(x), twice=True)[0], conv=nn.Conv2d(3, 4, 3), p=Pair())
    result = folds_all(model, image(1, 3, 8, 8))
    assert result.report.folds[0].path == "p (mul)"
    assert isinstance(result.model.p, Pair)


def test_a_batch_norm_subclass_that_is_arithmetic_folds():
    """A norm layer by its class, written by hand."""

    class ByHand(nn.BatchNorm2d):
        def forward(self, x):
            mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
            x = (x - mean) / torch.sqrt(var + self.eps)
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    result = folds_all(nn.Sequential(nn.Conv2d(3, 4, 3), ByHand(4)), image(2, 3, 8, 8))
    assert not result.report.folds[0].affine


def test_norms_and_affines_fold_through_each_other_and_are_counted_apart():
    """A batch norm between two scales."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerScale(1), nn.BatchNorm2d(4), LayerScale(1))
    for layer in (model[1], model[3]):
        layer.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    result = folds_all(model, image(2, 3, 8, 8))
    said = result.report.summary()
    assert said.startswith("folded 1 of 1 norm layers and 2 of 2 affines; ")
    shown = bntools.inspect(model, image(2, 3, 8, 8))
    assert {x.path: x.affine for x in shown.layers} == {"1": True, "2": False, "3": True}
    assert shown.to_dict()["layers"][0]["affine"]


def test_only_and_skip_choose_affines_by_their_paths():
    """They are globs on what the plan shows."""
    model = settled(nn.Sequential(Functional(3, 4), Functional(4, 4))).float()
    plan = bntools.plan_fold(model, torch.rand(2, 3, 9, 9), skip="0 (*")
    assert {d.path: d.action for d in plan.decisions} == {
        "0 (batch_norm)": Action.KEEP, "1 (batch_norm)": Action.FOLD,
    }  # fmt: skip


def test_a_module_that_caches_its_scale_folds():
    """What it keeps of its constants is nobody else's."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.var = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
            self.cache = None

        def forward(self, x):
            self.cache = torch.rsqrt(self.var + 1e-5)
            return x * self.cache

    folds_all(nn.Sequential(nn.Conv2d(3, 4, 3), Cached()), image(2, 3, 8, 8))


def test_a_fold_that_fails_its_check_is_undone(monkeypatch):
    """Wrong neutral numbers are found out by the proof."""
    monkeypatch.setattr(
        "bntools.norms.handwritten.constant_like", lambda t, *_: torch.full_like(t, 1.001)
    )
    model = settled(nn.Sequential(Functional(3, 4))).float()
    result = bntools.fold(model, torch.rand(2, 3, 9, 9))
    assert [d.reason for d in result.report.decisions] == [Reason.CHECK_FAILED]


def test_a_square_root_in_float32_that_is_not_one_to_the_bit_keeps_a_chain():
    """No g gives g * g + eps == 1; the module does more, so that the chain stays."""
    model = Net(
        lambda m, x: F.silu(m.conv(x) * (m.g * m.g + 1e-5).rsqrt()), conv=nn.Conv2d(3, 4, 3)
    )
    model.g = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    found = outcome(model, torch.rand(2, 3, 8, 8))
    assert found == {"(mul)": Reason.NOT_NEUTRAL}


def test_a_chain_of_literals_alone_that_cannot_be_undone_is_kept():
    """Its scale is 3 times what its constant can be in float32 to the bit."""
    model = Net(lambda m, x: F.silu((m.conv(x) * m.g + 7.5) * 3.0), conv=nn.Conv2d(3, 4, 3))
    model.g = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    assert outcome(model, torch.rand(2, 3, 8, 8)) == {"(mul, add, mul)": Reason.NOT_NEUTRAL}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3, 0.5])
def test_a_neutral_variance_is_one_with_its_eps_to_the_bit(dtype, eps):
    """In every dtype, as that rounds."""
    found = constant_like(torch.rand(4).to(dtype), 1.0, eps)
    assert bool((found + eps == 1).all())


@pytest.mark.parametrize(
    "constants",
    [None, {}, [1], {"g": 1.0}, {"g": [1.0]}, {"g": ["1", 0]}, {"g": [math.nan, 0.0]},
     {"no": [1.0, 0.0]}, {"forward": [1.0, 0.0]}, {"g": [True, 0.0]}],
)  # fmt: skip
def test_a_damaged_recipe_neutralises_nothing(constants):
    """Recipes come from files that nobody trusts."""
    model = nn.Module()
    model.g = nn.Parameter(torch.rand(3))
    before = model.g
    with pytest.raises((TypeError, ValueError), match=r"recipe|no tensor"):
        neutralised(model, {"constants": constants})
    assert model.g is before


def blocks() -> nn.Module:
    """What a recipe is applied to on loading."""
    block = Net(_plain_gain, conv=nn.Conv2d(4, 4, 3))
    block.gain = torch.full((4, 1, 1), 3.0)
    return nn.Sequential(Functional(3, 4), block, nn.Conv2d(4, 4, 1), Frozen(4), lenet_norm())


def _plain_gain(m, x):
    return F.relu(m.conv(x) * m.gain)


def lenet_norm() -> nn.Module:
    return CourseBatchNorm(4, 4)


def test_a_folded_state_dict_comes_back_with_its_architecture(tmp_path):
    """Plain tensors are in no state dict: the recipe neutralises them on a fresh model."""
    torch.manual_seed(3)
    model = blocks().eval()
    x = torch.rand(2, 3, 12, 12)
    result = bntools.fold(model, x)
    assert result.report.kept == ()
    for ending in ("safetensors", "pt"):
        path = tmp_path / f"folded.{ending}"
        bntools.save(result, path, **({"state_dict": True} if ending == "pt" else {}))
        again = bntools.load(path, arch="test_affines:blocks").eval()
        with torch.no_grad():
            assert torch.equal(again(x), result.model(x))


def test_a_plan_changes_nothing_of_a_model_with_plain_tensors():
    """Attributes, contents and the mode of gradients are what they were."""
    model = settled(lenet()).float()
    held = {id(m): dict(m.__dict__) for m in model.modules()}
    contents = copy.deepcopy(model)
    bntools.plan_fold(model, torch.rand(2, 1, 28, 28))
    for module in model.modules():
        assert all(held[id(module)][k] is v for k, v in module.__dict__.items())
    for mine, theirs in zip(model.modules(), contents.modules(), strict=True):
        if isinstance(mine, CourseBatchNorm):
            assert torch.equal(mine.moving_var, theirs.moving_var)


def test_models_without_norms_or_chains_have_an_empty_plan():
    """Also those that do not run on what is given."""
    assert bntools.plan_fold(nn.Sequential(nn.Conv2d(3, 4, 3))).decisions == ()
    odd = Net(lambda m, x: m.missing(x), w=nn.Linear(2, 2))
    assert bntools.plan_fold(odd).decisions == ()
