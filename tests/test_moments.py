"""Moments and estimators against float64 arithmetic on all elements at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bntools.calibration.confidence import Confidence, student
from bntools.moments import (
    Cumulative,
    Ema,
    Moments,
    Pooled,
    Statistics,
    mixed,
    moments_of,
    residual,
    symmetric_kl,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 3), (257, 3), (5, 3, 1), (4, 3, 17), (2, 3, 5, 7), (1, 3, 1, 1), (2, 3, 2, 3, 4),
    (3, 70000), (1, 2, 70001), (2, 5, 300, 300),
]  # fmt: skip


def by_channel(x):
    """The elements of each channel in a row, float64."""
    return x.double().transpose(0, 1).flatten(1)


def close(a, b, limit=1e-12):
    return torch.allclose(a, b, rtol=limit, atol=0)


def assert_moments(found, x, limit=1e-11):
    rows = by_channel(x)
    assert found.count == rows.shape[1]
    assert found.mean.dtype == found.m2.dtype == torch.float64
    assert close(found.mean, rows.mean(1), limit)
    assert close(found.variance(), rows.var(1, correction=0), limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_float64(shape, dtype):
    """In every shape and dtype, a mean of 100 with a deviation of 0.01 included."""
    for mean, deviation in ((0.0, 1.0), (100.0, 0.01)):
        x = (torch.randn(shape, dtype=torch.float64) * deviation + mean).to(dtype)
        before = x.clone()
        if by_channel(x).shape[1] > 1 and by_channel(x).var(1).min() > 0:
            assert_moments(moments_of(x), x, 1e-8)
        assert torch.equal(x, before)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_layouts_give_the_same_moments(layout):
    x = torch.randn(4, 6, 9, 11).add(3)
    assert_moments(moments_of(x.contiguous(memory_format=layout)), x)
    assert_moments(moments_of(x[:, 1:5, ::2, 3:]), x[:, 1:5, ::2, 3:])
    assert_moments(moments_of(x.transpose(0, 1)), x.transpose(0, 1))


def test_one_value_has_no_deviation():
    found = moments_of(torch.tensor([[7.0, -2.0]]))
    assert (found.count, found.mean.tolist(), found.m2.tolist()) == (1, [7.0, -2.0], [0.0, 0.0])


def test_no_value_counts_nothing():
    empty = moments_of(torch.zeros(0, 3, 2))
    some = moments_of(torch.randn(4, 3))
    assert empty.count == 0
    assert empty.merge(some) is some
    assert some.merge(empty) is some


def test_a_mask_leaves_elements_out():
    x = torch.randn(4, 3, 10)
    mask = torch.arange(10) < torch.tensor([10, 3, 1, 0])[:, None]
    expected = x.transpose(1, 2)[mask]
    assert_moments(moments_of(x, mask), expected)
    assert moments_of(x, torch.zeros(4, 10, dtype=torch.bool)).count == 0


def test_a_nan_shows_in_its_channel_only():
    x = torch.randn(4, 3, 5)
    x[2, 1, 3] = float("nan")
    assert moments_of(x).mean.isnan().tolist() == [False, True, False]
    x[2, 1, 3] = float("inf")
    assert moments_of(x).m2.isfinite().tolist() == [True, False, True]


def test_half_precision_does_not_overflow():
    """The sum of squares of these is 4e13 beyond float16."""
    x = torch.full((64, 2, 100), 60000.0, dtype=torch.float16)
    x[::2] = -60000.0
    assert moments_of(x).variance().tolist() == [3.6e9, 3.6e9]


def test_what_fvcore_does_in_float32_is_seen_to_fail():
    """E[x^2] - E[x]^2 in float32 gives variances of 0 or below, which the test above tells."""
    x = torch.randn(1000, 4, 8) * 0.01 + 100
    squares = (x * x).mean((0, 2)) - x.mean((0, 2)).square()
    true = by_channel(x).var(1, correction=0)
    assert not close(squares.double(), true, 0.5)
    assert close(moments_of(x).variance(), true, 1e-9)


# Merging


sizes = st.lists(st.integers(1, 257), min_size=1, max_size=6)
scales = st.sampled_from([(0.0, 1.0), (100.0, 0.01), (-1e4, 1.0), (1e-3, 1e-6)])


@settings(max_examples=40, deadline=None)
@given(sizes, scales, st.integers(0, 2**20), st.booleans())
def test_pooled_batches_are_the_moments_of_all_elements(sizes, scale, seed, ordered):
    """Whatever the sizes and the order, sorted by value included."""
    mean, deviation = scale
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 2, 3, generator=random, dtype=torch.float64) * deviation + mean
    if ordered:
        x = x.sort(0).values
    x = x.float()
    estimate = Pooled()
    for batch in x.split(sizes):
        estimate = estimate.after(moments_of(batch))
    rows = by_channel(x)
    # a mean near zero of larger values has their rounding, not its own
    gap = (estimate.value.mean - rows.mean(1)).abs()
    assert bool((gap <= 1e-14 * rows.abs().amax(1)).all())
    assert close(estimate.value.variance, rows.var(1, correction=0), 1e-6)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 2**20))
def test_merging_is_the_same_in_any_order(sizes, seed):
    random = torch.Generator().manual_seed(seed)
    parts = [moments_of(torch.randn(n, 2, generator=random) + n) for n in sizes]
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward.merge(part)
    for part in parts[-2::-1]:
        backward = part.merge(backward)
    assert forward.count == backward.count
    assert close(forward.mean, backward.mean, 1e-10)
    assert torch.allclose(forward.m2, backward.m2, rtol=1e-10, atol=1e-10)


# Estimators


def batches(count=7, channels=3):
    return [moments_of(torch.randn(5 + i, channels, 4) * (i + 1) + i) for i in range(count)]


def test_cumulative_is_the_average_of_batch_figures():
    given = batches()
    estimate = Cumulative()
    for batch in given:
        estimate = estimate.after(batch)
    assert estimate.batches == 7
    assert close(estimate.value.mean, torch.stack([b.mean for b in given]).mean(0))
    assert close(estimate.value.variance, torch.stack([b.variance(1) for b in given]).mean(0))


def test_ema_is_what_training_does():
    norm = torch.nn.BatchNorm1d(3, momentum=0.3).double()
    norm.running_mean.normal_()
    start = Statistics(norm.running_mean.clone(), norm.running_var.clone())
    estimate = Ema(0.3, start)
    for _ in range(4):
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        norm(x)
        estimate = estimate.after(moments_of(x))
    assert close(estimate.value.mean, norm.running_mean)
    assert close(estimate.value.variance, norm.running_var)


def test_biased_averages_for_layers_that_normalise_with_them():
    batch = moments_of(torch.randn(4, 3))
    assert close(Cumulative(correction=0).after(batch).value.variance, batch.variance())
    assert not close(Cumulative().after(batch).value.variance, batch.variance())


@pytest.mark.parametrize("prior", [0, 1, 16, 1000])
def test_a_prior_is_so_many_samples_of_the_old(prior):
    old = Statistics(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.5]))
    new = Statistics(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 8.0]))
    found = mixed(old, new, prior=prior, samples=48)
    assert torch.allclose(found.mean, (prior * old.mean + 48 * new.mean) / (prior + 48))
    assert torch.allclose(found.variance, (prior * old.variance + 48 * new.variance) / (prior + 48))


# Distances


def test_symmetric_kl_is_that_of_torch_distributions():
    a = torch.distributions.Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    b = torch.distributions.Normal(torch.tensor([0.5, -1.0]), torch.tensor([3.0, 2.0]))
    both = torch.distributions.kl_divergence(a, b) + torch.distributions.kl_divergence(b, a)
    found = symmetric_kl(a.mean, a.variance, b.mean, b.variance)
    assert torch.allclose(found, both / 2)
    assert symmetric_kl(a.mean, a.variance, a.mean, a.variance).tolist() == [0.0, 0.0]


def test_channels_without_variance_compare_with_eps():
    zero = torch.zeros(1)
    assert symmetric_kl(zero, zero, zero, zero, eps=1e-5).item() == 0
    assert math.isfinite(symmetric_kl(zero, zero, zero, zero + 1, eps=1e-5).item())


def test_residual_takes_the_larger_of_shift_and_scale():
    running = Statistics(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0]))
    seen = Statistics(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
    found = residual(running, seen, 0.0)
    assert found.tolist() == pytest.approx([1.0, math.log(4)])


# Confidence


def test_students_quantiles_are_those_of_the_tables():
    for freedom, quantile in {4: 2.776, 9: 2.262, 29: 2.045, 1000: 1.962}.items():
        assert student(freedom) == pytest.approx(quantile, rel=5e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """95 times in 100, of the mean of one channel; here between 88 and 100."""
    held = 0
    for seed in range(100):
        random = torch.Generator().manual_seed(seed)
        enough = Confidence(eps=0.0)
        for _ in range(12):
            enough.add(moments_of(torch.randn(16, 1, 4, generator=random)))
        width = student(11) / math.sqrt(12) * enough.means.variance(1).sqrt()
        held += bool(enough.means.mean.abs() <= width)
    assert 88 <= held <= 100


def test_the_interval_shrinks_with_more_batches():
    enough = Confidence(eps=1e-5)
    assert enough.error() == math.inf
    errors = []
    for index in range(1, 65):
        enough.add(moments_of(torch.randn(8, 4, 3, 3)))
        if index in (16, 64):
            errors.append(enough.error())
    assert errors[1] < 0.75 * errors[0]


def test_moments_move_between_devices_whole():
    found = Moments(3, torch.ones(2), torch.zeros(2)).to("cpu")
    assert found.count == 3
