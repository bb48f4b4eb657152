"""Recalibration gives the statistics that it says it gives, and changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randomise import randomise
from torch import nn

import bntools
from bntools import RecalibrationOptions as Options
from bntools.errors import CalibrationError, InputError, PlanError

EPS = torch.finfo(torch.float32).eps


def statistics(model):
    return {n: b for n, b in model.named_buffers() if "running" in n}


def cnn():
    """Four norms in sequence, one behind a residual sum, one after pooling; dropout between."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(8)
            self.bn3 = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 6)
            self.bn4 = nn.BatchNorm1d(6)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = self.drop(self.bn1(self.conv1(x)).relu())
            x = self.bn3(x + self.bn2(self.conv2(x)).relu())
            return self.head(self.bn4(self.fc(x.mean((2, 3)))).relu())

    torch.manual_seed(3)
    model = Net()
    randomise(model)
    return model.eval()


def images(count=40, size=12):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 + 1


def plain_loop(model, batches):
    """The reset `momentum=None` loop with only the norms in training mode; the batch means too."""
    twin = copy.deepcopy(model).eval()
    largest = {}

    def note(path):
        def hook(module, args):
            mean = args[0].detach().transpose(0, 1).flatten(1).mean(1).abs()
            largest[path] = torch.maximum(largest.get(path, mean), mean)

        return hook

    for path, module in twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum, module.training = None, True
            module.register_forward_pre_hook(note(path))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return twin, largest


# Exactness


@pytest.mark.parametrize("sizes", [[8] * 5, [8, 8, 3], [40], [17, 2]])
def test_cumulative_is_pytorchs_loop_to_k_ulps(sizes):
    """An ulp of the largest batch figure a batch: that is what float32 averaging loses."""
    model, batches = cnn(), images(sum(sizes)).split(sizes)
    twin, largest = plain_loop(model, batches)
    found = bntools.recalibrate(model, batches).model
    for path, module in found.named_modules():
        if not hasattr(module, "running_var"):
            continue
        other = twin.get_submodule(path)
        limit = len(sizes) * EPS
        assert ((module.running_mean - other.running_mean).abs() <= limit * largest[path]).all()
        ratio = module.running_var / other.running_var
        assert ((ratio - 1).abs() <= limit * len(sizes)).all()
        assert module.num_batches_tracked == len(sizes)
        assert module.momentum == 0.1
        assert module.training is False


def test_large_images_give_pytorchs_figures_to_the_bit():
    """The forwards are the same to the last bit, deep layers too, unless asked to be faster."""
    model, batches = cnn(), images(6, size=64).split(3)
    twin, _ = plain_loop(model, batches)
    found = bntools.recalibrate(model, batches).model
    for name, buffer in statistics(found).items():
        assert torch.allclose(buffer, twin.get_buffer(name), rtol=2 * EPS, atol=2 * EPS)
    quick = bntools.recalibrate(model, batches, options=Options(layout="channels_last")).model
    for name, buffer in statistics(quick).items():
        assert torch.allclose(buffer, twin.get_buffer(name), rtol=1e-4, atol=1e-5)


def test_the_ulps_see_another_estimator():
    """Pooled statistics of the same batches are further away than any rounding."""
    model, batches = cnn(), images(19).split([17, 2])
    twin, _ = plain_loop(model, batches)
    found = bntools.recalibrate(model, batches, method="pooled").model
    assert not torch.allclose(found.bn1.running_var, twin.bn1.running_var, rtol=1e-5)


def one_layer(rank, channels=4, dtype=torch.float32):
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](channels)
    return nn.Sequential(nn.Identity(), norm.to(dtype)).eval()


SPATIAL = {0: (), 1: (5,), 2: (3, 4), 3: (2, 3, 2)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 257), min_size=1, max_size=5),
    rank=st.sampled_from([0, 1, 2, 3]),
    scale=st.sampled_from([(0.0, 1.0), (100.0, 0.01), (-7.0, 50.0)]),
    dtype=st.sampled_from(DTYPES),
    ordered=st.booleans(),
)
def test_pooled_is_the_moments_of_all_activations(sizes, rank, scale, dtype, ordered):
    """To 1e-6, or the rounding of the buffers where they are in half precision."""
    mean, deviation = scale
    x = torch.randn(sum(sizes), 4, *SPATIAL[rank], dtype=torch.float64) * deviation + mean
    x = (x.sort(0).values if ordered else x).to(dtype)
    found = bntools.recalibrate(
        one_layer(max(rank, 1), dtype=dtype), x.split(sizes), method="pooled"
    )
    rows = x.double().transpose(0, 1).flatten(1)
    variance, norm = (
        rows.var(1, correction=0) if rows.shape[1] > 1 else rows[:, 0] * 0,
        found.model[1],
    )
    limit = 1e-6 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny
    assert ((norm.running_mean.double() - rows.mean(1)).abs() <= limit * rows.abs().mean(1)).all()
    assert ((norm.running_var.double() - variance).abs() <= limit * variance + smallest).all()
    assert norm.num_batches_tracked == len(sizes)


