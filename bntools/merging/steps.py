"""What each operation between two values is as a filter, in a form that holds for other numbers.

A `Program` is found on one recording and evaluated on any model of the same structure: in float64,
it gives the kernel to the last bit that the parameters have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.reach import Refused, describe, weight_name
from bntools.merging.filters import Filter, added, average, identity, padded, scaling, then
from bntools.report import Reason

__all__ = ["Frame", "Program", "data_inputs", "expands", "frame_of", "program", "steps_of"]

_SAME = {"clone", "detach", "alias", "lift_fresh"}
_FACTORS = {"mul", "div", "neg"}
_POOLS = {"avg_pool2d": 2, "avg_pool3d": 3}
Tensors = Callable[[str], Tensor]


@dataclass(frozen=True)
class Frame:
    """What all values have in common: the axis of the channels, and how many axes come after."""

    channel_dim: int
    rank: int

    def channels(self, value: Value) -> int:
        """The number of channels of a value, or `Refused` where it is laid out otherwise."""
        batched = len(value.shape) == self.channel_dim + 1 + self.rank
        if not batched or (self.rank and self.channel_dim != 1):
            raise Refused(Reason.CHANNEL_MISMATCH, "its values are laid out in different ways")
        return value.shape[self.channel_dim]


@dataclass(frozen=True)
class _Convolve:
    """A convolution, or a linear layer, by the names of its tensors."""

    weight: str
    axis: int = 0
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    # a recording that tries out biases has one where others have none
    bias: str | None = field(default=None, compare=False)

    def apply(self, tensors: Tensors, inputs: Sequence[Filter]) -> Filter:
        weight = tensors(self.weight).detach().double()
        weight = weight.t() if self.axis else weight
        bias = weight.new_zeros(weight.shape[0]) if self.bias is None else tensors(self.bias)
        zeros = self.padding
        own = Filter(weight, bias, self.groups, self.stride, self.dilation, zeros, zeros)
        return then(inputs[0], own)


@dataclass(frozen=True, eq=False)
class _Scale:
    """A norm layer, or another constant affine map."""

    affine: Affine
    rank: int

    def apply(self, _: Tensors, inputs: Sequence[Filter]) -> Filter:
        return then(inputs[0], scaling(self.affine, self.rank))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scale) and self.affine.same_as(other.affine)

    __hash__ = None  # type: ignore[assignment] # compared, never looked up


@dataclass(frozen=True)
class _Average:
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    divisor: int | None

    def apply(self, _: Tensors, inputs: Sequence[Filter]) -> Filter:
        own = average(self.channels, self.kernel, self.stride, self.padding, self.divisor)
        return then(inputs[0], own)


@dataclass(frozen=True)
class _Pad:
    channels: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, _: Tensors, inputs: Sequence[Filter]) -> Filter:
        return then(inputs[0], padded(self.channels, self.before, self.after))


@dataclass(frozen=True)
class _Add:
    coefficients: tuple[float, ...]

    def apply(self, _: Tensors, inputs: Sequence[Filter]) -> Filter:
        return added(list(zip(self.coefficients, inputs, strict=True)))


Step = _Convolve | _Scale | _Average | _Pad | _Add


@dataclass(frozen=True)
class Program:
    """The filter between two values: each step makes one value of earlier ones, 0 is the input."""

    channels: int
    rank: int
    steps: tuple[tuple[Step, tuple[int, ...]], ...]

    def evaluate(self, tensors: Tensors) -> Filter:
        """The whole as one filter, of a model's tensors by name; `Refused` where it is none."""
        found = [identity(self.channels, self.rank)]
        for step, inputs in self.steps:
            found.append(step.apply(tensors, [found[i] for i in inputs]))
        return found[-1]

    @property
    def weights(self) -> tuple[_Convolve, ...]:
        """The convolutions and linear layers among the steps, in execution order."""
        return tuple(step for step, _ in self.steps if isinstance(step, _Convolve))


def expands(node: Node) -> bool:
    """Whether an operation may be linear in its data, so that it is worth looking behind it."""
    if node.kind in (Kind.LINEAR, Kind.AFFINE, Kind.SUM):
        return True
    name = node.name.strip("_")
    if node.kind is Kind.PASS:
        return name in _FACTORS or name in _POOLS
    return node.kind is Kind.MOVE and len(node.outputs) == 1


def data_inputs(node: Node) -> Sequence[Value]:
    """The values that an operation is linear in; constants are not among them."""
    if node.kind is Kind.LINEAR:
        entry = node.linear.entry
        return node.inputs[:1] if entry is None else [node.inputs[entry.position]]
    if node.kind in (Kind.SUM, Kind.MOVE):
        return [value for value in dict.fromkeys(node.inputs) if not value.constant]
    return node.inputs[:1]


def steps_of(nodes: Sequence[Node]) -> list[Node]:
    """The convolutions and linear layers among some operations."""
    return [node for node in nodes if node.kind is Kind.LINEAR]


def frame_of(nodes: Sequence[Node]) -> Frame:
    """The layout of the values between operations, which their linear layers tell."""
    frames = {_frame(node) for node in steps_of(nodes)}
    if len(frames) != 1:
        detail = "convolutions and linear layers of different kinds meet in it"
        raise Refused(Reason.CHANNEL_MISMATCH, detail)
    return frames.pop()


