"""How much of a shift arrives: each origin's share in every element of a value.

A shift u at an origin becomes `share * u` further on. Shares are counted, not assumed: pooling and
sums are carried out on them, so that a shift that arrives unevenly is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from bntools.dataflow.graph import Kind, Node, Value
from bntools.dataflow.labels import Walk, broadcast

__all__ = ["Shares", "Spread", "solve"]

_CLOSE = 1e-9


@dataclass(frozen=True, eq=False)
class Spread:
    """The shares in a value: `codes` has for each element its row of `table`.

    A row has one share for each column of origins; NaN where that origin's shift gets stuck.
    """

    codes: Tensor
    table: Tensor


class Shares(Walk[Spread]):
    """The shares of some origins, a column for each group of them that takes one and the same."""

    def __init__(
        self, columns: Mapping[Value, int], folded: Set[Node], through: Set[Node] | None
    ) -> None:
        super().__init__(folded, through)
        self.width = max(columns.values(), default=-1) + 1
        for value, column in columns.items():
            self.known[value] = self._even(value, column)

    def step(self, node: Node, inputs: list[Spread]) -> Sequence[Spread]:
        """The shares in a node's outputs."""
        if node.kind is Kind.MOVE:
            return self._moved(node, inputs)
        if node.kind is Kind.PASS:
            return [self._passed(node, inputs[0])]
        if node.kind is Kind.SUM:
            return [_summed(inputs, node.sum.coefficients)]
        return inputs  # a norm that is gone

    def unknown(self, value: Value) -> Spread:
        """What comes from elsewhere carries no shift."""
        return self._even(value, None)

    def _even(self, value: Value, column: int | None) -> Spread:
        row = torch.zeros(1, self.width, dtype=torch.float64, device="cpu")
        if column is not None:
            row[0, column] = 1
        return Spread(torch.zeros((), device="cpu").expand(value.shape), row)

    def _moved(self, node: Node, inputs: list[Spread]) -> list[Spread]:
        offsets = [0]
        for spread in inputs:
            offsets.append(offsets[-1] + len(spread.table))
        codes = [s.codes + o for s, o in zip(inputs, offsets, strict=False)]
        # padding has no share: the last row is what negative labels stand for
        table = torch.cat([s.table for s in inputs] + [inputs[0].table.new_zeros(1, self.width)])
        results = node.move.apply(codes)
        return [_packed(codes.where(codes >= 0, offsets[-1]), table) for codes in results]

    def _passed(self, node: Node, spread: Spread) -> Spread:
        gain, table = node.passing.gain, spread.table
        passed = table * (torch.nan if gain is None else gain)
        passed = passed.masked_fill(table == 0, 0.0)
        stuck = torch.where((table != 0).any(0), torch.nan, 0.0).unsqueeze(0)
        codes = node.passing.apply([spread.codes])[0]
        return _packed(codes.where(codes >= 0, len(table)), torch.cat([passed, stuck]))


def _summed(inputs: Sequence[Spread], coefficients: Sequence[float]) -> Spread:
    total = Spread(inputs[0].codes, inputs[0].table * coefficients[0])
    for spread, factor in zip(inputs[1:], coefficients[1:], strict=True):
        first, second = broadcast([total.codes, spread.codes])
        rows = total.table.unsqueeze(1) + factor * spread.table.unsqueeze(0)
        total = _packed(first * len(spread.table) + second, rows.flatten(0, 1))
    return total


def _packed(codes: Tensor, table: Tensor) -> Spread:
    """Without the rows that nothing refers to, and with equal rows only once."""
    used, codes = torch.unique(codes.long(), return_inverse=True)
    filled = table[used].nan_to_num(torch.inf)
    rows, which = torch.unique(filled, dim=0, return_inverse=True)
    return Spread(which[codes].float(), rows.masked_fill(rows == torch.inf, torch.nan))


def solve(rows: Tensor) -> Tensor | None:
    """The smallest choice of origins, first ones first, that gives each row a total of one.

    `rows` are distinct rows of shares; gives what each origin takes, or None where no choice does.
    """
    blocked = rows.isnan().any(0)
    left = rows.masked_fill(blocked, 0.0)
    goal = torch.ones(len(rows), dtype=torch.float64, device="cpu")
    system = torch.cat([left, goal.unsqueeze(1)], 1)
    pivots: list[tuple[int, int]] = []
    for column in range(left.shape[1]):
        start = len(pivots)
        if start == len(system):
            break
        best = start + int(system[start:, column].abs().argmax())
        if abs(float(system[best, column])) < _CLOSE:
            continue
        system[[start, best]] = system[[best, start]]
        system[start] = system[start] / system[start, column]
        others = torch.arange(len(system), device="cpu") != start
        system[others] -= system[others, column].unsqueeze(1) * system[start]
        pivots.append((start, column))
    taken = torch.zeros(left.shape[1], dtype=torch.float64, device="cpu")
    for row, column in pivots:
        taken[column] = system[row, -1]
    return taken if bool(((left @ taken - 1).abs() < _CLOSE).all()) else None