def test_pooled_does_not_depend_on_batches_or_order_behind_one_layer():
    model, x = one_layer(2), images(64)
    model[1] = nn.BatchNorm2d(3)
    whole = bntools.recalibrate(model, [x], method="pooled").model[1]
    parts = bntools.recalibrate(model, x.flip(0).split([1, 2, 61]), method="pooled").model[1]
    assert torch.allclose(whole.running_var, parts.running_var, rtol=1e-6)
    assert torch.allclose(whole.running_mean, parts.running_mean, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_ema_is_training_without_gradients(momentum):
    model, batches = cnn(), images().split(8)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "running_var"):
            module.momentum, module.training = momentum, True
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    result = bntools.recalibrate(model, batches, method="ema", momentum=momentum)
    for name, buffer in statistics(result.model).items():
        assert torch.allclose(buffer, twin.get_buffer(name), rtol=1e-5, atol=1e-6)
    assert result.model.bn1.num_batches_tracked == model.bn1.num_batches_tracked + 5
    assert result.model.bn1.momentum == 0.1


def test_a_prior_counts_samples_not_elements():
    model, batches = cnn(), images().split(8)
    new = bntools.recalibrate(model, batches, method="pooled").model
    blend = bntools.recalibrate(model, batches, method="pooled", prior=120).model
    for name, buffer in statistics(blend).items():
        expected = 0.75 * model.get_buffer(name) + 0.25 * new.get_buffer(name)
        assert torch.allclose(buffer, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["pooled", "cumulative"])
def test_converged_statistics_are_those_that_layers_see(method):
    """Judged apart: the residual of an eval-mode forward over all the data is under 1e-3."""
    model, x = cnn(), images(64)
    result = bntools.recalibrate(model, x.split(16), method=method, passes="converge")
    assert len(result.report.passes) <= 4 + 1
    assert result.report.residual is not None
    if method == "pooled":
        assert seen_residual(result.model, x) < 1e-3
        once = bntools.recalibrate(model, x.split(16), method=method)
        assert seen_residual(once.model, x) > 1e-3


def seen_residual(model, x):
    """How far each norm's statistics are from those of its input in eval mode, in float64."""
    worst = []

    def hook(module, args):
        rows = args[0].double().transpose(0, 1).flatten(1)
        scale = rows.var(1, correction=0) + module.eps
        worst.append(((module.running_mean - rows.mean(1)).abs() / scale.sqrt()).max())
        worst.append(((module.running_var + module.eps) / scale).log().abs().max())

    handles = [
        m.register_forward_pre_hook(hook) for m in model.modules() if hasattr(m, "running_var")
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return float(max(worst))


def test_convergence_takes_at_most_as_many_passes_as_norms_in_sequence():
    layers = []
    for _ in range(5):
        layers += [nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh()]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(30, 4, 8)
    result = bntools.recalibrate(
        model, x.split([7, 23]), method="pooled", passes="converge",
        options=Options(tolerance=1e-12),
    )  # fmt: skip
    assert len(result.report.passes) == 5
    assert seen_residual(result.model, x) < 1e-5
    one = nn.Sequential(nn.BatchNorm1d(4)).eval()
    assert len(bntools.recalibrate(one, [x], passes="converge").report.passes) == 1


# What runs


def test_large_images_run_channels_last_with_the_same_statistics():
    model, x = cnn(), images(6, size=64)
    quick = bntools.recalibrate(model, x.split(3), method="pooled")
    kept = bntools.recalibrate(model, x.split(3), method="pooled", options=Options(layout="keep"))
    for name, buffer in statistics(quick.model).items():
        assert torch.allclose(buffer, kept.model.get_buffer(name), rtol=1e-5, atol=1e-6)
    assert quick.model.conv1.weight.is_contiguous()


def test_weights_that_share_memory_survive_the_change_of_layout():
    """Tied modules, tied data, and a view kept outside of the parameters."""
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    model[2].weight.data = model[0].weight.data
    model.eval()

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), model
            self.view = self.conv.weight.detach().flatten(1)
            self.same = self.conv

        def forward(self, x):
            return self.body(self.norm(self.same(x) * self.view.std()))

    viewing = Viewing().eval()
    before = {name: p.clone() for name, p in viewing.named_parameters()}
    x = images(6, size=64)
    quick = bntools.recalibrate(viewing, x.split(3), method="pooled")
    kept = bntools.recalibrate(viewing, x.split(3), method="pooled", options=Options(layout="keep"))
    for name, buffer in statistics(quick.model).items():
        assert torch.allclose(buffer, kept.model.get_buffer(name), rtol=1e-4, atol=1e-5)
    for name, parameter in quick.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.stride() == before[name].stride()
    assert torch.equal(quick.model.view, quick.model.conv.weight.flatten(1))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = []

    def forward(self, x):
        self.runs.append(len(x))
        return x


