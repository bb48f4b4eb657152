"""Every format and every verb that it supports: what a model gives is the same after a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from round_trips import ARCHITECTURES, ENDINGS, MODEL_VERBS, read

import bntools
from bntools.formats.table import supported

HERE = Path(__file__).parent


def run(*arguments: str) -> str:
    """Run the script in a process of its own."""
    command = [sys.executable, "-m", "round_trips", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def wanted() -> set[tuple[str, str]]:
    """Every (format, verb) of the table of which the result is a model, and the model itself."""
    verbs = {entry.key: entry.verbs for entry in supported()}
    verbs["state dict"] = verbs["torch.save"]
    assert set(verbs) == set(ENDINGS)
    pairs = {(name, verb) for name in ENDINGS for verb in verbs[name] & MODEL_VERBS.keys()}
    return pairs | {(name, "base") for name in ENDINGS}


def judge(found: list[dict[str, Any]], archs: list[str]) -> None:
    """Everything was tried, nothing differs by a bit, and recipes are as they were."""
    counted = [(row["format"], row["verb"]) for row in found]
    assert set(counted) == wanted()
    assert len(counted) == len(wanted()) * len(archs)
    assert [row for row in found if row["error"] != 0.0 or not row["same_recipe"]] == []


def test_odd_parts_make_every_round_trip_in_a_fresh_process(tmp_path):
    """A SyncBatchNorm, a tied weight, a norm written by hand; bits, not tolerances."""
    run("write", str(tmp_path), "round_trips:odd")
    judge(json.loads(run("read", str(tmp_path))), ["round_trips:odd"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "round_trips:odd"])
def test_networks_make_every_round_trip_in_a_fresh_process(arch, tmp_path):
    run("write", str(tmp_path), arch)
    judge(json.loads(run("read", str(tmp_path))), [arch])


def test_a_difference_of_one_bit_is_found(tmp_path):
    """The comparison can fail: one weight of a file is one step away, or a recipe is shorter."""
    model, x = bntools.load("round_trips:sample"), torch.rand(4, 1, 8, 8)
    result = bntools.fold(model, x)
    file = tmp_path / "a.pth"
    bntools.save(result, file, state_dict=True)
    told = {"arch": "round_trips:sample", "format": "state dict", "verb": "fold", "file": file.name}
    (tmp_path / "a.pth.json").write_text(json.dumps({**told, "recipe": result.recipe.to_dict()}))
    torch.save({"outputs": [result.model(x).detach()], "input": x}, tmp_path / "a.pth.expected")
    assert read(tmp_path) == [{**told, "error": 0.0, "same_recipe": True}]
    content = torch.load(file, weights_only=True)
    weight = content["state_dict"]["0.weight"].view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(content, file)
    assert 0 < read(tmp_path)[0]["error"] < 1e-5
    (tmp_path / "a.pth.json").write_text(json.dumps({**told, "recipe": {}}))
    assert read(tmp_path)[0]["same_recipe"] is False
