"""A recalibration changes statistics, all of them or none, and leaves everything else alone."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools import RecalibrationOptions as Options
from bntools.errors import BNToolsError, CalibrationError


class Busy(nn.Module):
    """Keeps much that a forward or a mode change could spoil."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.4)
        self.second = nn.Conv2d(4, 4, 1)
        self.last = nn.BatchNorm2d(4, momentum=None)
        self.register_buffer("seen", torch.zeros(1))
        self.log = []
        self.second.weight.requires_grad_(False)
        self.last.eval()
        self.norm.register_forward_hook(lambda module, args, out: None)
        self.last.extra = {"keep": [1]}

    def forward(self, x):
        self.seen += 1
        self.log.append(len(x))
        torch.rand(1)
        return self.last(self.second(self.drop(self.norm(self.conv(x)).relu())))


def state(model):
    """All that must not change: tensors bit by bit, flags, hooks, attributes."""
    return {
        path: (
            type(module),
            module.training,
            {n: v for n, v in vars(module).items() if isinstance(v, (bool, int, float, str))},
            {n: (id(t), t.detach().clone(), t.stride(), t.requires_grad, t._version)
             for n, t in module._parameters.items() if t is not None},
            {n: (id(t), t.clone()) for n, t in module._buffers.items() if t is not None},
            [len(getattr(module, n)) for n in ("_forward_hooks", "_forward_pre_hooks")],
            "forward" in vars(module),
            pickle.dumps(getattr(module, "log", None)),
        )
        for path, module in model.named_modules()
    }  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def batches(count=3, size=8):
    random = torch.Generator().manual_seed(2)
    return [torch.randn(4, 3, size, size, generator=random) + i for i in range(count)]


def interrupted(after, error):
    for number, batch in enumerate(batches(5)):
        if number == after:
            raise error
        yield batch


METHODS = [
    {"method": "cumulative"},
    {"method": "pooled"},
    {"method": "ema"},
    {"method": "pooled", "passes": "converge"},
    {"method": "pooled", "prior": 3},
    {"method": "pooled", "prior": "auto", "evaluate": lambda model: 1.0},
]


@pytest.mark.parametrize("arguments", METHODS, ids=lambda a: "-".join(map(str, a.values()))[:25])
@pytest.mark.parametrize("size", [8, 64])
def test_the_argument_is_the_same_bit_by_bit(arguments, size):
    model = Busy().train()
    model.last.eval()
    before = state(model)
    given = batches(size=size)
    copies = [batch.clone() for batch in given]
    result = bntools.recalibrate(model, given, **arguments)
    assert same(state(model), before)
    assert all(map(torch.equal, given, copies))
    ours = state(result.model)
    for path, kept in before.items():
        if "norm" in path or "last" in path:
            continue
        assert kept[:3] == ours[path][:3]
        assert same([v[1:4] for v in kept[3].values()], [v[1:4] for v in ours[path][3].values()])
        assert same([v[1] for v in kept[4].values()], [v[1] for v in ours[path][4].values()])
        assert kept[5:] == ours[path][5:]
    assert result.model.norm.momentum == 0.3
    assert result.model.last.momentum is None
    assert (result.model.norm.training, result.model.last.training) == (True, False)


def test_in_place_changes_statistics_and_nothing_else():
    model = Busy().eval()
    before = state(model)
    result = bntools.recalibrate(model, batches(size=64), options=Options(inplace=True))
    after = state(model)
    assert result.model is model
    for path in before:
        assert before[path][:3] == after[path][:3]
        assert same(before[path][3], after[path][3])
        assert before[path][5:] == after[path][5:]
        for name, (identity, values) in before[path][4].items():
            assert after[path][4][name][0] == identity
            statistic = name.startswith(("running", "num_batches"))
            assert torch.equal(after[path][4][name][1], values) is not statistic


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), MemoryError("full")])
@pytest.mark.parametrize("inplace", [True, False])
def test_whatever_is_raised_leaves_the_model_as_it_was(error, inplace):
    model = Busy().eval()
    before = state(model)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CalibrationError
    with pytest.raises(wanted, match=r"^$|Cannot read batch 3"):
        bntools.recalibrate(model, interrupted(2, error), options=Options(inplace=inplace))
    assert same(state(model), before)


def test_a_failing_model_is_named_with_layer_and_batch():
    model = Busy().eval()
    before = state(model)
    wrong = [*batches(2), torch.zeros(4, 5, 8, 8)]
    with pytest.raises(
        CalibrationError, match=r"Cannot run batch 3: the model fails \(RuntimeError"
    ):
        bntools.recalibrate(model, wrong, options=Options(inplace=True))
    assert same(state(model), before)
    deep = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(CalibrationError, match="Cannot run batch 1: the model fails behind 0"):
        bntools.recalibrate(deep, [torch.randn(4, 3)])