def test_work_after_the_last_norm_is_not_done():
    """The first batch of each shape runs to its end, to see which norm is the last."""
    tail = Counting()
    seen = tail.runs
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), tail).eval()
    batches = images(26).split(8)
    bntools.recalibrate(model, batches, options=Options(compare_samples=0, inplace=True))
    assert seen == []  # and what it noted in the model is undone
    runs = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, o: runs.append(len(o)) if isinstance(m, Counting) else None
    )
    try:
        bntools.recalibrate(model, batches, options=Options(compare_samples=0))
    finally:
        handle.remove()
    assert runs == [8, 8, 8, 2], "a model that remembers something runs to its end"


class Tail(nn.Module):
    def forward(self, x):
        Tail.runs += 1
        return x


def runs_of_tail(model, batches):
    Tail.runs = 0
    found = bntools.recalibrate(model, batches, options=Options(compare_samples=0))
    return Tail.runs, found


def test_the_tail_runs_once_for_each_form_of_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Tail()).eval()
    runs, result = runs_of_tail(model, images(26).split(8))
    assert runs == 2
    twin, _ = plain_loop(model, images(26).split(8))
    assert torch.allclose(result.model[1].running_var, twin[1].running_var, rtol=1e-6)


class Choosing(nn.Module):
    """Runs a second norm where the input asks for it, by number or by shape."""

    def __init__(self, by):
        super().__init__()
        self.first, self.second, self.tail = nn.BatchNorm1d(2), nn.BatchNorm1d(2), Tail()
        self.by = by

    def forward(self, x):
        x = self.first(x)
        positive = x[:, 0] > 0
        if self.by == "item" and bool(x.sum() > 1e9):
            return x
        if self.by == "tolist" and x.sum().tolist() > 1e9:
            return x
        if self.by == "numpy" and x.sum().numpy() > 1e9:
            return x
        if self.by == "shape" and len(x[positive]) == 0:
            return x
        return self.tail(self.second(x))


@pytest.mark.parametrize("by", ["item", "tolist", "numpy", "shape"])
def test_models_whose_way_depends_on_numbers_run_to_their_end(by):
    runs, _ = runs_of_tail(Choosing(by), torch.randn(24, 2).split(8))
    assert runs == 3
    runs, _ = runs_of_tail(Choosing(""), torch.randn(24, 2).split(8))
    assert runs == 1


def test_a_norm_that_runs_only_for_some_batches_is_not_missed():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.rarely = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.often(x)
            return self.rarely(y) if x.max() > 50 else y

    x = torch.randn(32, 2)
    x[30] = 100
    result = bntools.recalibrate(Rare(), x.split(8))
    assert result.model.often.num_batches_tracked == 4
    assert result.model.rarely.num_batches_tracked == 1


def test_a_norm_that_is_called_twice_counts_twice_as_in_pytorch():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x) * 3 + 1)

    model, batches = Twice().eval(), torch.randn(20, 3).mul(4).split(10)
    twin, _ = plain_loop(model, batches)
    found = bntools.recalibrate(model, batches).model
    assert found.norm.num_batches_tracked == twin.norm.num_batches_tracked == 4
    assert torch.allclose(found.norm.running_mean, twin.norm.running_mean, rtol=1e-5)
    assert torch.allclose(found.norm.running_var, twin.norm.running_var, rtol=1e-5)


