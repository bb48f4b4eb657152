"""`plan_fold` and `fold` as a caller meets them: plans, patterns, recipes, rules, inputs."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from randomise import difference, outputs, randomise
from torch import Tensor, nn

import bntools
from bntools import registry
from bntools.errors import InputError, PlanError
from bntools.report import Action, Reason, Result

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with random statistics and affine parameters."""
    randomise(model, seed)
    return model.eval()


def block(ins: int = 3, outs: int = 4, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, **options), nn.BatchNorm2d(outs), nn.ReLU())


@pytest.fixture
def chain() -> nn.Module:
    """Three blocks: the norms are 0.1, 1.1 and 2.1."""
    return made(nn.Sequential(block(), block(4, 4, bias=False), block(4, 5)))


@pytest.fixture(autouse=True)
def _rules_are_forgotten(monkeypatch):
    for table in ("_NORMS", "_HOSTS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def reasons(answer: Any) -> dict[str, Reason | None]:
    decisions = answer.report.decisions if isinstance(answer, Result) else answer.decisions
    return {d.path: d.reason for d in decisions}


def decided(answer: Any) -> list[tuple[Any, ...]]:
    """What was decided, without the errors that a check has measured."""
    decisions = answer.report.decisions if isinstance(answer, Result) else answer.decisions
    return [(d.path, d.kind, d.action, d.hosts, d.reason, d.detail) for d in decisions]


def same(model: nn.Module, result: Result, x: Any = IMAGE, within: float = 1e-5) -> bool:
    return difference(outputs(result.model, x), outputs(model, x)) < within


# Plans


def test_plan_can_be_used_twice_and_gives_the_same_bits(chain):
    plan = bntools.plan_fold(chain, IMAGE)
    first, second = (bntools.fold(chain, plan=plan) for _ in range(2))
    assert decided(first) == decided(second) == decided(plan)
    assert first.model is not second.model
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other


def test_plan_of_an_equal_model_is_refused(chain):
    plan = bntools.plan_fold(chain, IMAGE)
    with pytest.raises(PlanError, match="another model"):
        bntools.fold(copy.deepcopy(chain), plan=plan)


def change_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model[1][0].weight.mul_(2)


def train_once(model: nn.Module) -> None:
    model.train()(IMAGE)
    model.eval()


def replace_norm(model: nn.Module) -> None:
    model[2][1] = nn.BatchNorm2d(5).eval()


def load_again(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [change_weight, train_once, replace_norm, load_again])
def test_plan_of_a_model_that_has_changed_since_is_refused(chain, change):
    plan = bntools.plan_fold(chain, IMAGE)
    change(chain)
    with pytest.raises(PlanError, match=r"has changed since\. Plan again"):
        bntools.fold(chain, plan=plan)
    assert bntools.fold(chain, IMAGE).report.check


def test_plan_that_was_not_made_here_is_refused(chain):
    plan = bntools.plan_fold(chain, IMAGE)
    with pytest.raises(PlanError, match="not made by plan_fold"):
        bntools.fold(chain, plan=bntools.Plan(plan.decisions))


def test_plan_is_followed_after_forwards_and_mode_changes(chain):
    plan = bntools.plan_fold(chain, IMAGE)
    chain(IMAGE)
    chain.requires_grad_(False)
    assert bntools.fold(chain, plan=plan).report.check


def test_plan_is_text_and_data(chain):
    plan = bntools.plan_fold(chain, IMAGE, skip="1.*")
    assert plan.summary() == "2 of 3 norm layers would fold"
    assert str(plan).splitlines()[-1] == plan.summary()
    assert [d["reason"] for d in plan.to_dict()["decisions"]] == [None, "skipped", None]
    assert plan.inputs == "2x3x8x8 float32"
    assert "compiled" not in plan.to_dict()


# Patterns


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({"only": "1.1"}, ["1.1"]),
        ({"only": ["0.*", "2.*"]}, ["0.1", "2.1"]),
        ({"only": "[01].?"}, ["0.1", "1.1"]),
        ({"skip": "*"}, []),
        ({"skip": ("0.1", "1.1")}, ["2.1"]),
        ({"only": ("*",), "skip": ()}, ["0.1", "1.1", "2.1"]),
        ({"only": ()}, []),
    ],
    ids=str,
)
def test_patterns_choose_by_path(chain, options, folds):
    plan = bntools.plan_fold(chain, IMAGE, **options)
    assert [d.path for d in plan.folds] == folds
    assert {d.reason for d in plan.kept} <= {Reason.SKIPPED}
    result = bntools.fold(chain, IMAGE, **options)
    assert decided(result) == decided(plan)
    assert same(chain, result)