def test_a_failing_evaluation_leaves_the_model_as_it_was():
    model = Busy().eval()
    before = state(model)
    calls = []

    def evaluate(judged):
        calls.append(judged)
        if len(calls) == 2:
            raise ZeroDivisionError("no labels")
        return 1.0

    with pytest.raises(ZeroDivisionError, match="no labels"):
        bntools.recalibrate(model, batches(), evaluate=evaluate, options=Options(inplace=True))
    assert same(state(model), before)


def test_an_evaluation_may_change_modes():
    model = Busy().train()
    model.last.eval()
    result = bntools.recalibrate(model, batches(), evaluate=lambda m: m.train() and 1.0)
    assert result.model.norm.training
    assert not result.model.last.training


def test_statistics_are_not_added_for_good_where_something_fails():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    options = Options(add_statistics=True, inplace=True)
    with pytest.raises(CalibrationError, match="Cannot read batch 2"):
        bntools.recalibrate(model, interrupted_rows(), options=options)
    assert model[0].running_var is None
    assert model[0].track_running_stats is False


def interrupted_rows():
    yield torch.randn(4, 3)
    raise OSError("gone")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_what_was_seen_before_a_failure_can_be_kept(error):
    model = Busy().eval()
    result = bntools.recalibrate(model, interrupted(2, error), options=Options(keep_partial=True))
    whole = bntools.recalibrate(model, batches(5)[:2])
    assert torch.equal(result.model.norm.running_var, whole.model.norm.running_var)
    assert result.report.partial
    assert result.report.samples == 8
    assert result.report.stopped.startswith("stopped after 2 batches of pass 1: ")
    with pytest.raises((CalibrationError, KeyboardInterrupt)):
        bntools.recalibrate(model, interrupted(0, error), options=Options(keep_partial=True))


def test_a_failure_in_a_later_pass_keeps_the_pass_before():
    class Source:
        passes = 0

        def __iter__(self):
            Source.passes += 1
            yield from batches(2)
            if Source.passes == 2:
                raise OSError("gone")

    model = Busy().eval()
    result = bntools.recalibrate(
        model, Source(), passes=3, options=Options(keep_partial=True, compare_samples=0)
    )
    whole = bntools.recalibrate(model, batches(2))
    assert torch.equal(result.model.norm.running_var, whole.model.norm.running_var)
    assert "of pass 2" in result.report.stopped


def test_random_states_come_back():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what a model may use

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.tail = nn.BatchNorm1d(3), nn.Identity()

        def forward(self, x):
            torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
            return self.tail(self.norm(x))

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    bntools.recalibrate(Drawing(), torch.randn(8, 3, generator=torch.Generator()).split(4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2]) == states[1:]  # noqa: NPY002


def test_gradients_and_threads_are_as_they_were():
    model = Busy().eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    bntools.recalibrate(model, batches(), options=Options(inplace=True))
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert torch.is_grad_enabled()
    assert model(batches()[0]).requires_grad


def test_a_model_that_swallows_exceptions_does_not_swallow_the_end():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            try:
                return self.norm(x)
            except Exception:  # noqa: BLE001 - models do
                return self.other(x)

    x = torch.randn(12, 3)
    result = bntools.recalibrate(Careful(), x.split(4), method="pooled")
    assert torch.allclose(result.model.norm.running_var, x.var(0, correction=0), rtol=1e-5)


def test_models_that_cannot_be_copied_whole_are_recalibrated():
    import threading

    model = Busy().eval()
    model.lock = threading.Lock()
    assert bntools.recalibrate(model, batches()).report.samples == 12


def test_inference_tensors_and_shadowed_names_do_no_harm():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = model[1].running_var.clone()
    found = bntools.recalibrate(model, batches(size=64)).model
    assert not torch.equal(found[1].running_var, before)

    class Shadowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.modules = []
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x)

    assert bntools.recalibrate(Shadowing().eval(), batches()).report.samples == 12


def test_models_in_inference_mode_or_autocast_of_the_caller():
    model = Busy().eval()
    plain = bntools.recalibrate(model, batches()).model
    with torch.inference_mode():
        inside = bntools.recalibrate(model, batches()).model
    assert torch.equal(inside.norm.running_var, plain.norm.running_var)
    cast = bntools.recalibrate(model, batches(), options=Options(autocast=torch.bfloat16)).model
    assert cast.last.running_var.dtype == torch.float32
    assert torch.allclose(cast.last.running_var, plain.last.running_var, rtol=0.05)


def test_the_report_tells_all_as_json_and_as_text():
    import json

    model = Busy().eval()
    result = bntools.recalibrate(model, batches(), method="pooled", passes=2)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["verb"] == "recalibrate"
    assert data["samples"] == 12
    assert data["batches"] == 3
    first = data["layers"][0]
    assert (first["path"], first["samples"], first["elements"]) == ("norm", 12, 12 * 64)
    assert set(first["drift"]) >= {"kl_median", "kl_max", "mean_before", "variance_after"}
    assert first["residual"] is not None
    assert "recalibrated 2 norm layers (pooled) on 12 samples in 3 batches, 2 passes" in str(result)


