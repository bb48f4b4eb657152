"""Fitting new norms: closed forms against NumPy, the order of things, and what must not happen."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from fit_models import Residual, data, made, parameters_of, swapped
from randomise import outputs
from torch import nn
from torch.nn import functional as F

from bntools.errors import FitError
from bntools.fitting import FitOptions, fit
from bntools.fitting.families import fitter_for
from bntools.fitting.regression import pieces, rows_of, solve
from bntools.fitting.search import SAMPLE
from bntools.modules import get_module
from bntools.norms import EvoNorm2dB0, EvoNorm2dS0
from bntools.targets import (
    Site,
    ToEvoNormB0,
    ToEvoNormS0,
    ToGroupNorm,
    ToInstanceNorm,
    ToLayerNorm,
    divisors,
)

TARGETS = {
    "groupnorm": ToGroupNorm(4),
    "groupnorm-auto": ToGroupNorm("auto"),
    "layernorm": ToLayerNorm(),
    "layernorm-channels": ToLayerNorm("channels"),
    "instancenorm": ToInstanceNorm(),
    "evonorm-s0": ToEvoNormS0(groups=4),
    "evonorm-s0-auto": ToEvoNormS0(groups="auto"),
    "evonorm-b0": ToEvoNormB0(),
}
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def line_by_numpy(base, target, *, weight=True, bias=True):
    """Weight, bias and squared error of each channel, by np.linalg.lstsq in float64."""
    base, target = (t.detach().double().movedim(1, 0).flatten(1).numpy() for t in (base, target))
    found = []
    for x, y in zip(base, target, strict=True):
        columns = [x] * weight + [np.ones_like(x)] * bias
        wanted = y if weight else y - x
        solution = np.linalg.lstsq(np.stack(columns, 1), wanted, rcond=None)[0]
        slope = solution[0] if weight else 1.0
        shift = solution[-1] if bias else 0.0
        found.append((slope, shift, ((slope * x + shift - y) ** 2).sum()))
    return [torch.tensor(np.array(part)) for part in zip(*found, strict=True)]


def at_inputs(model, path, images):
    """What the layer at a path is given."""
    seen = []
    layer = get_module(model, path)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def at_output(model, path, images):
    """What the layer at a path gives."""
    seen = []
    handle = get_module(model, path).register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def without_affine(layer):
    """The layer with a weight of one and no bias."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(0)
    return layer


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm())


def snapshot(*models):
    """Everything of models that a fit could change."""
    return [
        (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            [(module.training, sorted(module.__dict__), len(module._forward_hooks))
             for module in model.modules()],
            [(p.requires_grad, p.grad, p.data_ptr()) for p in model.parameters()],
        )
        for model in models
    ]  # fmt: skip


def same(before, after):
    """Whether two snapshots are bit-identical."""
    for (state, *rest), (other, *others) in zip(before, after, strict=True):
        if rest != others or state.keys() != other.keys():
            return False
        if not all(torch.equal(state[name], other[name]) for name in state):
            return False
    return True


def lanes():
    return [thread for thread in threading.enumerate() if thread.name == "bntools lane"]


# ---- the arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1e4, 1e-2), (-3e-6, 1e-9)])
def test_a_line_is_that_of_numpy(weight, bias, mean, deviation):
    """Also where the mean is a million times the deviation: no digits cancel."""
    x = torch.randn(7, 5, 4, 3, dtype=torch.float64) * deviation + mean
    y = (x - mean) / deviation * 2 + torch.randn_like(x) + 1
    line = solve(rows_of(x, y).pooled(), weight=weight, bias=bias)
    slope, shift, error = line_by_numpy(x - (mean if bias else 0), y, weight=weight, bias=bias)
    if bias:
        shift = shift - (slope if weight else 1) * mean
    torch.testing.assert_close(line.weight, slope, rtol=1e-7, atol=0)
    torch.testing.assert_close(line.bias, shift, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(line.error, error, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 5), (9, 4, 3, 2), (1, 4, 3, 2), (9, 4, 1, 1)])