def _frame(node: Node) -> Frame:
    weight = node.linear.weight
    if node.linear.host is not None or weight is None:
        raise Refused(Reason.NOT_REWRITABLE, f"{node.module} is a registered layer of its own kind")
    if node.name == "convolution":
        return Frame(1, len(weight.shape) - 2)
    return Frame(node.linear.channel_dim, 0)


def program(graph: Graph, source: Value, nodes: Sequence[Node]) -> Program:
    """The operations, in execution order, as one program from `source` on; or `Refused`."""
    frame = frame_of(nodes)
    places = {source: 0}
    steps: list[tuple[Step, tuple[int, ...]]] = []
    for node in nodes:
        inputs = node.inputs if node.kind is Kind.SUM else data_inputs(node)
        step = _step(graph, node, frame)
        for value in inputs:
            frame.channels(value)
            if value not in places:
                raise Refused(Reason.CHANNEL_MISMATCH, _other_input(node))
        if step is None:
            places[node.outputs[0]] = places[inputs[0]]
            continue
        steps.append((step, tuple(places[value] for value in inputs)))
        places[node.outputs[0]] = len(steps)
    return Program(frame.channels(source), frame.rank, tuple(steps))


def _other_input(node: Node) -> str:
    return f"{describe(node)} adds a constant that is none of one value per channel"


def _step(graph: Graph, node: Node, frame: Frame) -> Step | None:
    """What a node does; None where that is nothing."""
    if node.kind is Kind.LINEAR:
        return _convolve(graph, node)
    if node.kind is Kind.AFFINE:
        return _scale(node, frame)
    if node.kind is Kind.SUM:
        shapes = {value.shape for value in (*node.inputs, *node.outputs)}
        if len(shapes) > 1:
            raise Refused(Reason.CHANNEL_MISMATCH, "its branches have different shapes")
        return _Add(node.sum.coefficients)
    name = node.name.strip("_")
    if node.kind is Kind.PASS and name in _FACTORS and node.passing.gain is not None:
        return _Add((node.passing.gain,))
    if name in _POOLS:
        return _average(node, _POOLS[name], frame)
    if name == "constant_pad_nd":
        return _pad(node, frame)
    if name in _SAME:
        return None
    raise Refused(Reason.NOT_REWRITABLE, f"{describe(node)} is between its layers")


def _convolve(graph: Graph, node: Node) -> Step:
    linear = node.linear
    name = weight_name(node)
    if name not in graph.owners:
        raise Refused(Reason.FIXED_WEIGHT, f"the weight of {node.module} is no parameter")
    bias = None if linear.bias is None else linear.bias.parameter
    if linear.bias is not None and bias is None:
        raise Refused(Reason.COMPUTED_WEIGHT, f"the bias of {node.module} is computed at run time")
    if node.name != "convolution":
        return _Convolve(name, axis=linear.layout.axis, bias=bias)
    stride, padding, dilation, transposed, _, groups = node.literals[-6:]
    if transposed:
        detail = f"{node.module} is a transposed convolution, which merges with nothing"
        raise Refused(Reason.OTHER_GEOMETRY, detail)
    rank = len(graph.tensors[name].shape) - 2
    steps, zeros, holes = (_spread(sizes, rank) for sizes in (stride, padding, dilation))
    return _Convolve(name, 0, int(groups), steps, zeros, holes, bias)


def _scale(node: Node, frame: Frame) -> Step:
    affine = node.norm.affine
    if isinstance(affine, Reason):
        detail = f"{node.norm.owner} has no constant affine map ({affine.value})"
        raise Refused(affine, detail)
    if not affine.is_finite():
        raise Refused(Reason.NON_FINITE, f"{node.norm.owner} gives NaN or infinite values")
    channels = frame.channels(node.inputs[0])
    if node.norm.channel_dim != frame.channel_dim or affine.channels != channels:
        raise Refused(Reason.CHANNEL_MISMATCH, f"{node.norm.owner} has other channels")
    return _Scale(affine, frame.rank)


def _average(node: Node, rank: int, frame: Frame) -> Step:
    given: list[Any] = [*node.literals, *(None,) * 6][:6]
    kernel = _spread(given[0], rank)
    stride = _spread(given[1], rank) if given[1] else kernel
    padding = _spread(given[2] or 0, rank)
    counts = given[4] is not False
    if rank != frame.rank:
        raise Refused(Reason.CHANNEL_MISMATCH, f"{describe(node)} pools over other axes")
    if given[3]:
        raise Refused(Reason.OTHER_GEOMETRY, f"{describe(node)} pools in ceil_mode")
    if any(padding) and not counts and given[5] is None:
        detail = f"{describe(node)} divides by fewer values at the border (count_include_pad=False)"
        raise Refused(Reason.OTHER_GEOMETRY, detail)
    return _Average(frame.channels(node.inputs[0]), kernel, stride, padding, given[5])


def _pad(node: Node, frame: Frame) -> Step:
    ends, value = node.literals[0], (*node.literals, 0)[1]
    if value or len(ends) > 2 * frame.rank or any(end < 0 for end in ends):
        raise Refused(Reason.PADDED_BETWEEN, f"{describe(node)} pads with no zeros, or other axes")
    full = [*ends, *(0,) * (2 * frame.rank - len(ends))]
    before, after = tuple(reversed(full[0::2])), tuple(reversed(full[1::2]))
    return _Pad(frame.channels(node.inputs[0]), before, after)


def _spread(sizes: Any, rank: int) -> tuple[int, ...]:
    """One size for every axis, as PyTorch reads its arguments."""
    found = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return tuple(int(size) for size in (found * rank if len(found) == 1 else found))