@pytest.mark.parametrize("options", [{"only": "3.*"}, {"skip": "0"}, {"skip": ["0.1", "bn"]}])
@pytest.mark.parametrize("verb", [bntools.plan_fold, bntools.fold])
def test_pattern_that_matches_nothing_is_an_error_that_names_layers(chain, options, verb):
    with pytest.raises(PlanError, match=r"no norm layer.*0\.1, 1\.1, 2\.1"):
        verb(chain, IMAGE, **options)


def test_fold_of_nothing_leaves_the_model_unchanged(chain):
    result = bntools.fold(chain, IMAGE, skip="*")
    assert result.report.summary() == "folded 0 of 3 norm layers; the model is unchanged"
    assert result.report.check is None
    assert result.recipe.edits == ()
    assert result.model is not chain
    assert same(chain, result, within=1e-30)


# Results, recipes


def test_keys_of_the_result_are_those_of_a_model_without_norms(chain):
    result = bntools.fold(chain, IMAGE)
    wanted = [f"{n}.0.{part}" for n in range(3) for part in ("weight", "bias")]
    assert list(result.model.state_dict()) == wanted
    assert [str(m) for m in result.model[1]] == [
        "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1))",
        "Identity()",
        "ReLU()",
    ]


def test_recipe_lists_the_edits_and_rebuilds_the_architecture(chain):
    result = bntools.fold(chain, IMAGE)
    assert result.recipe.to_dict() == {
        "version": 1,
        "edits": [
            {"edit": "add-bias", "path": "1.0", "channels": 4},
            {"edit": "drop-norm", "path": "0.1"},
            {"edit": "drop-norm", "path": "1.1"},
            {"edit": "drop-norm", "path": "2.1"},
        ],
    }
    assert result.to_dict()["recipe"] == result.recipe.to_dict()


def test_folding_twice_chains_the_recipes(chain):
    first = bntools.fold(chain, IMAGE, only="1.*")
    second = bntools.fold(first.model, IMAGE)
    assert second.recipe.edits[: len(first.recipe.edits)] == first.recipe.edits
    assert [e.path for e in second.recipe.edits if e.kind == "drop-norm"] == ["1.1", "0.1", "2.1"]
    third = bntools.fold(second.model, IMAGE)
    assert third.recipe == second.recipe
    assert third.report.decisions == ()
    assert same(chain, third)


def test_recipes_chain_through_files(chain, tmp_path):
    first = bntools.fold(chain, IMAGE, only="0.*")
    bntools.save(first, tmp_path / "first.pt")
    again = bntools.load(tmp_path / "first.pt")
    second = bntools.fold(again, IMAGE)
    bntools.save(second, tmp_path / "second.pt")
    last = bntools.fold(bntools.load(tmp_path / "second.pt"), IMAGE)
    assert last.recipe == second.recipe
    assert [e.path for e in last.recipe.edits] == ["0.1", "1.0", "1.1", "2.1"]
    assert same(chain, last)


def test_grad_flags_stay_and_an_added_bias_has_that_of_its_weight(chain):
    chain[0].requires_grad_(False)
    model = bntools.fold(chain, IMAGE).model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: not name.startswith("0.") for name in flags}


def test_report_says_how_long_it_took_and_with_what(chain):
    report = bntools.fold(chain, IMAGE).report
    assert set(report.seconds) == {"plan", "fold", "check"}
    assert all(0 <= seconds < 60 for seconds in report.seconds.values())
    assert report.versions["torch"] == torch.__version__.partition("+")[0] or report.versions
    assert report.versions["python"] == platform.python_version()
    assert {"bntools", "torch", "torchvision"} <= set(report.versions)
    assert report.verb == "fold"


