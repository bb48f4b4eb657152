"""Norm layers against their formulas: NumPy forward and backward, in float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from timm.layers.evo_norm import EvoNorm2dS0 as TimmEvoNorm2dS0
from torch import nn

import bntools
from bntools.norms import (
    ChannelLayerNorm,
    EvoNorm1dB0,
    EvoNorm1dS0,
    EvoNorm2dB0,
    EvoNorm2dS0,
    EvoNorm3dB0,
    EvoNorm3dS0,
    EvoNormB0,
    functional,
)
from bntools.norms.evonorm import fitting_groups

EPS = 1e-5
CHANNELS = 6
SHAPES = [
    (3, CHANNELS),
    (5, CHANNELS, 7),
    (3, CHANNELS, 5, 7),
    (1, CHANNELS, 4, 3),
    (4, CHANNELS, 1, 1),
    (2, CHANNELS, 2, 3, 5),
]
ONE_VALUE = (1, CHANNELS, 1, 1)
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
EVO_S0 = {2: EvoNorm1dS0, 3: EvoNorm1dS0, 4: EvoNorm2dS0, 5: EvoNorm3dS0}
EVO_B0 = {2: EvoNorm1dB0, 3: EvoNorm1dB0, 4: EvoNorm2dB0, 5: EvoNorm3dB0}


# The formulas. `axes` are those that the statistics run over; vectors have one value per channel.


def channelwise(vector, x):
    """One value per channel against (N, C, ...)."""
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def per_channel(x):
    """The sum over everything but the channels."""
    return x.sum(axis=(0, *range(2, x.ndim)))


def positions(x):
    return tuple(range(2, x.ndim))


def batch_axes(x):
    return (0, *positions(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def batch_norm_chain(x, gamma, beta, dy):
    """Batch norm through its computational graph, one step at a time, there and back."""
    axes, count = batch_axes(x), x.size // x.shape[1]
    mean = x.sum(axes, keepdims=True) / count
    centred = x - mean
    squared = centred**2
    variance = squared.sum(axes, keepdims=True) / count
    deviation = np.sqrt(variance + EPS)
    inverse = 1 / deviation
    normal = centred * inverse
    scaled = channelwise(gamma, x) * normal
    y = scaled + channelwise(beta, x)

    dbeta = per_channel(dy)
    dscaled = dy
    dgamma = per_channel(dscaled * normal)
    dnormal = dscaled * channelwise(gamma, x)
    dinverse = (dnormal * centred).sum(axes, keepdims=True)
    dcentred = dnormal * inverse
    ddeviation = -dinverse / deviation**2
    dvariance = ddeviation / (2 * deviation)
    dsquared = dvariance / count * np.ones_like(x)
    dcentred = dcentred + 2 * centred * dsquared
    dmean = -dcentred.sum(axes, keepdims=True)
    dx = dcentred + dmean / count * np.ones_like(x)
    return y, dx, dgamma, dbeta


def batch_norm_closed(x, gamma, beta, dy):
    """Batch norm with the simplified backward."""
    axes, count = batch_axes(x), x.size // x.shape[1]
    deviation = np.sqrt(x.var(axes, keepdims=True) + EPS)
    normal = (x - x.mean(axes, keepdims=True)) / deviation
    y = normal * channelwise(gamma, x) + channelwise(beta, x)
    dbeta, dgamma = per_channel(dy), per_channel(dy * normal)
    inner = count * dy - channelwise(dbeta, x) - normal * channelwise(dgamma, x)
    return y, channelwise(gamma, x) / (count * deviation) * inner, dgamma, dbeta


def batch_norm_eval(x, gamma, beta, dy, mean, variance):
    """Batch norm with running statistics: an affine."""
    scale = channelwise(gamma / np.sqrt(variance + EPS), x)
    normal = (x - channelwise(mean, x)) / channelwise(np.sqrt(variance + EPS), x)
    y = normal * channelwise(gamma, x) + channelwise(beta, x)
    return y, dy * scale, per_channel(dy * normal), per_channel(dy)


def normalise_chain(x, axes, dnormal):
    """What layer, group and instance norm do before their affine, step by step."""
    count = np.prod([x.shape[a] for a in axes])
    centred = x - x.sum(axes, keepdims=True) / count
    variance = (centred**2).sum(axes, keepdims=True) / count
    deviation = np.sqrt(variance + EPS)
    normal = centred / deviation

    ddeviation = -(dnormal * centred).sum(axes, keepdims=True) / deviation**2
    dvariance = ddeviation / (2 * deviation)
    dcentred = dnormal / deviation + 2 * centred * dvariance / count
    dx = dcentred - dcentred.sum(axes, keepdims=True) / count
    return normal, dx


def normalise_closed(x, axes, dnormal):
    """The same with the simplified backward: the sums of dx^ and of x^ dx^."""
    count = np.prod([x.shape[a] for a in axes])
    deviation = np.sqrt(x.var(axes, keepdims=True) + EPS)
    normal = (x - x.mean(axes, keepdims=True)) / deviation
    total = dnormal.sum(axes, keepdims=True)
    along = (normal * dnormal).sum(axes, keepdims=True)
    return normal, (count * dnormal - total - normal * along) / (count * deviation)


def layer_norm(normalise, x, gamma, beta, dy, axes):
    """Layer norm over `axes`, gamma and beta having their shape."""
    normal, dx = normalise(x, axes, dy * gamma)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    return normal * gamma + beta, dx, (dy * normal).sum(others), dy.sum(others)


def group_norm(normalise, x, gamma, beta, dy, groups):
    """Group norm; instance norm is that of as many groups as channels."""
    split = (x.shape[0], groups, -1)
    dnormal = (dy * channelwise(gamma, x)).reshape(split)
    normal, dx = normalise(x.reshape(split), (2,), dnormal)
    normal, dx = normal.reshape(x.shape), dx.reshape(x.shape)
    y = normal * channelwise(gamma, x) + channelwise(beta, x)
    return y, dx, per_channel(dy * normal), per_channel(dy)


def channel_layer_norm(normalise, x, gamma, beta, dy):
    """Layer norm over the channels of each position."""
    normal, dx = normalise(x, (1,), dy * channelwise(gamma, x))
    y = normal * channelwise(gamma, x) + channelwise(beta, x)
    return y, dx, per_channel(dy * normal), per_channel(dy)


def evo_norm_s0(x, v, gamma, beta, dy, groups):
    """EvoNorm-S0 and its gradients."""
    split = (x.shape[0], groups, -1)
    grouped = x.reshape(split)
    centred = grouped - grouped.mean(2, keepdims=True)
    deviation = np.sqrt((centred**2).mean(2, keepdims=True) + EPS)
    size = centred.shape[2]

    gate = sigmoid(channelwise(v, x) * x)
    swish = x * gate
    ratio = (swish.reshape(split) / deviation).reshape(x.shape)
    y = ratio * channelwise(gamma, x) + channelwise(beta, x)

    dratio = (dy * channelwise(gamma, x)).reshape(split)
    dswish = (dratio / deviation).reshape(x.shape)
    ddeviation = -(dratio * swish.reshape(split) / deviation**2).sum(2, keepdims=True)
    dvariance = ddeviation / (2 * deviation)
    slope = gate * (1 - gate)
    dx = dswish * (gate + channelwise(v, x) * x * slope)
    dx = dx + (dvariance * 2 * centred / size).reshape(x.shape)
    dv = per_channel(dswish * x**2 * slope)
    return y, dx, dv, per_channel(dy * ratio), per_channel(dy)


def evo_norm_b0(x, v, gamma, beta, dy, running=None):
    """EvoNorm-B0 and its gradients, with the variance of the batch or a running one."""
    axes, count = batch_axes(x), x.size // x.shape[1]
    size = max(int(np.prod(x.shape[2:])), 1)
    batch_centred = x - x.mean(axes, keepdims=True)
    variance = x.var(axes) if running is None else running
    batch = channelwise(np.sqrt(variance + EPS), x)
    centred = x - x.mean(positions(x), keepdims=True)
    own = np.sqrt((centred**2).mean(positions(x), keepdims=True) + EPS)
    right = channelwise(v, x) * x + own
    bound = np.maximum(batch, right)
    ratio = x / bound
    y = ratio * channelwise(gamma, x) + channelwise(beta, x)

    dratio = dy * channelwise(gamma, x)
    dbound = -dratio * x / bound**2
    dright = np.where(right > batch, dbound, 0)
    dbatch = np.where(right > batch, 0, dbound).sum(axes, keepdims=True)
    down = dright.sum(positions(x), keepdims=True)
    dx = dratio / bound + dright * channelwise(v, x)
    dx = dx + down / (2 * own) * 2 * centred / size
    if running is None:
        dx = dx + dbatch / (2 * batch) * 2 * batch_centred / count
    return y, dx, per_channel(dright * x), per_channel(dy * ratio), per_channel(dy)


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(0.7, 1.3, shape)


def vectors(count=3, channels=CHANNELS):
    return [drawn(channels, seed) for seed in range(1, count + 1)]


def through(module, x, dy, names=("weight", "bias")):
    """What a module gives, and the gradients of its input and its parameters."""
    given = torch.tensor(x, requires_grad=True)
    y = module(given)
    wanted = [given, *(getattr(module, name) for name in names)]
    grads = torch.autograd.grad(y, wanted, torch.tensor(dy))
    return [t.detach().numpy() for t in (y, *grads)]


def with_vectors(module, **values):
    """A float64 module with these parameters and buffers."""
    module = module.double()
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.from_numpy(value))
    return module


def assert_alike(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


# PyTorch's own layers


@pytest.mark.parametrize("formula", [batch_norm_chain, batch_norm_closed])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_in_training_mode_is_both_forms_of_the_formula(formula, shape):
    """The chain through the graph and the closed form agree with torch, forward and backward."""
    x, dy, (gamma, beta) = drawn(shape), drawn(shape, 9), vectors(2)
    norm = with_vectors(BATCH_NORMS[len(shape)](CHANNELS), weight=gamma, bias=beta)
    assert_alike(through(norm, x, dy), formula(x, gamma, beta, dy))


@pytest.mark.parametrize("shape", [*SHAPES, ONE_VALUE])
def test_batch_norm_in_eval_mode_is_an_affine(shape):
    x, dy, (gamma, beta, mean) = drawn(shape), drawn(shape, 9), vectors()
    variance = drawn(CHANNELS, 5) ** 2 + 0.1
    norm = with_vectors(
        BATCH_NORMS[len(shape)](CHANNELS),
        weight=gamma,
        bias=beta,
        running_mean=mean,
        running_var=variance,
    ).eval()
    assert_alike(through(norm, x, dy), batch_norm_eval(x, gamma, beta, dy, mean, variance))


def test_batch_norm_moves_its_statistics_as_pytorch_documents():
    """The biased variance normalises, the unbiased one is kept."""
    x = drawn((4, CHANNELS, 3, 5))
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3).double()
    norm(torch.tensor(x))
    np.testing.assert_allclose(norm.running_mean, 0.3 * x.mean((0, 2, 3)))
    np.testing.assert_allclose(norm.running_var, 0.7 + 0.3 * x.var((0, 2, 3), ddof=1))


@pytest.mark.parametrize("normalise", [normalise_chain, normalise_closed])
@pytest.mark.parametrize(("shape", "last"), [((4, 7), 1), ((2, 3, 5), 1), ((3, 4, 5, 2), 3)])
def test_layer_norm_is_both_forms_of_the_formula(normalise, shape, last):
    x, dy = drawn(shape), drawn(shape, 9)
    own = shape[-last:]
    norm = nn.LayerNorm(own)
    gamma, beta = drawn(own, 1), drawn(own, 2)
    norm = with_vectors(norm, weight=gamma, bias=beta)
    axes = tuple(range(len(shape) - last, len(shape)))
    assert_alike(through(norm, x, dy), layer_norm(normalise, x, gamma, beta, dy, axes))


@pytest.mark.parametrize("normalise", [normalise_chain, normalise_closed])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2:] != (1, 1) and len(s) > 2])
def test_group_norm_is_the_formula(normalise, groups, shape):
    x, dy, (gamma, beta) = drawn(shape), drawn(shape, 9), vectors(2)
    norm = with_vectors(nn.GroupNorm(groups, CHANNELS), weight=gamma, bias=beta)
    assert_alike(through(norm, x, dy), group_norm(normalise, x, gamma, beta, dy, groups))


@pytest.mark.parametrize("normalise", [normalise_chain, normalise_closed])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2:] != (1, 1) and len(s) > 2])
def test_instance_norm_is_group_norm_of_one_channel_each(normalise, shape):
    x, dy, (gamma, beta) = drawn(shape), drawn(shape, 9), vectors(2)
    norm = INSTANCE_NORMS[len(shape)](CHANNELS, affine=True)
    norm = with_vectors(norm, weight=gamma, bias=beta)
    assert_alike(through(norm, x, dy), group_norm(normalise, x, gamma, beta, dy, CHANNELS))


def test_the_comparison_finds_a_wrong_gradient():
    """The check fails where the backward forgets that the mean depends on the input."""
    x, dy, (gamma, beta) = drawn((3, CHANNELS, 5)), drawn((3, CHANNELS, 5), 9), vectors(2)
    norm = with_vectors(nn.BatchNorm1d(CHANNELS), weight=gamma, bias=beta)
    y, dx, dgamma, dbeta = batch_norm_closed(x, gamma, beta, dy)
    wrong = dx + channelwise(dbeta, x) / 15
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_alike(through(norm, x, dy), (y, wrong, dgamma, dbeta))


# Ours


@pytest.mark.parametrize("normalise", [normalise_chain, normalise_closed])
@pytest.mark.parametrize("shape", [*SHAPES, ONE_VALUE])
def test_channel_layer_norm_is_the_formula(normalise, shape):
    x, dy, (gamma, beta) = drawn(shape), drawn(shape, 9), vectors(2)
    norm = with_vectors(ChannelLayerNorm(CHANNELS), weight=gamma, bias=beta)
    assert_alike(through(norm, x, dy), channel_layer_norm(normalise, x, gamma, beta, dy))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [*SHAPES, ONE_VALUE])
def test_evo_norm_s0_is_the_formula(groups, shape):
    x, dy, (v, gamma, beta) = drawn(shape), drawn(shape, 9), vectors()
    norm = with_vectors(EVO_S0[len(shape)](CHANNELS, groups=groups), v=v, weight=gamma, bias=beta)
    found = through(norm, x, dy, ("v", "weight", "bias"))
    assert_alike(found, evo_norm_s0(x, v, gamma, beta, dy, groups))
    with torch.no_grad():
        np.testing.assert_allclose(norm(torch.tensor(x)), found[0], rtol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, ONE_VALUE])
@pytest.mark.parametrize("training", [True, False])
def test_evo_norm_b0_is_the_formula(training, shape):
    x, dy, (v, gamma, beta) = drawn(shape), drawn(shape, 9), vectors()
    running = drawn(CHANNELS, 5) ** 2 + 0.1
    norm = with_vectors(
        EVO_B0[len(shape)](CHANNELS), v=v, weight=gamma, bias=beta, running_var=running
    ).train(training)
    found = through(norm, x, dy, ("v", "weight", "bias"))
    kept = None if training else running
    assert_alike(found, evo_norm_b0(x, v, gamma, beta, dy, kept))
    with torch.no_grad():
        np.testing.assert_allclose(norm(torch.tensor(x)), found[0], rtol=1e-12)


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0])
@pytest.mark.parametrize("shape", [(3, CHANNELS, 5, 7), ONE_VALUE])
def test_evo_norm_without_nonlinearity_is_the_affine_alone(build, shape):
    """As published for the end of a residual branch: nothing is normalised."""
    x, dy, (gamma, beta) = drawn(shape), drawn(shape, 9), vectors(2)
    norm = with_vectors(build(CHANNELS, nonlinearity=False), weight=gamma, bias=beta)
    y = x * channelwise(gamma, x) + channelwise(beta, x)
    expected = (y, dy * channelwise(gamma, x), per_channel(dy * x), per_channel(dy))
    assert_alike(through(norm, x, dy), expected)
    assert set(norm.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0, ChannelLayerNorm])
def test_gradients_are_those_of_finite_differences(build):
    norm = build(4).double()
    parameters = {name: p.detach().clone() * 1.3 + 0.1 for name, p in norm.named_parameters()}
    x = torch.from_numpy(drawn((2, 4, 3, 2))).requires_grad_()
    inputs = [x, *(p.requires_grad_() for p in parameters.values())]

    def run(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(norm, named, (x,))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_evo_norm_s0_is_that_of_timm():
    """Where timm's has the channels for its groups; its variance is in float32 at best."""
    ours, theirs = EvoNorm2dS0(64), TimmEvoNorm2dS0(64)
    state = {name: torch.from_numpy(drawn(64, i)) for i, name in enumerate(ours.state_dict())}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.from_numpy(drawn((2, 64, 5, 3))).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 32, 32), (48, 32, 24), (7, 32, 7), (10, 4, 2)]
)
def test_groups_are_reduced_until_they_divide_the_channels(channels, groups, expected):
    assert EvoNorm2dS0(channels, groups=groups).groups == expected


