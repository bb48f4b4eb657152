"""`bntools replace`: its options, its streams, its exit codes, and that nothing is half-written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bntools_cli.main import program
from click.testing import CliRunner
from torch import nn

import bntools
from bntools import norms

SAMPLE = Path(__file__).parent.parent / "samples" / "digits_cnn.pt"
FACTORIES = """
from torch import nn


def make(norm):
    return nn.GroupNorm(1, norm.num_features)


def broken(norm):
    raise RuntimeError("no luck today")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the sample as model.pt, data, and a module to import."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model.pt").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "factories.py").write_text(FACTORIES)
    random = np.random.default_rng(0)
    np.savez("data.npz", random.random((64, 1, 16, 16), dtype=np.float32))
    yield tmp_path
    sys.modules.pop("factories", None)


def run(*arguments, code=0):
    result = CliRunner().invoke(program, ["replace", *(str(a) for a in arguments)])
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}"
    assert "Traceback" not in result.output
    return result


def files():
    return sorted(p.name for p in Path().iterdir() if p.name != "__pycache__")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("groupnorm", nn.GroupNorm),
        ("layernorm", nn.GroupNorm),
        ("instancenorm", nn.InstanceNorm2d),
        ("evonorm-s0", norms.EvoNorm2dS0),
        ("evonorm-b0", norms.EvoNorm2dB0),
        ("factories:make", nn.GroupNorm),
    ],
)
def test_every_target_is_written_beside_the_model_and_loads(folder, name, kind):
    result = run("model.pt", "--with", name)
    assert "wrote model.replaced.pt" in result.stderr
    assert "not fitted" in result.stderr
    assert f"norm layers by {name}" in result.stdout.splitlines()[-1]
    model = bntools.load("model.replaced.pt")
    assert any(type(module) is kind for module in model.modules())
    assert model(torch.rand(2, 1, 16, 16)).isfinite().all()


def test_options_of_the_target_reach_it(folder):
    run("model.pt", "--with", "groupnorm", "--groups", 2, "-o", "a.pt")
    assert bntools.load("a.pt")[1].num_groups == 2
    run("model.pt", "--with", "groupnorm", "--channels-per-group", 4, "-o", "b.pt")
    assert bntools.load("b.pt")[1].num_groups == 4
    run("model.pt", "--with", "layernorm", "--over", "channels", "-o", "c.pt")
    assert type(bntools.load("c.pt")[1]) is norms.ChannelLayerNorm


def test_keep_activation_and_no_activation_reach_the_library(folder):
    data = json.loads(
        run("model.pt", "--with", "evonorm-s0", "--keep-activation", "-n", "--json").stdout
    )
    assert not any(row["activation"] for row in data["layers"])
    data = json.loads(
        run("model.pt", "--with", "evonorm-s0", "--no-activation", "keep", "-n", "--json").stdout
    )
    assert "no-activation" in {row["reason"] for row in data["layers"]}


def test_a_fit_with_auto_groups_and_a_few_steps_of_distillation(folder):
    result = run(
        "model.pt", "--with", "groupnorm", "--groups", "auto", "--fit", "data.npz",
        "--distill", 2, "--batch-size", 16, "--cache", 64, "--json", "--report", "report.json",
    )  # fmt: skip
    data = json.loads(result.stdout)
    assert data == json.loads(Path("report.json").read_text())
    assert data["fit"]["samples"] == 64
    assert data["distilled"]["steps"] == 2
    assert {row["path"] for row in data["fit"]["layers"]} == {r["path"] for r in data["layers"]}
    assert data["output"] == "model.replaced.pt"
    assert "not fitted" not in result.stderr
    groups = {edit["path"]: edit["target"]["groups"] for edit in data["recipe"]["edits"]}
    model = bntools.load("model.replaced.pt")
    assert {path: model.get_submodule(path).num_groups for path in groups} == groups


def test_only_and_skip_choose_and_the_rest_folds(folder):
    run("model.pt", "--with", "evonorm-s0", "--only", "3.*", "-o", "some.pt")
    folded = CliRunner().invoke(program, ["fold", "some.pt"])
    assert folded.exit_code == 0
    assert "folded 8 of 8" in folded.stdout  # the affine that ends the branch is one of them
    kinds = [e["edit"] for e in bntools.read_model("some.folded.pt").recipe["edits"]]
    assert kinds[:3] == ["replace-norm", "replace-norm", "remove-activation"]


def test_a_dry_run_writes_nothing(folder):
    before = files()
    assert "would write model.replaced.pt" in run("model.pt", "--with", "layernorm", "-n").stderr
    assert files() == before


def test_where_nothing_is_replaced_nothing_is_written(folder):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), "bare.pt")
    result = run("bare.pt", "--with", "layernorm")
    assert "no norm layer to replace" in result.stdout
    assert "no model is written" in result.stderr
    assert "bare.replaced.pt" not in files()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--with", "gruopnorm"], "Did you mean groupnorm"),
        (["--with", "groupnorm", "--groups", "0"], "neither a whole number from 1 nor"),
        (["--with", "groupnorm", "--groups", "some"], "some"),
        (["--with", "groupnorm", "--groups", "auto"], "--groups auto needs data: give --fit"),
        (["--with", "groupnorm", "--channels-per-group", "0"], "not in the range"),
        (["--with", "groupnorm", "--groups", "2", "--channels-per-group", "2"], "not both"),
        (["--with", "layernorm", "--groups", "2"], "no such option"),
        (["--with", "layernorm", "--over", "images"], "images"),
        (["--with", "groupnorm", "--keep-activation"], "is for evonorm"),
        (["--with", "groupnorm", "--no-activation", "keep"], "is for evonorm"),
        (["--with", "groupnorm", "--distill", "5"], "--distill needs data"),
        (["--with", "groupnorm", "--distill", "0", "--fit", "data.npz"], "not in the range"),
        (["--with", "factories:nothing"], "has no 'nothing'"),
        ([], "--with"),
    ],
)
def test_malformed_options_are_told_and_nothing_is_written(folder, arguments, said):
    before = files()
    result = CliRunner().invoke(program, ["replace", "model.pt", *arguments])
    assert result.exit_code == (3 if "factories:nothing" in arguments else 2), result.output
    assert said in result.stderr
    assert files() == before


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((0, 1, 16, 16), np.float32),
        np.full((64, 1, 16, 16), math.nan, np.float32),
        np.zeros((1, 1, 1, 1), np.float32),
        np.zeros((8, 3, 16, 16), np.float32),
    ],
    ids=["empty", "not finite", "too small", "of other channels"],
)
def test_data_that_cannot_be_fitted_to_is_told_and_nothing_is_written(folder, data):
    np.savez("bad.npz", data)
    before = files()
    result = run("model.pt", "--with", "groupnorm", "--fit", "bad.npz", code=3)
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot")
    assert files() == before


def test_an_existing_output_is_found_before_the_work(folder):
    Path("model.replaced.pt").write_text("mine")
    result = run("model.pt", "--with", "layernorm", code=3)
    assert "--force" in result.stderr
    assert Path("model.replaced.pt").read_text() == "mine"
    run("model.pt", "--with", "layernorm", "-f")


def test_a_factory_that_fails_is_told(folder):
    result = run("model.pt", "--with", "factories:broken", code=3)
    assert "no luck today" in result.stderr
    assert "model.replaced.pt" not in files()


def test_output_and_report_of_one_name_are_refused(folder):
    run("model.pt", "--with", "layernorm", "-o", "x.json", "--report", "x.json", code=2)
