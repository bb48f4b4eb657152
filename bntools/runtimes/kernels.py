"""Operations of onnx's reference evaluator that torch does a thousand times faster, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KERNELS"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_PADDED = -math.inf


class BatchNormalization(OpRun):
    """A batch norm of any opset: onnx's own evaluator takes those before 14 for training ones."""

    def _run(
        self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, *, epsilon: Any = None,
        is_test: Any = None, momentum: Any = None, spatial: Any = None, training_mode: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        if spatial == 0:
            raise NotImplementedError("a batch norm with statistics for each position")
        usual = 1e-5 if epsilon is None else epsilon
        if not training_mode and is_test in (None, 1):
            return (_normalised(x, scale, bias, mean, var, eps=usual),)
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        seen, spread = x.mean(axis=axes), x.var(axis=axes)
        kept = 0.9 if momentum is None else momentum
        moved = (old * kept + new * (1 - kept) for old, new in ((mean, seen), (var, spread)))
        given = (_normalised(x, scale, bias, seen, spread, eps=usual), *moved)
        return given[: max(1, len(self.onnx_node.output))]


class Conv(OpRun):
    """A convolution, with any padding."""

    def _run(
        self, x: Any, w: Any, b: Any = None, *, auto_pad: Any = None, dilations: Any = None,
        group: Any = None, kernel_shape: Any = None, pads: Any = None, strides: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        del kernel_shape
        image, weight, bias = _tensor(x), _tensor(w), None if b is None else _tensor(b)
        window = _Window(
            image, weight.shape[2:], strides=strides, dilations=dilations, pads=pads,
            automatic=auto_pad,
        )  # fmt: skip
        conv = _CONVS[window.rank]
        out = conv(
            window.padded(0.0), weight, bias, window.strides, 0, window.dilations, group or 1
        )
        return (out.numpy(),)


class ConvTranspose(OpRun):
    """A transposed convolution without automatic padding."""

    def _run(  # noqa: PLR0913 - the attributes of the operation
        self, x: Any, w: Any, b: Any = None, *, auto_pad: Any = None, dilations: Any = None,
        group: Any = None, kernel_shape: Any = None, output_padding: Any = None,
        output_shape: Any = None, pads: Any = None, strides: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        del kernel_shape
        if output_shape is not None or _is_automatic(auto_pad):
            raise NotImplementedError("a transposed convolution with automatic padding")
        image, weight = _tensor(x), _tensor(w)
        rank = image.dim() - 2
        out = _TRANSPOSED[rank](
            image, weight, None, _each(strides, rank), 0, 0, group or 1, _each(dilations, rank)
        )
        out = F.pad(out, _reversed([(0, extra) for extra in _each(output_padding, rank, 0)]))
        for axis, (low, high) in enumerate(zip(*_pads(pads, rank), strict=True), start=2):
            out = out.narrow(axis, low, out.shape[axis] - low - high)
        if b is not None:
            out = out + _tensor(b).reshape(1, -1, *[1] * rank)
        return (out.numpy(),)


class MaxPool(OpRun):
    """The largest value of each window; its place is not found."""

    def _run(
        self, x: Any, *, auto_pad: Any = None, ceil_mode: Any = None, dilations: Any = None,
        kernel_shape: Any = None, pads: Any = None, storage_order: Any = None, strides: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        del storage_order
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("a pool that gives indices")
        image = _tensor(x)
        window = _Window(
            image, kernel_shape, strides=strides, dilations=dilations, pads=pads,
            automatic=auto_pad, ceil=bool(ceil_mode),
        )  # fmt: skip
        pool = _MAX_POOLS[window.rank]
        out = pool(window.padded(_PADDED), kernel_shape, window.strides, 0, window.dilations)
        return (out.numpy(),)


class AveragePool(OpRun):
    """The mean of each window, of the values in it or of the padding too."""

    def _run(
        self, x: Any, *, auto_pad: Any = None, ceil_mode: Any = None, dilations: Any = None,
        count_include_pad: Any = None, kernel_shape: Any = None, pads: Any = None,
        strides: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        image = _tensor(x)
        window = _Window(
            image, kernel_shape, strides=strides, dilations=dilations, pads=pads,
            automatic=auto_pad, ceil=bool(ceil_mode),
        )  # fmt: skip
        ones = torch.ones_like(image[:1, :1])
        counted = _Window(
            ones, kernel_shape, strides=strides, dilations=dilations, pads=pads,
            automatic=auto_pad, ceil=bool(ceil_mode),
        )  # fmt: skip
        sums = window.summed(window.padded(0.0))
        counts = counted.summed(counted.padded(0.0, asked=1.0 if count_include_pad else 0.0))
        return ((sums / counts).numpy(),)


class Resize(OpRun):
    """Nearest and linear interpolation, axis by axis."""

    def _run(  # noqa: PLR0913 - the attributes of the operation
        self, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None, *,
        antialias: Any = None, axes: Any = None, coordinate_transformation_mode: Any = None,
        cubic_coeff_a: Any = None, exclude_outside: Any = None, extrapolation_value: Any = None,
        keep_aspect_ratio_policy: Any = None, mode: Any = None, nearest_mode: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        del roi, cubic_coeff_a, exclude_outside, extrapolation_value
        keeps = keep_aspect_ratio_policy in (None, "stretch")
        if antialias or mode not in ("nearest", "linear") or not keeps:
            raise NotImplementedError(f"resizing with mode {mode!r}")
        image = _tensor(x)
        chosen = list(range(image.dim())) if axes is None else [int(a) for a in axes]
        for place, axis in enumerate(chosen):
            if sizes is not None and len(sizes):
                size = int(sizes[place])
                scale = size / image.shape[axis]
            else:
                scale = float(scales[place])
                size = math.floor(image.shape[axis] * scale)
            if scale == 1.0:
                continue
            at = _coordinates(coordinate_transformation_mode, image.shape[axis], size, scale)
            image = (
                _nearest(image, axis, at, nearest_mode)
                if mode == "nearest"
                else _linear(image, axis, at)
            )
        return (image.numpy(),)


KERNELS: tuple[type[OpRun], ...] = (
    AveragePool,
    BatchNormalization,
    Conv,
    ConvTranspose,
    MaxPool,
    Resize,
)


class _Window:
    """A window that moves over an image: its padding, made explicit."""

    def __init__(
        self, image: Tensor, kernel: Sequence[int], *, strides: Any, dilations: Any, pads: Any,
        automatic: Any, ceil: bool = False,
    ) -> None:  # fmt: skip
        self.image, self.kernel = image, list(kernel)
        self.rank = len(self.kernel)
        self.strides, self.dilations = _each(strides, self.rank), _each(dilations, self.rank)
        self.spans = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        self.before, self.after = _pads(pads, self.rank)
        if _is_automatic(automatic):
            self.before, self.after = self._automatic(str(automatic))
        self.overhang = [self._overhang(axis) if ceil else 0 for axis in range(self.rank)]

    def _automatic(self, mode: str) -> tuple[list[int], list[int]]:
        totals = [
            max(0, (-(-size // stride) - 1) * stride + span - size)
            for size, stride, span in zip(
                self.image.shape[2:], self.strides, self.spans, strict=True
            )
        ]
        if mode == "VALID":
            totals = [0] * self.rank
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (large, small) if mode == "SAME_LOWER" else (small, large)

    def _overhang(self, axis: int) -> int:
        """How far the last window reaches over the padding, where sizes are rounded up."""
        size, stride = self.image.shape[2 + axis], self.strides[axis]
        free = size + self.before[axis] + self.after[axis] - self.spans[axis]
        count = -(-free // stride) + 1
        if (count - 1) * stride >= size + self.before[axis]:
            count -= 1  # a window that starts in the padding is left out
        return max(0, (count - 1) * stride - free)

    def padded(self, value: float, *, asked: float | None = None) -> Tensor:
        """The image in its padding; what was asked for may have another value than the rest."""
        sides = list(zip(self.before, self.after, strict=True))
        image = F.pad(self.image, _reversed(sides), value=value if asked is None else asked)
        return F.pad(image, _reversed([(0, n) for n in self.overhang]), value=value)

    def summed(self, image: Tensor) -> Tensor:
        """The sums of all windows, for each channel on its own."""
        ones = torch.ones(image.shape[1], 1, *self.kernel, dtype=image.dtype)
        conv = _CONVS[self.rank]
        return conv(image, ones, None, self.strides, 0, self.dilations, image.shape[1])


def _normalised(x: Any, scale: Any, bias: Any, mean: Any, var: Any, *, eps: float) -> Any:
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale, bias, mean, var = (each.reshape(shape) for each in (scale, bias, mean, var))
    return (scale * (x - mean) / np.sqrt(var + eps) + bias).astype(x.dtype)


def _coordinates(mode: Any, size: int, new: int, scale: float) -> Tensor:
    """Where each new position lies in the old image."""
    at = torch.arange(new, dtype=torch.float64)
    if mode == "align_corners":
        return at * (size - 1) / (new - 1) if new > 1 else at * 0
    if mode == "asymmetric":
        return at / scale
    if mode in (None, "half_pixel") or (mode == "pytorch_half_pixel" and new > 1):
        return (at + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return at * 0
    if mode == "half_pixel_symmetric":
        adjusted = new / (size * scale)
        return size / 2 * (1 - adjusted) + (at + 0.5) / scale - 0.5
    raise NotImplementedError(f"resizing with coordinates {mode!r}")


def _nearest(image: Tensor, axis: int, at: Tensor, mode: Any) -> Tensor:
    rounded = {
        "floor": at.floor(),
        "ceil": at.ceil(),
        "round_prefer_ceil": (at + 0.5).floor(),
    }.get(str(mode), (at - 0.5).ceil())
    return image.index_select(axis, rounded.long().clamp(0, image.shape[axis] - 1))


def _linear(image: Tensor, axis: int, at: Tensor) -> Tensor:
    at = at.clamp(0, image.shape[axis] - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=image.shape[axis] - 1)
    shape = [-1 if each == axis else 1 for each in range(image.dim())]
    part = (at - low).reshape(shape)
    return image.index_select(axis, low) * (1 - part) + image.index_select(axis, high) * part


def _is_automatic(mode: Any) -> bool:
    return mode not in (None, "NOTSET")


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _each(values: Any, rank: int, usual: int = 1) -> list[int]:
    return [usual] * rank if values is None else [int(value) for value in values]


def _pads(pads: Any, rank: int) -> tuple[list[int], list[int]]:
    values = _each(pads, 2 * rank, 0)
    return values[:rank], values[rank:]


def _reversed(sides: Sequence[tuple[int, int]]) -> list[int]:
    """Sides per axis in the order of `F.pad`: the last axis first."""
    return [size for side in reversed(sides) for size in side]
