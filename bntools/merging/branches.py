"""Deciding on sums of branches: which layer takes over, and where the forward changes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import nn

from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.layers import has_hooks
from bntools.dataflow.reach import Refused
from bntools.errors import SurgeryError
from bntools.merging.cones import (
    Cone,
    check_exclusive,
    check_parameters,
    check_written,
    cones,
)
from bntools.merging.constants import Computed, is_constant, weight_of
from bntools.merging.merges import Planned, Undone, check_cost, merged_shape, tensor_of
from bntools.merging.probing import Probed
from bntools.merging.steps import program
from bntools.merging.sums import steps_of
from bntools.modules import get_module, named_modules, named_tensors
from bntools.recipe import Edit
from bntools.report import Merge, Reason
from bntools.rewriting import Bypass, Shape, own_graph

__all__ = ["Found", "branch_merges", "places"]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Found:
    """What may merge on one recording, and what may not, with the reason."""

    merges: tuple[Planned, ...]
    left: tuple[Merge, ...]


def places(graph: Graph) -> set[str]:
    """The paths of the modules whose forward would change."""
    return {cone.path for cone in cones(graph, set())}


def branch_merges(
    model: nn.Module,
    seen: Probed,
    failures: Mapping[str, str],
    chosen: Set[str] | None,
    undone: Undone,
) -> Found:
    """The merges of one recording with probes; none inside of another.

    `failures` are the modules that torch.fx cannot trace, `chosen` the norm layers that may go,
    `undone` the merges that failed their check.
    """
    taken: set[Node] = set()
    merges: list[Planned] = []
    left: list[Merge] = []
    for cone in cones(seen.graph, taken):
        try:
            merge = undone.check(_planned(model, seen, cone, failures, chosen))
        except Refused as refused:
            row = _left(seen.graph, cone, refused)
            if not any(_says_as_much(other, row) for other in left):
                left.append(row)
            continue
        taken.update(cone.nodes)
        merges.append(merge)
    return Found(tuple(reversed(merges)), tuple(reversed(left)))


def _says_as_much(row: Merge, other: Merge) -> bool:
    """Whether the smaller sum inside of a larger one is left for the same reason."""
    same = row.reason is other.reason and row.detail == other.detail
    return same and set(row.layers) >= set(other.layers)


def _left(graph: Graph, cone: Cone, refused: Refused) -> Merge:
    layers = _layers(graph, cone)
    return Merge(cone.where, "branches", layers, reason=refused.reason, detail=refused.detail)


def _layers(graph: Graph, cone: Cone) -> tuple[str, ...]:
    """The layers in a sum: those that have weights, and norms."""
    found: dict[str, None] = {}
    for node in cone.nodes:
        if node.kind is Kind.LINEAR:
            weight = node.linear.weight
            name = None if weight is None else weight.parameter
            found[graph.owners.get(name or "", node.module)] = None
        elif node.kind is Kind.AFFINE:
            found[node.norm.owner] = None
    return tuple(found)


def _planned(
    model: nn.Module,
    seen: Probed,
    cone: Cone,
    failures: Mapping[str, str],
    chosen: Set[str] | None,
) -> Planned:
    graph = seen.graph
    check_exclusive(cone)
    check_parameters(graph, cone.nodes, chosen)
    steps = program(graph, cone.source, cone.nodes)
    if cone.path in failures:
        raise Refused(Reason.NOT_REWRITABLE, failures[cone.path])
    check_written([seen.twin_of(node) for node in cone.nodes])
    if (count := seen.calls(cone.path)) != 1:
        detail = f"{cone.path or 'the model'} is called {count} times"
        raise Refused(Reason.HOST_SHARED, detail)
    filter_ = steps.evaluate(tensor_of(model)).balanced()
    check_cost(filter_, cone.nodes)
    shape = merged_shape(filter_, bias=any(each.bias is not None for each in steps.weights))
    host = _host(model, graph, cone, shape)
    change = _change(model, seen, cone, host)
    _check_calls(model, graph, cone, change)
    norms = tuple(dict.fromkeys(n.norm.owner for n in cone.nodes if n.kind is Kind.AFFINE))
    row = Merge(cone.path, "branches", _layers(graph, cone), host, cone.path)
    options = {**change.stored(), "layer": shape.to_options()}
    edit = Edit("merge-branches", cone.path, options=options)
    return Planned(row, edit, host, steps, norms)


def _host(model: nn.Module, graph: Graph, cone: Cone, shape: Shape) -> str:
    """The layer that stays: of the right shape where there is one, else the largest."""
    prefix = f"{cone.path}." if cone.path else ""
    best: dict[str, tuple[bool, int]] = {}
    for node in steps_of(cone.nodes):
        weight = weight_of(graph, node)
        if isinstance(weight, Computed):
            continue  # its layer is one of its own kind
        path = graph.owners[weight]
        module = get_module(model, path)
        if path.startswith(prefix) and isinstance(module, _LAYERS) and path:
            right = _sized(module) == _sized_as(shape)
            best.setdefault(path, (right, graph.tensors[weight].numel()))
    if not best:
        raise Refused(Reason.NOT_REWRITABLE, "its weights belong to no layer inside of it")
    return max(best, key=lambda path: best[path])


def _sized(module: nn.Module) -> tuple[object, ...]:
    if isinstance(module, nn.Linear):
        return (module.in_features, module.out_features)
    names = ("in_channels", "out_channels", "groups", "kernel_size", "stride", "dilation")
    return tuple(getattr(module, name) for name in names)


def _sized_as(shape: Shape) -> tuple[object, ...]:
    if not shape.kernel:
        return (shape.inputs, shape.outputs)
    channels = shape.inputs, shape.outputs, shape.groups
    return (*channels, shape.kernel, shape.stride, shape.dilation)


def _change(model: nn.Module, seen: Probed, cone: Cone, host: str) -> Bypass:
    names = seen.names(cone.path)
    source, target = names.get(_twin_source(seen, cone)), names.get(_twin_target(seen, cone))
    if source is None or target is None:
        detail = f"the forward of {cone.path or 'the model'} does not have both ends of it"
        raise Refused(Reason.NOT_REWRITABLE, detail)
    inside = host.removeprefix(f"{cone.path}.") if cone.path else host
    try:
        module = get_module(model, cone.path)
        return Bypass.between(*own_graph(module), (source, target), inside)
    except SurgeryError as error:
        raise Refused(Reason.NOT_REWRITABLE, str(error).partition(": ")[2]) from error


def _twin_source(seen: Probed, cone: Cone) -> Value:
    user = next(node for node in cone.nodes if cone.source in node.inputs)
    return seen.twin_of(user).inputs[user.inputs.index(cone.source)]


def _twin_target(seen: Probed, cone: Cone) -> Value:
    return seen.twin_of(cone.nodes[-1]).outputs[0]


def _check_calls(model: nn.Module, graph: Graph, cone: Cone, change: Bypass) -> None:
    """What is not called any more may do nothing but this, and nobody may listen to it."""
    prefix = f"{cone.path}." if cone.path else ""
    inside = set(cone.nodes)
    for path in (prefix + call for call in change.calls):
        part = get_module(model, path)
        if any(has_hooks(module) for _, module in named_modules(part)):
            raise Refused(Reason.HOOKS, f"{path} has hooks, which would not be called any more")
        if not any(True for _ in named_tensors(part)):
            continue
        for node in graph.nodes:
            more = node not in inside and not node.idle and not _is_constant(graph, node)
            if path in node.stack and more:
                detail = f"{path} does more than this ({node.name.strip('_')})"
                raise Refused(Reason.NOT_REWRITABLE, detail)


def _is_constant(graph: Graph, node: Node) -> bool:
    known = all(is_constant(graph, value) for value in node.inputs)
    return known and node.kind is not Kind.OUTPUT
