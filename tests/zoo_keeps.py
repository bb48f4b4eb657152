"""Zoo models whose norm layers must be kept: each is a way in which a fold gives wrong numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from zoo import IMAGE, Net, case, either, fold, keep, rand

from bntools.report import Reason


def _parts(**more: Any) -> dict[str, Any]:
    return {"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6), **more}


# The host is used in other ways


@case({"bn_a": keep(Reason.HOST_SHARED), "bn_b": keep(Reason.HOST_SHARED)})
def host_called_twice_with_two_norms():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn_a(m.conv(x)) * m.bn_b(m.conv(x.flip(3)))

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn_a=nn.BatchNorm2d(6), bn_b=nn.BatchNorm2d(6))


@case({"bn": keep(Reason.HOST_SHARED)})
def host_called_twice_once_without_norm():
    return Net(lambda m, x: m.bn(m.conv(x)) * m.conv(x.flip(3)).relu(), **_parts())


@case({"bn": keep(Reason.HOST_SHARED)})
def host_called_under_two_names():
    conv = nn.Conv2d(3, 6, 3)
    return Net(lambda m, x: m.bn(m.a(x)) * m.b(x).relu(), a=conv, b=conv, bn=nn.BatchNorm2d(6))


@case({"bn": keep(Reason.HOST_SHARED)})
def norm_after_two_hosts_one_of_them_shared():
    return Net(
        lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)) * m.b(x).relu(),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn_a": keep(Reason.HOST_SHARED), "bn_b": keep(Reason.HOST_SHARED), "bn": fold("last")})
def pyramid_levels_with_a_norm_each():
    """RetinaNet-like heads share convolutions over the levels, and norms not."""

    def forward(m: Any, x: Tensor) -> list[Tensor]:
        levels = [m.bn_a(m.conv(x)), m.bn_b(m.conv(x[:, :, ::2, ::2]))]
        return [m.bn(m.last(level.relu())) for level in levels]

    return Net(
        forward,
        conv=nn.Conv2d(3, 6, 3),
        bn_a=nn.BatchNorm2d(6),
        bn_b=nn.BatchNorm2d(6),
        last=nn.Conv2d(6, 4, 1),
        bn=nn.BatchNorm2d(4),
    )


@case({"1": keep(Reason.TIED_WEIGHT), "4": keep(Reason.TIED_WEIGHT)})
def tied_weight():
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(3))


@case({"1": keep(Reason.TIED_WEIGHT), "4": keep(Reason.TIED_WEIGHT)})
def tied_bias():
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.bias = first.bias
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(3))


@case({"bn": keep(Reason.TIED_WEIGHT, Reason.HOST_SHARED)})
def weight_of_encoder_is_that_of_decoder():
    return Net(lambda m, x: F.conv_transpose2d(m.bn(m.conv(x)).relu(), m.conv.weight), **_parts())


@case({"bn": keep(Reason.TIED_WEIGHT, Reason.HOST_SHARED)})
def weight_decay_term():
    return Net(lambda m, x: (m.bn(m.conv(x)), m.conv.weight.square().sum()), **_parts())


@case({"bn": keep(Reason.TIED_WEIGHT, Reason.HOST_SHARED)})
def bias_used_elsewhere():
    return Net(lambda m, x: m.bn(m.conv(x)) + m.conv.bias.mean(), **_parts())


@case({"bn": keep(Reason.TIED_WEIGHT, Reason.HOST_SHARED)})
def weight_data_used_elsewhere():
    return Net(lambda m, x: m.bn(m.conv(x)) * F.conv2d(x, m.conv.weight.data).sigmoid(), **_parts())


# The host's output is used in other ways


@case({"bn": keep(Reason.USED_ELSEWHERE)})
def output_used_elsewhere():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + y.relu()

    return Net(forward, **_parts())


@case({"bn": keep(Reason.USED_ELSEWHERE)})
def output_used_elsewhere_through_a_view():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + y.flatten(2).transpose(1, 2).mean()

    return Net(forward, **_parts())


@case({"bn": keep(Reason.USED_ELSEWHERE, Reason.DATA_DEPENDENT)})
def output_used_as_a_number():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) * y.mean().item()

    return Net(forward, **_parts())


@case({"bn": keep(Reason.USED_ELSEWHERE)})
def norm_output_unused_but_not_its_input():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        m.bn(y)
        return y.relu()

    return Net(forward, **_parts())


@case({"bn_a": keep(Reason.USED_ELSEWHERE), "bn_b": keep(Reason.USED_ELSEWHERE)})
def two_norms_on_one_output():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn_a(y) * m.bn_b(y)

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn_a=nn.BatchNorm2d(6), bn_b=nn.BatchNorm2d(6))


@case({"bn_a": keep(Reason.USED_ELSEWHERE), "bn_b": keep(Reason.USED_ELSEWHERE)})
def norms_on_overlapping_slices():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn_a(y[:, :4]) * m.bn_b(y[:, 2:])

    return Net(forward, conv=nn.Conv2d(3, 6, 3), bn_a=nn.BatchNorm2d(4), bn_b=nn.BatchNorm2d(4))


@case({"first": fold("conv"), "second": keep(Reason.USED_ELSEWHERE)})
def norm_on_norm_that_is_used_elsewhere():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(m.conv(x))
        return m.second(y) + y.relu()

    return Net(forward, conv=nn.Conv2d(3, 6, 3), first=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6))


@case({"bn_a": keep(Reason.USED_ELSEWHERE), "bn_b": keep(Reason.USED_ELSEWHERE)})
def dense_connections():
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        return m.bn_a(torch.cat([a, b], 1)).sum(1) + m.bn_b(torch.cat([a, b, c], 1)).sum(1)

    return Net(
        forward,
        a=nn.Conv2d(3, 2, 3),
        b=nn.Conv2d(3, 2, 3),
        c=nn.Conv2d(3, 2, 3),
        bn_a=nn.BatchNorm2d(4),
        bn_b=nn.BatchNorm2d(6),
    )


@case({"bn": keep(Reason.RETURNED)})
def output_returned():
    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        y = m.conv(x)
        return {"out": m.bn(y), "features": [y]}

    return Net(forward, **_parts())


@case({"bn": keep(Reason.RETURNED)})
def view_of_output_returned():
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        return m.bn(y), y.flatten(1)

    return Net(forward, **_parts())


class Box:
    """An object that no tree flattening looks into."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@case({"bn": keep(Reason.RETURNED)})