def test_norms_that_share_their_statistics_fill_them_together():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        model[2]._buffers[name] = model[0]._buffers[name]
    batches = torch.randn(20, 3).mul(4).split(10)
    twin, _ = plain_loop(model, batches)
    found = bntools.recalibrate(model, batches).model
    assert found[0].running_var is found[2].running_var
    assert torch.allclose(found[0].running_var, twin[0].running_var, rtol=1e-5)


# Inputs


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, scale=None):
        return self.norm(x if scale is None else x * scale)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        lambda x: [x, ["label"] * len(x)],
        lambda x: {"x": x, "labels": torch.zeros(len(x))},
        lambda x: ((x, torch.ones(1)), torch.zeros(len(x))),
    ],
    ids=["tensor", "pair", "list", "dict", "arguments and target"],
)
def test_batches_may_have_any_usual_form(form):
    x = torch.randn(12, 3) * 5
    found = bntools.recalibrate(Named(), [form(b) for b in x.split(6)], method="pooled")
    assert torch.allclose(found.model.norm.running_var, x.var(0, correction=0), rtol=1e-5)
    assert found.report.samples == 12


def test_forward_runs_the_batch_as_the_caller_wants():
    x = torch.randn(12, 3)
    found = bntools.recalibrate(
        Named(), [{"pixels": b} for b in x.split(6)], method="pooled",
        options=Options(forward=lambda model, batch: model(batch["pixels"], torch.tensor(3.0))),
    )  # fmt: skip
    assert torch.allclose(found.model.norm.running_var, (3 * x).var(0, correction=0), rtol=1e-5)


def test_a_list_of_images_counts_its_images():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return [self.norm(image[None]) for image in images]

    batches = [([torch.rand(3, 4, 5), torch.rand(3, 6, 2)], None)] * 2
    result = bntools.recalibrate(Detector(), batches, method="pooled")
    assert result.report.samples == 4
    assert result.model.norm.num_batches_tracked == 4


def test_scripted_norms_are_reported():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.scripted(x))

    model = Partly().eval()
    result = bntools.recalibrate(model, [torch.randn(8, 3)])
    assert [layer.path for layer in result.report.layers] == ["norm"]
    assert [(x.path, x.kind) for x in result.report.left_alone] == [("scripted.1", "BatchNorm1d")]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.randn(4, 3), "its rows would be taken one by one"),
        ("images/", "Cannot use a str as batches"),
        (7, "Cannot use a int as batches"),
        ([], "there is no batch to take statistics from"),
        ([torch.zeros(0, 3)], "batch 1: it has no sample"),
        ([{"x": 3}], "batch 1: it has no sample"),
    ],
)
def test_what_is_no_batch_is_refused(batches, message):
    with pytest.raises((InputError, CalibrationError), match=message):
        bntools.recalibrate(Named(), batches)


def test_a_mask_leaves_padding_out():
    """Of the statistics, and of what layers behind normalise with."""
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    ).eval()
    x = torch.randn(8, 2, 10)
    lengths = torch.tensor([10, 9, 8, 7, 6, 5, 4, 3])
    x = torch.where((torch.arange(10) < lengths[:, None])[:, None], x, 1e3)

    def mask(batch):
        return torch.arange(10) < lengths[:, None] - 1  # and what the convolution mixes in

    found = bntools.recalibrate(model, [x], method="pooled", options=Options(mask=mask)).model
    seen = model[0](x).transpose(1, 2)[mask(None)].double()
    assert torch.allclose(found[1].running_mean.double(), seen.mean(0), rtol=1e-5)
    assert torch.allclose(found[1].running_var.double(), seen.var(0, correction=0), rtol=1e-5)
    assert torch.allclose(found[2].running_mean, model[1].bias, atol=1e-5)


def test_a_mask_follows_the_resolution():
    model = nn.Sequential(nn.AvgPool1d(2), nn.BatchNorm1d(2)).eval()
    x = torch.randn(4, 2, 8)
    x[:, :, 4:] = 99
    keep = torch.arange(8).expand(4, 8) < 4
    found = bntools.recalibrate(
        model, [x], method="pooled", options=Options(mask=lambda batch: keep)
    ).model
    expected = model[0](x)[:, :, :2].transpose(0, 1).flatten(1).var(1, correction=0)
    assert torch.allclose(found[1].running_var, expected, rtol=1e-5)