@pytest.mark.parametrize(("channels", "groups"), [(0, 32), (8, 0), (8, -1)])
def test_groups_of_nothing_are_refused(channels, groups):
    with pytest.raises(ValueError, match=f"got {channels} and {groups}"):
        fitting_groups(channels, groups)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (EvoNorm2dS0(4), (2, 4, 3)),
        (EvoNorm1dS0(4), (2, 4, 3, 3)),
        (EvoNorm3dB0(4), (2, 4, 3, 3)),
        (EvoNorm2dB0(4).eval(), (2, 4)),
        (EvoNorm2dS0(4, nonlinearity=False), (2, 4)),
    ],
)
def test_an_input_of_another_rank_is_refused(norm, shape):
    with pytest.raises(ValueError, match=rf"got {len(shape)}D input"):
        norm(torch.zeros(shape))


# EvoNorm-B0's running variance


def test_running_variance_is_biased_and_moves_by_momentum():
    x = drawn((3, CHANNELS, 4, 5))
    norm = EvoNorm2dB0(CHANNELS).double()
    norm(torch.tensor(x))
    np.testing.assert_allclose(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
    assert int(norm.num_batches_tracked) == 1


def test_without_momentum_the_running_variance_is_the_average_of_the_batches():
    batches = [drawn((3, CHANNELS, 4, 5), seed) for seed in range(4)]
    norm = EvoNorm2dB0(CHANNELS, momentum=None).double()
    for batch in batches:
        norm(torch.tensor(batch))
    np.testing.assert_allclose(
        norm.running_var, np.mean([b.var((0, 2, 3)) for b in batches], axis=0)
    )


def test_in_eval_mode_the_running_variance_stays():
    norm = EvoNorm2dB0(CHANNELS).eval()
    norm(torch.randn(3, CHANNELS, 4, 5))
    assert (norm.running_var == 1).all()
    assert int(norm.num_batches_tracked) == 0


def test_without_running_statistics_the_batch_counts_in_eval_mode_too():
    x = torch.randn(3, CHANNELS, 4, 5)
    norm = EvoNorm2dB0(CHANNELS, track_running_stats=False)
    torch.testing.assert_close(norm.eval()(x), EvoNorm2dB0(CHANNELS).train()(x))
    assert "running_var" not in norm.state_dict()


def test_a_batch_of_one_value_has_variance_zero():
    """Where an unbiased variance would divide by zero."""
    norm = EvoNorm2dB0(CHANNELS)
    assert norm(torch.randn(ONE_VALUE)).isfinite().all()
    torch.testing.assert_close(norm.running_var, torch.full((CHANNELS,), 0.9))


def test_an_empty_batch_is_refused_in_training_and_passes_in_eval_mode():
    """It has no variance: NaN would go into the statistics."""
    norm = EvoNorm2dB0(CHANNELS)
    empty = torch.zeros(0, CHANNELS, 3, 3)
    with pytest.raises(ValueError, match="at least one value per channel"):
        norm(empty)
    assert (norm.running_var == 1).all()
    assert norm.eval()(empty).shape == empty.shape
    assert EvoNorm2dS0(CHANNELS)(empty).shape == empty.shape


def test_recalibration_takes_the_average_of_the_batches_variances():
    """`bntools.recalibrate` gives what cumulative momentum would, from the activations it sees."""
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), EvoNorm2dB0(CHANNELS)).eval()
    batches = [torch.randn(4, 3, 5, 5) + i for i in range(3)]
    result = bntools.recalibrate(model, batches)
    with torch.no_grad():
        seen = [model[0](batch).double().var((0, 2, 3), correction=0) for batch in batches]
    expected = torch.stack(seen).mean(0).float()
    torch.testing.assert_close(result.model[1].running_var, expected, rtol=1e-4, atol=1e-5)
    frozen = bntools.freeze(model).model
    assert (bntools.recalibrate(frozen, batches).model[1].running_var == 1).all()


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0, ChannelLayerNorm])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_half_precision_is_the_formula_rounded_once(dtype, build, spread):
    """Also where the variance does not fit into half precision: 1e8."""
    norm = build(64).to(dtype)
    x = (torch.from_numpy(drawn((4, 64, 5, 5))) * spread).to(dtype)
    exact = copy.deepcopy(norm).double()(x.double())
    y = norm(x)
    assert y.dtype == dtype
    error = (y.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert error.max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_of_full_precision_takes_half_precision(dtype):
    """As under autocast: the output has the dtype of the input."""
    for build in (EvoNorm2dS0, EvoNorm2dB0):
        norm = build(8, nonlinearity=True)
        assert norm(torch.randn(2, 8, 3, 3, dtype=dtype)).dtype == dtype
        bare = build(8, nonlinearity=False)
        assert bare(torch.randn(2, 8, 3, 3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_running_variance_stays_in_float32(dtype):
    norm = EvoNorm2dB0(4)
    norm.running_var.fill_(1e6 + 1)
    assert norm.to(dtype).running_var.dtype == torch.float32
    assert (norm.running_var == 1e6 + 1).all()
    assert norm.weight.dtype == dtype
    assert EvoNorm2dB0(4, dtype=dtype).running_var.dtype == torch.float32
    assert norm.double().running_var.dtype == torch.float64


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0])
def test_a_large_mean_does_not_swallow_the_variance(build):
    """The error grows with mean / deviation = 1e4, and not with its square: E[x^2] - E[x]^2."""
    x = 100 + 0.01 * torch.from_numpy(drawn((4, 32, 9, 9)))
    bound = 1e4 * torch.finfo(torch.float32).eps
    norm = build(32)
    exact = copy.deepcopy(norm).double()(x.float().double())
    torch.testing.assert_close(norm(x.float()).double(), exact, rtol=bound, atol=0)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_both_ways_to_the_moments_agree(groups):
    """The one for GPUs is run here, too, and its gradients."""
    x = torch.from_numpy(drawn((4, CHANNELS, 5, 3))).requires_grad_()
    ways = functional._moments(x, groups, EPS), functional._reduced(x.view(4, groups, -1), EPS)
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad((mean * rstd).sum(), x)[0] for mean, rstd in ways]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0, ChannelLayerNorm])
def test_layout_does_not_matter(build):
    x = torch.randn(3, 8, 5, 4)
    expected = build(8)(x)
    last = build(8)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    strided = torch.randn(3, 16, 10, 8)
    strided[:, ::2, ::2, ::2] = x
    torch.testing.assert_close(build(8)(strided[:, ::2, ::2, ::2]), expected)


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0, ChannelLayerNorm])
def test_the_input_is_not_written_to(build):
    x = torch.randn(3, 8, 5, 4)
    before = x.clone()
    with torch.no_grad():
        build(8)(x)
    build(8)(x)
    assert torch.equal(x, before)


