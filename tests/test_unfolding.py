"""Unfolding: what a fold has kept comes back to the bit, through files and other surgeries."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import difference, outputs, randomise, settle
from timm.models.byobnet import RepVggBlock
from torch import nn

import bntools
from bntools.errors import LoadError, SaveError, SurgeryError
from bntools.originals import Originals, originals_of
from bntools.recipe import Recipe, recipe_of
from bntools.report import UnfoldReport

SAMPLES = Path(__file__).parent.parent / "samples"
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """A model with statistics and affine parameters that show mistakes."""
    randomise(model)
    settle(model, X)
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
    )


@pytest.fixture
def net() -> nn.Module:
    return trained(small())


def kept(model: nn.Module, **options: object) -> bntools.Result:
    return bntools.fold(model, X, keep_originals=True, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same classes at the same paths, and the same bits."""
    kinds = [[(p, type(m)) for p, m in nn.Module.named_modules(model)] for model in (a, b)]
    one, other = a.state_dict(), b.state_dict()
    return (
        kinds[0] == kinds[1]
        and list(one) == list(other)
        and all(torch.equal(t, other[k]) and t.dtype == other[k].dtype for k, t in one.items())
    )


# ---- exactness ----------------------------------------------------------------------------------


def test_what_was_folded_comes_back_to_the_bit(net):
    folded = kept(net)
    assert len(folded.report.folds) == 3
    result = bntools.unfold(folded.model)
    assert same(result.model, net)
    assert torch.equal(result.model(X), net(X))
    assert recipe_of(result.model) == result.recipe == Recipe()
    assert originals_of(result.model) is None
    assert isinstance(result.report, UnfoldReport)
    assert [d.path for d in result.report.decisions] == ["0.1", "1.1", "2.1"]
    assert result.report.removed == ("0.0.bias",)


ARCHITECTURES = [
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "timm:resnet10t",
    "timm:mobilenetv3_small_050",
    pytest.param("torchvision:resnet18", marks=pytest.mark.slow),
    pytest.param("timm:repvgg_a0", marks=pytest.mark.slow),
    pytest.param("timm:efficientnet_b0", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_networks_come_back_to_the_bit(name):
    """Among them layers of BatchNorm and activation in one, and branches that are summed up."""
    torch.manual_seed(0)
    net = trained(bntools.load(name))
    folded = kept(net)
    assert folded.report.folds
    assert same(bntools.unfold(folded.model).model, net)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU()),
            {},
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
            {"pad_forward": True},
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, bias=False)),
            {"merge_linear": True},
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), RepVggBlock(8, 8)),
            {"merge_branches": True},
        ),
    ],
    ids=["forward", "pad forward", "merge linear", "merge branches"],
)
def test_every_kind_of_fold_comes_back_to_the_bit(model, options):
    torch.manual_seed(0)
    net = trained(model())
    folded = kept(net, **options)
    if not folded.recipe.edits:
        pytest.fail(f"nothing was folded: {folded.report}")
    assert same(bntools.unfold(folded.model).model, net)


