"""Drift between two models: its numbers, its table, its picture, and `bntools diff`."""

from __future__ import annotations

import copy
import json
import math
import re
import sys

import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from PIL import Image
from randomise import randomise
from torch import nn

import bntools
from bntools.errors import BNToolsError, PlanError, SaveError
from bntools.report import Difference, LayerDrift


def net():
    """Three norms of different kinds with statistics of their own."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(16), nn.SyncBatchNorm(5)
    ).eval()
    randomise(model)
    return model


def moved(model, path, channel, mean=0.0, variance=1.0):
    """A copy in which one channel's mean is off by so much, and its variance by that factor."""
    model = copy.deepcopy(model)
    norm = model.get_submodule(path)
    norm.running_mean[channel] += mean
    norm.running_var[channel] *= variance
    return model


def divergence(norm, other, channel):
    """The symmetric KL divergence of one channel, written out."""
    m, v = (float(x[channel]) for x in (norm.running_mean, norm.running_var))
    n, w = (float(x[channel]) for x in (other.running_mean, other.running_var))
    v, w = v + norm.eps, w + norm.eps
    one = 0.5 * (math.log(w / v) + (v + (m - n) ** 2) / w - 1)
    two = 0.5 * (math.log(v / w) + (w + (m - n) ** 2) / v - 1)
    return (one + two) / 2


# ---- from Python ---------------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself():
    model = net()
    found = bntools.diff(model, copy.deepcopy(model))
    assert found.is_zero
    assert [layer.path for layer in found.layers] == ["1", "3", "4"]
    assert found.summary() == "3 norm layers compared; their statistics are the same"


@pytest.mark.parametrize(("path", "channel"), [("1", 0), ("3", 15), ("4", 2)])
@pytest.mark.parametrize(("mean", "variance"), [(0.5, 1.0), (0.0, 3.0), (-2.0, 0.1)])
def test_drift_is_the_symmetric_divergence_of_the_worst_channel(path, channel, mean, variance):
    old = net()
    new = moved(old, path, channel, mean, variance)
    found = bntools.diff(old, new)
    truth = divergence(old.get_submodule(path), new.get_submodule(path), channel)
    assert found.worst.path == path
    assert found.worst.worst_channel == channel
    assert found.worst.kl_max == pytest.approx(truth, rel=1e-6)
    assert found.worst.kl_median == 0
    assert [layer.kl_max for layer in found.layers if layer.path != path] == [0, 0]


def test_drift_is_the_same_in_both_directions():
    old = net()
    new = moved(old, "1", 1, 0.7, 2.0)
    there, back = bntools.diff(old, new), bntools.diff(new, old)
    assert there.worst.kl_max == pytest.approx(back.worst.kl_max, rel=1e-12)
    assert there.worst.mean_before == back.worst.mean_after


def test_a_mean_that_is_off_by_one_deviation_counts_half():
    old = nn.BatchNorm2d(1, eps=0)
    new = moved(nn.Sequential(old), "0", 0, mean=1.0)
    assert bntools.diff(nn.Sequential(old), new).worst.kl_max == pytest.approx(0.5)


def test_layers_can_be_ordered_by_their_drift():
    old = net()
    new = moved(moved(old, "4", 0, mean=5.0), "3", 0, mean=0.1)
    assert [layer.path for layer in bntools.diff(old, new).by_drift().layers] == ["4", "3", "1"]


def test_layers_can_be_chosen():
    model = net()
    assert [x.path for x in bntools.diff(model, model, only=["1", "3"]).layers] == ["1", "3"]
    assert [x.path for x in bntools.diff(model, model, skip="4").layers] == ["1", "3"]
    with pytest.raises(PlanError, match="Cannot select 'x'"):
        bntools.diff(model, model, only="x")


def test_what_cannot_be_compared_is_named():
    old, new = net(), net()
    new[3] = nn.BatchNorm1d(8)
    new[4] = nn.Identity()
    new.append(nn.BatchNorm1d(2))
    found = bntools.diff(old, new)
    assert [layer.path for layer in found.layers] == ["1"]
    assert {row.path: row.why for row in found.uncompared} == {
        "3": "16 channels against 8",
        "4": "only in the first",
        "5": "only in the second",
    }
    assert "not compared, 16 channels against 8: 3" in str(found)


def test_models_with_nothing_in_common_are_an_error():
    with pytest.raises(PlanError, match=r"no norm layer .* in common \(1, 3, 4 against none\)"):
        bntools.diff(net(), nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_the_worst_drift(value):
    old = net()
    new = moved(old, "3", 7)
    new[3].running_var[7] = value
    found = bntools.diff(old, new)
    assert (found.worst.path, found.worst.worst_channel) == ("3", 7)
    assert found.worst.kl_max == math.inf
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][1]["kl_max"] is None


def test_half_precision_and_training_mode_change_nothing():
    old = net()
    new = moved(old, "1", 2, mean=0.5)
    truth = bntools.diff(old, new).worst.kl_max
    assert bntools.diff(old.train(), new).worst.kl_max == truth
    half = bntools.diff(copy.deepcopy(old).half(), copy.deepcopy(new).half()).worst.kl_max
    assert half == pytest.approx(truth, rel=0.02)


def test_the_models_stay_as_they_were():
    old = net().train()
    state, flags = copy.deepcopy(old.state_dict()), [m.training for m in old.modules()]
    bntools.diff(old, moved(old, "1", 0, 1.0))
    assert all(torch.equal(state[name], value) for name, value in old.state_dict().items())
    assert [m.training for m in old.modules()] == flags


