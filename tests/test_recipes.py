"""Recipes: what a surgery did, re-applied to a fresh architecture, also out of hostile files."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import randomise, settle
from torch import nn

import bntools
from bntools.errors import BNToolsError, LoadError, SurgeryError
from bntools.recipe import Edit, Recipe, recipe_of

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions with norms, one of them biased, and a head with a third norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.bn3(self.act(self.bn2(self.conv2(x))).tanh())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    randomise(model)
    settle(model, X)
    return model


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a file that defines the architecture, from which `--arch` builds it."""
    (tmp_path / "arch.py").write_text("from test_recipes import Net\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARCH = "test_recipes:Net"


def onnx_file() -> bytes:
    """A small valid model that bntools did not write."""
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def chained(model: nn.Module) -> bntools.Result:
    """Fold two norms, replace the third, freeze nothing that is left: a recipe of many kinds."""
    folded = bntools.fold(model, X, only=["bn1", "bn2"])
    return bntools.replace(folded.model, bntools.ToGroupNorm(groups=2), X)


# ---- in the user's own code ---------------------------------------------------------------------


def test_a_service_needs_five_lines(net, home):
    """A recipe and a state dict make the model again, without reading a pickle of classes."""
    bntools.save(chained(net), "small.pth", state_dict=True)
    expected = chained(net).model(X)

    saved = torch.load("small.pth", weights_only=True)
    model = bntools.apply_recipe(Net(), saved["bntools_recipe"])
    model.load_state_dict(saved["state_dict"])
    model.eval()
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    "form",
    ["recipe", "data", "text", "json", "report", "state dict", "module", "safetensors", "result"],
)
def test_a_recipe_is_taken_in_any_form(form, net, home):
    result = chained(net)
    bntools.save(result, "w.pth", state_dict=True)
    bntools.save(result, "w.safetensors")
    bntools.save(bntools.freeze(nn.Sequential(nn.BatchNorm1d(3))), "m.pt")
    bntools.write_report("report.json", result)
    (home / "r.json").write_text(json.dumps(result.recipe.to_dict()))
    forms = {
        "recipe": result.recipe,
        "data": result.recipe.to_dict(),
        "text": json.dumps(result.recipe.to_dict()),
        "json": home / "r.json",
        "report": "report.json",
        "state dict": "w.pth",
        "module": "m.pt",
        "safetensors": home / "w.safetensors",
        "result": result.to_dict(),
    }
    if form == "module":
        assert bntools.apply_recipe(nn.Sequential(nn.BatchNorm1d(3)), "m.pt")[0].training is False
        return
    fresh = bntools.apply_recipe(Net(), forms[form])
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(X), result.model(X))
    assert recipe_of(fresh) == result.recipe


@pytest.mark.parametrize("file", ["w.pt2", "w.ts", "w.onnx"])
def test_a_program_says_what_was_edited_before_it_was_recorded(file, net, home, monkeypatch):
    """Its recipe is read from beside the program, which is not loaded: no --trust is asked for."""
    result = chained(net)
    bntools.save(result, file, example_inputs=X)
    for name in ("load", "jit.load", "export.load"):
        monkeypatch.setattr(f"torch.{name}", pytest.fail)
    fresh = bntools.apply_recipe(Net(), file)
    assert recipe_of(fresh) == result.recipe
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh.eval()(X), result.model(X))


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "w.pt2", "w.ts", "w.onnx"])
def test_a_file_of_an_unedited_model_has_an_empty_recipe(file, net, home):
    """So that a service need not know whether there was surgery; None is what such files hold."""
    bntools.save(net, file, state_dict=file == "w.pth", example_inputs=X)
    assert recipe_of(bntools.apply_recipe(Net(), file)) == Recipe()
    assert recipe_of(bntools.apply_recipe(Net(), None)) == Recipe()


