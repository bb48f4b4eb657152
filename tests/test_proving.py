"""The proof of folds in models that are float64 themselves."""

from __future__ import annotations

import pytest
import torch
from randomise import randomise
from torch import Tensor, nn

import bntools


class Amplifying(nn.Module):
    """A network of which the last step makes a rounding a billion times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e7 * self.bn(self.conv(x)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Amplifying().double().eval()
    randomise(model)
    return model


def test_right_fold_of_a_float64_model_that_amplifies_rounding_stays(model):
    """It differs by more than 1e-10, but no more than rounding its parameters would."""
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    report = bntools.fold(model, x).report
    assert report.summary().startswith("folded 1 of 1")
    assert report.check.native.worst.error > 1e-10


def test_wrong_fold_of_a_float64_model_that_amplifies_rounding_is_undone(model, monkeypatch):
    """The limit grows with the amplification of rounding, and faults are amplified as well."""
    from bntools.surgery import folding

    right = folding.fold_in_place

    def wrong(*args, **kwargs):
        folded = right(*args, **kwargs)
        if folded.conv.bias is not None:
            folded.conv.bias.data[1] += 1e-9
        return folded

    monkeypatch.setattr("bntools.proving.fold_in_place", wrong)
    monkeypatch.setattr("bntools.surgery.folding.fold_in_place", wrong)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert not bntools.fold(model, x).report.folds


def test_well_conditioned_float64_model_is_held_to_1e_10():
    """Nothing is granted where nothing amplifies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double().eval()
    randomise(model)
    check = bntools.fold(model, torch.rand(2, 3, 16, 16, dtype=torch.float64)).report.check
    assert check.native.worst.limit == 1e-10