# The check


def test_seed_and_inputs_of_the_check_are_in_the_certificate(chain):
    for seed in (0, 17):
        check = bntools.fold(chain, IMAGE, seed=seed).report.check
        assert check
        assert check.seed == seed
        assert check.inputs == "2x3x8x8 float32"
        assert check.float64
        assert check.float64.worst.error < 1e-12
    assert bntools.fold(chain, IMAGE).to_dict()["check"]["seed"] == 0


def test_other_seeds_check_on_other_inputs(chain):
    errors = {bntools.fold(chain, IMAGE, seed=s).report.check.native.worst.error for s in range(3)}
    assert len(errors) > 1


class Scaling(nn.Module):
    """A norm of its own kind; `lie` is what its rule adds to the shift."""

    def __init__(self, channels: int, lie: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-1, 2, channels))
        self.lie = lie

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.reshape(-1, 1, 1) + 0.25


def scaling_affine(m: Any) -> bntools.Affine:
    return bntools.Affine(m.gain, torch.full_like(m.gain, 0.25 + m.lie))


def scaled(*lies: float) -> nn.Module:
    """A chain of convolutions, each with such a norm."""
    parts = [nn.Sequential(nn.Conv2d(3, 3, 1), Scaling(3, lie), nn.Tanh()) for lie in lies]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("liars", [(0,), (5,), (1, 4), (0, 2, 3), (0, 1, 2, 3, 4, 5)], ids=str)
def test_every_culprit_is_rolled_back_and_nobody_else(liars):
    bntools.register_norm(Scaling, affine=scaling_affine)
    model = scaled(*(0.01 * (n in liars) for n in range(6)))
    assert len(bntools.plan_fold(model, IMAGE).folds) == 6
    result = bntools.fold(model, IMAGE)
    wanted = {f"{n}.1": Reason.CHECK_FAILED if n in liars else None for n in range(6)}
    assert reasons(result) == wanted
    assert sorted(result.report.check.rolled_back) == [f"{n}.1" for n in liars]
    assert result.report.check
    assert [isinstance(part[1], Scaling) for part in result.model] == [n in liars for n in range(6)]
    assert same(model, result)


def test_rolled_back_fold_says_by_how_much_it_was_off():
    bntools.register_norm(Scaling, affine=scaling_affine)
    (decision,) = bntools.fold(scaled(0.01), IMAGE).report.decisions
    assert decision.detail.startswith("undone: output is off by ")
    assert "limit" in decision.detail


