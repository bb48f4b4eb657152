"""The arithmetic of merging: convolutions and what can be written as one, added and composed.

Everything is float64. A `Filter` is what a convolution, a linear layer, an identity, a scaling per
channel, an average pooling or a padding with zeros does; sums and sequences of filters are filters
again where the result is exact at the borders, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bntools.affine import Affine
from bntools.dataflow.reach import Refused
from bntools.report import Reason

__all__ = ["Filter", "added", "average", "bordered", "cropped", "identity", "scaling", "then"]

Sizes = tuple[int, ...]
_ROUNDING = 1e-12  # of what a forward computes in another order than we do


@dataclass(frozen=True, eq=False)
class Filter:
    """A convolution: `y[o] = bias + sum_j weight[..., j] * x[stride * o - before + dilation * j]`.

    x is zero outside of its bounds: `before` and `after` are how many such zeros there are at both
    ends of each axis; where they are negative, so much is cut off. `weight` has shape
    (C_out, C_in / groups, *kernel), `bias` (C_out,). A linear layer is a filter without axes.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    stride: Sizes
    dilation: Sizes
    before: Sizes
    after: Sizes

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            tensor = getattr(self, name).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, tensor)

    @property
    def kernel(self) -> Sizes:
        """The size of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        """How many channels it takes."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """How many channels it gives."""
        return self.weight.shape[0]

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel is made of the input channel of the same number."""
        return self.in_channels == self.out_channels == self.groups

    @property
    def growth(self) -> Sizes:
        """For each axis what the output of a call with stride 1 has more than its input."""
        sizes = zip(self.before, self.after, self.dilation, self.kernel, strict=True)
        return tuple(b + a - d * (k - 1) for b, a, d, k in sizes)

    def scaled(self, factor: float) -> Filter:
        """The filter times a number."""
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)

    def regrouped(self, groups: int) -> Filter:
        """The same map with fewer groups, of which `self.groups` is a multiple."""
        if groups == self.groups:
            return self
        blocks, parts = self.groups // groups, _by_group(self)
        outputs, inputs = parts.shape[1:3]
        whole = parts.new_zeros(groups, blocks, outputs, blocks, inputs, *self.kernel)
        for i in range(blocks):
            whole[:, i, :, i] = parts[i::blocks]
        weight = whole.reshape(self.out_channels, blocks * inputs, *self.kernel)
        return replace(self, weight=weight, groups=groups)

    def balanced(self) -> Filter:
        """The same map with as many zeros before as after, which is what layers can have."""
        padding, zeros = [], []
        sizes = zip(self.before, self.after, self.dilation, self.kernel, strict=True)
        for before, after, step, kernel in sizes:
            even, front, back = _evened(before, after, step if kernel > 1 else 1)
            padding.append(even)
            zeros.append((front, back))
        steps = tuple(
            step if kernel > 1 else 1
            for step, kernel in zip(self.dilation, self.kernel, strict=True)
        )
        ends = [end for pair in reversed(zeros) for end in pair]
        alike = tuple(padding)
        weight = F.pad(self.weight, ends)
        return replace(self, weight=weight, dilation=steps, before=alike, after=alike)


def _evened(before: int, after: int, step: int) -> tuple[int, int, int]:
    """The padding at both ends of an axis, and how many taps of zero then go before and after."""
    least = max(before, after, 0)
    for even in range(least, least + step):
        front, back = even - before, even - after
        if front % step == back % step == 0:
            return even, front // step, back // step
    raise Refused(Reason.OTHER_GEOMETRY, "its padding cannot be made even")


def identity(channels: int, rank: int) -> Filter:
    """The map that changes nothing, on maps with `rank` axes beside batch and channels."""
    return scaling(Affine.identity(channels), rank)


def scaling(affine: Affine, rank: int) -> Filter:
    """A per-channel affine map: a depthwise convolution with a kernel of one."""
    weight = affine.scale.reshape(-1, 1, *(1,) * rank)
    one, none = (1,) * rank, (0,) * rank
    return Filter(weight, affine.shift, affine.channels, one, one, none, none)


def bordered(first: Filter, before: Sizes, after: Sizes, values: Tensor) -> Filter:
    """One value per channel added at both ends of each axis of what a filter gives.

    Exact where these are what the filter gives for zeros: a kernel of one, stride 1, this bias.
    """
    for axis, ends in enumerate(zip(before, after, strict=True)):
        if any(ends) and not _is_plain(first, axis):
            raise Refused(Reason.PADDED_BETWEEN, "what is padded comes from no plain 1x1")
    apart = (first.bias - values).abs()
    limit = _ROUNDING * torch.maximum(first.bias.abs(), values.abs()).max()
    if any((*before, *after)) and not bool((apart <= limit).all()):
        detail = "the padding has other values than its layers give for zeros"
        raise Refused(Reason.PADDED_BETWEEN, detail)
    return replace(
        first,
        before=tuple(a + b for a, b in zip(first.before, before, strict=True)),
        after=tuple(a + b for a, b in zip(first.after, after, strict=True)),
    )


