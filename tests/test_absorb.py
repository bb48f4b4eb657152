"""The arithmetic of a fold, against the operations themselves and against exact products."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bntools.absorb import SMALLEST_NORMAL, Absorbed, OutputLayout, absorb_after, overflows
from bntools.affine import Affine

few = settings(max_examples=30, derandomize=True, deadline=None, database=None)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=random, dtype=torch.float64)


def affine_of(channels: int, seed: int = 0) -> Affine:
    """Scales of either sign, none of them small."""
    scale = drawn(channels, seed=seed + 1)
    return Affine(scale + scale.sign(), drawn(channels, seed=seed + 2))


def constant(scale: float, channels: int = 1, shift: float = 0.0) -> Affine:
    values = torch.ones(channels, dtype=torch.float64)
    return Affine(values * scale, values * shift)


def applied(affine: Affine, y: Tensor, dim: int = 1) -> Tensor:
    shape = [-1 if axis == dim % y.dim() else 1 for axis in range(y.dim())]
    return y * affine.scale.reshape(shape) + affine.shift.reshape(shape)


def near(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm() / b.norm()) <= 1e-12


ranks = st.integers(1, 3)
groups = st.integers(1, 3)
seeds = st.integers(0, 1000)


# What the operations do


@few
@given(ranks, groups, st.integers(1, 3), st.integers(1, 3), st.booleans(), seeds)
def test_convolution_absorbs_what_follows_it(rank, group, ins, outs, biased, seed):
    weight = drawn(group * outs, ins, *[2] * rank, seed=seed)
    bias = drawn(group * outs, seed=seed) if biased else None
    x = drawn(2, group * ins, *[4] * rank, seed=seed)
    affine = affine_of(group * outs, seed)
    new = absorb_after(weight, bias, affine, OutputLayout())
    truth = applied(affine, CONVS[rank](x, weight, bias, groups=group))
    near(CONVS[rank](x, new.weight, new.bias, groups=group), truth)
    assert new.flushed == 0


@few
@given(ranks, groups, st.integers(1, 3), st.integers(1, 3), st.booleans(), seeds)
def test_transposed_convolution_absorbs_what_follows_it(rank, group, ins, outs, biased, seed):
    weight = drawn(group * ins, outs, *[2] * rank, seed=seed)
    bias = drawn(group * outs, seed=seed) if biased else None
    x = drawn(2, group * ins, *[3] * rank, seed=seed)
    affine = affine_of(group * outs, seed)
    layout = OutputLayout(1, group)
    assert layout.channels(weight) == group * outs
    new = absorb_after(weight, bias, affine, layout)
    truth = applied(affine, TRANSPOSED[rank](x, weight, bias, groups=group, stride=2))
    near(TRANSPOSED[rank](x, new.weight, new.bias, groups=group, stride=2), truth)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_depthwise_convolutions_of_both_kinds_absorb_what_follows_them(rank):
    weight, bias = drawn(5, 1, *[3] * rank), drawn(5)
    x, affine = drawn(2, 5, *[6] * rank), affine_of(5)
    for functions, layout in ((CONVS, OutputLayout()), (TRANSPOSED, OutputLayout(1, 5))):
        new = absorb_after(weight, bias, affine, layout)
        truth = applied(affine, functions[rank](x, weight, bias, groups=5))
        near(functions[rank](x, new.weight, new.bias, groups=5), truth)


@few
@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), seeds)
def test_linear_and_matrix_product_absorb_what_follows_them(ins, outs, biased, seed):
    weight, x = drawn(outs, ins, seed=seed), drawn(3, ins, seed=seed + 7)
    bias = drawn(outs, seed=seed) if biased else None
    affine = affine_of(outs, seed)
    new = absorb_after(weight, bias, affine, OutputLayout())
    near(F.linear(x, new.weight, new.bias), applied(affine, F.linear(x, weight, bias), -1))
    turned = absorb_after(weight.T.contiguous(), bias, affine, OutputLayout(1))
    near(x @ turned.weight + turned.bias, applied(affine, F.linear(x, weight, bias), -1))


def test_weight_of_several_blocks_is_absorbed_like_one():
    """Larger than what the arithmetic takes at a time."""
    weight, affine = drawn(70, 40, 5, 5).bfloat16(), affine_of(70)
    new = absorb_after(weight, None, affine, OutputLayout())
    exact = weight.double() * affine.scale.reshape(-1, 1, 1, 1)
    assert torch.equal(new.weight, exact.bfloat16())
    turned = absorb_after(weight.transpose(0, 1).contiguous(), None, affine, OutputLayout(1))
    assert torch.equal(turned.weight.transpose(0, 1), new.weight)


# Bias


def test_bias_stays_absent_only_where_the_shift_is_zero():
    weight = drawn(3, 2, 1, 1)
    unshifted = Affine(torch.tensor([2.0, 3.0, -1.0]), torch.zeros(3))
    assert absorb_after(weight, None, unshifted, OutputLayout()).bias is None
    shifted = Affine(unshifted.scale, torch.tensor([0.0, 0.0, 0.5]))
    bias = absorb_after(weight, None, shifted, OutputLayout()).bias
    assert bias is not None
    assert bias.tolist() == [0.0, 0.0, 0.5]


def test_bias_keeps_its_own_dtype_and_a_new_one_has_that_of_the_weight():
    weight, affine = drawn(3, 2).bfloat16(), affine_of(3)
    assert absorb_after(weight, None, affine, OutputLayout()).bias.dtype == torch.bfloat16
    new = absorb_after(weight, drawn(3).float(), affine, OutputLayout())
    assert (new.weight.dtype, new.bias.dtype) == (torch.bfloat16, torch.float32)


def test_results_share_no_memory_with_what_they_are_made_of():
    weight, affine = drawn(3, 2), affine_of(3)
    before = weight.clone(), affine.scale.clone(), affine.shift.clone()
    new = absorb_after(weight.requires_grad_(), None, affine, OutputLayout())
    assert not new.weight.requires_grad
    new.weight.zero_()
    new.bias.zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(affine.scale, before[1])
    assert torch.equal(affine.shift, before[2])


# Rounding


def ulp(value: float, dtype: torch.dtype) -> Fraction:
    """The distance of a normal number's neighbours in a dtype."""
    eps = Fraction(torch.finfo(dtype).eps)
    return eps * Fraction(2) ** (math.frexp(value)[1] - 1)