def test_moments_of_parts_merge_to_those_of_all(shape):
    """However the samples are split."""
    x, y = (torch.randn(shape, dtype=torch.float64) * 3 + 5 for _ in range(2))
    whole = rows_of(x, y).pooled()
    merged = None
    for part in torch.arange(shape[0]).split(4):
        found = rows_of(x[part], y[part]).pooled()
        merged = found if merged is None else merged.merge(found)
    assert merged.count == whole.count
    for name in ("base", "target", "m2_base", "m2_target", "m_both"):
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("groups", divisors(12))
@pytest.mark.parametrize("shape", [(5, 12, 4, 3), (5, 12, 7), (5, 12, 2, 3, 2)])
def test_moments_of_a_group_norm_follow_from_those_within_samples(groups, shape):
    """For every number of groups, without normalising anything."""
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    y = torch.randn(shape, dtype=torch.float64)
    found = rows_of(x, y).normalised(groups, 1e-3).pooled()
    truth = rows_of(F.group_norm(x, groups, eps=1e-3), y).pooled()
    for name in ("base", "m2_base", "m_both"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-9, atol=1e-9)


def test_a_large_batch_is_taken_in_pieces():
    """So that what is widened to float64 stays small."""
    x = torch.zeros(5, 300, 1000)
    parts = [part[0].shape[0] for part in pieces(x, x)]
    assert parts == [1] * 5
    assert [part[0].shape[0] for part in pieces(x[:, :3], x[:, :3])] == [5]


@torch.no_grad()
def test_moments_have_a_constant_size():
    """After 2 batches and after 40: what is kept does not grow with the data."""
    sizes = []
    for count in (2, 40):
        fitter = fitter_for(EvoNorm2dS0(6, groups=2).eval(), (), "norm")
        random = torch.Generator().manual_seed(0)
        for _ in range(count):
            x = torch.randn(8, 6, 30, 30)
            fitter.look(x, x, 1 / count, random)
        kept = fitter._samples
        sizes.append(sum(part.x.shape[1] for part in kept))
        fitter.choose()
        assert not fitter._samples
        for _ in range(count):
            fitter.add(x, x)
        assert fitter.moments.base.shape == (6,)
    assert max(sizes) <= 1.1 * SAMPLE


# ---- one layer -----------------------------------------------------------------------------------


@each_target
@torch.no_grad()
def test_the_first_layer_has_the_least_squares_affine(target):
    """Weight and bias are those of np.linalg.lstsq for the layer with the chosen groups and v."""
    model, images = made(), data()
    replaced, sites = swapped(model, target, ("bn1",))
    report = fit(model, replaced, sites, images.split(5))
    layer, taken = replaced.bn1, sites[0].activation
    (x,) = at_inputs(model, "bn1", images)
    wanted = model.bn1(x) if taken is None else F.relu(model.bn1(x))
    slope, shift, error = line_by_numpy(without_affine(layer)(x), wanted)
    torch.testing.assert_close(layer.weight.detach(), slope, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.bias.detach(), shift, rtol=1e-7, atol=1e-9)
    whole = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    assert report.layers[0].error == pytest.approx(float((error.sum() / whole).sqrt()), rel=1e-6)
    assert report.layers[0].elements == 24 * 36


@pytest.mark.parametrize("target", [ToGroupNorm("auto"), ToEvoNormS0(groups="auto")], ids=str)
def test_auto_takes_the_groups_that_fit_best(target):
    """The error is the least of those with each number of groups, and the layer has that number."""
    model, images = made(), data()
    replaced, sites = swapped(model, target, ("bn1",))
    report = fit(model, replaced, sites, [images])
    errors = {}
    for groups in sites[0].groups:
        other, decided = swapped(model, type(target)(groups=groups), ("bn1",))
        errors[groups] = fit(model, other, decided, [images]).layers[0].error
    best = min(errors, key=errors.get)
    row = report.layers[0]
    assert (row.groups, row.tried) == (best, divisors(8))
    assert row.error == pytest.approx(errors[best], rel=1e-6)
    layer = replaced.bn1
    assert getattr(layer, "num_groups", None) or layer.groups == best
    assert len({round(error, 6) for error in errors.values()}) == len(errors)


@pytest.mark.parametrize("target", [ToEvoNormS0(groups=2), ToEvoNormB0()], ids=["s0", "b0"])
def test_no_v_on_a_dense_grid_is_much_better(target):
    """The v of each channel, searched on a sample, against 400 values on all data."""
    model, images = made(), data(48)
    replaced, sites = swapped(model, target, ("bn1",))
    fit(model, replaced, sites, images.split(16))
    (x,) = at_inputs(model, "bn1", images)
    wanted = F.relu(model.bn1(x))
    layer = without_affine(replaced.bn1)
    _, _, found = line_by_numpy(layer(x), wanted)
    best = torch.full_like(found, float("inf"))
    unit = 1 / x.std((0, 2, 3)) if isinstance(layer, EvoNorm2dS0) else torch.ones(8)
    for v in torch.linspace(-32, 32, 400, dtype=torch.float64):
        with torch.no_grad():
            layer.v.copy_(v * unit)
        best = torch.minimum(best, line_by_numpy(layer(x), wanted)[2])
    assert bool((found <= 1.03 * best + 1e-9).all())


