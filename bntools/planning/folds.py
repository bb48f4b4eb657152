"""What a fold is: which norm goes, and what each of its hosts absorbs."""

from __future__ import annotations

from dataclasses import dataclass

from bntools.absorb import OutputLayout
from bntools.affine import Affine
from bntools.dataflow.graph import NormLayer
from bntools.dataflow.reach import Refused

__all__ = ["HostFold", "NormFold", "Outcome"]


@dataclass(frozen=True, eq=False)
class HostFold:
    """What a host absorbs: an affine per output channel of one weight.

    `bias` is the name of its bias; `gains_bias` says that the host has none yet. A registered host
    has the name of its path as `weight`, and no bias.
    """

    path: str
    weight: str
    bias: str | None
    gains_bias: bool
    layout: OutputLayout
    affine: Affine
    registered: bool = False

    def same_as(self, other: HostFold) -> bool:
        """Whether both folds do the same to the same host (one may have been given a bias)."""
        mine, theirs = (
            (self.path, self.weight, self.layout),
            (other.path, other.weight, other.layout),
        )
        return mine == theirs and self.affine.same_as(other.affine)


@dataclass(frozen=True, eq=False)
class NormFold:
    """The fold of one norm layer into its hosts.

    `turn` orders the folds of one plan: a host absorbs them from the lowest to the highest.
    """

    layer: NormLayer
    hosts: tuple[HostFold, ...]
    via: str = ""
    turn: int = 0


Outcome = NormFold | Refused
