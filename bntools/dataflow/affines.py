"""Affines however they are written: chains of arithmetic with constants become AFFINE nodes.

A chain is a run of additions, subtractions, multiplications and divisions of one value with
constants, in one call of one module, where nobody else uses what is in between. Its constants
follow from parameters, buffers, plain tensors of the model and literals, and vary along one axis at
most. A chain with a module of its own is that module; any other is named after its module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.arithmetic import Call, Numbers
from bntools.dataflow.graph import Kind, Node, Value
from bntools.dataflow.stepping import carried_out, composed, data_of, stepped

__all__ = ["Chain", "Chains", "kept_only"]


@dataclass(eq=False, slots=True)
class Chain:
    """A run of operations on one value, and the map that it is: tensors that broadcast to it."""

    nodes: list[Node]
    calls: list[tuple[Call, Value]]
    scale: Tensor
    shift: Tensor
    leaves: dict[Value, None] = field(default_factory=dict)

    @property
    def data(self) -> Value:
        """What goes in."""
        return self.calls[0][1]

    @property
    def out(self) -> Value:
        """What comes out."""
        return self.nodes[-1].outputs[0]

    @property
    def operations(self) -> str:
        """The operations in words."""
        return ", ".join(call.operation for call, _ in self.calls)

    @property
    def axis(self) -> int | None:
        """The axis along which the map varies; None for a map that does not."""
        return varying(self.scale, self.shift)

    def affine(self, dim: int) -> Affine:
        """The map by channel."""
        channels = self.data.shape[dim]
        return Affine(*(_by_channel(t, channels) for t in (self.scale, self.shift)))

    def apply(self, numbers: Numbers, data: Tensor) -> Tensor:
        """Carry the chain out."""
        for call, value in self.calls:
            data = carried_out(call, value, data, numbers)
        return data


def _by_channel(number: Tensor, channels: int) -> Tensor:
    return number.flatten().expand(channels).clone()


def varying(*numbers: Tensor) -> int | None:
    """The axis along which numbers vary; None for none, -1 for more than one."""
    axes = {i for number in numbers for i, size in enumerate(number.shape) if size > 1}
    if not axes:
        return None
    return axes.pop() if len(axes) == 1 else -1


class Chains:
    """The chains of a recording; `uses` has all that uses a value."""

    def __init__(self, nodes: Sequence[Node], numbers: Numbers) -> None:
        self.nodes = nodes
        self.numbers = numbers
        self.uses: dict[Value, list[Node]] = {}
        for node in nodes:
            for value in dict.fromkeys(node.inputs):
                self.uses.setdefault(value, []).append(node)

    def found(self, watched: Set[str]) -> list[Chain]:
        """All chains, as long as they can be; none within a call of a `watched` module."""
        ending: dict[Value, Chain] = {}
        chains: list[Chain] = []
        for node in self.nodes:
            call = self.numbers.calls.get(node)
            if call is None or any(path in watched for path in node.stack):
                continue
            data = data_of(call, self.numbers.constants)
            if data is None or not data.shape or data.shape != node.outputs[0].shape:
                continue
            before = ending.get(data)
            chain = self._extended(before, node, call, data) if before is not None else None
            if chain is None:
                chain = self._extended(None, node, call, data)
                chains += [] if chain is None else [chain]
            if chain is not None:
                ending[node.outputs[0]] = chain
        return chains

    def _extended(self, before: Chain | None, node: Node, call: Call, data: Value) -> Chain | None:
        """A chain with one operation more; a new one for `before` None. None if it is no chain."""
        if before is not None and not self._goes_on(before, node, data):
            return None
        step = stepped(call, data, self.numbers)
        if step is None:
            return None
        whole = step if before is None else composed((before.scale, before.shift), step)
        if varying(*whole) == -1:
            return None
        chain = before or Chain([], [], *whole)
        chain.scale, chain.shift = whole
        chain.nodes.append(node)
        chain.calls.append((call, data))
        for value in call.values():
            if value is not data:
                chain.leaves.update(dict.fromkeys(self.numbers.leaves_of(value)))
        return chain

    def _goes_on(self, chain: Chain, node: Node, data: Value) -> bool:
        """Whether an operation belongs to the same call, and is all that uses what came before."""
        return (
            chain.out is data
            and chain.nodes[-1].stack is node.stack
            and self.uses.get(data) == [node]
        )

    def idle(self, chains: Iterable[Chain]) -> set[Node]:
        """The operations that only compute constants of chains."""
        gone = {node for chain in chains for node in chain.nodes}
        idle: set[Node] = set()
        for node in reversed(self.nodes):
            if node in gone or not node.outputs or node.writes:
                continue
            if self.numbers.constants.issuperset(node.outputs) and all(
                use in gone or use in idle or kept_only(use)
                for value in node.outputs
                for use in self.uses.get(value, ())
            ):
                idle.add(node)
        return idle


def kept_only(node: Node) -> bool:
    """Whether a use is only that a module kept a constant, as it was before in its place."""
    return node.kind is Kind.OUTPUT and node.name == "kept after the forward"