def test_b0_has_the_variance_of_what_it_sees():
    """The running variance is the biased one over all samples, not that of the last batch."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToEvoNormB0(), ("bn1",))
    fit(model, replaced, sites, images.split(7))
    (x,) = at_inputs(model, "bn1", images)
    assert isinstance(replaced.bn1, EvoNorm2dB0)
    torch.testing.assert_close(
        replaced.bn1.running_var.double(), x.var((0, 2, 3), correction=0), rtol=1e-6, atol=0
    )


def test_a_weight_that_would_blow_up_noise_is_none():
    """A normalised channel that hardly varies counts as constant: unseen data may vary more."""
    model, images = made(), data()
    with torch.no_grad():  # of two values far apart, one is always 1 and the other -1
        model.linear.bias[:2] = torch.tensor([1e3, -1e3])
    replaced, sites = swapped(model, ToGroupNorm(6), ("bn3",))
    report = fit(model, replaced, sites, [images])
    assert replaced.bn3.num_groups == 6
    assert report.layers[0].degenerate >= 2
    assert replaced.bn3.weight[:2].tolist() == [0, 0]
    assert max(map(abs, replaced.bn3.weight.tolist())) < 1e4


def test_an_evonorm_without_nonlinearity_becomes_the_batch_norm():
    """It is an affine map, as a batch norm is in eval mode."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToEvoNormS0(), ("bn2",))
    report = fit(model, replaced, sites, [images])
    assert report.layers[0].error < 1e-7
    assert relative(replaced(images), model(images)) < 1e-9
    assert report.agreement.relative_l2 < 1e-9
    assert report.agreement.top1 == 1.0


def test_the_carried_error_is_that_of_the_copied_affine():
    """Beside the fitted one, which is no larger."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1",))
    (x,) = at_inputs(model, "bn1", images)
    wanted = model.bn1(x)
    error = (replaced.bn1(x) - wanted).detach().square().sum()
    whole = (wanted - wanted.mean((0, 2, 3), keepdim=True)).detach().square().sum()
    row = fit(model, replaced, sites, images.split(9)).layers[0]
    assert row.carried_error == pytest.approx(float((error / whole).sqrt()), rel=1e-9)
    assert row.error < row.carried_error


def test_a_dead_channel_gets_the_mean_and_no_weight():
    """What does not vary explains nothing; the report counts it."""
    model, images = made(), data()
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.conv1.bias[3] = 2.5
    replaced, sites = swapped(model, ToInstanceNorm(), ("bn1",))
    report = fit(model, replaced, sites, [images])
    (y,) = at_output(model, "bn1", images)
    assert report.layers[0].degenerate == 1
    assert replaced.bn1.weight.tolist()[3] == 0
    assert replaced.bn1.bias.tolist()[3] == pytest.approx(float(y[:, 3].mean()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_target
def test_half_precision_is_fitted_in_wider_numbers(target, dtype):
    """The parameters keep their dtype, and the result is near that in float32."""
    wide = made(dtype=torch.float32)
    model, images = copy.deepcopy(wide).to(dtype), data(dtype=torch.float32)
    replaced, sites = swapped(model, target)
    report = fit(model, replaced, sites, images.split(8))
    other, others = swapped(wide, target)
    truth = fit(wide, other, others, images.split(8))
    for site in sites:
        assert get_module(replaced, site.layer).weight.dtype == dtype
    for row, wanted in zip(report.layers, truth.layers, strict=True):
        assert row.error == pytest.approx(wanted.error, rel=0.15, abs=0.03)


# ---- the order of things -------------------------------------------------------------------------


@each_target
def test_each_layer_is_fitted_to_inputs_from_the_fitted_network(target):
    """The same as one layer after the other, each with passes of its own, in plain PyTorch."""
    model, images = made(), data()
    replaced, sites = swapped(model, target)
    fit(model, replaced, sites, images.split(5))
    for site in sites:
        (x,), layer = at_inputs(replaced, site.path, images), get_module(replaced, site.path)
        (wanted,) = at_output(model, site.path, images)
        if site.activation is not None:
            wanted = F.relu(wanted)
        slope, shift, _ = line_by_numpy(without_affine(layer)(x), wanted)
        torch.testing.assert_close(layer.weight.detach(), slope, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.bias.detach(), shift, rtol=1e-6, atol=1e-8)


def test_inputs_from_the_original_would_give_other_parameters():
    """So the check above tells a fit in order from one all at once."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(4))
    fit(model, replaced, sites, [images])
    (x,), (wanted,) = at_inputs(model, "bn2", images), at_output(model, "bn2", images)
    slope, _, _ = line_by_numpy(without_affine(replaced.bn2)(x), wanted)
    assert relative(slope, replaced.bn2.weight.detach()) > 1e-3


