"""Constants that a forward computes, such as a kernel plus a fixed one: computed again in float64.

Found on one recording, they hold for other numbers of the tensors from which they follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bntools.dataflow.arithmetic import Leaf, Numbers, collapsed
from bntools.dataflow.graph import Graph, Node, Value
from bntools.dataflow.reach import Refused, describe, weight_name
from bntools.report import Reason

__all__ = ["Channels", "Computed", "Tensors", "check_leaves", "is_constant", "weight_of"]

Tensors = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that follows from parameters, buffers, plain tensors and numbers by arithmetic."""

    value: Value
    numbers: Numbers

    @classmethod
    def of_value(cls, graph: Graph, value: Value) -> Computed | None:
        """What computes a value; None where that is unknown."""
        numbers = graph.numbers
        if numbers is None or value not in numbers.constants:
            return None
        return cls(value, numbers)

    @property
    def leaves(self) -> list[tuple[Value, Leaf]]:
        """The tensors of the model from which it follows."""
        found = self.numbers.leaves_of(self.value)
        return [(value, self.numbers.leaves[value]) for value in found]

    def evaluate(self, tensors: Tensors) -> Tensor:
        """The number, in float64, of the tensors that a model has by name."""
        held = {value: tensors(leaf.name) for value, leaf in self.leaves if leaf.registered}
        return self.numbers.other(held, torch.float64).of(self.value)

    def __eq__(self, other: object) -> bool:
        """Whether two recordings compute the same."""
        if not isinstance(other, Computed):
            return NotImplemented
        mine, theirs = (
            each.numbers.other({}, torch.float64).of(each.value) for each in (self, other)
        )
        return torch.equal(mine, theirs)

    __hash__ = None  # type: ignore[assignment] # compared, never looked up


@dataclass(frozen=True)
class Channels:
    """A constant that is added: one value per channel, or one for all."""

    constant: Computed
    channels: int

    @classmethod
    def of(cls, graph: Graph, value: Value, to: tuple[int, ...], axis: int) -> Channels | None:
        """A constant that is added to a value of shape `to`; None where it varies otherwise."""
        found = Computed.of_value(graph, value)
        if found is None or len(value.shape) > len(to):
            return None
        number = collapsed(found.evaluate(lambda name: graph.tensors[name]), len(to))
        if any(size > 1 for at, size in enumerate(number.shape) if at != axis):
            return None
        return cls(found, to[axis])

    def evaluate(self, tensors: Tensors) -> Tensor:
        """The values, shape (channels,)."""
        number = self.constant.evaluate(tensors)
        return collapsed(number, number.dim()).flatten().expand(self.channels)


def weight_of(graph: Graph, node: Node) -> str | Computed:
    """The weight of a linear call: a parameter by its name, or what computes it; or `Refused`."""
    try:
        return weight_name(node)
    except Refused:
        found = Computed.of_value(graph, cast("Value", node.linear.weight))
        if found is None or not any(leaf.registered for _, leaf in found.leaves):
            raise
        return found


def is_constant(graph: Graph, value: Value) -> bool:
    """Whether a value is the same for every input."""
    return value.constant or (graph.numbers is not None and value in graph.numbers.constants)


def check_leaves(graph: Graph, constant: Computed, inside: Set[Node]) -> None:
    """What a constant follows from may serve the operations `inside` alone, and no others."""
    for value, leaf in constant.leaves:
        if leaf.path in graph.sealed:
            raise Refused(Reason.SCRIPTED, f"{leaf.path} is compiled by TorchScript")
        for node in _users(graph, value):
            if node not in inside:
                raise Refused(Reason.TIED_WEIGHT, f"{leaf.name} is also used by {describe(node)}")


def _users(graph: Graph, value: Value) -> Iterator[Node]:
    """The operations that use a constant, or what is computed of it and other constants."""
    stack, seen = [value], {value}
    while stack:
        for node in stack.pop().consumers:
            if node.outputs and all(is_constant(graph, each) for each in node.inputs):
                stack.extend(each for each in node.outputs if each not in seen)
                seen.update(node.outputs)
            else:
                yield node
