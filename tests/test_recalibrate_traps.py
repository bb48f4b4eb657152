"""The recalibration traps of the field: what peers get wrong is right here."""

from __future__ import annotations

import copy

import pytest
import recalibration_peers as peers
import torch
from recalibration_peers import one_norm, with_fvcore, with_update_bn
from torch import nn
from torch.optim.swa_utils import update_bn

import bntools
from bntools import RecalibrationOptions as Options
from bntools.errors import CalibrationError

# The table of the README


RIGHT = {
    "small_last_batch": {"fvcore", "bntools"},
    "sorted_by_class": {"fvcore", "bntools"},
    "large_mean": {"update_bn", "bntools"},
    "dropout_before": {"fvcore", "bntools"},
    "half_precision": {"update_bn", "bntools"},
    "nan_pixel": {"bntools"},
}


@pytest.mark.parametrize("trap", peers.TRAPS, ids=lambda trap: trap.__name__)
def test_the_peers_get_right_what_the_readme_says(trap):
    """Within 2 % of the truth, or not; bntools always."""
    found = peers.figures(trap)
    truth = found.pop("truth")
    right = {tool for tool, value in found.items() if abs(value - truth) <= 0.02 * abs(truth)}
    assert right == RIGHT[trap.__name__]


# Small last batches


def test_a_small_last_batch_does_not_count_like_a_full_one():
    """Mean 10.3 for a true 0.6, where 32 images near 0 are followed by one at 20."""
    x = torch.cat([torch.randn(32, 1, 8) * 0.1, torch.full((1, 1, 8), 20.6)])
    batches, true = x.split(32), float(x.mean())
    assert float(with_update_bn(one_norm(), batches)[0].running_mean) == pytest.approx(
        10.3, abs=0.1
    )
    found = bntools.recalibrate(one_norm(), batches, method="pooled").model
    assert true == pytest.approx(0.62, abs=0.02)
    assert float(found[0].running_mean) == pytest.approx(true, rel=1e-6)


def test_one_value_per_channel_names_the_batch():
    """What PyTorch refuses without saying where; pooled counts it as what it is."""
    x = torch.randn(9, 3)
    with pytest.raises(CalibrationError, match=r"variance of batch 3 at 0: it has one value"):
        bntools.recalibrate(one_norm(3), x.split(4))
    found = bntools.recalibrate(one_norm(3), x.split(4), method="pooled")
    assert torch.allclose(found.model[0].running_var, x.var(0, correction=0), rtol=1e-5)
    assert found.report.layers[0].one_value == 1
    assert "one value per channel" in found.report.warnings[0]


# Sorted loaders


def test_the_variance_between_batches_is_kept():
    """1.00 for a true 5, where the loader is sorted by class."""
    classes = [torch.randn(64, 1, 16) + 4 * index for index in (0, 1)]
    rows = torch.cat(classes).flatten().double()
    true = float(rows.var(correction=0))
    assert true == pytest.approx(5, abs=0.2)
    assert float(with_update_bn(one_norm(), classes)[0].running_var) == pytest.approx(1, abs=0.1)
    found = bntools.recalibrate(one_norm(), classes, method="pooled").model
    assert float(found[0].running_var) == pytest.approx(true, rel=1e-6)


# Precision


def test_a_mean_of_100_leaves_no_negative_variance():
    """The difference of squares of fvcore in float32 gives them at a deviation of 0.1."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    peer = with_fvcore(one_norm(64), x.split(64))[0].running_var
    assert (peer <= 0).any()
    true = x.double().var(0, correction=0)
    found = bntools.recalibrate(one_norm(64), x.split(64), method="pooled").model[0].running_var
    assert ((found.double() / true - 1).abs() < 1e-6).all()


def test_half_precision_does_not_overflow():
    """update_bn's float16 statistics are what float16 can average; these are cast once."""
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(4096, 4) * 2 + 30).to(dtype)
        found = bntools.recalibrate(copy.deepcopy(model).to(dtype), x.split(64), method="pooled")
        rows = x.double()
        eps = torch.finfo(dtype).eps
        norm = found.model[0]
        assert ((norm.running_mean.double() / rows.mean(0) - 1).abs() <= eps).all()
        assert ((norm.running_var.double() / rows.var(0, correction=0) - 1).abs() <= eps).all()


