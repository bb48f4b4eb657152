"""The judgement: whole outputs and their slices, over any number of batches, with tight limits."""

from __future__ import annotations

import math

import pytest
import torch
from randomise import randomise, settle
from torch import Tensor

import bntools
from bntools.equivalence import Comparison, Truth
from bntools.measuring import Measure, judge, pooled
from bntools.tolerance import Limit, limit, relative_error

NETWORKS = [
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0", "torchvision:densenet121", "torchvision:mnasnet0_5",
    "torchvision:shufflenet_v2_x0_5", "torchvision:regnet_y_400mf", "torchvision:vgg11_bn",
    "torchvision:googlenet", "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:deeplabv3_mobilenet_v3_large", "torchvision:fcn_resnet50",
    "timm:resnet10t", "timm:mixnet_s", "timm:ghostnet_100", "timm:hardcorenas_a",
    "timm:repvgg_a0", "timm:convmixer_768_32", "timm:cspresnet50", "timm:dla34",
    "timm:efficientnet_lite0", "timm:fbnetc_100", "timm:hrnet_w18_small", "timm:lcnet_050",
]  # fmt: skip
EPS = torch.finfo(torch.float32).eps
NOISE = 3e-7


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(truth: Tensor, seed: int, scale: Tensor | float = 1.0) -> Tensor:
    """The truth with errors as of float32, the same in every element, and kept in float64."""
    noise = torch.randn(truth.shape, generator=random(seed), dtype=torch.float64)
    return truth + NOISE * scale * noise * truth.square().mean().sqrt()


SHAPES = [(1, 10), (1, 1000), (4, 1000), (64, 3), (3,), (2, 21, 16, 16), (1, 3, 64, 64), (2, 7, 48)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def truth_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=random(100 + seed), dtype=torch.float64)


# No false alarm


@every_shape
def test_equal_noise_is_never_a_fault(shape):
    worst = 0.0
    for seed in range(150):
        truth = truth_of(shape, seed)
        judged = judge("output", truth, noisy(truth, seed), noisy(truth, 1000 + seed))
        assert judged.passed, f"{seed}: {judged}"
        worst = max(worst, judged.severity)
    assert worst > 0.1  # so that the limits mean something


@pytest.mark.parametrize("shape", [(4, 1000), (2, 21, 16, 16)], ids=str)
def test_noise_that_differs_between_channels_is_no_fault(shape):
    """Some channels have a hundred times the noise of others, as after a cancellation."""
    for seed in range(50):
        truth = truth_of(shape, seed)
        spread = torch.rand(shape[1], generator=random(seed)).mul(-2).double()
        scale = (10**spread).reshape(1, -1, *[1] * (len(shape) - 2))
        judged = judge("output", truth, noisy(truth, seed, scale), noisy(truth, seed + 500, scale))
        assert judged.passed, f"{seed}: {judged}"


def test_error_that_a_whole_channel_shares_is_no_fault():
    """A bias that was rounded moves all of a channel alike: one value, not a thousand."""
    for seed in range(100):
        truth = truth_of((2, 21, 16, 16), seed)
        size = NOISE * truth.square().mean().sqrt()
        shifts = torch.randn((2, 1, 21, 1, 1), generator=random(seed), dtype=torch.float64) * size
        judged = judge("output", truth, truth + shifts[0], truth + shifts[1])
        assert judged.passed, f"{seed}: {judged}"


def test_channels_that_are_almost_always_zero_are_no_fault():
    """After a ReLU a value may be there for one of two correct models only."""
    for seed in range(100):
        truth = truth_of((4, 64, 8, 8), seed) - 2.5
        judged = judge(
            "output", truth.relu(), noisy(truth, seed).relu(), noisy(truth, -seed).relu()
        )
        assert judged.passed, f"{seed}: {judged}"


def test_scales_that_differ_between_channels_are_no_fault():
    """Boxes in pixels beside scores in one tensor, each with noise of its own size."""
    for seed in range(50):
        truth = truth_of((1, 84, 400), seed)
        truth[:, :4] *= 1000
        size = truth.square().mean((0, 2), keepdim=True).sqrt()
        noise = torch.randn((2, *truth.shape), generator=random(seed), dtype=torch.float64)
        judged = judge("output", truth, *(truth + NOISE * size * each for each in noise))
        assert judged.passed, f"{seed}: {judged}"


# What one slice hides


def hidden(truth: Tensor, where: tuple, by: float) -> Tensor:
    """A candidate with noise, one slice of which is off by a multiple of the whole's limit."""
    candidate = noisy(truth, 7)
    size = truth.square().mean().sqrt()
    candidate[where] += by * limit(NOISE, torch.float32) * size
    return candidate


