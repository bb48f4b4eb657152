"""Norms that fold into the layers after them, and those that must not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from randomise import difference, outputs, randomise
from torch import Tensor, nn
from zoo import Net

import bntools
from bntools import registry
from bntools.affine import Affine
from bntools.errors import PlanError
from bntools.report import Action, Plan, Reason
from bntools.surgery.folding import fold_copy

IMAGE = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8).sin()
ROWS = torch.linspace(-2, 2, 5 * 6).reshape(5, 6).cos()


@pytest.fixture(autouse=True)
def _rules_are_forgotten(monkeypatch):
    for table in ("_NORMS", "_HOSTS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def made(model: nn.Module, *, shifted: bool = True, positive: bool = False) -> nn.Module:
    """In eval mode and float64, with random statistics; without shift, or with scales >= 0."""
    model = model.double().eval()
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.abs_()
                if not positive:
                    module.weight[0] *= -1
                if not shifted:
                    module.running_mean.zero_()
                    module.bias.zero_()
    return model


def checked(model: nn.Module, x: Any = IMAGE, **options: Any) -> Plan:
    """The plan; what it folds, unproven, gives the same in float64 and leaves the model alone."""
    x = x.double() if isinstance(x, Tensor) else x
    before = copy.deepcopy(model.state_dict())
    plan = bntools.plan_fold(model, x, **options)
    folded = fold_copy(model, plan.compiled.folds).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert difference(outputs(folded, x), outputs(model, x)) < 1e-12
    again = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    assert difference(outputs(folded, again), outputs(model, again)) < 1e-10
    return plan


def hosts(plan: Plan, path: str) -> tuple[str, ...]:
    """Where a norm folds to, which is forward."""
    decision = next(d for d in plan.decisions if d.path == path)
    assert decision.action is Action.FOLD, decision
    assert decision.forward, decision
    return decision.hosts


def refused(plan: Plan, path: str) -> Reason | None:
    """Why a norm does not fold forward."""
    decision = next(d for d in plan.decisions if d.path == path)
    assert decision.action is Action.KEEP, decision
    assert decision.forward_detail
    return decision.forward_reason


def first(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(4), *layers)


# What absorbs a norm before it


LINEAR_LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv": (lambda: first(nn.Conv2d(4, 5, 3)), "1"),
    "conv without bias": (lambda: first(nn.Conv2d(4, 5, 3, bias=False)), "1"),
    "strided and dilated": (lambda: first(nn.Conv2d(4, 5, 3, stride=2, dilation=2)), "1"),
    "grouped": (lambda: first(nn.Conv2d(4, 6, 3, groups=2, bias=False)), "1"),
    "depthwise": (lambda: first(nn.Conv2d(4, 8, 3, groups=4)), "1"),
    "reflected": (lambda: first(nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")), "1"),
    "replicated": (lambda: first(nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate")), "1"),
    "circular": (lambda: first(nn.Conv2d(4, 5, 3, padding=2, padding_mode="circular")), "1"),
    "valid": (lambda: first(nn.Conv2d(4, 5, 3, padding="valid")), "1"),
    "same for one pixel": (lambda: first(nn.Conv2d(4, 5, 1, padding="same")), "1"),
    "mean and linear": (
        lambda: first(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), "3"
    ),
    "flat images": (lambda: first(nn.Flatten(), nn.Linear(4 * 64, 3, bias=False)), "2"),
    "dropout and identity": (
        lambda: first(nn.Dropout(0.5), nn.Identity(), nn.Conv2d(4, 5, 3)), "3"
    ),
    "average pooling": (lambda: first(nn.AvgPool2d(2), nn.Conv2d(4, 5, 3)), "2"),
    "unshuffled pixels": (lambda: first(nn.PixelUnshuffle(2), nn.Conv2d(16, 5, 3)), "2"),
    "shuffled pixels": (lambda: first(nn.PixelShuffle(2), nn.Conv2d(1, 5, 3)), ""),
    "transposed over all": (lambda: first(nn.ConvTranspose2d(4, 5, 3, padding=2)), "1"),
    "transposed, grouped": (
        lambda: first(nn.ConvTranspose2d(4, 6, 2, padding=1, groups=2, bias=False)), "1"
    ),
    "transposed, dilated": (
        lambda: first(nn.ConvTranspose2d(4, 5, 3, padding=4, dilation=2)), "1"
    ),
    "reflection by a layer": (lambda: first(nn.ReflectionPad2d(1), nn.Conv2d(4, 5, 3)), "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_norm_folds_into_what_comes_after_it(name):
    build, host = LINEAR_LAYERS[name]
    model = made(build())
    plan = checked(model)
    if host:
        assert hosts(plan, "0") == (host,)
    else:
        assert refused(plan, "0") is Reason.CHANNEL_MISMATCH


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (2, 3, 2, 6)])
def test_norm_folds_into_linear_layers_of_any_rank(shape):
    """The norm sees the features as channels, the layer as the last axis."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.bn(x.reshape(-1, 6)).reshape(shape))

    model = made(Net(forward, bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 4)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    assert hosts(checked(model, x), "bn") == ("fc",)


def test_norm_over_sequences_folds_into_a_linear_layer_after_a_transposition():
    model = made(
        Net(lambda m, x: m.fc(m.bn(x).transpose(1, 2)), bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 4))
    )
    assert hosts(checked(model, torch.rand(2, 6, 7)), "bn") == ("fc",)


