"""Consecutive linear layers become one, where that makes the model smaller."""

from __future__ import annotations

import pytest
import torch
from randomise import difference, outputs, randomise
from torch import nn

import bntools
from bntools.errors import SurgeryError
from bntools.recipe import Edit, Recipe, apply_edits
from bntools.report import Reason

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
MAPS = (1, 6, 11, 13)


def conv(inputs: int, outputs_: int, kernel: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs_, kernel, **options)


def merged(model: nn.Module, shape=MAPS, **options):
    torch.manual_seed(0)
    randomise(model.eval())
    return bntools.fold(model, torch.randn(shape), merge_linear=True, **options)


def layer_count(model: nn.Module) -> int:
    return sum(isinstance(module, LAYERS) for module in model.modules())


def is_same(model, result, shape=MAPS) -> bool:
    x = torch.randn(3, *shape[1:])
    return difference(outputs(result.model, x), outputs(model, x)) < 1e-5


MERGES = {
    "1x1 after 3x3": (lambda: [conv(6, 16, 3, padding=1), conv(16, 6, 1)], MAPS),
    "1x1 before padded": (lambda: [conv(6, 16, 1, bias=False), conv(16, 6, 3, padding=1)], MAPS),
    "1x1 before unpadded": (lambda: [conv(6, 16, 1), conv(16, 6, 3)], MAPS),
    "3x3 twice": (lambda: [conv(6, 16, 3), conv(16, 6, 3)], MAPS),
    "strides": (lambda: [conv(6, 16, 3, stride=2), conv(16, 6, 1, stride=2)], MAPS),
    "linear": (lambda: [nn.Linear(6, 32), nn.Linear(32, 6)], (2, 6)),
    "three": (lambda: [nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 6)], (2, 5, 6)),
    "norm between": (lambda: [conv(6, 16, 1), nn.BatchNorm2d(16), conv(16, 6, 1)], MAPS),
    "dropout between": (lambda: [conv(6, 16, 1), nn.Dropout(0.5), conv(16, 6, 1)], MAPS),
    "other modules": (
        lambda: [nn.Sequential(conv(6, 16, 1)), nn.Sequential(conv(16, 6, 1), nn.ReLU())],
        MAPS,
    ),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_sequence_becomes_one_layer_with_its_path(name):
    """No forward changes: the first becomes Identity, the second another layer."""
    layers, shape = MERGES[name]
    model = nn.Sequential(*layers())
    result = merged(model, shape)
    assert layer_count(result.model) == 1
    assert type(result.model) is nn.Sequential
    report = result.report.merging
    assert all(row.rewritten is None for row in report.merges)
    assert report.after.parameters < report.before.parameters
    assert report.after.flops < report.before.flops
    assert result.report.check.float64.outputs[0].error < 1e-13
    assert is_same(model, result, shape)


REFUSED = {
    "a bias before padding": (
        [conv(6, 16, 1), conv(16, 6, 3, padding=1)],
        [Reason.PADDED_BETWEEN],
        MAPS,
    ),
    "a bottleneck": ([nn.Linear(6, 2), nn.Linear(2, 6)], [Reason.COSTS_MORE], (2, 6)),
    "as many parameters": (
        [nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False)],
        [Reason.COSTS_MORE],
        (2, 6),
    ),
    "depthwise before pointwise": (
        [conv(6, 6, 3, padding=1, groups=6), conv(6, 12, 1)],
        [Reason.COSTS_MORE],
        MAPS,
    ),
    "padding by reflection first": (
        [conv(6, 16, 3, padding=1, padding_mode="reflect"), conv(16, 6, 1)],
        [Reason.NOT_REWRITABLE],
        MAPS,
    ),
    "padding by reflection second": (
        [conv(6, 16, 1), conv(16, 6, 3, padding=1, padding_mode="reflect")],
        [],
        MAPS,
    ),
    "an activation between": ([conv(6, 16, 1), nn.ReLU(), conv(16, 6, 1)], [], MAPS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_or_not_smaller_stays(name):
    """With the reason, where one layer follows another at all."""
    layers, reasons, shape = REFUSED[name]
    model = nn.Sequential(*layers)
    result = merged(model, shape)
    assert [row.reason for row in result.report.merging.left] == reasons
    assert layer_count(result.model) == layer_count(model)
    assert is_same(model, result, shape)


def test_what_is_between_may_not_be_used_elsewhere():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(6, 16, 1), conv(16, 6, 1)

        def forward(self, x):
            u = self.a(x)
            return self.b(u), u.mean()

    result = merged(Both())
    assert [row.reason for row in result.report.merging.left] == [Reason.USED_ELSEWHERE]
    assert layer_count(result.model) == 2


def test_off_by_default():
    model = nn.Sequential(conv(6, 16, 1), nn.BatchNorm2d(16), conv(16, 6, 1)).eval()
    result = bntools.fold(model, torch.randn(MAPS))
    assert layer_count(result.model) == 2
    assert result.report.merging is None


def test_the_recipe_replays_on_a_fresh_model():
    """Strict loading fits."""
    layers, _ = MERGES["norm between"]
    result = merged(nn.Sequential(*layers()))
    fresh = apply_edits(nn.Sequential(*layers()), result.recipe)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert is_same(fresh.eval(), result)


SHAPE = {
    "inputs": 6, "outputs": 6, "groups": 1, "bias": True, "kernel": [1, 1], "stride": [1, 1],
    "padding": [0, 0], "dilation": [1, 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"first": "1", "second": "2", "layer": SHAPE}, "no linear layer"),
        ({"first": "0", "second": "1", "layer": SHAPE}, "no convolution or linear layer"),
        ({"first": "0", "layer": SHAPE}, "paths are missing"),
        ({"first": "0", "second": "9", "layer": SHAPE}, "there is no '9'"),
        ({"first": "0", "second": "2", "layer": {**SHAPE, "outputs": 4096}}, "are more than the"),
    ],
)
def test_a_damaged_recipe_is_one_line_and_changes_nothing(options, said):
    model = nn.Sequential(conv(6, 16, 1), nn.ReLU(), conv(16, 6, 1))
    before = list(model.modules())
    edit = Edit("merge-linear", "", options=options)
    with pytest.raises((SurgeryError, bntools.BNToolsError), match=said):
        apply_edits(model, Recipe((edit,)))
    assert list(model.modules()) == before
