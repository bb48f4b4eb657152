"""Parts of a split that go through a sequence, as torch's exporter writes `torch.split`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto
from torch import Tensor

from bntools.onnx_graph.attributes import attribute
from bntools.onnx_graph.tensors import Array

__all__ = ["Part", "part_of"]

Numbers = Callable[[str], Array | None]


@dataclass(frozen=True)
class Part:
    """A slice of `data` along an axis, which is squeezed where `whole` is False."""

    data: str
    axis: int
    start: int
    length: int
    whole: bool

    def shape(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part."""
        sizes = list(data)
        sizes[self.axis : self.axis + 1] = [self.length] if self.whole else []
        return tuple(sizes)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor."""
        part = tensor.narrow(self.axis, self.start, self.length)
        return part if self.whole else part.squeeze(self.axis)


def part_of(
    split: NodeProto, picked: NodeProto, shape: tuple[int, ...], numbers: Numbers
) -> Part | None:
    """What `SequenceAt` picks of a `SplitToSequence`; None where that is not known."""
    place = numbers(picked.input[1])
    axis = int(attribute(split, "axis", 0))
    if place is None or place.size != 1 or not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    sizes = _sizes(split, shape[axis], numbers)
    index = int(place.reshape(()))
    if sizes is None or not -len(sizes) <= index < len(sizes):
        return None
    index %= len(sizes)
    whole = len(split.input) > 1 or bool(attribute(split, "keepdims", 1))
    return Part(split.input[0], axis, sum(sizes[:index]), sizes[index], whole)


def _sizes(split: NodeProto, total: int, numbers: Numbers) -> list[int] | None:
    if len(split.input) < 2 or not split.input[1]:
        return [1] * total
    given = numbers(split.input[1])
    if given is None:
        return None
    if given.ndim:
        sizes = [int(size) for size in given]
        return sizes if sum(sizes) == total and min(sizes, default=0) >= 0 else None
    size = int(given.reshape(()))
    if size < 1:
        return None
    return [min(size, total - start) for start in range(0, total, size)]
