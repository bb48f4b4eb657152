"""Detections: rows of boxes, scores and labels, of which two models give more or fewer.

Where a threshold or a cap decides how many there are, and scores are nearly equal, two correct
models give other numbers of them in another order. Each detection of the truth is paired with the
nearest of the candidate's with the same label. One that only one side has counts as a difference,
unless its score is at the threshold: within 1e-4 of the lowest that either side reports. No more
than one in fifty is excused so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bntools.outputs import Outputs

__all__ = ["Aligned", "align"]

_NEAR = 0.02
"""How far paired detections may lie apart, in parts of the largest coordinate or score."""
_AT_THRESHOLD = 1e-4
_EXCUSED = 50
_WIDEST = 64


@dataclass(frozen=True)
class Aligned:
    """Outputs of which the rows of detections belong together.

    `odd` has for each group of them a 1 for every detection that only one side has: those of the
    reference in its own dtype, and those of the candidate. `paired` are the names of their outputs.
    """

    exact: Outputs
    native: Outputs
    given: Outputs
    odd: dict[str, tuple[Tensor, Tensor]]
    paired: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Group:
    """The outputs that have a row for each detection."""

    names: tuple[str, ...]
    scores: str

    def __str__(self) -> str:
        parent = self.scores.rpartition(".")[0]
        return f"{parent}: detections" if parent else "detections"

    def rows(self, outputs: Outputs) -> int:
        return outputs[self.scores].shape[0]


def align(
    exact: Outputs, native: Outputs, given: Mapping[str, Tensor], *, eps: float = 0.0
) -> Aligned:
    """Pair the detections in outputs; all other outputs stay as they are."""
    aligned = Aligned(dict(exact), dict(native), dict(given), {})
    for group in _groups(exact, native, aligned.given):
        band = max(_AT_THRESHOLD, 8 * eps)
        mine = _pairs(group, exact, given)
        own = _pairs(group, exact, native)
        total = group.rows(exact) + max(group.rows(aligned.given), group.rows(native))
        odd = [
            _marks(_odd(group, exact, other, pairs, band), total)
            for other, pairs in ((native, own), (aligned.given, mine))
        ]
        aligned.odd[str(group)] = odd[0], odd[1]
        rows = sorted(mine)
        aligned.paired.update(group.names)
        for name in group.names:
            aligned.exact[name] = exact[name][rows]
            aligned.given[name] = given[name][[mine[row] for row in rows]]
            values = [
                native[name][own[row]] if row in own else exact[name][row].to(native[name])
                for row in rows
            ]
            aligned.native[name] = torch.stack(values) if values else native[name][:0]
    return aligned


def _groups(exact: Outputs, native: Outputs, given: Outputs) -> list[_Group]:
    """Sibling outputs with as many rows each, among them boxes and scores of any number."""
    siblings: dict[str, list[str]] = {}
    for name in exact:
        siblings.setdefault(name.rpartition(".")[0] or name.rpartition("[")[0], []).append(name)
    found = []
    for names in siblings.values():
        scores = next((n for n in names if _is_scores(n, exact[n])), "")
        if not scores or not all(scores in side for side in (native, given)):
            continue
        alike = tuple(n for n in names if _has_rows(n, scores, (exact, native, given)))
        if any(_is_boxes(name, exact[name]) for name in alike):
            found.append(_Group(alike, scores))
    return found


def _has_rows(name: str, scores: str, sides: tuple[Outputs, ...]) -> bool:
    return all(
        name in side
        and side[name].dim() > 0
        and side[name].shape[0] == side[scores].shape[0]
        and side[name].shape[1:] == sides[0][name].shape[1:]
        for side in sides
    )


def _is_scores(name: str, tensor: Tensor) -> bool:
    return "score" in _leaf(name) and tensor.dim() == 1 and tensor.is_floating_point()


def _is_boxes(name: str, tensor: Tensor) -> bool:
    return "box" in _leaf(name) and tensor.dim() == 2 and tensor.shape[1] in (4, 5)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _pairs(group: _Group, exact: Outputs, other: Mapping[str, Tensor]) -> dict[int, int]:
    """Rows of the truth with the rows of another side, the most certain detections first."""
    distance = _distances(group, exact, other)
    pairs: dict[int, int] = {}
    if not distance.numel():
        return pairs
    for row in exact[group.scores].cpu().argsort(descending=True, stable=True).tolist():
        nearest = int(distance[row].argmin())
        if float(distance[row, nearest]) <= _NEAR:
            pairs[row] = nearest
            distance[:, nearest] = torch.inf
    return pairs


def _distances(group: _Group, exact: Outputs, other: Mapping[str, Tensor]) -> Tensor:
    rows, columns = group.rows(exact), other[group.scores].shape[0]
    distance = torch.zeros(rows, columns, dtype=torch.float64, device="cpu")
    for name in group.names:
        ours, theirs = (_flat(side[name]) for side in (exact, other))
        if ours.shape[1] > _WIDEST or not distance.numel():
            continue  # masks follow their boxes
        gap = torch.cdist(ours, theirs, p=torch.inf)
        if exact[name].is_floating_point():
            gap = gap / ours.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        else:
            gap = torch.where(gap > 0, torch.inf, 0.0)
        distance = torch.maximum(distance, gap.nan_to_num(torch.inf, posinf=torch.inf))
    return distance


def _flat(tensor: Tensor) -> Tensor:
    exact = tensor.detach().cpu().double()
    return exact.flatten(1) if exact.dim() > 1 else exact.unsqueeze(1)


def _odd(
    group: _Group, exact: Outputs, other: Mapping[str, Tensor], pairs: dict[int, int], band: float
) -> int:
    """How many detections only one side has, those at the threshold apart."""
    sides = [side[group.scores].detach().cpu().double() for side in (exact, other)]
    every = torch.cat(sides)
    if not every.numel():
        return 0
    at_threshold = every.min() + band * every.abs().max()
    alone = [torch.ones(len(side), dtype=torch.bool, device="cpu") for side in sides]
    alone[0][list(pairs)] = False
    alone[1][list(pairs.values())] = False
    odd = torch.cat([side[mask] for side, mask in zip(sides, alone, strict=True)])
    excused = int((odd <= at_threshold).sum())
    return len(odd) - min(excused, max(1, len(every) // _EXCUSED))


def _marks(count: int, total: int) -> Tensor:
    return (torch.arange(total, device="cpu") < count).long()
