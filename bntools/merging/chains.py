"""Deciding on consecutive layers: a linear layer right after another one, where one is smaller."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from bntools.dataflow.graph import Graph, Kind, Node
from bntools.dataflow.layers import has_hooks
from bntools.dataflow.reach import Refused, weight_name
from bntools.merging.branches import Found
from bntools.merging.cones import Cone, check_exclusive, check_parameters
from bntools.merging.merges import Planned, Undone, check_cost, merged_shape, tensor_of
from bntools.merging.steps import program
from bntools.merging.sums import data_inputs
from bntools.modules import get_module
from bntools.recipe import Edit
from bntools.report import Merge, Reason

__all__ = ["chain_merges"]

_BETWEEN = {"clone", "detach", "alias"}
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def chain_merges(
    model: nn.Module,
    graph: Graph,
    chosen: Set[str] | None,
    undone: Undone,
) -> Found:
    """The pairs of layers of one recording that become one, no layer in two of them."""
    merges: list[Planned] = []
    left: list[Merge] = []
    taken: set[Node] = set()
    for pair in _pairs(graph):
        if taken.intersection(pair.nodes):
            continue
        first, second = (_path(graph, node) for node in (pair.nodes[0], pair.nodes[-1]))
        try:
            merge = undone.check(_planned(model, graph, pair, chosen))
        except Refused as refused:
            reason, detail = refused.reason, refused.detail
            left.append(Merge(second, "linear", (first, second), reason=reason, detail=detail))
            continue
        taken.update(pair.nodes)
        merges.append(merge)
    return Found(tuple(merges), tuple(left))


def _pairs(graph: Graph) -> list[Cone]:
    """Every linear call with the one that its data comes from, nothing between."""
    found = []
    for node in graph.of_kind(Kind.LINEAR):
        between = [node]
        before = data_inputs(node)[0].producer
        while before is not None and before.kind is Kind.MOVE and before.name in _BETWEEN:
            between.append(before)
            before = before.inputs[0].producer
        if before is None or before.kind is not Kind.LINEAR:
            continue
        nodes = (before, *reversed(between))
        found.append(Cone(data_inputs(before)[0], node.outputs[0], nodes))
    return found


def _path(graph: Graph, node: Node) -> str:
    weight = node.linear.weight
    name = None if weight is None else weight.parameter
    return graph.owners.get(name or "", node.module)


def _planned(model: nn.Module, graph: Graph, pair: Cone, chosen: Set[str] | None) -> Planned:
    check_exclusive(pair)
    check_parameters(graph, pair.nodes, chosen)
    steps = program(graph, pair.source, pair.nodes)
    first, second = (_layer(model, graph, node) for node in (pair.nodes[0], pair.nodes[-1]))
    filter_ = steps.evaluate(tensor_of(model)).balanced()
    check_cost(filter_, pair.nodes, smaller=True)
    shape = merged_shape(filter_, bias=any(each.bias is not None for each in steps.weights))
    parent, inside = _common(first, second)
    row = Merge(parent, "linear", (first, second), second)
    options = {"first": inside[0], "second": inside[1], "layer": shape.to_options()}
    return Planned(row, Edit("merge-linear", parent, options=options), second, steps)


def _layer(model: nn.Module, graph: Graph, node: Node) -> str:
    """The path of a layer that another one may stand for; it is called, and does nothing else."""
    path = graph.owners[weight_name(node)]
    module = get_module(model, path)
    if not isinstance(module, _LAYERS) or node.module != path or not path:
        raise Refused(Reason.NOT_REWRITABLE, f"the weight of {path} is used by other code")
    if has_hooks(module):
        raise Refused(Reason.HOOKS, f"{path} has hooks, which would see other values")
    for other in graph.nodes:
        inside = path in other.stack and other is not node and other.kind is not Kind.OUTPUT
        if inside and not all(value.constant for value in other.inputs):
            detail = f"{path} does more than its layer ({other.name.strip('_')})"
            raise Refused(Reason.NOT_REWRITABLE, detail)
    return path


def _common(first: str, second: str) -> tuple[str, tuple[str, str]]:
    """The path of the smallest module with both, and their paths in it."""
    a, b = first.split("."), second.split(".")
    shared = 0
    while shared < min(len(a), len(b)) - 1 and a[shared] == b[shared]:
        shared += 1
    return ".".join(a[:shared]), (".".join(a[shared:]), ".".join(b[shared:]))