@pytest.mark.parametrize(
    ("shape", "where", "by", "named"),
    [
        ((4, 1000), (slice(None), 17), 6, "channel 17"),
        ((1, 1000), (slice(None), 17), 6, "channel 17"),
        ((2, 21, 16, 16), (slice(None), 20), 2, "channel 20"),
        ((64, 10), (5,), 3, "sample 5"),
        ((2, 8, 32, 32), (..., 0, slice(None)), 2, "position along axis 2 0"),
    ],
    ids=["class", "one class of one sample", "map", "sample", "border"],
)
def test_fault_in_one_slice_is_caught_though_the_whole_is_within_its_limit(shape, where, by, named):
    truth = truth_of(shape)
    judged = judge("output", truth, noisy(truth, 1), hidden(truth, where, by))
    assert not judged.passed
    assert judged.severity > 1
    assert judged.note.startswith(named)
    assert judged.error <= judged.limit, "the whole alone shows it"


def test_small_channel_beside_large_ones_is_judged_by_its_own_noise():
    """A score off by a hundredth of a per cent, beside boxes whose rounding is larger than that."""
    truth = truth_of((1, 84, 4000))
    truth[:, :4] *= 1000
    size = truth.square().mean((0, 2), keepdim=True).sqrt()
    noise = torch.randn((2, *truth.shape), generator=random(1), dtype=torch.float64)
    own, candidate = (truth + NOISE * size * each for each in noise)
    assert judge("output", truth, own, candidate).passed
    candidate[:, 50] *= 1 + 1e-4
    judged = judge("output", truth, own, candidate)
    assert judged.error <= judged.limit
    assert judged.note.startswith("channel 50")


def test_change_of_one_channel_is_caught_at_a_small_multiple_of_the_limit():
    """The smallest fault in one of a thousand classes that is caught, in limits of the whole."""
    truth = truth_of((4, 1000))
    caught = [
        by
        for by in (1, 2, 3, 4, 6, 8, 16, 32)
        if not judge("output", truth, noisy(truth, 1), hidden(truth, (slice(None), 3), by)).passed
    ]
    assert caught[0] <= 4


# Batches


def measured(parts: list[tuple[Tensor, Tensor, Tensor]]):
    measure = Measure("output", Limit(EPS))
    for part in parts:
        measure.add(*part)
    return measure.result()


def test_batches_are_judged_like_one_that_holds_them_all():
    truth = truth_of((12, 5, 8))
    own, candidate = noisy(truth, 1), noisy(truth, 2)
    whole = measured([(truth, own, candidate)])
    parts = measured(
        [
            (t, o, c)
            for t, o, c in zip(*(x.split([5, 4, 3]) for x in (truth, own, candidate)), strict=True)
        ]
    )
    assert parts.error == pytest.approx(whole.error)
    assert parts.reference_error == pytest.approx(whole.reference_error)
    assert parts.part.error == pytest.approx(whole.part.error)
    assert parts.part.limit == pytest.approx(whole.part.limit)
    assert (parts.part.kind, parts.part.index) == (whole.part.kind, whole.part.index)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.max_abs == whole.max_abs


def test_fault_in_one_batch_is_caught_among_many():
    parts = []
    for seed in range(8):
        truth = truth_of((1 + seed % 3, 5, 8, 8 + seed), seed)
        parts.append((truth, noisy(truth, seed), noisy(truth, seed + 50)))
    assert measured(parts).passed
    wrong = parts[5][2].clone()
    wrong[0] *= 1 + 6e-6
    assert not measured([*parts[:5], (*parts[5][:2], wrong), *parts[6:]]).passed


@pytest.mark.parametrize("spoiled", [lambda y: y[:1], lambda y: y * math.nan, lambda y: y[:0]])
def test_one_bad_batch_is_never_outweighed(spoiled):
    truth = truth_of((3, 5))
    good = truth, noisy(truth, 1), noisy(truth, 2)
    assert not measured([good, (truth, noisy(truth, 1), spoiled(truth)), good]).passed


def test_empty_batch_beside_full_ones_is_no_fault_and_alone_is_no_pass():
    truth = truth_of((3, 5))
    nothing = truth[:0]
    full = truth, noisy(truth, 1), noisy(truth, 2)
    assert measured([(nothing, nothing, nothing), full]).passed
    assert "empty" in measured([(nothing, nothing, nothing)]).note


def test_first_batch_of_zeros_does_not_change_the_units():
    zeros, truth = torch.zeros(2, 5, dtype=torch.float64), truth_of((3, 5)) * 1e6
    parts = [(zeros, zeros, zeros), (truth, noisy(truth, 1), noisy(truth, 2))]
    assert measured(parts).passed
    wrong = parts[1][2] * (1 + 1e-4)
    assert not measured([parts[0], (*parts[1][:2], wrong)]).passed


# What is reported


def test_error_is_the_relative_error_whatever_the_scale():
    for scale in (1e-300, 1e-30, 1.0, 1e30, 1e300):
        truth = truth_of((4, 5)) * scale
        candidate = truth * (1 + 1e-6)
        judged = judge("output", truth, truth, candidate)
        assert (
            judged.error == pytest.approx(relative_error(candidate, truth)) == pytest.approx(1e-6)
        )
        assert judged.max_scaled == pytest.approx(1e-6)
        assert judged.cosine == pytest.approx(1)


