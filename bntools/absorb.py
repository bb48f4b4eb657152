"""The arithmetic of a fold: an affine map after or before a linear layer goes into its tensors.

Everything is computed in float64 and cast once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bntools.affine import Affine

__all__ = [
    "SMALLEST_NORMAL",
    "Absorbed",
    "InputLayout",
    "OutputLayout",
    "absorb",
    "absorb_after",
    "absorb_before",
    "overflows",
    "pad_values",
]

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# elements at a time: a float64 block of this size stays in a core's cache
_BLOCK = 1 << 15


@dataclass(frozen=True)
class OutputLayout:
    """Where the output channels are in a weight.

    `axis` is 0 for convolutions and `F.linear`, 1 for `x @ W` and transposed convolutions; with
    `groups > 1` (transposed convolutions only) output channel `g * W.shape[1] + j` is column `j`
    of the g-th block of rows.
    """

    axis: int = 0
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """The number of output channels of a weight."""
        return weight.shape[self.axis] * self.groups


@dataclass(frozen=True)
class InputLayout:
    """Where the input channels are in a weight.

    `axis` is 1 for convolutions and `F.linear`, 0 for `x @ W` and transposed convolutions. With
    `groups > 1` input channel `g * W.shape[1] + j` of a convolution is column `j` of the g-th block
    of rows; of a transposed one every input channel is a row.
    """

    axis: int = 1
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """The number of input channels of a weight."""
        return weight.shape[1] * self.groups if self.axis else weight.shape[0]

    def outputs(self, weight: Tensor) -> int:
        """The number of output channels of a weight."""
        return weight.shape[0] if self.axis else weight.shape[1] * self.groups


@dataclass(frozen=True)
class Absorbed:
    """A weight and bias that hold an affine map; `flushed` values were subnormal and are 0."""

    weight: Tensor
    bias: Tensor | None
    flushed: int


def absorb_after(
    weight: Tensor, bias: Tensor | None, affine: Affine, layout: OutputLayout
) -> Absorbed:
    """Absorb `affine(linear(x))` into a weight and bias of the same dtype as the weight.

    The new weight is `scale * weight` along the output channels, the new bias
    `scale * bias + shift`; bias stays None where it was None and the shift is zero.
    """
    weight = weight.detach()
    scaled, flushed = _scaled(weight, affine.scale.to(weight.device), layout)
    if bias is None and not affine.shift.any():
        return Absorbed(scaled, None, flushed)
    like = weight if bias is None else bias
    shifted = _shifted(bias, affine).to(like.device, like.dtype, copy=True)
    return Absorbed(scaled, shifted, flushed + _flush(shifted))


def absorb_before(
    weight: Tensor, bias: Tensor | None, affine: Affine, layout: InputLayout
) -> Absorbed:
    """Absorb `linear(affine(x))` into a weight and bias of the same dtype as the weight.

    The new weight is `scale * weight` along the input channels, the new bias `bias` plus the sum
    over all that an output sees of `weight * shift`; bias stays None where it was None and the
    shift is zero. Exact where each output sees the whole weight: not beside padding with zeros.
    """
    weight = weight.detach()
    scaled = torch.empty_like(weight, memory_format=torch.contiguous_format)
    offsets = _scaled_before(weight, scaled, affine, layout)
    flushed = _flush(scaled)
    if not weight.is_contiguous():
        scaled = torch.empty_like(weight).copy_(scaled)
    if bias is None and not affine.shift.any():
        return Absorbed(scaled, None, flushed)
    like = weight if bias is None else bias.detach()
    total = offsets.to(like.device)
    if bias is not None:
        total = total + like.to(torch.float64)
    moved = total.to(like.dtype, copy=True)
    return Absorbed(scaled, moved, flushed + _flush(moved))


def absorb(
    weight: Tensor,
    bias: Tensor | None,
    *,
    before: tuple[Affine, InputLayout] | None = None,
    after: tuple[Affine, OutputLayout] | None = None,
) -> Absorbed:
    """Absorb `after(linear(before(x)))`, rounding once."""
    if before is None:
        return absorb_after(weight, bias, *after) if after else Absorbed(weight, bias, 0)
    if after is None:
        return absorb_before(weight, bias, *before)
    wide = None if bias is None else bias.detach().to(torch.float64)
    inner = absorb_before(weight.detach().to(torch.float64), wide, *before)
    outer = absorb_after(inner.weight, inner.bias, *after)
    like = weight if bias is None else bias
    last = None if outer.bias is None else outer.bias.to(like.dtype)
    return Absorbed(outer.weight.to(weight.dtype), last, inner.flushed + outer.flushed)


def pad_values(affine: Affine) -> Tensor:
    """What a map takes to zero, in float64: `-shift / scale`, and 0 where the shift is zero."""
    values = -affine.shift / affine.scale
    return torch.where(affine.shift == 0, torch.zeros_like(values), values)


def _scaled_before(weight: Tensor, scaled: Tensor, affine: Affine, layout: InputLayout) -> Tensor:
    """Fill `scaled`, in blocks of rows, and return what the shift gives for each output."""
    source, target = _by_group(weight, layout), _by_group(scaled, layout)
    factors = affine.scale.to(weight.device).reshape(layout.groups, -1)
    shifts = affine.shift.to(weight.device).reshape(layout.groups, -1)
    outputs = source.shape[1 if layout.axis else 2]
    offsets = weight.new_zeros((layout.groups, outputs), dtype=torch.float64)
    for group, rows in _parts(source):
        exact = source[group, rows].to(torch.float64)
        taps = exact.sum(-1)
        if layout.axis:
            target[group, rows] = (exact * factors[group].reshape(1, -1, 1)).to(weight.dtype)
            offsets[group, rows] = taps @ shifts[group]
        else:
            own = factors[group, rows].reshape(-1, 1, 1)
            target[group, rows] = (exact * own).to(weight.dtype)
            offsets[group] += shifts[group, rows] @ taps
    return offsets.flatten()


def _by_group(weight: Tensor, layout: InputLayout) -> Tensor:
    """View a weight as (groups, rows, columns, rest)."""
    rows, columns = weight.shape[0] // layout.groups, weight.shape[1]
    return weight.reshape(layout.groups, rows, columns, math.prod(weight.shape[2:]))


def overflows(weight: Tensor, bias: Tensor | None, affine: Affine, layout: OutputLayout) -> bool:
    """Whether folding would give values that the weight's dtype cannot hold.

    Exact where the dtype is half or a scale is large; a float32 weight over 1e30 is not looked for.
    """
    limit = torch.finfo(weight.dtype).max
    shift = _shifted(bias, affine)
    if shift.numel() and float(shift.abs().max()) > limit:
        return True
    largest = float(affine.scale.abs().max()) if affine.channels else 0.0
    if limit > 1e30 and largest < 1e8:
        return False
    peaks = _channel_peaks(weight.detach(), layout)
    return bool((peaks * affine.scale.abs()).nan_to_num(0.0).max() > limit)


def _shifted(bias: Tensor | None, affine: Affine) -> Tensor:
    if bias is None:
        return affine.shift
    return bias.detach().to("cpu", torch.float64) * affine.scale + affine.shift


def _blocks(weight: Tensor, layout: OutputLayout) -> tuple[Tensor, bool]:
    """View a weight as (groups, rows, columns, rest), and say whether channels are rows."""
    if layout.axis == 0:
        return weight.reshape(1, weight.shape[0], 1, math.prod(weight.shape[1:])), True
    rows, columns = weight.shape[0] // layout.groups, weight.shape[1]
    return weight.reshape(layout.groups, rows, columns, math.prod(weight.shape[2:])), False


def _scaled(weight: Tensor, scale: Tensor, layout: OutputLayout) -> tuple[Tensor, int]:
    scaled = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, by_row = _blocks(weight, layout)
    target, _ = _blocks(scaled, layout)
    factors = scale.reshape(1, -1, 1, 1) if by_row else scale.reshape(layout.groups, 1, -1, 1)
    buffered = weight.dtype == torch.float32 and weight.device.type == "cpu"
    multiply = _multiply_by_numpy if buffered else _multiply
    normal = not weight.numel() or multiply(source, factors, target)
    flushed = 0 if normal else _flush(scaled)
    if not weight.is_contiguous():
        scaled = torch.empty_like(weight).copy_(scaled)
    return scaled, flushed


def _parts(source: Tensor) -> Iterator[tuple[int, slice]]:
    """The blocks of rows, group by group, in which a weight is worked on."""
    step = max(1, _BLOCK // max(1, source[0, :1].numel()))
    for group in range(source.shape[0]):
        for start in range(0, source.shape[1], step):
            yield group, slice(start, start + step)


def _multiply(source: Tensor, factors: Tensor, target: Tensor) -> bool:
    """`target = source * factors` in float64, rounded once; whether all are normal in float32."""
    normal = True
    for group, rows in _parts(source):
        factor = factors[group, rows] if factors.shape[1] > 1 else factors[group]
        block = target[group, rows]
        block.copy_(source[group, rows].to(torch.float64) * factor)
        normal = bool(block.abs().amin() >= SMALLEST_NORMAL) and normal
    return normal


def _multiply_by_numpy(source: Tensor, factors: Tensor, target: Tensor) -> bool:
    """The same for float32, with NumPy's buffered casts: no float64 copy, and one thread."""
    a, b, out = source.numpy(), factors.numpy(), target.numpy()
    normal = True
    with np.errstate(all="ignore"):
        for group, rows in _parts(source):
            factor = b[group, rows] if b.shape[1] > 1 else b[group]
            block = out[group, rows]
            np.multiply(a[group, rows], factor, out=block, dtype=np.float64, casting="same_kind")
            normal = bool(np.abs(block).min() >= SMALLEST_NORMAL) and normal
    return normal


def _flush(values: Tensor) -> int:
    """Zero what is subnormal in float32: it changes no result and slows convolutions down.

    Works in place and returns how many values it zeroed; float16 needs its small values.
    """
    if values.dtype == torch.float16:
        return 0
    below = SMALLEST_NORMAL * (1 - torch.finfo(values.dtype).eps)
    normal = torch.nn.functional.hardshrink(values, below)
    count = int(values.count_nonzero() - normal.count_nonzero())
    if count:
        values.copy_(normal)
    return count


def _channel_peaks(weight: Tensor, layout: OutputLayout) -> Tensor:
    blocks, by_row = _blocks(weight, layout)
    if not blocks.numel():
        return torch.zeros(layout.channels(weight), dtype=torch.float64, device="cpu")
    peaks = blocks.abs().amax(dim=(0, 2, 3) if by_row else (1, 3))
    return peaks.reshape(-1).to("cpu", torch.float64)