# Compilers, exporters, files

OURS = [
    EvoNorm1dS0(8),
    EvoNorm2dS0(8, groups=4),
    EvoNorm3dS0(8, nonlinearity=False),
    EvoNorm1dB0(8),
    EvoNorm2dB0(8, momentum=None),
    EvoNorm3dB0(8, nonlinearity=False),
    EvoNorm2dB0(8, track_running_stats=False),
    ChannelLayerNorm(8),
]


def example(norm):
    rank = getattr(norm, "_ranks", (4, 4))[1]
    return torch.randn(2, 8, *[3] * (rank - 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", OURS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_torchscript_gives_the_same(norm, training):
    x = example(norm)
    eager = copy.deepcopy(norm).train(training)
    scripted = torch.jit.script(copy.deepcopy(norm)).train(training)
    torch.testing.assert_close(scripted(x), eager(x))
    torch.testing.assert_close(dict(scripted.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize("norm", OURS, ids=lambda n: type(n).__name__)
def test_a_symbolic_trace_passes_through(norm):
    x = example(norm)
    model = nn.Sequential(copy.deepcopy(norm).eval())
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_torch_compile_takes_them_whole():
    """Without a graph break, in both modes, with the same statistics after."""
    x = torch.randn(2, 8, 3, 3)
    model = nn.Sequential(EvoNorm2dS0(8), EvoNorm2dB0(8), ChannelLayerNorm(8))
    same = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        same.train(training)
        torch.testing.assert_close(compiled(x), same(x))
    torch.testing.assert_close(model.state_dict(), same.state_dict())


@pytest.mark.parametrize("norm", OURS, ids=lambda n: type(n).__name__)
def test_a_file_gives_the_layer_back(norm, tmp_path):
    bntools.save(nn.Sequential(norm), tmp_path / "norm.pt")
    loaded = bntools.load(tmp_path / "norm.pt")
    assert repr(loaded[0]) == repr(norm)
    x = example(norm)
    torch.testing.assert_close(loaded.eval()(x), copy.deepcopy(norm).eval()(x))
    assert repr(pickle.loads(pickle.dumps(norm))) == repr(norm)


def test_onnx_runtime_gives_the_same(tmp_path):
    """By the exporter that torch recommends."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        EvoNorm2dS0(8, groups=4),
        EvoNorm2dB0(8),
        EvoNorm2dS0(8, nonlinearity=False),
        ChannelLayerNorm(8),
    ).eval()
    x = torch.randn(2, 3, 7, 6)
    path = tmp_path / "norms.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0, ChannelLayerNorm])
def test_a_gpu_gives_the_same(build, dtype):
    norm = build(48).to(dtype)
    x = torch.from_numpy(drawn((4, 48, 7, 5))).to(dtype)
    exact = copy.deepcopy(norm).double()(x.double())
    error = (norm.cuda()(x.cuda()).cpu().double() - exact).abs()
    assert error.max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("build", [EvoNorm2dS0, EvoNorm2dB0])
def test_constructors_take_device_and_dtype(build):
    norm = build(8, device="meta", dtype=torch.float64)
    assert all(t.is_meta for t in norm.state_dict().values())
    assert norm.weight.dtype == torch.float64


def test_a_layer_says_what_it_is():
    assert repr(EvoNorm2dS0(48, nonlinearity=False)) == (
        "EvoNorm2dS0(48, eps=1e-05, groups=24, nonlinearity=False)"
    )
    assert repr(EvoNorm1dB0(4, momentum=None)) == "EvoNorm1dB0(4, eps=1e-05, momentum=None)"
    assert repr(ChannelLayerNorm(4)) == "ChannelLayerNorm(4, eps=1e-05)"


def test_reset_gives_the_layer_its_first_state_back():
    norm = EvoNorm2dB0(4)
    first = copy.deepcopy(norm.state_dict())
    nn.init.normal_(norm.v)
    norm(torch.randn(2, 4, 3, 3))
    norm.reset_parameters()
    norm.reset_running_stats()
    torch.testing.assert_close(norm.state_dict(), first)
    assert isinstance(norm, EvoNormB0)