def test_a_mask_of_another_form_is_refused():
    options = Options(mask=lambda batch: torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="Cannot use the mask at 1: it is 3x5"):
        bntools.recalibrate(one_layer(1), [torch.randn(4, 4, 5)], options=options)


def test_the_run_ends_when_enough_is_known():
    model, x = one_layer(2), torch.randn(4000, 4, 3, 4)
    result = bntools.recalibrate(model, x.split(20), options=Options(max_error=0.1))
    assert 100 <= result.report.samples < 2000
    assert f"stopped after {result.report.samples} samples" in result.report.stopped
    tight = bntools.recalibrate(model, x.split(20), options=Options(max_error=0.03))
    assert tight.report.samples > result.report.samples
    never = bntools.recalibrate(model, x.split(20), options=Options(max_error=1e-4))
    assert (never.report.samples, never.report.stopped) == (4000, "")


def test_max_batches_ends_every_pass():
    result = bntools.recalibrate(cnn(), images().split(8), passes=2, options=Options(max_batches=3))
    assert [p.batches for p in result.report.passes] == [3, 3]


def test_lazy_layers_are_made_first():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    result = bntools.recalibrate(model, images().split(20))
    assert result.model[1].running_var.shape == (4,)
    assert nn.parameter.is_lazy(model[1].running_var)


def test_half_models_keep_their_dtype_and_do_not_overflow():
    """A variance of 60,000 in float16, from batches whose squares overflow."""
    for dtype in (torch.float16, torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).to(dtype)
        x = (images(16) * 100).to(dtype)
        found = bntools.recalibrate(model.eval(), x.split(8), method="pooled").model
        seen = model[0](x).double().transpose(0, 1).flatten(1).var(1, correction=0)
        assert found[1].running_var.dtype == found[1].weight.dtype == dtype
        assert ((found[1].running_var.double() / seen - 1).abs() < 2 * torch.finfo(dtype).eps).all()
        assert found[2].running_var.isfinite().all()


def test_a_variance_that_the_dtype_cannot_hold_is_an_error():
    model = nn.Sequential(nn.BatchNorm1d(2)).half().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.tensor([[6e4, 1.0], [-6e4, 2.0]]).half()
    with pytest.raises(
        CalibrationError, match=r"its variance reaches 3\.6e\+09, which torch.float"
    ):
        bntools.recalibrate(model, [x], method="pooled", options=Options(inplace=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Which layers


def test_only_selected_layers_change():
    model = cnn()
    result = bntools.recalibrate(model, images().split(8), only="bn*", skip="bn[34]")
    changed = {
        n for n, b in statistics(result.model).items() if not torch.equal(b, model.get_buffer(n))
    }
    assert {name.split(".")[0] for name in changed} == {"bn1", "bn2"}
    assert [layer.path for layer in result.report.layers] == ["bn1", "bn2"]
    assert {(left.path, left.why) for left in result.report.left_alone} == {
        ("bn3", "it was not selected"),
        ("bn4", "it was not selected"),
    }
    with pytest.raises(PlanError, match="Cannot select 'layer'"):
        bntools.recalibrate(model, images().split(8), only="layer")


def test_frozen_norms_are_left_alone_and_reported():
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    result = bntools.recalibrate(model, images().split(8))
    assert torch.equal(result.model[1].running_var, model[1].running_var)
    assert [(x.path, x.kind) for x in result.report.left_alone] == [("1", "FrozenBatchNorm2d")]
    assert "1 (FrozenBatchNorm2d) left: its statistics are frozen" in str(result)


def test_our_own_frozen_norms_are_left_alone():
    model = cnn()
    frozen = bntools.freeze(model, only="bn2").model
    result = bntools.recalibrate(frozen, images().split(8))
    assert torch.equal(result.model.bn2.running_var, model.bn2.running_var)
    assert [x.path for x in result.report.left_alone] == ["bn2"]


def test_layers_without_statistics_are_refused_with_the_cure():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    x = torch.randn(8, 3)
    with pytest.raises(PlanError, match=r"Cannot recalibrate 1: it has no running .*Skip it with"):
        bntools.recalibrate(model, [x])
    assert bntools.recalibrate(model, [x], skip="1").model[1].running_var is None
    result = bntools.recalibrate(model, [x], options=Options(add_statistics=True))
    assert result.model[1].track_running_stats
    assert torch.allclose(result.model[1].running_var, torch.full((3,), 8 / 7), rtol=1e-3)
    assert [edit.kind for edit in result.recipe.edits] == ["add-statistics"]
    assert model[1].running_var is None


def test_a_layer_that_does_not_run_is_reported():
    model = cnn()
    model.spare = nn.BatchNorm2d(8)
    result = bntools.recalibrate(model, images().split(8))
    assert [(x.path, x.why) for x in result.report.left_alone] == [
        ("spare", "it did not run on this data")
    ]
    assert result.model.spare.num_batches_tracked == 0


def test_sync_batch_norm_works_on_the_cpu():
    model = cnn()
    expected = bntools.recalibrate(model, images().split(8)).model
    found = bntools.recalibrate(nn.SyncBatchNorm.convert_sync_batchnorm(model), images().split(8))
    for name, buffer in statistics(found.model).items():
        assert torch.allclose(buffer, expected.get_buffer(name), rtol=1e-5, atol=1e-6)


def test_norms_with_activation_and_dropout_inside():
    """BatchNormAct2d of timm: the dropout in it stays in eval mode."""
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), layers.BatchNormAct2d(4, drop_layer=lambda: nn.Dropout(0.9)),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
    ).eval()  # fmt: skip
    twin, _ = plain_loop(model, images().split(8))
    for method in ("cumulative", "pooled"):
        found = bntools.recalibrate(model, images().split(8), method=method).model
        assert torch.allclose(found[3].running_mean, twin[3].running_mean, rtol=1e-4, atol=1e-5)


