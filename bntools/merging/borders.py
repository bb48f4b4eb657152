"""Padding with one value per channel, also where a forward writes it into slices after the fact.

Such a border of what a 1x1 layer with a bias gives is exact where it has the values that the layer
gives for zeros: it is that layer after a padding with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from bntools.dataflow.graph import WRITTEN_ALIAS, Graph, Kind, Node, Value
from bntools.dataflow.reach import Refused, describe
from bntools.merging.constants import Computed, Tensors
from bntools.merging.filters import Filter, bordered
from bntools.report import Reason

__all__ = ["Border", "Painted", "border_of", "is_write", "painted", "written_into"]

_VIEWS = {"slice", "select", "alias", "detach"}
_FILLS = {"fill_", "zero_"}


@dataclass(frozen=True)
class Border:
    """Values around a map: `before` and `after` are how many on each axis after the channels.

    `own` has one for each channel, as recorded; `values` gives them for other tensors.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    own: tuple[float, ...]
    values: Callable[[Tensors], Tensor] = field(compare=False)

    def apply(self, tensors: Tensors, inputs: Sequence[Filter]) -> Filter:
        """The filter of a padding with zeros before what goes in, or `Refused`."""
        return bordered(inputs[0], self.before, self.after, self.values(tensors))


@dataclass(frozen=True, eq=False)
class _Patch:
    """One write into a part of a map: `views` lead there, `constant` is what it gets."""

    before: Value
    views: tuple[Node, ...]
    writer: Node

    def constant(self, graph: Graph) -> Computed | float:
        """What is written, or `Refused`."""
        if self.writer.name in _FILLS and len(self.writer.inputs) == 1:
            return float((*self.writer.literals, 0)[0])
        found = Computed.of_value(graph, self.writer.inputs[1])
        if found is None:
            maker = self.writer.inputs[1].producer
            what = "something" if maker is None else describe(maker)
            detail = f"{describe(self.writer)} writes what {what} gives, which is not followed"
            raise Refused(Reason.NOT_REWRITABLE, detail)
        return found


@dataclass(frozen=True, eq=False)
class Painted:
    """A padding and all writes into it; nobody sees what is between, the `inner` operations."""

    pad: Node
    patches: tuple[_Patch, ...]
    inner: frozenset[Node]

    @property
    def data(self) -> Value:
        """What is padded."""
        return self.pad.inputs[0]

    def step(self, graph: Graph, rank: int) -> Border:
        """The border as it is at the end, or `Refused`."""
        constants = [patch.constant(graph) for patch in self.patches]

        def values(tensors: Tensors) -> Tensor:
            given = [c.evaluate(tensors) if isinstance(c, Computed) else c for c in constants]
            return self._values(given, rank)

        tensors = graph.tensors
        return _border(self.pad, rank, values, values(lambda name: tensors[name].detach()))

    def _values(self, given: Sequence[Tensor | float], rank: int) -> Tensor:
        """Carry the writes out on a map of the recorded size, and look at its border."""
        ends, number = _ends(self.pad, rank)
        canvas = torch.zeros(self.data.shape, dtype=torch.float64)
        data = F.pad(torch.ones_like(canvas), ends)
        canvas = F.pad(canvas, ends, value=number)
        for patch, value in zip(self.patches, given, strict=True):
            for each, new in ((canvas, value), (data, 0.0)):
                part = _part(each, patch.views)
                part.copy_(new) if isinstance(new, Tensor) else part.fill_(new)
        if int(data.sum()) != math.prod(self.data.shape):
            raise Refused(Reason.NOT_REWRITABLE, "more than a border is written over")
        return _of_channels(canvas.movedim(1, 0), data.movedim(1, 0) == 0)


def _part(whole: Tensor, views: Sequence[Node]) -> Tensor:
    for view in views:
        whole = view.move.apply([whole])[0]
    return whole


