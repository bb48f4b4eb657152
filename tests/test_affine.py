"""Per-channel affine maps: composition, those of batch norms, comparison."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bntools.affine import Affine

few = settings(max_examples=25, derandomize=True, deadline=None, database=None)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)


def drawn(channels: int, seed: int) -> Affine:
    random = torch.Generator().manual_seed(seed)
    return Affine(*torch.randn((2, channels), generator=random, dtype=torch.float64))


def applied(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    return x * affine.scale[:, None] + affine.shift[:, None]


@few
@given(st.integers(1, 9), st.integers(0, 1000))
def test_then_is_one_map_after_the_other(channels, seed):
    first, second = drawn(channels, seed), drawn(channels, seed + 1)
    x = torch.randn((channels, 5), dtype=torch.float64)
    both = applied(first.then(second), x)
    torch.testing.assert_close(both, applied(second, applied(first, x)), rtol=1e-12, atol=1e-12)


@few
@given(st.integers(0, 1000))
def test_then_is_associative_and_not_commutative(seed):
    a, b, c = (drawn(4, seed + k) for k in range(3))
    left, right = a.then(b).then(c), a.then(b.then(c))
    torch.testing.assert_close(left.scale, right.scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.shift, right.shift, rtol=1e-12, atol=1e-12)
    assert not a.then(b).same_as(b.then(a))


def test_identity_changes_nothing_on_either_side():
    affine = drawn(5, 3)
    assert affine.then(Affine.identity(5)).same_as(affine)
    assert Affine.identity(5).then(affine).same_as(affine)
    assert Affine.identity(5).channels == 5


@few
@given(
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-5, 1e-3, 0.0, 1.0]),
    st.integers(0, 1000),
)
def test_map_of_a_batch_norm_is_what_the_batch_norm_does(channels, scaled, shifted, eps, seed):
    random = torch.Generator().manual_seed(seed)
    mean, weight, bias = torch.randn((3, channels), generator=random, dtype=torch.float64)
    variance = torch.rand(channels, generator=random, dtype=torch.float64) + 0.01
    weight, bias = weight if scaled else None, bias if shifted else None
    x = torch.randn((7, channels), generator=random, dtype=torch.float64)
    truth = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    affine = Affine.of_batch_norm(mean, variance, weight, bias, eps=eps)
    torch.testing.assert_close(applied(affine, x.T).T, truth, rtol=1e-12, atol=1e-12)


@dtypes
def test_map_of_a_batch_norm_is_computed_in_float64_from_any_dtype(dtype):
    values = [torch.rand(6).add(0.5).to(dtype) for _ in range(4)]
    affine = Affine.of_batch_norm(*values, eps=1e-5)
    exact = Affine.of_batch_norm(*(value.double() for value in values), eps=1e-5)
    assert affine.same_as(exact)


@dtypes
def test_map_is_held_in_float64_without_gradient_whatever_it_is_made_of(dtype):
    affine = Affine(torch.ones(3, dtype=dtype, requires_grad=True), torch.zeros(3, dtype=dtype))
    assert affine.scale.dtype == affine.shift.dtype == torch.float64
    assert not affine.scale.requires_grad
    assert affine.scale.device.type == "cpu"


def test_maps_are_the_same_only_to_the_bit():
    affine = drawn(3, 1)
    assert affine.same_as(Affine(affine.scale.clone(), affine.shift.clone()))
    nearly = torch.nextafter(affine.shift, torch.full_like(affine.shift, 10.0))
    assert not affine.same_as(Affine(affine.scale, nearly))
    assert not affine.same_as(Affine(affine.scale + 1e-12, affine.shift))
    assert not affine.same_as(drawn(4, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["scale", "shift"])
def test_map_with_one_bad_value_is_not_finite(value, part):
    affine = drawn(4, 2)
    assert affine.is_finite()
    getattr(affine, part)[2] = value
    assert not affine.is_finite()


def test_huge_but_finite_map_is_finite():
    huge = torch.full((2,), 1e300, dtype=torch.float64)
    assert Affine(huge, huge).is_finite()


def test_negative_variance_gives_a_map_that_is_not_finite():
    one = torch.ones(2)
    assert not Affine.of_batch_norm(one, -one, one, one, eps=1e-5).is_finite()
    assert not Affine.of_batch_norm(one, 0 * one, one, one, eps=0.0).is_finite()


def test_empty_map_has_no_channels_and_is_finite():
    empty = Affine.identity(0)
    assert empty.channels == 0
    assert empty.is_finite()
    assert empty.then(empty).same_as(empty)