def output_returned_in_an_object():
    return Net(lambda m, x: Box(pre=(y := m.conv(x)), out=m.bn(y)), **_parts())


def _store(m: Any, x: Tensor) -> Tensor:
    m.last = m.conv(x)
    return m.bn(m.last)


@case({"bn": keep(Reason.RETURNED)})
def output_stored_on_the_model():
    return Net(_store, **_parts(last=None))


@case({"bn": keep(Reason.RETURNED)})
def output_kept_in_a_list():
    def forward(m: Any, x: Tensor) -> Tensor:
        m.seen.append(m.conv(x))
        return m.bn(m.seen.pop() if len(m.seen) > 3 else m.seen[-1])

    return Net(forward, **_parts(seen=[]))


# No linear layer right before


@case({"0": keep(Reason.NOT_AFTER_LINEAR)})
def norm_first():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1))


@case({"2": keep(Reason.NOT_AFTER_LINEAR)})
def activation_between():
    """ConvMixer, and nets whose registration order would say otherwise."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.BatchNorm2d(6))


@case({"2": keep(Reason.SHIFT_STOPPED)})
def in_place_activation_between():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(6))


def _written(write: Callable[[Tensor], Any]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        write(y)
        return m.bn(y)

    return Net(forward, **_parts())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def in_place_operation_between():
    return _written(lambda y: y.mul_(2).tanh_())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def write_through_a_view_between():
    return _written(lambda y: y.view(-1).abs_())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def write_to_one_channel_between():
    return _written(lambda y: y[:, 1].zero_())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def write_to_a_row_between():
    def write(y: Tensor) -> None:
        y[:, :, 0] = 0

    return _written(write)


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def out_argument_between():
    return _written(lambda y: torch.exp(y, out=y))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def write_through_detached_data_between():
    return _written(lambda y: y.data.clamp_(-1, 1))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def foreach_operation_between():
    return _written(lambda y: torch._foreach_exp_([y]))


@case({"bn": keep(Reason.NEGATIVE_SCALE)})
def norm_after_a_residual_sum():
    return Net(
        lambda m, x: m.bn(m.a(x) + m.b(x).relu()),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"3": keep(Reason.SHIFT_STOPPED)})
def norm_after_max_pool():
    """Gammas are negative now and then, and the activation would be in the way anyhow."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(6))