# Modes


class Shaky(nn.Module):
    """Dropout before a norm, and a norm that its owner froze."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.fixed = nn.Dropout(0.5), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.fixed(self.norm(self.drop(x)))


def test_dropout_is_off_and_nothing_else_is_in_training_mode():
    x = torch.randn(512, 3) + 2
    model = Shaky().eval()
    peer = with_update_bn(model, x.split(64)).norm.running_var
    assert (peer / x.var(0) > 3).all(), "dropout doubles the variance, and more"
    found = bntools.recalibrate(model, x.split(64), method="pooled").model
    assert torch.allclose(found.norm.running_var, x.var(0, correction=0), rtol=1e-5)


def test_flags_come_back_module_by_module():
    """update_bn leaves every module in the mode of the root."""
    model = Shaky().train()
    model.fixed.eval()
    assert with_update_bn(model, torch.randn(8, 3).split(4)).fixed.training
    found = bntools.recalibrate(model, torch.randn(8, 3).split(4), skip="fixed").model
    flags = [(m.training, type(m)) for m in found.modules()]
    assert flags == [(m.training, type(m)) for m in model.modules()]


def broken(batches):
    yield from batches
    raise OSError("no more disk")


def test_a_loader_that_raises_leaves_momentum_and_statistics():
    model = one_norm(3)
    model[0].running_mean.fill_(7)
    peer = copy.deepcopy(model)
    with pytest.raises(OSError, match="no more disk"):
        update_bn(broken(torch.randn(8, 3).split(4)), peer)
    assert peer[0].momentum is None
    with pytest.raises(CalibrationError, match="Cannot read batch 3: OSError: no more disk"):
        bntools.recalibrate(
            model, broken(torch.randn(8, 3).split(4)), options=Options(inplace=True)
        )
    assert model[0].momentum == 0.1
    assert model[0].running_mean.tolist() == [7, 7, 7]


# Bad pixels


def test_one_nan_pixel_does_not_poison_a_channel():
    x = torch.randn(40, 2, 3)
    x[13, 1, 2] = float("nan")
    assert with_update_bn(one_norm(2), x.split(8))[0].running_mean.isnan().tolist() == [False, True]
    with pytest.raises(
        CalibrationError, match="Cannot use batch 2: what 0 sees in it is not finite"
    ):
        bntools.recalibrate(one_norm(2), x.split(8))
    for method in ("cumulative", "pooled", "ema"):
        found = bntools.recalibrate(
            one_norm(2), x.split(8), method=method, options=Options(skip_nonfinite=True)
        )
        good = bntools.recalibrate(
            one_norm(2), [b for b in x.split(8) if b.isfinite().all()], method=method
        )
        assert torch.equal(found.model[0].running_var, good.model[0].running_var)
        assert found.report.bad_batches == ("batch 2 (at 0)",)
        assert found.report.samples == 32


def test_nothing_but_bad_batches_is_an_error():
    x = torch.full((8, 2), float("inf"))
    with pytest.raises(CalibrationError, match="no batch to take statistics from but non-finite"):
        bntools.recalibrate(one_norm(2), x.split(4), options=Options(skip_nonfinite=True))


def test_a_model_whose_statistics_are_nan_is_mended():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model[0].running_var[1] = float("nan")
    for method in ("cumulative", "pooled"):
        found = bntools.recalibrate(model, torch.randn(16, 2).split(8), method=method).model
        assert all(b.isfinite().all() for b in found.buffers())


# Order


def test_ema_depends_on_the_order_and_says_when_it_never_gets_there():
    """Ten batches at momentum 0.1 leave a third of the old statistics."""
    model = one_norm(2)
    x = torch.randn(80, 2) * 3 + 5
    result = bntools.recalibrate(model, x.split(8), method="ema")
    assert float(result.model[0].running_mean[0]) == pytest.approx(5 * 0.65, abs=1)
    assert "after 10 batches the old statistics still weigh 35%" in result.report.warnings[0]
    ordered = bntools.recalibrate(model, x.sort(0).values.split(8), method="ema").model
    assert not torch.allclose(ordered[0].running_mean, result.model[0].running_mean, rtol=0.1)
    pooled = [
        bntools.recalibrate(model, y.split(8), method="pooled").model[0].running_var
        for y in (x, x.sort(0).values)
    ]
    assert torch.allclose(*pooled, rtol=1e-6)


# Gates: re-estimation can hurt


def judged(model, batches, **arguments):
    """The true mean is 0; the better the model knows it, the higher the score."""
    return bntools.recalibrate(
        model, batches, evaluate=lambda m: -float(m[0].running_mean.abs().max()), **arguments
    )


def test_statistics_that_make_it_worse_are_not_kept():
    model, wrong = one_norm(2), [torch.randn(64, 2) + 5]
    result = judged(model, wrong)
    assert not result.report.accepted
    assert result.report.score_after < result.report.score_before == 0
    assert torch.equal(result.model[0].running_mean, model[0].running_mean)
    assert "worse, the old statistics are kept" in result.report.summary()
    forced = judged(model, wrong, options=Options(gate=False))
    assert forced.report.accepted
    assert float(forced.model[0].running_mean.min()) > 4
    in_place = copy.deepcopy(model)
    judged(in_place, wrong, options=Options(inplace=True))
    assert torch.equal(in_place[0].running_mean, model[0].running_mean)
    assert in_place[0].num_batches_tracked == 0


def test_the_best_mixture_is_found_and_the_curve_is_reported():
    """Old statistics off by -1 and new ones by +3: a quarter of the new is best."""
    model = one_norm(2)
    model[0].running_mean.fill_(-1)
    x = torch.randn(40, 2)
    x = x - x.mean(0) + 3
    result = judged(model, x.split(20), method="pooled", prior="auto")
    assert result.report.accepted
    assert [p.weight for p in result.report.curve] == [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]
    assert max(result.report.curve, key=lambda p: p.score).weight == 0.25
    assert float(result.model[0].running_mean.abs().max()) < 1e-6
    assert result.report.prior == pytest.approx(120)
    same = bntools.recalibrate(model, x.split(20), method="pooled", prior=120).model
    assert torch.allclose(same[0].running_var, result.model[0].running_var)


def test_where_the_old_statistics_are_best_they_stay():
    result = judged(one_norm(2), [torch.randn(64, 2) + 5], prior="auto")
    assert result.report.accepted
    assert result.model[0].running_mean.abs().max() == 0
    assert result.report.to_dict()["prior"] is None


def test_a_score_may_ask_for_batches_that_are_held_out():
    """Every fourth; none of them is in the statistics."""
    x = torch.arange(24.0)[:, None].repeat(1, 2)
    asked = []

    def evaluate(model, batches):
        asked.append([float(batch[0, 0]) for batch in batches])
        return 0.0

    result = bntools.recalibrate(one_norm(2), x.split(3), evaluate=evaluate, method="pooled")
    assert asked == [[9.0, 21.0]] * 2
    used = torch.cat([batch for i, batch in enumerate(x.split(3), 1) if i % 4])
    assert torch.allclose(result.model[0].running_mean, used.mean(0))
    assert result.report.samples == 18


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda model: "good", "evaluate returned a str"),
        (lambda model: float("nan"), "evaluate returned NaN"),
        (lambda model: None, "evaluate returned a NoneType"),
    ],
)
def test_a_score_that_is_no_number_is_an_error(score, message):
    with pytest.raises(bntools.BNToolsError, match=message):
        bntools.recalibrate(one_norm(2), [torch.randn(8, 2)], evaluate=score)


def test_without_labels_the_report_says_that_it_is_no_proof():
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    result = bntools.recalibrate(model, (torch.randn(64, 4) * 9).split(32))
    seen = result.report.comparison
    assert seen.samples == 8
    assert 0 <= seen.agreement <= 1
    assert seen.confidence_after < seen.confidence_before
    assert seen.entropy_after > seen.entropy_before
    assert "(no labels: this is no proof)" in str(result)
    assert bntools.recalibrate(one_norm(2), [torch.randn(8, 2)[:, :, None]]).report.comparison