def test_progress_is_told_after_every_batch():
    told = []
    bntools.recalibrate(Busy().eval(), batches(), passes=2, options=Options(progress=told.append))
    assert [(p.passes, p.batch, p.samples) for p in told] == [
        (n, b, 4 * b) for n in (1, 2) for b in (1, 2, 3)
    ]
    assert all(0 <= p.waited <= p.seconds + 1 for p in told)


def test_channels_of_no_variance_are_counted():
    x = torch.randn(16, 3)
    x[:, 1] = 4
    result = bntools.recalibrate(nn.Sequential(nn.BatchNorm1d(3)).eval(), [x])
    assert result.report.layers[0].near_zero == 1


@pytest.mark.parametrize(
    "options",
    [{"max_batches": 0}, {"max_error": 0}, {"max_passes": 0}, {"tolerance": 0}, {"held_out": 1},
     {"layout": "nhwc"}, {"compare_samples": -1}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BNToolsError, match=f"with {next(iter(options))}="):
        Options(**options)


# Moments to keep


def two_layers():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def test_moments_of_parts_merge_to_those_of_the_whole():
    """Deep layers too: by="running" they do not depend on the batches."""
    model, given = two_layers().eval(), batches(4)
    whole = bntools.calibration_stats(model, [torch.cat(given)])
    first = bntools.calibration_stats(model, given[:1])
    rest = bntools.calibration_stats(model, given[1:])
    merged = first.merge(rest)
    assert merged.samples == whole.samples == 16
    for path, layer in whole.layers.items():
        other = merged.layers[path].moments
        assert layer.moments.count == other.count == 16 * 64
        assert torch.allclose(layer.moments.mean, other.mean, rtol=1e-6, atol=1e-7)
        assert torch.allclose(layer.moments.m2, other.m2, rtol=1e-6)
    by_batch = bntools.calibration_stats(model, given, by="batch")
    assert not torch.allclose(
        by_batch.layers["3"].moments.m2, whole.layers["3"].moments.m2, rtol=0.1
    )


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_moments_survive_a_file_to_the_bit(ending, tmp_path):
    stats = bntools.calibration_stats(two_layers().eval(), batches())
    path = tmp_path / f"moments{ending}"
    stats.save(path)
    found = bntools.read_stats(path)
    assert found.samples == stats.samples
    assert found.layers.keys() == stats.layers.keys()
    for name, layer in stats.layers.items():
        other = found.layers[name]
        assert (other.kind, other.eps) == (layer.kind, layer.eps)
        assert other.moments.count == layer.moments.count
        assert torch.equal(other.moments.mean, layer.moments.mean)
        assert torch.equal(other.moments.m2, layer.moments.m2)
    with pytest.raises(bntools.BNToolsError, match="it exists"):
        stats.save(path)
    stats.save(path, force=True)


def test_moments_compare_with_others_and_with_a_model():
    model = two_layers().eval()
    stats = bntools.calibration_stats(model, batches())
    assert [row.kl_max for row in stats.compare(stats)] == [0, 0]
    drifted = bntools.calibration_stats(model, [b + 5 for b in batches()])
    assert stats.compare(drifted)[0].kl_max > 0.1
    settled = bntools.recalibrate(model, batches(), method="pooled", passes="converge").model
    own = bntools.calibration_stats(settled, batches()).compare(settled)
    assert max(row.kl_max for row in own) < 1e-6


def test_moments_of_other_layers_do_not_merge():
    stats = bntools.calibration_stats(two_layers().eval(), batches())
    part = bntools.calibration_stats(two_layers().eval(), batches(), only="1")
    with pytest.raises(BNToolsError, match="only one of them has the layer '3'"):
        stats.merge(part)
    wide = bntools.calibration_stats(
        nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)).eval(), batches()
    )
    with pytest.raises(BNToolsError, match="1 has 4 channels in one and 3 in the other"):
        part.merge(wide)
    with pytest.raises(BNToolsError, match="Cannot compare 1: it has 4 channels"):
        part.compare(wide)


@pytest.mark.parametrize("name", ["none.json", "text.json", "text.safetensors", "stats.npz"])
def test_files_that_hold_no_moments_are_errors(name, tmp_path):
    if name.startswith("text"):
        (tmp_path / name).write_text('{"layers": 3}')
    with pytest.raises(BNToolsError, match=r"Cannot (read the|keep) moments"):
        bntools.read_stats(tmp_path / name)


def test_taking_moments_changes_nothing():
    model = Busy().train()
    before = state(model)
    bntools.calibration_stats(model, batches(size=64))
    assert same(state(model), before)
    twin = copy.deepcopy(model)
    assert same([b for _, b in twin.named_buffers()], [b for _, b in model.named_buffers()])