@case({"bn": keep(Reason.PADDED)})
def zero_padding_between():
    return Net(lambda m, x: m.bn(F.pad(m.conv(x), (1, 1, 1, 1))), **_parts())


@case({"bn": keep(Reason.PADDED)})
def zeros_beside_in_a_concatenation():
    """The shortcut of a CIFAR ResNet pads the channels with zeros."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(torch.cat([y, torch.zeros_like(x[:, :2, 2:, 2:])], 1))

    return Net(forward, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(6))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def input_beside_in_a_concatenation():
    return Net(
        lambda m, x: m.bn(torch.cat([m.conv(x), x], 1)),
        conv=nn.Conv2d(3, 4, 3, padding=1),
        bn=nn.BatchNorm2d(7),
    )


@case({"bn": keep(Reason.NOT_AFTER_LINEAR, Reason.DATA_DEPENDENT)})
def scale_from_the_input_between():
    return Net(lambda m, x: m.bn(m.conv(x) * float(x.mean())), **_parts())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def attention_on_channels_between():
    return Net(lambda m, x: m.bn((y := m.conv(x)) * y.mean((2, 3), True).sigmoid()), **_parts())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def mean_of_the_batch_taken_off_between():
    return Net(lambda m, x: m.bn((y := m.conv(x)) - y.mean(0, keepdim=True).abs()), **_parts())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)}, float64=False)
def rounding_to_half_between():
    """What is rounded before the norm is not what would be rounded after it."""
    return Net(lambda m, x: m.bn(m.conv(x).half().to(x.dtype)), **_parts())


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def norm_called_after_a_host_and_after_none():
    return Net(lambda m, x: m.bn(m.conv(m.bn(x))), conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3))


@case({"bn": keep(Reason.NOT_AFTER_LINEAR)})
def running_sum_over_channels_between():
    return Net(lambda m, x: m.bn(m.conv(x).cumsum(1)), **_parts())


# Channels that do not meet


@case({"bn": keep(Reason.CHANNEL_MISMATCH)}, rand(3, 6, 6))
def features_are_not_channels():
    """The norm's channels are axis 1, the features of Linear the last one; both are six."""
    return Net(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(6, 6), bn=nn.BatchNorm1d(6))


@case({"bn": keep(Reason.CHANNEL_MISMATCH)}, rand(2, 3, 7, 7))
def norm_over_every_position():
    return Net(
        lambda m, x: m.bn(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 2, 5), bn=nn.BatchNorm1d(18)
    )


@case({"bn": keep(Reason.CHANNEL_MISMATCH)})
def norm_over_columns():
    return Net(
        lambda m, x: m.bn(m.conv(x).transpose(1, 3)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"1.1": keep(Reason.CHANNEL_MISMATCH)})
def pixel_unshuffle():
    """Norm channels 4c to 4c + 3 are pixels of the host's channel c."""
    norm = nn.Sequential(nn.PixelUnshuffle(2), nn.BatchNorm2d(8))
    return nn.Sequential(nn.Conv2d(3, 2, 3), norm)


@case({"bn": keep(Reason.CHANNEL_MISMATCH, Reason.USED_ELSEWHERE)})
def one_output_twice_in_a_concatenation():
    return Net(
        lambda m, x: m.bn(torch.cat([y := m.conv(x), y], 1)),
        conv=nn.Conv2d(3, 3, 3),
        bn=nn.BatchNorm2d(6),
    )


# Weights and biases that are not what they seem


@case({"1": keep(Reason.COMPUTED_WEIGHT)})
def weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


@case({"1": keep(Reason.COMPUTED_WEIGHT)})
def spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