@each_target
def test_batches_of_any_sizes_give_the_same(target):
    """Affines are sums over the data; of EvoNorms v is searched on other samples."""
    if "EvoNorm" in type(target).__name__:
        target = ToEvoNormS0() if "S0" in type(target).__name__ else ToEvoNormB0()
    model, images = made(), data()
    found = []
    for sizes in ([24], [1, 7, 16], [8, 8, 8]):
        paths = ("bn2", "bn3") if target.takes_activation else ("bn1", "bn2", "bn3")
        replaced, sites = swapped(model, target, paths)
        fit(model, replaced, sites, images.split(sizes))
        found.append(parameters_of(replaced, sites))
    for other in found[1:]:
        for name, values in found[0].items():
            torch.testing.assert_close(other[name], values, rtol=1e-8, atol=1e-10)


def test_the_data_goes_through_each_network_once():
    """Every batch runs every convolution once; the first one once more, as a check."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm("auto"))
    counts = []
    for net in (model, replaced):
        for layer in (net.conv1, net.conv2, net.linear):
            counts.append([])
            layer.register_forward_hook(lambda *_, into=counts[-1]: into.append(1))
    report = fit(model, replaced, sites, images.split(4))
    assert [len(calls) for calls in counts] == [6 + 1] * 6
    assert (report.passes, report.batches, report.samples) == (2, 6, 24)


@each_target
def test_two_fits_are_bit_identical(target):
    """Threads take turns in one order."""
    model, images = made(dtype=torch.float32), data(dtype=torch.float32)
    found = []
    for _ in range(2):
        replaced, sites = swapped(model, target)
        fit(model, replaced, sites, images.split(3))
        found.append(parameters_of(replaced, sites))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Shared(Residual):
    """One norm at two places."""

    def forward(self, x):
        x = F.relu(self.bn2(self.conv1(x)))
        return self.bn2(self.conv2(x)) + x


def test_a_shared_norm_is_fitted_to_all_its_calls():
    """In a second round the layers around it are fitted to what it really gives."""
    model, images = made(Shared), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn2",))
    report = fit(model, replaced, sites, images.split(6))
    assert report.layers[0].calls == 2
    assert report.passes == 4
    once, _ = swapped(model, ToGroupNorm(2), ("bn2",))
    x1, y1 = at_inputs(model, "bn2", images)[0], at_output(model, "bn2", images)
    slope, shift, _ = line_by_numpy(without_affine(once.bn2)(x1), y1[0])
    with torch.no_grad():  # what the first round has after its first call
        once.bn2.weight.copy_(slope)
        once.bn2.bias.copy_(shift)
    inputs = torch.cat([without_affine(once.bn2)(x) for x in at_inputs(once, "bn2", images)])
    slope, shift, _ = line_by_numpy(inputs, torch.cat(y1))
    torch.testing.assert_close(replaced.bn2.weight.detach(), slope, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(replaced.bn2.bias.detach(), shift, rtol=1e-8, atol=1e-10)


def test_a_shared_norm_needs_batches_that_come_twice():
    """An iterator is refused, and nothing is changed."""
    model, images = made(Shared), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn2",))
    before = snapshot(model, replaced)
    with pytest.raises(FitError, match=r"^Cannot fit bn2: it is called several times.*Give a list"):
        fit(model, replaced, sites, iter(images.split(6)))
    assert same(before, snapshot(model, replaced))


class Branching(Residual):
    """Dark images take another way, on which bn2 comes before bn1."""

    def forward(self, x):
        if float(x.mean()) < 0:
            return self.bn1(self.conv1(-x)) + self.bn2(self.conv2(self.conv1(x)))
        x = self.act1(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


def test_batches_that_go_other_ways_are_fitted_together():
    """Each layer waits for the batches that come to it first."""
    model, images = made(Branching), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1", "bn2"))
    report = fit(model, replaced, sites, [images[:12], -images[12:] - 3])
    assert [row.path for row in report.layers] == ["bn1", "bn2"]
    assert report.layers[0].elements == 24 * 36


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 60_000])
@each_target
def test_what_does_not_fit_goes_to_disk_and_comes_back_the_same(target, budget, tmp_path):
    """Bit-identical results with no memory at all for activations, and no file left."""
    model, images = made(dtype=torch.float32), data(dtype=torch.float32)
    found = []
    for cache in (1 << 30, budget):
        replaced, sites = swapped(model, target)
        options = FitOptions(cache_bytes=cache, cache_dir=tmp_path)
        report = fit(model, replaced, sites, images.split(4), options)
        found.append((parameters_of(replaced, sites), report))
    (kept, first), (spilled, second) = found
    assert all(torch.equal(kept[name], spilled[name]) for name in kept)
    assert first.spilled == 0 < second.spilled
    assert second.cache_peak < first.cache_peak
    assert list(tmp_path.iterdir()) == []


def test_the_peak_is_that_of_what_paused_forwards_hold():
    """At the first norm: the convolution's outputs of both networks (and the small inputs)."""
    model, images = made(dtype=torch.float32), data(dtype=torch.float32)
    replaced, sites = swapped(model, ToGroupNorm(4), ("bn1",))
    report = fit(model, replaced, sites, images.split(4))
    inputs, maps = 24 * 3 * 36 * 4, 24 * 8 * 36 * 4
    assert 2 * maps <= report.cache_peak <= 2 * (maps + inputs)


