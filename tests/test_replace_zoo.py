"""Models that people use, with other norms: all run, train, reload and (in the zoo) export."""

from __future__ import annotations

import pytest
from replace_table import CLASSIFIERS, TABLE, TARGETS, measure, read, summary

SMALL = ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5")

pytestmark = [
    # what third-party models and the exporter warn about is not ours to judge
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1800),
]
every_target = pytest.mark.parametrize("target", TARGETS)


@every_target
@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_runs_trains_and_reloads_with_every_target(name, target):
    row = measure(f"torchvision:{name}", target, export=False)
    assert row.note == ""
    assert row.replaced == row.norms > 0
    assert row.runs
    assert row.trains
    assert row.reloads
    assert (row.activations > 0) == target.startswith("evonorm")


@pytest.mark.zoo
@every_target
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_torchvision_takes_every_target(name, target):
    row = measure(name, target)
    assert row.sound, row
    assert row.kept in ("", "not-executed:1", "not-executed:2")


def test_the_committed_table_is_sound():
    rows = read(TABLE)
    assert rows
    assert [str(row) for row in rows.values() if not row.sound] == []
    assert "groupnorm" in summary(rows.values())
