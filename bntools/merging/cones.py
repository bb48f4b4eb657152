"""Finding what may merge: sums of linear branches of one value, on a recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.reach import Refused, bias_beside, describe, weight_uses
from bntools.merging.borders import is_write, painted
from bntools.merging.constants import Computed, check_leaves, weight_of
from bntools.merging.sums import data_inputs, expands, steps_of
from bntools.report import Reason

__all__ = ["Cone", "check_exclusive", "check_parameters", "check_written", "cones"]


@dataclass(frozen=True)
class Cone:
    """All operations between a value and a sum of linear branches of it, in execution order."""

    source: Value
    target: Value
    nodes: tuple[Node, ...]

    @property
    def path(self) -> str:
        """The path of the smallest module in which all of it happens."""
        stacks = [node.stack for node in self.nodes]
        shared = [level[0] for level in zip(*stacks, strict=False) if len(set(level)) == 1]
        return shared[-1] if shared else ""

    @property
    def where(self) -> str:
        """The path of the sum, for messages."""
        return self.nodes[-1].module


def cones(graph: Graph, taken: Set[Node]) -> Iterator[Cone]:
    """Every sum in which branches of one value meet, the largest first.

    Sums among `taken`, which may grow on the way, are left out.
    """
    for node in reversed(graph.nodes):
        if node not in taken and node.kind is Kind.SUM:
            cone = _cone(node)
            if cone is not None and steps_of(cone.nodes):
                yield cone


def _cone(sum_: Node) -> Cone | None:
    """Walk back from a sum, the latest operation first, until one value is left."""
    target = sum_.outputs[0]
    open_: dict[Value, None] = {target: None}
    nodes: list[Node] = []
    while len(open_) > 1 or target in open_:
        value = max(open_, key=_order)
        node = value.producer
        if node is None or value is not node.outputs[0] or not expands(node):
            return None
        del open_[value]
        nodes.append(node)
        open_.update(dict.fromkeys(v for v in data_inputs(node) if not v.constant))
    if not open_:
        return None
    return Cone(next(iter(open_)), target, tuple(reversed(nodes)))


def _order(value: Value) -> int:
    return -1 if value.producer is None else value.producer.order


def check_exclusive(cone: Cone) -> None:
    """Nobody else may see what is between the ends, or share the memory that is written there."""
    inside = set(cone.nodes)
    for node in cone.nodes:
        for value in node.outputs:
            if value is cone.target:
                continue
            for user in value.consumers:
                if user not in inside and not user.idle:
                    raise Refused(*_other_use(user, node))
        if any(written.producer is None for written in node.writes):
            raise Refused(Reason.WRITTEN_IN_PLACE, "an input of the model is written in place")


def check_written(nodes: Sequence[Node]) -> None:
    """What operations write in place must be new memory of theirs."""
    inside = set(nodes)
    own = {node for each in painted(nodes).values() for node in each.inner}
    for node in nodes:
        for value in node.writes if node not in own else ():
            origin = value.producer
            while origin is not None and origin in inside and origin.writes:
                origin = origin.writes[0].producer
            moved = origin is not None and origin.kind is Kind.MOVE and origin.name != "clone"
            if origin not in inside or moved:
                raise Refused(Reason.WRITTEN_IN_PLACE, "what goes into it is written in place")


def _other_use(user: Node, of: Node) -> tuple[Reason, str]:
    what = describe(of)
    if user.kind is not Kind.OUTPUT:
        return Reason.USED_ELSEWHERE, f"{describe(user)} also uses what {what} gives"
    if "hook" in user.name:
        return Reason.HOOKS, f"{user.name} sees what {what} gives"
    if user.name == "returned" or user.name.startswith("kept"):
        return Reason.RETURNED, f"the model returns or keeps what {what} gives"
    return Reason.USED_ELSEWHERE, f"what {what} gives leaves the graph by {user.name}"


def check_parameters(graph: Graph, nodes: Sequence[Node], chosen: Set[str] | None) -> None:
    """Weights, biases and norm layers may be used here only; `chosen` are the norms that may go."""
    inside = set(nodes)
    for node in steps_of(nodes):
        weight = weight_of(graph, node)
        if isinstance(weight, Computed):
            check_leaves(graph, weight, inside)
        else:
            _check_layer(graph, weight, inside)
        _check_bias(node, inside)
    for node in filter(is_write, nodes):
        for value in node.inputs[1:]:
            written = Computed.of_value(graph, value)
            if written is not None:
                check_leaves(graph, written, inside)
    owners = {node.norm.owner for node in nodes if node.kind is Kind.AFFINE}
    for node in graph.of_kind(Kind.AFFINE):
        if node.norm.owner in owners and node not in inside:
            raise Refused(Reason.HOST_SHARED, f"{node.norm.owner} is called elsewhere as well")
    for owner in sorted(owners):
        if chosen is not None and owner not in chosen:
            raise Refused(Reason.SKIPPED, f"{owner} was left out by --only or --skip")


def _check_layer(graph: Graph, name: str, inside: set[Node]) -> None:
    path = graph.owners.get(name, "")
    if path in graph.sealed:
        raise Refused(Reason.SCRIPTED, f"{path} is compiled by TorchScript")
    for each in (name, bias_beside(graph, name)):
        if each in graph.tied:
            raise Refused(Reason.TIED_WEIGHT, f"{each} is also {', '.join(graph.tied[each])}")
    if not inside.issuperset(weight_uses(graph, name)):
        raise Refused(Reason.HOST_SHARED, f"{path} is called elsewhere as well")


def _check_bias(node: Node, inside: set[Node]) -> None:
    bias = node.linear.bias
    if bias is not None and not inside.issuperset(bias.consumers):
        detail = f"the bias of {node.module} is used elsewhere as well"
        raise Refused(Reason.TIED_WEIGHT, detail)