def test_evonorm_b0_gets_its_biased_variance():
    from bntools.norms import EvoNorm2dB0

    model = nn.Sequential(nn.Conv2d(3, 4, 1), EvoNorm2dB0(4), nn.BatchNorm2d(4)).eval()
    x = images(16)
    result = bntools.recalibrate(model, [x])
    seen = model[0](x).double().transpose(0, 1).flatten(1).var(1, correction=0)
    assert torch.allclose(result.model[1].running_var.double(), seen, rtol=1e-6)
    twin = copy.deepcopy(model)
    twin[1].train()
    behind = twin[1](twin[0](x)).double().transpose(0, 1).flatten(1)
    assert torch.allclose(
        result.model[2].running_mean.double(), behind.mean(1), rtol=1e-4, atol=1e-6
    )
    assert result.report.layers[0].drift.mean_before is None


def test_a_hand_written_forward_normalises_with_the_batch_too():
    """A subclass that does its own arithmetic has no kernel to ask."""

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            scale = (self.running_var + self.eps).rsqrt()
            return (x - self.running_mean[:, None, None]) * scale[:, None, None]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.BatchNorm2d(4)).eval()
    result = bntools.recalibrate(model, images(16).split(8))
    assert result.model[2].running_mean.abs().max() < 1e-5
    assert (result.model[2].running_var - 1).abs().max() < 1e-2


def test_a_model_without_norms_comes_back_as_it_was():
    result = bntools.recalibrate(nn.Linear(3, 2), [torch.randn(4, 3)])
    assert result.report.summary() == "no norm layer was recalibrated; the model is unchanged"


def test_wrapped_models_are_unwrapped():
    result = bntools.recalibrate(nn.DataParallel(cnn()), images().split(8))
    assert type(result.model).__name__ == "Net"


def test_compiled_parts_run_eagerly():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(16, 3)
    result = bntools.recalibrate(Compiled().eval(), x.split(8))
    assert result.model.inner._orig_mod[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "median"}, "method='median': give one of cumulative"),
        ({"momentum": 0}, "momentum=0: give above 0"),
        ({"passes": 0}, "passes=0: give 1, 2"),
        ({"passes": True}, "passes=True"),
        ({"prior": -1}, "prior=-1: give a number of samples"),
        ({"prior": float("nan")}, "prior=nan"),
        ({"prior": "auto"}, "there is no evaluate="),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        bntools.recalibrate(cnn(), images().split(8), **arguments)


def test_one_shot_iterators_go_once():
    assert bntools.recalibrate(cnn(), iter(images().split(8))).report.samples == 40
    with pytest.raises(InputError, match="Cannot go through an iterator more than once"):
        bntools.recalibrate(cnn(), iter(images().split(8)), passes=2)
    twice = bntools.recalibrate(cnn(), lambda: iter(images().split(8)), passes=2)
    assert [p.samples for p in twice.report.passes] == [40, 40]