def test_applying_a_recipe_leaves_the_argument_as_it_was(net):
    recipe = chained(net).recipe
    fresh = Net()
    before = copy.deepcopy(fresh.state_dict())
    made = bntools.apply_recipe(fresh, recipe)
    assert made is not fresh
    assert isinstance(fresh.bn1, nn.BatchNorm2d)
    assert recipe_of(fresh) == Recipe()
    assert all(torch.equal(a, fresh.state_dict()[k]) for k, a in before.items())
    kept = [(p, q) for p in made.parameters() for q in fresh.parameters() if p is q]
    assert kept == []


def test_a_recipe_can_be_applied_in_place(net):
    fresh = Net()
    weight = fresh.conv1.weight
    assert bntools.apply_recipe(fresh, chained(net).recipe, inplace=True) is fresh
    assert fresh.conv1.weight is weight
    assert type(fresh.bn1) is nn.Identity
    assert fresh.conv1.bias.shape == (8,)


def test_a_recipe_that_does_not_fit_changes_nothing_in_place():
    """Its first edits fit, and its last one does not."""
    recipe = Recipe((Edit("drop-norm", "bn1"), Edit("drop-norm", "bn9")))
    fresh = Net()
    with pytest.raises(BNToolsError, match="no 'bn9'"):
        bntools.apply_recipe(fresh, recipe, inplace=True)
    assert type(fresh.bn1) is nn.BatchNorm2d
    assert recipe_of(fresh) == Recipe()


def test_an_empty_recipe_changes_nothing(net):
    for recipe in (Recipe(), {"bntools_recipe": None}):
        made = bntools.apply_recipe(net, recipe)
        assert torch.equal(made(X), net(X))
        assert recipe_of(made) == Recipe()


