"""What each operation between two values is as a filter, in a form that holds for other numbers.

A `Program` is found on one recording and evaluated on any model of the same structure: in float64,
it gives the kernel to the last bit that the parameters have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bntools.affine import Affine
from bntools.dataflow.graph import Graph, Kind, Node, Value
from bntools.dataflow.reach import Refused, describe
from bntools.merging.borders import Border, border_of, painted
from bntools.merging.constants import Channels, Computed, Tensors, weight_of
from bntools.merging.filters import Filter, added, average, cropped, identity, scaling, then
from bntools.merging.sums import (
    data_inputs,
    is_row,
    is_scaling,
    lifts,
    steps_of,
    terms,
)
from bntools.report import Reason

__all__ = ["Frame", "Program", "frame_of", "program"]

_SAME = {"clone", "detach", "alias", "lift_fresh"}
_END = 2**63 - 1  # how ATen writes a slice to the end
_FACTORS = {"mul", "div", "neg"}
_POOLS = {"avg_pool2d": 2, "avg_pool3d": 3}


@dataclass(frozen=True)
class Frame:
    """What all values have in common: the axis of the channels, and how many axes come after."""

    channel_dim: int
    rank: int

    def channels(self, value: Value) -> int:
        """The number of channels of a value, or `Refused` where it is laid out otherwise."""
        batched = len(value.shape) == self.channel_dim + 1 + self.rank
        batched = batched or (self.rank == 1 and is_row(value))
        if not batched or (self.rank and self.channel_dim != 1):
            raise Refused(Reason.CHANNEL_MISMATCH, "its values are laid out in different ways")
        return value.shape[self.channel_dim]


@dataclass(frozen=True)
class _Convolve:
    """A convolution, or a linear layer, by the names of its tensors."""

    weight: str | Computed
    axis: int = 0
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    # a recording that tries out biases has one where others have none
    bias: str | None = field(default=None, compare=False)

    def apply(self, tensors: Tensors, inputs: Sequence[Filter]) -> Filter:
        own = self.weight
        weight = own.evaluate(tensors) if isinstance(own, Computed) else tensors(own)
        weight = weight.detach().double()
        weight = weight.t() if self.axis else weight
        bias = weight.new_zeros(weight.shape[0]) if self.bias is None else tensors(self.bias)
        zeros = self.padding
        filter_ = Filter(weight, bias, self.groups, self.stride, self.dilation, zeros, zeros)
        return then(inputs[0], filter_)


@dataclass(frozen=True, eq=False)
class _Scale:
    """A norm layer, or another constant affine map.

    `held` are the names of a batch norm's tensors, weight first, and its eps: a fold may have given
    it other numbers.
    """

    affine: Affine
    rank: int
    held: tuple[tuple[str, ...], float] | None = None

    def apply(self, tensors: Tensors, inputs: Sequence[Filter]) -> Filter:
        affine = self.affine
        if self.held is not None:
            names, eps = self.held
            affine = _batch_norm([tensors(name) for name in names], eps)
        return then(inputs[0], scaling(affine, self.rank))

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
class _Crop:
    channels: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, _: Tensors, inputs: Sequence[Filter]) -> Filter:
        return then(inputs[0], cropped(self.channels, self.before, self.after))


@dataclass(frozen=True)
class _Add:
    """A sum, also with constants of one value per channel."""

    coefficients: tuple[float, ...]
    constants: tuple[tuple[float, Channels], ...] = ()

    def apply(self, tensors: Tensors, inputs: Sequence[Filter]) -> Filter:
        whole = added(list(zip(self.coefficients, inputs, strict=True)))
        bias = whole.bias
        for factor, constant in self.constants:
            bias = bias + factor * constant.evaluate(tensors)
        return replace(whole, bias=bias)


Step = _Convolve | _Scale | _Average | Border | _Crop | _Add


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
    borders = painted(nodes)
    written = {node for each in borders.values() for node in each.inner}
    places = {source: 0}
    steps: list[tuple[Step, tuple[int, ...]]] = []
    for node in nodes:
        if node in written:
            continue
        border = borders.get(node)
        inputs = _inputs(node) if border is None else (border.data,)
        step = _step(graph, node, frame) if border is None else border.step(graph, frame.rank)
        for value in inputs:
            if value not in places:
                detail = f"{describe(node)} also takes what is not made of one value alone"
                raise Refused(Reason.CHANNEL_MISMATCH, detail)
            frame.channels(value)
        if step is None:
            places[node.outputs[0]] = places[inputs[0]]
            continue
        steps.append((step, tuple(places[value] for value in inputs)))
        places[node.outputs[0]] = len(steps)
    return Program(frame.channels(source), frame.rank, tuple(steps))


def _inputs(node: Node) -> Sequence[Value]:
    """What a step takes; constants are none of it."""
    found = terms(node)
    if found is None:
        return data_inputs(node)
    return [value for _, value in found if not value.constant]


def _step(graph: Graph, node: Node, frame: Frame) -> Step | None:
    """What a node does; None where that is nothing."""
    if node.kind is Kind.LINEAR:
        return _convolve(graph, node)
    if node.kind is Kind.AFFINE:
        return _scale(graph, node, frame)
    if (found := terms(node)) is not None:
        return _sum(graph, node, found, frame)
    name = node.name.strip("_")
    if node.kind is Kind.PASS and name in _FACTORS and node.passing.gain is not None:
        return _Add((node.passing.gain,))
    if name in _POOLS:
        return _average(node, _POOLS[name], frame)
    if name == "constant_pad_nd":
        return border_of(node, frame.rank, frame.channels(node.inputs[0]))
    if name == "slice":
        return _crop(node, frame)
    if name in _SAME or (frame.rank == 1 and lifts(node)):
        return None
    if is_scaling(node):
        detail = f"{describe(node)} scales by a constant that is none of one value per channel"
        raise Refused(Reason.CHANNEL_MISMATCH, detail)
    raise Refused(Reason.NOT_REWRITABLE, f"{describe(node)} is between its layers")


def _sum(graph: Graph, node: Node, found: Sequence[tuple[float, Value]], frame: Frame) -> Step:
    shapes = {value.shape for _, value in found if not value.constant}
    if len({*shapes, node.outputs[0].shape}) > 1:
        raise Refused(Reason.CHANNEL_MISMATCH, "its branches have different shapes")
    constants = []
    for factor, value in found:
        if value.constant:
            each = Channels.of(graph, value, node.outputs[0].shape, frame.channel_dim)
            if each is None:
                detail = f"{describe(node)} adds a constant that is none of one value per channel"
                raise Refused(Reason.CHANNEL_MISMATCH, detail)
            constants.append((factor, each))
    return _Add(tuple(k for k, value in found if not value.constant), tuple(constants))


def _convolve(graph: Graph, node: Node) -> Step:
    linear = node.linear
    name = weight_of(graph, node)
    if isinstance(name, str) and name not in graph.owners:
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
    rank = len(node.inputs[0].shape) - 2
    steps, zeros, holes = (_spread(sizes, rank) for sizes in (stride, padding, dilation))
    return _Convolve(name, 0, int(groups), steps, zeros, holes, bias)


def _scale(graph: Graph, node: Node, frame: Frame) -> Step:
    affine = node.norm.affine
    if isinstance(affine, Reason):
        detail = f"{node.norm.owner} has no constant affine map ({affine.value})"
        raise Refused(affine, detail)
    if not affine.is_finite():
        raise Refused(Reason.NON_FINITE, f"{node.norm.owner} gives NaN or infinite values")
    channels = frame.channels(node.inputs[0])
    held = _held(graph, node, affine)
    if held is None and (alike := _alike(affine, channels)) is not None:
        return _Scale(alike, frame.rank)
    if node.norm.channel_dim != frame.channel_dim or affine.channels != channels:
        detail = f"{node.norm.owner} scales and shifts along another axis than that of the channels"
        raise Refused(Reason.CHANNEL_MISMATCH, detail)
    return _Scale(affine, frame.rank, held)


def _alike(affine: Affine, channels: int) -> Affine | None:
    """A map that is the same for all channels, along whichever axis it was found; else None."""
    both = affine.scale, affine.shift
    if not affine.channels or any(bool((each != each[0]).any()) for each in both):
        return None
    return Affine(*(each[:1].expand(channels).clone() for each in both))


def _held(graph: Graph, node: Node, affine: Affine) -> tuple[tuple[str, ...], float] | None:
    """The tensors of a batch norm and the number that is its eps; None for any other map."""
    names = tuple(value.parameter for value in node.inputs[1:] if value.parameter is not None)
    if len(names) != 4 or len(node.inputs) != 5:
        return None
    tensors = [graph.tensors[name] for name in names]
    for eps in node.literals:
        if isinstance(eps, float) and _batch_norm(tensors, eps).same_as(affine):
            return names, eps
    return None


def _batch_norm(tensors: Sequence[Tensor], eps: float) -> Affine:
    weight, bias, mean, variance = tensors
    return Affine.of_batch_norm(mean, variance, weight, bias, eps=eps)


def _average(node: Node, rank: int, frame: Frame) -> Step:
    given: list[Any] = [*node.literals, *(None,) * 6][:6]
    kernel = _spread(given[0], rank)
    stride = _spread(given[1], rank) if given[1] else kernel
    padding = _spread(given[2] or 0, rank)
    counts = given[4] is not False
    if frame.rank == 1 and is_row(node.inputs[0]) and (kernel[0], padding[0]) == (1, 0):
        kernel, stride, padding, rank = kernel[1:], stride[1:], padding[1:], 1
    if rank != frame.rank:
        raise Refused(Reason.CHANNEL_MISMATCH, f"{describe(node)} pools over other axes")
    if given[3]:
        raise Refused(Reason.OTHER_GEOMETRY, f"{describe(node)} pools in ceil_mode")
    if any(padding) and not counts and given[5] is None:
        detail = f"{describe(node)} divides by fewer values at the border (count_include_pad=False)"
        raise Refused(Reason.OTHER_GEOMETRY, detail)
    return _Average(frame.channels(node.inputs[0]), kernel, stride, padding, given[5])


def _crop(node: Node, frame: Frame) -> Step:
    """A slice that cuts as much off at any size: `x[:, :, 1:-1]`."""
    given: list[Any] = [*node.literals, *(0, None, None, 1)[len(node.literals) :]]
    value, start, step = node.inputs[0], given[1] or 0, given[3]
    last = _END if given[2] is None else given[2]
    place = given[0] % len(value.shape) - frame.channel_dim - 1
    relative = start >= 0 and (last < 0 or last >= _END) and step == 1
    row = frame.rank == 1 and is_row(value)
    if not 0 <= place < frame.rank or not relative or row:
        detail = f"{describe(node)} cuts off something else at other sizes, or other axes"
        raise Refused(Reason.NOT_REWRITABLE, detail)
    before, after = [0] * frame.rank, [0] * frame.rank
    before[place], after[place] = start, -last if last < 0 else 0
    return _Crop(frame.channels(value), tuple(before), tuple(after))


def _spread(sizes: Any, rank: int) -> tuple[int, ...]:
    """One size for every axis, as PyTorch reads its arguments."""
    found = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    return tuple(int(size) for size in (found * rank if len(found) == 1 else found))