def _old(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(wrap(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


@case({"1": keep(Reason.COMPUTED_WEIGHT)})
def old_weight_norm():
    """Before its first forward such a model cannot be deep-copied."""
    return _old(torch.nn.utils.weight_norm)


@case({"1": keep(Reason.COMPUTED_WEIGHT)})
def old_spectral_norm():
    return _old(torch.nn.utils.spectral_norm)


class Constrained(nn.Conv2d):
    """EEGNet's: every forward puts weights of a smaller norm in the place of the weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(input)


@case({"1": keep(Reason.COMPUTED_WEIGHT, Reason.TIED_WEIGHT)})
def weight_data_replaced_by_the_forward():
    return nn.Sequential(Constrained(3, 6, 3), nn.BatchNorm2d(6))


@case({"bn": keep(Reason.COMPUTED_WEIGHT, Reason.TIED_WEIGHT)})
def weight_clamped_by_the_forward():
    def forward(m: Any, x: Tensor) -> Tensor:
        m.conv.weight.data.clamp_(-0.05, 0.05)
        return m.bn(m.conv(x))

    return Net(forward, **_parts())


@case({"bn": keep(Reason.COMPUTED_WEIGHT, Reason.FIXED_WEIGHT)})
def parameters_swapped_for_the_call():
    def forward(m: Any, x: Tensor) -> Tensor:
        twice = {name: 2 * tensor for name, tensor in m.conv.named_parameters()}
        return m.bn(torch.func.functional_call(m.conv, twice, (x,)))

    return Net(forward, **_parts())


class Standardised(nn.Conv2d):
    """A weight-standardised convolution: a batch norm in training mode, on the weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias)


@case({"1": keep(Reason.COMPUTED_WEIGHT)})
def standardised_weight():
    return nn.Sequential(Standardised(3, 6, 3), nn.BatchNorm2d(6))


@case({"bn": keep(Reason.COMPUTED_WEIGHT)})
def weight_scaled_by_a_number_of_its_own():
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight / m.conv.weight.norm().item()
        return m.bn(F.conv2d(x, weight, m.conv.bias))

    return Net(forward, **_parts())


@case({"bn": keep(Reason.COMPUTED_WEIGHT)})
def weight_scaled_by_the_input():
    return Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight * x.std().item(), m.conv.bias)), **_parts()
    )


@case({"bn": keep(Reason.COMPUTED_WEIGHT)})
def slice_of_the_weight():
    """Slimmable nets run a part of their channels."""
    return Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight[:4], m.conv.bias[:4])),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(4),
    )


@case({"bn": keep(Reason.COMPUTED_WEIGHT)})
def flipped_weight():
    return Net(lambda m, x: m.bn(F.conv2d(x, m.conv.weight.flip(0), m.conv.bias)), **_parts())


@case({"bn": keep(Reason.COMPUTED_WEIGHT, Reason.NOT_AFTER_LINEAR)}, rand(5, 6))
def weight_from_another_network():
    """A hypernetwork: two activations are multiplied."""
    return Net(
        lambda m, x: m.bn(F.linear(x, m.make(x))), make=nn.Linear(6, 6), bn=nn.BatchNorm1d(5)
    )


@case({"bn": keep(Reason.FIXED_WEIGHT, Reason.COMPUTED_WEIGHT)})
def weight_is_a_plain_attribute():
    """Either reason is a refusal: the module tree does not own that tensor."""
    return Net(
        lambda m, x: m.bn(F.conv2d(x, m.kernel.to(x))),
        kernel=torch.randn(6, 3, 3, 3),
        bn=nn.BatchNorm2d(6),
    )


@case({"bn": keep(Reason.FIXED_WEIGHT, Reason.COMPUTED_WEIGHT)})
def weight_is_a_global():
    return Net(lambda m, x: m.bn(F.conv2d(x, _BLUR.to(x))), bn=nn.BatchNorm2d(3))


_BLUR = torch.linspace(-1, 1, 81).reshape(3, 3, 3, 3)


@case({"bn": keep(Reason.BIAS_NOT_USED)})
def bias_exists_and_is_not_passed():
    return Net(lambda m, x: m.bn(F.conv2d(x, m.conv.weight)), **_parts())


@case({"bn": keep(Reason.BIAS_NOT_USED)})
def bias_is_none_in_a_functional_call():
    return Net(
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, None)),
        conv=nn.Conv2d(3, 6, 3, bias=False),
        bn=nn.BatchNorm2d(6),
    )


class WithoutBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        return F.conv2d(input, self.weight)


