"""`bntools export` as a user meets it: streams, files, exit codes, every option."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from randomise import randomise
from torch import nn

from bntools import publishing

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.stderr
    return result


def save(model: nn.Module, name: str = "model.pt") -> str:
    torch.save(model, name)
    return name


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    randomise(model)
    return model.eval()


def test_one_command_leads_from_the_sample_to_a_verified_file(folder):
    result = run(SAMPLE, "-o", "digits.onnx", "--provider", "cpu")
    summary = result.stdout.splitlines()[-1]
    assert "any batch size; folded 9 of 9 norm layers; worst error" in summary
    assert "4.downsample.1  BatchNorm2d  -> 4.downsample.0" in result.stdout
    assert result.stderr.splitlines() == [
        "input: 1x1x64x64 float32 (inferred; override with --input-shape)",
        "wrote digits.onnx",
    ]
    onnx.checker.check_model("digits.onnx", full_check=True)


def test_the_file_is_beside_the_model_and_json_and_report_say_the_same(folder):
    name = save(net())
    result = run(name, "--json", "--report", "report.json", "--provider", "cpu")
    data = json.loads(result.stdout)
    assert data == json.loads(Path("report.json").read_text("utf-8"))
    assert (data["model"], data["output"], data["path"]) == (name, "model.onnx", "model.onnx")
    assert data["equivalent"] is True
    assert data["schema"] == 1
    assert [edit["edit"] for edit in data["recipe"]["edits"]] == ["add-bias", "drop-norm"]
    assert {p.key: p.value for p in onnx.load("model.onnx").metadata_props}[
        "bntools_source"
    ] == name


def test_options_reach_the_export(folder):
    name = save(net())
    arguments = (
        "--no-fold", "--static-batch", "--opset", "18", "--dtype", "float16", "-v",
        "--input-shape", "2x3x8x8", "--seed", "7", "--provider", "cpu",
    )  # fmt: skip
    result = run(name, *arguments)
    assert "opset 18, a fixed batch size; 1 BatchNormalization node; worst error" in result.stdout
    assert "original float16 model" in result.stdout
    said = result.stderr
    assert "inputs: input: 2x3x8x8 float16" in said
    assert "nodes: 1 BatchNormalization, 1 Conv, 1 Relu" in said
    assert "time: record" in said
    assert "ran: ONNX Runtime" in said
    assert "torch.onnx" not in result.stdout


def test_quiet_prints_the_summary_alone(folder):
    result = run(save(net()), "-q", "--provider", "cpu")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_a_failed_check_is_exit_code_1_and_writes_the_report_alone(folder, monkeypatch):
    right = publishing.export

    def wrong(*args: Any, **options: Any) -> Any:
        made = right(*args, **options)
        next(node for node in made.graph.graph if node.op_type == "Relu").op_type = "Sigmoid"
        return made

    monkeypatch.setattr(publishing, "export", wrong)
    arguments = ("--report", "report.json", "--provider", "cpu")
    result = run(save(net()), *arguments, code=1)
    assert "failed: ONNX Runtime computes something else" in result.stderr
    assert "NOT equivalent" in result.stdout
    assert "DIFFERS" in result.stdout
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt", "report.json"]
    assert json.loads(Path("report.json").read_text("utf-8"))["output"] is None


def test_a_model_saved_in_training_mode_is_refused_and_eval_is_the_cure(folder):
    name = save(net().train())
    result = run(name, code=3)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: Cannot export the model: it is in training mode")
    assert "--eval" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    run(name, "--eval", "--provider", "cpu")
    assert Path("model.onnx").is_file()


def test_an_existing_file_needs_force(folder):
    name = save(net())
    Path("model.onnx").write_text("old")
    result = run(name, code=3)
    assert "Cannot write model.onnx: it exists" in result.stderr
    assert Path("model.onnx").read_text() == "old"
    run(name, "--force", "--provider", "cpu")
    onnx.checker.check_model("model.onnx")


def test_an_operation_that_onnx_has_not_is_one_line_that_names_it(folder):
    Path("nets.py").write_text(
        "import torch\n"
        "class Svd(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('hello')\n"
        "        return torch.linalg.svd(x)[1]\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Svd())\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict(), "weights.pth")
    made = subprocess.run(
        [sys.executable, "-m", "bntools_cli", "export", "weights.pth", "--provider", "cpu",
         "--arch", "nets:make", "--input-shape", "2x3x8x8"],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert made.returncode == 3, made.stderr
    assert made.stdout == ""
    last = made.stderr.splitlines()[-1]
    assert "there is no ONNX form of aten._linalg_svd, which 1 (Svd) calls" in last


def test_a_batch_size_that_is_fixed_is_noted_or_refused(folder):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Unflatten(0, (2, 144))).eval()
    name = save(model)
    shape = ("--input-shape", "2x3x8x8", "--provider", "cpu")
    result = run(name, *shape)
    assert "note: the batch size is fixed at that of the examples" in result.stderr
    assert "a fixed batch size" in result.stdout
    result = run(name, *shape, "--dynamic-batch", "-f", code=3)
    assert "with a free batch size" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--opset", "zero"),
        ("--dtype", "int8"),
        ("--provider", "tpu"),
        ("-o", "model.pt"),
        ("-o", "same.json", "--report", "same.json"),
        ("-o", "-"),
    ],
)
def test_malformed_options_are_exit_code_2(arguments, folder):
    save(net())
    result = run("model.pt", *arguments, code=2)
    assert result.stdout == ""
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt"]


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs signals")
def test_an_interrupt_is_exit_code_130_and_leaves_nothing(folder, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "open_session", interrupt)
    result = run(save(net()), code=130)
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt"]