def test_a_scale_of_zero_comes_back(net):
    """Its channel has only zeros after the fold: no arithmetic could bring it back."""
    with torch.no_grad():
        net[0][1].weight[2] = 0.0
    folded = kept(net)
    assert not folded.model[0][0].weight[2].any()
    assert same(bntools.unfold(folded.model).model, net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_comes_back_to_the_bit(dtype, net):
    exact = copy.deepcopy(net).to(dtype)
    folded = bntools.fold(exact, X.to(dtype), keep_originals=True)
    assert same(bntools.unfold(folded.model).model, exact)


def test_recalibrating_through_an_unfold_is_recalibrating_the_original(net):
    """In float64, and to the bit: the same layers see the same numbers."""
    net = net.double()
    batches = [torch.randn(8, 3, 32, 32, dtype=torch.float64) * 3 + 1 for _ in range(3)]
    direct = bntools.recalibrate(net, batches).model
    through = bntools.unfold(bntools.fold(net, X.double(), keep_originals=True).model).model
    assert same(bntools.recalibrate(through, batches).model, direct)
    again = bntools.fold(through, X.double()).model
    assert difference(outputs(again, X.double()), outputs(net, X.double())) < 1e-12


def test_recalibrating_the_sample_through_an_unfold_is_recalibrating_it(tmp_path):
    """The network of the samples and its images, through files and the command line."""
    sample, digits = str(SAMPLES / "digits_cnn.pt"), str(SAMPLES / "digits")
    folded, unfolded, through, direct = (str(tmp_path / f"{name}.pt") for name in "abcd")
    for run in (
        ["fold", sample, "--keep-originals", "-o", folded],
        ["unfold", folded, "-o", unfolded],
        ["recalibrate", unfolded, "--data", digits, "--grayscale", "-o", through],
        ["recalibrate", sample, "--data", digits, "--grayscale", "-o", direct],
    ):
        done = CliRunner().invoke(program, run)
        assert done.exit_code == 0, done.output
    assert same(bntools.load(unfolded), bntools.load(sample))
    assert same(bntools.load(through), bntools.load(direct))
    assert not same(bntools.load(through), bntools.load(sample))


# ---- what travels along -------------------------------------------------------------------------


def test_originals_are_no_part_of_the_model(net):
    """No parameter, no buffer, no submodule: what runs and what is counted is the folded model."""
    plain, folded = bntools.fold(net, X).model, kept(net).model
    assert list(plain.state_dict()) == list(folded.state_dict())
    assert [p for p, _ in folded.named_modules()] == [p for p, _ in plain.named_modules()]
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in plain.parameters())


def test_their_size_is_reported(net):
    """The two weights with bias, the one without, and five tensors of each norm."""
    report = kept(net).report
    expected = sum(t.nbytes for t in net.state_dict().values())
    assert report.originals_bytes == expected
    assert f"the originals travel along: {expected / 2**20:.1f} MiB" in str(report)
    assert report.to_dict()["originals_bytes"] == expected
    assert bntools.fold(net, X).report.originals_bytes == 0


def test_the_argument_is_as_it_was(net):
    """Neither the fold nor the unfold shares a tensor with what it was given."""
    before = copy.deepcopy(net.state_dict())
    folded = kept(net).model
    with torch.no_grad():
        for tensor in originals_of(folded).tensors.values():
            tensor.zero_()
    assert all(torch.equal(t, net.state_dict()[k]) for k, t in before.items())
    folded = kept(net).model
    state = copy.deepcopy(folded.state_dict())
    result = bntools.unfold(folded).model
    with torch.no_grad():
        for tensor in result.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(t, folded.state_dict()[k]) for k, t in state.items())
    assert same(bntools.unfold(folded).model, net)
    assert recipe_of(folded).edits


@pytest.mark.parametrize("file", ["m.pt", "w.pth", "w.safetensors"])
def test_originals_travel_through_every_file_that_carries_them(file, net, tmp_path):
    path = tmp_path / file
    folded = kept(net)
    bntools.save(folded, path, state_dict=file != "m.pt")
    arch = None if file == "m.pt" else "test_unfolding:small"
    loaded = bntools.read_model(path, arch)
    assert torch.equal(loaded.model(X), folded.model(X))
    unfolded = bntools.unfold(loaded.model)
    assert same(unfolded.model, net)
    assert unfolded.recipe == Recipe()
    bntools.save(unfolded, path, force=True, state_dict=file != "m.pt")
    again = bntools.read_model(path, arch)
    assert again.recipe is None
    assert same(again.model, net)