class Aliased(Residual):
    """Holds views, and memory that NumPy sees, across norms."""

    def forward(self, x):
        y = self.conv1(x)
        half, seen = y[:, ::2], y.detach().cpu().numpy()
        z = self.bn1(y)
        total = torch.from_numpy(seen.copy()).to(y) + half.repeat_interleave(2, 1)
        return self.bn2(self.conv2(z)) + total


class Caching(Residual):
    """Makes a table at the first batch and keeps it for the others."""

    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = [torch.arange(8, dtype=x.dtype).view(1, 8, 1, 1) * 0.1]
        y = self.bn1(self.conv1(x) + self.table[0])
        return self.bn2(self.conv2(y + self.table[0]))


@pytest.mark.parametrize("cls", [Aliased, Caching])
def test_memory_that_others_see_is_not_taken_away(cls, tmp_path):
    """NumPy's views of an activation, and tables that all batches use."""
    model, images = made(cls), data()
    vars(model).pop("table", None)
    found = []
    for cache in (1 << 30, 0):
        replaced, sites = swapped(model, ToGroupNorm(4), ("bn1", "bn2"))
        options = FitOptions(cache_bytes=cache, cache_dir=tmp_path)
        fit(model, replaced, sites, images.split(4), options)
        assert "table" not in vars(model)
        assert "table" not in vars(replaced)
        found.append(parameters_of(replaced, sites))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    """It says what can be done, and nothing is changed."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(4))
    before = snapshot(model, replaced)
    options = FitOptions(cache_bytes=0, cache_dir=tmp_path / "missing")
    with pytest.raises(FitError, match=r"^Cannot put activations away in .*cache_bytes"):
        fit(model, replaced, sites, images.split(4), options)
    assert same(before, snapshot(model, replaced))
    assert not lanes()


# ---- what goes wrong -----------------------------------------------------------------------------


class Faulty(Residual):
    """Raises on bright images, between its norms."""

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        if float(x.mean()) > 50:
            raise ValueError("too bright")
        return self.bn2(self.conv2(y))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_an_error_in_one_batch_ends_all_forwards(at):
    """The threads end, both networks are as before, and the error names the batch."""
    model = made(Faulty)
    batches = list(data().split(4))
    batches[at] = batches[at] + 100
    replaced, sites = swapped(model, ToGroupNorm(4), ("bn1", "bn2"))
    before = snapshot(model, replaced)
    with pytest.raises(
        FitError, match=rf"new network on batch {at}: ValueError: too bright\. Give"
    ):
        fit(model, replaced, sites, batches)
    assert same(before, snapshot(model, replaced))
    assert not lanes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_whatever_stops_a_fit_undoes_it(error, tmp_path):
    """Ctrl-C after the first layer, with files on disk."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm("auto"))
    before = snapshot(model, replaced)

    def stop(progress):
        if progress.done == 2:
            raise error

    options = FitOptions(cache_bytes=0, cache_dir=tmp_path, progress=stop)
    with pytest.raises(error, match=r"^$"):
        fit(model, replaced, sites, images.split(4), options)
    assert same(before, snapshot(model, replaced))
    assert not lanes()
    assert list(tmp_path.iterdir()) == []
    assert getattr(replaced.bn1, "num_groups", None) == 8


