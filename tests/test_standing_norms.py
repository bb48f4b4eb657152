"""Norms that stay: what they absorb of the norms beside them, and what sums and dead ends allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_forward import IMAGE, checked, hosts, made, refused
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from zoo import Net

import bntools
from bntools.depth import compare_layers
from bntools.report import Action, Plan, Reason


def net(forward: Callable[..., Any], *, positive: bool = True, **parts: Any) -> nn.Module:
    """A model around two convolutions and some norms, of four channels each."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        usual: dict[str, Any] = {
            "a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1, bias=False),
            "p": nn.BatchNorm2d(4), "n": nn.BatchNorm2d(4),
        }  # fmt: skip
        model = Net(forward, **(usual | parts))
        bare = {name: norm for name, norm in usual.items() if name not in parts}
        return made(model, positive=positive) if bare else model


def decision(plan: Plan, path: str) -> Any:
    return next(d for d in plan.decisions if d.path == path)


def backward(plan: Plan, path: str) -> tuple[str, ...]:
    """Where a norm folds to, which is backward."""
    found = decision(plan, path)
    assert found.action is Action.FOLD, found
    assert not found.forward, found
    return found.hosts


# norms beside norms that stay


def test_second_of_two_norms_goes_into_the_first_that_stays():
    plan = checked(net(lambda m, x: m.n(m.p(m.a(x).sigmoid())).sigmoid(), positive=False))
    assert backward(plan, "n") == ("p",)
    assert refused(plan, "p") is Reason.NOT_BEFORE_LINEAR
    assert decision(plan, "p").forward_detail == "sigmoid in the model itself uses what it gives"


def test_of_three_norms_in_a_row_one_is_left():
    model = net(lambda m, x: m.q(m.n(m.p(x)).flip(3)).sigmoid(), q=nn.Identity())
    model.q = made(nn.BatchNorm2d(4))
    plan = checked(model)
    assert (backward(plan, "n"), backward(plan, "q")) == (("p",), ("p",))


@pytest.mark.parametrize("positive", [True, False])
def test_between_norms_stands_what_stands_between_a_norm_and_a_layer(positive):
    """A max-pool lets scales of 0 and more pass, whatever absorbs them."""
    model = net(
        lambda m, x: m.n(torch.nn.functional.max_pool2d(m.p(x), 2)).sigmoid(), positive=positive
    )
    plan = checked(model)
    assert (decision(plan, "n").action is Action.FOLD) is positive


def test_norm_goes_into_all_norms_of_a_concat_or_none():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.n(torch.cat([m.p(x), m.q(x)], 1)).sigmoid()

    model = net(forward, q=made(nn.BatchNorm2d(4)), n=made(nn.BatchNorm2d(8)))
    assert set(backward(checked(model), "n")) == {"p", "q"}
    model.run = lambda m, x: (m.n(torch.cat([p := m.p(x), m.q(x)], 1)).sigmoid(), p)
    assert decision(checked(model), "n").reason is Reason.NOT_AFTER_LINEAR


def test_norm_without_weight_goes_into_the_norm_behind_it():
    model = net(lambda m, x: m.n(m.p(m.a(x).sigmoid())).sigmoid())
    model.p = nn.BatchNorm2d(4, affine=False).double().eval()
    model.p.running_mean.copy_(torch.linspace(-1, 2, 4))
    plan = checked(model)
    assert hosts(plan, "p") == ("n",)
    assert decision(plan, "n").action is Action.KEEP


def test_of_two_norms_without_weights_both_stay():
    bare = {name: nn.BatchNorm2d(4, affine=False) for name in ("p", "n")}
    plan = checked(Net(lambda m, x: m.n(m.p(x)).sigmoid(), **bare).double().eval())
    assert [d.action for d in plan.decisions] == [Action.KEEP, Action.KEEP]


def test_norm_goes_into_a_layer_and_the_norm_that_stays_behind_it():
    plan = checked(net(lambda m, x: m.n(y := m.p(x.sigmoid())).sigmoid() + m.b(y), positive=False))
    assert set(hosts(plan, "p")) == {"b", "n"}


