"""Following values through data movement: where they come from, where they go, which channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.report import Reason

__all__ = [
    "End",
    "Reach",
    "Refused",
    "affines_at",
    "bias_beside",
    "describe",
    "meets",
    "passes",
    "reach",
    "sources",
    "weight_name",
    "weight_uses",
]

_WEIGHT_MOVES = {"t", "_to_copy", "detach", "alias", "clone"}


class Refused(Exception):  # noqa: N818 - a refusal is an answer, no error
    """A fold is ruled out: the reason and a sentence. Internal; users see a `Decision`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class End:
    """A value of a host's that something other than movement uses.

    `partial` says that the way there may have dropped channels.
    """

    node: Node
    value: Value
    partial: bool


@dataclass(frozen=True, slots=True)
class Reach:
    """Everything that movement makes of some values, and who uses it."""

    ends: tuple[End, ...]
    moves: frozenset[Node]


def passes(node: Node, folded: Set[Node]) -> bool:
    """Whether an operation only moves data, once the folded norms are gone."""
    return node.kind is Kind.MOVE or node in folded


def data_inputs(node: Node) -> Sequence[Value]:
    """The values that an operation moves; a norm moves its first input only."""
    return node.inputs[:1] if node.kind is Kind.AFFINE else node.inputs


def sources(value: Value, folded: Set[Node]) -> list[Node]:
    """The linear calls from which a value comes through movement alone, or `Refused`."""
    found: dict[Node, None] = {}
    seen: set[Value] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        node = item.producer
        if node is not None and passes(node, folded):
            stack.extend(data_inputs(node))
        elif node is not None and node.kind is Kind.LINEAR:
            found[node] = None
        else:
            raise Refused(Reason.NOT_AFTER_LINEAR, f"it follows {_origin(item)}")
    return list(found)


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
        return f"the norm layer {node.norm.owner}"
    return f"{node.name.strip('_')} in {node.module or 'the model itself'}"


def reach(value: Value, folded: Set[Node]) -> Reach:
    """Follow a value forward through movement to everything that uses it."""
    ends: dict[tuple[Node, Value], bool] = {}
    moves: set[Node] = set()
    seen: dict[Value, bool] = {}
    stack = [(value, False)]
    while stack:
        item, partial = stack.pop()
        if item in seen and seen[item] <= partial:
            continue
        seen[item] = partial
        for node in item.consumers:
            if passes(node, folded) and item in data_inputs(node):
                moves.add(node)
                cut = partial or (node.kind is Kind.MOVE and node.move.partial)
                stack.extend((out, cut) for out in _moved(node))
            else:
                ends[node, item] = ends.get((node, item), True) and partial
    return Reach(tuple(End(n, v, p) for (n, v), p in ends.items()), frozenset(moves))


def _moved(node: Node) -> Sequence[Value]:
    return node.outputs[:1] if node.kind is Kind.AFFINE else node.outputs


class Labels:
    """Which channel of which linear call each element of a value is.

    Channels of all calls are numbered through; the movement itself is carried out on the numbers.
    -1 is an element from elsewhere, such as padding.
    """

    def __init__(self, hosts: Iterable[Node], folded: Set[Node]) -> None:
        self._folded = folded
        self._known: dict[Value, Tensor] = {}
        self.offsets: dict[Node, range] = {}
        start = 0
        for host in hosts:
            value = host.outputs[0]
            axis = host.linear.channel_dim
            count = value.shape[axis]
            self.offsets[host] = range(start, start + count)
            numbers = torch.arange(start, start + count, dtype=torch.float32, device="cpu")
            view = [count if i == axis else 1 for i in range(len(value.shape))]
            self._known[value] = numbers.reshape(view).expand(value.shape)
            start += count

    def of(self, value: Value) -> Tensor:
        """The labels of a value, in its shape."""
        pending = [value]
        while pending:
            item = pending[-1]
            if item in self._known:
                pending.pop()
                continue
            node = item.producer
            if node is None or not passes(node, self._folded):
                self._known[item] = torch.tensor(-1.0, device="cpu").expand(item.shape)
                continue
            missing = [v for v in data_inputs(node) if v not in self._known]
            if missing:
                pending.extend(missing)
                continue
            self._apply(node)
        return self._known[value]

    def _apply(self, node: Node) -> None:
        inputs = [self._known[v] for v in data_inputs(node)]
        results = inputs if node.kind is Kind.AFFINE else node.move.apply(inputs)
        for out, labels in zip(_moved(node), results, strict=True):
            self._known[out] = labels


def affines_at(site: Node, hosts: Sequence[Node], folded: Set[Node]) -> dict[Node, Affine]:
    """What each host has to absorb: the norm's affine, by the host's own channels.

    Refused where an element is not from a host, or a channel of a host meets two of the norm's.
    """
    affine = cast("Affine", site.norm.affine)
    value, dim = site.inputs[0], site.norm.channel_dim
    if len(value.shape) <= dim or value.shape[dim] != affine.channels:
        raise Refused(Reason.CHANNEL_MISMATCH, "its input has no such channel axis")
    if len(hosts) == 1 and hosts[0].outputs[0] is value and hosts[0].linear.channel_dim == dim:
        return {hosts[0]: affine}
    if not all(0 not in host.outputs[0].shape for host in hosts) or 0 in value.shape:
        raise Refused(Reason.CHANNEL_MISMATCH, "it saw no elements that show its channels")
    labels = Labels(hosts, folded)
    target = _norm_channels(labels.of(value), dim, labels)
    return {
        host: _by_host(affine, target[numbers.start : numbers.stop])
        for host, numbers in labels.offsets.items()
    }


def _norm_channels(seen: Tensor, dim: int, labels: Labels) -> Tensor:
    """For every numbered channel the norm's channel that it meets, or -1."""
    flat = seen.movedim(dim, 0).flatten(1).long()
    if bool((flat < 0).any()):
        raise Refused(Reason.NOT_AFTER_LINEAR, "part of what it sees is padding")
    total = max(numbers.stop for numbers in labels.offsets.values())
    target = torch.full((total,), -1, device="cpu")
    rows = torch.arange(flat.shape[0], device="cpu").unsqueeze(1).expand_as(flat)
    target[flat.flatten()] = rows.flatten()
    if bool((target[flat] != rows).any()):
        raise Refused(
            Reason.CHANNEL_MISMATCH, "its channels are not the output channels of the layer before"
        )
    return target


def _by_host(affine: Affine, target: Tensor) -> Affine:
    result = Affine.identity(target.numel())
    met = target >= 0
    result.scale[met] = affine.scale[target[met]]
    result.shift[met] = affine.shift[target[met]]
    return result


def meets(end: End, host: Node, sites: Sequence[Node], folded: Set[Node]) -> bool:
    """Whether another user of a host's output sees a channel that the norm sees as well."""
    if not end.partial or 0 in end.value.shape:
        return True
    labels = Labels([host], folded)
    others = labels.of(end.value).flatten()
    for site in sites:
        mine = labels.of(site.inputs[0]).flatten()
        if bool(torch.isin(mine[mine >= 0], others).any()):
            return True
    return False


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
            if node.kind is Kind.LINEAR and _is_only_the_weight(node, value):
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
