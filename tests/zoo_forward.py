"""Zoo models whose norm layers fold into what comes after them, or must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo import IMAGE, Net, case, fold, keep, rand

from bntools.report import Reason


@case({"0": fold("1"), "2": fold("1")})
def input_normalised_by_a_norm():
    """The conv takes one norm before it and one after it."""
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


@case({"2": fold("3")}, rand(2, 3, 8, 8))
def norm_in_the_head():
    """Mean, norm, linear: LeViT and the like."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 5))


@case({"bn": fold("a", "b", "c")})
def norm_into_three_layers():
    """Attention: queries, keys and values."""
    return Net(
        lambda m, x: m.a(y := m.bn(x)).tanh() * m.b(y).sigmoid() + m.c(y),
        bn=nn.BatchNorm2d(3),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(3, 6, 1, bias=False),
        c=nn.Conv2d(3, 6, 1),
    )


@case({"a": fold("conv"), "b": fold("conv")})
def norms_of_two_branches_into_one_layer():
    return Net(
        lambda m, x: m.conv(torch.cat([m.a(x), x.tanh(), m.b(x.exp())], 1)),
        a=nn.BatchNorm2d(3),
        b=nn.BatchNorm2d(3),
        conv=nn.Conv2d(9, 4, 3),
    )


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.NOT_BEFORE_LINEAR)})
def norm_before_a_layer_and_something_else():
    return Net(
        lambda m, x: m.conv(y := m.bn(x)).mean((2, 3), keepdim=True) * y.relu().sum(),
        bn=nn.BatchNorm2d(3),
        conv=nn.Conv2d(3, 6, 3),
    )


@case({"0": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.PADDED)})
def norm_before_a_padded_layer():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1))


@case({"0": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.PADDED)})
def norm_before_a_transposed_layer():
    return nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.PADDED)})
def norm_before_two_layers_of_which_one_pads():
    return Net(
        lambda m, x: m.a(y := m.bn(x)).mean() + m.b(y),
        bn=nn.BatchNorm2d(3),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3, padding=1),
    )


@case({"0": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.SHIFT_STOPPED)})
def norm_before_an_average_that_counts_zeros():
    return nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 6, 3))


def _turn_round(model: Any) -> None:
    model[0].weight.data[0] = -1.0


@case({"0": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.NEGATIVE_SCALE)}, finish=_turn_round)
def negative_scale_before_a_maximum():
    return nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 6, 3))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.CHANNEL_MISMATCH)})
def norm_before_a_layer_over_mixed_channels():
    return Net(
        lambda m, x: m.fc(m.bn(x).reshape(2, 12, 16)), bn=nn.BatchNorm2d(3), fc=nn.Linear(16, 4)
    )


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.HOST_SHARED)})
def norm_before_one_of_two_calls_of_a_layer():
    return Net(
        lambda m, x: m.conv(m.bn(x)).tanh() + m.conv(x),
        bn=nn.BatchNorm2d(3),
        conv=nn.Conv2d(3, 6, 3),
    )


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.WRITTEN_IN_PLACE)})
def input_written_before_the_layer_runs():
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.tanh()
        y = m.bn(x)
        x.mul_(x)
        return m.conv(y) + x.sum()

    return Net(forward, bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 6, 3))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, forward=Reason.RETURNED)}, IMAGE)
def norm_before_a_layer_is_returned():
    return Net(
        lambda m, x: (m.conv(y := m.bn(x)), y), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 6, 3)
    )