class Swallowing(Residual):
    """Catches whatever is raised in its norm, as careless code does."""

    def forward(self, x):
        y = self.conv1(x)
        try:
            y = self.bn1(y)
        except:  # noqa: E722
            y = y * 2
        return self.bn2(self.conv2(y))


def test_a_model_that_swallows_everything_does_not_hang():
    """Its threads end at their next stop."""
    model, images = made(Swallowing), data()
    replaced, sites = swapped(model, ToGroupNorm(4), ("bn1", "bn2"))
    batches = [*images.split(4), images[:2] * float("nan")]
    with pytest.raises(FitError, match=r"batch 6 has a NaN"):
        fit(model, replaced, sites, batches)
    assert not lanes()


@pytest.mark.parametrize(
    ("value", "whose"), [(float("nan"), "the old norm's output"), (float("inf"), "the old norm")]
)
def test_a_batch_with_nonfinite_values_is_named(value, whose):
    """And nothing is changed."""
    model, images = made(), data()
    images[13, 1, 2, 3] = value
    replaced, sites = swapped(model, ToGroupNorm(4))
    before = snapshot(model, replaced)
    with pytest.raises(FitError, match=rf"^Cannot fit bn1: batch 3 has a NaN.*{whose}"):
        fit(model, replaced, sites, images.split(4))
    assert same(before, snapshot(model, replaced))


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 6, 6)], iter(())])
def test_no_samples_are_refused(batches):
    """An empty list, and batches of no samples."""
    model = made()
    replaced, sites = swapped(model, ToGroupNorm(4))
    with pytest.raises(FitError, match=r"^Cannot fit to no samples"):
        fit(model, replaced, sites, batches)


def test_too_few_values_are_refused_and_few_are_told():
    """One value per channel does not determine weight and bias; a handful fits noise."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    before = snapshot(model, replaced)
    with pytest.raises(FitError, match=r"^Cannot fit bn3: 1 values per channel do not determine 2"):
        fit(model, replaced, sites, [images[:1]])
    assert same(before, snapshot(model, replaced))
    report = fit(model, replaced, sites, [images[:4]])
    assert report.warnings == ("bn3 was fitted to 4 values per channel only: fit to more samples",)


class Skipping(Residual):
    """Runs bn2 only on dark images."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.bn2(y) if float(x.mean()) < -5 else y


def test_a_norm_that_does_not_run_is_left_and_told():
    """Such as an auxiliary head's; where none runs, there is nothing to fit."""
    model, images = made(Skipping), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1", "bn2"))
    before = parameters_of(replaced, sites[1:])
    report = fit(model, replaced, sites, [images])
    assert [row.path for row in report.layers] == ["bn1"]
    assert report.warnings == ("bn2 is not fitted: it does not run on these batches",)
    after = parameters_of(replaced, sites[1:])
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(FitError, match=r"^Cannot fit bn2: no new layer runs on these batches"):
        fit(model, replaced, sites[1:], [images])


@pytest.mark.parametrize("shift", [1e2, -1e2])
@pytest.mark.parametrize("target", [ToEvoNormS0(groups=2), ToEvoNormB0()], ids=["s0", "b0"])
def test_a_gate_that_is_shut_for_all_values_is_not_taken(target, shift):
    """It fits as well as any, with a weight of 1e38 on values of 1e-38."""
    model, images = made(dtype=torch.float32), data(dtype=torch.float32)
    replaced, sites = swapped(model, target, ("bn1",))
    with torch.no_grad():
        for net in (model, replaced):
            net.conv1.bias.add_(shift)
        model.bn1.running_mean.add_(shift)
    report = fit(model, replaced, sites, [images])
    limit = 1e3 * float(model.bn1.weight.detach().abs().max())
    assert max(map(abs, replaced.bn1.weight.tolist())) < limit
    assert report.layers[0].error < 1