@floats
@pytest.mark.parametrize("axis", [0, 1])
def test_result_is_the_exact_product_rounded_once(dtype, axis):
    """Half a unit in the last place, and no more but for what float64 itself loses."""
    weight = drawn(4, 4, seed=3).to(dtype)
    bias, affine = drawn(4, seed=4).to(dtype), affine_of(4, seed=5)
    new = absorb_after(weight, bias, affine, OutputLayout(axis))
    scale, shift = ([Fraction(v) for v in t.tolist()] for t in (affine.scale, affine.shift))
    slack = Fraction(1, 2) + Fraction(1, 1000)
    for row in range(4):
        for column in range(4):
            exact = Fraction(float(weight[row, column])) * scale[row if axis == 0 else column]
            error = abs(Fraction(float(new.weight[row, column])) - exact)
            assert error <= slack * ulp(float(exact), dtype)
        exact = Fraction(float(bias[row])) * scale[row] + shift[row]
        assert abs(Fraction(float(new.bias[row])) - exact) <= slack * ulp(float(exact), dtype)


@floats
@few
@given(seed=seeds, transposed=st.booleans())
def test_result_is_the_float64_product_cast_once(dtype, seed, transposed):
    weight, affine = drawn(6, 6, 3, seed=seed).to(dtype), affine_of(6, seed)
    new = absorb_after(weight, None, affine, OutputLayout(int(transposed)))
    shape = (1, -1, 1) if transposed else (-1, 1, 1)
    assert torch.equal(new.weight, (weight.double() * affine.scale.reshape(shape)).to(dtype))
    assert torch.equal(new.bias, affine.shift.to(dtype))