@case({"1": keep(Reason.BIAS_NOT_USED)})
def convolution_that_ignores_its_bias():
    """It has none, so that nothing shows what it would do with one."""
    return nn.Sequential(WithoutBias(3, 6, 3, bias=False), nn.BatchNorm2d(6))


@case({"bn": keep(Reason.BIAS_NOT_USED, Reason.FIXED_WEIGHT)}, rand(5, 6))
def matrix_product_without_bias():
    return Net(
        lambda m, x: m.bn(x @ m.matrix),
        matrix=nn.Parameter(torch.randn(6, 4)),
        bn=nn.BatchNorm1d(4),
    )


# The norm is more than a fixed affine


@case({"1": keep(Reason.TRAINING_MODE)}, finish=lambda m: m[1].train())
def norm_in_training_mode():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": fold("0"), "4": keep(Reason.TRAINING_MODE)}, finish=lambda m: m[4].train())
def norm_in_training_mode_after_one_that_folds():
    """Recording and checking run it, and its statistics must be the old ones afterwards."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


@case({"1": keep(Reason.TRAINING_MODE)})
def norm_that_never_leaves_training_mode():
    return nn.Sequential(nn.Conv2d(3, 6, 3), AlwaysTraining(6))


@case({"bn": keep(Reason.TRAINING_MODE, Reason.MORE_THAN_NORM)})
def norm_that_the_forward_puts_into_training_mode():
    return Net(lambda m, x: m.bn.train()(m.conv(x)), **_parts())


@case({"bn": keep(Reason.SHARED_STATISTICS, Reason.COMPUTED_AFFINE)})
def statistics_written_by_the_forward():
    """Adaptation at test time."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.running_mean.copy_(x.mean((0, 2, 3)).repeat(2))
        return m.bn(m.conv(x))

    return Net(forward, **_parts())


class BatchStatistics(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, True, 0.0, self.eps)


@case({"1": keep(Reason.TRAINING_MODE, Reason.MORE_THAN_NORM)})
def norm_that_asks_for_batch_statistics():
    return nn.Sequential(nn.Conv2d(3, 6, 3), BatchStatistics(6))


@case({"1": keep(Reason.NO_STATISTICS)})
def norm_that_tracks_nothing():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))


def _drop_statistics(model: Any) -> None:
    model[1].running_mean = model[1].running_var = None


@case({"1": keep(Reason.NO_STATISTICS)}, finish=_drop_statistics)
def norm_that_lost_its_statistics():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        return super().forward(input).relu()


@case({"1": keep(Reason.MORE_THAN_NORM)})
def unknown_class_with_an_activation():
    return nn.Sequential(nn.Conv2d(3, 6, 3), NormAndActivation(6))


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        return super().forward(input * input.sigmoid())


@case({"1": keep(Reason.MORE_THAN_NORM)})
def unknown_class_that_works_before_it_norms():
    return nn.Sequential(nn.Conv2d(3, 6, 3), ScaledNorm(6))


