"""`bntools to-batchnorm`: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bntools_cli.main import program
from click.testing import CliRunner
from handwritten_models import Frozen, lenet
from test_affines import settled
from torch import nn

import bntools

ALLOW = ["--allow", "handwritten_models.CourseBatchNorm", "--allow", "handwritten_models.Frozen"]


def run(*args: str):
    return CliRunner().invoke(program, ["to-batchnorm", *args])


def test_a_lenet_is_converted_and_written(tmp_path: Path):
    """The file has nn.BatchNorm layers and gives the same; JSON has the certificate."""
    model = settled(lenet()).float()
    path, out = tmp_path / "lenet.pt", tmp_path / "nn.pt"
    torch.save(model, path)
    told = run(str(path), "-o", str(out), "--input-shape", "2x1x28x28", "--json", *ALLOW)
    assert told.exit_code == 0, told.stderr
    data = json.loads(told.stdout)
    assert len(data["converted"]) == 4
    assert data["output"] == str(out)
    assert "by whether gradients are enabled" in told.stderr
    again = bntools.load(out)
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(again.eval()(x), model(x), atol=1e-5)
    assert sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in again.modules()) == 4


def test_a_dry_run_writes_nothing_and_shows_what_would_be(tmp_path: Path):
    """A frozen one becomes a frozen BatchNorm."""
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4)), path)
    told = run(str(path), "-n", "--input-shape", "2x3x8x8", *ALLOW)
    assert told.exit_code == 0, told.stderr
    assert "frozen nn.BatchNorm2d: mean running_mean" in " ".join(told.stdout.split())
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_without_any_is_not_written(tmp_path: Path):
    """It is said so."""
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    told = run(str(path))
    assert told.exit_code == 0, told.stderr
    assert "the model has no hand-written batch norm" in told.stdout
    assert "nothing was changed" in told.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_one_name_for_two_files_is_an_error_of_the_options(tmp_path: Path):
    """Before anything is read."""
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    same = str(tmp_path / "same")
    assert run(str(path), "-o", same, "--report", same).exit_code == 2
