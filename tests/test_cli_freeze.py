"""`bntools freeze`, `unfreeze`, `unsync`, and the sample that fine-tunes a frozen network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from bntools_cli.main import program
from click.testing import CliRunner
from torch import nn

import bntools
from bntools.norms import FrozenBatchNorm1d, FrozenBatchNorm2d, is_frozen

SAMPLES = Path(__file__).parent.parent / "samples"
SAMPLE = SAMPLES / "digits_cnn.pt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the sample network."""
    (tmp_path / "model.pt").write_bytes(SAMPLE.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def run(*words, code=0):
    result = CliRunner().invoke(program, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_freeze_writes_a_frozen_model_beside_the_model(folder):
    result = run("freeze", "model.pt")
    assert result.stdout.splitlines()[-1] == "froze 9 of 9 norm layers"
    assert "4.downsample.1  BatchNorm2d  -> FrozenBatchNorm2d" in result.stdout
    assert result.stderr == "wrote model.frozen.pt\n"
    model = bntools.load("model.frozen.pt").train()
    assert type(model[1]) is FrozenBatchNorm2d
    assert type(model[9]) is FrozenBatchNorm1d
    assert model[1].weight.requires_grad
    original = torch.load("model.pt", weights_only=False)
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(model(images), original(images))
    assert list(model.state_dict()) == list(original.state_dict())


def test_affine_is_frozen_where_it_is_asked_for(folder):
    run("freeze", "model.pt", "--affine", "-o", "affine.pt")
    model = bntools.load("affine.pt")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "0.weight" in trained
    assert not any(name.startswith(("1.", "9.")) for name in trained)


def test_unfreeze_gives_the_model_back(folder):
    run("freeze", "model.pt", "--affine")
    result = run("unfreeze", "model.frozen.pt", "-o", "back.pt")
    assert result.stdout.splitlines()[-1] == "unfroze 9 of 9 norm layers"
    model, original = bntools.load("back.pt"), bntools.load("model.pt")
    assert repr(model) == repr(original)
    assert all(p.requires_grad for p in model.parameters())
    state = original.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_as_torchvision_makes_its_layers_and_keeps_what_has_none(folder):
    result = run("freeze", "model.pt", "--as", "torchvision", "--json")
    document = json.loads(result.stdout)
    assert document["summary"] == "froze 8 of 9 norm layers"
    assert document["form"] == "torchvision"
    assert document["output"] == "model.frozen.pt"
    assert document["decisions"][-1]["reason"] == "no-such-form"
    assert document["recipe"]["edits"][0] == {"edit": "freeze", "path": "1", "form": "torchvision"}
    model = bntools.load("model.frozen.pt")
    assert type(model[1]) is torchvision.ops.FrozenBatchNorm2d
    assert type(model[9]) is nn.BatchNorm1d
    run("unfreeze", "model.frozen.pt")
    assert type(bntools.load("model.frozen.unfrozen.pt")[1]) is nn.BatchNorm2d


def test_only_and_skip_choose_layers(folder):
    run("freeze", "model.pt", "--only", "3.*", "--skip", "*.bn2")
    model = bntools.load("model.frozen.pt")
    assert [is_frozen(m) for m in (model[1], model[3].bn1, model[3].bn2)] == [False, True, False]


def test_a_dry_run_writes_nothing(folder):
    result = run("freeze", "model.pt", "-n")
    assert "would write model.frozen.pt" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    (folder / "model.frozen.pt").write_bytes(b"old")
    assert "exists: that takes --force" in run("freeze", "model.pt", "-n").stderr


def test_where_nothing_changes_nothing_is_written(folder):
    result = run("unfreeze", "model.pt")
    assert result.stdout.splitlines()[-1] == "unfroze 0 of 9 norm layers; the model is unchanged"
    assert "nothing was changed, so no model is written" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


def test_an_existing_output_is_kept_without_force(folder):
    (folder / "model.frozen.pt").write_bytes(b"old")
    result = run("freeze", "model.pt", code=3)
    assert "Cannot write model.frozen.pt: it exists" in result.stderr
    assert (folder / "model.frozen.pt").read_bytes() == b"old"
    run("freeze", "model.pt", "-f")
    assert is_frozen(bntools.load("model.frozen.pt")[1])


def test_mistakes_are_told_in_one_line(folder):
    assert (
        "no norm layer has such a path" in run("freeze", "model.pt", "--only", "x", code=3).stderr
    )
    assert (
        "'detectron' is not one of" in run("freeze", "model.pt", "--as", "detectron", code=2).stderr
    )
    same = run("freeze", "model.pt", "-o", "a.json", "--report", "a.json", code=2)
    assert "--output and --report name the same file" in same.stderr
    assert "there is no such file" in run("unfreeze", "none.pt", code=3).stderr


def test_the_report_is_written_as_json(folder):
    run("freeze", "model.pt", "--report", "report.json", "-q")
    report = json.loads((folder / "report.json").read_text())
    assert report["verb"] == "freeze"
    assert len(report["decisions"]) == 9


def test_unsync_runs_the_model_to_see_dimensions(folder):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    torch.save(model, "sync.pt")
    result = run("unsync", "sync.pt", "--input-shape", "1x3x8x8")
    assert result.stdout.splitlines()[-1] == "converted 1 of 1 norm layers"
    assert type(bntools.load("sync.unsynced.pt")[1]) is nn.BatchNorm2d
    wrong = run("unsync", "sync.pt", "--input-shape", "1x5x8x8", "-f", code=3)
    assert "Cannot run the model" in wrong.stderr


@pytest.mark.parametrize("command", ["freeze", "unfreeze"])
@pytest.mark.parametrize("option", ["--input-shape", "--inputs", "--seed"])
def test_what_runs_no_model_has_no_options_for_inputs(folder, command, option):
    """They were taken, and changed nothing."""
    assert f"No such option '{option}'" in run(command, "model.pt", option, "1", code=2).stderr


def test_a_frozen_file_folds(folder):
    run("freeze", "model.pt")
    result = run("fold", "model.frozen.pt")
    assert result.stdout.splitlines()[-1].startswith("folded 9 of 9 norm layers")
    assert "FrozenBatchNorm2d" in run("inspect", "model.frozen.pt").stdout


def test_the_fine_tuning_sample_keeps_its_statistics(tmp_path):
    """It returns 1 if a frozen statistic has changed, or no statistic of the plain network has."""
    pytest.importorskip("sklearn")
    command = [sys.executable, SAMPLES / "finetune_frozen.py", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    last = result.stdout.splitlines()[-2:]
    assert "eval(), train()" in last[0]
    assert last[0].endswith("27 of 27 statistics have changed")
    assert last[1].endswith("0 of 27 statistics have changed")
