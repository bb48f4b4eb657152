"""Which channel each element of a value is: movement, pooling and sums carried out on numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from bntools.dataflow.graph import ELSEWHERE, MIXED, ZERO, Kind, Node, Value
from bntools.dataflow.reach import carried, crosses, is_zero

__all__ = ["Labels", "Walk", "broadcast"]

T = TypeVar("T")


class Walk(Generic[T]):
    """Something that follows the data from its origins to any value, node by node.

    `step` gives it for what a node carries on, `unknown` for values that come from elsewhere.
    """

    def __init__(self, folded: Set[Node], through: Set[Node] | None) -> None:
        self.known: dict[Value, T] = {}
        self._folded = folded
        self._through = through

    def of(self, value: Value) -> T:
        """What arrives at a value."""
        pending = [value]
        while pending:
            item = pending[-1]
            if item in self.known:
                pending.pop()
                continue
            node = item.producer
            if node is None or not crosses(node, self._folded, self._through):
                self.known[item] = self.unknown(item)
                continue
            missing = [v for v in carried(node) if v not in self.known]
            if missing:
                pending.extend(missing)
                continue
            results = self.step(node, [self.known[v] for v in carried(node)])
            self.known.update(zip(node.outputs, results, strict=False))
        return self.known[value]

    def step(self, node: Node, inputs: list[T]) -> Sequence[T]:
        """What a node makes of it."""
        raise NotImplementedError

    def unknown(self, value: Value) -> T:
        """What a value from elsewhere has."""
        raise NotImplementedError


class Labels(Walk[Tensor]):
    """The channel of some values (linear calls' outputs, say) that each element of a value is.

    `origins` are values with their channel axis; the channels of all are numbered through, and
    where the axis is None every element is. An element that is the sum of several has the label of
    the first, and `classes` says which channels meet in one sum.
    """

    def __init__(
        self,
        origins: Iterable[tuple[Value, int | None]],
        folded: Set[Node],
        through: Set[Node] | None = frozenset(),
    ) -> None:
        super().__init__(folded, through)
        self.ranges: dict[Value, range] = {}
        self._joined: list[Tensor] = []
        axes = dict(origins)
        self.total = 0
        for value, axis in axes.items():
            self.ranges[value] = range(self.total, self.total + _count(value, axis))
            self.total = self.ranges[value].stop
        dtype = torch.float32 if self.total < 1 << 24 else torch.float64
        for value, numbers in self.ranges.items():
            self.known[value] = _numbered(value, axes[value], numbers, dtype)

    def step(self, node: Node, inputs: list[Tensor]) -> Sequence[Tensor]:
        """The labels of a node's outputs."""
        if node.kind is Kind.MOVE:
            return node.move.apply(inputs)
        if node.kind is Kind.PASS:
            return node.passing.apply(inputs)
        if node.kind is Kind.SUM:
            return [self._sum(inputs)]
        return inputs  # a norm that is gone

    def unknown(self, value: Value) -> Tensor:
        """Zeros are zeros, and everything else is from elsewhere."""
        label = ZERO if is_zero(value) else ELSEWHERE
        return torch.tensor(float(label), device="cpu").expand(value.shape)

    def _sum(self, terms: list[Tensor]) -> Tensor:
        first, *others = broadcast(terms)
        for other in others:
            pairs = (first != other) & (first >= 0) & (other >= 0)
            if bool(pairs.any()):
                joined = torch.stack([first[pairs], other[pairs]], 1)
                self._joined.append(torch.unique(joined, dim=0).long())
            spoilt = (torch.minimum(first, other) < 0) & (first != other)
            spoilt &= (first != ZERO) & (other != ZERO)
            first = torch.where(first == ZERO, other, first).masked_fill(spoilt, MIXED)
        return first

    def classes(self) -> Tensor:
        """For each channel the first of those that it meets in sums, directly or not."""
        heads = list(range(self.total))

        def head(label: int) -> int:
            while heads[label] != label:
                heads[label] = label = heads[heads[label]]
            return label

        for pairs in self._joined:
            for a, b in pairs.tolist():
                low, high = sorted((head(a), head(b)))
                heads[high] = low
        return torch.tensor([head(label) for label in heads], dtype=torch.long, device="cpu")


def broadcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the shape of their sum."""
    shape = torch.Size(np.broadcast_shapes(*(tuple(tensor.shape) for tensor in tensors)))
    return [tensor.expand(shape) for tensor in tensors]


def _count(value: Value, axis: int | None) -> int:
    if axis is not None:
        return value.shape[axis]
    count = 1
    for length in value.shape:
        count *= length
    return count


def _numbered(value: Value, axis: int | None, numbers: range, dtype: torch.dtype) -> Tensor:
    labels = torch.arange(numbers.start, numbers.stop, dtype=dtype, device="cpu")
    if axis is None:
        return labels.reshape(value.shape)
    view = [len(numbers) if i == axis else 1 for i in range(len(value.shape))]
    return labels.reshape(view).expand(value.shape)