def _of_channels(canvas: Tensor, border: Tensor) -> Tensor:
    """The one value that the border of each channel has, or `Refused`."""
    values = canvas[border].reshape(len(canvas), -1)
    if not values.numel():
        return torch.zeros(len(canvas), dtype=torch.float64)
    if not bool((values == values[:, :1]).all()):
        raise Refused(Reason.PADDED_BETWEEN, "a border with more than one value per channel")
    return values[:, 0]


def _border(pad: Node, rank: int, values: Callable[[Tensors], Tensor], own: Tensor) -> Border:
    ends, _ = _ends(pad, rank)
    before, after = tuple(reversed(ends[0::2])), tuple(reversed(ends[1::2]))
    return Border(before, after, tuple(own.tolist()), values)


def _ends(pad: Node, rank: int) -> tuple[list[int], float]:
    """What a padding adds, the last axis first, and the number that it adds; or `Refused`."""
    ends, *rest = pad.literals
    if len(ends) > 2 * rank or any(end < 0 for end in ends):
        raise Refused(Reason.PADDED_BETWEEN, f"{describe(pad)} pads other axes, or cuts off")
    return [*ends, *(0,) * (2 * rank - len(ends))], float(rest[0]) if rest else 0.0


def border_of(pad: Node, rank: int, channels: int) -> Border:
    """A padding with one number."""
    _, number = _ends(pad, rank)
    own = torch.full((channels,), number, dtype=torch.float64)
    return _border(pad, rank, lambda _: own, own)


def is_write(node: Node) -> bool:
    """Whether an operation writes a constant into a part of something."""
    if node.name not in {"copy_", *_FILLS} or len(node.writes) != 1 or len(node.outputs) != 1:
        return False
    into = node.writes[0].producer
    viewed = into is not None and into.kind is Kind.MOVE and into.name in _VIEWS
    return viewed and all(value.constant for value in node.inputs[1:])


def written_into(node: Node) -> Node | None:
    """The write that gave a value its new version, where a part of it was written."""
    if node.name != WRITTEN_ALIAS:
        return None
    writer = node.inputs[1].producer
    return writer if writer is not None and is_write(writer) else None


def painted(nodes: Sequence[Node]) -> dict[Node, Painted]:
    """The paddings that are written over, by the last operation of each; or `Refused`."""
    inside = set(nodes)
    found: dict[Node, Painted] = {}
    for node in nodes:
        writer = written_into(node)
        if writer is None:
            continue
        patch = _patch(node, writer)
        origin = patch.before.producer
        if origin is None or (origin not in found and not _is_pad(origin, inside)):
            detail = f"{describe(writer)} writes into what is no padding"
            raise Refused(Reason.NOT_REWRITABLE, detail)
        so_far = found.pop(origin, Painted(origin, (), frozenset()))
        inner = so_far.inner | {origin, writer, *patch.views}
        _check_unseen(patch.before, {node, *inner})
        found[node] = Painted(so_far.pad, (*so_far.patches, patch), inner)
    return found


def _is_pad(node: Node, inside: Set[Node]) -> bool:
    return node.name == "constant_pad_nd" and node.kind is Kind.MOVE and node in inside


def _patch(node: Node, writer: Node) -> _Patch:
    before = node.inputs[0]
    views: list[Node] = []
    value = writer.writes[0]
    while value is not before:
        view = value.producer
        if view is None or view.kind is not Kind.MOVE or view.name not in _VIEWS:
            raise Refused(Reason.NOT_REWRITABLE, f"{describe(writer)} writes to memory of others")
        views.append(view)
        value = view.inputs[0]
    return _Patch(before, tuple(reversed(views)), writer)


def _check_unseen(value: Value, inside: Set[Node]) -> None:
    for user in value.consumers:
        if user not in inside and not user.idle:
            detail = f"{describe(user)} uses a padding before it is written over"
            raise Refused(Reason.USED_ELSEWHERE, detail)