def test_norm_goes_into_a_norm_that_has_absorbed_another():
    """What comes before it is put before what it has absorbed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.q(m.n(y := m.p(x.sigmoid()))).sigmoid() + m.b(y)

    plan = checked(net(forward, positive=False, q=made(nn.BatchNorm2d(4))))
    assert backward(plan, "q") == ("n",)
    assert set(hosts(plan, "p")) == {"b", "n"}


def test_norm_that_was_left_out_absorbs_nothing():
    model = net(lambda m, x: m.n(m.p(x)).sigmoid())
    plan = checked(model, skip="p")
    assert decision(plan, "n").reason is Reason.NOT_AFTER_LINEAR


def test_norm_whose_weight_is_used_elsewhere_absorbs_nothing():
    model = net(lambda m, x: m.n(m.p(x)).sigmoid() + m.p.weight.square().mean())
    assert decision(checked(model), "n").action is Action.KEEP


def test_norm_called_again_elsewhere_absorbs_nothing():
    model = net(lambda m, x: m.n(m.p(x)).sigmoid() + m.p(x.sigmoid()).sigmoid())
    assert decision(checked(model), "n").action is Action.KEEP


def test_fold_into_a_norm_is_proven_compared_explained_and_undone():
    model = net(lambda m, x: m.n(y := m.p(x.sigmoid())).sigmoid() + m.b(y)).float()
    result = bntools.fold(model, IMAGE, keep_originals=True)
    assert "it stays; the scale goes into" in str(bntools.plan_fold(
        net(lambda m, x: m.n(m.p(x)).sigmoid()), IMAGE.double()
    ).explain("n"))  # fmt: skip
    assert compare_layers(model, result.model, IMAGE)
    back = bntools.unfold(result.model).model
    assert torch.equal(back(IMAGE), model(IMAGE))


# sums after a norm


def test_norm_folds_forward_through_a_sum_with_itself():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.p(x.sigmoid())
        return m.b(y - 3 * avg_pool2d(y, 3, 1, 1, count_include_pad=False)).sigmoid()

    assert hosts(checked(net(forward, positive=False)), "p") == ("b",)


def test_norm_does_not_fold_forward_through_a_sum_of_several_of_its_channels():
    plan = checked(net(lambda m, x: m.b((y := m.p(x.sigmoid())) + y.flip(1)).sigmoid()))
    assert refused(plan, "p") is Reason.CHANNEL_MISMATCH


def test_norm_does_not_fold_forward_through_a_sum_with_its_own_padding():
    """Where zeros were padded one shift arrives, elsewhere two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.p(x.sigmoid())
        return m.b(y + torch.nn.functional.pad(y, (1, 0))[..., :-1]).sigmoid()

    assert refused(checked(net(forward)), "p") is Reason.CHANNEL_MISMATCH


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 8, 8), (1, 4, 1, 8)])
def test_parameter_that_is_added_after_a_norm_is_scaled_back(shape):
    table = nn.Parameter(torch.linspace(-1, 2, torch.Size(shape).numel()).reshape(shape))
    model = net(lambda m, x: m.b(m.t - 2 * m.p(x.sigmoid())).sigmoid(), positive=False)
    model.t = nn.Parameter(table.double())
    assert set(hosts(checked(model), "p")) == {"b", "t"}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(m.p(x.sigmoid()) + m.t).sigmoid() + m.t, Reason.NOT_BEFORE_LINEAR),
        (lambda m, x: m.b(m.p(x.sigmoid()) + m.t[:1]).sigmoid(), Reason.NOT_BEFORE_LINEAR),
        (lambda m, x: m.b(m.p(x).transpose(1, 3) + m.t).sigmoid(), Reason.CHANNEL_MISMATCH),
    ],
)  # fmt: skip
def test_parameter_that_cannot_be_scaled_back_keeps_the_norm(forward, reason):
    model = net(forward)
    model.t = nn.Parameter(torch.ones(4, 1, 1).double() + 1)
    model.b = nn.Conv2d(4, 4, 1).double()
    plan = checked(model, torch.linspace(-1, 1, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4).sin())
    assert refused(plan, "p") is reason


def test_parameter_is_not_divided_by_a_scale_of_zero():
    model = net(lambda m, x: m.b(m.p(x.sigmoid()) + m.t).sigmoid())
    model.t = nn.Parameter(torch.ones(4, 1, 1).double())
    model.p.weight.data[2] = 0
    plan = checked(model)
    assert refused(plan, "p") is Reason.NON_FINITE


# before a norm


@pytest.mark.parametrize("axis", [0, 1])
def test_shift_passes_a_sum_over_a_stack(axis):
    """How many values it adds does not depend on the size."""
    model = net(lambda m, x: m.n(torch.stack([m.a(x), m.b(x).relu()], axis).sum(axis)).sigmoid())
    assert backward(checked(model), "n") == ("b", "a")


def test_shift_does_not_pass_a_sum_over_another_axis_of_a_stack():
    model = net(lambda m, x: m.n(torch.stack([m.a(x), m.a(x)], -1).sum(3)).sigmoid())
    assert decision(checked(model), "n").reason is Reason.SHIFT_STOPPED


def test_norm_folds_through_arithmetic_with_literals_that_cannot_be_made_neutral():
    model = net(lambda m, x: m.n(-2 * (m.t - m.a(x)) / 3).sigmoid(), positive=False)
    model.t = nn.Parameter(torch.linspace(-1, 1, 4).double().reshape(4, 1, 1))
    assert set(backward(checked(model), "n")) == {"a", "t"}


def test_norm_folds_beside_a_layer_of_which_nothing_comes():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        m.b(m.p(y)).relu()
        return m.n(y).sigmoid()

    plan = checked(net(forward, positive=False))
    assert backward(plan, "n") == ("a",)
