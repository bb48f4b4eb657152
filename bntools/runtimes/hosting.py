"""Which nodes of an ONNX model only compute shapes, which GPU sessions leave to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

__all__ = ["data_nodes"]

_MEASURES = ("Shape", "Size")


def data_nodes(model: Path | bytes, nodes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of `nodes` (name, operation) through which values of the inputs flow.

    What follows from shapes and constants only is exact integer arithmetic, whatever runs it. A
    node that the model does not have by this name counts by its operation.
    """
    if isinstance(model, Path):
        proto = onnx.load(model, load_external_data=False)
    else:
        proto = onnx.load_model_from_string(model)
    computing = _carrying(proto.graph, {value.name for value in proto.graph.input})
    names = {node.name for node in proto.graph.node if node.name}
    carrying = {node.name for node in computing}
    kinds = {node.op_type for node in computing}
    known = {node.op_type for node in proto.graph.node}
    return [
        (name, kind)
        for name, kind in nodes
        if (name in carrying if name in names else kind in kinds or kind not in known)
    ]


def _carrying(graph: GraphProto, data: set[str]) -> list[NodeProto]:
    """The nodes that data flow through, in the order of the graph."""
    data = data - {each.name for each in graph.initializer}
    found = []
    for node in graph.node:
        if data.isdisjoint(_used(node)) or node.op_type in _MEASURES:
            continue
        found.append(node)
        data.update(node.output)
    return found


def _used(node: NodeProto) -> set[str]:
    """What a node reads, in its inner graphs too."""
    used = set(node.input)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                used |= _used(inner)
    return used
