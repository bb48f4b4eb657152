"""The arithmetic of merging against direct evaluation in float64, on random shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bntools.affine import Affine
from bntools.dataflow.reach import Refused
from bntools.merging.filters import Filter, added, average, bordered, identity, scaling, then
from bntools.report import Reason

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MANY = settings(max_examples=60, deadline=None)


def evaluated(filter_: Filter, x: Tensor) -> Tensor:
    """What torch makes of a filter: a convolution after an explicit padding."""
    rank = len(filter_.kernel)
    if rank == 0:
        return F.linear(x, filter_.regrouped(1).weight, filter_.bias)
    ends = [e for p in reversed(list(zip(filter_.before, filter_.after, strict=True))) for e in p]
    return CONVS[rank](
        F.pad(x, ends), filter_.weight, filter_.bias, filter_.stride, 0, filter_.dilation,
        filter_.groups,
    )  # fmt: skip


def is_same(mine: Tensor, truth: Tensor) -> bool:
    return mine.shape == truth.shape and torch.allclose(mine, truth, rtol=1e-10, atol=1e-10)


@dataclass
class Case:
    """A random convolution of ours, and the input that it takes."""

    filter: Filter
    x: Tensor


def drawn(draw, rank: int, inputs: int, outputs: int, **fixed) -> Filter:
    """A convolution with random geometry, but for what is fixed."""
    sizes = st.integers(1, 4)
    common = math.gcd(inputs, outputs)
    groups = draw(st.sampled_from([g for g in range(1, common + 1) if common % g == 0]))
    kernel = fixed.get("kernel", tuple(draw(sizes) for _ in range(rank)))
    seed = draw(st.integers(0, 2**16))
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=random, dtype=torch.float64)
    bias = torch.randn(outputs, generator=random, dtype=torch.float64)
    small = st.integers(0, 3)
    dilation = fixed.get("dilation", tuple(draw(st.integers(1, 3)) for _ in range(rank)))
    before = fixed.get("before", tuple(draw(small) for _ in range(rank)))
    after = fixed.get("after", tuple(draw(small) for _ in range(rank)))
    stride = fixed.get("stride", tuple(draw(st.integers(1, 3)) for _ in range(rank)))
    return Filter(weight, bias * draw(st.sampled_from([0, 1])), groups, stride, dilation, before,
                  after)  # fmt: skip


def maps(rank: int, channels: int, size: int = 11, seed: int = 0) -> Tensor:
    shape = (2, channels, *(size + i for i in range(rank)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.data())
@MANY
def test_a_filter_with_fewer_groups_is_the_same_map(data):
    """Blocks on the diagonal, zeros elsewhere."""
    rank = data.draw(st.integers(1, 3))
    filter_ = drawn(data.draw, rank, 8, 12)
    x = maps(rank, 8, 13)
    for groups in (g for g in range(1, filter_.groups + 1) if filter_.groups % g == 0):
        other = filter_.regrouped(groups)
        assert other.groups == groups
        assert other.in_channels == filter_.in_channels
        assert is_same(evaluated(other, x), evaluated(filter_, x))


def centred(draw, rank: int, channels: int, outputs: int, dilation, stride) -> Filter:
    """A convolution whose padding is as in the others: `p - d * (k - 1) / 2` is 1/2 or 0."""
    kernel = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(rank))
    before = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return drawn(draw, rank, channels, outputs, kernel=kernel, dilation=dilation, stride=stride,
                 before=before, after=before)  # fmt: skip


@given(st.data())
@MANY
def test_a_sum_of_convolutions_is_one_convolution(data):
    """Different kernels, groups and coefficients; at sizes that were not looked at, too."""
    rank = data.draw(st.integers(1, 3))
    dilation = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    terms = [
        (data.draw(st.sampled_from([1.0, -1.0, 0.5, 2.0])),
         centred(data.draw, rank, 6, 6, dilation, stride))
        for _ in range(data.draw(st.integers(2, 4)))
    ]  # fmt: skip
    whole = added(terms)
    assert whole.groups == math.gcd(*(each.groups for _, each in terms))
    for size in (1, 4, 9):
        x = maps(rank, 6, size)
        truth = sum(factor * evaluated(each, x) for factor, each in terms)
        assert is_same(evaluated(whole, x), truth)
        assert is_same(evaluated(whole.balanced(), x), truth)


@given(st.data())
@MANY
def test_even_kernels_with_uneven_padding_add_up_where_they_look_at_one_grid(data):
    """Equal growth and equal phase are enough; the kernel spans what all of them look at."""
    dilation = data.draw(st.integers(1, 3))
    stride = data.draw(st.integers(1, 3))
    growth = data.draw(st.integers(-2, 3))
    terms = []
    for _ in range(3):
        taps, shift = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 2))
        before, after = dilation * shift, growth - dilation * shift + dilation * (taps - 1)
        if after < 0:
            continue
        terms.append((1.0, drawn(data.draw, 1, 4, 4, kernel=(taps,), dilation=(dilation,),
                                 stride=(stride,), before=(before,), after=(after,))))  # fmt: skip
    if not terms:
        return
    whole = added(terms)
    for size in (9, 10, 14):
        x = maps(1, 4, size)
        assert is_same(evaluated(whole, x), sum(evaluated(each, x) for _, each in terms))


@given(st.data())
@MANY
def test_a_sequence_of_convolutions_is_one_convolution_where_it_is_exact(data):
    """The second unpadded, or the first a 1x1 without bias; else it is refused, axis by axis."""
    rank = data.draw(st.integers(0, 2))
    inner = data.draw(st.sampled_from([4, 6]))
    first = drawn(data.draw, rank, 6, inner)
    none = (0,) * rank
    second = drawn(data.draw, rank, inner, 6, before=none, after=none)
    whole = then(first, second)
    for size in (38, 39, 43):
        x = maps(rank, 6, size)
        assert is_same(evaluated(whole, x), evaluated(second, evaluated(first, x)))


@given(st.data())
@MANY
def test_a_padded_layer_after_a_pointwise_one_without_bias_is_exact(data):
    """Zeros stay zeros: a 1x1 may be padded itself."""
    rank = data.draw(st.integers(1, 3))
    one = (1,) * rank
    first = drawn(data.draw, rank, 6, 4, kernel=one, stride=one, dilation=one)
    first = Filter(first.weight, first.bias * 0, first.groups, one, one, first.before, first.after)
    second = drawn(data.draw, rank, 4, 6)
    whole = then(first, second)
    for size in (9, 10, 12):
        x = maps(rank, 6, size)
        assert is_same(evaluated(whole, x), evaluated(second, evaluated(first, x)))


@given(st.data())
@MANY
def test_what_is_refused_at_borders_would_be_wrong(data):
    """The refusal is needed: the composition that it forbids differs from the truth."""
    first = drawn(data.draw, 1, 4, 4, dilation=(1,))
    second = drawn(data.draw, 1, 4, 4, kernel=(3,), before=(1,), after=(1,), dilation=(1,),
                   stride=(1,))  # fmt: skip
    plain = first.kernel == (1,) and first.stride == (1,) and not first.bias.any()
    if plain:
        then(first, second)
        return
    with pytest.raises(Refused) as caught:
        then(first, second)
    assert caught.value.reason is Reason.PADDED_BETWEEN


@given(st.data())
@MANY
def test_average_pooling_that_counts_padding_is_a_convolution(data):
    """count_include_pad=True, or no padding; any stride and divisor."""
    rank = data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    divisor = data.draw(st.sampled_from([None, 1, 7])) if rank > 1 else None
    x = maps(rank, 3, 9)
    given_ = (divisor,) if rank > 1 else ()
    truth = POOLS[rank](x, kernel, stride, padding, False, True, *given_)
    assert is_same(evaluated(average(3, kernel, stride, padding, divisor), x), truth)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_identity_and_scaling_are_depthwise_filters(rank):
    """What has no layer at all is a kernel of one."""
    x = maps(rank, 5)
    assert is_same(evaluated(identity(5, rank).regrouped(1), x), x)
    affine = Affine(torch.randn(5), torch.randn(5))
    view = (-1, *(1,) * rank)
    truth = x * affine.scale.view(view) + affine.shift.view(view)
    assert is_same(evaluated(scaling(affine, rank).regrouped(1), x), truth)


def test_depthwise_layers_compose_without_a_matrix_product():
    """Of either side, in any groups: a wide layer would take minutes else."""
    x = maps(2, 6)
    plain = ((1, 1), (1, 1), (0, 0), (0, 0))
    for groups in (1, 2, 3, 6):
        depthwise = Filter(torch.randn(6, 1, 3, 2), torch.randn(6), 6, *plain)
        other = Filter(torch.randn(6, 6 // groups, 2, 3), torch.randn(6), groups, *plain)
        for first, second in ((depthwise, other), (other, depthwise), (depthwise, depthwise)):
            whole = then(first, second)
            assert whole.groups == math.gcd(first.groups, second.groups)
            assert is_same(evaluated(whole, x), evaluated(second, evaluated(first, x)))


def test_an_explicit_padding_before_a_convolution_is_its_padding():
    """Uneven padding becomes a larger kernel with zeros at one end."""
    x = maps(2, 4)
    weight = torch.randn(6, 4, 3, 2, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    none, one = (0, 0), (1, 1)
    border = bordered(identity(4, 2), (1, 2), (0, 1), torch.zeros(4, dtype=torch.float64))
    whole = then(border, Filter(weight, bias, 1, (2, 1), one, none, none))
    truth = F.conv2d(F.pad(x, (2, 1, 1, 0)), weight, bias, (2, 1))
    assert is_same(evaluated(whole, x), truth)
    even = whole.balanced()
    assert even.before == even.after
    assert is_same(evaluated(even, x), truth)


GIVEN = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "before": (1, 1), "after": (1, 1)}
WIDE = {**GIVEN, "dilation": (2, 2), "before": (2, 2), "after": (2, 2)}
REFUSED = {
    "strides": (GIVEN, {**GIVEN, "stride": (2, 2)}),
    "sizes of output": (GIVEN, {**GIVEN, "after": (0, 0)}),
}
FITS = {
    "dilations": (GIVEN, WIDE),
    "places": (WIDE, {**WIDE, "before": (1, 2), "after": (3, 2)}),
    "dilations of no common divisor": (
        WIDE,
        {**GIVEN, "kernel": (2, 3), "dilation": (3, 1), "before": (1, 0), "after": (2, 2)},
    ),
    "one tap between others": (
        WIDE,
        {**GIVEN, "kernel": (1, 1), "before": (1, -1), "after": (-1, 1)},
    ),
}


@pytest.mark.parametrize("what", FITS)
def test_branches_that_look_at_other_places_get_zeros_between_their_taps(what):
    """Whatever has the same size of output is one kernel."""
    torch.manual_seed(0)
    x, sums = maps(2, 4), []
    filters = []
    for given_ in FITS[what]:
        shape = {name: size for name, size in given_.items() if name != "kernel"}
        weight = torch.randn(4, 4, *given_["kernel"], dtype=torch.float64)
        filters.append(Filter(weight, torch.randn(4), 1, **shape))
        pairs = zip(given_["before"][::-1], given_["after"][::-1], strict=True)
        ends = [end for pair in pairs for end in pair]
        padded = F.pad(x, ends)
        bias = filters[-1].bias
        sums.append(F.conv2d(padded, weight, bias, given_["stride"], 0, given_["dilation"]))
    whole = added([(1.0, filters[0]), (-2.0, filters[1])])
    assert is_same(evaluated(whole, x), sums[0] - 2 * sums[1])
    assert is_same(evaluated(whole.balanced(), x), sums[0] - 2 * sums[1])


@pytest.mark.parametrize("what", REFUSED)
def test_branches_that_do_not_fit_are_refused(what):
    """Each condition by itself."""

    def made(kernel, **given_) -> Filter:
        weight = torch.zeros(4, 4, *kernel)
        return Filter(weight, torch.zeros(4), 1, **given_)

    with pytest.raises(Refused, match=what):
        added([(1.0, made(**each)) for each in REFUSED[what]])


def test_branches_of_other_widths_are_refused():
    with pytest.raises(Refused, match="numbers of channels"):
        added([(1.0, identity(4, 2)), (1.0, identity(5, 2))])
    with pytest.raises(Refused, match="numbers of channels"):
        then(identity(4, 2), identity(5, 2))


def test_uneven_padding_that_no_kernel_makes_even_is_refused():
    """With dilation 2 a zero tap moves the border by two."""
    weight = torch.zeros(1, 1, 3)
    odd = Filter(weight, torch.zeros(1), 1, (1,), (2,), (1,), (2,))
    with pytest.raises(Refused, match="cannot be made even"):
        odd.balanced()