def test_norm_whose_channels_are_no_features_of_the_linear_layer_is_kept():
    model = made(Net(lambda m, x: m.fc(m.bn(x)), bn=nn.BatchNorm1d(6), fc=nn.Linear(7, 4)))
    assert refused(checked(model, torch.rand(2, 6, 7)), "bn") is Reason.CHANNEL_MISMATCH


@pytest.mark.parametrize("bias", [False, True])
def test_norm_folds_into_a_matrix_product(bias):
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return torch.addmm(m.offset, y, m.matrix) if bias else y @ m.matrix

    model = made(
        Net(
            forward,
            bn=nn.BatchNorm1d(6),
            matrix=nn.Parameter(torch.randn(6, 4)),
            offset=nn.Parameter(torch.randn(4)),
        ),
    )
    plan = checked(model, ROWS)
    if bias:
        assert hosts(plan, "bn") == ("",)
    else:
        assert refused(plan, "bn") is Reason.BIAS_NOT_USED


def test_conv1d_and_conv3d_absorb_what_comes_before_them():
    for rank, (norm, conv) in {
        1: (nn.BatchNorm1d, nn.Conv1d), 3: (nn.BatchNorm3d, nn.Conv3d)
    }.items():  # fmt: skip
        model = made(nn.Sequential(norm(4), conv(4, 5, 2)))
        x = torch.randn(2, 4, *[4] * rank, generator=torch.Generator().manual_seed(2))
        assert hosts(checked(model, x), "0") == ("1",)


def test_several_consumers_absorb_a_norm_together():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.a(y).sum((2, 3)) * m.b(y).sum((2, 3)) + m.c(y.flatten(1))

    model = made(
        Net(
            forward,
            bn=nn.BatchNorm2d(4),
            a=nn.Conv2d(4, 3, 3),
            b=nn.Conv2d(4, 3, 1, bias=False),
            c=nn.Linear(256, 3),
        )
    )
    assert set(hosts(checked(model), "bn")) == {"a", "b", "c"}


def test_two_norms_of_a_concat_fold_for_their_own_channels():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(torch.cat([m.a(x), x.tanh(), m.b(x.exp())], 1))

    model = made(Net(forward, a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4), conv=nn.Conv2d(12, 5, 3)))
    plan = checked(model)
    assert hosts(plan, "a") == hosts(plan, "b") == ("conv",)


def test_norm_folds_into_groups_after_a_channel_shuffle():
    model = made(first(nn.ChannelShuffle(2), nn.Conv2d(4, 6, 3, groups=2)))
    assert hosts(checked(model), "0") == ("2",)


def test_norm_called_twice_folds_where_both_calls_end_in_one_layer():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(torch.cat([m.bn(x), m.bn(x.tanh())], 1))

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(8, 5, 3)))
    assert hosts(checked(model), "bn") == ("conv",)


def test_norm_before_a_layer_that_is_called_twice_folds_where_both_calls_have_it():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(m.bn(x)) + m.conv(m.bn(x.tanh()))

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 5, 3)))
    assert hosts(checked(model), "bn") == ("conv",)


