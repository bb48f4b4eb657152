"""Constant arithmetic that is one affine map per channel: Mul, Div, Add and Sub in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import NodeProto

from bntools.affine import Affine
from bntools.onnx_graph.attributes import is_standard
from bntools.onnx_graph.tensors import FLOATS
from bntools.onnx_graph.uses import Uses
from bntools.onnx_graph.values import Knowledge

__all__ = ["Chain", "chains"]

_OPERATIONS = {"Mul", "Div", "Add", "Sub", "Neg"}
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Chain:
    """Consecutive nodes that make `scale * x + shift`, one pair of numbers per channel.

    `axis` is the axis of the channels; None where every channel has the same two numbers.
    """

    nodes: tuple[int, ...]
    data: str
    output: str
    scale: Numbers
    shift: Numbers
    axis: int | None

    def affine(self, channels: int) -> Affine:
        """The map, for so many channels."""
        scale, shift = (
            np.broadcast_to(each, (channels,)).copy() for each in (self.scale, self.shift)
        )
        return Affine(torch.from_numpy(scale), torch.from_numpy(shift))


def chains(
    nodes: Sequence[NodeProto], known: Knowledge, uses: Uses, taken: Mapping[int, object]
) -> list[Chain]:
    """The longest chains of a graph, in order; `taken` are nodes that are something else."""
    found: dict[str, Chain] = {}
    for index, node in enumerate(nodes):
        link = None if index in taken else _link(node, index, known)
        if link is None:
            continue
        before = found.get(link.data)
        joined = None
        if before is not None and uses.count(link.data) == 1:
            joined = _joined(before, link)
        if joined is not None:
            del found[link.data]
        found[link.output] = joined or link
    return list(found.values())


def _joined(before: Chain, link: Chain) -> Chain | None:
    if before.axis is not None and link.axis is not None and before.axis != link.axis:
        return None
    return replace(
        link,
        nodes=(*before.nodes, *link.nodes),
        data=before.data,
        scale=before.scale * link.scale,
        shift=before.shift * link.scale + link.shift,
        axis=link.axis if before.axis is None else before.axis,
    )


def _link(node: NodeProto, index: int, known: Knowledge) -> Chain | None:
    """One operation with a constant that has one number per channel, or one in all."""
    if node.op_type not in _OPERATIONS or not is_standard(node):
        return None
    first = node.input[0]
    second = node.input[1] if len(node.input) > 1 else ""
    flipped = known[first].constant
    data, other = (second, first) if flipped else (first, second)
    out = known[node.output[0]]
    if not data or known[data].constant or out.element not in FLOATS:
        return None
    if out.shape is None or not out.shape or known[data].shape != out.shape:
        return None
    if node.op_type == "Neg":
        return Chain((index,), data, node.output[0], np.array([-1.0]), np.zeros(1), None)
    array = known[other].array
    if not known[other].constant or array is None or (flipped and node.op_type == "Div"):
        return None
    axis = _axis_of(array.shape, out.shape)
    if axis == _NOT_PER_CHANNEL:
        return None
    scale, shift = _map(node.op_type, known[other].wide().reshape(-1), flipped=flipped)
    return Chain((index,), data, node.output[0], scale, shift, None if array.size == 1 else axis)


def _map(operation: str, value: Numbers, *, flipped: bool) -> tuple[Numbers, Numbers]:
    ones, zeros = np.ones_like(value), np.zeros_like(value)
    with np.errstate(all="ignore"):
        if operation == "Mul":
            return value, zeros
        if operation == "Div":
            return 1.0 / value, zeros
        if operation == "Add":
            return ones, value
        return (-ones, value) if flipped else (ones, -value)


_NOT_PER_CHANNEL = -2


def _axis_of(shape: tuple[int, ...], data: tuple[int, ...]) -> int:
    """The only axis of the data along which a constant varies; -1 where it has one number."""
    if len(shape) > len(data):
        return _NOT_PER_CHANNEL
    padded = (1,) * (len(data) - len(shape)) + shape
    varying = [axis for axis, size in enumerate(padded) if size != 1]
    if not varying:
        return -1
    axis = varying[0]
    if len(varying) > 1 or padded[axis] != data[axis]:
        return _NOT_PER_CHANNEL
    return axis
