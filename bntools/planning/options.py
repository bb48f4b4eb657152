"""What a plan and a fold may do beyond moving norms into the linear layers that are there."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FoldOptions", "PlanOptions"]


@dataclass(frozen=True)
class PlanOptions:
    """How far a plan may go.

    `pad_forward` allows a padded convolution to absorb a norm before it, and to pad with the value
    that the norm maps to zero.
    """

    pad_forward: bool = False


@dataclass(frozen=True)
class FoldOptions:
    """What a fold does beside folding; everything is off unless it is asked for.

    `merge_branches` makes one convolution of parallel linear branches, `merge_linear` one layer of
    consecutive ones, `pad_forward` is that of `PlanOptions`, `keep_originals` keeps in the result
    what undoing the fold takes.
    """

    merge_branches: bool = False
    merge_linear: bool = False
    pad_forward: bool = False
    keep_originals: bool = False

    @property
    def merge(self) -> bool:
        """Whether layers may merge."""
        return self.merge_branches or self.merge_linear

    @property
    def plan(self) -> PlanOptions:
        """The part that a plan takes."""
        return PlanOptions(self.pad_forward)
