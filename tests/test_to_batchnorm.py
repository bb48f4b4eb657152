"""Hand-written batch norms become nn.BatchNorm, found by what they do."""

from __future__ import annotations

import json

import pytest
import torch
from handwritten_models import CourseBatchNorm, Frozen, Functional, LayerScale, lenet
from test_affines import settled
from torch import nn

import bntools
from bntools.norms.handwritten import to_batch_norm_module
from bntools.report import Reason


def named(model: nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules()}


def same_outputs(a: nn.Module, b: nn.Module, x: torch.Tensor, limit: float) -> None:
    with torch.no_grad():
        truth, found = a.eval()(x), b.eval()(x)
    assert float((truth - found).norm() / truth.norm()) < limit


class ByHand(nn.Module):
    """A batch norm whose tensors have names that say nothing, and a rule that can be chosen."""

    def __init__(self, channels=4, *, eps=1e-3, weight=0.2, unbiased=True, offset=0.0):
        super().__init__()
        self.eps, self.w, self.unbiased, self.offset = eps, weight, unbiased, offset
        self.a = nn.Parameter(torch.zeros(channels))
        self.b = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("c", torch.randn(channels))
        self.register_buffer("d", torch.rand(channels) + 0.5)
        self.register_buffer("unused", torch.rand(channels))

    def forward(self, x):
        m, v = self.c, self.d
        axes = [0, *range(2, x.dim())]
        if self.training:
            m, v = x.mean(axes), x.var(axes, unbiased=False)
            with torch.no_grad():
                kept = x.var(axes, unbiased=self.unbiased)
                self.c.copy_((1 - self.w) * self.c + self.w * m)
                self.d.copy_((1 - self.w) * self.d + self.w * kept)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (self.b + self.offset) * (v + self.eps) ** -0.5
        return x * scale.view(shape) + (self.a - m * scale).view(shape)


def test_the_lenet_of_the_course_is_converted_with_equal_outputs():
    """Plain tensors, moving averages that weight the old value with 0.9, mode by the gradients."""
    model = settled(lenet()).float()
    x = torch.rand(4, 1, 28, 28)
    result = bntools.to_batchnorm(model, x)
    kinds = named(result.model)
    assert [kinds[p] for p in ("1", "5", "10", "13")] == ["BatchNorm2d"] * 2 + ["BatchNorm1d"] * 2
    same_outputs(model, result.model, x, 2e-6)
    for norm in result.report.converted:
        assert norm.tensors == {
            "mean": "moving_mean", "variance": "moving_var", "gamma": "gamma", "beta": "beta",
        }  # fmt: skip
        assert (norm.eps, norm.momentum, norm.unbiased) == (1e-5, 0.1, False)
        assert norm.mode_by == ("gradients",)
        assert norm.error < 1e-14
    assert any("by whether gradients are enabled" in said for said in result.report.warnings)
    assert any("biased variance" in said for said in result.report.warnings)
    assert result.report.check


def test_the_other_verbs_work_on_what_was_converted():
    """Freeze, recalibrate, replace and fold."""
    model = bntools.to_batchnorm(settled(lenet()).float(), torch.rand(2, 1, 28, 28)).model
    assert len(bntools.freeze(model).report.changed) == 4
    batches = [torch.rand(8, 1, 28, 28) for _ in range(3)]
    again = bntools.recalibrate(model, batches)
    assert not torch.equal(again.model[1].running_mean, model[1].running_mean)
    assert len(bntools.fold(model, torch.rand(2, 1, 28, 28)).report.folds) == 4
    assert bntools.replace(model, "groupnorm", example_inputs=torch.rand(2, 1, 28, 28)).model


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_batch_norm_is_found_by_behaviour_with_its_rule(rank, unbiased, offset):
    """Names, shapes and spelling say nothing; training shows momentum and variance."""
    model = nn.Sequential(nn.Flatten(0, 0), ByHand(unbiased=unbiased, offset=offset)).double()
    x = torch.rand(6, 4, *[5] * (rank - 2), dtype=torch.float64)
    result = bntools.to_batchnorm(model, x)
    (norm,) = result.report.converted
    assert norm.tensors == {"mean": "c", "variance": "d", "gamma": "b", "beta": "a"}
    assert (norm.eps, norm.momentum, norm.unbiased) == (1e-3, 0.2, unbiased)
    assert norm.mode_by == ("mode",)
    assert norm.becomes == f"BatchNorm{ {2: 1, 3: 1, 4: 2, 5: 3}[rank] }d"
    same_outputs(model, result.model, x, 1e-12)
    trained = [m.train()(x) for m in (model, result.model)]
    assert torch.allclose(*trained, rtol=1e-10, atol=1e-10)
    assert torch.allclose(model[1].c, result.model[1].running_mean, rtol=1e-10)
    if unbiased:
        assert torch.allclose(model[1].d, result.model[1].running_var, rtol=1e-10)


def test_what_never_uses_a_batch_becomes_a_frozen_batch_norm():
    """It does the same in training, too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4))
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    norm = result.model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert result.report.converted[0].frozen
    before = norm.running_mean.clone()
    x = torch.rand(4, 3, 8, 8)
    assert torch.allclose(model.train()(x), result.model.train()(x), atol=1e-5)
    assert torch.equal(norm.running_mean, before)
    assert isinstance(bntools.unfreeze(result.model).model[1], nn.BatchNorm2d)


def test_a_gamma_of_zero_hides_nothing():
    """The numbers that are there play no part."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ByHand())
    with torch.no_grad():
        model[1].b.zero_()
        model[1].d.zero_()
        model[1].c.zero_()
    (norm,) = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8)).report.converted
    assert norm.tensors["gamma"] == "b"


