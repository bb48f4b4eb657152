"""How far a candidate may be from the float64 truth, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bntools.report import OutputError

__all__ = [
    "BLIND_FACTOR",
    "EPS_FACTOR",
    "FACTOR",
    "FLOAT64_LIMIT",
    "INTEGER_SHARE",
    "float64_limit",
    "judge",
    "limit",
    "pooled",
    "relative_error",
]

FACTOR = 4.0
EPS_FACTOR = 8.0
BLIND_FACTOR = 80.0
"""Roundings granted where the reference's own error cannot be known: 1e-5 in float32."""
INTEGER_SHARE = 0.005
"""The share of an integer output that may differ: rounding decides between near ties."""
FLOAT64_LIMIT = 1e-10


def limit(reference_error: float, dtype: torch.dtype) -> float:
    """What the relative L2 error of a candidate may be: `max(k * reference error, c * eps)`.

    The untouched model's own rounding error says how ill-conditioned the network is; a correct
    fold stays within k = 4 of it. Where the reference happens to be almost exact, c = 8 roundings
    of the dtype are granted.
    """
    return max(FACTOR * reference_error, EPS_FACTOR * torch.finfo(dtype).eps)


def float64_limit(reference_error: float, dtype: torch.dtype) -> float:
    """What a fold in float64 may differ: 1e-10, or 1000 times float64's share of the noise.

    `reference_error / eps(dtype)` is the network's own amplification of rounding; the second term
    exceeds 1e-10 only where the reference in its own dtype is off by more than 5e-5 (float32).
    """
    if not math.isfinite(reference_error):
        return FLOAT64_LIMIT
    amplification = reference_error / torch.finfo(dtype).eps
    return max(FLOAT64_LIMIT, 1000 * amplification * torch.finfo(torch.float64).eps)


def relative_error(candidate: Tensor, truth: Tensor) -> float:
    """`||candidate - truth|| / ||truth||` in float64; inf where only one of them is finite.

    Positions where both hold the same value, the same infinity, or NaN count as equal.
    """
    a, b = candidate.detach().cpu().double().flatten(), truth.detach().cpu().double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    finite = a.isfinite() & b.isfinite()
    if not bool((finite | same).all()):
        return math.inf
    scale = float(b[finite].abs().max())
    if scale == 0:
        return math.inf
    difference = torch.where(same, 0.0, a - b) / scale
    return float(difference.norm() / (b[finite] / scale).norm())


def _share_that_differs(candidate: Tensor, truth: Tensor) -> float:
    return float((candidate.cpu() != truth.cpu()).double().mean())


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
    fault = _fault(truth, candidate)
    if fault:
        return OutputError(name, math.inf, 0.0, 0.0, math.inf, passed=False, note=fault)
    measure = relative_error if truth.is_floating_point() else _share_that_differs
    own = measure(reference, truth) if reference.shape == truth.shape else math.inf
    error = measure(candidate, truth)
    if allowed is None and not truth.is_floating_point():
        allowed = max(FACTOR * own, INTEGER_SHARE)
    elif allowed is None:
        floats = [d for d in (dtype, candidate.dtype) if d.is_floating_point]
        allowed = limit(own, max(floats, key=lambda each: torch.finfo(each).eps))
    gap = (candidate.detach().cpu().double() - truth.detach().cpu().double()).abs()
    return OutputError(
        name, error, own, allowed, float(gap.nan_to_num(0.0).max()), passed=error <= allowed
    )


def pooled(errors: Sequence[OutputError]) -> OutputError:
    """One judgement of the same output on several inputs: the largest errors, and their limit."""
    failed = next((e for e in errors if e.note), None)
    if failed is not None:
        return failed
    own = max(e.reference_error for e in errors)
    worst = max(errors, key=lambda e: e.error)
    allowed = max(e.limit for e in errors)
    return replace(worst, reference_error=own, limit=allowed, passed=worst.error <= allowed)


def _fault(truth: Tensor, candidate: Tensor) -> str:
    if truth.shape != candidate.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(truth.shape)}"
    if not truth.numel():
        return "empty: there is nothing to compare"
    if bool(truth.isnan().any()):
        return "the reference itself gives NaN"
    if bool(candidate.isnan().any()):
        return "NaN"
    return ""