class CastsItsWeight(nn.Module):
    """Works in float32 whatever its weights are, as mixed-precision code does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        y = nn.functional.conv2d(x.float(), conv.weight.float(), conv.bias.float())
        return self.norm(y.to(conv.weight.dtype))


def test_right_fold_of_a_model_that_rounds_on_its_way_is_not_rolled_back():
    model = made(CastsItsWeight())
    result = bntools.fold(model, IMAGE)
    assert reasons(result)["norm"] is not Reason.CHECK_FAILED
    assert same(model, result)


# Norms of one's own


def test_registered_norm_folds_and_its_remainder_stays():
    class Activated(Scaling):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * self.gain.reshape(-1, 1, 1) + 0.25)

    bntools.register_norm(Activated, affine=scaling_affine, remainder=lambda _: nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Activated(3), nn.Conv2d(3, 2, 1)).eval()
    result = bntools.fold(model, IMAGE)
    assert reasons(result) == {"1": None}
    assert [type(part) for part in result.model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert same(model, result)


def test_remainder_that_is_not_all_is_rolled_back():
    class Activated(Scaling):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * self.gain.reshape(-1, 1, 1) + 0.25)

    bntools.register_norm(Activated, affine=scaling_affine)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)).eval()
    result = bntools.fold(model, IMAGE)
    assert reasons(result) == {"1": Reason.CHECK_FAILED}
    assert same(model, result, within=1e-30)


def test_registered_norm_may_refuse_with_a_reason():
    bntools.register_norm(Scaling, affine=lambda _: Reason.NO_STATISTICS)
    assert reasons(bntools.plan_fold(scaled(0.0), IMAGE)) == {"0.1": Reason.NO_STATISTICS}


def test_norm_of_a_class_that_is_not_registered_is_an_affine():
    plan = bntools.plan_fold(scaled(0.0, 0.0), IMAGE)
    assert [(d.path, d.affine) for d in plan.decisions] == [("0.1", True), ("1.1", True)]


def test_norm_can_be_registered_by_its_dotted_name():
    bntools.register_norm(f"{Scaling.__module__}.Scaling", affine=scaling_affine)
    assert reasons(bntools.fold(scaled(0.0), IMAGE)) == {"0.1": None}


def test_norm_over_the_last_axis_folds_into_a_linear_layer():
    class Last(Scaling):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + 0.25

    bntools.register_norm(Last, affine=scaling_affine, channel_dim=-1)
    model, x = nn.Sequential(nn.Linear(3, 5), Last(5)).eval(), torch.randn(2, 7, 3)
    result = bntools.fold(model, x)
    assert reasons(result) == {"1": None}
    assert same(model, result, x)


# Hosts of one's own


class Product(nn.Module):
    """`x @ W * 3 + c`: no layer that bntools knows."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(ins, outs) / ins)
        self.register_buffer("offset", torch.randn(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix * 3 + self.offset


def absorb(m: Any, affine: bntools.Affine) -> dict[str, Tensor]:
    offset = m.offset.double() * affine.scale + affine.shift
    return {"matrix": m.matrix.double() * affine.scale, "offset": offset}


def hosted() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(Product(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    return made(model), torch.randn(5, 4)


def test_host_that_is_not_registered_is_kept():
    model, x = hosted()
    assert reasons(bntools.plan_fold(model, x))["1"] is Reason.BIAS_NOT_USED


def test_registered_host_absorbs_a_norm():
    bntools.register_host(Product, after=absorb)
    model, x = hosted()
    before = model[0].matrix.clone()
    plan = bntools.plan_fold(model, x)
    assert [(d.path, d.hosts) for d in plan.folds] == [("1", ("0",))]
    result = bntools.fold(model, x)
    assert result.report.check
    assert reasons(result) == {"1": None}
    assert isinstance(result.model[0].matrix, nn.Parameter)
    assert "offset" in dict(result.model[0].named_buffers())
    assert {t.dtype for t in result.model.state_dict().values()} == {torch.float32}
    assert torch.equal(model[0].matrix, before)
    assert same(model, result, x)


def test_registered_host_absorbs_two_norms_one_after_the_other():
    bntools.register_host(Product, after=absorb)
    model = made(nn.Sequential(Product(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)), 3)
    x = torch.randn(5, 4)
    result = bntools.fold(model, x)
    assert reasons(result) == {"1": None, "2": None}
    assert same(model, result, x)


def test_host_over_the_last_axis_absorbs_a_norm():
    class Last(Scaling):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + 0.25

    bntools.register_host(Product, after=absorb, channel_dim=-1)
    bntools.register_norm(Last, affine=scaling_affine, channel_dim=-1)
    model, x = nn.Sequential(Product(3, 5), Last(5)).eval(), torch.randn(2, 7, 3)
    result = bntools.fold(model, x)
    assert reasons(result) == {"1": None}
    assert same(model, result, x)


def test_host_that_refuses_is_kept_for_its_own_reason():
    def refuse(module: Any, _: bntools.Affine) -> Any:
        return Reason.FIXED_WEIGHT if module.matrix.shape[1] == 6 else absorb(module, _)

    bntools.register_host(Product, after=refuse)
    model, x = hosted()
    result = bntools.fold(model, x)
    assert reasons(result) == {"1": Reason.FIXED_WEIGHT}
    assert result.report.decisions[0].action is Action.KEEP
    assert same(model, result, x, within=1e-30)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, a: {"matrix": m.matrix.double() * a.scale},
        lambda m, a: absorb(m, a) | {"offset": m.offset.double() + a.shift},
        lambda m, a: absorb(m, a) | {"offset": absorb(m, a)["offset"].float() + 1e-3},
        lambda m, a: {},
        lambda m, a: absorb(m, a) | {"matrix": m.matrix[:2] * a.scale},
        lambda m, a: absorb(m, a) | {"matrix": absorb(m, a)["matrix"] * float("nan")},
    ],
    ids=["no offset", "wrong offset", "a little off", "nothing", "wrong shape", "nan"],
)
def test_host_with_wrong_maths_is_rolled_back(wrong):
    bntools.register_host(Product, after=wrong)
    model, x = hosted()
    model = nn.Sequential(*model, nn.BatchNorm1d(2)).eval()
    result = bntools.fold(model, x)
    assert reasons(result) == {"1": Reason.CHECK_FAILED, "4": None}
    assert same(model, result, x)


def test_host_used_twice_before_different_norms_is_kept():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = Product(4, 4)
            self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.host(self.first(self.host(x))))

    bntools.register_host(Product, after=absorb)
    found = reasons(bntools.plan_fold(made(Twice()), torch.randn(5, 4)))
    assert found == {"first": Reason.HOST_SHARED, "second": Reason.HOST_SHARED}


# Inputs that are inferred


class SpaceToDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(nn.functional.pixel_unshuffle(x, 2))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = block(), block()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x) + self.right(y)


