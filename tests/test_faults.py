"""Faults planted in folds are caught where they matter, and correct folds raise no alarm.

By default few layers of each architecture, and ONNX Runtime for two. `pytest -m slow
tests/test_faults.py` plants more, in all of them on both runtimes; `python tests/faults_table.py`
counts.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from faults import (
    ARCHITECTURES,
    KINDS,
    PLANTED_IN_NORM,
    Fault,
    Outcome,
    correct_folds,
    fold_of,
    severity,
)
from torch import nn

import bntools
from bntools.depth import compare_layers
from bntools.modules import replace_modules
from bntools.verifying import Reference

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
SMALL = ["digits", "dcgan"]


def check(outcomes: list[Outcome]) -> None:
    """Whatever matters is caught on every runtime; the rest is named, layer by layer."""
    missed = [o for o in outcomes if o.matters and not all(o.caught.values())]
    assert not missed, [(str(o.fault), o.change, o.caught) for o in missed]
    for outcome in outcomes:
        if not outcome.matters:
            assert all(map(outcome.is_named, outcome.caught)), (str(outcome.fault), outcome.layers)
    assert sum(outcome.matters for outcome in outcomes) >= len(outcomes) // 2


@every_architecture
def test_faults_that_matter_are_caught_and_all_others_named(name):
    fold = fold_of(name)
    count = {"digits": 4, "dcgan": 4, "efficientnet_b0": 1, "lraspp_mobilenet_v3_large": 1}.get(
        name, 2
    )
    check([fold.outcome(fault) for fault in fold.faults(count, channels=1)])


@pytest.mark.parametrize("name", SMALL)
def test_faults_in_onnx_runtime_are_caught(name, tmp_path):
    fold = fold_of(name)
    assert fold.reference.judge(fold.exported(tmp_path / "good.onnx"))
    check([fold.outcome(fault, tmp_path) for fault in fold.faults(3, channels=1)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@every_architecture
def test_faults_all_over_each_network_are_caught_on_both_runtimes(name, tmp_path):
    fold = fold_of(name)
    assert fold.reference.judge(fold.exported(tmp_path / "good.onnx"))
    check([fold.outcome(fault, tmp_path) for fault in fold.faults(6, channels=2)])


# The faults are those that they claim to be


@pytest.mark.parametrize("kind", [*PLANTED_IN_NORM, "dropped norm"])
@torch.no_grad()
def test_fold_with_a_fault_is_the_fold_of_a_network_with_that_fault(kind):
    fold = fold_of("digits")
    path = fold.paths[3]
    network = copy.deepcopy(fold.model)
    if kind == "dropped norm":
        replace_modules(network, {path: nn.Identity()})
    else:
        PLANTED_IN_NORM[kind](network.get_submodule(path), 2)
    wanted = bntools.fold(network, fold.inputs).model.state_dict()
    planted = fold.faulty(Fault(kind, path, 2)).state_dict()
    assert wanted.keys() == planted.keys()
    assert all(torch.equal(tensor, planted[name]) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", KINDS)
def test_fault_changes_its_layer_and_those_after_it_only(kind):
    fold = fold_of("digits")
    path = fold.paths[4]
    report = compare_layers(fold.model, fold.faulty(Fault(kind, path, 1)), fold.inputs)
    names = [layer.path for layer in report.layers]
    assert report.first_different.path == path
    assert all(layer.agrees for layer in report.layers[: names.index(path)])


def test_onnx_model_with_the_numbers_of_the_correct_fold_is_equal(tmp_path):
    """The edit of the file alone is no fault."""
    fold = fold_of("digits")
    fold.exported(tmp_path / "good.onnx")
    same = fold.faulty_onnx(fold.correct, tmp_path / "same.onnx")
    assert same.read_bytes() == (tmp_path / "good.onnx").read_bytes()
    assert fold.reference.judge(same)


# No false alarms


def judged(name: str, model: nn.Module, x: torch.Tensor, folded: nn.Module | Path) -> None:
    result = Reference(model, x).judge(folded, per_layer=True)
    assert severity(result) < 1, f"{name}: {result}"
    assert result, f"{name}: {result}"
    assert result.layers, f"{name}: {result.layers}"


def test_fifty_correct_folds_raise_no_alarm():
    for fold in correct_folds(50, nets=False):
        judged(*fold)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_correct_folds_of_small_nets_and_random_ones_raise_no_alarm():
    for fold in correct_folds(200):
        judged(*fold)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_correct_folds_raise_no_alarm_in_onnx_runtime(tmp_path):
    for name, model, x, folded in correct_folds(50):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
        program.save(str(tmp_path / "folded.onnx"))
        judged(name, model, x, tmp_path / "folded.onnx")


def test_public_verify_catches_a_fault_and_names_the_layer():
    fold = fold_of("digits")
    faulty = fold.faulty(Fault("shifted mean", fold.paths[5], 2))
    result = bntools.verify(fold.model, faulty, fold.inputs, per_layer=True)
    assert not result
    assert result.layers.first_different.path == fold.paths[5]
