"""Following values through what an affine may pass: where they come from and where they go."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import cast

from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.passing import ZERO_OPS
from bntools.report import Reason

__all__ = [
    "End",
    "Origins",
    "Reach",
    "Refused",
    "bias_beside",
    "carried",
    "crosses",
    "describe",
    "is_idle",
    "is_zero",
    "origins",
    "reach",
    "results",
    "sources",
    "weight_name",
    "weight_uses",
]

_MIXING = (Kind.PASS, Kind.SUM)
_WEIGHT_MOVES = {"t", "_to_copy", "detach", "alias", "clone"}


class Refused(Exception):  # noqa: N818 - a refusal is an answer, no error
    """A fold is ruled out: the reason and a sentence. Internal; users see a `Decision`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class End:
    """A value on the way from somewhere, and an operation on it that is not part of the way.

    `partial` says that the way there may have dropped channels.
    """

    node: Node
    value: Value
    partial: bool


@dataclass(frozen=True, slots=True)
class Reach:
    """Everything that some values become on the way, and who else uses any of it."""

    ends: tuple[End, ...]
    nodes: frozenset[Node]


@dataclass(frozen=True, slots=True)
class Origins:
    """Where a value comes from: linear calls, and parameters that are added on the way.

    `nodes` are the operations in between.
    """

    hosts: tuple[Node, ...]
    constants: tuple[Value, ...]
    nodes: frozenset[Node]


def crosses(node: Node, folded: Set[Node], through: Set[Node] | None = frozenset()) -> bool:
    """Whether a way leads through an operation: movement, norms that are gone, and more.

    Pooling, sums and the like count where they are in `through`; all of them where it is None.
    """
    if node.kind is Kind.MOVE or node in folded:
        return True
    return node.kind in _MIXING and (through is None or node in through)


def carried(node: Node) -> Sequence[Value]:
    """The values that an operation carries on: a norm and a PASS have one."""
    return node.inputs if node.kind in (Kind.MOVE, Kind.SUM) else node.inputs[:1]


def sources(value: Value, folded: Set[Node]) -> list[Node]:
    """The linear calls from which a value comes, or `Refused`."""
    return list(origins(value, folded).hosts)


def origins(value: Value, folded: Set[Node], standing: Set[Node] = frozenset()) -> Origins:
    """Where a value comes from, through all that an affine may pass, or `Refused`.

    The calls of norms that stay count as linear ones where they are among `standing`.
    """
    hosts: dict[Node, None] = {}
    constants: dict[Value, None] = {}
    nodes: dict[Node, None] = {}
    seen: set[Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item in seen or is_zero(item):
            continue
        seen.add(item)
        node = item.producer
        if node is not None and (node.kind is Kind.LINEAR or node in standing):
            hosts[node] = None
        elif node is not None and crosses(node, folded, None):
            nodes[node] = None
            stack.extend(carried(node))
        elif item.parameter is not None:
            constants[item] = None
        else:
            raise Refused(Reason.NOT_AFTER_LINEAR, f"it follows {_origin(item)}")
    if not hosts:
        raise Refused(Reason.NOT_AFTER_LINEAR, f"it follows {_origin(value)}")
    return Origins(tuple(hosts), tuple(constants), frozenset(nodes))


def is_zero(value: Value) -> bool:
    """Whether a value is made of zeros."""
    return value.producer is not None and value.producer.name in ZERO_OPS


def _origin(value: Value) -> str:
    if value.parameter is not None:
        return f"the parameter {value.parameter}"
    if value.producer is None:
        return "an input of the model, or a tensor whose origin was not recorded"
    return describe(value.producer)


def describe(node: Node) -> str:
    """An operation in words, with the module that ran it."""
    if node.kind is Kind.OUTPUT:
        return node.name
    if node.kind is Kind.AFFINE:
        what = "the affine" if node.name.startswith("affine (") else "the norm layer"
        return f"{what} {node.norm.owner}"
    return f"{node.name.strip('_')} in {node.module or 'the model itself'}"


def reach(value: Value, folded: Set[Node], through: Set[Node] | None = frozenset()) -> Reach:
    """Follow a value forward to everything that uses it, or what becomes of it (see `crosses`)."""
    ends: dict[tuple[Node, Value], bool] = {}
    nodes: set[Node] = set()
    seen: dict[Value, bool] = {}
    stack = [(value, False)]
    while stack:
        item, partial = stack.pop()
        if item in seen and seen[item] <= partial:
            continue
        seen[item] = partial
        for node in item.consumers:
            if crosses(node, folded, through) and item in carried(node):
                nodes.add(node)
                cut = partial or (node.kind is Kind.MOVE and node.move.partial)
                stack.extend((out, cut) for out in results(node))
            elif not node.idle:
                ends[node, item] = ends.get((node, item), True) and partial
    return Reach(tuple(End(n, v, p) for (n, v), p in ends.items()), frozenset(nodes))


def results(node: Node) -> Sequence[Value]:
    """What an operation makes of the values that it carries on."""
    return node.outputs if node.kind is Kind.MOVE else node.outputs[:1]


def is_idle(value: Value) -> bool:
    """Whether nothing comes of a value."""
    return all(node.idle for node in value.consumers)


def _absorbs(node: Node) -> bool:
    """Whether a call has a weight that can absorb an affine: a linear one, or one of a norm."""
    if node.kind is Kind.AFFINE:
        return node.norm.linear is not None
    return node.kind is Kind.LINEAR


def _is_only_the_weight(node: Node, value: Value) -> bool:
    return _weight_as_seen(node) is value and node.inputs.count(value) == 1


def _weight_as_seen(node: Node) -> Value | None:
    """`mm(x, t(W))` has W as its weight, and consumes t(W)."""
    return node.linear.weight if node.linear.weight in node.inputs else node.inputs[-1]


def weight_name(node: Node) -> str:
    """The name of the parameter that a linear call uses as its weight, or `Refused`."""
    value = cast("Value", node.linear.weight)
    while value.parameter is None:
        producer = value.producer
        if producer is None:
            raise Refused(
                Reason.FIXED_WEIGHT,
                f"the weight used in {node.module or 'the model'} is no parameter of the model",
            )
        if producer.kind is not Kind.MOVE or producer.name not in _WEIGHT_MOVES - {"t"}:
            raise Refused(Reason.COMPUTED_WEIGHT, _computed(node, producer))
        value = producer.inputs[0]
    return value.parameter


def _computed(node: Node, producer: Node) -> str:
    return (
        f"the weight used in {node.module or 'the model'} is computed at run time"
        f" ({producer.name.strip('_')}); bake it in first (remove_parametrizations, or .weight)"
    )


def weight_uses(graph: Graph, name: str) -> list[Node]:
    """The linear calls that use a parameter as their weight, or `Refused` for any other use."""
    calls: list[Node] = []
    stack = [graph.parameters[name]]
    while stack:
        value = stack.pop()
        for node in value.consumers:
            if _absorbs(node) and _is_only_the_weight(node, value):
                calls.append(node)
            elif node.kind is Kind.MOVE and node.name in _WEIGHT_MOVES:
                stack.extend(node.outputs)
            else:
                raise Refused(Reason.TIED_WEIGHT, f"{name} is also used by {describe(node)}")
    return calls


def bias_beside(graph: Graph, weight: str) -> str:
    """The name that the bias of a weight's layer has, whether it is there or not."""
    owner = graph.owners[weight]
    return f"{owner}.bias" if owner else "bias"