@pytest.mark.parametrize("file", ["m.pt", "w.safetensors"])
def test_a_file_with_originals_says_so_by_its_size(file, net, tmp_path):
    """What is not asked for is not written."""
    sizes = []
    for result in (bntools.fold(net, X), kept(net)):
        bntools.save(result, tmp_path / file, force=True)
        sizes.append((tmp_path / file).stat().st_size)
    assert sizes[1] - sizes[0] > 0.9 * kept(net).report.originals_bytes


@pytest.mark.parametrize("file", ["m.pt2", "m.onnx"])
def test_programs_carry_no_originals(file, net, tmp_path):
    with pytest.raises(SaveError, match=r"Cannot keep the originals in .*Name a \.pt"):
        bntools.save(kept(net), tmp_path / file)
    assert list(tmp_path.iterdir()) == []
    torch.save(nn.Sequential(*net), tmp_path / "net.pt")
    run = ["fold", str(tmp_path / "net.pt"), "--keep-originals", "-o", str(tmp_path / file)]
    done = CliRunner().invoke(program, run)
    assert done.exit_code == 3
    assert "Cannot keep the originals" in done.stderr


def test_a_copy_of_a_folded_model_shares_its_originals(net):
    """Every surgery copies its argument: the originals would multiply."""
    folded = kept(net).model
    assert originals_of(copy.deepcopy(folded)) is originals_of(folded)
    assert same(bntools.unfold(copy.deepcopy(folded)).model, net)


# ---- chains -------------------------------------------------------------------------------------


def test_two_folds_come_back_one_after_the_other(net):
    first = kept(net, only="0.*")
    second = bntools.fold(first.model, X, keep_originals=True)
    assert len(originals_of(second.model).chain) == 2
    assert same(bntools.unfold(second.model).model, net)


def test_what_was_edited_elsewhere_since_the_fold_stays(net):
    folded = kept(net, only=["0.*", "1.*"])
    frozen = bntools.freeze(folded.model)
    result = bntools.unfold(frozen.model)
    assert same(result.model, bntools.freeze(net, only="2.*").model)
    assert [edit.kind for edit in result.recipe.edits] == ["freeze"]
    assert recipe_of(result.model) == result.recipe
    fresh = bntools.apply_recipe(small(), result.recipe)
    fresh.load_state_dict(result.model.state_dict())


def test_an_edit_before_the_fold_stays(net):
    frozen = bntools.freeze(net).model
    result = bntools.unfold(kept(frozen).model)
    assert same(result.model, frozen)
    assert [edit.kind for edit in result.recipe.edits] == ["freeze"] * 3


def test_training_mode_is_that_of_the_folded_model(net):
    folded = kept(net).model
    assert not any(m.training for m in bntools.unfold(folded).model.modules())
    assert all(m.training for m in bntools.unfold(folded.train()).model.modules())


# ---- refusals -----------------------------------------------------------------------------------


def test_without_originals_it_is_refused_with_a_reason(net):
    with pytest.raises(SurgeryError, match=r"originals were not kept.*keep_originals=True"):
        bntools.unfold(bntools.fold(net, X).model)


def test_a_model_that_was_not_folded_is_refused(net):
    for model in (net, bntools.freeze(net).model):
        with pytest.raises(SurgeryError, match="nothing was folded"):
            bntools.unfold(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0][0].weight.data.mul_(1.0001),
        lambda m: m[0][0].bias.data[0].add_(1e-3),
        lambda m: m.half(),
        lambda m: m[2][0].__init__(8, 4, 3),
    ],
    ids=["weight", "bias", "type", "another layer"],
)
def test_a_model_that_was_trained_since_is_refused(change, net):
    """What was kept would silently undo the training."""
    folded = kept(net).model
    change(folded)
    before = copy.deepcopy(folded.state_dict())
    with pytest.raises(SurgeryError, match="is not what the fold made it") as caught:
        bntools.unfold(folded)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, folded.state_dict()[k]) for k, t in before.items())


