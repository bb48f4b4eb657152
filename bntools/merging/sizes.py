"""The size of a model as one forward shows it."""

from __future__ import annotations

import math

from torch import nn

from bntools.dataflow.graph import Graph, Kind, Node
from bntools.modules import named_tensors
from bntools.report import Size

__all__ = ["size_of"]


def size_of(model: nn.Module, graph: Graph) -> Size:
    """Convolutions and linear layers that were called, parameters, and FLOPs of the recording."""
    calls = list(graph.of_kind(Kind.LINEAR))
    convolutions = sum(node.name == "convolution" for node in calls)
    tensors = {id(t): t for *_, t in named_tensors(model) if isinstance(t, nn.Parameter)}
    return Size(
        convolutions,
        len(calls) - convolutions,
        sum(tensor.numel() for tensor in tensors.values()),
        2 * sum(map(_multiplications, calls)),
    )


def _multiplications(node: Node) -> int:
    """Each weight is used once for every place of the output; of what is transposed, the input."""
    linear = node.linear
    if linear.weight is None:
        return 0
    transposed = node.name == "convolution" and bool(node.literals[-3])
    value = node.inputs[0] if transposed or linear.entry is None else node.outputs[0]
    axis = 1 if transposed else linear.channel_dim
    places = math.prod(value.shape) // max(1, value.shape[axis])
    return places * math.prod(linear.weight.shape)