class AbsoluteNorm(nn.BatchNorm2d):
    """Like InPlace-ABN: gamma is taken without its sign."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in torch)
        mean, variance, gamma = self.running_mean, self.running_var, self.weight.abs()
        return F.batch_norm(input, mean, variance, gamma, self.bias, False, 0.1, self.eps)


@case({"1": keep(Reason.COMPUTED_AFFINE, Reason.MORE_THAN_NORM)})
def gamma_computed_by_the_class():
    return nn.Sequential(nn.Conv2d(3, 6, 3), AbsoluteNorm(6))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@case({"1": keep(Reason.COMPUTED_AFFINE)})
def gamma_parametrised():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    return model


def _batch_norm(bn: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, weight, bn.bias, eps=bn.eps)


@case({"bn": keep(Reason.OUTSIDE_FORWARD)})
def functional_norm_outside_its_forward():
    """Its module is never called, so what is put in its place has no effect."""
    return Net(lambda m, x: _batch_norm(m.bn, m.conv(x), m.bn.weight), **_parts())


@case({"bn": keep(Reason.OUTSIDE_FORWARD, Reason.COMPUTED_AFFINE)})
def functional_norm_with_another_gamma():
    return Net(lambda m, x: _batch_norm(m.bn, m.conv(x), m.bn.weight * 2), **_parts())


@case({"bn": keep(Reason.OUTSIDE_FORWARD, Reason.SHARED_STATISTICS)})
def norm_called_and_used_functionally():
    return Net(
        lambda m, x: (
            m.bn(m.conv(x))
            + _batch_norm(m.bn, x[:, :1].expand(-1, 6, -1, -1)[:, :, 2:, 2:], m.bn.weight)
        ),
        **_parts(),
    )


@case({"bn": keep(Reason.SHARED_STATISTICS)})
def gamma_used_elsewhere():
    return Net(lambda m, x: (m.bn(m.conv(x)), m.bn.weight.abs().sum()), **_parts())


@case({"bn": keep(Reason.SHARED_STATISTICS)})
def running_mean_used_elsewhere():
    return Net(lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.mean(), **_parts())


@case(
    {
        "folds": either("conv", reasons=(Reason.SHARED_STATISTICS,)),
        "stays": keep(Reason.SHIFT_STOPPED, Reason.SHARED_STATISTICS),
    }
)
def kept_norm_shares_its_affine_with_a_folded_one():
    first, second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    second.weight, second.bias = first.weight, first.bias
    return Net(
        lambda m, x: m.stays(m.folds(m.conv(x)).relu()),
        conv=nn.Conv2d(3, 6, 3),
        folds=first,
        stays=second,
    )


@case({"bn": keep(Reason.WRITTEN_IN_PLACE)})
def two_results_of_which_one_is_written():
    """Folded, both calls would return the host's output itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        a, b = m.bn(y), m.bn(y)
        a.relu_()
        return a + b

    return Net(forward, **_parts())


@case({"bn": keep(Reason.WRITTEN_IN_PLACE, Reason.USED_ELSEWHERE)})
def norm_input_written_afterwards():
    """Folded, the written tensor would be the result itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = m.bn(y)
        y.zero_()
        return z

    return Net(forward, **_parts())


@case({"bn": keep(Reason.WRITTEN_IN_PLACE)})
def result_of_an_expanded_pixel_written():
    """Folded, the norm's output would be a view whose elements share memory."""
    return Net(
        lambda m, x: m.bn(m.conv(x).expand(-1, -1, 4, 4)).add_(torch.arange(4.0).to(x)),
        conv=nn.Conv2d(3, 6, 8),
        bn=nn.BatchNorm2d(6),
    )


# Hooks, scripts, and layers that do not run


@case({"1": keep(Reason.HOOKS)}, finish=lambda m: m[0].register_forward_hook(lambda *_: None))
def hook_on_the_host():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": keep(Reason.HOOKS)}, finish=lambda m: m[1].register_forward_hook(lambda *_: None))
def hook_on_the_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": keep(Reason.HOOKS)}, finish=lambda m: m[1].register_forward_pre_hook(lambda *_: None))
def hook_before_the_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


@case({"1": keep(Reason.HOOKS)}, finish=lambda m: m[0].register_forward_hook(lambda *_: None))
def hook_on_the_module_that_ends_with_the_host():
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


@case({"1.0": keep(Reason.HOOKS)}, finish=lambda m: m[1].register_forward_pre_hook(lambda *_: None))
def hook_before_the_module_that_starts_with_the_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))


@case(
    {"1": keep(Reason.HOOKS, Reason.NOT_AFTER_LINEAR)},
    finish=lambda m: m[0].register_forward_hook(lambda _m, _x, y: y * 2),
)
def hook_that_changes_the_output():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


def _script(*modules: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(*modules).eval())


