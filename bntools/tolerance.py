"""How far a candidate may be from the float64 truth, and how far it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bntools.report import OutputError

__all__ = ["EPS_FACTOR", "FACTOR", "FLOAT64_LIMIT", "float64_limit", "judge", "limit", "relative_error"]

FACTOR = 4.0
EPS_FACTOR = 8.0
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
    amplification = reference_error / torch.finfo(dtype).eps
    return max(FLOAT64_LIMIT, 1000 * amplification * torch.finfo(torch.float64).eps)


def relative_error(candidate: Tensor, truth: Tensor) -> float:
    """`||candidate - truth|| / ||truth||` in float64; inf where one is zero or not finite alone.

    Positions where both hold the same infinity, or both NaN, count as equal.
    """
    a, b = candidate.detach().cpu().double().flatten(), truth.detach().cpu().double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    finite = b.isfinite()
    if not bool((finite & a.isfinite() | same).all()):
        return math.inf
    scale = float(b[finite].abs().max())
    if scale == 0:
        return math.inf
    difference = torch.where(same, 0.0, a - b) / scale
    return float(difference.norm() / (b[finite] / scale).norm())


def judge(
    name: str, truth: Tensor, reference: Tensor, candidate: Tensor, *, allowed: float | None = None
) -> OutputError:
    """Judge one output of a candidate against the truth, beside the reference's own error.

    `allowed` replaces the limit that follows from the reference's error and the dtype. A NaN,
    an empty output or another shape is never a pass; integer outputs must be equal.
    """
    fault = _fault(truth, candidate)
    dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
    own = relative_error(reference, truth)
    most = limit(own, dtype) if allowed is None else allowed
    if fault:
        return OutputError(name, math.inf, own, most, math.inf, passed=False, note=fault)
    error = relative_error(candidate, truth)
    if not truth.dtype.is_floating_point and not truth.dtype.is_complex:
        most = own if allowed is None else most
    gap = float((candidate.cpu().double() - truth.cpu().double()).abs().nan_to_num(0.0).max())
    return OutputError(name, error, own, most, gap, passed=error <= most)


def _fault(truth: Tensor, candidate: Tensor) -> str:
    if truth.shape != candidate.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(truth.shape)}"
    if not truth.numel():
        return "the output is empty, so there is nothing to compare"
    if bool(truth.isnan().any()):
        return "the reference itself gives NaN"
    if bool(candidate.isnan().any()):
        return "NaN"
    return ""
