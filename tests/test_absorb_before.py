"""The arithmetic of a forward fold: a map before a linear layer goes into its weight and bias."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_absorb import CONVS, TRANSPOSED, affine_of, applied, constant, drawn, few, near
from torch.nn import functional as F

from bntools.absorb import InputLayout, OutputLayout, absorb, absorb_before, pad_values
from bntools.affine import Affine

ranks, groups, seeds = st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000)


@few
@given(ranks, groups, st.integers(1, 3), st.integers(1, 3), st.booleans(), seeds)
def test_convolution_absorbs_what_comes_before_it(rank, group, ins, outs, biased, seed):
    weight = drawn(group * outs, ins, *[2] * rank, seed=seed)
    bias = drawn(group * outs, seed=seed) if biased else None
    x = drawn(2, group * ins, *[4] * rank, seed=seed)
    affine, layout = affine_of(group * ins, seed), InputLayout(1, group)
    assert (layout.channels(weight), layout.outputs(weight)) == (group * ins, group * outs)
    new = absorb_before(weight, bias, affine, layout)
    truth = CONVS[rank](applied(affine, x), weight, bias, groups=group)
    near(CONVS[rank](x, new.weight, new.bias, groups=group), truth)
    assert new.flushed == 0


@few
@given(ranks, groups, st.integers(1, 3), st.integers(1, 3), st.booleans(), seeds)
def test_transposed_convolution_absorbs_what_comes_before_it(rank, group, ins, outs, biased, seed):
    """With all of the kernel over the input everywhere, which takes a padding of kernel - 1."""
    weight = drawn(group * ins, outs, *[2] * rank, seed=seed)
    bias = drawn(group * outs, seed=seed) if biased else None
    x = drawn(2, group * ins, *[4] * rank, seed=seed)
    affine, layout = affine_of(group * ins, seed), InputLayout(0, group)
    assert (layout.channels(weight), layout.outputs(weight)) == (group * ins, group * outs)
    new = absorb_before(weight, bias, affine, layout)
    truth = TRANSPOSED[rank](applied(affine, x), weight, bias, groups=group, padding=1)
    near(TRANSPOSED[rank](x, new.weight, new.bias, groups=group, padding=1), truth)


@pytest.mark.parametrize("stride", [1, 2])
def test_scale_without_shift_goes_into_any_transposed_convolution(stride):
    weight, x = drawn(4, 3, 3, 3), drawn(2, 4, 5, 5)
    affine = Affine(affine_of(4).scale, torch.zeros(4))
    new = absorb_before(weight, None, affine, InputLayout(0))
    assert new.bias is None
    truth = F.conv_transpose2d(applied(affine, x), weight, stride=stride)
    near(F.conv_transpose2d(x, new.weight, stride=stride), truth)


@few
@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), seeds)
def test_linear_and_matrix_product_absorb_what_comes_before_them(ins, outs, biased, seed):
    weight, x = drawn(outs, ins, seed=seed), drawn(3, ins, seed=seed + 7)
    bias = drawn(outs, seed=seed) if biased else None
    affine = affine_of(ins, seed)
    truth = F.linear(applied(affine, x), weight, bias)
    new = absorb_before(weight, bias, affine, InputLayout())
    near(F.linear(x, new.weight, new.bias), truth)
    turned = absorb_before(weight.T.contiguous(), bias, affine, InputLayout(0))
    near(x @ turned.weight + turned.bias, truth)


def test_both_sides_are_absorbed_and_rounded_once():
    weight, bias, x = drawn(6, 2, 3, 3), drawn(6), drawn(2, 4, 7, 7)
    before, after = affine_of(4, 3), affine_of(6, 4)
    sides = {"before": (before, InputLayout(1, 2)), "after": (after, OutputLayout())}
    new = absorb(weight, bias, **sides)
    truth = applied(after, F.conv2d(applied(before, x), weight, bias, groups=2))
    near(F.conv2d(x, new.weight, new.bias, groups=2), truth)
    half = absorb(weight.half(), bias.half(), **sides)
    exact = absorb(weight.half().double(), bias.half().double(), **sides)
    assert torch.equal(half.weight, exact.weight.half())
    assert torch.equal(half.bias, exact.bias.half())


def test_weight_of_several_blocks_is_absorbed_like_one():
    """Larger than what the arithmetic takes at a time, for either layout."""
    weight, shifted = drawn(70, 40, 5, 5).float(), affine_of(40)
    new = absorb_before(weight, None, shifted, InputLayout())
    exact = weight.double() * shifted.scale.reshape(1, -1, 1, 1)
    assert torch.equal(new.weight, exact.float())
    offset = (weight.double() * shifted.shift.reshape(1, -1, 1, 1)).sum((1, 2, 3))
    assert torch.allclose(new.bias.double(), offset, rtol=1e-6)
    turned = absorb_before(weight.transpose(0, 1).contiguous(), None, shifted, InputLayout(0))
    assert torch.equal(turned.weight.transpose(0, 1), new.weight)
    assert torch.allclose(turned.bias, new.bias, rtol=1e-6)


def test_float32_weight_is_the_exact_product_rounded_once():
    weight, affine = torch.tensor([[0.1], [0.7]]), Affine(torch.tensor([1 / 3]), torch.tensor([0]))
    new = absorb_before(weight, None, affine, InputLayout()).weight
    for old, got in zip(weight.flatten(), new.flatten(), strict=True):
        product = Fraction(float(old)) * Fraction(float(affine.scale))
        assert float(got) == float(torch.tensor(float(product), dtype=torch.float64).float())


def test_memory_format_dtype_and_arguments_stay():
    weight = drawn(4, 3, 3, 3).float().to(memory_format=torch.channels_last)
    bias, affine = drawn(4).float(), affine_of(3)
    kept = weight.clone(), bias.clone()
    new = absorb_before(weight.requires_grad_(), bias, affine, InputLayout())
    assert new.weight.is_contiguous(memory_format=torch.channels_last)
    assert new.weight.dtype == new.bias.dtype == torch.float32
    assert not new.weight.requires_grad
    assert torch.equal(weight, kept[0])
    assert torch.equal(bias, kept[1])


def test_bias_of_another_dtype_keeps_it():
    new = absorb_before(drawn(4, 3).half(), drawn(4).float(), affine_of(3), InputLayout())
    assert (new.weight.dtype, new.bias.dtype) == (torch.float16, torch.float32)


def test_subnormal_weights_become_zero_and_are_counted():
    affine = Affine(torch.tensor([1e-39, 1.0]), torch.zeros(2))
    new = absorb_before(torch.ones(3, 2), None, affine, InputLayout())
    assert new.flushed == 3
    assert new.weight.tolist() == [[0.0, 1.0]] * 3


@pytest.mark.parametrize("shape", [(0, 3, 1), (3, 0, 1), (0, 3)])
def test_empty_weights_are_absorbed(shape):
    new = absorb_before(torch.zeros(shape), None, constant(2.0, shape[1], 1.0), InputLayout())
    assert new.weight.shape == shape
    assert new.bias is None or new.bias.tolist() == [0.0] * shape[0]


def test_pad_values_are_what_the_map_takes_to_zero():
    affine = Affine(torch.tensor([2.0, -4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 3.0]))
    assert pad_values(affine).tolist() == [-0.5, 0.5, 0.0, -float("inf")]
