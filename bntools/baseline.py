"""What the layers of a reference give without rounding, and how far rounding moves them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bntools.outputs import flatten
from bntools.runtimes.precision import TF32_EPS
from bntools.tolerance import BLIND_FACTOR, Limit, difference
from bntools.watching import Key, Layered, See

__all__ = ["Baseline", "plain"]

DRAWS = 4
"""Forwards of the reference in its own dtype from which its error is found."""

_Visit = Callable[[Collection[Key], See], None]


class Baseline:
    """The truth at the points of a reference, and the noise in it.

    A layer with few values says little about the noise in each of its channels: by luck the
    reference is almost exact in some. So its own error is the root mean square over several
    forwards; in all but the first the parameters are off by about one rounding, as those of a fold
    are (Monte Carlo arithmetic, Parker 1997).
    """

    def __init__(self, reference: Layered, candidate: Layered) -> None:
        coarser = torch.finfo(candidate.dtype).eps > torch.finfo(reference.dtype).eps
        rounded = reference.in_dtype(candidate.dtype) if coarser else None
        self._own = rounded or reference
        self.dtype = self._own.dtype
        self._tf32 = candidate.tf32
        self._exact = reference.exactly()
        self._eps = max(torch.finfo(self.dtype).eps, reference.eps)
        if self._eps <= torch.finfo(torch.float64).eps:
            self._exact = None  # it is itself in float64: nothing is more exact

    @property
    def is_float64(self) -> bool:
        """Whether there is a truth in float64."""
        return self._exact is not None

    @property
    def limit(self) -> Limit:
        """The rule of the limits: fixed where nothing is known about rounding."""
        eps = max(self._eps, TF32_EPS) if self._tf32 else self._eps
        if not self.is_float64:
            return Limit(eps, BLIND_FACTOR * eps)
        return Limit(eps, coarser=eps / self._eps)

    def at(self, keys: Sequence[Key]) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """The truth at some points, and the truth with the typical noise of the reference.

        What holds integers, or changes its shape, is as in the first forward.
        """
        exact = _taken(self._exact or self._own.visit, keys)
        if not self.is_float64:
            return exact, exact
        noisy: dict[Key, Tensor] = {}
        squares: dict[Key, Tensor] = {}

        def add(key: Key, tensor: Tensor) -> None:
            own, truth = plain(tensor), exact.get(key)
            if truth is None or own.shape != truth.shape or not truth.is_floating_point():
                noisy.setdefault(key, own.to("cpu", copy=True))
                return
            square = difference(own, truth).square_()
            squares[key] = squares[key].add_(square) if key in squares else square

        self._own.visit(keys, add)
        for seed in range(1, DRAWS):
            self._own.visit_jittered(list(squares), add, seed=seed)
        for key in list(squares):
            noise = squares.pop(key).div_(DRAWS).sqrt_()
            noisy[key] = noise.add_(exact[key])
        return exact, noisy


def _taken(visit: _Visit, keys: Sequence[Key]) -> dict[Key, Tensor]:
    held: dict[Key, Tensor] = {}

    def take(key: Key, tensor: Tensor) -> None:
        held[key] = plain(tensor).to("cpu", copy=True)

    visit(keys, take)
    return held


def plain(tensor: Tensor) -> Tensor:
    """A dense tensor of ordinary numbers."""
    (found,) = flatten(tensor).values()
    return found