def test_recipes_applied_one_after_the_other_chain(net):
    first = bntools.fold(net, X, only=["bn1", "bn2"])
    second = bntools.replace(first.model, bntools.ToGroupNorm(groups=2), X)
    rest = Recipe(second.recipe.edits[len(first.recipe.edits) :])
    twice = bntools.apply_recipe(bntools.apply_recipe(Net(), first.recipe), rest)
    assert recipe_of(twice) == second.recipe
    twice.load_state_dict(second.model.state_dict())
    assert torch.equal(twice.eval()(X), second.model(X))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "give a Recipe"),
        ([], "give a Recipe"),
        ("nothing.json", "nothing.json: [Nn]o such file"),
        ("nothing.pt", "there is no such file"),
        ("{", "it is no JSON"),
        ('{"a": 1}', "it has none"),
        ({}, "it has none"),
        ({"recipe": 3}, "another version"),
        ("text.json", "it is no JSON"),
        ("plain.pth", "it has no recipe"),
        ("some.onnx", "no ONNX model, or damaged"),
        ("plain.onnx", "it has no recipe"),
        ("array.npy", "of which no recipe is read"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_line(given, message, home):
    (home / "text.json").write_text("[1, ")
    (home / "some.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x03abc")
    torch.save(Net().state_dict(), "plain.pth")
    (home / "array.npy").write_bytes(b"\x93NUMPY and more")
    (home / "plain.onnx").write_bytes(onnx_file())
    with pytest.raises(LoadError, match=message) as caught:
        bntools.apply_recipe(Net(), given)
    assert "\n" not in str(caught.value)


# ---- what untrusted recipes hold ----------------------------------------------------------------


def nested(depth: int) -> object:
    found: object = 1
    for _ in range(depth):
        found = [found]
    return found


DAMAGED = {
    "no list": {"version": 1, "edits": {"a": 1}},
    "no edits": {"version": 1},
    "version": {"version": 2, "edits": []},
    "version true": {"version": "1", "edits": []},
    "an edit that is no object": {"version": 1, "edits": [3]},
    "no kind": {"version": 1, "edits": [{"path": "bn1"}]},
    "kind of another type": {"version": 1, "edits": [{"edit": ["drop-norm"], "path": "bn1"}]},
    "no path": {"version": 1, "edits": [{"edit": "drop-norm"}]},
    "path of another type": {"version": 1, "edits": [{"edit": "drop-norm", "path": 3}]},
    "a path of a megabyte": {"version": 1, "edits": [{"edit": "drop-norm", "path": "a" * 10**6}]},
    "channels as text": {
        "version": 1,
        "edits": [{"edit": "add-bias", "path": "a", "channels": "8"}],
    },
    "channels as truth": {
        "version": 1,
        "edits": [{"edit": "add-bias", "path": "a", "channels": True}],
    },
    "negative channels": {
        "version": 1,
        "edits": [{"edit": "add-bias", "path": "a", "channels": -1}],
    },
    "deep options": {"version": 1, "edits": [{"edit": "freeze", "path": "a", "x": nested(50)}]},
    "many options": {"version": 1, "edits": [{"edit": "freeze", "path": "a", "x": [0] * 20_000}]},
    "a huge number": {"version": 1, "edits": [{"edit": "freeze", "path": "a", "x": 10**40}]},
    "NaN": {"version": 1, "edits": [{"edit": "freeze", "path": "a", "x": float("nan")}]},
    "a tensor": {"version": 1, "edits": [{"edit": "freeze", "path": "a", "x": torch.zeros(1)}]},
    "too many edits": {"version": 1, "edits": [{"edit": "drop-norm", "path": "a"}] * 100_001},
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_recipe_is_refused_before_anything_is_done(data):
    with pytest.raises(LoadError, match=r"Cannot read a (damaged )?recipe") as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


MISFITS = {
    "an unknown edit": ({"edit": "run", "path": "conv1"}, "no such edit"),
    "a path that is not there": ({"edit": "drop-norm", "path": "bn7"}, "no 'bn7'"),
    "a path of dunder names": ({"edit": "drop-norm", "path": "__class__.x"}, "no '__class__'"),
    "10^12 channels": ({"edit": "add-bias", "path": "conv1", "channels": 10**12}, "no 10000"),
    "no channels": ({"edit": "add-bias", "path": "conv1"}, "no weight beside"),
    "a bias twice": ({"edit": "add-bias", "path": "conv2", "channels": 8}, "it has one"),
    "a bias on an activation": ({"edit": "add-bias", "path": "act", "channels": 8}, "no weight"),
    "statistics of an activation": ({"edit": "add-statistics", "path": "act"}, "add-statistics"),
    "groups of another type": (
        {"edit": "replace-norm", "path": "bn1", "target": {"name": "groupnorm", "groups": [2]}},
        "groups",
    ),
    "a norm in the place of an activation": (
        {"edit": "replace-norm", "path": "act", "target": {"name": "groupnorm", "groups": 2}},
        "Cannot replace a ReLU",
    ),
    "an activation after nothing": (
        {"edit": "remove-activation", "path": "", "after": "nothing"},
        "Cannot",
    ),
    "a frozen activation": ({"edit": "freeze", "path": "act", "form": "torchvision"}, "freeze act"),
}


@pytest.mark.parametrize(("edit", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_an_edit_that_does_not_fit_is_told_in_one_line(edit, message):
    recipe = {"version": 1, "edits": [edit]}
    fresh = Net()
    with pytest.raises(BNToolsError, match=message) as caught:
        bntools.apply_recipe(fresh, recipe)
    assert "\n" not in str(caught.value)
    assert type(fresh.bn1) is nn.BatchNorm2d


@pytest.mark.parametrize("form", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("name", ["an unknown edit", "10^12 channels", "a path that is not there"])
def test_a_misfit_in_a_file_is_a_load_error_of_one_line(name, form, net, home):
    edits = bntools.fold(net, X).recipe
    data = {"version": 1, "edits": [*edits.to_dict()["edits"], MISFITS[name][0]]}
    model = copy.deepcopy(net)
    model.__dict__["bntools_recipe"] = data
    bntools.save(model, form, state_dict=True)
    with pytest.raises(LoadError, match="its recipe cannot be re-applied") as caught:
        bntools.load(form, ARCH)
    assert "\n" not in str(caught.value)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_go_back_into_the_architecture_that_the_recipe_makes(file, net, home):
    result = chained(net)
    assert bntools.save(result, file, state_dict=True) == ()
    loaded = bntools.read_model(file, ARCH)
    assert torch.equal(loaded.model(X), result.model(X))
    assert loaded.recipe == result.recipe.to_dict()
    assert recipe_of(loaded.model) == result.recipe
    (note,) = [note for note in loaded.notes if "recipe" in note]
    assert note.endswith("1 add-bias, 2 drop-norm, 1 replace-norm")
    again = bntools.freeze(bntools.unfreeze(loaded.model).model)
    bntools.save(again, f"again-{file}", state_dict=True)
    assert torch.equal(bntools.load(f"again-{file}", ARCH)(X), result.model(X))


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_every_kind_of_edit_survives_a_file_of_weights(file, net, home):
    """freeze, unfreeze, add-statistics, replace with an activation taken, unsync."""
    net.bn3 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    batches = [torch.randn(4, 3, 12, 12)]
    model = bntools.freeze(net, only="bn1", affine=True).model
    model = bntools.freeze(model, only="bn2", form="torchvision").model
    options = bntools.RecalibrationOptions(add_statistics=True)
    model = bntools.recalibrate(model, batches, only="bn3", options=options).model
    model = bntools.unfreeze(model, only="bn1").model
    result = bntools.replace(model, bntools.ToEvoNormS0(groups=2), X, only="bn1")
    kinds = {edit.kind for edit in result.recipe.edits}
    assert kinds >= {"freeze", "unfreeze", "add-statistics", "replace-norm"}
    bntools.save(result, file, state_dict=True)
    fresh = bntools.load(file, "test_recipes:without_statistics")
    assert torch.equal(fresh(X), result.model(X))


def without_statistics() -> nn.Module:
    model = Net()
    model.bn3 = nn.BatchNorm2d(8, track_running_stats=False)
    return model


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_without_an_architecture_say_what_to_give(file, net, home):
    result = chained(net)
    bntools.save(result, file, state_dict=True)
    with pytest.raises(LoadError, match=r"weights only .*by 1 add-bias.*Name the") as caught:
        bntools.load(file)
    assert "package.module:factory" in str(caught.value)
    known = bntools.load(file, ARCH)
    bntools.save(known, f"known-{file}", state_dict=True)
    with pytest.raises(LoadError, match=f"saved from {ARCH}: add --arch {ARCH}"):
        bntools.load(f"known-{file}")


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_of_another_architecture_name_the_keys(file, net, home):
    result = bntools.fold(net, X)
    bntools.save(result, file, state_dict=True)
    with pytest.raises(LoadError) as caught:
        bntools.load(file, "torchvision:resnet18")
    said = str(caught.value)
    assert re.search(
        r"its recipe cannot be re-applied .*Cannot (find 'bn|add a bias to conv1)", said
    )
    assert "missing (" in said
    assert "unexpected (" in said
    with pytest.raises(LoadError, match=r"1 of another shape \(head.weight \(5, 8\) in the file"):
        bntools.load(file, "test_recipes:wide_head")


def wide_head() -> nn.Module:
    model = Net()
    model.head = nn.Linear(8, 5, bias=True)
    model.head.weight = nn.Parameter(torch.zeros(9, 8))
    return model


def test_the_architecture_in_a_file_is_not_built_unasked(net, home):
    """It may be any function that can be imported: only what the user names is called."""
    net.__dict__["bntools_arch"] = "os:abort"
    bntools.save(net, "w.safetensors")
    with pytest.raises(LoadError, match="saved from os:abort: add --arch os:abort"):
        bntools.load("w.safetensors")


def test_a_checkpoint_of_the_users_own_may_hold_a_recipe(net, home):
    """What a training script writes: weights and recipe among other things."""
    result = chained(net)
    content = {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in result.model.state_dict().items()},
        "bntools_recipe": result.recipe.to_dict(),
    }
    torch.save(content, "mine.pth")
    loaded = bntools.read_model("mine.pth", ARCH)
    assert torch.equal(loaded.model(X), result.model(X))
    assert any("'module.'" in note for note in loaded.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_weights_keep_their_type(file, dtype, net, home):
    """Also where the tensors of one model have several."""
    model = bntools.fold(net, X).model
    model.head.to(dtype)
    before = {k: v.dtype for k, v in model.state_dict().items()}
    bntools.save(model, file, state_dict=True)
    loaded = bntools.load(file, ARCH).state_dict()
    assert {k: v.dtype for k, v in loaded.items()} == before
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_a_plain_torch_user_can_read_the_weights(net, home):
    result = bntools.fold(net, X)
    bntools.save(result, "w.pth", state_dict=True)
    saved = torch.load("w.pth", weights_only=True)
    assert set(saved) == {"state_dict", "bntools_recipe", "bntools_arch", "bntools_version"}
    assert set(saved["state_dict"]) == set(result.model.state_dict())
    assert not any(t.requires_grad for t in saved["state_dict"].values())


def test_recipes_chain_through_the_command_line(net, home):
    """Recalibrate is left out: it needs pictures. fold, replace, freeze, through three formats."""
    torch.save(net.state_dict(), "net.pth")
    shape, arch = "--input-shape=2x3x12x12", f"--arch={ARCH}"
    runs = [
        ["fold", "net.pth", arch, shape, "--only=bn1", "--only=bn2", "--state-dict", "-o", "a.pth"],
        ["freeze", "a.pth", arch, "-o", "b.safetensors"],
        ["unfreeze", "b.safetensors", arch, "-o", "c.safetensors"],
        ["replace", "c.safetensors", arch, shape, "--with=groupnorm", "--groups=2", "-o", "d.pt"],
        ["inspect", "d.pt", shape, "--allow=test_recipes.Net"],
    ]
    for run in runs:
        done = CliRunner().invoke(program, run)
        assert done.exit_code == 0, done.output
    last = bntools.read_model("d.pt", allow=["test_recipes.Net"])
    kinds = [edit["edit"] for edit in last.recipe["edits"]]
    assert kinds == ["add-bias", "drop-norm", "drop-norm", "freeze", "unfreeze", "replace-norm"]


def test_a_recipe_and_the_error_of_a_wrong_model_are_values():
    """`Recipe` is public: it compares, prints as JSON data, and reads itself."""
    recipe = bntools.Recipe.from_dict({"version": 1, "edits": [{"edit": "drop-norm", "path": "0"}]})
    assert bntools.Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(SurgeryError, match="no such edit"):
        bntools.apply_recipe(Net(), bntools.Recipe((Edit("boil", ""),)))


def test_the_activation_of_a_fused_layer_stays_in_a_program(home):
    """In a .pt2 it is below the norm, of which torch's class has no submodules."""
    timm = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm.BatchNormAct2d(4), nn.Conv2d(4, 4, 1)).eval()
    randomise(model)
    bntools.save(model, "m.pt2", example_inputs=X)
    program = bntools.load("m.pt2")
    folded = bntools.fold(program, X)
    assert [d.path for d in folded.report.folds] == ["1"]
    replaced = bntools.replace(program, bntools.ToGroupNorm(groups=2), X).model
    assert type(replaced.get_submodule("1")) is nn.GroupNorm
    assert type(replaced.get_submodule("1.act")) is nn.ReLU
    unfolded = bntools.unfold(bntools.fold(program, X, keep_originals=True).model).model
    assert torch.equal(unfolded(X), program(X))
