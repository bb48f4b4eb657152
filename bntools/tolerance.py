"""How far a candidate may be from the float64 truth, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BLIND_FACTOR",
    "EPS_FACTOR",
    "FACTOR",
    "FLOAT64_LIMIT",
    "INTEGER_SHARE",
    "Limit",
    "Noise",
    "difference",
    "float64_limit",
    "limit",
    "relative_error",
    "slice_limits",
]

FACTOR = 4.0
EPS_FACTOR = 8.0
BLIND_FACTOR = 80.0
"""Roundings granted where the reference's own error cannot be known: 1e-5 in float32."""
INTEGER_SHARE = 0.005
"""The share of an integer output that may differ: rounding decides between near ties."""
FLOAT64_LIMIT = 1e-10
MOST = 32.0
"""How many values of a slice count as independent."""
FEW = 16.0
"""The errors of so many values say as much about the noise in a slice as the whole output does."""


def limit(reference_error: float, dtype: torch.dtype) -> float:
    """What the relative L2 error of a candidate may be: `max(k * reference error, c * eps)`.

    The untouched model's own rounding error says how ill-conditioned the network is; a correct
    fold stays within k = 4 of it. Where the reference happens to be almost exact, c = 8 roundings
    of the dtype are granted.
    """
    return Limit(torch.finfo(dtype).eps).of(reference_error)


@dataclass(frozen=True)
class Limit:
    """The rule by which limits follow from the reference's own error.

    `eps` is one rounding of the coarsest arithmetic in play; `coarser` is how many times coarser
    that is than the arithmetic in which the reference's own error was measured. `allowed` stands
    in the place of the rule. `share` is what part of an integer output may differ.
    """

    eps: float
    allowed: float | None = None
    coarser: float = 1.0
    share: float = INTEGER_SHARE

    def of(self, own: float) -> float:
        """What the relative L2 error of an output may be."""
        if self.allowed is not None:
            return self.allowed
        if not math.isfinite(own):  # it overflows in its own dtype, which excuses nothing
            return EPS_FACTOR * self.eps
        return max(FACTOR * self.coarser * own, EPS_FACTOR * self.eps)

    def of_share(self, own: float) -> float:
        """What share of an integer output may differ."""
        return self.allowed if self.allowed is not None else max(FACTOR * own, self.share)

    def why(self, own: float) -> str:
        """Where the limit comes from, in words."""
        if self.allowed is not None:
            return f"fixed at {self.allowed:.2g}"
        if not math.isfinite(own) or EPS_FACTOR * self.eps >= FACTOR * self.coarser * own:
            return f"{EPS_FACTOR:g} roundings of {self.eps:.2g}"
        scaled = f" at {self.coarser:.3g} times its rounding" if self.coarser != 1 else ""
        return f"{FACTOR:g}x the reference's own error{scaled}"

    def why_share(self, own: float) -> str:
        """Where the limit of an integer output comes from, in words."""
        if self.allowed is not None:
            return f"fixed at {self.allowed:.2g}"
        if FACTOR * own > self.share:
            return f"{FACTOR:g}x the share that differs in the reference's own dtype"
        if not self.share:
            return "none may differ"
        return f"{self.share:.1%} of the integers, for near ties"


def slice_limits(rule: Limit, whole: float, own: Tensor, truth: Tensor, *, noise: Noise) -> Tensor:
    """What each slice of an output may be off, where the whole may be off by `whole`.

    All are root mean squares in units of the whole output's. A slice may be off by k times the
    reference's own error in it, by c roundings of its own values, or by the same part of them as
    the whole may be. Where the reference's error comes from a few of its values it may be small by
    luck: from m of them, a slice may also be off by `sqrt(16 / (16 + m)) * whole`. Of S slices of n
    values with equal noise the largest has about `1 + sqrt(ln S / n)` times the mean: all is
    multiplied by that, with n no more than 32, as neighbours err alike.
    """
    spread = 1 + (math.log(max(noise.slices, 2)) / noise.count.clamp(max=MOST)).sqrt()
    if rule.allowed is not None:
        return spread * rule.allowed * truth.clamp(min=1.0)
    luck = (FEW / (FEW + noise.carrying)).sqrt()
    share = torch.maximum(luck, truth.clamp(max=1.0))
    if noise.alike:
        share = torch.ones_like(share)
    own = torch.where(own.isfinite(), own, 0.0)
    terms = (FACTOR * rule.coarser * own, EPS_FACTOR * rule.eps * truth, whole * share)
    return spread * torch.stack(terms).amax(0)


@dataclass(frozen=True)
class Noise:
    """How much the errors of slices say: how many values each has, and how many carry an error.

    `slices` is how many of them there are in all; `alike` are those of which none differs from the
    others but by chance, as samples.
    """

    count: Tensor
    carrying: Tensor
    slices: int
    alike: bool


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
    gap, b = difference(candidate, truth), truth.detach().cpu().double()
    finite = b.isfinite()
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    if not bool(gap.any()):
        return 0.0
    if scale == 0 or not bool(gap.isfinite().all()):
        return math.inf
    return float((gap / scale).norm() / (b[finite] / scale).norm())


def difference(candidate: Tensor, truth: Tensor) -> Tensor:
    """`candidate - truth` in float64 on the CPU: 0 where both are the same infinity or NaN.

    It is infinite where only one of them is finite, and where the shapes differ.
    """
    a, b = candidate.detach().cpu().double(), truth.detach().cpu().double()
    if a.shape != b.shape:
        return torch.full_like(b, math.inf)
    same = (a == b) | (a.isnan() & b.isnan())
    unlike = ~(a.isfinite() & b.isfinite())
    return torch.where(same, 0.0, torch.where(unlike, math.inf, a - b))
