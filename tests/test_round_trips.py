"""Every format and every verb that it supports: what a model gives is the same after a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from round_trip_answers import ANSWER_VERBS, QUICK, SLOW, Case, health
from round_trips import ARCHITECTURES, ENDINGS, MODEL_VERBS, read, verbs_of

import bntools
from bntools.formats.interface import EVERY_VERB

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


def test_every_verb_and_format_of_the_table_is_tried():
    """A new one in the table needs a way of being tried here."""
    assert MODEL_VERBS.keys() | ANSWER_VERBS.keys() == EVERY_VERB
    assert not MODEL_VERBS.keys() & ANSWER_VERBS.keys()
    assert verbs_of().keys() == ENDINGS.keys()
    assert QUICK[0] in ENDINGS


def wanted(verbs: Iterable[str]) -> set[tuple[str, str]]:
    """Every (format, verb) of the table, where the verb is one of these."""
    return {
        (name, verb) for name, taken in verbs_of().items() for verb in taken.intersection(verbs)
    }


def judge(found: list[dict[str, Any]], archs: list[str]) -> None:
    """Everything was tried, nothing differs by a bit, and recipes are as they were."""
    counted = [(row["format"], row["verb"]) for row in found]
    pairs = wanted(MODEL_VERBS) | {(name, "base") for name in ENDINGS}
    assert set(counted) == pairs
    assert len(counted) == len(pairs) * len(archs)
    assert [row for row in found if row["error"] != 0.0 or not row["same_recipe"]] == []


def judge_answers(found: list[dict[str, Any]], *, quick: bool = False) -> None:
    """Every command was tried, and what it says of a file is what it says of the model."""
    pairs = wanted(ANSWER_VERBS)
    if quick:
        pairs = {(name, verb) for name, verb in pairs if verb not in SLOW or name in QUICK}
    assert {(row["format"], row["verb"]) for row in found} == pairs
    assert len(found) == len(pairs)
    assert [row for row in found if row["problem"]] == []


def test_odd_parts_make_every_round_trip_in_a_fresh_process(tmp_path):
    """A SyncBatchNorm, a tied weight, a norm written by hand; bits, not tolerances."""
    run("write", str(tmp_path), "round_trips:odd")
    judge(json.loads(run("read", str(tmp_path))), ["round_trips:odd"])
    judge_answers(json.loads(run("answer", str(tmp_path), "--quick")), quick=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_networks_make_every_round_trip_in_a_fresh_process(arch, tmp_path):
    run("write", str(tmp_path), arch)
    judge(json.loads(run("read", str(tmp_path))), [arch])
    judge_answers(json.loads(run("answer", str(tmp_path))))


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A file that is not quite its model: one statistic has moved."""
    folder = tmp_path_factory.mktemp("pair")
    model, x = bntools.load("round_trips:sample"), torch.rand(4, 1, 8, 8)
    bntools.save(model, folder / "a.pt")
    with torch.no_grad():
        expected = [model(x).clone()]
        model[1].running_mean[0] += 0.5
    bntools.save(model, folder / "b.safetensors")
    return Case(
        folder / "b.safetensors", "round_trips:sample", "safetensors", folder / "a.pt", x, expected
    )


@pytest.mark.parametrize("verb", sorted(ANSWER_VERBS))
def test_a_file_that_is_not_its_model_is_found_by_every_answer(verb, pair):
    """The checks can fail."""
    assert ANSWER_VERBS[verb](pair)


def test_the_health_of_a_layer_is_compared_whatever_the_format_calls_it():
    """Kinds and names of affines differ between formats; statistics and folds may not."""
    x = torch.rand(4, 1, 8, 8)
    model = bntools.load("round_trips:sample")
    first = bntools.inspect(model, x).to_dict()
    assert len(health(first, folds=True)) == 9
    model[1].running_var[0] *= 2
    second = bntools.inspect(model, x).to_dict()
    assert health(first, folds=False) != health(second, folds=False)
