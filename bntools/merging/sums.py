"""What a sum of branches may be made of, as far as the operations alone tell."""

from __future__ import annotations

from collections.abc import Sequence

from bntools.dataflow.graph import Kind, Node, Value
from bntools.merging.borders import is_write, written_into

__all__ = [
    "data_inputs",
    "expands",
    "is_row",
    "is_scaling",
    "lifts",
    "steps_of",
    "terms",
]

_FACTORS = {"mul", "div", "neg"}
_POOLS = {"avg_pool2d", "avg_pool3d"}


def terms(node: Node) -> list[tuple[float, Value]] | None:
    """What a sum adds, with coefficients; None for what is no sum."""
    if node.kind is not Kind.SUM:
        return None
    return list(zip(node.sum.coefficients, node.inputs, strict=True))


def expands(node: Node) -> bool:
    """Whether an operation may be linear in its data, so that it is worth looking behind it."""
    if node.kind in (Kind.LINEAR, Kind.AFFINE, Kind.SUM):
        return True
    if node.kind is Kind.PASS:
        name = node.name.strip("_")
        return name in _FACTORS or name in _POOLS
    if node.kind is Kind.MOVE:
        return len(node.outputs) == 1
    return is_scaling(node) or is_write(node) or written_into(node) is not None


def is_scaling(node: Node) -> bool:
    """Whether an operation multiplies its data with a constant tensor, of any shape."""
    if node.name.strip("_") not in ("mul", "div") or len(node.inputs) != 2:
        return False
    first, second = (value.constant for value in node.inputs)
    return first is not second and not (first and node.name.strip("_") == "div")


def data_inputs(node: Node) -> Sequence[Value]:
    """The values that an operation is linear in; constants are not among them."""
    if node.kind is Kind.LINEAR:
        entry = node.linear.entry
        return node.inputs[:1] if entry is None else [node.inputs[entry.position]]
    if node.kind in (Kind.SUM, Kind.MOVE) or written_into(node) is not None:
        return [value for value in dict.fromkeys(node.inputs) if not value.constant]
    if node.kind is Kind.OPAQUE and is_scaling(node):
        return [value for value in node.inputs if not value.constant]
    return node.inputs[:1]


def steps_of(nodes: Sequence[Node]) -> list[Node]:
    """The convolutions and linear layers among some operations."""
    return [node for node in nodes if node.kind is Kind.LINEAR]


def is_row(value: Value) -> bool:
    """Whether a value is a map with one row: 1d pooling runs as 2d pooling of such."""
    return len(value.shape) == 4 and value.shape[2] == 1


def lifts(node: Node) -> bool:
    """Whether an operation makes a row of a signal with channels, or the other way."""
    if node.name not in ("unsqueeze", "squeeze") or not node.literals:
        return False
    many, few = node.inputs[0], node.outputs[0]
    if node.name == "unsqueeze":
        many, few = few, many
    axis = node.literals[0]
    dims = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    return is_row(many) and len(few.shape) == 3 and [dim % 4 for dim in dims] == [2]
