"""Models that people use: all are recorded, every foldable layer folds, and the numbers stay.

A cross-section runs with every `pytest`, the whole zoo with `pytest -m zoo`, which also writes
`zoo_table.csv` (`zoo_table.py` writes it without pytest).
"""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import zoo_table
from randomise import norms, randomise, settle
from zoo_models import CROSS_SECTION, MODELS, TORCHVISION, has_no_norms
from zoo_table import LIMIT, TABLE, Row, crowd, measure

import bntools

pytestmark = [
    # what third-party models warn about is not ours to judge
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]
everywhere = pytest.mark.parametrize("name", MODELS)
cross_section = pytest.mark.parametrize("name", CROSS_SECTION)


@functools.cache
def row_of(name: str) -> Row:
    return measure(MODELS[name])


@functools.cache
def oracle_counts() -> dict[str, str]:
    return zoo_table.oracle_counts()


@functools.cache
def committed() -> dict[str, Row]:
    return zoo_table.read(TABLE)


def check(row: Row) -> None:
    assert not row.note
    assert row.norms > 0
    assert row.error <= LIMIT
    if row.fx_folded.isdigit():
        assert row.folded >= int(row.fx_folded)


def check_against_oracle(name: str) -> None:
    if name not in oracle_counts():
        pytest.skip("the oracle has not counted this model")
    assert row_of(name).folded >= int(oracle_counts()[name])


@cross_section
def test_a_model_of_the_cross_section_folds_and_gives_the_same_numbers(name):
    check(row_of(name))


@cross_section
def test_every_layer_that_the_oracle_folds_in_the_cross_section_is_folded(name):
    check_against_oracle(name)


@cross_section
def test_fold_proves_a_model_of_the_cross_section_in_float32(name):
    entry = MODELS[name]
    model = entry.build().eval()
    inputs = entry.example(1)
    randomise(model)
    settle(model, crowd(entry))
    result = bntools.fold(model, inputs)
    check = result.report.check
    assert check is not None
    assert check
    assert check.rolled_back == ()
    assert len([d for d in result.report.folds if not d.affine]) == row_of(name).folded
    folded = {d.path for d in result.report.folds}
    assert norms(result.model).keys().isdisjoint(folded)
    assert len(norms(result.model)) == row_of(name).norms - row_of(name).folded
    assert bntools.verify(model, result.model, entry.example(3))


@pytest.mark.zoo
@everywhere
def test_a_model_of_the_zoo_folds_and_gives_the_same_numbers(name, capsys):
    before = committed().get(name)
    row = row_of(name)
    with capsys.disabled():
        sys.stdout.write(f"\n{row}\n")
    zoo_table.write({**zoo_table.read(TABLE), name: row}, TABLE)
    check(row)
    assert before is None or row.folded >= before.folded


@pytest.mark.zoo
@everywhere
def test_every_layer_that_the_oracle_folds_is_folded(name):
    check_against_oracle(name)


def test_the_zoo_has_every_model_of_torchvision_that_may_hold_norms():
    from torchvision.models import list_models

    known = [name for name in list_models(exclude="quantized_*") if not has_no_norms(name)]
    assert sorted(TORCHVISION) == known


@pytest.mark.zoo
def test_the_models_of_torchvision_that_are_left_out_hold_no_norms():
    from torchvision import models

    for name in filter(has_no_norms, models.list_models(exclude="quantized_*")):
        options = {"weights_backbone": None} if name.startswith("ssd") else {}
        with torch.device("meta"):
            model = models.get_model(name, weights=None, **options)
        assert not norms(model), name
