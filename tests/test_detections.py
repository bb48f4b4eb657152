"""Detections: paired whatever their order and number, and faults in them still caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bntools
from bntools.detections import align
from bntools.equivalence import Comparison, Truth

COUNT = 40


def detections(seed: int = 0, count: int = COUNT) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 4), generator=random, dtype=torch.float64) * 300
    return {
        "output[0].boxes": corners,
        "output[0].labels": torch.randint(1, 5, (count,), generator=random),
        "output[0].scores": torch.linspace(0.9, 0.3, count, dtype=torch.float64),
    }


def rounded(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in found.items()}


def taken(found: dict[str, Tensor], rows) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in found.items()}


def judged(exact, candidate, native=None):
    truth = Truth(
        exact, native or rounded(exact), {}, {}, torch.float32, torch.float32, is_float64=True
    )
    comparison = Comparison()
    comparison.add(truth, candidate)
    return comparison.result()


def test_same_detections_are_equal_in_any_order():
    exact = detections()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    result = judged(exact, taken(rounded(exact), order))
    assert result, str(result)
    assert [o.name for o in result.outputs] == ["output[0]: detections", *exact]
    assert result.outputs[0].why == "none may differ"


@pytest.mark.parametrize("row", [0, 20, 38])
def test_detection_that_is_missing_or_extra_is_a_difference(row):
    exact = detections()
    kept = [i for i in range(COUNT) if i != row]
    result = judged(exact, taken(rounded(exact), kept))
    assert not result
    assert result.worst.name == "output[0]: detections"
    assert not judged(taken(exact, kept), rounded(exact))


def test_detection_at_the_threshold_is_excused():
    """The lowest score decides whether it is reported at all."""
    exact = detections()
    result = judged(exact, taken(rounded(exact), range(COUNT - 1)))
    assert result, str(result)
    assert judged(taken(exact, range(COUNT - 1)), rounded(exact))


def test_no_more_than_one_in_fifty_is_excused():
    """In an untrained model all scores are at the threshold: that must not excuse everything."""
    exact = detections()
    exact["output[0].scores"] = torch.full((COUNT,), 0.2, dtype=torch.float64)
    assert not judged(exact, taken(rounded(exact), range(COUNT // 2)))


def test_as_many_as_the_reference_itself_misses_four_times_over():
    exact = detections()
    native = taken(rounded(exact), [i for i in range(COUNT) if i != 5])
    assert judged(
        exact, taken(rounded(exact), [i for i in range(COUNT) if i not in (7, 9)]), native
    )
    missing = range(10, 20)
    kept = [i for i in range(COUNT) if i not in missing]
    assert not judged(exact, taken(rounded(exact), kept), native)


@pytest.mark.parametrize("name", ["boxes", "scores", "labels"])
def test_fault_in_paired_detections_is_caught(name):
    exact = detections()
    candidate = taken(rounded(exact), list(reversed(range(COUNT))))
    wrong = candidate[f"output[0].{name}"]
    if name == "labels":
        wrong[3] += 1
    else:
        wrong[3] *= 1 + 1e-4
    assert not judged(exact, candidate)


def test_no_detection_on_either_side_is_nothing_to_compare():
    empty = taken(detections(), slice(0, 0))
    result = judged(empty, rounded(empty))
    assert not result
    assert "nothing to compare" in result.summary()
    assert not judged(empty, rounded(detections()))
    assert not judged(detections(), rounded(empty))


def test_rows_of_a_batch_are_never_paired():
    """Samples have an order: a model that mixes them up is wrong."""
    exact = {"output.logits": torch.randn(4, 3).double(), "output.score": torch.randn(4).double()}
    aligned = align(exact, exact, taken(exact, [1, 0, 2, 3]))
    assert aligned.odd == {}
    assert not judged(exact, taken(rounded(exact), [1, 0, 2, 3]))


def test_masks_follow_their_boxes():
    exact = detections()
    exact["output[0].masks"] = torch.rand(COUNT, 1, 16, 16, dtype=torch.float64)
    order = list(reversed(range(COUNT)))
    candidate = taken(rounded(exact), order)
    assert judged(exact, candidate)
    candidate["output[0].masks"][0] += 1e-3
    assert not judged(exact, candidate)


class Detector(nn.Module):
    """Reports what has a score above a threshold, the best first."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
        self.threshold = threshold

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = self.head(x)
        scores = found[:, 4].sigmoid()
        order = scores.argsort(descending=True)
        order = order[scores[order] > self.threshold]
        return [{"boxes": found[order, :4] * 100, "scores": scores[order]}]


def test_detector_is_verified_with_its_fold_and_not_with_another_threshold():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Detector(0.4).eval()
        x = torch.randn(200, 4)
    result = bntools.verify(model, bntools.fold(model, x).model, x)
    assert result, str(result)
    assert result.outputs[0].name == "output[0]: detections"
    other = Detector(0.5).eval()
    other.load_state_dict(model.state_dict())
    assert not bntools.verify(model, other, x)
