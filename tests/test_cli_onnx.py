"""`bntools fold` and `bntools inspect` with an ONNX file: streams, files, exit codes, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from bntools_cli.main import program
from click.testing import CliRunner
from onnx_folds import FOLDS, KEEPS, Net

import bntools


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, with a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    onnx.save(FOLDS["split"][0](), "model.onnx")
    return tmp_path


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(program, [*map(str, arguments)])
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def test_one_command_leads_to_a_verified_file(folder: Path):
    """The table is stdout, the rest stderr; the file is the model's name with another ending."""
    before = Path("model.onnx").read_bytes()
    result = run("fold", "model.onnx")
    assert "batchnormalization_p  BatchNormalization  -> conv_c" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("folded 2 of 2 norm layers; worst error")
    assert result.stderr.splitlines() == [
        "input: x=2x3x8x8 float32 (inferred; override with --input-shape)",
        "wrote model.folded.onnx",
    ]
    assert Path("model.onnx").read_bytes() == before
    assert bntools.verify("model.onnx", "model.folded.onnx")
    run("verify", "model.onnx", "model.folded.onnx")


def test_a_dry_run_writes_nothing(folder: Path):
    """It says what it would do."""
    result = run("fold", "model.onnx", "--dry-run", "-o", "small.onnx")
    assert result.stdout.splitlines()[-1] == "2 of 2 norm layers would fold"
    assert "would write small.onnx" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_json_and_report_have_one_document():
    """As for a PyTorch model."""
    result = run("fold", "model.onnx", "--json", "--report", "report.json", "-o", "a.onnx")
    document = json.loads(result.stdout)
    assert document == json.loads(Path("report.json").read_text())
    assert document["model"] == "model.onnx"
    assert document["output"] == "a.onnx"
    assert [each["action"] for each in document["decisions"]] == ["fold", "fold"]
    assert document["check"]["native"]["outputs"][0]["passed"] is True


def test_options_choose_norms_and_inputs(folder: Path):
    """Those that PyTorch models have."""
    result = run(
        "fold",
        "model.onnx",
        "--only",
        "*_p",
        "--input-shape",
        "1x3x8x8",
        "--seed",
        "3",
        "-o",
        "o.onnx",
    )
    assert "folded 1 of 2 norm layers" in result.stdout
    assert "input: x=1x3x8x8 float32" in result.stderr
    assert "skipped" in result.stdout
    again = run("fold", "model.onnx", "-o", "o.onnx", code=3)
    assert "it exists" in again.stderr
    run("fold", "model.onnx", "-o", "o.onnx", "--force", "--quiet")


@pytest.mark.parametrize(
    "option", ["--merge-branches", "--pad-forward", "--device=cpu", "--arch=torchvision:resnet18"]
)
def test_options_for_pytorch_models_are_refused(option: str):
    """Malformed options: exit code 2."""
    assert "is for PyTorch models" in run("fold", "model.onnx", option, code=2).stderr


def test_where_nothing_folds_nothing_is_written(folder: Path):
    """Exit code 0, and the reason in the table."""
    onnx.save(KEEPS["behind a sigmoid"][0](), "kept.onnx")
    result = run("fold", "kept.onnx")
    assert "not-after-linear" in result.stdout
    assert "nothing was folded, so no model is written" in result.stderr
    assert not Path("kept.folded.onnx").exists()


def test_the_doctor_examines_an_onnx_file():
    """Statistics, decisions, findings, and the exit code that is asked for."""
    net = Net("n", 3, 8, 8).conv("x", "c", (6, 3, 3, 3), bias=True).bn("c", "y", 6)
    net.weights["y_var"][1] = -0.5
    onnx.save(net.model(), "ill.onnx")
    result = run("inspect", "ill.onnx", "--fail-on", "error", code=1)
    assert "batchnormalization_y" in result.stdout
    assert "negative-variance" in result.stdout
    document = json.loads(run("inspect", "model.onnx", "--json", "--skip", "*_q").stdout)
    assert [each["path"] for each in document["layers"]] == ["batchnormalization_p"]


def test_a_damaged_file_is_one_line(folder: Path):
    """Exit code 3, and no traceback."""
    Path("cut.onnx").write_bytes(Path("model.onnx").read_bytes()[:-40])
    for command in ("fold", "inspect"):
        result = run(command, "cut.onnx", code=3)
        assert len(result.stderr.strip().splitlines()) == 1
        assert "Cannot load cut.onnx" in result.stderr


def test_other_verbs_say_what_takes_an_onnx_file():
    """An ONNX model is no module that could be frozen."""
    result = run("freeze", "model.onnx", "-o", "f.pt", code=3)
    assert "ONNX" in result.stderr
