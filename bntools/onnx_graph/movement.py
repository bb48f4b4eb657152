"""What ONNX operations do to channels: those that only move data, and those that let affines pass.

Each is carried out on tensors of labels by onnx's own reference evaluator, so that every opset's
form of an operation is understood as its standard says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper
from torch import Tensor

from bntools.dataflow.graph import ELSEWHERE, MIXED, ZERO, Kind, Move, Pass, Sum
from bntools.dataflow.reach import Refused
from bntools.onnx_graph.attributes import attribute, is_standard
from bntools.onnx_graph.tensors import FLOATS, Array
from bntools.onnx_graph.values import Knowledge, evaluated
from bntools.report import Reason

__all__ = ["Movement", "movement"]

_WHOLE = {
    "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile",
    "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_PARTIAL = {"Split", "Slice", "Gather"}
_HOMOGENEOUS = {"Relu", "LeakyRelu", "PRelu", "Abs"}
_AVERAGES = {"GlobalAveragePool", "ReduceMean", "ReduceSum", "AveragePool"}
_LARGEST = {"GlobalMaxPool", "ReduceMax", "ReduceMin", "MaxPool"}
_POOLS = {"AveragePool", "MaxPool"}
_GLOBAL = {"GlobalAveragePool", "GlobalMaxPool"}
_POOLED = {"kernel_shape", "pads", "strides", "dilations", "auto_pad", "ceil_mode"}


Apply = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Movement:
    """What an operation is to a per-channel affine, and which of its inputs it moves."""

    kind: Kind
    data: tuple[str, ...]
    detail: Move | Pass | Sum


def movement(node: NodeProto, known: Knowledge, proto: ModelProto) -> Movement | None:
    """How an affine gets through a node; None where it does not, or where that is not known."""
    if not is_standard(node) or not node.input or not node.output or not node.output[0]:
        return None
    data = node.input[0]
    if node.op_type == "SequenceAt":
        data = known.parts[node.output[0]].data if node.output[0] in known.parts else data
    if known[data].element not in FLOATS or not known[node.output[0]].complete:
        return None
    one = _Operation(node, known, proto)
    part = known.parts.get(node.output[0])
    if part is not None:
        cut = Move(lambda labels: [part.of(labels[0])], partial=True)
        return Movement(Kind.MOVE, (part.data,), cut)
    reader = _READERS.get(node.op_type)
    found = reader(one) if reader is not None else None
    if found is None:
        return None
    if not isinstance(found, Movement):
        kind = Kind.MOVE if isinstance(found, Move) else Kind.PASS
        found = Movement(kind, (data,), found)
    if isinstance(found.detail, Sum):
        return found
    return replace(found, detail=replace(found.detail, apply=_watched(found.detail.apply, one)))


def _watched(apply: Apply, one: _Operation) -> Apply:
    """Labels that do not come out as the file says rule folds out, and are no error."""
    shapes = [one.known[name].shape for name in one.node.output]

    def watched(labels: Sequence[Tensor]) -> list[Tensor]:
        cause: Exception | None = None
        given: list[Tensor] = []
        try:
            given = apply(labels)
        except Exception as error:  # noqa: BLE001 - onnx's evaluator raises anything
            cause = error
        pairs = zip(given, shapes, strict=False)
        if not given or any(tuple(each.shape) != shape for each, shape in pairs):
            where = one.node.name or one.node.output[0]
            why = f"what {one.node.op_type} in {where} does with channels could not be followed"
            raise Refused(Reason.CHANNEL_MISMATCH, why) from cause
        return given

    return watched


@dataclass(frozen=True)
class _Operation:
    node: NodeProto
    known: Knowledge
    proto: ModelProto

    @property
    def data(self) -> str:
        name: str = self.node.input[0]
        return name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what comes out."""
        return self.known[self.node.output[0]].shape or ()

    def number(self, position: int) -> Array | None:
        """The numbers of an input, where they are known."""
        name = self.node.input[position] if len(self.node.input) > position else ""
        return self.known[name].array if name else None

    def has(self, position: int) -> bool:
        return len(self.node.input) > position and bool(self.node.input[position])

    def feeds(self, moved: int = 1) -> dict[str, Array] | None:
        """The other inputs; None where the numbers of one are not known."""
        found = {}
        for name in self.node.input[moved:]:
            array = self.known[name].array
            if name and array is None:
                return None
            if name and array is not None:
                found[name] = array
        return found

    def run(self, node: NodeProto, feeds: dict[str, Any]) -> list[Tensor]:
        given = evaluated(node, feeds, self.proto)
        if given is None:
            raise NotImplementedError(f"labels of {node.op_type}")
        return [torch.from_numpy(np.array(each, dtype=np.float32)) for each in given]


