"""Who uses which value of an ONNX graph, inner graphs included."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, NodeProto

from bntools.onnx_graph.reading import inner_graphs

__all__ = ["Uses", "captured", "input_names"]


def input_names(node: NodeProto) -> list[str]:
    """The values that a node uses, as often as it does, with those that its inner graphs use."""
    names = [name for name in node.input if name]
    for graph in inner_graphs(node):
        names.extend(captured(graph))
    return names


def captured(graph: GraphProto) -> list[str]:
    """The values of outer graphs that a graph uses, each once."""
    own = {value.name for value in graph.input} | {each.name for each in graph.initializer}
    own.update(each.values.name for each in graph.sparse_initializer)
    found: dict[str, None] = {}
    for node in graph.node:
        found.update(dict.fromkeys(name for name in input_names(node) if name not in own))
        own.update(node.output)
    found.update(dict.fromkeys(v.name for v in graph.output if v.name not in own))
    return list(found)


class Uses:
    """How often each value of a graph is used, by nodes, inner graphs, and as an output."""

    def __init__(self, graph: GraphProto) -> None:
        self.outputs = {value.name for value in graph.output}
        self.nodes: dict[str, list[int]] = {}
        for index, name in _uses(graph):
            self.nodes.setdefault(name, []).append(index)
        self._quantised = {
            each.value
            for note in graph.quantization_annotation
            for each in note.quant_parameter_tensor_names
        }

    def count(self, name: str) -> int:
        """How often a value is used."""
        outside = (name in self.outputs) + (name in self._quantised)
        return len(self.nodes.get(name, ())) + outside

    def only_user(self, name: str) -> int | None:
        """The place of the only node that uses a value; None where there are more uses, or none."""
        users = self.nodes.get(name, ())
        return users[0] if len(users) == 1 and self.count(name) == 1 else None


def _uses(graph: GraphProto) -> Iterator[tuple[int, str]]:
    for index, node in enumerate(graph.node):
        for name in input_names(node):
            yield index, name
