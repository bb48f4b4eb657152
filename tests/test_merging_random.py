"""Random sums of branches: whatever merges is right to 1e-10 at any size; what fits does merge.

    BNTOOLS_BRANCHES=2000 pytest tests/test_merging_random.py

makes a longer run than the default one.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from contextlib import suppress

import torch
from random_branches import HARMLESS, Drawn, draw
from randomise import difference, outputs, randomise

import bntools
from bntools.merging import filters
from bntools.report import Reason

COUNT = int(os.environ.get("BNTOOLS_BRANCHES", "40"))


def check(drawn: Drawn, counts: Counter[str]) -> None:
    """Fold and merge one block; compare at three sizes; nothing of the argument changes."""
    model = drawn.model.double()
    flags = [module.training for module in model.modules()]
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(drawn.shape, dtype=torch.float64)
    result = bntools.fold(model, x, merge_branches=True)
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    truth = copy.deepcopy(model).eval()
    for more in (0, 1, 4):
        shape = (2, drawn.shape[1], *(size + more for size in drawn.shape[2:]))
        other = torch.randn(shape, dtype=torch.float64)
        try:
            expected = outputs(truth, other)
        except RuntimeError:
            continue  # a branch that fits at one size only
        assert difference(outputs(result.model, other), expected) < 1e-10
    merging = result.report.merging
    counts["merged"] += bool(merging.merges)
    counts["left"] += len(merging.left)
    counts.update(row.reason.value for row in merging.left)
    assert Reason.CHECK_FAILED not in [row.reason for row in merging.left], merging.left
    if not set(drawn.traps) - HARMLESS:
        left = [row for row in merging.left if row.reason is not Reason.COSTS_MORE]
        assert not left, left
        assert merging.left or (len(merging.merges), merging.after.convolutions) == (1, 1)


def named(seed: int, counts: Counter[str]) -> None:
    """The check of one block, which says which it was where it fails."""
    try:
        check(draw(seed), counts)
    except Exception as error:
        error.add_note(f"in the block of draw({seed}): {draw(seed)}")
        raise


def test_random_sums_of_branches_merge_right():
    counts: Counter[str] = Counter()
    for seed in range(COUNT):
        named(seed, counts)
    assert counts["merged"] > COUNT // 2, counts


def test_a_planted_fault_is_found_by_random_blocks(monkeypatch):
    """A kernel that is put one place off gives other numbers in one of the first blocks."""
    right = filters._places

    def wrong(each, before, dilation):
        index = right(each, before, dilation)
        moved = [slice(0, part.stop - part.start, part.step) for part in index[1:]]
        return (..., *moved)

    monkeypatch.setattr(filters, "_places", wrong)
    found = 0
    for seed in range(12):
        with suppress(AssertionError):
            check(draw(seed), Counter())
            continue
        found += 1
    assert found > 1