class Other(ByHand):
    """Formulas that look like a batch norm's."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        v = {
            "std": self.d,
            "eps outside": self.d.sqrt() + self.eps,
            "two gains": (self.d + self.eps).sqrt() / self.unused,
            "no mean": (self.d + self.eps).sqrt(),
        }[self.kind]
        mean = 0 if self.kind == "no mean" else self.c[:, None, None]
        return (x - mean) / v[:, None, None] * self.b[:, None, None] + self.a[:, None, None]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("std", "like a variance"), ("eps outside", "like a variance"),
     ("two gains", "both b and unused work like its gamma"), ("no mean", "like a mean")],
)  # fmt: skip
def test_what_is_no_batch_norm_is_left_alone_with_the_reason(kind, why):
    """A standard deviation that is kept, an eps outside of the root, a second gain, no mean."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Other(kind))
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    (decision,) = result.report.kept
    assert decision.reason is Reason.NOT_BATCH_NORM
    assert why in decision.detail
    assert named(result.model) == named(model)
    assert result.report.summary().endswith("the model is unchanged")


def test_parts_of_modules_other_axes_and_scales_are_left_alone():
    """Each with a reason of its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), Functional(4, 4), nn.Flatten(2), nn.Linear(16, 5), LayerScale(5)
    )
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    assert {d.path: d.reason for d in result.report.kept} == {
        "1 (batch_norm)": Reason.MORE_THAN_NORM, "4": Reason.NO_SUCH_FORM,
    }  # fmt: skip
    odd = nn.Sequential(nn.Linear(3, 4), ByHand(4)).eval()
    chosen = bntools.to_batchnorm(odd, torch.rand(2, 3), skip="1").report.kept
    assert [d.reason for d in chosen] == [Reason.SKIPPED]


def test_statistics_that_follow_no_rule_get_a_warning():
    """A momentum that shrinks is none; the default of PyTorch is taken, and said."""

    class Odd(ByHand):
        def forward(self, x):
            before = self.c.clone()
            out = super().forward(x)
            if self.training:
                self.c.copy_(before.sign() * 0.5)
            return out

    result = bntools.to_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), Odd()), torch.rand(2, 3, 8, 8))
    assert result.model[1].momentum == 0.1
    assert any("default, 0.1" in said for said in result.report.warnings)


def test_training_that_cannot_be_observed_is_said():
    """A module that raises in training mode."""

    class Raising(ByHand):
        def forward(self, x):
            if self.training:
                raise RuntimeError("not here")
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Raising())
    result = bntools.to_batchnorm(model, torch.rand(2, 3, 8, 8))
    assert len(result.report.converted) == 1
    assert any("did not run in training mode" in said for said in result.report.warnings)


def test_the_argument_is_left_as_it_was():
    """Plain tensors, buffers, modes and the random numbers."""
    model = settled(lenet()).float().train()
    held = [dict(m.__dict__) for m in model.modules()]
    numbers = [m.moving_var.clone() for m in model.modules() if isinstance(m, CourseBatchNorm)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    result = bntools.to_batchnorm(model, x)
    for module, before in zip(model.modules(), held, strict=True):
        assert all(before[k] is v for k, v in module.__dict__.items())
    after = [m.moving_var for m in model.modules() if isinstance(m, CourseBatchNorm)]
    assert all(map(torch.equal, numbers, after))
    assert model.training
    assert result.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_converted_model_comes_back_from_a_state_dict(tmp_path):
    """The recipe rebuilds the layers on a fresh model by hand."""
    model = settled(lenet()).float()
    result = bntools.to_batchnorm(model, torch.rand(2, 1, 28, 28))
    path = tmp_path / "lenet.safetensors"
    bntools.save(result, path)
    again = bntools.load(path, arch="handwritten_models:lenet")
    assert named(again) == named(result.model)
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), result.model.eval()(x))


def test_the_report_is_json():
    """Schema first, and a summary."""
    result = bntools.to_batchnorm(settled(lenet()).float(), torch.rand(2, 1, 28, 28))
    data = json.loads(json.dumps(result.to_dict()))
    assert next(iter(data)) == "schema"
    assert "converted 4 of 4 hand-written affines" in data["summary"]


@pytest.mark.parametrize(
    "options",
    [{}, {"dims": 9}, {"eps": -1.0}, {"eps": "x"}, {"momentum": 2.0}, {"mean": "no"},
     {"variance": 3}, {"mean": "b", "variance": None}, {"offset": "1"}, {"gamma": "wide"}],
)  # fmt: skip
def test_a_damaged_recipe_converts_nothing(options):
    """Recipes come from files that nobody trusts."""
    module = ByHand()
    module.wide = torch.rand(9)
    whole = {"dims": 2, "eps": 1e-5, "momentum": 0.1, "mean": "c", "variance": "d"}
    given = {**whole, **options} if options else {}
    with pytest.raises((TypeError, ValueError), match=r"recipe|no tensor|no mean"):
        to_batch_norm_module(module, given)