Found = Move | Pass | Movement | None


def _moved(one: _Operation) -> Found:
    others = one.feeds()
    if others is None:
        return None

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        return one.run(one.node, {**others, one.data: labels[0].numpy()})

    return Move(apply, partial=one.node.op_type in _PARTIAL)


def _same(one: _Operation) -> Found:
    del one
    return Move(lambda labels: [labels[0]], partial=False)


def _cast(one: _Operation) -> Found:
    """A cast that keeps every number: a narrowing one rounds."""
    before = FLOATS[one.known[one.data].element]
    after = FLOATS.get(one.known[one.node.output[0]].element)
    if after is None:
        return None
    old, new = torch.finfo(before), torch.finfo(after)
    return _same(one) if new.eps <= old.eps and new.max >= old.max else None


def _dropout(one: _Operation) -> Found:
    training = one.number(2)
    unknown = one.has(2) and training is None
    return None if unknown or (training is not None and training.any()) else _same(one)


def _concat(one: _Operation) -> Found:
    names = list(one.node.input)
    inner = NodeProto()
    inner.CopyFrom(one.node)
    inner.input[:] = [f"part {place}" for place in range(len(names))]  # one may be there twice

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        feeds = {f"part {place}": each.numpy() for place, each in enumerate(labels)}
        return one.run(inner, feeds)

    return Movement(Kind.MOVE, tuple(names), Move(apply, partial=False))


def _pad(one: _Operation) -> Found:
    constant = attribute(one.node, "mode", "constant") == "constant"
    value, others = one.number(2), one.feeds()
    if others is None or not len(one.shape):
        return None
    zero = float(attribute(one.node, "value", 0.0)) == 0 and (value is None or not value.any())
    label = float(ZERO if zero else ELSEWHERE)
    inner = NodeProto()
    inner.CopyFrom(one.node)
    if constant and one.has(1):
        while len(inner.input) < 3:
            inner.input.append("")
        inner.input[2] = "the label"
        others = {**others, "the label": np.array(label, np.float32)}
    elif constant:
        kept = [each for each in inner.attribute if each.name != "value"]
        del inner.attribute[:]
        inner.attribute.extend([*kept, helper.make_attribute("value", label)])

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        return one.run(inner, {**others, one.data: labels[0].float().numpy()})

    sizes = others.get(one.node.input[1]) if one.has(1) else attribute(one.node, "pads", [])
    return Move(apply, partial=any(size < 0 for size in np.asarray(sizes).flatten()))


def _homogeneous(one: _Operation) -> Found:
    if one.shape != one.known[one.data].shape:
        return None  # the slopes of a PRelu that make the data larger
    if not all(one.known[name].constant for name in one.node.input[1:2]):
        return None  # slopes that are data themselves
    return Pass(
        lambda labels: [labels[0]], gain=None, monotone=True, limit="only zero stays zero there"
    )


def _clipped(one: _Operation) -> Found:
    """What cuts at zero alone is a Relu."""
    low, high = attribute(one.node, "min"), attribute(one.node, "max")
    if one.has(1):
        array = one.number(1)
        low = float(array.reshape(())) if array is not None and array.size == 1 else None
    is_open = high is None or high >= np.finfo(np.float32).max
    return _homogeneous(one) if low == 0 and is_open and not one.has(2) else None