def test_norms_in_a_row_fold_into_the_layer_after_them():
    model = made(first(nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 3)))
    plan = checked(model)
    assert {d.path for d in plan.folds} == {"0", "1", "3"}
    assert all(d.forward and d.hosts == ("4",) for d in plan.folds)


def test_layer_absorbs_norms_on_both_sides():
    model = made(first(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()))
    plan = checked(model)
    assert [(d.path, d.forward, d.hosts) for d in plan.decisions] == [
        ("0", True, ("1",)),
        ("2", False, ("1",)),
    ]
    result = bntools.fold(model, IMAGE.double())
    assert result.report.check
    assert all(d.float64_error < 1e-12 for d in result.report.folds)


def test_norm_that_folds_backward_does_not_fold_forward():
    model = made(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))
    plan = checked(model)
    assert [(d.forward, d.hosts) for d in plan.decisions] == [(False, ("0",))]


# Where the shift cannot go


@pytest.mark.parametrize("kernel", [1, 3])
def test_padded_convolution_absorbs_a_scale_only(kernel):
    layers = nn.Conv2d(4, 5, kernel, padding=1)
    assert refused(checked(made(first(layers))), "0") is Reason.PADDED
    assert hosts(checked(made(first(layers), shifted=False)), "0") == ("1",)


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(1), nn.ConstantPad2d(1, 2.0)])
def test_padding_before_the_layer_is_seen(pad):
    model = first(pad, nn.Conv2d(4, 5, 3))
    assert refused(checked(made(model)), "0") in (Reason.PADDED, Reason.CHANNEL_MISMATCH)
    unshifted = checked(made(model, shifted=False))
    if isinstance(pad, nn.ZeroPad2d):
        assert hosts(unshifted, "0") == ("2",)
    else:
        assert refused(unshifted, "0") is Reason.CHANNEL_MISMATCH


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 2},
        {"padding": 1},
        {"padding": 2, "stride": 2, "output_padding": 1},
        {"padding": 2, "dilation": 2},
        {},
    ],
    ids=str,
)
def test_transposed_convolution_with_a_border_absorbs_a_scale_only(options):
    layers = nn.ConvTranspose2d(4, 5, 3, **options)
    assert refused(checked(made(first(layers))), "0") is Reason.PADDED
    assert hosts(checked(made(first(layers), shifted=False)), "0") == ("1",)


def test_into_two_convolutions_of_which_one_is_padded_nothing_folds():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.a(y).mean() + m.b(y)

    model = Net(
        forward, bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 3, 3), b=nn.Conv2d(4, 3, 3, padding=1)
    )
    assert refused(checked(made(model)), "bn") is Reason.PADDED


def test_average_that_counts_its_padding_lets_a_scale_pass_only():
    layers = [nn.AvgPool2d(3, padding=1), nn.Conv2d(4, 5, 2)]
    assert refused(checked(made(first(*layers))), "0") is Reason.SHIFT_STOPPED
    assert hosts(checked(made(first(*layers), shifted=False)), "0") == ("2",)
    uncounted = [nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.Conv2d(4, 5, 2)]
    assert hosts(checked(made(first(*uncounted))), "0") == ("2",)


def test_divisor_of_an_average_is_in_the_shift():
    model = made(first(nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(4, 5, 3)))
    assert hosts(checked(model), "0") == ("2",)


def test_paths_that_change_the_shift_differently_let_a_scale_pass_only():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.conv(torch.cat([y, y * 2], 1))

    model = Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(8, 5, 3))
    assert refused(checked(made(model)), "bn") is Reason.SHIFT_STOPPED
    assert hosts(checked(made(model, shifted=False)), "bn") == ("conv",)


def test_activation_lets_a_positive_scale_pass_and_no_shift():
    layers = [nn.ReLU(), nn.Conv2d(4, 5, 3)]
    assert refused(checked(made(first(*layers), positive=True)), "0") is Reason.SHIFT_STOPPED
    negative = made(first(*layers), shifted=False)
    assert refused(checked(negative), "0") is Reason.NEGATIVE_SCALE
    assert hosts(checked(made(first(*layers), positive=True, shifted=False)), "0") == ("2",)


def test_largest_value_of_a_window_follows_a_positive_scale():
    layers = [nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)]
    assert hosts(checked(made(first(*layers), positive=True)), "0") == ("2",)
    assert refused(checked(made(first(*layers))), "0") is Reason.NEGATIVE_SCALE