@case({"block.1": keep(Reason.SCRIPTED), "bn": fold("conv")})
def scripted_block():
    return Net(
        lambda m, x: m.bn(m.conv(m.block(x))),
        block=_script(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
        conv=nn.Conv2d(6, 4, 1),
        bn=nn.BatchNorm2d(4),
    )


@case({"1": keep(Reason.SCRIPTED)})
def scripted_host():
    return nn.Sequential(_script(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


@case({"bn": keep(Reason.NOT_EXECUTED), "used": fold("conv")})
def norm_that_never_runs():
    return Net(lambda m, x: m.used(m.conv(x)), **_parts(used=nn.BatchNorm2d(6)))


@case({"bn": keep(Reason.NOT_EXECUTED, Reason.NO_STATISTICS), "used": fold("conv")})
def lazy_norm_that_never_runs():
    return Net(
        lambda m, x: m.used(m.conv(x)),
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.LazyBatchNorm2d(),
        used=nn.BatchNorm2d(6),
    )


# Data decides


def _number(x: Tensor, below: int) -> int:
    """A whole number that another input makes another one."""
    return int(x.double().abs().sum() * 1000) % below


@case({"bn": keep(Reason.DATA_DEPENDENT)})
def channels_chosen_by_the_data():
    def forward(m: Any, x: Tensor) -> Tensor:
        start = _number(x, 97)
        return m.bn(m.conv(x)[:, start : start + 3])

    return Net(forward, conv=nn.Conv2d(3, 100, 1), bn=nn.BatchNorm2d(3))


_ANY_PATH = keep(Reason.DATA_DEPENDENT, Reason.NOT_EXECUTED, Reason.HOST_SHARED)


@case({f"norms.{i}": _ANY_PATH for i in range(31)})
def norm_chosen_by_the_data():
    """Folding the one that was seen would be wrong for all the others."""
    return Net(
        lambda m, x: m.norms[_number(x, 31)](m.conv(x)),
        conv=nn.Conv2d(3, 4, 1),
        norms=nn.ModuleList(nn.BatchNorm2d(4) for _ in range(31)),
    )


@case({"bn": keep(Reason.DATA_DEPENDENT, Reason.NOT_AFTER_LINEAR)})
def channel_order_from_the_data():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y[:, x.flatten()[:6].argsort()])

    return Net(forward, **_parts())


# Numbers that do not fit


def _fill(**values: list[float]) -> Callable[[Any], None]:
    def finish(model: Any) -> None:
        for name, value in values.items():
            getattr(model[-1], name).data.copy_(torch.tensor(value))

    return finish


@case({"1": keep(Reason.NON_FINITE)}, finish=_fill(running_mean=[0.0, float("nan"), 0.0, 1.0]))
def not_a_number_in_the_mean():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@case({"1": keep(Reason.NON_FINITE)}, finish=_fill(running_var=[1.0, -0.5, 1.0, 1.0]))
def negative_variance():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@case(
    {"1": keep(Reason.NON_FINITE)}, finish=_fill(running_var=[1.0, float("inf"), 1.0, float("nan")])
)
def infinite_variance():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def _make_large(model: Any) -> None:
    _fill(running_var=[0.0] * 4, weight=[1.0] * 4)(model)
    model[0].weight.data.mul_(3000)


@case(
    {"1": keep(Reason.NON_FINITE)},
    lambda: IMAGE() * 1e-4,
    finish=_make_large,
    dtype=torch.float16,
    float64=False,
)
def overflow_in_half_precision():
    """1 / sqrt(eps) is 316; weights of 500 have no room for that in float16."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half()


# Affines that are no norm layer


def _scaled(forward: Any, **constants: Tensor) -> nn.Module:
    """A convolution, and arithmetic with constants in the same module."""
    model = Net(forward, conv=nn.Conv2d(3, 4, 3))
    for name, tensor in constants.items():
        setattr(model, name, nn.Parameter(tensor))
    return model


@case({"(mul)": keep(Reason.NOT_NEUTRAL)})
def constant_that_no_number_makes_one():
    """In float32 no g has g * g + eps == 1."""
    gain = torch.rand(4, 1, 1) + 0.5
    return _scaled(lambda m, x: F.silu(m.conv(x) * (m.g * m.g + 1e-5).rsqrt()), g=gain)


@case({"(mul)": keep(Reason.SHARED_STATISTICS)})
def gain_that_is_returned_as_well():
    gain = torch.rand(4, 1, 1) + 0.5
    return _scaled(lambda m, x: (F.silu(m.conv(x) * m.g), m.g * 2), g=gain)


@case({"(mul)": keep(Reason.CHANNEL_MISMATCH)}, rand(2, 3, 6, 6))
def gain_of_the_channels_that_broadcasts_over_the_width():
    return _scaled(lambda m, x: F.silu(m.conv(x) * m.g), g=torch.rand(4) + 0.5)


@case({})
def gain_of_every_position():
    return _scaled(lambda m, x: F.silu(m.conv(x) * m.g), g=torch.rand(1, 4, 6, 6) + 0.5)