def lenet(size: int) -> nn.Module:
    side = (size - 4) // 2
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * side * side, 10), nn.BatchNorm1d(10),
    )  # fmt: skip


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(100, 8, 4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.BatchNorm2d(3),
    )  # fmt: skip


def conv(rank: int, channels: int) -> nn.Module:
    layers = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    return nn.Sequential(layers[0](channels, 4, 3), layers[1](4))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.conv = conv(1, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.conv(self.embedding(ids).mT)


INFERRED: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "conv1d": (lambda: conv(1, 5), "1x5x256 float32", 1),
    "grey": (lambda: conv(2, 1), "1x1x64x64 float32", 1),
    "colour": (lambda: conv(2, 3), "1x3x64x64 float32", 1),
    "four channels": (lambda: conv(2, 4), "1x4x64x64 float32", 1),
    "conv3d": (lambda: conv(3, 3), "1x3x8x32x32 float32", 1),
    "generator": (generator, "1x100x1x1 float32", 2),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
        "2x7 float32",
        1,
    ),
    "embedding": (Words, "1x16 int64", 1),
    "two inputs": (Two, "1x3x64x64 float32, 1x3x64x64 float32", 2),
    "lenet 28": (lambda: lenet(28), "1x1x28x28 float32", 2),
    "lenet 32": (lambda: lenet(32), "1x1x32x32 float32", 2),
    "space to depth": (SpaceToDepth, "1x3x64x64 float32", 1),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), *conv(2, 3)), "1x3x64x64 float32", 2),
    "half": (lambda: conv(2, 3).bfloat16(), "1x3x64x64 bfloat16", 1),
}


@pytest.mark.parametrize("name", INFERRED)
def test_inputs_are_inferred_from_the_first_layers(name):
    build, inputs, folds = INFERRED[name]
    result = bntools.fold(made(build()))
    assert result.report.inputs == f"{inputs} (inferred)"
    assert len(result.report.folds) == folds
    assert result.report.check