def test_zeros_that_are_pooled_stop_a_shift():
    layers = [nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)]
    plan = checked(made(first(*layers), positive=True))
    assert refused(plan, "0") is Reason.PADDED


# Who else sees what the norm gives


def test_norm_into_a_convolution_and_something_else_is_kept():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.conv(y).mean() + y.relu()

    plan = checked(made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))))
    assert refused(plan, "bn") is Reason.NOT_BEFORE_LINEAR


@pytest.mark.parametrize(
    "how",
    ["returned", "kept", "number", "hook", "arguments", "unused", "activation", "list"],
)
def test_norm_whose_output_is_seen_is_kept(how):
    def forward(m: Any, x: Tensor) -> Any:
        y = m.bn(x)
        if how == "kept":
            m.last = y
        if how == "number":
            return m.conv(y) * y.sum().item()
        if how == "unused":
            return m.conv(x)
        if how == "list":
            return m.conv(y) + torch.tensor(y.flatten()[:1].tolist()).to(y)
        if how == "activation":
            return m.conv(y.gelu() if hasattr(y, "gelu") else F.gelu(y))
        return (m.conv(y), y.flatten(1)) if how == "returned" else m.conv(y)

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3), last=None))
    if how == "hook":
        model.conv.register_forward_pre_hook(lambda *_: None)
    if how == "arguments":  # of which the first are the arguments of the call
        model.conv.register_forward_hook(lambda *_: None)
    plan = bntools.plan_fold(model, IMAGE.double())
    reasons = {"returned": Reason.RETURNED, "kept": Reason.RETURNED}
    reasons |= {"hook": Reason.HOOKS, "arguments": Reason.HOOKS}
    assert refused(plan, "bn") is reasons.get(how, Reason.NOT_BEFORE_LINEAR)


def test_host_called_by_keywords_in_any_order_is_found():
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(bias=m.fc.bias, weight=m.fc.weight, input=m.bn(x))

    model = made(Net(forward, bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 3)))
    assert hosts(checked(model, ROWS), "bn") == ("fc",)


def test_what_comes_to_nothing_stops_no_fold():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        y.flatten(1).relu().transpose(0, 1)
        y.sum()
        return m.conv(y)

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3)))
    assert hosts(checked(model), "bn") == ("conv",)


def test_slices_and_expansions_of_the_output_reach_the_host():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return m.conv(torch.cat([y[:, 2:], y[:, :1].expand(-1, 3, -1, -1)], 1))

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(5, 3, 3)))
    assert hosts(checked(model), "bn") == ("conv",)


def test_channels_chosen_by_the_data_are_refused():
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.sum((0, 2, 3)).argsort()
        return m.conv(m.bn(x)[:, order])

    plan = bntools.plan_fold(
        made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))), IMAGE.double()
    )
    assert refused(plan, "bn") is Reason.NOT_BEFORE_LINEAR


def test_host_in_a_script_cannot_be_edited():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = torch.jit.script(nn.Conv2d(4, 3, 3).eval())
    assert refused(checked(made(first(conv))), "0") is Reason.SCRIPTED