def test_a_layer_that_was_edited_since_is_refused(net):
    folded = kept(net).model
    recipe = bntools.Recipe.from_dict(
        {"version": 1, "edits": [{"edit": "drop-norm", "path": "0.1"}]}
    )
    changed = bntools.apply_recipe(folded, recipe)
    with pytest.raises(SurgeryError, match=r"Cannot unfold 0\.1: 0\.1 was changed since the fold"):
        bntools.unfold(changed)


def test_originals_of_another_recipe_are_refused(net):
    folded = kept(net).model
    with pytest.raises(SurgeryError, match="belong to another recipe"):
        bntools.unfold(folded, Recipe())


# ---- hostile originals --------------------------------------------------------------------------


HOSTILE = {
    "layers": {"layers": {"0.1": torch.zeros(3)}},
    "tensors": {"tensors": {"0.0.weight": 3}},
    "numbers": {"before": "0"},
    "negative": {"before": -1},
    "absent": {"absent": [3]},
    "values": {"values": {"0": {"forward": torch.zeros(1)}}},
    "digests": {"digests": {"0.0.weight": 7}},
    "earlier": {"earlier": [3]},
    "two earlier": {"earlier": [Originals(0, 0), Originals(0, 0)]},
    "missing": {"layers": None},
}


@pytest.mark.parametrize("state", HOSTILE.values(), ids=HOSTILE.keys())
def test_damaged_originals_in_a_module_are_a_load_error(state, net, tmp_path):
    folded = kept(net).model
    vars(originals_of(folded)).update(state)
    torch.save(folded, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="originals that its model has kept are damaged"):
        bntools.load(tmp_path / "m.pt")


def test_originals_that_are_their_own_past_are_a_load_error(net, tmp_path):
    folded = kept(net).model
    originals = originals_of(folded)
    originals.earlier = [originals]
    torch.save(folded, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="are damaged"):
        bntools.load(tmp_path / "m.pt")


SPOILED = {
    "no list": lambda steps: {"a": steps},
    "empty": lambda steps: [],
    "no object": lambda steps: [3],
    "numbers": lambda steps: [{**steps[0], "after": 10**9}],
    "layers": lambda steps: [{**steps[0], "layers": [*steps[0]["layers"], "9.9"]}],
    "no such tensor": lambda steps: [{**steps[0], "tensors": ["0.0.nothing"]}],
    "names": lambda steps: [{**steps[0], "absent": 3}],
    "values": lambda steps: [{**steps[0], "values": {"0": 3}}],
    "digests": lambda steps: [{**steps[0], "digests": [1]}],
    "too many": lambda steps: steps * 200,
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_damaged_originals_beside_weights_are_a_load_error(spoil, net, tmp_path):
    bntools.save(kept(net), tmp_path / "w.pth", state_dict=True)
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    content["bntools_originals"]["steps"] = spoil(content["bntools_originals"]["steps"])
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(LoadError) as caught:
        bntools.load(tmp_path / "w.pth", "test_unfolding:small")
    assert "\n" not in str(caught.value)


# ---- command line -------------------------------------------------------------------------------


def test_the_command_brings_a_model_back(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net, "net.pt")
    shape = "--input-shape=2x3x32x32"
    done = CliRunner().invoke(program, ["fold", "net.pt", "--keep-originals", shape])
    assert done.exit_code == 0, done.output
    assert "the originals travel along" in done.stdout
    done = CliRunner().invoke(program, ["unfold", "net.folded.pt", "-n"])
    assert (done.exit_code, "would write net.folded.unfolded.pt" in done.stderr) == (0, True)
    done = CliRunner().invoke(program, ["unfold", "net.folded.pt", "--json", "-o", "back.pt"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["output"] == "back.pt"
    assert document["summary"].startswith("brought back 3 layers and 5 tensors")
    assert same(bntools.load("back.pt"), net)
    done = CliRunner().invoke(program, ["unfold", "back.pt"])
    assert done.exit_code == 3
    assert "nothing was folded" in done.stderr
