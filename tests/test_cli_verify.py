"""`bntools verify`: its answer, its exit codes, and its errors of one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from onnx_models import linear
from torch import nn

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model, a wrong copy of it, and an ONNX model beside its twin."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLE, "model.pt")
    model = torch.load("model.pt", weights_only=False)
    bias = [p for p in model.parameters() if p.dim() == 1][-1]
    bias.data[1] += 1e-3
    torch.save(model, "wrong.pt")
    onnx.save(linear(), "linear.onnx")
    onnx.save(linear(bias=1e-3), "wrong.onnx")
    weights = {
        w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy())
        for w in linear().graph.initializer
    }
    twin = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).eval()
    twin[0].weight.data, twin[0].bias.data = weights["w"].T.contiguous(), weights["b"]
    torch.save(twin, "twin.pt")
    return tmp_path


def verify(*arguments: str):
    result = CliRunner().invoke(program, ["verify", *map(str, arguments)])
    assert result.exit_code in (0, 1, 2, 3), result.output
    assert "Traceback" not in result.output
    return result


def test_equal_models_exit_with_0_and_say_where_it_ran(folder):
    result = verify("model.pt", "model.pt")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("equivalent: worst error 1x")
    assert "limit: " in result.stdout
    assert "batches of 3" in result.stderr
    assert "candidate: PyTorch on the CPU" in result.stderr


def test_models_that_differ_exit_with_1_and_name_the_output(folder):
    result = verify("model.pt", "wrong.pt")
    assert result.exit_code == 1
    assert "DIFFERS" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("NOT equivalent")


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        (("twin.pt", "linear.onnx"), 0),
        (("linear.onnx", "twin.pt"), 0),
        (("linear.onnx", "linear.onnx"), 0),
        (("twin.pt", "wrong.onnx"), 1),
        (("wrong.onnx", "linear.onnx"), 1),
    ],
    ids=str,
)
def test_files_of_either_runtime_are_judged(folder, pair, code):
    result = verify(*pair)
    assert result.exit_code == code, result.output
    if pair[1].endswith(".onnx"):
        assert "candidate: ONNX Runtime on the CPU" in result.stderr
        assert "nodes: " in result.stderr


def test_json_and_report_say_the_same(folder):
    result = verify("twin.pt", "wrong.onnx", "--json", "--report", "report.json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data == json.loads(Path("report.json").read_text("utf-8"))
    assert data["equivalent"] is False
    assert (data["reference"], data["candidate"]) == ("twin.pt", "wrong.onnx")
    (output,) = data["outputs"]
    assert {"error", "limit", "why", "cosine", "max_scaled", "top1", "part"} <= set(output)
    assert data["placement"]["provider"] == "cpu"
    assert data["batches"] == 3


def test_layers_and_their_picture(folder):
    result = verify("model.pt", "wrong.pt", "--plot", "errors.svg", "--json")
    assert result.exit_code == 1
    layers = json.loads(result.stdout)["layers"]
    assert layers["layers"]
    assert Path("errors.svg").read_text("utf-8").startswith("<?xml")
    assert "wrote errors.svg" in result.stderr
    text = verify("model.pt", "wrong.pt", "--per-layer").stdout
    assert "the first layer that differs" in text


def test_data_and_inputs_and_shapes_are_taken(folder):
    np.save("x.npy", np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32))
    assert "data: " in verify("twin.pt", "linear.onnx", "--data", "x.npy").stderr
    assert "7x4 float32" in verify("twin.pt", "linear.onnx", "--inputs", "x.npy").stderr
    shaped = verify("linear.onnx", "linear.onnx", "--input-shape", "5x4")
    assert shaped.exit_code == 0
    assert "5x4 float32, and batches of 3 and 1" in shaped.stderr


def test_precision_is_asked_for(folder):
    result = verify("model.pt", "model.pt", "--dtype", "float16")
    assert result.exit_code == 0
    assert "0.0078" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing.pt", "model.pt"), "nothing.pt: there is no such file"),
        (("model.pt", "nothing.onnx"), "nothing.onnx: there is no such file"),
        (("broken.onnx", "linear.onnx"), "broken.onnx: it is no ONNX model"),
        (("linear.onnx", "linear.onnx", "--input-shape", "2x5"), "x: nx4 float32"),
        (("model.pt", "linear.onnx"), "Cannot infer an input"),
        (("linear.onnx", "linear.onnx", "--runtime", "torch"), "it is an ONNX model"),
        (("linear.onnx", "linear.onnx", "--data", "nothing/"), "nothing"),
        (("linear.onnx", "linear.onnx", "--report", "no/where.json"), "no/where.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_what_cannot_be_done_exits_with_3_and_one_line(folder, arguments, says):
    Path("broken.onnx").write_bytes(b"no model")
    result = verify(*arguments)
    assert result.exit_code == 3
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert says in line


def test_cuda_that_cannot_be_had_exits_with_3(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = verify("model.pt", "model.pt", "--provider", "cuda")
    assert result.exit_code == 3
    assert "Cannot run PyTorch on CUDA" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.pt",),
        ("model.pt", "wrong.pt", "--inputs", "x.npy", "--data", "x.npy"),
        ("model.pt", "wrong.pt", "--input-shape", "1x3", "--data", "x.npy"),
        ("model.pt", "wrong.pt", "--report", "wrong.pt"),
        ("model.pt", "wrong.pt", "--plot", "model.pt"),
        ("model.pt", "wrong.pt", "--plot", "a.svg", "--report", "a.svg"),
        ("model.pt", "wrong.pt", "--dtype", "float8"),
        ("model.pt", "wrong.pt", "--provider", "tpu"),
        ("model.pt", "wrong.pt", "-q", "-v"),
        ("model.pt", "wrong.pt", "--batch-size", "4"),
        ("model.pt", "wrong.pt", "--no-shuffle"),
    ],
    ids=lambda value: " ".join(value[1:]) or "one model",
)
def test_options_that_make_no_sense_exit_with_2(folder, arguments):
    assert verify(*arguments).exit_code == 2


def test_data_that_do_not_suit_the_model_are_met_by_the_option_that_helps(folder):
    np.save("colour.npy", np.zeros((2, 3, 8, 8), np.float32))
    result = verify("model.pt", "model.pt", "--data", "colour.npy")
    assert result.exit_code == 3
    assert "Give --grayscale to make one channel of three." in result.stderr