def cropped(channels: int, before: Sizes, after: Sizes) -> Filter:
    """What is left where so many values are cut off at both ends of each axis."""
    return replace(
        identity(channels, len(before)),
        before=tuple(-size for size in before),
        after=tuple(-size for size in after),
    )


def average(
    channels: int, kernel: Sizes, stride: Sizes, padding: Sizes, divisor: int | None = None
) -> Filter:
    """An average pooling that counts padding: a depthwise convolution with equal weights."""
    share = 1 / (divisor or math.prod(kernel))
    weight = torch.full((channels, 1, *kernel), share, dtype=torch.float64)
    nothing = torch.zeros(channels, dtype=torch.float64)
    return Filter(weight, nothing, channels, stride, (1,) * len(kernel), padding, padding)


def added(terms: Sequence[tuple[float, Filter]]) -> Filter:
    """The sum of coefficient times filter, all of one input; `Refused` where there is none.

    Strides must be equal. Equal growth means equal output sizes for every size of input; for even
    padding p that is an equal `p - d * (k - 1) / 2`. Where dilations differ, or places, the sum
    has the largest dilation that fits all, and zeros between taps (UniRepLKNet, Ding et al. 2024).
    """
    filters = [each for _, each in terms]
    first = filters[0]
    for other in filters[1:]:
        if (other.in_channels, other.out_channels) != (first.in_channels, first.out_channels):
            raise Refused(Reason.CHANNEL_MISMATCH, "its branches have other numbers of channels")
        if other.stride != first.stride:
            raise _differ("strides", first.stride, other.stride)
        if other.growth != first.growth:
            raise _differ("sizes of output", first.growth, other.growth)
    groups = math.gcd(*(each.groups for each in filters))
    dilation = tuple(_common_dilation(filters, axis) for axis in range(len(first.kernel)))
    before = tuple(map(max, zip(*(each.before for each in filters), strict=True)))
    after = tuple(map(max, zip(*(each.after for each in filters), strict=True)))
    kernel = [
        (b + a - g) // d + 1
        for b, a, g, d in zip(before, after, first.growth, dilation, strict=True)
    ]
    weight = torch.zeros(
        first.out_channels, first.in_channels // groups, *kernel, dtype=torch.float64
    )
    for factor, each in terms:
        weight[_places(each, before, dilation)] += factor * each.regrouped(groups).weight
    bias = torch.stack([factor * each.bias for factor, each in terms]).sum(0)
    return Filter(weight, bias, groups, first.stride, dilation, before, after)


def _common_dilation(filters: Sequence[Filter], axis: int) -> int:
    """The largest step in which the taps of all filters are, as far apart as their ends are."""
    steps = (each.dilation[axis] for each in filters if each.kernel[axis] > 1)
    apart = (each.before[axis] - filters[0].before[axis] for each in filters)
    return math.gcd(*steps, *apart) or 1


def _places(each: Filter, before: Sizes, dilation: Sizes) -> Any:
    """Where the taps of a filter are in a larger kernel, as an index."""
    found = []
    for axis, (most, step) in enumerate(zip(before, dilation, strict=True)):
        start, size = (most - each.before[axis]) // step, each.kernel[axis]
        apart = each.dilation[axis] // step if size > 1 else 1
        found.append(slice(start, start + apart * (size - 1) + 1, apart))
    return (..., *found)


def _differ(what: str, one: object, other: object) -> Refused:
    return Refused(Reason.OTHER_GEOMETRY, f"its branches have other {what}: {one} and {other}")


def then(first: Filter, second: Filter) -> Filter:
    """One filter after the other, as one; `Refused` where the borders would differ.

    Exact where the second adds no zeros, or where the first one gives zero outside of its bounds:
    a kernel of one, stride 1, no bias.
    """
    if first.out_channels != second.in_channels:
        raise Refused(Reason.CHANNEL_MISMATCH, "its layers have other numbers of channels")
    _exact_at_borders(first, second)
    groups = math.gcd(first.groups, second.groups)
    axes = [_Axis.of(first, second, axis) for axis in range(len(first.kernel))]
    bias = _through(second, first.bias) + second.bias
    return Filter(
        _composed(first, second, axes),
        bias,
        groups,
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(axis.dilation for axis in axes),
        tuple(axis.before for axis in axes),
        tuple(axis.after for axis in axes),
    )