def _average(one: _Operation) -> Found:
    apply = _merging(one)
    if apply is None:
        return None
    if one.node.op_type == "ReduceSum":
        return Pass(apply, gain=None, limit="how many values it adds depends on the size")
    if one.node.op_type == "AveragePool" and attribute(one.node, "count_include_pad", 0):
        plain = attribute(one.node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        padded = any(attribute(one.node, "pads", [])) or not plain
        if padded or attribute(one.node, "ceil_mode", 0):
            return Pass(apply, gain=None, limit="it counts the zeros of its padding")
    return Pass(apply)


def _extreme(one: _Operation) -> Found:
    apply = _merging(one)
    return None if apply is None else Pass(apply, monotone=True)


def _resized(one: _Operation) -> Found:
    """Nearest neighbours are movement; the weights of all other modes sum to one."""
    name = one.node.op_type
    cropped = attribute(one.node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    before = one.known[one.data].shape
    if cropped or before is None or len(before) < 3 or before[:2] != one.shape[:2]:
        return None
    if attribute(one.node, "mode", "nearest") == "nearest":
        apply = _spread(one)
        fewer = any(new < old for new, old in zip(one.shape, before, strict=True))
        return Move(apply, partial=fewer or name == "Resize")
    return Pass(_spread(one))


def _spread(one: _Operation) -> Apply:
    """The label of a map where all of it has one, else MIXED."""

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        maps = labels[0].flatten(2)
        low, high = maps.amin(2), maps.amax(2)
        merged = torch.where(low == high, high, float(MIXED))
        view = merged.reshape(*merged.shape, *[1] * (len(one.shape) - 2))
        return [view.expand(one.shape)]

    return apply


def _merging(one: _Operation) -> Apply | None:
    """What several elements become: the label that all of them have (zeros aside), else MIXED."""
    name = one.node.op_type
    if name in _POOLS:
        inner = helper.make_node("MaxPool", ["labels"], ["largest"])
        inner.attribute.extend(each for each in one.node.attribute if each.name in _POOLED)
        return lambda labels: [
            _merged(labels[0], lambda t: one.run(inner, {"labels": t.numpy()})[0])
        ]
    rank = len(one.known[one.data].shape or ())
    axes = tuple(range(2, rank)) if name in _GLOBAL else _axes(one, rank)
    if axes is None:
        return None

    def apply(labels: Sequence[Tensor]) -> list[Tensor]:
        merged = _merged(labels[0], lambda t: t.amax(axes, keepdim=True) if axes else t)
        return [merged.reshape(one.shape)]

    return apply


def _axes(one: _Operation, rank: int) -> tuple[int, ...] | None:
    """The axes that a reduction reduces."""
    given: Any = attribute(one.node, "axes")
    if given is None and one.has(1):
        array = one.number(1)
        if array is None:
            return None
        given = array.flatten().tolist()
    if not given:
        return () if attribute(one.node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(axis) % rank for axis in given) if rank else None


def _merged(labels: Tensor, largest: Callable[[Tensor], Tensor]) -> Tensor:
    labels = labels.float()
    zero = labels == ZERO
    high = largest(torch.where(zero, -torch.inf, labels).contiguous())
    low = -largest(torch.where(zero, -torch.inf, -labels).contiguous())
    merged = torch.where(high == low, high, float(MIXED))
    return torch.where(high == -torch.inf, float(ZERO), merged)


def _summed(one: _Operation) -> Found:
    names = list(one.node.input)
    if any(not one.known[name].complete for name in names):
        return None
    signs = [1.0] * len(names)
    if one.node.op_type == "Sub":
        signs[1] = -1.0
    if one.node.op_type == "Mean":
        signs = [1.0 / len(names)] * len(names)
    return Movement(Kind.SUM, tuple(names), Sum(tuple(signs)))


_READERS: dict[str, Callable[[_Operation], Found]] = {
    **dict.fromkeys(_WHOLE | _PARTIAL, _moved),
    "Identity": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Dropout": _dropout,
    "Concat": _concat,
    "Pad": _pad,
    **dict.fromkeys(_HOMOGENEOUS, _homogeneous),
    **dict.fromkeys(_AVERAGES, _average),
    **dict.fromkeys(_LARGEST, _extreme),
    "Clip": _clipped,
    "Resize": _resized,
    "Upsample": _resized,
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), _summed),
}
