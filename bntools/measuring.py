"""How far outputs are from the truth: as a whole and slice by slice, over any number of batches.

A tensor judged only as a whole hides a fault in one of its channels: among a thousand classes the
relative error is divided by 32. So every sample, channel and position has a limit of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from bntools.report import OutputError, SliceError
from bntools.tolerance import Limit, Noise, difference, slice_limits

__all__ = ["Measure", "judge", "pooled"]

_AXES = {0: "sample", 1: "channel"}


def judge(
    name: str,
    truth: Tensor,
    reference: Tensor,
    candidate: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    allowed: float | None = None,
) -> OutputError:
    """Judge one output of a candidate against the truth, beside the reference's own error.

    `dtype` is the coarsest of the model's; a coarser one of the candidate's output counts instead.
    `allowed` replaces the limit that follows from the reference's error and the dtype. A NaN, an
    empty output or another shape is never a pass. Of integer outputs (classes, orders) the share
    of elements that differ is judged.
    """
    measure = Measure(name, Limit(torch.finfo(dtype).eps, allowed))
    measure.add(truth, reference, candidate)
    return measure.result()


@dataclass(frozen=True)
class _Sums:
    """Of each slice: how many values it has, and their squares in the truth and in both errors.

    `fourth` has the fourth powers of the reference's errors.
    """

    count: Tensor
    truth: Tensor
    own: Tensor
    error: Tensor
    fourth: Tensor

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(a + b for a, b in self._pairs(other)))

    def then(self, other: _Sums) -> _Sums:
        return _Sums(*(torch.cat(pair) for pair in self._pairs(other)))

    def _pairs(self, other: _Sums) -> Iterator[tuple[Tensor, Tensor]]:
        return ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def relative(self, squares: Tensor, scale: float) -> Tensor:
        """Root mean squares in units of the whole output's, which is infinite beside zeros."""
        means = squares / self.count
        return (means / scale).sqrt() if scale else torch.where(means > 0, math.inf, means)

    def carrying(self) -> Tensor:
        """How many values have an error of the reference: all of them, if it is Gaussian."""
        spread = 3 * self.own.square() / self.fourth.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.minimum(spread.nan_to_num(0.0), self.count)


@dataclass
class Measure:
    """Collects one output of a candidate, batch by batch; with `classes` rows may be scores."""

    name: str
    limit: Limit
    classes: bool = True
    _fault: str = ""
    _floating: bool = True
    _unit: float = 0.0
    _whole: _Sums | None = None
    _slices: dict[tuple[int, int], _Sums] = field(default_factory=dict)
    _products: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _largest: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _classes: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, truth: Tensor, reference: Tensor, candidate: Tensor) -> None:
        """One batch: the output in float64, the reference's own, and the candidate's."""
        self._fault = self._fault or _fault(truth, candidate)
        if self._fault or not truth.numel():
            return
        self._floating = truth.is_floating_point()
        if self._floating and candidate.is_floating_point():
            eps = max(self.limit.eps, torch.finfo(candidate.dtype).eps)
            self.limit = replace(self.limit, eps=eps)
        exact, mine = (each.detach().cpu().double() for each in (truth, candidate))
        self._note(exact, mine, (mine - exact).abs().nan_to_num(0.0))
        if self._floating:
            self._sum(exact, [difference(each, truth) for each in (reference, candidate)])
            self._note_direction(exact, mine)
        else:
            others = [_differ(each, truth) for each in (reference, candidate)]
            self._sum(torch.ones_like(exact), [each.double() for each in others])

    def _note(self, exact: Tensor, mine: Tensor, gap: Tensor) -> None:
        scale = exact.abs().nan_to_num(0.0, posinf=0.0)
        self._largest[0] = max(self._largest[0], float(gap.max()))
        self._largest[1] = max(self._largest[1], float(scale.max()))
        self._unit = self._unit or (self._largest[1] if self._floating else 1.0) or 1.0
        if self.classes and self._floating and _has_classes(exact):
            same = exact.argmax(1) == mine.argmax(1)
            self._classes[0] += int(same.sum())
            self._classes[1] += same.numel()

    def _note_direction(self, exact: Tensor, mine: Tensor) -> None:
        a, b = (torch.where(t.isfinite(), t, 0.0) / self._unit for t in (exact, mine))
        self._products[0] += float((a * b).sum())
        self._products[1] += float(b.square().sum())

    def _sum(self, exact: Tensor, gaps: Sequence[Tensor]) -> None:
        exact = torch.where(exact.isfinite(), exact, 0.0)
        squares = [(each / self._unit).square() for each in (exact, *gaps)]
        whole = _summed(squares, None)
        self._whole = whole if self._whole is None else self._whole.plus(whole)
        for axis, size in enumerate(exact.shape if self._floating else ()):
            key, sums = (axis, size if axis else 0), _summed(squares, axis)
            before = self._slices.get(key)
            if before is not None:
                sums = before.plus(sums) if axis else before.then(sums)
            self._slices[key] = sums

    def result(self) -> OutputError:
        """The judgement of all batches together."""
        whole = self._whole
        if self._fault or whole is None:
            note = self._fault or "empty: there is nothing to compare"
            return OutputError(self.name, math.inf, 0.0, 0.0, math.inf, passed=False, note=note)
        scale = float(whole.truth / whole.count)
        error, own = (float(whole.relative(part, scale)) for part in (whole.error, whole.own))
        if not self._floating:
            error, own = error**2, own**2
        allowed = self.limit.of(own) if self._floating else self.limit.of_share(own)
        part = self._worst_slice(scale, allowed)
        in_part = part is not None and part.error > part.limit
        largest, size = self._largest
        return OutputError(
            self.name,
            error,
            own,
            allowed,
            largest,
            passed=error <= allowed and not in_part,
            note=str(part) if in_part and error <= allowed else "",
            max_scaled=largest / size if size else math.inf if largest else 0.0,
            cosine=self._cosine(float(whole.truth)) if self._floating else None,
            top1=self._classes[0] / self._classes[1] if self._classes[1] else None,
            part=part,
            why=self.limit.why(own) if self._floating else self.limit.why_share(own),
        )

    def _cosine(self, truth: float) -> float:
        product, other = self._products
        if not truth or not other:
            return 1.0 if truth == other else 0.0
        return max(-1.0, min(1.0, product / math.sqrt(truth) / math.sqrt(other)))

    def _worst_slice(self, scale: float, allowed: float) -> SliceError | None:
        """The slice that comes nearest to its limit, or exceeds it most."""
        sliced = {key: sums for key, sums in self._slices.items() if len(sums.count) > 1}
        total = sum(len(sums.count) for sums in sliced.values())
        worst: tuple[float, SliceError] | None = None
        for (axis, _), sums in sliced.items():
            error, own, truth = (
                sums.relative(part, scale) for part in (sums.error, sums.own, sums.truth)
            )
            noise = Noise(sums.count, sums.carrying(), total, alike=axis == 0)
            limits = slice_limits(self.limit, allowed, own, truth, noise=noise)
            ratio = torch.where(error > 0, error / limits, 0.0)
            index = int(ratio.argmax())
            if worst is None or float(ratio[index]) > worst[0]:
                values = (float(each[index]) for each in (error, own, limits))
                kind = _AXES.get(axis, f"position along axis {axis}")
                worst = float(ratio[index]), SliceError(kind, index, *values)
        return None if worst is None else worst[1]