def _exact_at_borders(first: Filter, second: Filter) -> None:
    for axis, (before, after) in enumerate(zip(second.before, second.after, strict=True)):
        if before <= 0 and after <= 0:
            continue
        if not _is_plain(first, axis):
            detail = "the second of two layers is padded, and the first is no plain 1x1"
            raise Refused(Reason.PADDED_BETWEEN, detail)
        if first.bias.any():
            detail = "the second of two layers is padded with zeros, the first has a bias"
            raise Refused(Reason.PADDED_BETWEEN, detail)


def _is_plain(each: Filter, axis: int) -> bool:
    """Whether a filter takes each place of an axis to the same place, and cuts nothing off."""
    cut = min(each.before[axis], each.after[axis]) < 0
    return each.kernel[axis] == each.stride[axis] == 1 and not cut


@dataclass(frozen=True)
class _Axis:
    """One axis of a composition: the taps of the inner and outer kernel, in steps of `dilation`."""

    inner: int
    outer: int
    size: int
    dilation: int
    before: int
    after: int

    @classmethod
    def of(cls, first: Filter, second: Filter, axis: int) -> _Axis:
        sizes = first.kernel[axis], second.kernel[axis]
        near, far = first.dilation[axis], first.stride[axis] * second.dilation[axis]
        steps = [s for s, size in zip((near, far), sizes, strict=True) if size > 1]
        dilation = math.gcd(*steps) if steps else 1
        reach = near * (sizes[0] - 1) + far * (sizes[1] - 1)
        before = first.stride[axis] * second.before[axis] + first.before[axis]
        # floor((floor(a / m) + b) / n) is floor((a + m * b) / (m * n)): exact for every size
        growth = first.growth[axis] + first.stride[axis] * second.growth[axis]
        return cls(
            near // dilation if sizes[0] > 1 else 1,
            far // dilation if sizes[1] > 1 else 1,
            reach // dilation + 1,
            dilation,
            before,
            growth - before + reach,
        )


def _composed(first: Filter, second: Filter, axes: Sequence[_Axis]) -> Tensor:
    groups, product_at = _products(first, second)
    inputs, outputs = first.in_channels // groups, second.out_channels // groups
    shape = (groups, outputs, inputs, *(axis.size for axis in axes))
    weight = torch.zeros(shape, dtype=torch.float64)
    for tap in product(*map(range, second.kernel)):
        places = [
            slice(start := axis.outer * j, start + axis.inner * (size - 1) + 1, axis.inner)
            for axis, j, size in zip(axes, tap, first.kernel, strict=True)
        ]
        index: Any = (..., *places)
        weight[index] += product_at((..., *tap))
    return weight.flatten(0, 1)


def _products(first: Filter, second: Filter) -> tuple[int, Callable[[Any], Tensor]]:
    """The groups of a composition, and what one tap of the second makes of the first's kernel.

    Shape (groups, outputs, inputs, *kernel of the first). A depthwise filter mixes no channels:
    there are no matrices to multiply, which for wide layers takes minutes.
    """
    axes = (1,) * len(first.kernel)
    if second.is_depthwise:
        groups, inner = first.groups, _by_group(first)
        outer = second.weight.reshape(groups, -1, 1, *second.kernel)
        return groups, lambda tap: outer[tap].reshape(groups, -1, 1, *axes) * inner
    if first.is_depthwise:
        groups, outer = second.groups, _by_group(second)
        inner = first.weight.reshape(groups, 1, -1, *first.kernel)
        return groups, lambda tap: outer[tap].reshape(*outer.shape[:3], *axes) * inner
    groups = math.gcd(first.groups, second.groups)
    inner, outer = _by_group(first.regrouped(groups)), _by_group(second.regrouped(groups))
    return groups, lambda tap: torch.einsum("gom,gmi...->goi...", outer[tap], inner)


def _by_group(each: Filter) -> Tensor:
    """The weight with an axis of groups before that of the outputs of each."""
    outputs = each.out_channels // each.groups
    return each.weight.reshape(each.groups, outputs, *each.weight.shape[1:])


def _through(second: Filter, constant: Tensor) -> Tensor:
    """What a filter without its bias makes of one value per channel, away from the borders."""
    taps = second.weight.reshape(*second.weight.shape[:2], -1)
    sums = taps.sum(2).reshape(second.groups, -1, taps.shape[1])
    return torch.einsum("goi,gi->go", sums, constant.reshape(second.groups, -1)).flatten()
