"""A draft of a changed ONNX model: names stay unique, tensors are copied only where needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from onnx import GraphProto, ModelProto, NodeProto, helper
from torch import Tensor

from bntools.onnx_graph.reading import inner_graphs
from bntools.onnx_graph.tensors import proto_of
from bntools.onnx_graph.uses import input_names

__all__ = ["Draft"]

_INPUTS_TOO = 4  # before this IR version, every initialiser is an input as well


@dataclass(frozen=True, eq=False)
class _Placed:
    """A tensor that an input of a node is to have, in the place of the constant `old`."""

    node: NodeProto
    position: int
    tensor: Tensor
    old: str | None
    name: str


class Draft:
    """A copy of a model while it is changed.

    Nodes are known by their places in the original. What the changes leave unused goes at the end;
    nodes that were unused before stay.
    """

    def __init__(self, proto: ModelProto) -> None:
        self._proto = ModelProto()
        self._proto.CopyFrom(proto)
        self._graph = self._proto.graph
        self._nodes = list(self._graph.node)
        self._idle = {_key(node) for node in _idle(self._nodes, self._graph)}
        self._gone: set[int] = set()
        self._behind: dict[int, NodeProto] = {}
        self._removed: dict[str, str] = {}
        self._placed: list[_Placed] = []
        self._taken = set(_names(self._graph))

    def node(self, place: int) -> NodeProto:
        """A node of the draft."""
        found: NodeProto = self._nodes[place]
        return found

    def put(self, place: int, position: int, old: str | None, tensor: Tensor) -> None:
        """Let an input of a node be a tensor, in the place of the constant `old` if it had one."""
        node = self._nodes[place]
        self._put(_Placed(node, position, tensor, old, old or f"{_called(node)}.bias"))

    def drop(self, place: int, name: str) -> None:
        """Let an attribute of a node be the usual one."""
        node = self._nodes[place]
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)

    def add_behind(self, place: int, tensor: Tensor) -> None:
        """Add a constant to what a node gives."""
        node = self._nodes[place]
        output, name = node.output[0], _called(node)
        node.output[0] = self._unique(f"{output}_without_bias")
        addition = helper.make_node(
            "Add", [node.output[0], ""], [output], name=self._unique(f"{name}_bias")
        )
        addition.metadata_props.extend(node.metadata_props)
        self._behind[place] = addition
        self._put(_Placed(addition, 1, tensor, None, f"{name}.bias"))

    def bypass(self, places: Iterable[int], data: str, output: str) -> None:
        """Take nodes out that made `output` of `data`, which is the same value from now on."""
        self._gone.update(places)
        self._removed[output] = data

    def finished(self) -> ModelProto:
        """The changed model; the draft is done with."""
        nodes = [node for place in range(len(self._nodes)) for node in self._at(place)]
        new_names = self._ends(nodes)
        for node in nodes:
            _rename(node, new_names)
        nodes.extend(self._copies(nodes, new_names))
        self._place_tensors(nodes)
        kept = _living(nodes, self._graph, self._idle)
        copies = []
        for node in kept:
            copy = NodeProto()
            copy.CopyFrom(node)
            copies.append(copy)
        del self._graph.node[:]
        self._graph.node.extend(copies)
        self._tidy()
        return self._proto

    def _at(self, place: int) -> Iterator[NodeProto]:
        if place not in self._gone:
            yield self._nodes[place]
            if place in self._behind:
                yield self._behind[place]

    def _put(self, placed: _Placed) -> None:
        while len(placed.node.input) <= placed.position:
            placed.node.input.append("")
        placed.node.input[placed.position] = ""
        self._placed.append(placed)

    # names

    def _unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found

    def _source(self, name: str) -> str:
        """The value that stays for one that is gone."""
        while name in self._removed:
            name = self._removed[name]
        return name

    def _ends(self, nodes: list[NodeProto]) -> dict[str, str]:
        """New names of values: those of what is gone, and of what is an output of the model now."""
        made = {name for node in nodes for name in node.output}
        outputs = [value.name for value in self._graph.output]
        named = {name: name for name in outputs if name not in self._removed}
        for name in outputs:
            source = self._source(name)
            if name in self._removed and source in made and source not in named:
                named[source] = name
        found = {name: self._source(name) for name in self._removed}
        found = {name: named.get(source, source) for name, source in found.items()}
        found.update({source: name for source, name in named.items() if source != name})
        return {old: new for old, new in found.items() if old != new}

    def _copies(self, nodes: list[NodeProto], names: Mapping[str, str]) -> list[NodeProto]:
        """Outputs that are the same value as an input, a constant, or another output."""
        made = {name for node in nodes for name in node.output}
        copies = []
        for value in self._graph.output:
            if value.name in self._removed and value.name not in made:
                source = self._source(value.name)
                given = names.get(source, source)
                name = self._unique(f"{value.name}_copy")
                copies.append(helper.make_node("Identity", [given], [value.name], name=name))
        return copies

    # tensors

    def _place_tensors(self, nodes: list[NodeProto]) -> None:
        """Make initialisers of the new tensors, in the place of old ones that nobody needs."""
        used = {name for node in nodes for name in input_names(node)}
        used.update(value.name for value in self._graph.output)
        stored = {each.name: each for each in self._graph.initializer}
        open_names = {value.name for value in self._graph.input}
        if self._proto.ir_version < _INPUTS_TOO:
            open_names = set()
        made: dict[str, list[tuple[str, Tensor]]] = {}
        for placed in self._placed:
            known = made.setdefault(placed.name, [])
            name = next(
                (
                    n
                    for n, t in known
                    if t.dtype == placed.tensor.dtype and torch.equal(t, placed.tensor)
                ),
                "",
            )
            if not name:
                free = placed.old in stored and placed.old not in used | open_names
                name = placed.name if free and not known else self._unique(_new_name(placed))
                self._store(name, placed.tensor)
                known.append((name, placed.tensor))
            placed.node.input[placed.position] = name

    def _store(self, name: str, tensor: Tensor) -> None:
        made = proto_of(tensor, name)
        for each in self._graph.initializer:
            if each.name == name:
                made.doc_string = each.doc_string
                each.CopyFrom(made)
                return
        self._graph.initializer.append(made)
        if self._proto.ir_version < _INPUTS_TOO:
            self._graph.input.append(
                helper.make_tensor_value_info(name, made.data_type, list(made.dims))
            )

    def _tidy(self) -> None:
        """Drop initialisers that nobody uses, and notes on values that are gone."""
        graph = self._graph
        used = {name for node in graph.node for name in input_names(node)}
        used.update(value.name for value in graph.output)
        for note in graph.quantization_annotation:
            used.update(each.value for each in note.quant_parameter_tensor_names)
        inputs = {value.name for value in graph.input}
        early = self._proto.ir_version < _INPUTS_TOO
        unused = {
            each.name
            for each in graph.initializer
            if each.name not in used and (early or each.name not in inputs)
        }
        _filter(graph.initializer, unused)
        if early:
            _filter(graph.input, unused)
        made = {name for node in graph.node for name in node.output}
        _filter(graph.value_info, {v.name for v in graph.value_info} - made)


def _filter(entries: object, unwanted: set[str]) -> None:
    """Take the entries of these names out of a list of a message."""
    listed: list[object] = entries  # type: ignore[assignment]  # protobuf's own list type
    for place in range(len(listed) - 1, -1, -1):
        if listed[place].name in unwanted:  # type: ignore[attr-defined]  # all have names
            del listed[place]


def _new_name(placed: _Placed) -> str:
    return placed.name if placed.old is None else f"{placed.name}_folded"


def _called(node: NodeProto) -> str:
    return node.name or node.output[0]


def _key(node: NodeProto) -> tuple[str, ...]:
    return tuple(node.output)


def _names(graph: GraphProto) -> Iterator[str]:
    """Every name of a value or node in a graph and the graphs in it."""
    pending = [graph]
    while pending:
        one = pending.pop()
        for group in (one.input, one.output, one.initializer, one.value_info):
            yield from (each.name for each in group)
        yield from (each.values.name for each in one.sparse_initializer)
        for node in one.node:
            yield node.name
            yield from node.input
            yield from node.output
            pending.extend(inner_graphs(node))


def _rename(node: NodeProto, names: Mapping[str, str], *, outputs: bool = True) -> None:
    """Rename values in a node and in the graphs in it."""
    for place, name in enumerate(node.input):
        node.input[place] = names.get(name, name)
    if outputs:
        for place, name in enumerate(node.output):
            node.output[place] = names.get(name, name)
    for graph in inner_graphs(node):
        for inner in graph.node:
            _rename(inner, names, outputs=False)
        for value in graph.output:
            value.name = names.get(value.name, value.name)


def _idle(nodes: list[NodeProto], graph: GraphProto) -> list[NodeProto]:
    """The nodes that nothing needs."""
    needed = {value.name for value in graph.output}
    idle = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(input_names(node))
        else:
            idle.append(node)
    return idle


def _living(
    nodes: list[NodeProto], graph: GraphProto, idle: set[tuple[str, ...]]
) -> list[NodeProto]:
    """The nodes that are needed, and those that were not needed before either."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output) or _key(node) in idle:
            needed.update(input_names(node))
            kept.append(node)
    return kept[::-1]