def pooled(errors: Sequence[OutputError]) -> OutputError:
    """One judgement of the same output on several inputs: the largest errors, and their limit."""
    failed = next((e for e in errors if e.note and e.part is None), None)
    if failed is not None:
        return failed
    own = max(e.reference_error for e in errors)
    worst = max(errors, key=lambda e: e.error)
    allowed = max(e.limit for e in errors)
    part = _pooled_part([e.part for e in errors if e.part is not None])
    passed = worst.error <= allowed and (part is None or part.error <= part.limit)
    return replace(worst, reference_error=own, limit=allowed, passed=passed, part=part, note="")


def _pooled_part(parts: Sequence[SliceError]) -> SliceError | None:
    if not parts:
        return None
    worst = max(parts, key=lambda part: part.error / part.limit if part.limit else math.inf)
    return replace(worst, limit=max(part.limit for part in parts))


def _summed(squares: Sequence[Tensor], axis: int | None) -> _Sums:
    like = squares[0]
    others = [each for each in range(like.dim()) if each != axis]
    size = 1 if axis is None else like.shape[axis]
    shape = (size,) if axis is not None else ()
    count = torch.full(shape, like.numel() / size, dtype=like.dtype, device=like.device)
    powers = [*squares, squares[1].square()]
    return _Sums(count, *(each.sum(others) if others else each for each in powers))


def _has_classes(tensor: Tensor) -> bool:
    """Scores of classes: rows of at least two, or maps of at least five, the fewest that are."""
    if tensor.dim() == 2:
        return tensor.shape[1] > 1
    return tensor.dim() == 4 and tensor.shape[1] > 4


def _differ(tensor: Tensor, truth: Tensor) -> Tensor:
    """Where whole numbers differ; float64 does not have all that are beyond 2^53."""
    mine, exact = tensor.detach().cpu(), truth.detach().cpu()
    if mine.is_floating_point():
        return mine.double() != exact.double()
    return mine != exact


def _fault(truth: Tensor, candidate: Tensor) -> str:
    if truth.shape != candidate.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(truth.shape)}"
    if bool(truth.isnan().any()):
        return "the reference itself gives NaN"
    if bool(candidate.isnan().any()):
        return "NaN"
    return ""