def test_unpooled_indices_are_of_no_channel():
    """Where a scale is 0 the largest value is anywhere, and the indices would be others."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, where = F.max_pool2d(m.bn(x), 2, return_indices=True)
        return m.conv(y).sum() + where

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3)), positive=True)
    plan = bntools.plan_fold(model, IMAGE.double())
    assert refused(plan, "bn") is Reason.NOT_BEFORE_LINEAR


def test_norm_that_broadcasts_its_input_stays():
    """One channel comes in, four go out: an Identity would give one."""

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4, 1, 1))
            self.offset = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + self.offset

    bntools.register_norm(Spread, affine=lambda m: Affine(m.gain.flatten(), m.offset.flatten()))
    model = nn.Sequential(Spread(), nn.Conv2d(4, 3, 3)).double().eval()
    x = IMAGE[:, :1].double()
    result = bntools.fold(model, x)
    assert difference(outputs(result.model, x), outputs(model, x)) < 1e-12
    assert result.report.folds == ()
    assert result.report.check is None


def test_output_of_the_norm_as_a_weight_is_no_data():
    model = made(Net(lambda m, x: F.linear(x, m.bn(x), None), bn=nn.BatchNorm1d(6)))
    assert refused(checked(model, ROWS), "bn") is Reason.NOT_BEFORE_LINEAR


def test_shared_host_is_refused_as_backward():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.conv(m.bn(x)) + m.conv(x)

    plan = checked(made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))))
    assert refused(plan, "bn") is Reason.HOST_SHARED


def test_tied_weight_is_refused_as_backward():
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    plan = checked(made(nn.Sequential(nn.BatchNorm2d(4), a, nn.Tanh(), b)))
    assert refused(plan, "0") is Reason.TIED_WEIGHT


def test_host_that_ignores_its_bias_cannot_take_a_shift():
    class WithoutBias(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
            return F.conv2d(input, self.weight)

    model = first(WithoutBias(4, 5, 3, bias=False))
    assert refused(checked(made(model)), "0") is Reason.BIAS_NOT_USED
    assert hosts(checked(made(model, shifted=False)), "0") == ("1",)


def test_norm_between_a_host_without_bias_and_another_layer_folds_forward():
    """Backward the shift has nowhere to go, which only the second recording shows."""

    class WithoutBias(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
            return F.conv2d(input, self.weight)

    model = made(
        nn.Sequential(WithoutBias(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1))
    )
    assert hosts(checked(model), "1") == ("2",)


def test_input_written_in_place_before_the_host_runs_is_seen():
    """The norm gives a copy; an Identity would give what is written over."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 2 - x
        y = m.bn(x)
        x.add_(1)
        return m.conv(y) + x.sum()

    plan = checked(made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))))
    assert refused(plan, "bn") is Reason.WRITTEN_IN_PLACE


def test_base_of_a_view_written_in_place_is_seen():
    def forward(m: Any, x: Tensor) -> Tensor:
        base = x.flatten(1) * 2
        y = m.bn(base.view(-1, 4, 8, 8))
        base.zero_()
        return m.conv(y) + base.sum()

    plan = checked(made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))))
    assert refused(plan, "bn") is Reason.WRITTEN_IN_PLACE


def test_input_written_in_place_after_the_host_ran_is_no_matter():
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 2 - x
        y = m.conv(m.bn(x))
        return x.add_(1).sum() + y

    model = made(Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3)))
    assert hosts(checked(model), "bn") == ("conv",)


def test_result_written_in_place_is_no_longer_a_copy_and_is_kept():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        return m.conv(m.bn(y).relu_()) + y.sum()

    model = Net(forward, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3))
    plan = checked(made(model, shifted=False, positive=True))
    assert refused(plan, "bn") is Reason.NOT_BEFORE_LINEAR


def test_view_that_mixes_channels_is_refused():
    model = Net(
        lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1).reshape(2, 16, 16)),
        bn=nn.BatchNorm2d(4),
        fc=nn.Linear(16, 3),
    )
    assert hosts(checked(made(model)), "bn") == ("fc",)  # 4 channels repeat in every 16 columns
    mixing = Net(
        lambda m, x: m.fc(m.bn(x).reshape(2, 16, 16)), bn=nn.BatchNorm2d(4), fc=nn.Linear(16, 3)
    )
    assert refused(checked(made(mixing)), "bn") is Reason.CHANNEL_MISMATCH


# Numbers