def test_the_report_has_a_table_and_data():
    old = net()
    found = bntools.diff(old, moved(old, "1", 3, mean=4.0))
    assert re.search(r"^1 +\S+ +\S+ +\S+ +\S+ +0 +\d", str(found), re.MULTILINE)
    assert str(found).endswith(found.summary())
    data = found.to_dict()
    assert data["schema"] == 1
    assert data["layers"][0]["worst_channel"] == 3
    assert isinstance(found, Difference)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".svg", ".PNG"])
def test_a_picture_is_drawn(tmp_path, ending):
    old = net()
    path = tmp_path / f"drift{ending}"
    bntools.write_plot(bntools.diff(old, moved(old, "1", 3, 4.0)), path)
    if ending == ".svg":
        assert path.read_text().count("running variance") >= 1
    else:
        with Image.open(path) as image:
            assert min(image.size) > 500
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("case", ["no drift", "not finite", "no mean", "odd names"])
def test_every_difference_can_be_drawn(tmp_path, case):
    old, new = net(), net()
    found = bntools.diff(old, new)
    if case == "not finite":
        new[1].running_var[0] = math.nan
        found = bntools.diff(old, new)
    elif case == "no mean":
        bare = LayerDrift(**{**vars(found.layers[0]), "mean_before": None, "mean_after": None})
        found = Difference((bare,))
    elif case == "odd names":
        odd = LayerDrift(**{**vars(found.layers[0]), "path": r"a$\frac{1$_^{"})
        found = Difference((odd,) * 90)
    bntools.write_plot(found, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5000


def test_the_same_difference_gives_the_same_picture(tmp_path):
    found = bntools.diff(net(), net())
    for name in ("a.svg", "b.svg"):
        bntools.write_plot(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    found = bntools.diff(net(), net())
    (tmp_path / "there.png").write_bytes(b"old")
    with pytest.raises(SaveError, match=r"a figure is a \.png or a \.svg file"):
        bntools.write_plot(found, tmp_path / "drift.jpg")
    with pytest.raises(SaveError, match=r"it exists\. Choose another name"):
        bntools.write_plot(found, tmp_path / "there.png")
    with pytest.raises(SaveError, match="Cannot draw a str: it has no figure"):
        bntools.write_plot("text", tmp_path / "drift.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BNToolsError, match=r"matplotlib is not installed.*pip install matplotlib"):
        bntools.write_plot(found, tmp_path / "drift.png")
    assert [p.name for p in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"old"


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two models, a.pt and b.pt."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    old = net()
    torch.save(old, "a.pt")
    torch.save(moved(moved(old, "3", 5, 2.0), "1", 0, 0.1), "b.pt")
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner().invoke(program, ["diff", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_the_table_is_the_answer(folder):
    result = run("a.pt", "b.pt")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["1", "3", "4"]
    assert lines[-1].startswith("3 norm layers compared; the largest drift is at 3, channel 5")
    assert result.stderr == ""
    assert [
        line.split()[0] for line in run("a.pt", "b.pt", "--sort", "drift").stdout.splitlines()[2:5]
    ] == ["3", "1", "4"]
    assert run("a.pt", "b.pt", "-q").stdout.count("\n") == 1


def test_json_report_and_plot_are_written(folder):
    result = run("a.pt", "b.pt", "--json", "--report", "r.json", "--plot", "p.svg", "--only", "3")
    data = json.loads(result.stdout)
    assert (data["a"], data["b"]) == ("a.pt", "b.pt")
    assert [layer["path"] for layer in data["layers"]] == ["3"]
    assert json.loads((folder / "r.json").read_text()) == data
    assert (folder / "p.svg").stat().st_size
    assert result.stderr.splitlines() == ["wrote p.svg", "wrote r.json"]


def test_state_dicts_take_an_architecture(folder):
    (folder / "mine.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.BatchNorm2d(2))\n"
    )
    for name in ("a", "b"):
        model = nn.Sequential(nn.BatchNorm2d(2))
        model[0].running_mean.fill_(1.0 if name == "b" else 0.0)
        torch.save(model.state_dict(), f"{name}.pth")
    result = run("a.pth", "b.pth", "--arch", "mine:net")
    assert "the largest drift is at 0, channel 0: symmetric KL 0.5" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("a.pt",), 2, "Missing argument 'B'"),
        (("a.pt", "none.pt"), 3, "there is no such file"),
        (("a.pt", "b.pt", "-q", "-v"), 2, "contradict each other"),
        (("a.pt", "b.pt", "--plot", "p.jpg"), 3, "a figure is a"),
        (("a.pt", "b.pt", "--plot", "b.pt"), 2, "--plot names the file of a model"),
        (("a.pt", "b.pt", "--report", "a.pt", "-f"), 2, "--report names the file of a model"),
        (("a.pt", "b.pt", "--report", "r.svg", "--plot", "r.svg"), 2, "name the same file"),
        (("a.pt", "b.pt", "--report", "no/r.json"), 3, "there is no folder"),
        (("a.pt", "b.pt", "--sort", "size"), 2, "Invalid value for '--sort'"),
        (("a.pt", "torchvision:squeezenet1_1"), 3, "no norm layer with running statistics"),
    ],
)
def test_what_cannot_be_compared_is_explained(folder, arguments, code, says):
    before = sorted(path.name for path in folder.iterdir())
    result = run(*arguments, code=code)
    assert says in result.stderr
    assert result.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == before