class Listing(nn.Module):
    """Takes a list of images, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        if not isinstance(images, list):
            raise TypeError("give a list")
        return [self.body(image[None]) for image in images]


def test_list_of_images_is_inferred_where_the_model_wants_one():
    result = bntools.fold(made(Listing()))
    assert result.report.inputs == "[3x64x64 float32] (inferred)"
    assert reasons(result) == {"body.1": None}


def test_detection_model_is_planned_without_inputs_and_with_a_list():
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large
    model = made(detector(weights=None, weights_backbone=None, num_classes=2))
    plan = bntools.plan_fold(model)
    assert "3x64x64 float32" in plan.inputs
    assert len(plan.folds) == len(plan.decisions) > 50
    given = bntools.plan_fold(model, [torch.rand(3, 64, 48)])
    assert given.inputs == "[3x64x48 float32]"
    assert decided(given) == decided(plan)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Identity()], ids=["relu", "none"])
def test_model_without_layers_needs_no_inputs(model):
    result = bntools.fold(model.eval())
    assert result.report.summary() == "the model has no norm layer to fold"
    assert result.model is not model


def test_inputs_that_cannot_be_inferred_are_an_error_with_the_next_step():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block()

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == (37, 41), "an odd size"
            return self.body(x)

    model = made(Picky())
    with pytest.raises(InputError, match=r"none of the shapes tried.*odd size.*--input-shape"):
        bntools.fold(model)
    assert bntools.fold(model, torch.randn(1, 3, 37, 41)).report.check


def test_registered_norm_without_any_known_layer_needs_inputs():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host, self.norm = Product(4, 3), Scaling(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.host(x)[..., None, None])

    bntools.register_norm(Scaling, affine=scaling_affine)
    with pytest.raises(InputError, match="no conv, linear, norm or embedding layer"):
        bntools.plan_fold(Weighted().eval())


# Inputs that are given


@pytest.mark.parametrize(
    "inputs",
    [IMAGE, (IMAGE,), {"x": IMAGE}, (IMAGE, 2.0), {"x": IMAGE, "factor": 2.0}],
    ids=["tensor", "tuple", "dict", "tuple with number", "dict with number"],
)
def test_inputs_are_a_tensor_positional_or_keyword_arguments(inputs):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block()

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return self.body(x) * factor

    result = bntools.fold(made(Scaled()), inputs)
    assert reasons(result) == {"body.1": None}
    assert result.report.check


def test_list_is_one_argument_that_is_a_list():
    result = bntools.fold(made(Listing()), [IMAGE[0], IMAGE[1]])
    assert reasons(result) == {"body.1": None}
    assert result.report.inputs == "[3x8x8 float32, 3x8x8 float32]"


@pytest.mark.parametrize("inputs", ["an image", 5, {1, 2}], ids=str)
def test_anything_else_is_an_error(chain, inputs):
    with pytest.raises(InputError, match="Cannot use example inputs of type"):
        bntools.fold(chain, inputs)


def test_inputs_that_do_not_fit_are_an_error_that_says_which(chain):
    with pytest.raises(InputError, match=r"Cannot run the model on 2x5x8x8 float32: RuntimeError"):
        bntools.fold(chain, torch.zeros(2, 5, 8, 8))


@pytest.mark.parametrize("model", [None, "resnet18", nn.Conv2d], ids=str)
def test_what_is_no_module_is_an_error(model):
    with pytest.raises(PlanError, match=r"give an nn\.Module"):
        bntools.fold(model, IMAGE)


# Wrappers


def test_data_parallel_is_unwrapped(chain):
    result = bntools.fold(nn.DataParallel(chain), IMAGE)
    assert type(result.model) is nn.Sequential
    assert list(reasons(result)) == ["0.1", "1.1", "2.1"]
    assert same(chain, result)


@pytest.mark.slow
def test_compiled_model_is_unwrapped(chain):
    result = bntools.fold(torch.compile(nn.DataParallel(chain), backend="eager"), IMAGE)
    assert type(result.model) is nn.Sequential
    assert list(reasons(result)) == ["0.1", "1.1", "2.1"]
    assert same(chain, result)


def test_plan_of_a_wrapped_model_is_one_of_the_model_inside(chain):
    plan = bntools.plan_fold(nn.DataParallel(chain), IMAGE)
    assert bntools.fold(chain, plan=plan).report.check


# Names


def test_every_public_name_is_there_and_listed():
    assert sorted(bntools.__all__) == bntools.__all__ == sorted(bntools._HOMES)
    assert set(bntools.__all__) <= set(dir(bntools))
    for name in bntools.__all__:
        assert getattr(bntools, name).__name__ == name
        assert getattr(bntools, name).__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'bntools' has no attribute 'fould'"):
        _ = bntools.fould
    assert not hasattr(bntools, "nonsense")


def test_names_are_loaded_when_they_are_first_used():
    code = (
        "import sys, bntools; dir(bntools); bntools.Reason, bntools.BNToolsError;"
        "assert 'torch' not in sys.modules; assert 'fold' not in vars(bntools);"
        "bntools.register_norm; assert 'torch' in sys.modules;"
        "assert 'register_norm' in vars(bntools)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