class Exploding(Residual):
    """Divides by zero where a new layer gives other values than the old one."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return y / (y - y.round(decimals=0)).abs().gt(-self.gate(y)).to(y.dtype)

    def gate(self, y):
        return 1.0 if isinstance(self.bn1, nn.BatchNorm2d) else -2.0


def test_outputs_that_are_not_finite_are_refused():
    """A network that gives NaN is no result."""
    model, images = made(Exploding), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1",))
    before = snapshot(model, replaced)
    with pytest.raises(FitError, match=r"^Cannot fit: with the new layers the outputs of batch 0"):
        fit(model, replaced, sites, [images])
    assert same(before, snapshot(model, replaced))


def test_a_norm_that_the_original_does_not_come_to_is_refused():
    """Two networks that are not the same otherwise."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    model.bn2 = nn.Identity()
    wrong = [Site("bn3", "bn2", sites[1].target), sites[2]]
    with pytest.raises(FitError, match=r"^Cannot fit bn2: "):
        fit(model, replaced, wrong, [images])
    assert not lanes()


def test_a_layer_without_affine_is_refused():
    """There is nothing to fit."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1",))
    replaced.bn1 = nn.GroupNorm(2, 8, affine=False).double()
    with pytest.raises(FitError, match=r"^Cannot fit bn1: it has neither weight nor bias"):
        fit(model, replaced, sites, [images])


def test_values_that_overflow_their_dtype_are_refused():
    """A weight of 1e6 is infinite in float16."""
    model = made(dtype=torch.float32)
    model.bn1.weight.data.mul_(1e4)
    model.bn1.bias.data.fill_(1e6)
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1",))
    replaced.bn1.half()
    before = snapshot(replaced)
    with pytest.raises(FitError, match=r"^Cannot fit bn1: a value overflows its dtype"):
        fit(model, replaced, sites, [data(dtype=torch.float32)])
    assert same(before, snapshot(replaced))


class Keeping(Residual):
    """Leaves what one layer computes on itself for another, and counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.kept = self.conv1(x)
        self.count += 1
        y = self.bn1(self.kept)
        return self.bn2(self.conv2(y) + self.kept)


def test_a_model_that_keeps_activations_is_refused_but_for_one_batch():
    """Several batches in it at a time would mix; what it leaves behind is undone."""
    model, images = made(Keeping), data()
    vars(model).pop("kept")
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1", "bn2"))
    before = snapshot(model, replaced)
    with pytest.raises(FitError, match=r"several batches are in it.*Give the data as a single"):
        fit(model, replaced, sites, images.split(8))
    assert same(before, snapshot(model, replaced))
    fit(model, replaced, sites, [images])
    assert int(replaced.count) == int(model.count)
    assert "kept" not in vars(model)


# ---- what is left alone --------------------------------------------------------------------------


@each_target
def test_nothing_but_the_new_layers_changes(target):
    """Not the original, its statistics, modes and hooks, nor the RNG."""
    model, images = made(), data()
    replaced, sites = swapped(model, target)
    replaced.train()
    model.bn1.train()
    replaced.bn1.weight.requires_grad_(False)
    inputs = images.clone()
    state, before = torch.get_rng_state(), snapshot(model)
    others = {n: t.clone() for n, t in replaced.state_dict().items() if "bn" not in n}
    fit(model, replaced, sites, images.split(6))
    assert same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(inputs, images)
    assert all(module.training for module in replaced.modules())
    assert not replaced.bn1.weight.requires_grad
    assert all("forward" not in vars(m) for net in (model, replaced) for m in net.modules())
    assert all(torch.equal(t, replaced.state_dict()[name]) for name, t in others.items())


def test_inference_and_gradient_modes_are_the_callers():
    """A fit in no_grad is the same as without."""
    model, images = made(), data()
    found = []
    for gradients in (True, False):
        replaced, sites = swapped(model, ToGroupNorm(2))
        with torch.set_grad_enabled(gradients):
            fit(model, replaced, sites, [images])
        found.append(parameters_of(replaced, sites))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- forms of data and of models -----------------------------------------------------------------


class Keyword(Residual):
    """Takes a keyword beside its images, and calls a norm's forward itself."""

    def forward(self, images, *, gain=1.0):
        y = self.act1(self.bn1.forward(self.conv1(images * gain)))
        return {"maps": self.bn2(self.conv2(y)), "names": ["a"]}


