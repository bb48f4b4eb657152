"""What a fold is: which norm goes, and what each of its hosts absorbs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from bntools.absorb import Absorbed, InputLayout, OutputLayout, absorb, pad_values
from bntools.affine import Affine
from bntools.dataflow.graph import NormLayer
from bntools.dataflow.reach import Refused

__all__ = ["Absorption", "HostFold", "Kept", "NormFold", "Outcome", "absorptions", "output_layout"]


@dataclass(frozen=True, eq=False)
class HostFold:
    """What a host absorbs: an affine per output channel of one weight, or `before` it per input's.

    `bias` is the name of its bias; `gains_bias` says that the host has none yet, and gets one of
    `outputs` values. A registered host has the name of its path as `weight`, and no bias. A host
    with `padding` (both ends of each spatial axis) pads with the value that the affine maps to
    zero from then on, and no more with zeros.
    """

    path: str
    weight: str
    bias: str | None
    gains_bias: bool
    layout: OutputLayout | InputLayout
    affine: Affine
    registered: bool = False
    before: bool = False
    outputs: int = 0
    padding: tuple[int, ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer, and no parameter that is added somewhere."""
        return self.registered or self.path != self.weight

    def same_as(self, other: HostFold) -> bool:
        """Whether both folds do the same to the same host (one may have been given a bias)."""
        mine, theirs = (
            (host.path, host.weight, host.layout, host.before, host.padding)
            for host in (self, other)
        )
        return mine == theirs and self.affine.same_as(other.affine)


@dataclass(frozen=True, eq=False)
class NormFold:
    """The fold of one norm layer into its hosts, all of them after it if `forward`, else before it.

    `turn` orders the folds of one plan: a host absorbs them from the lowest to the highest.
    """

    layer: NormLayer
    hosts: tuple[HostFold, ...]
    via: str = ""
    turn: int = 0
    forward: bool = False


class Kept(Refused):
    """A layer that folds in neither direction: why not backward, and why not `forward`.

    Among what is forced on a plan one without `forward` only rules out to fold backward.
    """

    def __init__(self, backward: Refused, forward: Refused | None = None) -> None:
        super().__init__(backward.reason, backward.detail)
        self.forward = forward


Outcome = NormFold | Refused


@dataclass(frozen=True, eq=False)
class Absorption:
    """All that one host absorbs, on both sides: `before(x)` goes in, `after(y)` comes out."""

    before: HostFold | None = None
    after: HostFold | None = None

    @property
    def host(self) -> HostFold:
        """The host, as either side knows it; the side with a bias if one has."""
        sides = [side for side in (self.before, self.after) if side is not None]
        return next((side for side in sides if side.bias is not None), sides[0])

    def then(self, host: HostFold) -> Absorption:
        """What the host holds once it has absorbed one fold more, further out."""
        if host.before:
            known = self.before
            affine = host.affine.then(known.affine) if known else host.affine
            padding = host.padding or (known.padding if known else ())
            bias = host.bias or (known.bias if known else None)
            return replace(self, before=replace(host, affine=affine, bias=bias, padding=padding))
        known = self.after
        affine = known.affine.then(host.affine) if known else host.affine
        bias = host.bias or (known.bias if known else None)
        return replace(self, after=replace(host, affine=affine, bias=bias))

    def absorbed(self, weight: Tensor, bias: Tensor | None) -> Absorbed:
        """The new weight and bias: exact in float64, then rounded once."""
        before, after = self.before, self.after
        return absorb(
            weight,
            bias,
            before=None if before is None else (before.affine, input_layout(before)),
            after=None if after is None else (after.affine, output_layout(after)),
        )

    def pad_values(self) -> Tensor | None:
        """With what the host has to pad, one float64 value a channel; None for zeros."""
        if self.before is None or not self.before.padding:
            return None
        return pad_values(self.before.affine)


def input_layout(host: HostFold) -> InputLayout:
    """The layout of a host that absorbs what comes before it."""
    return cast("InputLayout", host.layout)


def output_layout(host: HostFold) -> OutputLayout:
    """The layout of a host that absorbs what comes after it."""
    return cast("OutputLayout", host.layout)


def absorptions(folds: Iterable[NormFold]) -> dict[str, Absorption]:
    """What each host absorbs of all folds together, by the name of its weight."""
    hosts: dict[str, Absorption] = {}
    for fold in sorted(folds, key=lambda each: each.turn):
        for host in fold.hosts:
            hosts[host.weight] = hosts.get(host.weight, Absorption()).then(host)
    return hosts