def test_folding_before_the_cast_to_bfloat16_beats_folding_after_it():
    weight = drawn(64, 64, seed=1).float()
    mean, gamma, beta = drawn(3, 64, seed=2).float()
    variance = drawn(64, seed=3).float().square() + 0.1
    norm = (mean, variance, gamma, beta)
    affine = Affine.of_batch_norm(*norm, eps=1e-5)
    coarse = Affine.of_batch_norm(*(t.bfloat16() for t in norm), eps=1e-5)
    truth = weight.double() * affine.scale[:, None]
    early = absorb_after(weight, None, affine, OutputLayout()).weight.bfloat16()
    late = absorb_after(weight.bfloat16(), None, coarse, OutputLayout()).weight
    errors = [float((w.double() - truth).norm() / truth.norm()) for w in (early, late)]
    assert errors[0] < 0.75 * errors[1]


# Memory formats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arranged",
    [
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: w.transpose(2, 3),
        lambda w: w.repeat(1, 2, 1, 1)[:, ::2],
        lambda w: w[:1].expand(6, -1, -1, -1),
        lambda w: w.flatten().repeat_interleave(2)[::2].reshape(w.shape),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded", "strided"],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_any_strides_are_absorbed_alike(arranged, dtype, axis):
    weight = arranged(drawn(6, 6, 3, 3).to(dtype))
    plain, affine = weight.contiguous().clone(), affine_of(6)
    new = absorb_after(weight, None, affine, OutputLayout(axis)).weight
    assert torch.equal(new, absorb_after(plain, None, affine, OutputLayout(axis)).weight)
    assert torch.equal(weight, plain)


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_last_weight_stays_channels_last(axis):
    weight = drawn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    new = absorb_after(weight, None, affine_of(4), OutputLayout(axis)).weight
    assert new.is_contiguous(memory_format=torch.channels_last)


# Overflow


@pytest.mark.parametrize(
    ("value", "scale", "too_large"),
    [
        (65504.0, 1.0, False),
        (65504.0, -1.0, False),
        (65504.0, 1.0005, True),
        (256.0, 256.0, True),
        (255.0, 256.0, False),
        (-256.0, 256.0, True),
        (6e-8, 1e11, False),
    ],
)
def test_overflow_is_found_exactly_in_half_precision(value, scale, too_large):
    weight, affine = torch.tensor([[[value]]], dtype=torch.float16), constant(scale)
    assert overflows(weight, None, affine, OutputLayout()) is too_large
    new = absorb_after(weight, None, affine, OutputLayout()).weight
    assert bool(new.isinf().any()) is too_large


@floats
@pytest.mark.parametrize("axis", [0, 1])
def test_overflow_is_found_in_the_channel_that_has_it_and_in_no_other(dtype, axis):
    limit = torch.finfo(dtype).max
    weight = torch.ones((3, 3), dtype=dtype)
    scale = torch.tensor([1.0, 1.0, limit], dtype=torch.float64)
    affine, layout = Affine(scale, torch.zeros(3)), OutputLayout(axis)
    weight.select(axis, 0).fill_(1e4)
    assert not overflows(weight, None, affine, layout)
    weight.select(axis, 2)[1] = -1.5
    assert overflows(weight, None, affine, layout)


def test_overflow_that_is_not_looked_for_gives_infinity_without_a_warning():
    new = absorb_after(torch.tensor([[1e37]]), None, constant(1e6), OutputLayout()).weight
    assert new.isinf().all()


def test_overflow_of_a_grouped_transposed_weight_is_found_in_its_group():
    layout, scale = OutputLayout(1, 2), torch.tensor([1.0, 1.0, 1.0, 1e4])
    weight = torch.ones((4, 2, 1), dtype=torch.float16)
    weight[:2] = 100.0
    assert not overflows(weight, None, Affine(scale, 0 * scale), layout)
    weight[3, 1] = 100.0
    assert overflows(weight, None, Affine(scale, 0 * scale), layout)


@pytest.mark.parametrize(
    ("value", "scale", "too_large"),
    [
        (1.0, 3.4e38, False),
        (1.0, 3.5e38, True),
        (10.0, 3.4e38, True),
        (0.5, 6e38, False),
        (1e29, 1e8, False),
        (1e31, 1e8, True),
    ],
)
def test_overflow_is_found_at_the_edge_of_float32(value, scale, too_large):
    weight, affine = torch.tensor([[value]]), constant(scale)
    assert overflows(weight, None, affine, OutputLayout()) is too_large
    with torch.no_grad():
        new = (weight.double() * scale).float()
    assert bool(new.isinf().any()) is too_large


@floats
def test_overflow_of_the_bias_counts_as_well(dtype):
    weight, limit = torch.ones((1, 1), dtype=dtype), torch.finfo(dtype).max
    assert overflows(weight, None, constant(1.0, shift=2.0 * limit), OutputLayout())
    assert not overflows(weight, None, constant(1.0, shift=0.5 * limit), OutputLayout())
    bias = torch.tensor([0.9 * limit], dtype=dtype)
    assert overflows(weight, bias, constant(1.5), OutputLayout())
    assert not overflows(weight, bias, constant(1.5, shift=-0.5 * limit), OutputLayout())


# Subnormal values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_that_become_subnormal_are_zeroed_and_counted(dtype):
    weight = torch.tensor([[1.0, -1.0, 0.0], [1.0, 2.0, 1e3]], dtype=dtype)
    scale = torch.tensor([1e-39, 1e-39], dtype=torch.float64)
    new = absorb_after(weight, None, Affine(scale, torch.zeros(2)), OutputLayout())
    assert new.flushed == 4
    assert new.weight.count_nonzero() == 1
    assert float(new.weight[1, 2]) == pytest.approx(1e-36, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_smallest_normal_value_is_kept_and_what_is_below_is_not(dtype):
    below = 1 - 2 * torch.finfo(dtype).eps
    weight = torch.tensor([[1.0], [below]], dtype=dtype)
    new = absorb_after(weight, None, constant(SMALLEST_NORMAL, 2), OutputLayout())
    assert [float(value) for value in new.weight] == [SMALLEST_NORMAL, 0.0]
    assert new.flushed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_subnormal_biases_are_flushed_too(dtype):
    weight, bias = torch.ones((2, 1), dtype=dtype), torch.tensor([1.0, 1e3], dtype=dtype)
    new = absorb_after(weight * 1e5, bias, constant(1e-39, 2), OutputLayout())
    assert new.flushed == 1
    assert new.bias.count_nonzero() == 1


def test_half_precision_keeps_its_small_values():
    tiny = torch.finfo(torch.float16).smallest_normal
    weight = torch.full((2, 2), tiny, dtype=torch.float16)
    new = absorb_after(weight, weight[0], constant(0.25, 2), OutputLayout())
    assert new.flushed == 0
    assert bool((new.weight.double() == tiny / 4).all())
    assert bool((new.bias.double() == tiny / 4).all())


def test_values_that_are_zero_already_are_not_counted():
    new = absorb_after(torch.zeros(3, 3), None, constant(1e-30, 3), OutputLayout())
    assert new.flushed == 0


# Odd weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 0, 1), OutputLayout()),
        ((3, 0), OutputLayout()),
        ((0, 3), OutputLayout(1)),
    ],
    ids=str,
)
def test_weights_without_inputs_stay_empty(shape, layout, dtype):
    weight = torch.empty(shape, dtype=dtype)
    affine = affine_of(layout.channels(weight))
    new = absorb_after(weight, None, affine, layout)
    assert new.weight.shape == shape
    assert new.flushed == 0
    assert overflows(weight, None, affine, layout) is False


@floats
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_stay_what_they_are_and_spread_no_further(dtype, value):
    weight = torch.ones((2, 3), dtype=dtype)
    weight[1, 1] = value
    new = absorb_after(weight, None, constant(2.0, 2), OutputLayout())
    assert int((~new.weight.isfinite()).sum()) == 1
    assert bool(new.weight.isnan()[1, 1]) is math.isnan(value)
    assert new.flushed == 0


def test_bad_values_survive_beside_flushed_ones():
    weight = torch.tensor([[float("nan"), 1.0, 1e4]])
    new = absorb_after(weight, None, constant(1e-39), OutputLayout())
    assert isinstance(new, Absorbed)
    assert new.weight.isnan().tolist() == [[True, False, False]]
    assert new.flushed == 1