@pytest.mark.parametrize("form", ["tensor", "pair", "list", "dict", "forward"])
def test_batches_come_in_many_forms(form):
    """A tensor, a pair with labels, a dict of keywords, or whatever `forward` takes."""
    model = made(Keyword)
    replaced, sites = swapped(model, ToGroupNorm(2), ("bn1", "bn2"))
    make = {
        "tensor": lambda x: x,
        "pair": lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        "list": lambda x: [x, torch.zeros(len(x), dtype=torch.long)],
        "dict": lambda x: {"images": x, "gain": 1.0},
        "forward": lambda x: ("id", {"pixels": x}),
    }[form]
    forward = (lambda net, batch: net(batch[1]["pixels"])) if form == "forward" else None
    batches = [make(x) for x in (*data().split(9), data()[:0])]
    report = fit(model, replaced, sites, batches, FitOptions(forward=forward))
    assert report.samples == 24
    truth, others = swapped(model, ToGroupNorm(2), ("bn1", "bn2"))
    fit(model, truth, others, [data()])
    found, wanted = parameters_of(replaced, sites), parameters_of(truth, others)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-8, atol=1e-10)


def test_float64_images_are_cast_for_a_float32_model():
    """As every other verb does."""
    model = made(dtype=torch.float32)
    replaced, sites = swapped(model, ToGroupNorm(2))
    assert fit(model, replaced, sites, [data()]).samples == 24


def test_channels_last_gives_the_same():
    """Memory layouts do not matter."""
    model, images = made(), data()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        replaced, sites = swapped(model, ToGroupNorm("auto"))
        replaced, net = (
            replaced.to(memory_format=layout),
            copy.deepcopy(model).to(memory_format=layout),
        )
        fit(net, replaced, sites, [images.to(memory_format=layout)])
        found.append(parameters_of(replaced, sites))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=1e-12)


class Doubling(nn.Module):
    """No affine after something: the weight is squared."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 3.0, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight.square().view(1, -1, 1, 1)


def test_a_layer_of_unknown_class_is_fitted_only_if_it_is_an_affine():
    """The other is left, and told."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    replaced.bn1 = Doubling()
    replaced.bn2 = nn.GroupNorm(2, 8, eps=1e-3).double()
    replaced.bn2.__class__ = type("Mine", (nn.GroupNorm,), {})
    report = fit(model, replaced, sites, images.split(12))
    assert [row.path for row in report.layers] == ["bn2", "bn3"]
    assert report.warnings[0].startswith("bn1 is left as it is: its output is not a per-channel")
    assert bool((replaced.bn1.weight == 3).all())
    known, others = swapped(model, ToGroupNorm(2))
    known.bn1 = Doubling()
    fit(model, known, others[1:], [images])
    torch.testing.assert_close(replaced.bn2.weight, known.bn2.weight, rtol=1e-6, atol=1e-8)


def test_kernels_run_in_the_thread_of_the_caller():
    """OpenMP and cuBLAS keep a pool for every thread that uses them."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    seen = set()
    library = torch.library.Library("bntools_test_fit", "DEF")
    library.define("noted(Tensor x) -> Tensor")
    library.impl(
        "noted", lambda x: seen.add(threading.get_ident()) or x.clone(), "CompositeExplicitAutograd"
    )

    class Noting(nn.Module):
        def forward(self, x):
            return torch.ops.bntools_test_fit.noted(x)

    model.act1 = nn.Sequential(nn.ReLU(), Noting())
    replaced.act1 = nn.Sequential(nn.ReLU(), Noting())
    fit(model, replaced, sites, images.split(6))
    assert seen == {threading.get_ident()}


def test_progress_counts_the_layers():
    """One event for each layer, in execution order."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    events = []
    fit(model, replaced, sites, [images], FitOptions(progress=events.append))
    assert [(e.stage, e.layer, e.done, e.total) for e in events] == [
        ("fit", "bn1", 1, 3),
        ("fit", "bn2", 2, 3),
        ("fit", "bn3", 3, 3),
    ]


def test_the_agreement_is_that_of_the_final_outputs():
    """Relative L2 and top-1 over all batches."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToGroupNorm(2))
    report = fit(model, replaced, sites, images.split(5))
    (new,), (old,) = outputs(replaced, images), outputs(model, images)
    assert report.agreement.relative_l2 == pytest.approx(relative(new, old), rel=1e-9)
    assert report.agreement.top1 == float((new.argmax(1) == old.argmax(1)).double().mean())
    assert report.agreement.samples == 24


def test_the_report_can_be_read_and_written():
    """As a table, in one line, and as JSON data."""
    model, images = made(), data()
    replaced, sites = swapped(model, ToEvoNormS0(groups="auto"))
    report = fit(model, replaced, sites, images.split(5))
    assert "bn2" in str(report)
    assert report.summary().startswith("fitted 3 layers to 24 samples in 2 forward passes")
    assert report.to_dict()["layers"][0]["tried"] == [1, 2, 4, 8]
