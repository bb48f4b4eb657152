"""`bntools fold --merge-branches` and `--merge-linear`: what is said, written, loaded, exported."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from bntools_cli.main import program
from branch_models import RepConv
from click.testing import CliRunner
from randomise import difference, outputs, randomise
from torch import nn

import bntools

ALLOW = ("--allow", "branch_models.RepConv")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a net of two blocks, as a whole module."""
    torch.manual_seed(0)
    model = nn.Sequential(RepConv(3, 6, 2), RepConv(6, 6)).eval()
    randomise(model)
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def run(*words, code=0):
    result = CliRunner().invoke(program, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def fold(*words, code=0):
    return run("fold", "model.pt", *ALLOW, "--input-shape", "1x3x16x16", *words, code=code)


def original() -> nn.Module:
    return torch.load("model.pt", weights_only=False)


def test_fold_merges_tells_and_writes(folder):
    """The table names what became what, and the forwards that were rewritten."""
    result = fold("--merge-branches")
    assert "0.rbr_dense.0" in result.stdout
    assert "merged, rewriting 1" in result.stdout
    assert "convolutions 4 -> 2 (-50.0 %)" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("folded 4 of 5 norm layers; merged 5 layers into 2; worst error")
    model = bntools.load("model.folded.pt", allow="branch_models.RepConv")
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 2
    x = torch.randn(2, 3, 16, 16)
    assert difference(outputs(model, x), outputs(original(), x)) < 1e-5


def test_json_has_the_merges(folder):
    data = json.loads(fold("--merge-branches", "--json", "-q").stdout)
    merging = data["merging"]
    assert [row["rewritten"] for row in merging["merges"]] == ["0", "1"]
    assert merging["before"]["convolutions"] == 4
    assert merging["after"]["convolutions"] == 2
    assert merging["left"] == []
    kinds = [edit["edit"] for edit in data["recipe"]["edits"]]
    assert kinds.count("merge-branches") == 2


def test_without_the_option_nothing_merges(folder):
    data = json.loads(fold("--json", "-q").stdout)
    assert data["merging"] is None


def test_a_folded_model_still_merges(folder):
    """A second run on what the first one wrote, which has no norm to fold there."""
    fold("-o", "folded.pt")
    words = ("--input-shape", "1x3x16x16", "--merge-branches", "-o", "merged.pt")
    result = run("fold", "folded.pt", *ALLOW, *words)
    assert "merged 5 layers into 2" in result.stdout
    assert bntools.load("merged.pt", allow="branch_models.RepConv")


def test_a_model_without_norms_merges_and_is_written(folder):
    plain = RepConv(3, 3)
    plain.rbr_identity = None
    for branch in (plain.rbr_dense, plain.rbr_1x1):
        branch[1] = nn.Identity()
    torch.save(plain.eval(), "model.pt")
    result = fold("--merge-branches", "-o", "merged.pt")
    assert "merged 2 layers into 1" in result.stdout
    model = bntools.load("merged.pt", allow="branch_models.RepConv")
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1


def test_two_layers_in_a_row_merge_on_request(folder):
    layers = [nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)]
    torch.save(nn.Sequential(*layers).eval(), "model.pt")
    result = fold("--merge-linear", "-o", "merged.pt")
    assert "merged 2 layers into 1" in result.stdout
    assert "FLOPs" in result.stdout
    assert sum(isinstance(m, nn.Conv2d) for m in bntools.load("merged.pt").modules()) == 1


def test_a_dry_run_shows_what_would_merge_and_writes_nothing(folder):
    """On a folded copy: the table, the sizes and the check are those of the run itself."""
    before = sorted(path.name for path in folder.iterdir())
    dry = fold("--merge-branches", "--dry-run")
    assert "merged, rewriting 1" in dry.stdout
    assert "convolutions 4 -> 2 (-50.0 %)" in dry.stdout
    assert "would write model.folded.pt" in dry.stderr
    assert "which is not written" in dry.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    assert dry.stdout == fold("--merge-branches").stdout
    again = fold("--merge-branches", "--dry-run")
    assert "which exists: that takes --force" in again.stderr


def test_a_dry_run_has_the_merges_of_linear_layers_as_json(folder):
    layers = [nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)]
    torch.save(nn.Sequential(*layers).eval(), "model.pt")
    data = json.loads(fold("--merge-linear", "--dry-run", "--json", "-q").stdout)
    assert [row["layers"] for row in data["merging"]["merges"]] == [["0", "2"]]
    assert data["files"]["output"] is None if "files" in data else data["output"] is None
    assert not (folder / "model.folded.pt").exists()


def test_a_merged_model_exports_and_verifies(folder):
    """Through the file, to ONNX, against the original."""
    fold("--merge-branches", "-o", "merged.pt")
    run("export", "merged.pt", *ALLOW, "--input-shape", "1x3x16x16", "-o", "merged.onnx")
    run("verify", "model.pt", "merged.onnx", *ALLOW, "--input-shape", "1x3x16x16")


def test_a_merge_can_be_unfolded(folder):
    """What was kept brings every branch back, to the bit."""
    model = original()
    result = bntools.fold(
        copy.deepcopy(model), torch.rand(1, 3, 16, 16), merge_branches=True, keep_originals=True
    )
    back = bntools.unfold(result.model)
    back = getattr(back, "model", back)
    assert [name for name, _ in back.named_modules()] == [name for name, _ in model.named_modules()]
    x = torch.randn(2, 3, 16, 16)
    assert difference(outputs(back, x), outputs(model, x)) == 0
