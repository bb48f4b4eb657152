"""Whether two recordings saw the same operations on the same values."""

from __future__ import annotations

from itertools import zip_longest

from bntools.dataflow.graph import Graph, Node, Value

__all__ = ["first_difference"]


def first_difference(graph: Graph, twin: Graph) -> Node | None:
    """The first operation that reads or gives other values in the one recording than in the other.

    torch.fx traces `x += y` as `x + y`: where somebody sees x afterwards, this tells.
    """
    same: dict[Value, Value] = {}
    for node, other in zip_longest(graph.nodes, twin.nodes):
        if node is None or other is None:
            return node or other
        alike = node.kind is other.kind and node.name.strip("_") == other.name.strip("_")
        if not alike or len(node.inputs) != len(other.inputs):
            return node
        for mine, theirs in zip(node.inputs, other.inputs, strict=True):
            if same.setdefault(mine, theirs) is not theirs:
                return node
        if len(node.outputs) != len(other.outputs):
            return node
        same.update(zip(node.outputs, other.outputs, strict=True))
    return None