def test_direction_and_highest_class_are_told():
    truth = torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64)
    judged = judge("output", truth, truth, truth.flip(1))
    assert judged.top1 == 0.0
    assert judged.cosine == pytest.approx(28 / 30)
    assert judge("output", truth, truth, -truth).cosine == pytest.approx(-1)
    assert judge("output", truth, truth, truth).top1 == 1.0
    half = torch.stack([truth[0], truth[1].flip(0)])
    assert judge("output", truth, truth, half).top1 == 0.5


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3, 8, 8), (2, 7, 9)])
def test_what_has_no_classes_has_no_top_1(shape):
    truth = truth_of(shape)
    assert judge("output", truth, truth, truth).top1 is None


def test_integers_have_neither_direction_nor_slices():
    truth = torch.arange(12).reshape(3, 4)
    judged = judge("output", truth, truth, truth)
    assert (judged.cosine, judged.top1, judged.part) == (None, None, None)
    assert judged.why == "0.5% of the integers, for near ties"


def test_infinities_and_zeros_do_not_spoil_the_numbers():
    truth = torch.tensor([[math.inf, 1.0], [-math.inf, 2.0]], dtype=torch.float64)
    judged = judge("output", truth, truth, truth)
    assert judged.passed
    assert (judged.error, judged.cosine, judged.max_abs) == (0, 1, 0)
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert judge("output", zeros, zeros, zeros).passed
    assert not judge("output", zeros, zeros, zeros + 1e-30).passed


def test_overflow_of_the_reference_excuses_nothing():
    """What is finite in float64 and infinite in float32 is no equality of two infinities."""
    truth = torch.full((2, 3), 1e39, dtype=torch.float64)
    judged = judge("output", truth, truth.float(), truth.float())
    assert not judged.passed
    assert judge("output", truth, truth.float(), truth).passed


def test_limit_says_where_it_comes_from():
    assert Limit(EPS).why(0.0) == "8 roundings of 1.2e-07"
    assert Limit(EPS).why(1e-5) == "4x the reference's own error"
    assert Limit(EPS, allowed=1e-10).why(1e-5) == "fixed at 1e-10"
    assert "1.02e+03 times its rounding" in Limit(1e-3, coarser=1024.0).why(1e-5)


def test_coarser_arithmetic_scales_what_the_reference_shows_of_the_network():
    assert Limit(1e-3, coarser=1000.0).of(1e-5) == pytest.approx(4e-2)
    assert Limit(1e-3, coarser=1000.0).of(1e-8) == pytest.approx(8e-3)


def test_limits_were_not_loosened():
    """What stands in the README: 4 times the reference's own error, or 8 roundings."""
    assert limit(1e-5, torch.float32) == 4e-5
    assert limit(0.0, torch.float32) == 8 * EPS
    assert Limit(EPS).of_share(0.0) == 0.005


def test_pooled_judgement_takes_the_largest_error_and_limit_of_whole_and_slice():
    truth = truth_of((4, 100))
    good = judge("output", truth, noisy(truth, 1), noisy(truth, 2))
    noisier = judge("output", truth, noisy(truth, 1, 9.0), noisy(truth, 2, 9.0))
    both = pooled([good, noisier])
    assert both.passed
    assert both.error == noisier.error
    assert both.limit == noisier.limit
    wrong = judge("output", truth, noisy(truth, 1), hidden(truth, (slice(None), 3), 20.0))
    assert not wrong.passed
    assert not pooled([good, wrong]).passed


def truth_for(exact: Tensor, *, is_float64: bool = True) -> Truth:
    own = noisy(exact, 1).float()
    return Truth(
        {"output": exact if is_float64 else own},
        {"output": own},
        {},
        {},
        torch.float32,
        torch.float32,
        is_float64=is_float64,
    )


def test_without_float64_truth_the_limit_is_eighty_roundings_for_slices_too():
    exact = truth_of((2, 8, 16))
    truth = truth_for(exact, is_float64=False)
    comparison = Comparison()
    comparison.add(truth, {"output": noisy(exact, 2).float()})
    judged = comparison.result()
    assert judged
    assert judged.outputs[0].limit == pytest.approx(80 * EPS)
    wrong = noisy(exact, 2).float()
    wrong[:, 3] += 1e-4
    comparison = Comparison()
    comparison.add(truth, {"output": wrong})
    assert not comparison.result()


def test_comparison_of_no_batch_is_no_equality():
    assert not Comparison().result()


@pytest.mark.zoo
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_correct_fold_stays_far_within_every_limit(name, seed):
    """As built, and with randomised statistics; the largest part of a limit was 0.51."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = bntools.load(name)
        x = torch.randn(3, 3, 64, 64)
    if seed:
        randomise(model, seed)
        settle(model, x)
    result = bntools.verify(model, bntools.fold(model, x).model, x)
    assert result, str(result)
    assert result.worst.severity < 0.8