def test_scales_of_zero_fold():
    model = made(first(nn.Conv2d(4, 5, 3)))
    with torch.no_grad():
        model[0].weight[1:3] = 0.0
    assert hosts(checked(model), "0") == ("1",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_from_float64(dtype):
    model = made(first(nn.Conv2d(4, 5, 3))).to(dtype)
    result = bntools.fold(model, IMAGE.to(dtype))
    assert result.report.check
    assert result.report.decisions[0].forward
    assert result.model[1].weight.dtype == dtype


def test_overflow_of_the_folded_weight_is_refused():
    model = made(first(nn.Conv2d(4, 5, 3))).half()
    with torch.no_grad():
        model[0].running_var.zero_()
        model[0].weight.fill_(1000.0)
    plan = bntools.plan_fold(model, IMAGE.half() * 1e-4)
    assert refused(plan, "0") is Reason.NON_FINITE


def test_overflow_of_the_folded_bias_is_refused():
    model = made(first(nn.Conv2d(4, 5, 3))).half()
    with torch.no_grad():
        model[1].weight.fill_(100.0)
        model[0].bias.fill_(60.0)
    plan = bntools.plan_fold(model, IMAGE.half() * 1e-2)
    assert refused(plan, "0") is Reason.NON_FINITE


def test_inputs_of_whole_numbers_are_normalised_by_the_first_convolution():
    model = made(Net(lambda m, x: m.conv(m.bn(x.double())), bn=nn.BatchNorm2d(4),
                     conv=nn.Conv2d(4, 3, 3)))  # fmt: skip
    x = torch.arange(2 * 4 * 64).reshape(2, 4, 8, 8) % 251
    result = bntools.fold(model, x.to(torch.uint8))
    assert result.report.check
    assert result.report.decisions[0].hosts == ("conv",)


# Registered hosts


class Scaled(nn.Module):
    """A linear layer of the user's own: channels are the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ij->...j", x, self.matrix) + self.offset


def after(module: Any, affine: Affine) -> Any:
    return {
        "matrix": module.matrix.double() * affine.scale,
        "offset": module.offset.double() * affine.scale + affine.shift,
    }


def before(module: Any, affine: Affine) -> Any:
    return {
        "matrix": module.matrix.double() * affine.scale[:, None],
        "offset": module.offset.double() + affine.shift @ module.matrix.double(),
    }


def test_registered_host_absorbs_by_its_rule_for_what_comes_before_it():
    bntools.register_host(Scaled, after=after, before=before, channel_dim=-1)
    model = made(nn.Sequential(nn.BatchNorm1d(6), Scaled(), nn.BatchNorm1d(4)))
    plan = checked(model, ROWS)
    assert hosts(plan, "0") == ("1",)
    assert plan.decisions[1].hosts == ("1",)


def test_registered_host_without_such_a_rule_refuses():
    bntools.register_host(Scaled, after=after, channel_dim=-1)
    plan = checked(made(nn.Sequential(nn.BatchNorm1d(6), Scaled())), ROWS)
    assert refused(plan, "0") is Reason.NOT_BEFORE_LINEAR


def test_reason_that_a_rule_gives_is_the_decision():
    bntools.register_host(
        Scaled, after=after, before=lambda *_: Reason.COMPUTED_WEIGHT, channel_dim=-1
    )
    plan = checked(made(nn.Sequential(nn.BatchNorm1d(6), Scaled())), ROWS)
    assert plan.decisions[0].reason is Reason.COMPUTED_WEIGHT


# The proof


def test_wrong_forward_fold_is_caught_blamed_and_undone(monkeypatch):
    """One norm of three is folded wrongly; the other two are delivered."""
    model = made(
        nn.Sequential(
            nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Tanh(),
            nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6),
        )
    )  # fmt: skip
    real = bntools.affine.Affine.then
    bad = model[4].running_mean.clone()

    def then(self: Affine, other: Affine) -> Affine:
        return real(self, Affine(other.scale, other.shift + 0.01 * bad.sum()))

    assert checked(model, IMAGE).folds[1].path == "3"
    monkeypatch.setattr(bntools.affine.Affine, "then", then)
    result = bntools.fold(model, IMAGE.double())
    assert result.report.check.rolled_back == ("3",)
    assert {d.path for d in result.report.folds} == {"0", "4", "6"}
    assert difference(outputs(result.model, IMAGE.double()), outputs(model, IMAGE.double())) < 1e-9


def test_layers_that_fold_forward_are_judged_by_what_their_hosts_give():
    model = made(first(nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Conv2d(5, 3, 1))).float()
    result = bntools.fold(model, IMAGE)
    (decision,) = result.report.folds
    assert decision.float64_error < 1e-12
    assert decision.native_error < 1e-5


def test_model_whose_output_says_nothing_is_proven_by_its_layers():
    model = made(
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Tanh(),
                      nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1), Nothing())
    )  # fmt: skip
    result = bntools.fold(model, IMAGE.double())
    assert result.report.check
    assert [d.path for d in result.report.folds] == ["0", "2", "4"]
    assert {o.name for o in result.report.check.float64.outputs} >= {"2", "5"}


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


def test_plan_without_padding_refuses_the_flag_with_it():
    model = made(first(nn.Conv2d(4, 5, 3, padding=1)))
    plan = bntools.plan_fold(model, IMAGE.double())
    with pytest.raises(PlanError, match="pad_forward"):
        bntools.fold(model, plan=plan, pad_forward=True)
